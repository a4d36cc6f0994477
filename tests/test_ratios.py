"Channel ratios: budgets, bounds and symmetries by property, rules against the papers' own procedures"
import warnings
import numpy as np, pytest, torch, torch_pruning as tp
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from spectral_nb.ratios import channel_ratios, hand_ratios, lamp_moments, RATIOS, ARRAY_RATIOS

def removed(r, sizes): return {k: round(v*sizes[k]) for k,v in r.items()}
def whole(r, sizes): return all(abs(v*sizes[k]-round(v*sizes[k]))<1e-6 for k,v in r.items())
def details(how, sizes, scores, seed=0):
    "What `how` reads: scores as they are, channel magnitudes, or shapes."
    rng = np.random.default_rng(seed)
    if how in RATIOS: return scores
    return {k: rng.gamma(1, size=n) for k,n in sizes.items()} if how!='erk' else {k: (n, int(rng.integers(1, 99)), 3, 3) for k,n in sizes.items()}

HOW = st.sampled_from(list(RATIOS | ARRAY_RATIOS))
layers = st.integers(1, 12).flatmap(lambda n: st.tuples(st.lists(st.integers(1, 600), min_size=n, max_size=n),
                                                         st.lists(st.floats(-50, 50), min_size=n, max_size=n)))
wide = st.integers(2, 8).flatmap(lambda n: st.tuples(st.lists(st.integers(16, 300), min_size=n, max_size=n),
                                                      st.lists(st.floats(1, 9), min_size=n, max_size=n)))
def named(ls): return [{f'l{i}': o for i,o in enumerate(l)} for l in ls]

@settings(max_examples=200, deadline=None)
@given(layers, st.floats(.01, .99), HOW, st.floats(0, .99), st.integers(1, 4), st.sampled_from([None,.3,.7,1.]))
def test_budget_is_met(layers, target, how, eps, min_channels, max_ratio):
    "Exactly the budget and the bounds, or an error when and only when the bounds forbid it."
    sizes, scores = named(layers)
    most, n = max_ratio or (1+target)/2, sum(sizes.values())
    cap = {k: max(0, min(int(most*s+1e-9), s-min_channels)) for k,s in sizes.items()}
    go = lambda: channel_ratios(details(how, sizes, scores), sizes, target, how, eps, max_ratio, min_channels)
    if not 0<round(target*n)<=sum(cap.values()):
        with pytest.raises(ValueError, match='cannot be met|rounds to none'): go()
        return
    r = go()
    gone = removed(r, sizes)
    assert list(r)==list(sizes) and whole(r, sizes) and sum(gone.values())==round(target*n)
    assert all(0<=gone[k]<=cap[k] for k in sizes)

@settings(max_examples=100, deadline=None)
@given(wide, st.floats(.05, .7), HOW, st.integers(2, 16), st.booleans())
def test_round_to_and_ignore(layers, target, how, round_to, ignore):
    "Widths are whole or multiples, layers left alone lose nothing, and the budget is met to half a multiple."
    sizes, scores = named(layers)
    left = ['l0'] if ignore else None
    try: r = channel_ratios(details(how, sizes, scores), sizes, target, how, round_to=round_to, ignore=left)
    except ValueError as e:
        cap = {k: int((1+target)/2*s+1e-9) if k!='l0' or not ignore else 0 for k,s in sizes.items()}
        cap = sum(max((d for d in range(c+1) if d==0 or (sizes[k]-d)%round_to==0 and d<sizes[k])) for k,c in cap.items())
        goal = round(target*sum(sizes.values()))
        assert cap==0 or cap<goal-round_to//2 if 'cannot' in str(e) else 'rounds to none' in str(e) and goal<round_to
        return
    gone = removed(r, sizes)
    assert all(g==0 or (sizes[k]-g)%round_to==0 for k,g in gone.items()) and (not ignore or r['l0']==0)
    assert abs(sum(gone.values())-round(target*sum(sizes.values())))<=round_to//2

@settings(max_examples=100, deadline=None)
@given(wide, st.floats(.05, .9), st.floats(.05, .9), st.sampled_from(['low','high']))
def test_monotone_in_score(layers, target, eps, protect):
    "Shares follow the scores, to a channel in layers of unlike size and exactly in layers of the same size."
    sizes, scores = named(layers)
    for s in (sizes, dict.fromkeys(sizes, 100)):
        gone = removed(channel_ratios(scores, s, target, eps=eps, max_ratio=1., protect=protect), s)
        for i in s:
            for j in s:
                if (scores[i]-scores[j])*(1 if protect=='low' else -1)>=0: continue
                slack = 0 if s is not sizes else 1/s[i]+1/s[j]
                assert gone[i]/s[i]<=gone[j]/s[j]+slack+1e-9 or gone[i]>=s[i]-1 or gone[j]>=s[j]-1

@settings(max_examples=100, deadline=None)
@given(wide, st.floats(.05, .9), HOW, st.randoms(use_true_random=False))
def test_order_of_the_dict_does_not_matter(layers, target, how, rnd):
    sizes, scores = named(layers)
    assume(how not in ('shuffled', 'random'))
    x, keys = details(how, sizes, scores), list(sizes)
    rnd.shuffle(keys)
    a, b = channel_ratios(x, sizes, target, how), channel_ratios({k: x[k] for k in reversed(keys)}, {k: sizes[k] for k in keys}, target, how)
    assert a==b and list(b)==keys

@settings(max_examples=100, deadline=None)
@given(wide, st.floats(.05, .9), st.integers(-8, 8), st.floats(-3, 3))
def test_scale_does_not_matter(layers, target, power, shift):
    "Scores may be scaled, gammas all alike, magnitudes layer by layer; a shift of the scores may move single channels by rounding."
    sizes, scores = named(layers)
    f, go = 2.**power, lambda x, how: channel_ratios(x, sizes, target, how)
    for how in ('spectral', 'reversed', 'shuffled'): assert go({k: v*f for k,v in scores.items()}, how)==go(scores, how)
    x = details('gamma', sizes, scores)
    assert go({k: v*f for k,v in x.items()}, 'gamma')==go(x, 'gamma')
    assert go({k: v*f**i for i,(k,v) in enumerate(x.items())}, 'lamp')==go(x, 'lamp')
    moved = removed(go({k: v+shift for k,v in scores.items()}, 'spectral'), sizes)
    if np.ptp(list(scores.values()))>.1: assert all(abs(moved[k]-g)<=1 for k,g in removed(go(scores, 'spectral'), sizes).items())

@settings(max_examples=50, deadline=None)
@given(wide, HOW, st.floats(.05, .8), st.floats(0, .15))
def test_more_never_gives_back(layers, how, target, more):
    "With fixed bounds, a larger budget takes at least as much from every layer."
    sizes, scores = named(layers)
    x = details(how, sizes, scores)
    a, b = (channel_ratios(x, sizes, t, how, max_ratio=.96) for t in (target, target+more))
    assert all(a[k]<=b[k] for k in sizes)

def chain(sizes, side=8):
    "Costs of a chain of 3x3 convolutions, whose image halves every other layer; a time that falls in steps of 8 channels; readers of one trunk that is as wide as its widest reader."
    def params(kept): w = [3, *kept.values()]; return sum(9*a*b+2*b for a,b in zip(w, w[1:]))
    def flops(kept): w = [3, *kept.values()]; return sum(9*a*b*(side/2**(i//2))**2 for i,(a,b) in enumerate(zip(w, w[1:])))
    def latency(kept): w = [3, *kept.values()]; return sum(5+(-(-a//8))*(-(-b//8)) for a,b in zip(w, w[1:]))
    def trunk(kept): return sum(9*12*k for k in kept.values()) + 27*max(kept.values())
    return dict(params=params, flops=flops, latency=latency, trunk=trunk)

@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(16, 300), min_size=4, max_size=12), st.floats(.05, .9), HOW, st.sampled_from(['params','flops','trunk']))
def test_costs_are_met(ls, target, how, by):
    "Within half a percent of parameters or multiply-adds, in networks whose layers have 16 channels or more and where one channel is at most a percent."
    assume(by!='trunk' or sum(ls)>=100)
    sizes, = named([ls])
    cost, calls = chain(sizes)[by], []
    def counted(kept): calls.append(kept); return cost(kept)
    x = details(how, sizes, dict(zip(sizes, np.random.default_rng(len(ls)).uniform(2, 6, len(ls)))))
    low = {k: n-min(int((1+target)/2*n+1e-9), n-1) for k,n in sizes.items()}
    if cost(low)>cost(sizes)*(1-target+.005):
        with pytest.raises(ValueError, match='cannot be met: at most'): channel_ratios(x, sizes, target, how, cost=cost)
        return
    r = channel_ratios(x, sizes, target, how, cost=counted)
    kept = {k: n-removed(r, sizes)[k] for k,n in sizes.items()}
    assert abs(1-cost(kept)/cost(sizes)-target)<=.005+1e-9 and all(kept[k]>=low[k] for k in sizes) and whole(r, sizes)
    assert len(calls)<600 and all(list(c)==list(sizes) for c in calls)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 6), min_size=2, max_size=3), st.floats(.1, .8), st.sampled_from(['params','flops','latency','trunk']), st.sampled_from(['uniform','spectral']))
def test_coarse_costs_by_brute_force(ls, target, by, how):
    "In tiny networks: what comes back holds the budget, and what is refused for its bounds no configuration could hold."
    sizes, = named([ls])
    cost, scores, tol = chain(sizes)[by], dict(zip(sizes, (3.,2.,5.))), .02
    ways = [dict(zip(sizes, w)) for w in np.ndindex(*ls)]
    share = lambda kept: 1-cost(kept)/cost(sizes)
    shares = [share({k: v+1 for k,v in w.items()}) for w in ways]
    try: r = channel_ratios(scores, sizes, target, how, max_ratio=1., cost=cost, tol=tol)
    except ValueError as e:
        if 'at most' in str(e): assert max(shares)<target-tol+1e-9
        elif 'nearest' in str(e): assert abs(float(str(e).split('found is ')[1].split(':')[0])-target)>tol-1e-3
        else: assert 'rounds to none' in str(e)
        return
    assert abs(share({k: n-removed(r, sizes)[k] for k,n in sizes.items()})-target)<=tol+1e-9

def test_nothing_is_removed_for_nothing():
    sizes = dict(a=64, b=96, c=128)
    cost = chain(sizes)['latency']
    r = removed(channel_ratios(dict(a=2., b=3., c=4.), sizes, .5, cost=cost, tol=.02), sizes)
    kept = {k: n-r[k] for k,n in sizes.items()}
    for k in kept: assert cost(kept)<cost(kept | {k: kept[k]+1})

def test_gamma_is_one_threshold():
    "Network Slimming: sort all gammas and cut."
    rng = np.random.default_rng(0)
    x = {k: rng.normal(size=n)*s for k,n,s in (('a',64,1.), ('b',128,.5), ('c',32,2.))}
    cut = np.sort(np.abs(np.concatenate(list(x.values()))))[112-1]
    sizes = {k: len(v) for k,v in x.items()}
    assert removed(channel_ratios(x, sizes, .5, 'gamma', max_ratio=1.), sizes)=={k: (np.abs(v)<=cut).sum() for k,v in x.items()}

def test_lamp_is_torch_prunings():
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    dg = tp.DependencyGraph().build_dependency(m, example_inputs=torch.randn(1, 3, 8, 8))
    theirs = tp.importance.LAMPImportance(group_reduction='first')(dg.get_pruning_group(m[0], tp.prune_conv_out_channels, list(range(8))))
    np.testing.assert_allclose(lamp_moments(m[0].weight.detach().flatten(1).norm(dim=1), 8), theirs.sort().values, rtol=1e-5)

def erk(shapes, ns, keep):
    "The procedure of RigL: scale the densities to the budget; whoever is above 1 is dense, and the others are scaled again."
    d, dense = np.array([sum(s)/np.prod(s) for s in shapes]), np.zeros(len(ns), bool)
    while True:
        s = (keep-ns[dense].sum())/(d*ns)[~dense].sum()
        if not (over := ~dense & (s*d>1)).any(): return np.where(dense, 1, s*d)
        dense |= over

@pytest.mark.parametrize('target', [.2,.5,.8])
def test_erk_is_rigls(target):
    shapes = {'a': (64,3,3,3), 'b': (128,64,3,3), 'c': (256,128,3,3), 'd': (512,256,3,3), 'e': (512,512,1,1)}
    sizes = {k: s[0] for k,s in shapes.items()}
    ours = channel_ratios(shapes, sizes, target, 'erk', max_ratio=1.)
    np.testing.assert_allclose([1-o for o in ours.values()], erk(shapes.values(), np.array(list(sizes.values())), (1-target)*1472), atol=1/64)

def test_ties_are_spread():
    "Where all scores agree every rule is uniform, and none starts with the first layer."
    sizes = dict(a=10, b=20, c=40)
    for how in ('gamma', 'spectral', 'reversed', 'shuffled'):
        x = {k: 1. if how in RATIOS else np.ones(n) for k,n in sizes.items()}
        assert removed(channel_ratios(x, sizes, .5, how), sizes)==dict(a=5, b=10, c=20)
    x = dict(a=np.zeros(10), b=np.r_[np.zeros(10), np.ones(10)], c=np.zeros(40))
    assert removed(channel_ratios(x, sizes, .5, 'lamp', max_ratio=.9), sizes)['b']<=10

def test_seeds():
    sizes, scores = dict.fromkeys('abcdef', 100), dict(zip('abcdef', (2.,3.,4.,5.,6.,7.)))
    for how in ('shuffled', 'random'):
        a, b, c = (channel_ratios(scores, sizes, .5, how, seed=s) for s in (0, 0, 1))
        assert a==b!=c
    spectral, shuffled = (sorted(channel_ratios(scores, sizes, .5, how).values()) for how in ('spectral', 'shuffled'))
    assert spectral==shuffled

def test_a_layer_without_a_score_is_neutral():
    sizes = dict.fromkeys('abc', 100)
    with pytest.warns(UserWarning, match='no finite score for b'): r = channel_ratios(dict(a=2., b=float('nan'), c=4.), sizes, .4)
    assert r['b']==pytest.approx(.4, abs=.01) and r['a']<r['b']<r['c']

def test_by_hand():
    sizes = dict(a=10, b=4)
    assert channel_ratios({}, sizes, None, dict(a=.26))==hand_ratios(dict(a=.26), sizes)==dict(a=.3, b=0)
