"Rank correlations against SciPy and loops, intervals against simulation, sensitivity against pruning one layer at a time"
from copy import deepcopy
from itertools import combinations
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.stats import kendalltau, spearmanr
from torch import nn
from torch.nn import functional as F
from spectral_nb.explain import *
from spectral_nb.explain import RANK_MEASURES, _draws, _performance, _rank_correlations, _signs
from spectral_nb.models import vgg19, densenet40, eval_mode
from spectral_nb.prune import prune

def once(x, y, group=None, n_boot=0):
    x, y, g = np.asarray(x, float), np.asarray(y, float), np.zeros(len(x)) if group is None else np.asarray(group)
    return {k: v[0] for k,v in _rank_correlations(x, y, g, n_boot, .95, 0).items()}

columns = st.integers(3, 30).flatmap(lambda n: st.tuples(*[st.lists(st.integers(-5, 5), min_size=n, max_size=n)]*2, st.lists(st.integers(0, 2), min_size=n, max_size=n)))

@settings(max_examples=150, deadline=None)
@given(columns)
def test_scipy_agrees(cols):
    x, y, _ = cols
    if len(set(x))==1 or len(set(y))==1:
        assert all(np.isnan(v) for v in once(x, y).values())
        return
    r = once(x, y)
    assert r['kendall']==pytest.approx(kendalltau(x, y).statistic, abs=1e-12) and r['spearman']==pytest.approx(spearmanr(x, y).statistic, abs=1e-12)

@settings(max_examples=100, deadline=None)
@given(columns)
def test_within_groups_is_a_count_of_pairs(cols):
    "Pairs of the same group, agreeing less disagreeing, as a loop; monotone changes within groups and shifts between them do not matter."
    x, y, g = map(np.array, cols)
    pairs = [(np.sign(x[i]-x[j]), np.sign(y[i]-y[j])) for i,j in combinations(range(len(x)), 2) if g[i]==g[j]]
    num, a, b = sum(p*q for p,q in pairs), sum(p*p for p,_ in pairs), sum(q*q for _,q in pairs)
    r = once(x, y, g)
    assert r['kendall']==pytest.approx(num/(a*b)**.5, abs=1e-12) if a*b else np.isnan(r['kendall'])
    assert once(np.exp(x/9)+100*g, y-77*g, g)==pytest.approx(r, abs=1e-12, nan_ok=True)

def test_bootstrap_is_resampling():
    "The counts give what SciPy gives on the rows drawn."
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 12, (2, 25)).astype(float)
    c, g = _draws(np.zeros(25), 30, rng), np.zeros(25)
    args = _signs(x, g), _signs(y, g), np.ones((25, 25)), c
    for k,f in (('kendall', kendalltau), ('spearman', spearmanr)):
        rows = [np.repeat(np.arange(25), n.astype(int)) for n in c]
        np.testing.assert_allclose(RANK_MEASURES[k](*args), [f(x[i], y[i]).statistic for i in rows], atol=1e-12)

def test_interval_covers_the_truth():
    "Of 200 samples of 60 pairs with a normal correlation of .6, about 95 % have the true tau, 2/pi asin(.6), in their interval."
    rng, truth, hits = np.random.default_rng(1), 2/np.pi*np.arcsin(.6), 0
    for s in range(200):
        x = rng.normal(size=60); y = .6*x+.8*rng.normal(size=60)
        _, lo, hi = _rank_correlations(x, y, np.zeros(60), 300, .95, s)['kendall']
        hits += lo<=truth<=hi
    assert 180<=hits<=199

def test_awareness_of_known_cases():
    layers = {f'l{i}': i/10 for i in range(8)}
    kept = lambda order: {f'l{i}': o for i,o in enumerate(order)}
    assert awareness(layers, layers)[:3]==(1,1,1)
    assert awareness(kept(range(8, 0, -1)), layers)[:3]==(-1,-1,-1)
    assert awareness(kept([1,0,3,2,5,4,7,6]), layers).tau==pytest.approx((28-2*4)/28)
    a = awareness(kept([0,0,0,0,1,1,1,1]), layers)                     # tau-b: 16 of 16 pairs agree, 28 and 16 pairs differ
    assert a.tau==pytest.approx(16/(28*16)**.5) and a.n==8 and a.lo<=a.tau<=a.hi and a.p==kendalltau([0]*4+[1]*4, range(8)).pvalue
    assert np.isnan(awareness(kept([1]*8), layers).tau)
    rng = np.random.default_rng(0)
    many = {str(i): v for i,v in enumerate(rng.normal(size=300))}
    a = awareness({k: rng.normal() for k in many}, many)
    assert a.lo<0<a.hi and a.p>.01 and a.hi-a.lo<.2

def test_awareness_takes_tables_in_any_order():
    sens = pd.DataFrame(dict(layer=list('dcba'), drop=[4.,3,2,1], rise=[1.,2,3,4]))
    kept = dict(a=.1, b=.2, c=.3, d=.4)
    assert awareness(kept, sens).tau==1 and awareness(kept, sens, 'rise').tau==-1
    assert awareness(kept, sens, seed=1)==awareness(pd.Series(kept), dict(zip('dcba', (4.,3,2,1))), seed=1)
    assert awareness(kept | dict(a=float('nan')), sens).n==3

def test_correlate_parts():
    "Groups by name, missing values left out, constants without a value, and the seed decides the interval."
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(g=np.repeat(['deep','flat','wide'], 20), x=rng.normal(size=60), z=1.))
    df['y'] = df.x+.5*rng.normal(size=60)+df.g.map(dict(deep=-5, flat=0, wide=5))
    df.loc[3, 'x'] = np.nan; df.loc[25, 'y'] = np.inf
    r = correlate(df, ['x','z'], 'y', 'g').set_index(['metric','part'])
    assert list(r.index.levels[0])==['x','z'] and r.loc['x'].index.tolist()==['all','deep','flat','wide','within'] and r.loc['x'].n.tolist()==[58,19,19,20,58]
    ok = df[np.isfinite(df.x) & np.isfinite(df.y)]
    for g,d in ok.groupby('g'): assert r.loc[('x',g),'kendall']==pytest.approx(kendalltau(d.x, d.y).statistic) and r.loc[('x',g),'spearman']==pytest.approx(spearmanr(d.x, d.y).statistic)
    assert r.loc[('x','all'),'spearman']==pytest.approx(spearmanr(ok.x, ok.y).statistic)
    assert r.loc[('x','within'),'kendall_lo']>r.loc[('x','all'),'kendall_hi']
    assert r.loc['z'][['kendall','spearman_lo']].isna().all().all()
    again, other = (correlate(df, 'x', 'y', 'g', seed=s) for s in (0, 1))
    pd.testing.assert_frame_equal(again, r.loc[['x']].reset_index())
    assert (other.kendall==again.kendall).all() and (other.kendall_lo!=again.kendall_lo).any()
    narrow = correlate(df, 'x', 'y', 'g', level=.5)
    assert (narrow.kendall_hi-narrow.kendall_lo<again.kendall_hi-again.kendall_lo).all()
    assert len(correlate(df, 'x', 'y'))==1 and correlate(df[:0], 'x', 'y').kendall.isna().all()

@pytest.fixture(scope='module')
def batches(): torch.manual_seed(0); return [(torch.randn(40, 3, 16, 16), torch.arange(40)%10) for _ in range(2)]

def mixed(model, batches):
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms: nn.init.uniform_(m.weight, .5, 1.5); nn.init.uniform_(m.bias, -.5, .5); m.momentum = 1.
    with torch.no_grad(): model.train()(batches[0][0])
    return model

@pytest.mark.parametrize('make', [lambda: vgg19(width=1/16), lambda: densenet40(growth=4, depth=10)], ids=['vgg19','densenet40'])
def test_sensitivity_is_pruning_one_layer(make, batches):
    "Each row is the network that loses half of one layer, and the model stays as it is."
    model = mixed(make(), batches)
    state, rng = deepcopy(model.state_dict()), torch.get_rng_state()
    sens = layer_sensitivity(model, batches, importance='l1')
    assert model.training and all(torch.equal(v, state[k]) for k,v in model.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    x, y = (torch.cat(o) for o in zip(*batches))
    def measure(m):
        with eval_mode(m): out = m(x)
        return (out.argmax(1)==y).float().mean().item(), F.cross_entropy(out, y).item()
    acc, loss = measure(model)
    for r in sens.iloc[::3].itertuples():
        a, l = measure(prune(model, x[:1], ratios={r.layer: r.silenced/r.channels}, importance='l1').masked)
        assert (r.accuracy, r.drop)==pytest.approx((a, acc-a), abs=1e-6) and (r.loss, r.rise)==pytest.approx((l, l-loss), abs=1e-5)
    assert (abs(sens.silenced-sens.channels/2)<=1).all()

def test_dead_channels_are_not_missed(batches):
    "A layer whose lesser half is silent already loses nothing; another one does."
    model = mixed(densenet40(growth=4, depth=10), batches)
    norm = model.block2[0].norm
    with torch.no_grad(): norm.weight[1::2] = 0; norm.bias[1::2] = 0
    sens = layer_sensitivity(model, batches).set_index('layer')
    assert sens.rise['block2.0.conv']==0 and abs(sens.rise['trans1.conv'])>1e-4

def test_accuracy_and_loss_of_uneven_batches(batches):
    model = mixed(densenet40(growth=4, depth=7), batches)
    x, y = batches[0]
    whole, parts = (_performance(model, dl, F.cross_entropy) for dl in ([(x, y)], [(x[:30], y[:30]), (x[30:], y[30:])]))
    assert whole==pytest.approx(parts, rel=1e-5)

def test_plots(batches):
    import matplotlib.pyplot as plt
    ax = plt.subplots()[1]
    sens = pd.DataFrame(dict(layer=list('abcd'), stage=[0,0,1,1], drop=[.1,.2,.3,.4]))
    assert plot_sensitivity(sens, ax=ax) is ax and len(ax.patches)==4
    ax = plot_awareness(dict(zip('abcd', (1,2,3,4))), sens, label='mine')
    assert ax.get_title().startswith('mine') and '= 1.00 [1.00, 1.00]' in ax.get_title() and len(ax.collections[0].get_offsets())==4
    ax = plot_correlation(sens, 'drop', 'stage', 'stage')
    assert len(ax.lines)==2 and 'within' in ax.get_title() and len(plot_correlation(sens, 'drop', 'stage').lines)==1
    plt.close('all')
