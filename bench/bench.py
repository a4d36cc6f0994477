"Seconds to analyse a VGG19 with random weights: beside weightwatcher, and beside nothing but the eigenvalues"
import argparse, contextlib, io, logging, os, time
from statistics import median
import torch
from spectral_nb.matrices import gram, layer_matrices
from spectral_nb.metrics import analyze, layer_scores
from spectral_nb.models import vgg19

def eigenvalues(model):
    "The least that any analysis must do: the eigenvalues of the Gram matrices, in single precision"
    for _,_,w in layer_matrices(model): torch.linalg.eigvalsh(gram(w, torch.float32))

def weightwatcher(model):
    from weightwatcher import WeightWatcher
    with contextlib.redirect_stdout(io.StringIO()): WeightWatcher(model=model, log_level=logging.ERROR).analyze()

RUNS = {'eigenvalues only':eigenvalues, 'layer_scores (Hill)':layer_scores, 'analyze (KS)':lambda m: analyze(m, progress=False), 'weightwatcher 0.7.7':weightwatcher}

def seconds(f, model):
    start = time.perf_counter()
    f(model)
    return time.perf_counter()-start

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--repeats', type=int, default=3, help='rounds; each runs all contestants in turn (3)')
    p.add_argument('--width', type=float, default=1., help='factor on the width of VGG19 (1)')
    args = p.parse_args()
    torch.manual_seed(0)
    model = vgg19(width=args.width)
    seconds(eigenvalues, model), seconds(weightwatcher, vgg19(width=1/16))           # imports and first calls
    rounds = [{k:seconds(f, model) for k,f in RUNS.items()} for _ in range(args.repeats)]
    print(f'VGG19, width {args.width:g}, {torch.get_num_threads()} threads, median of {args.repeats} interleaved rounds, load average {os.getloadavg()[0]:.1f} (others\' work spoils the ratios)\n')
    print(f'{"":20}{"seconds":>10}{"min":>9}{"max":>9}{"x eigenvalues":>16}')
    for k in RUNS:
        ts = [r[k] for r in rounds]
        ratio = median(r[k]/r['eigenvalues only'] for r in rounds)
        print(f'{k:20}{median(ts):10.3f}{min(ts):9.3f}{max(ts):9.3f}{ratio:16.2f}')
    print(f'\nweightwatcher takes {median(r["weightwatcher 0.7.7"]/r["analyze (KS)"] for r in rounds):.1f} times as long as `analyze`')

if __name__=='__main__': main()
