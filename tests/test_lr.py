"Per-layer learning rates in a real training loop, batch by batch"
import importlib, random, subprocess, sys, types
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from torch.optim import lr_scheduler as sched
from torchvision import models as tv
from fastai.basics import Adam, Callback, Learner, OptimWrapper, Path, SGD, load_learner, ranger
from fastai.callback.all import (CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException, CancelValidException,
                                 EarlyStoppingCallback, GradientAccumulation, MixedPrecision, ParamScheduler, ReduceLROnPlateau,
                                 SaveModelCallback, SchedLin, combined_cos)
from spectral_nb.data import digits_dls
from spectral_nb.lr import ASSIGN, SpectralScheduler, assign_lr, group_layers, layer_groups
from spectral_nb.lr_callback import SpectralLR, SpectralWD
from spectral_nb.metrics import layer_scores
from spectral_nb.models import densenet40, vgg19
from spectral_nb.precision import BFloat16

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
OPTS = dict(SGD=partial(SGD, mom=0.9), Adam=Adam, ranger=ranger, torch=partial(OptimWrapper, opt=torch.optim.AdamW))

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

def used_rates(fit, opt=SGD, cbs=(), spectral=True, **kw):
    "The rates of a fit, and the learner."
    learn, rec = make(opt, SpectralLR() if spectral else (), **kw), UsedRates()
    fit(learn, [rec, *cbs])
    return np.array(rec.seen), learn

FITS = dict(slice_cycle = lambda learn, cbs: learn.fit_one_cycle(EPOCHS, slice(LR/16, LR), cbs=cbs),
            group_cycle = lambda learn, cbs: learn.fit_one_cycle(EPOCHS, np.geomspace(LR/8, LR, 5), cbs=cbs),
            sgdr        = lambda learn, cbs: learn.fit_sgdr(2, 1, LR, cbs=cbs))

@pytest.mark.parametrize('fit', FITS)
def test_other_schedules_times_multiplier(fit):
    rates, learn = used_rates(FITS[fit])
    base, _ = used_rates(FITS[fit], spectral=False)
    np.testing.assert_allclose(rates, base*multipliers(learn, EPOCHS), rtol=1e-9)
    assert (fit=='sgdr') == (len(np.unique(base[0]))==1)

def test_fine_tune():
    def fit(learn, cbs): learn.fine_tune(EPOCHS, LR, cbs=cbs)
    rates, learn = used_rates(fit)
    base, _ = used_rates(fit, spectral=False)
    np.testing.assert_allclose(rates[:BATCHES], base[:BATCHES], rtol=1e-12)                     # frozen: the last layer alone, at the global rate
    np.testing.assert_allclose(rates[BATCHES:], base[BATCHES:]*multipliers(learn, EPOCHS), rtol=1e-9)
    np.testing.assert_allclose(base[-1]/base[-1, -1], np.geomspace(0.01, 1, 5), rtol=1e-9)

def test_freeze_to_trains_the_last_layers():
    learn = make(cbs=SpectralLR(skip_first_last=False))
    learn.freeze_to(-3)
    before = [p.clone() for p in learn.model.parameters()]
    learn.fit(1)
    h = learn.spectral_lr.history
    assert h.note.tolist()==['frozen', 'frozen', '', '', ''] and h.mult[:2].tolist()==[1, 1] and sorted(h.mult[2:])[::2]==[0.5, 1.5]
    moved = [n for (n,p),o in zip(learn.model.named_parameters(), before) if not torch.equal(p, o)]
    assert moved==['2.weight', '2.bias'] + [f'{i}.{k}' for i in (6, 8, 10) for k in ('weight', 'bias')]    # and the batch norm, which fastai never freezes

@pytest.mark.filterwarnings('ignore:.*CUDA is not available', 'ignore:.*cuda is not available')
@pytest.mark.parametrize('cb', [BFloat16, MixedPrecision])
def test_mixed_precision(cb):
    class Kinds(Callback):
        def before_fit(self): self.seen = set()
        def after_pred(self): self.seen.add(torch.is_autocast_enabled('cpu'))
    rates, learn = used_rates(lambda learn, cbs: learn.fit(EPOCHS, LR, cbs=cbs), cbs=[cb(), kinds := Kinds()])
    np.testing.assert_allclose(rates, LR*multipliers(learn, EPOCHS), rtol=1e-12)
    assert kinds.seen=={cb is not MixedPrecision}

def test_save_model_and_early_stopping(tmp_path):
    learn = make(cbs=SpectralLR(), path=tmp_path)
    rec = UsedRates()
    learn.fit(9, cbs=[rec, SaveModelCallback(with_opt=True), EarlyStoppingCallback(min_delta=1e9, patience=2)])
    assert learn.spectral_lr.history.epoch.unique().tolist()==[0, 1, 2]
    np.testing.assert_allclose(rec.seen, LR*multipliers(learn, 3), rtol=1e-12)
    learn.load('model', with_opt=True, weights_only=False)
    assert [h['lr'] for h in learn.opt.hypers]==[LR]*5                        # what was saved are the schedule's own rates

def test_resume_from_a_saved_epoch(tmp_path):
    def new():
        learn = make(partial(SGD, mom=0.9), SpectralLR(smooth=0.7, period=2), path=tmp_path)
        learn.dls.train.epoch = 0
        return learn
    learn, whole = new(), UsedRates()
    learn.fit_one_cycle(5, LR, cbs=[whole, SaveModelCallback(every_epoch=True, with_opt=True, fname='m')])
    state = learn.spectral_lr.state_dict()
    torch.save(state, tmp_path/'s.pth')
    again, part = new(), UsedRates()
    again.create_opt()
    again.load('m_2', with_opt=True, weights_only=False)
    again.spectral_lr.load_state_dict(torch.load(tmp_path/'s.pth', weights_only=True))
    again.dls.train.epoch = 3
    again.fit_one_cycle(5, LR, cbs=part, start_epoch=3)
    np.testing.assert_allclose(part.seen, whole.seen[3*BATCHES:], rtol=1e-9)
    pd.testing.assert_frame_equal(again.spectral_lr.history, learn.spectral_lr.history)
    new_run = make(cbs=SpectralLR(smooth=0.7, period=2))
    new_run.fit(1)
    assert new_run.spectral_lr.history.score.tolist()!=learn.spectral_lr.history.score[-5:].tolist()

class FakeBoard:
    "What TensorBoard and Weights & Biases are told."
    def __init__(self, *args, **kwargs): self.seen = {}
    def add_scalar(self, tag, value, step): self.seen[tag, step] = float(value)
    def log(self, values, step=None): self.seen |= {(k, step): v for k,v in values.items()}
    def close(self): pass

def fake_logger(monkeypatch, name):
    "fastai's own callback on a stand-in for the package that it needs."
    board = FakeBoard()
    modules = dict(tensorboard=dict(), wandb=dict(log=board.log, config=types.SimpleNamespace(update=lambda *a, **k: None), watch=lambda *a, **k: None,
                   run=types.SimpleNamespace(step=0, summary={})), **{'torch.utils.tensorboard': dict(SummaryWriter=lambda **k: board)})
    for k,v in modules.items(): monkeypatch.setitem(sys.modules, k, types.SimpleNamespace(**v))
    monkeypatch.delitem(sys.modules, f'fastai.callback.{name}', raising=False)
    mod = importlib.import_module(f'fastai.callback.{name}')
    return board, mod.TensorBoardCallback(trace_model=False, log_preds=False) if name=='tensorboard' else mod.WandbCallback(log_preds=False)

@pytest.mark.parametrize('name', ['tensorboard', 'wandb'])
def test_layers_reach_the_loggers(monkeypatch, name):
    board, cb = fake_logger(monkeypatch, name)
    learn = make(cbs=SpectralLR())
    learn.fit(2, cbs=cb)
    h = learn.spectral_lr.history
    for key,column in (('alpha', 'score'), ('lr', 'lr')):
        for layer,g in h.groupby('layer'): assert [v for (k,_),v in board.seen.items() if k==f'{key}/{layer}']==g[column].tolist()
    used = [v for (k,i),v in board.seen.items() if k=='lr_2' and i%BATCHES]           # TensorBoard's last one is overwritten in validation
    assert set(used[:4])=={h.lr[h.layer=='6'].iloc[0]}                                          # their own per-group rates are the used ones

def test_weight_decay_alone():
    learn = make(cbs=[SpectralWD(), rec := UsedRates()], wd=0.1)
    class UsedDecay(Callback):
        order = 70
        def before_fit(self): self.seen = []
        def before_step(self): self.seen.append([h['wd'] for h in self.opt.hypers])
    learn.fit_one_cycle(EPOCHS, LR, cbs=(wd := UsedDecay()))
    h = learn.spectral_wd.history
    np.testing.assert_allclose(wd.seen, 0.1*h.mult.to_numpy().reshape(EPOCHS, -1).repeat(BATCHES, 0), rtol=1e-12)
    assert np.ptp(rec.seen, 1).max()==0 and list(h.columns)==['epoch', 'layer', 'score', 'mult', 'wd', 'note'] and [o['wd'] for o in learn.opt.hypers]==[0.1]*5

def test_controls_use_the_multipliers_of_linear():
    mults = {}
    for how in ('linear', 'reversed', 'shuffled'):
        learn = make(cbs=SpectralLR(how=how))
        learn.fit(1)
        mults[how] = learn.spectral_lr.history.mult[1:-1].to_numpy()
    assert sorted(mults['reversed'])==sorted(mults['shuffled'])==sorted(mults['linear'])
    assert (mults['shuffled']!=mults['linear']).all() and mults['reversed'].argmax()==mults['linear'].argmin()

def test_gate_leaves_doubtful_layers_alone():
    learn = make(cbs=SpectralLR(gate=dict(n_min=1, D_max=9, spread_min=1, p_end=0)))            # everything passes
    learn.fit(1)
    assert set(learn.spectral_lr.history.note)=={'', 'first or last layer'}
    learn = make(cbs=SpectralLR(gate=True))
    with pytest.warns(UserWarning, match='all layers have the global lr'): learn.fit(1)
    h = learn.spectral_lr.history
    assert set(h.mult)=={1.} and h.note[1:-1].str.contains('fewer than 20').all() and h.score.notna().all()

def test_warmup_and_smoothing():
    learn, rec = make(cbs=SpectralLR(warmup=2, smooth=0.9)), UsedRates()
    raw = []
    class Scores(Callback):
        order = 70
        def before_train(self): raw.append(layer_scores(self.model).score.to_numpy())
    learn.fit(4, cbs=[rec, Scores()])
    h = learn.spectral_lr.history
    assert np.unique(rec.seen[:2*BATCHES]).tolist()==[LR] and np.ptp(rec.seen[2*BATCHES])>0
    expected = [raw[0]]
    for r in raw[1:]: expected.append(0.9*expected[-1] + 0.1*r)
    np.testing.assert_allclose(h.score.to_numpy().reshape(4, 5), expected, rtol=1e-9)

# torch schedulers

def torch_parts(make_sched, spectral, opt=torch.optim.SGD):
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(24, 24) for _ in range(5)])
    opt = opt([dict(params=ps) for ps in layer_groups(net)], lr=0.1)
    if spectral=='before': spectral = SpectralScheduler(opt, net); return net, opt, make_sched(opt), spectral
    s = make_sched(opt)
    return net, opt, s, SpectralScheduler(opt, net) if spectral else None

def torch_rates(make_sched, spectral=True, per_batch=False, epochs=6, steps=3, **kw):
    "The rates that the optimizer uses, and the scheduler."
    net, opt, s, spec = torch_parts(make_sched, spectral, **kw)
    used, loss = [], torch.tensor(1.)
    opt.register_step_pre_hook(lambda opt, *a: used.append([float(g['lr']) for g in opt.param_groups]))
    step = partial(s.step, loss) if isinstance(s, sched.ReduceLROnPlateau) else s.step
    for epoch in range(epochs):
        for _ in range(steps):
            opt.zero_grad(); net(torch.randn(4, 24)).square().mean().backward(); opt.step()
            if per_batch: step()
        if not per_batch: step()
        if spec: spec.step()
    return np.array(used), spec

TORCH = dict(exponential = lambda o: sched.ExponentialLR(o, 0.8),
             multiplicative = lambda o: sched.MultiplicativeLR(o, lambda e: 0.9),
             step        = lambda o: sched.StepLR(o, 2, 0.5),
             linear      = lambda o: sched.LinearLR(o, 0.1, 1., 4),
             cosine      = lambda o: sched.CosineAnnealingLR(o, 6, eta_min=0.03),
             restarts    = lambda o: sched.CosineAnnealingWarmRestarts(o, 2),
             lambda_     = lambda o: sched.LambdaLR(o, lambda e: e/4),                           # a warm-up from zero
             lambdas     = lambda o: sched.LambdaLR(o, [lambda e, i=i: 1/(1+i*e) for i in range(5)]),
             plateau     = lambda o: sched.ReduceLROnPlateau(o, patience=0, factor=0.5, min_lr=0.02),
             chained     = lambda o: sched.ChainedScheduler([sched.ExponentialLR(o, 0.9), sched.StepLR(o, 3)], optimizer=o),
             sequential  = lambda o: sched.SequentialLR(o, [sched.ConstantLR(o, 0.1, 2), sched.ExponentialLR(o, 0.9)], [2]),
             one_cycle   = lambda o: sched.OneCycleLR(o, 0.5, total_steps=19))

@pytest.mark.filterwarnings('ignore:.*lr_scheduler.step', 'ignore:.*epoch parameter')
@pytest.mark.parametrize('where', ['after', 'before'])
@pytest.mark.parametrize('name', TORCH)
def test_chained_with_any_torch_scheduler(name, where):
    kw = dict(per_batch=name=='one_cycle')
    base, _ = torch_rates(TORCH[name], False, **kw)
    rates, spec = torch_rates(TORCH[name], where, **kw)
    mult = spec.history.mult.to_numpy().reshape(6, 5).repeat(3, 0)
    np.testing.assert_allclose(rates, base*mult, rtol=1e-9)
    assert mult.min()==0.5 and mult.max()==1.5

def test_schedulers_without_training():
    "A dry run shows the multiplied schedule."
    for name in ('exponential', 'lambda_', 'one_cycle', 'step'):
        net, opt, s, spec = torch_parts(TORCH[name], True)
        mult = np.array(spec.get_last_lr()) if name!='lambda_' else None
        free = torch_parts(TORCH[name], False)
        for _ in range(5):
            opt._opt_called = free[1]._opt_called = True
            s.step(); free[2].step(); spec.step()
            rates, base = [np.array([g['lr'] for g in o.param_groups]) for o in (opt, free[1])]
            if mult is None: mult = rates/base
            np.testing.assert_allclose(rates/rates[0], mult/mult[0], rtol=1e-9); np.testing.assert_allclose(rates[0], base[0], rtol=1e-9)

def test_tensor_rates():
    adam = lambda groups, lr: torch.optim.Adam(groups, lr=torch.tensor(lr, dtype=torch.float64), capturable=False, foreach=False)
    rates, spec = torch_rates(TORCH['exponential'], opt=adam)
    base, _ = torch_rates(TORCH['exponential'], False, opt=adam)
    np.testing.assert_allclose(rates, base*spec.history.mult.to_numpy().reshape(6, 5).repeat(3, 0), rtol=1e-9)

# groups of networks by others

def empty(make): 
    with torch.device('meta'): net = make()
    return net.to_empty(device='cpu')

def owners(model, example=None):
    "Parameter -> layer that it is grouped with."
    names, groups = {id(p): n for n,p in model.named_parameters()}, layer_groups(model, example)
    assert sorted(id(p) for g in groups for p in g)==sorted(names)
    return {names[id(p)]: k for g,k in zip(groups, group_layers(model, groups)) for p in g}

def vit(): return tv.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=7)

OWNERS = dict(
    vgg19_bn    = (tv.vgg19_bn, {'features.1': 'features.0', 'features.50': 'features.49', 'classifier.6': 'classifier.6'}),
    resnet18    = (tv.resnet18, {'bn1': 'conv1', 'layer1.0.bn2': 'layer1.0.conv2', 'layer2.0.downsample.1': 'layer2.0.downsample.0', 'layer4.1.bn1': 'layer4.1.conv1'}),
    densenet121 = (tv.densenet121, {'features.norm0': 'features.conv0', 'features.denseblock1.denselayer1.norm1': 'features.conv0',
                   'features.denseblock1.denselayer1.norm2': 'features.denseblock1.denselayer1.conv1', 'features.transition1.norm': 'features.denseblock1.denselayer6.conv2',
                   'features.denseblock2.denselayer1.norm1': 'features.transition1.conv', 'features.norm5': 'features.denseblock4.denselayer16.conv2'}),
    vit         = (vit, {'encoder.layers.encoder_layer_0.ln_1': 'conv_proj', 'encoder.layers.encoder_layer_0.ln_2': 'encoder.layers.encoder_layer_0.self_attention.out_proj',
                   'encoder.layers.encoder_layer_1.ln_1': 'encoder.layers.encoder_layer_0.mlp.3', 'encoder.ln': 'encoder.layers.encoder_layer_1.mlp.3'}))

@pytest.mark.parametrize('name', OWNERS)
def test_groups_of_torchvision(name):
    net = empty(OWNERS[name][0])
    own = owners(net)
    for k,layer in OWNERS[name][1].items(): assert own[f'{k}.weight']==own[f'{k}.bias']==layer
    assert [k for k,v in own.items() if v is None]==(['class_token', 'encoder.pos_embedding'] if name=='vit' else [])
    assert owners(net)==own
    if name!='vgg19_bn': assert owners(net, torch.randn(1, 3, 32, 32))==own                    # tracing and running agree

class NormAct(nn.BatchNorm2d):
    "A norm with its activation inside, as in timm."
    def __init__(self, n): super().__init__(n); self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)
    def forward(self, x): return self.act(self.drop(super().forward(x)))

class Preact(nn.Module):
    "All convolutions first, all norms after them, the last one first."
    def __init__(self):
        super().__init__()
        self.convs, self.norms = nn.ModuleList(nn.Conv2d(4, 4, 3) for _ in range(3)), nn.ModuleList(NormAct(4) for _ in range(3))
    def forward(self, x):
        for conv,norm in zip(self.convs, reversed(self.norms)): x = norm(conv(x))
        return x

@pytest.mark.parametrize('example', [None, torch.zeros(1, 4, 8, 8)])
def test_groups_of_norms_with_activation(example):
    own = owners(Preact(), example)
    for i in range(3): assert own[f'norms.{i}.weight']==own[f'norms.{i}.bias']==own[f'convs.{2-i}.weight']==f'convs.{2-i}'

class RMS(nn.Module):
    def __init__(self, n): super().__init__(); self.gain = nn.Parameter(torch.zeros(n))
    def forward(self, x): return x*(1+self.gain)

class Backwards(nn.Module):
    "Registered from the end to the start, with a branch on the data."
    def __init__(self):
        super().__init__()
        self.norm2, self.fc2, self.norm1, self.fc1, self.scale = RMS(8), nn.Linear(8, 8), RMS(8), nn.Linear(8, 8), nn.Parameter(torch.ones(()))
    def forward(self, x):
        x = self.norm1(self.fc1(x)).relu()
        return self.norm2(self.fc2(x))*self.scale if x.sum()>-1e9 else x

def test_groups_of_an_untraceable_network():
    net = Backwards()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    assert owners(net, torch.randn(2, 8))=={'norm2.gain': 'fc2', 'fc2.weight': 'fc2', 'fc2.bias': 'fc2', 'norm1.gain': 'fc1', 'fc1.weight': 'fc1', 'fc1.bias': 'fc1', 'scale': None}
    assert owners(net)=={'norm2.gain': None, 'fc2.weight': 'fc2', 'fc2.bias': 'fc2', 'norm1.gain': 'fc2', 'fc1.weight': 'fc1', 'fc1.bias': 'fc1', 'scale': None}
    assert net.training and all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

def test_an_example_does_not_train_the_norms():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    layer_groups(net, torch.randn(8, 4)+5)
    assert net[1].num_batches_tracked==0 and net.training

def test_splitter_with_an_example():
    learn = make(cbs=SpectralLR(), splitter=partial(layer_groups, example=torch.randn(2, 1, 8, 8)))
    learn.fit(1)
    plain = make(cbs=SpectralLR())
    plain.fit(1)
    assert learn.spectral_lr.history.equals(plain.spectral_lr.history)

def test_hill_scans_no_candidates(monkeypatch):
    from spectral_nb import tail
    def scan(*args, **kwargs): raise AssertionError('scanned')
    for name in ('_best_ks', '_candidates', '_ks_bounds'): monkeypatch.setattr(tail, name, scan)
    learn = make(cbs=SpectralLR())
    learn.fit(1)
    assert learn.spectral_lr.history.score.notna().all()
    with pytest.raises(AssertionError, match='scanned'): layer_scores(learn.model, fit='ks')

@pytest.mark.parametrize('lr, message', [(-0.1, 'lr=-.* in parameter group 0'), (0., 'lr=0 in all parameter groups')])
@pytest.mark.parametrize('fit', SCHEDULES)
def test_rates_must_be_positive(fit, lr, message):
    learn, rec = make(cbs=SpectralLR()), UsedRates()
    with pytest.raises(ValueError, match=message): getattr(learn, fit)(1, lr, cbs=rec)
    assert not rec.seen

def test_a_warmup_may_begin_at_zero():
    learn, rec = make(cbs=SpectralLR()), UsedRates()
    learn.fit(EPOCHS, cbs=[ParamScheduler({'lr': SchedLin(0., LR)}), rec])
    np.testing.assert_allclose(rec.seen, (LR*np.arange(EPOCHS*BATCHES)/(EPOCHS*BATCHES))[:, None]*multipliers(learn, EPOCHS), rtol=1e-9)

# however a fit ends

EXCEPTIONS = [KeyboardInterrupt, SystemExit, RuntimeError, CancelBatchException, CancelEpochException, CancelTrainException, CancelValidException, CancelFitException,
              CancelStepException, CancelBackwardException]
EVENTS = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch',
          'after_train', 'before_validate', 'after_validate', 'after_epoch', 'after_fit']

class Raise(Callback):
    "Raises `ex` once, in the second epoch where there is one, before or after the callbacks of the test."
    def __init__(self, event, ex, order): self.event, self.ex, self.order, self.done = event, ex, order, False
    def __call__(self, event):
        late = event=='before_fit' or (getattr(self.learn, 'epoch', 0)>0 and (not self.training or event not in ('before_batch', 'after_batch', 'before_step') or self.iter==1))
        if event==self.event and late and not self.done: self.done = True; raise self.ex

def ended(event, ex, order, cbs):
    "The hyper-parameters after a fit that was stopped, and after another one."
    learn = make(partial(SGD, mom=0.9), wd=None)
    learn.create_opt()
    learn.opt.set_hypers(wd=0.03)
    seen, stop = [], Raise(event, ex, order)
    try: learn.fit(2, slice(LR/16, LR), cbs=[*cbs, stop])
    except tuple(EXCEPTIONS): pass
    assert stop.done
    seen.append([dict(h) for h in learn.opt.hypers])
    learn.fit(1, LR, cbs=(rec := UsedRates()))
    return seen + [[dict(h) for h in learn.opt.hypers], rec.seen], learn

@pytest.mark.parametrize('event', EVENTS)
def test_hypers_go_back_however_a_fit_ends(event):
    "As if there had been no callback: what is left in the optimizer, and what the next fit uses."
    for ex,order in zip(EXCEPTIONS, [59, 75, -20]*4):
        plain, _ = ended(event, ex, order, [])
        used, learn = ended(event, ex, order, [SpectralLR(), SpectralWD()])
        assert used==plain, ex
        assert 'all_batches' not in learn.__dict__

@pytest.mark.parametrize('where', ['forward', 'step', 'data'])
def test_interrupts_outside_of_events(where):
    learn = make(cbs=[SpectralLR(), SpectralWD()], wd=None)
    learn.create_opt()
    learn.opt.set_hypers(wd=0.03)
    count = iter(range(100))
    def stop(*args, **kwargs):
        if next(count)==7: raise KeyboardInterrupt
        return old(*args, **kwargs)
    if where=='forward': old, learn.model.forward = learn.model.forward, stop
    elif where=='step': old, learn.opt.step = learn.opt.step, stop
    else: old, learn.one_batch = learn.one_batch, stop
    with pytest.raises(KeyboardInterrupt): learn.fit(3)
    assert [h['wd'] for h in learn.opt.hypers]==[0.03]*5 and [h['lr'] for h in learn.opt.hypers]==[LR]*5
    assert not learn.spectral_lr.history.empty and 'all_batches' not in learn.__dict__

# cost over a long run

def test_cost_of_an_epoch_is_flat():
    "The calls of an epoch's events, and the memory that an epoch adds, do not grow over 2,000 epochs."
    import tracemalloc
    learn = make(cbs=SpectralLR(period=10**6))
    learn.fit(1)
    cb, counts, sizes = learn.spectral_lr, {}, {}
    learn.opt.set_hypers(lr=LR); cb.before_fit()
    class TensorBoardCallback(Callback): writer, train_iter = FakeBoard(), 0
    learn.add_cb(TensorBoardCallback())
    tracemalloc.start()
    for epoch in range(2000):
        learn.epoch, n = epoch, [0]
        def count(frame, event, arg): n[0] += event=='call'
        if epoch%500==100: sys.setprofile(count)
        cb.before_train()
        for _ in range(2): cb.before_batch(); cb.after_batch()
        cb.after_train()
        sys.setprofile(None)
        learn.tensor_board.writer.seen.clear()
        if epoch%500==100: counts[epoch], sizes[epoch] = n[0], tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(set(counts.values()))==1 and len(cb.history)==5*2000
    assert (sizes[1600]-sizes[100])/1500<3000                            # bytes an epoch

# steps, ramps and controls over time

@pytest.mark.parametrize('every, ramp', [(1, 0), (3, 0), (4, 3), (7, 7), (None, 4), (None, 8)])
@pytest.mark.parametrize('kind', ['callback', 'scheduler'])
def test_rate_of_every_step(kind, every, ramp):
    "Schedule times multiplier, the multipliers by their formula from the scores of the weights when they were read."
    scores, looks, kw = [], [], dict(every=every, ramp=ramp)
    if kind=='callback':
        class Scores(Callback):
            order = 70
            def before_batch(self):
                if self.training and self.train_iter%(every or BATCHES)==0: scores.append(layer_scores(self.model).score.to_numpy())
        learn, rec = make(cbs=SpectralLR(**kw)), UsedRates()
        learn.fit_one_cycle(EPOCHS, LR, cbs=[rec, Scores()])
        n, used, h = EPOCHS*BATCHES, np.array(rec.seen), learn.spectral_lr.history
        base = np.array([SCHEDULES['fit_one_cycle'](i/n) for i in range(n)])
    else:
        net, opt, s, spec = torch_parts(TORCH['exponential'], None)
        used, n = [], EPOCHS*BATCHES
        def look(opt, *a):
            if len(used)%(every or BATCHES)==0: scores.append(layer_scores(net).score.to_numpy())
        opt.register_step_pre_hook(look)
        spec = SpectralScheduler(opt, net, **kw)
        opt.register_step_pre_hook(lambda opt, *a: used.append([g['lr'] for g in opt.param_groups]))
        for step in range(n):
            opt.zero_grad(); net(torch.randn(4, 24)).square().mean().backward(); opt.step()
            if step%BATCHES==BATCHES-1: s.step(); spec.step()
        used, base, h = np.array(used), 0.1*0.8**(np.arange(n)//BATCHES), spec.history
    old, mults = np.ones(5), []
    for x in scores:
        new = np.ones(5)
        new[1:-1] = np.interp(x[1:-1], [x[1:-1].min(), x[1:-1].max()], [0.5, 1.5])
        seen = [old + (min(1, (j+1)/ramp) if ramp else 1)*(new-old) for j in range(every or BATCHES)]
        mults += seen
        old = seen[-1]
    np.testing.assert_allclose(used, base[:, None]*np.array(mults)[:n], rtol=1e-9 if kind=='callback' else 1e-12)
    means = (h.lr*1).to_numpy().reshape(-1, 5)
    starts = h.step.unique() if every else np.arange(0, n, BATCHES)
    np.testing.assert_allclose(means, [used[a:b].mean(0) for a,b in zip(starts, [*starts[1:], n])], rtol=1e-9)

def test_frozen_multipliers_stay_and_are_resumed():
    for kw in (dict(), dict(warmup=2), dict(how=partial(ASSIGN['frozen'], of='step'))):
        learn, rec = make(partial(SGD, mom=0.9), SpectralLR(**dict(how='frozen')|kw)), UsedRates()
        learn.fit(4, 0.1, cbs=rec)
        h, first = learn.spectral_lr.history, kw.get('warmup', 0)
        m, s = h.mult.to_numpy().reshape(4, 5), h.score.to_numpy().reshape(4, 5)
        assert (m[:first]==1).all() and (m[first:]==m[first]).all() and len({*map(tuple, s)})==4
        np.testing.assert_allclose(m[first, 1:-1], assign_lr(s[first, 1:-1], 1., 'step' if 'how' in kw else 'linear'), rtol=1e-12)
        np.testing.assert_allclose(rec.seen, 0.1*m.repeat(BATCHES, 0), rtol=1e-12)
        other = SpectralLR(**dict(how='frozen')|kw)
        other.load_state_dict(learn.spectral_lr.state_dict())
        other.alloc.reset(3)
        assert other.alloc.look(learn.model, group_layers(learn.model, layer_groups(learn.model)), 3).tolist()==m[3].tolist()

def test_untrained_multipliers_are_those_of_the_twin():
    null = pytest.importorskip('spectral_nb.null')
    learn, rec = make(cbs=SpectralLR(how='untrained')), UsedRates()
    learn.fit(EPOCHS, 0.1, cbs=rec)
    scores = [layer_scores(null.untrained(learn.model, 10**6+e)).score for e in range(EPOCHS)]
    h = learn.spectral_lr.history
    np.testing.assert_allclose(h.score, np.concatenate(scores), rtol=1e-12)
    np.testing.assert_allclose(h.mult.to_numpy().reshape(EPOCHS, 5)[:, 1:-1], [assign_lr(s[1:-1], 1.) for s in scores], rtol=1e-12)

def test_short_spectra_stay_out():
    learn = make(cbs=SpectralLR(min_evals=30))
    learn.fit(1)
    assert learn.spectral_lr.history.note.tolist()==['first or last layer', '', '', '24 eigenvalues, fewer than 30', 'first or last layer']

def test_windows_reach_the_scores():
    learn = make(cbs=[SpectralLR(aspect=1.5), SpectralWD(aspect=1.5)], wd=0.1)
    expected = layer_scores(learn.model, aspect=1.5).score.tolist()
    learn.fit(1)
    assert learn.spectral_lr.history.score.tolist()==learn.spectral_wd.history.score.tolist()==expected!=layer_scores(learn.model).score.tolist()

# groups of other makes

def test_groups_added_later():
    "A group that joins has its layer's multiplier from the next step on; nothing is lost or compounds."
    for when in ('after step()', 'between batches'):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(24, 24) for _ in range(5)])
        groups = layer_groups(net)
        opt = torch.optim.SGD([dict(params=ps) for ps in groups[1:]], lr=0.1)
        s = sched.ExponentialLR(opt, 0.5)
        spec, used = SpectralScheduler(opt, net, skip_first_last=False), []
        opt.register_step_pre_hook(lambda opt, *a: used.append([g['lr'] for g in opt.param_groups]))
        def step(): opt.zero_grad(); net(torch.randn(4, 24)).square().mean().backward(); opt.step()
        step(); s.step(); spec.step()
        if when=='between batches': step()
        opt.add_param_group(dict(params=groups[0], lr=0.05))
        step(); s.step(); spec.step(); step()
        m = spec.history.set_index(['epoch', 'layer']).mult
        of = lambda e: m[e][['1', '2', '3', '4', '0']].to_numpy()
        np.testing.assert_allclose(used[-2], [0.05]*5*np.r_[of(1)[:4], 1.], rtol=1e-12)                     # layer 0 was not in the optimizer when read
        np.testing.assert_allclose(used[-1], 0.025*of(2), rtol=1e-12)
        assert set(m[2])>={0.5, 1.5} and spec.history.query("epoch==1 and layer=='0'").note.item()=='not in the optimizer'
        spec.remove()
        np.testing.assert_allclose([g['lr'] for g in opt.param_groups], [0.025]*5, rtol=1e-12)

def test_a_bad_group_added_later_is_named_before_a_step():
    net = nn.Sequential(*[nn.Linear(24, 24) for _ in range(5)])
    groups = layer_groups(net)
    opt = torch.optim.SGD([dict(params=ps) for ps in groups[:3]], lr=0.1)
    SpectralScheduler(opt, net)
    before = net[0].weight.clone()
    opt.add_param_group(dict(params=groups[3]+groups[4]))
    net(torch.randn(4, 24)).sum().backward()
    with pytest.raises(ValueError, match=r'group 3 holds 2 layers \(3, 4\)'): opt.step()
    assert torch.equal(net[0].weight, before)

def test_weights_and_biases_in_groups_of_their_own():
    "Both have their layer's rate, and only weights decay."
    net = mlp()
    split = [ps for g in layer_groups(net) for ps in ([p for p in g if p.ndim>1], [p for p in g if p.ndim<2]) if ps]
    opt = torch.optim.AdamW([dict(params=ps, weight_decay=0.1 if ps[0].ndim>1 else 0.) for ps in split], lr=0.1)
    lr, wd = SpectralScheduler(opt, net), SpectralScheduler(opt, net, hyper='weight_decay')
    net(torch.randn(8, 64)).sum().backward(); opt.step()
    m = dict(zip(lr.history.layer, lr.history.mult))
    held = group_layers(net, split)
    np.testing.assert_allclose(lr.get_last_lr(), [0.1*m[k] for k in held], rtol=1e-12)
    np.testing.assert_allclose(wd.get_last_lr(), [0.1*m[k]*(ps[0].ndim>1) for k,ps in zip(held, split)], rtol=1e-12)
    np.testing.assert_allclose(wd.history.weight_decay, 0.1*wd.history.mult, rtol=1e-12)
    learn, rec = make(cbs=SpectralLR(), model=mlp, splitter=lambda net: [ps for g in layer_groups(net) for ps in ([p for p in g if p.ndim>1], [p for p in g if p.ndim<2]) if ps]), UsedRates()
    learn.fit(EPOCHS, LR, cbs=rec)
    cols = [list(dict.fromkeys(held)).index(k) for k in held]
    np.testing.assert_allclose(rec.seen, LR*multipliers(learn, EPOCHS)[:, cols], rtol=1e-12)

class Accelerated(torch.optim.Optimizer):
    "As in Accelerate: a subclass without `super().__init__` whose groups are a property."
    def __init__(self, optimizer): self.optimizer = optimizer
    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    def step(self, closure=None): self.optimizer.step(closure)
    def zero_grad(self, set_to_none=True): self.optimizer.zero_grad(set_to_none)
    def state_dict(self): return self.optimizer.state_dict()

class Looking(torch.optim.Optimizer):
    "As in torch-optimizer's Lookahead: every third step goes half the way back."
    def __init__(self, optimizer): self.optimizer, self.param_groups, self.state, self.n, self.slow = optimizer, optimizer.param_groups, {}, 0, None
    def step(self, closure=None):
        ps = [p for g in self.param_groups for p in g['params']]
        self.slow = self.slow or [p.detach().clone() for p in ps]
        self.optimizer.step(closure); self.n += 1
        if self.n%3==0:
            for p,q in zip(ps, self.slow): q.lerp_(p.detach(), 0.5); p.data.copy_(q)
    def zero_grad(self, set_to_none=True): self.optimizer.zero_grad(set_to_none)

WRAPPERS = dict(accelerate=Accelerated, lookahead=Looking, both=lambda o: Accelerated(Looking(o)), optimwrapper=lambda o: OptimWrapper(opt=o))

@pytest.mark.parametrize('name', WRAPPERS)
def test_wrapped_optimizers(name):
    "In the scheduler and in the callback: the inner steps use schedule times multiplier."
    torch.manual_seed(0)
    net, used = nn.Sequential(*[nn.Linear(24, 24) for _ in range(5)]), []
    inner = torch.optim.SGD([dict(params=ps) for ps in layer_groups(net)], lr=0.1)
    wrapped = WRAPPERS[name](inner)
    spec = SpectralScheduler(wrapped, net)
    inner.register_step_pre_hook(lambda opt, *a: used.append([g['lr'] for g in opt.param_groups]))
    for epoch in range(4):
        net(torch.randn(4, 24)).square().mean().backward(); wrapped.step(); wrapped.zero_grad()
        for g in inner.param_groups: g['lr'] *= 0.5
        spec.step()
    np.testing.assert_allclose(used, 0.1*0.5**np.arange(4)[:, None]*spec.history.mult.to_numpy().reshape(4, 5), rtol=1e-12)
    with pytest.raises(ValueError, match='two SpectralScheduler'): SpectralScheduler(WRAPPERS[name](inner), net)
    if name=='optimwrapper': return
    def opt_func(params, lr): return OptimWrapper(opt=WRAPPERS[name](torch.optim.SGD([dict(params=list(ps)) for ps in params], lr=lr)))
    learn, rec = make(opt_func, SpectralLR()), UsedRates()
    learn.fit_one_cycle(EPOCHS, LR, cbs=rec)
    n = EPOCHS*BATCHES
    np.testing.assert_allclose(rec.seen, np.array([SCHEDULES['fit_one_cycle'](i/n) for i in range(n)])[:, None]*multipliers(learn, EPOCHS), rtol=1e-9)

def test_what_is_no_torch_optimizer():
    net = nn.Sequential(*[nn.Linear(24, 24) for _ in range(3)])
    with pytest.raises(ValueError, match='in a Learner of fastai use SpectralLR'): SpectralScheduler(SGD(layer_groups(net), lr=0.1), net)
    with pytest.raises(ValueError, match='in a Learner of fastai use SpectralLR'): SpectralScheduler(ranger(layer_groups(net), lr=0.1), net)
    class Own(Looking):
        def __init__(self, optimizer): super().__init__(optimizer); self.param_groups = [dict(g) for g in optimizer.param_groups]
    opt = torch.optim.SGD([dict(params=ps) for ps in layer_groups(net)], lr=0.1)
    with pytest.raises(ValueError, match='Own has parameter groups of its own beside those of the SGD'): SpectralScheduler(Own(opt), net)

def test_an_exception_in_a_torch_step():
    net, opt, s, spec = torch_parts(TORCH['exponential'], True)
    def closure(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): opt.step(closure)
    used = []
    opt.register_step_pre_hook(lambda opt, *a: used.append([g['lr'] for g in opt.param_groups]))
    s.step(); spec.step()
    net(torch.randn(4, 24)).sum().backward(); opt.step()
    np.testing.assert_allclose(used[0], 0.08*spec.history.mult[-5:], rtol=1e-12)
    spec.remove()
    np.testing.assert_allclose([g['lr'] for g in opt.param_groups], [0.08]*5, rtol=1e-12)

def test_states_of_earlier_versions():
    "A history that was saved as tables goes on."
    learn = make(cbs=SpectralLR(smooth=0.5))
    learn.fit(2)
    state = learn.spectral_lr.state_dict()
    old = dict(epochs=[dict(epoch=o['epoch'], n=o['n'], total=o['total'], table={k: o[k] for k in ('layer', 'score', 'note', 'mult')}) for o in state['epochs']])
    new = SpectralLR(smooth=0.5)
    new.load_state_dict(old)
    pd.testing.assert_frame_equal(new.history, learn.spectral_lr.history)
    assert new.state_dict()==state
