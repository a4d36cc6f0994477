"""Learning rates by layer on CIFAR-10: each arm at its own best rate, paired by seed, on all test images

First every arm's global rate is chosen on held-out training images (lr_vgg19_tune.csv), then the arms are compared (lr_vgg19.csv).
Stop it at any time and start it again: what is finished is not done again, and what was cut off goes on from its last epoch.
"""
import argparse, math, time
from pathlib import Path
from spectral_nb.compare import arm_table, paired_table, whole_pairs
from spectral_nb.experiment import LR_ARMS, run_all, run_lr, tune

NETS  = dict(vgg19=dict(width=0.25, size=16, items=10000, epochs=12), densenet40=dict(width=6, size=8, items=5000, epochs=10))
ARMS  = ['uniform', 'spectral', 'spectral_mean', 'reversed', 'shuffled', 'lars']
GRIDS = dict(vgg19={None: [0.02, 0.05, 0.1, 0.2], 'lars': [0.05, 0.15, 0.5, 1.5]}, densenet40={None: [0.1, 0.2, 0.4, 0.8], 'lars': [0.15, 0.5, 1.5, 5.]})

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--archs', nargs='+', choices=NETS, default=[*NETS], help='networks')
    p.add_argument('--arms', nargs='+', choices=LR_ARMS, default=[a for a in ARMS if a in LR_ARMS], help='allocations of rates')
    p.add_argument('--seeds', type=int, default=12, help='runs of each arm')
    p.add_argument('--tune_seeds', type=int, default=2, help='runs of each arm at each rate of its grid')
    p.add_argument('--minutes', type=float, default=math.inf, help='start no run after so many minutes')
    p.add_argument('--workers', type=int, default=2, help='processes of one thread each')
    p.add_argument('--epochs', type=int, help='epochs of each run, instead of the defaults')
    p.add_argument('--data', default='cifar10', help='cifar10, or digits for a trial')
    p.add_argument('--out', type=Path, default=Path(__file__).parent, help='folder of the tables')
    return p.parse_args()

def nets(args):
    "The settings of each network."
    for arch in args.archs:
        net = dict(arch=arch, data=args.data, **NETS[arch])
        yield net | (dict(epochs=args.epochs) if args.epochs else {}) | (dict(items=None) if args.data=='digits' else {})

def main(args):
    start = time.time()
    def run(f, *a): return f(*a, n_workers=args.workers, minutes=args.minutes-(time.time()-start)/60)
    rates = {}
    for net in nets(args):
        held_out = [dict(arm=a, seed=1000+s, valid_pct=0.1, **net) for s in range(args.tune_seeds) for a in args.arms]
        found = run(tune, held_out, GRIDS[net['arch']], run_lr, args.out/'lr_vgg19_tune.csv')
        if found is None: return print('the rates are not all chosen yet: start again')
        rates |= found
    configs = [dict(arm=a, lr=rates[net['arch'],a], seed=s, **net) for s in range(args.seeds) for net in nets(args) for a in args.arms]
    df = run(run_all, configs, run_lr, args.out/'lr_vgg19.csv')
    for arch,rows in df.groupby('arch', sort=False):
        rows = whole_pairs(rows)
        for value in ('mean_accuracy', 'mean_loss'):
            print(f'\n{arch}, {value}, {len(rows)} runs, rates', {a: r for (n,a),r in rates.items() if n==arch})
            print(arm_table(rows, value).round(4).to_string(index=False))
            print(paired_table(rows, value).round(4).to_string(index=False))

if __name__=='__main__': main(parse())
