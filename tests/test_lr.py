"Per-layer learning rates in a real training loop, batch by batch"
import random, subprocess, sys
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from fastai.basics import Adam, Callback, Learner, OptimWrapper, Path, SGD, load_learner
from fastai.callback.all import CancelBatchException, CancelEpochException, GradientAccumulation, ReduceLROnPlateau, combined_cos
from spectral_nb.data import digits_dls
from spectral_nb.lr import assign_lr, group_layers, layer_groups
from spectral_nb.lr_callback import SpectralLR
from spectral_nb.metrics import layer_scores
from spectral_nb.models import densenet40, vgg19

EPOCHS, BATCHES, LR = 3, 5, 0.02

class UsedRates(Callback):
    "The rate of each group when the optimizer steps."
    order = 70
    def __init__(self): self.seen = []
    def before_step(self): self.seen.append([h['lr'] for h in self.opt.hypers])

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                                nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))

def make(opt_func=SGD, cbs=(), model=mlp, splitter=layer_groups, **kw):
    torch.manual_seed(0)
    learn = Learner(digits_dls(8, bs=256, c_in=1), model(), opt_func=opt_func, splitter=splitter, cbs=cbs, lr=LR, **kw)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *args: None
    return learn

def multipliers(learn, n_epoch):
    "From the scores in the history, by the formula written out: one row per batch, one column per group."
    h = learn.spectral_lr.history
    s = h.score.to_numpy().reshape(n_epoch, -1)
    m = np.ones_like(s)
    m[:, 1:-1] = np.stack([np.interp(o, [o.min(), o.max()], [0.5, 1.5]) for o in s[:, 1:-1]])
    np.testing.assert_allclose(h.mult.to_numpy().reshape(n_epoch, -1), m, rtol=1e-12)
    assert len(np.unique(m))>3
    return m.repeat(BATCHES, 0)

SCHEDULES = dict(fit           = lambda pos: LR,
                 fit_one_cycle = combined_cos(0.25, LR/25, LR, LR/1e5),
                 fit_flat_cos  = combined_cos(0.75, LR, LR, LR/1e5))
OPTS = dict(SGD=partial(SGD, mom=0.9), Adam=Adam, torch=partial(OptimWrapper, opt=torch.optim.AdamW))

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('fit', SCHEDULES)
def test_schedule_times_multiplier(fit, opt):
    learn, rec = make(OPTS[opt], SpectralLR()), UsedRates()
    getattr(learn, fit)(EPOCHS, LR, cbs=rec)
    schedule = [SCHEDULES[fit](i/(EPOCHS*BATCHES)) for i in range(EPOCHS*BATCHES)]
    np.testing.assert_allclose(rec.seen, np.array(schedule)[:, None]*multipliers(learn, EPOCHS), rtol=1e-6)

def test_nothing_compounds_over_20_epochs():
    learn, rec = make(cbs=SpectralLR()), UsedRates()
    learn.fit(20, cbs=rec)
    np.testing.assert_allclose(rec.seen, LR*multipliers(learn, 20), rtol=1e-12)
    assert [h['lr'] for h in learn.opt.hypers]==[LR]*5

def test_scores_are_those_of_the_weights_at_the_start_of_the_epoch():
    class Scores(Callback):
        order = 70
        def before_fit(self): self.seen = []
        def before_train(self): self.seen.append(layer_scores(self.model).score.tolist())
    learn, seen = make(cbs=SpectralLR()), Scores()
    learn.fit(EPOCHS, cbs=seen)
    assert learn.spectral_lr.history.score.tolist()==sum(seen.seen, [])
    assert seen.seen[0]!=seen.seen[1]

def test_history_has_the_mean_rate_of_each_epoch():
    learn, rec = make(cbs=SpectralLR()), UsedRates()
    learn.fit_one_cycle(EPOCHS, cbs=rec)
    mean = np.array(rec.seen).reshape(EPOCHS, BATCHES, -1).mean(1)
    np.testing.assert_allclose(learn.spectral_lr.history.lr.to_numpy().reshape(EPOCHS, -1), mean, rtol=1e-12)

def test_discriminative_rates_are_multiplied_too():
    learn, rec = make(cbs=SpectralLR()), UsedRates()
    learn.fit(EPOCHS, slice(LR/16, LR), cbs=rec)
    np.testing.assert_allclose(rec.seen, LR*2.**np.arange(-4, 1)*multipliers(learn, EPOCHS), rtol=1e-9)

@pytest.mark.parametrize('how', ['linear', 'step', 'sqrt', 'log2'])
def test_keep_mean_keeps_the_mean_rate(how):
    learn, rec = make(cbs=SpectralLR(how=how, lo=0.1, hi=2, keep_mean=True, skip_first_last=False)), UsedRates()
    learn.fit(EPOCHS, cbs=rec)
    np.testing.assert_allclose(np.mean(rec.seen, 1), LR, rtol=1e-9)
    assert np.std(rec.seen, 1).min()>0

@pytest.mark.parametrize('fit', SCHEDULES)
def test_uniform_is_training_without_the_callback(fit):
    weights = []
    for cbs in ([], SpectralLR(how='uniform')):
        learn = make(partial(SGD, mom=0.9), cbs)
        getattr(learn, fit)(EPOCHS, LR)
        weights.append(torch.cat([p.flatten() for p in learn.model.parameters()]))
    assert torch.equal(*weights)

def test_same_seed_same_weights():
    weights = []
    for state in (1, 2):
        learn = make(partial(SGD, mom=0.9), SpectralLR())
        random.seed(state); np.random.seed(state); torch.manual_seed(state)
        learn.fit_one_cycle(EPOCHS, LR)
        weights.append(torch.cat([p.flatten() for p in learn.model.parameters()]))
    assert torch.equal(*weights)

class CancelSome(Callback):
    "Leaves batches and epochs half done."
    def before_backward(self):
        if self.train_iter%3==1: raise CancelBatchException
    def before_step(self):
        if self.epoch==1 and self.iter==3: raise CancelEpochException

@pytest.mark.parametrize('other', [CancelSome, partial(GradientAccumulation, 300)])
def test_cancelled_batches_do_not_compound(other):
    learn, rec = make(cbs=SpectralLR()), UsedRates()
    learn.fit(5, cbs=[other(), rec])
    allowed = (LR*multipliers(learn, 5)).reshape(5, BATCHES, -1)[:, 0]
    assert rec.seen and all(np.isclose(o, allowed, rtol=1e-12).all(1).any() for o in rec.seen)
    assert [h['lr'] for h in learn.opt.hypers]==[LR]*5

class Interrupt(Callback):
    def before_step(self): raise KeyboardInterrupt

def test_a_fit_after_an_interrupted_one():
    learn, rec = make(cbs=SpectralLR()), UsedRates()
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Interrupt())
    learn.fit(EPOCHS, LR/2, cbs=rec)
    np.testing.assert_allclose(rec.seen, LR/2*multipliers(learn, EPOCHS), rtol=1e-12)

def test_a_scheduler_that_divides_what_it_finds():
    learn, rec = make(cbs=SpectralLR()), UsedRates()
    learn.fit(EPOCHS, cbs=[ReduceLROnPlateau('valid_loss', patience=1, min_delta=1e9, factor=10), rec])
    base = LR*np.array([1, 1, 0.1]).repeat(BATCHES)          # the first epoch sets the best loss, the second is the plateau
    np.testing.assert_allclose(rec.seen, base[:, None]*multipliers(learn, EPOCHS), rtol=1e-9)

def test_resume_from_an_epoch():
    learn, rec = make(cbs=SpectralLR(period=4)), UsedRates()
    learn.fit(EPOCHS, cbs=rec, start_epoch=1)
    assert learn.spectral_lr.history.epoch.unique().tolist()==[1, 2]
    np.testing.assert_allclose(rec.seen, LR*multipliers(learn, 2), rtol=1e-12)

def test_a_bad_layer_does_not_stop_the_others():
    learn = make(cbs=SpectralLR(), model=lambda: nn.Sequential(*mlp()[:-1], nn.Linear(24, 2), nn.Linear(2, 12), nn.Linear(12, 10)))
    learn.fit(1)
    h = learn.spectral_lr.history.set_index('layer')
    assert h.mult[['10', '11']].tolist()==[1, 1] and h.score[['10', '11']].isna().all() and 'eigenvalues' in h.note['10']
    assert h.mult[['4', '6', '8']].agg(['min', 'max']).tolist()==[0.5, 1.5]

def test_export_and_load(tmp_path):
    learn = make(cbs=SpectralLR(), path=tmp_path)
    learn.fit_one_cycle(EPOCHS, LR)
    rates = [h['lr'] for h in learn.opt.hypers]
    learn.export()
    assert [h['lr'] for h in learn.opt.hypers]==rates        # export makes the optimizer anew, with the splitter
    with pytest.warns(UserWarning, match='insecure pickle'): loaded = load_learner(tmp_path/'export.pkl')
    assert loaded.spectral_lr.history.equals(learn.spectral_lr.history)
    loaded.dls = learn.dls
    loaded.fit(1)
    assert loaded.spectral_lr.history.epoch.tolist()==[0]*5

def test_lr_find_is_untouched(tmp_path):
    found = []
    for cbs in ([], SpectralLR()):
        learn, rec = make(cbs=cbs, path=tmp_path), UsedRates()
        learn.add_cb(rec)
        learn.lr_find(show_plot=False, num_it=20)
        found.append((rec.seen, learn.recorder.lrs, learn.recorder.losses))
    assert str(found[0])==str(found[1])
    assert learn.spectral_lr.history.empty
    learn.remove_cb(rec)
    learn.fit(1, cbs=(rec := UsedRates()))
    np.testing.assert_allclose(rec.seen, LR*multipliers(learn, 1), rtol=1e-12)

@pytest.mark.parametrize('model', [vgg19, densenet40])
def test_groups_of_the_full_networks(model):
    net = model()
    groups = layer_groups(net)
    assert sorted(id(p) for g in groups for p in g)==sorted(id(p) for p in net.parameters())
    assert group_layers(net, groups)==[n for n,m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

def test_groups_of_an_encoder():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    groups = layer_groups(net)
    assert sorted(id(p) for g in groups for p in g)==sorted(id(p) for p in net.parameters())
    assert [k for k in group_layers(net, groups) if k]==[f'layers.{i}.{k}' for i in range(2) for k in ('self_attn', 'self_attn.out_proj', 'linear1', 'linear2')]

def test_batches_are_the_same_in_another_process():
    code = "from spectral_nb.data import digits_dls; import hashlib; print([hashlib.md5(x.numpy().tobytes()).hexdigest() for x,y in digits_dls().train][-1])"
    runs = {subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(runs)==1 and len(runs.pop())==33
