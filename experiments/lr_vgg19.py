"""Learning rates by layer on CIFAR-10: each arm at its own best rate, paired by seed, on all test images

First every arm's global rate is chosen on held-out training images (lr_vgg19_tune.csv), then the arms are compared (lr_vgg19.csv).
Stop it at any time and start it again: what is finished is not done again, and what was cut off goes on from its last epoch.
"""
import time
from spectral_nb.compare import arm_table, paired_table, whole_pairs
from spectral_nb.experiment import LR_ARMS, run_all, run_lr, tune
from options import overrides, parser

NETS  = dict(vgg19=dict(width=0.25, size=16, items=10000, epochs=12), densenet40=dict(width=6, size=8, items=5000, epochs=10))
ARMS  = ['uniform', 'spectral', 'spectral_mean', 'reversed', 'shuffled', 'lars']
GRIDS = dict(vgg19={None: [0.02, 0.05, 0.1, 0.2, 0.4], 'lars': [0.05, 0.15, 0.3, 0.5, 1.5]}, densenet40={None: [0.1, 0.2, 0.4, 0.8], 'lars': [0.15, 0.5, 1.5, 5.]})

def parse():
    p = parser(__doc__, NETS, 12, 'runs of each arm')
    p.add_argument('--arms', nargs='+', choices=LR_ARMS, default=ARMS, help='allocations of rates')
    p.add_argument('--tune_seeds', type=int, default=2, help='runs of each arm at each rate of its grid')
    return p.parse_args()

def nets(args):
    "The settings of each network."
    return [dict(arch=arch, data=args.data, **NETS[arch]) | overrides(args) for arch in args.archs]

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
