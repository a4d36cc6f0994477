"""Sensitivity of every layer of the trained networks on CIFAR-10, beside the share that each way of pruning keeps of it

Reads the networks that prune_densenet40.py has trained (and trains those it does not find), writes awareness.csv; seeds in the table are not done again.
"""
import pandas as pd
from torch import set_num_threads
from spectral_nb.experiment import append_rows, run_dls, trained_network
from spectral_nb.explain import layer_sensitivity
from spectral_nb.prune import prune
from options import overrides, parser, sparse_option
from prune_densenet40 import L1, NETS, RATIOS

WAYS = [*RATIOS, 'erk']

def kept(model, x, ratios, seed):
    "Layer -> share of its channels left when 60 % of all channels go"
    t = prune(model, x, .6, ratios=ratios, seed=seed).table.set_index('layer')
    return t.channels_after/t.channels_before

def layers(arch, seed, l1, **over):
    "One row per layer: what pruning half of it alone costs on the test images, and what each way keeps"
    net = {k: v for k,v in (NETS[arch] | over).items() if not k.startswith('tune_')}
    model = trained_network('runs/prune_densenet40/networks', arch, seed=seed, l1=l1, **net).eval()
    test = run_dls(seed=seed, **{k: net[k] for k in ('data', 'items', 'size')}).valid
    df, x = layer_sensitivity(model, test)[['layer', 'stage', 'drop', 'rise']], test.one_batch()[0][:1]
    shares = {f'kept_{r}': kept(model, x, r, seed).reindex(df.layer).to_numpy() for r in WAYS}
    return df.assign(**shares).assign(arch=arch, seed=seed, l1=l1)

def main():
    p = parser(__doc__, NETS, 5, 'trained networks')
    sparse_option(p)
    args = p.parse_args()
    csv = args.out/'awareness.csv'
    set_num_threads(args.workers)
    done = set() if not csv.exists() else set(pd.read_csv(csv)[['arch', 'seed', 'l1']].itertuples(index=False, name=None))
    todo = [(a, s, L1[a] if args.sparse else 0.) for s in range(args.seeds) for a in args.archs]
    for arch,seed,l1 in (o for o in todo if o not in done):
        rows = layers(arch, seed, l1, data=args.data, **overrides(args)).round(5)
        append_rows(csv, rows.to_dict('records'))         # all layers of a network or none: a part would pass for done
        print(f'{arch} {seed} {l1}', flush=True)

if __name__=='__main__': main()
