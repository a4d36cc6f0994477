"What the benchmarks share: their options, and tables that are printed as they grow"
import argparse, csv, os
from pathlib import Path
import torch

def parser(doc, repeats):
    p = argparse.ArgumentParser(description=doc)
    p.add_argument('--repeats', type=int, default=repeats, help=f'rounds; each runs all contestants in turn ({repeats})')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of torch (all cores)')
    p.add_argument('--out', type=Path, default=Path('runs/bench'), help='folder for the tables (runs/bench)')
    return p

def begin(args):
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"Medians of {args.repeats} interleaved rounds, {args.threads} threads, load average {os.getloadavg()[0]:.1f} (others' work spoils the ratios)", flush=True)

def table(rows, path):
    "Print `rows` as they come, and write them to `path`"
    with open(path, 'w', newline='') as f:
        for i,row in enumerate(rows):
            if i==0: out = csv.DictWriter(f, row); out.writeheader(); width = [max(15, len(k)+2) for k in row]; print(f'\n{path}\n' + ''.join(f'{k:>{w}}' for k,w in zip(row, width)))
            out.writerow({k: f'{v:.4g}' if isinstance(v, float) else v for k,v in row.items()}); f.flush()
            print(''.join(f'{v:{w}.4g}' if isinstance(v, float) else f'{v:>{w}}' for v,w in zip(row.values(), width)), flush=True)
