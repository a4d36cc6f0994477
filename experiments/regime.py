"""VGG19 on CIFAR-10 in the regime of papers: L2 decay, fixed momentum, cosine, no dead taps; scores of every layer by epoch

Of the 50,000 training images 10,000 train (`items`), 20,000 choose, 20,000 confirm together with the 10,000 test images.
Stop it at any time and start it again: what is finished is not done again, and what was cut off goes on from its last epoch.
"""
from functools import lru_cache
from pathlib import Path
import pandas as pd, torch
from fastai.basics import Callback
from fastai.torch_core import get_model
from spectral_nb.data import ImageTensors, cifar_path, folder_images, stratified, tensor_dls, _resize
from spectral_nb.experiment import WIDTHS, fit_run, make_learner, run_all, run_name
from spectral_nb.metrics import _layer_columns

ITEMS, CHOOSE = 10000, dict(cifar10=20000, cifar100=5000)
NETS = dict(vgg19=dict(width=.25, pools=3), densenet40=dict(width=8, pools=0))
LOGGED = [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 30, 35, 40, 45, 50, 54, 57, 60]

def _join(a, b): return ImageTensors(torch.cat([a.x, b.x]), torch.cat([a.y, b.y]), a.vocab)

@lru_cache(maxsize=4)
def images(data, size, judge):
    "Training images, and those to judge by: 'choose' or 'confirm'."
    train, test = (folder_images(cifar_path(data)/o) for o in ('train', 'test'))
    fit, rest = map(train.subset, stratified(train.y, ITEMS))
    choose, confirm = map(rest.subset, stratified(rest.y, CHOOSE[data]))
    res = fit, choose if judge=='choose' else _join(confirm, test)
    for o in res: o.x = _resize(o.x, size)
    return res

class LayerLog(Callback):
    "Keeps metrics of every layer at the start of some epochs, and at the end."
    def __init__(self, epochs, metrics=('alpha', 'stable_rank', 'norm')): self.epochs, self.metrics, self.rows = epochs, list(metrics), []
    def before_train(self): self._look(self.epoch)
    def after_epoch(self):
        if self.epoch+1==self.n_epoch: self._look(self.n_epoch)
    def _look(self, epoch):
        if epoch not in self.epochs or any(r['epoch']==epoch for r in self.rows): return
        df = _layer_columns(get_model(self.model), self.metrics, 'hill', 'pool')
        self.rows += df.drop(columns='warning').assign(epoch=epoch).to_dict('records')
    def state_dict(self): return dict(rows=self.rows)
    def load_state_dict(self, state): self.rows = list(state['rows'])

def run(arch, arm, lr, wd, seed, epochs, size, data, judge, log=False, folder=None):
    "Results of one run on the images of `judge`."
    dls = tensor_dls(*images(data, size, judge), 128, seed, pad=size//8, flip=True)
    width = {WIDTHS[arch]: NETS[arch]['width']} | ({'pools': NETS[arch]['pools']} if arch=='vgg19' else {})
    learn = make_learner(dls, arch, seed=seed, wd=wd, decay='l2', **ARMS[arm], **width)
    if log: learn.add_cb(LayerLog(LOGGED))
    folder = Path(folder)
    res = fit_run(learn, epochs, lr, seed, file=folder/'state.pt', last=3, sched='cosine')
    if len(learn.recorder.values)==epochs: res['train_loss'] = float(learn.recorder.values[-1][0])
    if log:
        config = dict(arch=arch, arm=arm, lr=lr, wd=wd, seed=seed, epochs=epochs, size=size, data=data, judge=judge)
        logs = folder.parent/'logs'
        logs.mkdir(exist_ok=True)
        pd.DataFrame(learn.layer_log.rows).assign(**config).to_csv(logs/f'{run_name(config)}.csv', index=False)
    return res

ARMS = dict(uniform=dict(lr='uniform'))

def grid(seeds=(0, 1), lrs=(.1, .05, .2), wds=(5e-4, 1.5e-3, 4e-3)):
    "Uniform rates: first one run per decay (the gate), then the rest of the grid."
    base = dict(arch='vgg19', arm='uniform', epochs=60, size=16, data='cifar10', judge='choose', log=True)
    for seed in seeds:
        for lr in lrs:
            for wd in wds: yield dict(base, lr=lr, wd=wd, seed=seed)

if __name__=='__main__':
    import argparse
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--workers', type=int, default=2)
    p.add_argument('--minutes', type=float, default=float('inf'))
    p.add_argument('--out', type=Path, default=Path(__file__).parent)
    args = p.parse_args()
    df = run_all(grid(), run, args.out/'regime.csv', n_workers=args.workers, minutes=args.minutes)
    print(df.to_string())
