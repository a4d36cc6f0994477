"""Pruning on CIFAR-10: shares of channels by layer, compared at equal channels and at equal FLOPs, paired by seed

For each seed a network is trained once; every way to share out the loss prunes that network and fine-tunes it alike (prune_densenet40.csv).
Stop it at any time and start it again: what is finished is not done again, and what was cut off goes on from its last epoch.
"""
import time
from spectral_nb.compare import arm_table, paired_table, whole_pairs
from spectral_nb.experiment import run_all, run_prune
from options import overrides, parser, sparse_option

NETS = dict(densenet40=dict(width=6, size=8, items=5000, lr=0.3, epochs=10, tune_lr=0.05, tune_epochs=3),
            vgg19=dict(width=0.25, size=16, items=10000, lr=0.05, epochs=12, tune_lr=0.02, tune_epochs=3))
L1 = dict(densenet40=0.002, vgg19=0.005) # the largest penalty without a loss of accuracy on held-out training images

RATIOS = ['uniform', 'spectral', 'reversed', 'gamma', 'random']

def parse():
    p = parser(__doc__, NETS, 5, 'trained networks')
    p.add_argument('--ratios', nargs='+', default=RATIOS, help='how layers share the loss, the first one is what the others are compared with')
    p.add_argument('--targets', nargs='+', type=float, default=[0.4, 0.6, 0.8], help='shares to remove')
    sparse_option(p)
    p.add_argument('--scratch', action='store_true', help='train the slim architectures from new weights instead of fine-tuning them')
    p.add_argument('--by', nargs='+', default=['channels', 'flops'], help='what is removed in equal shares')
    return p.parse_args()

def configs(args):
    "Full network first, then its prunings, seed by seed."
    for s in range(args.seeds):
        for arch in args.archs:
            net = dict(arch=arch, seed=s, data=args.data, **NETS[arch], l1=L1[arch] if args.sparse else 0.) | overrides(args)
            yield dict(ratios='none', target=0., by='channels', scratch=args.scratch, **net)
            yield from (dict(ratios=r, target=t, by=b, scratch=args.scratch, **net) for b in args.by for t in args.targets for r in args.ratios)

def main(args):
    start, todo, csv = time.time(), list(configs(args)), args.out/'prune_densenet40.csv'
    def run(cs): return run_all(cs, run_prune, csv, n_workers=args.workers, minutes=args.minutes-(time.time()-start)/60)
    run([c for c in todo if not c['target']])
    df = run(todo)
    print(df[df.target==0].groupby('arch')[['accuracy_at_once', 'accuracy']].agg(['mean', 'std']).round(4).to_string())
    for (arch,by,target),rows in df[df.target>0].groupby(['arch', 'by', 'target'], sort=False):
        rows = whole_pairs(rows, 'ratios')
        for value in ('accuracy_at_once', 'accuracy', 'loss') if len(rows) else ():
            print(f'\n{arch}, {target:.0%} of {by}, {value}')
            print(arm_table(rows, value, 'ratios').round(4).to_string(index=False))
            print(paired_table(rows, value, args.ratios[0], 'ratios').round(4).to_string(index=False))

if __name__=='__main__': main(parse())
