"""What untrained networks know of the sensitivity of the trained ones' layers: the control of awareness.csv

Each trained network of awareness.csv has an untrained twin with another initialization; both are asked which layers to spare.
Writes awareness_untrained.csv, one row per network: Kendall's tau of the shares kept with the measured drop of accuracy.
"""
from pathlib import Path
import pandas as pd, torch
from fastai.basics import set_seed
from spectral_nb.compare import mean_interval
from spectral_nb.explain import awareness
from spectral_nb.experiment import WIDTHS
from spectral_nb.models import ARCHS
from spectral_nb.prune import prune
from prune_densenet40 import NETS

HERE = Path(__file__).parent
METRICS = 'alpha', 'rel_alpha', 'rel_stable_rank'

def kept(model, size, metric):
    "Layer -> share of its channels left when 60 % of all channels go"
    t = prune(model, torch.zeros(1, 3, size, size), .6, ratios='spectral', metric=metric).table.set_index('layer')
    return t.channels_after/t.channels_before

def twin(arch, seed):
    set_seed(1000+seed)
    return ARCHS[arch](**{WIDTHS[arch]: NETS[arch]['width']})

def rows(df):
    for (arch, seed), g in df[df.l1==0].groupby(['arch', 'seed'], sort=False):
        sens = g.set_index('layer')['drop']
        res = dict(arch=arch, seed=seed, trained=awareness(g.set_index('layer').kept_spectral, sens, n_boot=10).tau)
        net = twin(arch, seed)
        for m in METRICS: res[f'untrained_{m}'] = awareness(kept(net, NETS[arch]['size'], m), sens, n_boot=10).tau
        yield res

def main():
    res = pd.DataFrame(rows(pd.read_csv(HERE/'awareness.csv'))).round(4)
    res.to_csv(HERE/'awareness_untrained.csv', index=False)
    for arch,g in res.groupby('arch', sort=False):
        cols = {c: g[c] for c in g.columns[2:]} | {'trained - untrained_alpha': g.trained-g.untrained_alpha}
        print(arch, pd.DataFrame({k: mean_interval(v) for k,v in cols.items()}).T.round(3).to_string(), sep='\n')

if __name__=='__main__': main()
