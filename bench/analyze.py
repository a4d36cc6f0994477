"Seconds and memory to analyse networks with random weights: beside weightwatcher, and beside nothing but the eigenvalues"
import argparse, contextlib, io, logging, subprocess, sys, time
from pathlib import Path
from statistics import median
import torch
from torch import nn
from spectral_nb.matrices import gram, layer_matrices
from spectral_nb.metrics import analyze, layer_scores
from common import begin, parser, table

def eigenvalues(model):
    "The least that any analysis must do: the eigenvalues of the Gram matrices, in single precision"
    for _,_,w in layer_matrices(model): torch.linalg.eigvalsh(gram(w, torch.float32))

def weightwatcher(model):
    from weightwatcher import WeightWatcher
    with contextlib.redirect_stdout(io.StringIO()): WeightWatcher(model=model, log_level=logging.ERROR).analyze()

def ks(model): analyze(model, progress=False)

RUNS = dict(eigenvalues=eigenvalues, hill=layer_scores, analyze=ks, weightwatcher=weightwatcher)

def network(name):
    from torchvision.models import resnet50, vit_b_16
    from spectral_nb.models import densenet40, vgg19
    torch.manual_seed(0)
    return dict(vgg19=vgg19, densenet40=densenet40, resnet50=resnet50, vit_b_16=vit_b_16)[name]()
NETWORKS = 'vgg19', 'resnet50', 'vit_b_16', 'densenet40'

def square(n): torch.manual_seed(0); return nn.Sequential(nn.Linear(n, n, bias=False))
def deep(n): torch.manual_seed(0); return nn.Sequential(*[nn.Linear(256, 256) for _ in range(n)])

def seconds(f, model):
    start = time.perf_counter()
    f(model)
    return time.perf_counter()-start

def interleaved(runs, model, repeats): return [{k: seconds(RUNS[k], model) for k in runs} for _ in range(repeats)]

def resident(key): return int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1])/1024
def peak(run, name):
    "MB above what was resident before, with imports and first calls done"
    model, small = network(name), square(32)
    RUNS[run](small)
    Path('/proc/self/clear_refs').write_text('5')
    before = resident('VmRSS')
    RUNS[run](model)
    return resident('VmHWM')-before

def peak_apart(run, name):
    "`peak` in a process of its own"
    return float(subprocess.run([sys.executable, __file__, '--peak', run, name], capture_output=True, text=True, check=True).stdout.split()[-1])

def speed(repeats):
    for name in NETWORKS:
        rounds = interleaved(RUNS, network(name), repeats)
        ratio = lambda a, b: median(r[a]/r[b] for r in rounds)
        yield dict(network=name, **{k: median(r[k] for r in rounds) for k in RUNS}, weightwatcher_by_analyze=ratio('weightwatcher', 'analyze'),
                   analyze_by_eigenvalues=ratio('analyze', 'eigenvalues'), hill_by_eigenvalues=ratio('hill', 'eigenvalues'),
                   **{f'{k}_MB': peak_apart(k, name) for k in ('analyze', 'weightwatcher')})

def growth(largest, slow=2048):
    "From matrices of 256 x 256 to `largest`, and from 1 layer to 64; weightwatcher up to matrices of side `slow`"
    for what,make,sizes in (('side', square, [2**i for i in range(8, largest.bit_length())]), ('layers', deep, [1, 2, 4, 8, 16, 32, 64])):
        for n in sizes:
            runs = [k for k in ('eigenvalues', 'analyze', 'weightwatcher') if k!='weightwatcher' or what=='layers' or n<=slow]
            rounds = interleaved(runs, make(n), 3 if n<=slow else 1)
            yield dict(what=what, n=n, **{k: median(r[k] for r in rounds) for k in runs})

def main():
    p = parser(__doc__, 3)
    p.add_argument('--largest', type=int, default=8192, help='side of the largest matrix (8192)')
    p.add_argument('--peak', nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.peak: return print(peak(*args.peak))
    begin(args)
    for f in RUNS.values(): f(square(64))                                    # imports and first calls
    table(speed(args.repeats), args.out/'speed.csv')
    table(growth(args.largest), args.out/'growth.csv')

if __name__=='__main__': main()
