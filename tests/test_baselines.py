"Baselines against torch's own optimizers, exact penalties and gains computed apart"
import numpy as np, pytest, torch
from fastai.basics import Callback, CancelFitException, CrossEntropyLossFlat, set_seed
from fastai.callback.schedule import *
from torch import nn
from spectral_nb.baselines import AdaS, BASELINES, Lamb, SpectralNormReg, baseline_learner, fit_baseline, lars, layer_gain, power_iteration
from spectral_nb.data import digits_dls
from spectral_nb.lr import layer_groups
from spectral_nb.matrices import weight_layers

@pytest.fixture(scope='module')
def dls(): return digits_dls(8, bs=256)

def net(): return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

def learner(dls, name, **kw):
    set_seed(0)
    return baseline_learner(dls, net(), name, loss_func=CrossEntropyLossFlat(), **kw)

def quiet_fit(learn, f):
    with learn.no_bar(), learn.no_logging(): f(learn)
    return learn

@pytest.mark.parametrize('make', [lars, Lamb], ids=['lars', 'lamb'])
def test_groups_change_nothing(make):
    "One group per layer or one for all: the same steps."
    a, x = net(), torch.randn(8, 3, 8, 8)
    b = net(); b.load_state_dict(a.state_dict())
    for model,groups in (a, layer_groups(a)), (b, [list(b.parameters())]):
        opt = make(groups, lr=.1)
        for _ in range(3): opt.zero_grad(); model(x).square().mean().backward(); opt.step()
    assert len(layer_groups(a))==3
    for p,q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q)

def test_lars_own_rate_per_group():
    "Each group's rate scales its own steps; the size of a gradient does not."
    ps = [nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    opt = lars([[p] for p in ps], lr=1., mom=0.)
    opt.set_hyper('lr', [1., 2., 1.])
    for p,g in zip(ps, (1., 1., 100.)): p.grad = torch.full((2,2), g)
    opt.step()
    d = [1-p[0,0].item() for p in ps]
    np.testing.assert_allclose([d[1], d[2]], [2*d[0], d[0]], rtol=1e-4)

def test_larc_never_exceeds_the_rate():
    w = nn.Parameter(torch.full((2,2), 100.)); w.grad = torch.full((2,2), 1e-3)
    lars([w], lr=.1, mom=0., clip=True).step()
    torch.testing.assert_close(w.data, torch.full((2,2), 100-.1e-3))

@pytest.mark.parametrize('shape', [(1,1), (5,9), (30,4)])
def test_power_iteration(shape):
    w = torch.randn(*shape, dtype=torch.double)
    p,s,q = torch.linalg.svd(w, full_matrices=False)
    w = p*(s[0]*.5**torch.arange(len(s)))@q                                         # each singular value half of the one before
    u,v = power_iteration(w, torch.randn(shape[0], dtype=torch.double), 60)
    torch.testing.assert_close(u@w@v, torch.linalg.matrix_norm(w, ord=2))

class FirstGradients(Callback):
    "Keeps the gradients of the first batch and stops."
    def before_step(self):
        self.grads = {k: m.weight.grad.clone() for k,m in weight_layers(self.model).items()}
        self.weights = {k: m.weight.detach().clone() for k,m in weight_layers(self.model).items()}
        self.first = self.loss.item()
        raise CancelFitException

def test_penalty_gradient_in_a_learner():
    "What the callback adds to the gradients is the gradient of the exact penalty; the loss shown stays."
    a, b = (quiet_fit(learner(digits_dls(8, bs=256), 'uniform', cbs=[SpectralNormReg(weight, n=1000), FirstGradients()]), lambda l: l.fit(1, .1)).first_gradients for weight in (0., .5))
    assert a.first==b.first
    for k,w in a.weights.items():
        (.5*torch.linalg.matrix_norm(w.requires_grad_().flatten(1), ord=2)**2/2).backward()
        torch.testing.assert_close(b.grads[k]-a.grads[k], w.grad, rtol=1e-3, atol=1e-4)

def numpy_gain(w, rank):
    "Knowledge gain with a given rank, by NumPy's singular values."
    s = np.linalg.svd(w, compute_uv=False)
    return s[:rank].sum()/(len(s)*s[0])

def test_layer_gain():
    "Three planted directions, whatever the scale."
    q = lambda m: torch.linalg.qr(torch.randn(m, 3, dtype=torch.double))[0]
    w = q(32)@torch.diag(torch.tensor([3., 2., 1.], dtype=torch.double))@q(80).T + torch.randn(32, 80, dtype=torch.double)/200
    for scale in 1e-4, 1, 1e4: np.testing.assert_allclose(layer_gain(scale*w), numpy_gain(w.numpy(), 3), rtol=1e-6)

def test_adas_rates_reach_the_optimizer(dls):
    "The rates in the history are those of the steps, and the schedule's do not matter."
    seen = []
    class Spy(Callback):
        def before_step(self): seen.append([h['lr'] for h in self.opt.hypers])
    learn = quiet_fit(learner(dls, 'adas', cbs=Spy()), lambda l: l.fit_one_cycle(3, .05))
    h = learn.ada_s.history.pivot(index='epoch', columns='layer', values='lr')
    n = len(dls.train)
    for e in range(3): np.testing.assert_allclose(seen[n*e:n*(e+1)], np.tile(h.loc[e, list(weight_layers(learn.model))], (n, 1)))

def test_adas_starts_afresh_and_gives_back(dls):
    learn = learner(dls, 'adas')
    for _ in range(2):
        quiet_fit(learn, lambda l: l.fit(3, .05))
        h = learn.ada_s.history
        assert (h[h.epoch<2].lr==.05).all() and len(h)==9 and [o['lr'] for o in learn.opt.hypers]==[.05]*3

@pytest.mark.parametrize('name', BASELINES)
def test_every_baseline_trains(dls, name):
    "All layers move, all parameters stay finite, fastai callbacks included."
    learn = learner(dls, name, wd=1e-3)
    before = [p.detach().clone() for p in learn.model.parameters()]
    quiet_fit(learn, lambda l: fit_baseline(l, name, 1, .02))
    assert len(learn.opt.param_lists)==3
    assert all(p.isfinite().all() and not torch.equal(p, q) for p,q in zip(learn.model.parameters(), before))

def test_errors(dls):
    with pytest.raises(ValueError, match='use one of uniform, slice'): baseline_learner(dls, net(), 'lookahead')
    with pytest.raises(ValueError, match='beta=1'): AdaS(beta=1)
    with pytest.raises(ValueError, match='n=0'): SpectralNormReg(n=0)
