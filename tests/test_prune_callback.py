"Cuts inside a fastai Learner: every optimizer of fastai goes on, also after save and load, and what is best is kept"
import pytest, torch
from functools import partial
from fastai.basics import Learner, SGD, RMSProp, Adam, RAdam, QHAdam, Larc, Lamb, ranger
from fastai.callback.tracker import SaveModelCallback
from spectral_nb.data import digits, tensor_dls
from spectral_nb.models import vgg19
from spectral_nb.prune_callback import SpectralPrune

def learner(opt, cbs=(), **kwargs):
    torch.manual_seed(0); d = digits()
    dls = tensor_dls(d.subset(slice(0, 128)), d.subset(slice(128, 192)), bs=32, device='cpu')
    cut = SpectralPrune(.5, start_epoch=1, min_evals=8)
    return Learner(dls, vgg19(cfg=[8,8,'M',16]), opt_func=opt, cbs=[cut, *cbs], **kwargs)

def fit(learn, n, lr=1e-3, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)
    return learn

@pytest.mark.parametrize('opt', [partial(SGD, mom=.9), RMSProp, Adam, RAdam, QHAdam, Larc, Lamb, ranger],
                         ids=lambda f: getattr(f, '__name__', 'SGD'))
def test_every_optimizer(opt, tmp_path):
    "The rest of a run after save and load is the rest of the whole run."
    whole = fit(learner(opt), 3)
    path = fit(learner(opt), 2).save_pruned(tmp_path/'a.safetensors')
    rest = learner(opt); rest.dls.train.epoch = 2
    fit(rest.load_pruned(path), 3, start_epoch=2)
    for a,b in zip(whole.model.parameters(), rest.model.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def test_best_before_the_cut(tmp_path):
    learn = fit(learner(Adam, [SaveModelCallback()], path=tmp_path), 3, lr=1e-9)
    assert sum(v for v in learn.model.config['cfg'] if v!='M')==16
