"Scores that speak of training: nulls against whole matrices, untrained networks, and what must not change a number."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.stats import kendalltau
from torch import nn
from torchvision.models import densenet121, mobilenet_v2, resnet18, vit_b_16
from spectral_nb.metrics import analyze, layer_scores
from spectral_nb.models import densenet40, vgg19
from spectral_nb.null import LIMITS, noise_null, null_table, shape_share, untrained
from spectral_nb.prune import prune

NETWORKS = dict(vgg19=lambda: vgg19(width=.5), densenet40=densenet40, resnet18=resnet18, densenet121=densenet121,
                mobilenet_v2=mobilenet_v2, vit_b_16=vit_b_16)


@pytest.mark.parametrize('name', NETWORKS)
def test_untrained_networks_are_noise(name):
    "Relative metrics of new networks are 1, their z small, and their order is not that of the shapes"
    layers = 'encoder.layers.encoder_layer_[0-2].*' if name=='vit_b_16' else None
    rel, far, taus = dict(alpha=[], stable_rank=[]), [], []
    for seed in range(2):
        torch.manual_seed(seed)
        net = NETWORKS[name]()
        for metric in rel:
            t = null_table(net, metric, layers=layers)
            t = t[t.rf*t.M>=50]
            rel[metric] += t.rel.tolist()
            far += (t.z.abs()>2.5).tolist()
        share = shape_share(net, 'rel_alpha', layers=layers)
        taus.append(share.tau)
    for metric,values in rel.items(): assert abs(np.median(values)-1)<.02, metric
    assert np.mean(far)<=.05
    if name!='vit_b_16': assert abs(np.mean(taus))<=1.5*share.noise/2**.5


def test_plain_alpha_is_shape():
    torch.manual_seed(0)
    assert shape_share(densenet40(), 'alpha').tau>.8


@pytest.mark.parametrize('metric', LIMITS)
@pytest.mark.parametrize('rf,N,M', [(1, 64, 64), (9, 128, 64), (4, 300, 100), (1, 1600, 100)])
def test_null_equals_whole_matrices(metric, rf, N, M):
    "Against eigenvalues of matrices that are really drawn, through the table of metrics"
    gen = torch.Generator().manual_seed(1)
    layers = {f'{i}.weight': torch.randn(M, N, *([rf, 1] if rf>1 else []), generator=gen) for i in range(24)}
    values = layer_scores(layers, metric).score - (metric=='alpha')
    null = noise_null(metric, rf, N, M)
    assert abs(values.mean()-null.mean)<.01*null.mean + 4*null.sd/24**.5
    assert .5<values.std()/null.sd<2


def layer(m, n, seed, scale=1.):
    "A trained-looking matrix: noise and three strong directions"
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=gen)
    u, v = (torch.linalg.qr(torch.randn(k, 3, generator=gen))[0] for k in (m, n))
    return scale*(w + 3*(m**.5+n**.5)*u@v.T)


SCALE_FREE = ['alpha', 'D', 'stable_rank', 'effective_rank', 'entropy', 'num_spikes', 'mp_softrank', 'matrix_rank',
              'rel_stable_rank', 'rel_entropy', 'z_stable_rank']
def row(w, fit='hill'): return analyze({'a.weight': w}, fit=fit, progress=False).iloc[0]
def same(a, b, columns, rtol=1e-4): np.testing.assert_allclose(a[columns].astype(float), b[columns].astype(float), rtol=rtol)


@settings(deadline=None, max_examples=15)
@given(st.integers(20, 60), st.integers(20, 90), st.integers(0, 99), st.sampled_from(['hill', 'ks']), st.data())
def test_what_must_not_change(m, n, seed, fit, data):
    "Units, order, transposition, zero rows and columns"
    w = layer(m, n, seed)
    base, columns = row(w, fit), SCALE_FREE + (['rel_alpha', 'z_alpha'] if fit=='hill' else [])
    scale = data.draw(st.sampled_from([1e-18, 1e-4, 3e-4, 1e3, 1e15]))
    same(base, row(w*scale, fit), columns)
    same(base, row(w[torch.randperm(m)][:, torch.randperm(n)], fit), columns)
    same(base, row(w.T.contiguous(), fit), columns)
    padded = torch.zeros(m+data.draw(st.integers(1, 30)), n+data.draw(st.integers(0, 30)))
    padded[:m, :n] = w
    padded = padded[torch.randperm(len(padded))]
    same(base, row(padded, fit), columns)
    assert row(padded, fit).N==max(m, n) and row(padded, fit).M==min(m, n)


def test_units_of_a_difference():
    "Two checkpoints that differ by 2e-4 have an exponent"
    w = layer(64, 64, 0)
    assert row(2e-4*w/w.abs().max()).alpha==pytest.approx(row(w).alpha, rel=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_orthogonal_layers_have_no_tail(dtype):
    "They squeeze neither rates nor ratios of the others"
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    nn.init.orthogonal_(net[1].weight)
    s = layer_scores(net.to(dtype))
    assert s.score.isna().tolist()==[False, True, False, False] and 'there is no tail to fit' in s.warning[1]


@pytest.mark.parametrize('rank,spikes', [(1, 1), (8, 8)])
def test_low_rank_has_no_bulk(rank, spikes):
    torch.manual_seed(0)
    r = row(torch.randn(64, rank)@torch.randn(rank, 64))
    assert (r.num_spikes, r.sigma_mp, r.matrix_rank)==(spikes, 0, rank)


def test_masked_noise_has_no_spikes():
    torch.manual_seed(0)
    w = torch.randn(64, 64)
    w[:40] = 0
    assert row(w).num_spikes==0
    assert row(w).sigma_mp==pytest.approx(1, rel=.1)   # from the median of 24 eigenvalues


def test_masked_layers_equal_slim_ones():
    torch.manual_seed(0)
    net = vgg19(width=.25)
    r = prune(net, torch.randn(1, 3, 16, 16), .4, ratios='uniform')
    with torch.no_grad():
        for u,idx in r.keep.items():
            off = torch.ones(r.masked.get_submodule(u.layer).out_channels, dtype=bool).index_fill(0, idx, False)
            r.masked.get_submodule(u.layer).weight[off] = 0
    first = list(r.keep)[0].layer
    a, b = (analyze(o, fit='hill', layers=first, progress=False).iloc[0] for o in (r.masked, r.model))
    same(a, b, ['N', 'M', 'alpha', 'stable_rank', 'num_spikes', 'sigma_mp'])


def test_a_huge_layer_leaves_the_others_alone():
    net = nn.Sequential(*(nn.Linear(40, 40) for _ in range(3)))
    want = layer_scores(net).score
    with torch.no_grad(): net[1].weight *= 1e20
    np.testing.assert_allclose(layer_scores(net).score, want, rtol=1e-4)


def test_reference_with_other_names():
    net = nn.Sequential(nn.Linear(20, 20))
    with pytest.raises(ValueError, match='reference has none of the layers'):
        analyze(net, reference={'other.weight': torch.randn(20, 20)}, progress=False)


def test_windows_have_a_null_too():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(n, 60) for n in (60, 120, 300, 700)))
    for aspect in (1., 2.):
        s = layer_scores(net, 'rel_alpha', aspect=aspect).score
        assert (s-1).abs().max()<.15, aspect


@pytest.mark.parametrize('name', ['vgg19', 'densenet40', 'resnet18', 'mobilenet_v2'])
def test_twins_of_networks(name):
    "Same architecture, no tensor of weights kept, and the twin of a trained-looking network is noise"
    torch.manual_seed(0)
    net = NETWORKS[name]()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim==2: p += 5*p.std()*torch.randn(len(p), 1)*torch.randn(1, p.shape[1])
    twin = untrained(net, 3)
    for (k,p),q in zip(net.named_parameters(), twin.parameters()):
        assert p.shape==q.shape and (p.ndim<2 or not torch.equal(p, q)), k
    t = null_table(twin)
    t = t[t.rf*t.M>=50]
    # PyTorch's own initialization is uniform, and the spectra of small matrices feel the law of their entries
    if name!='mobilenet_v2': assert abs(t.rel.median()-1)<(.08 if name=='densenet40' else .02)
    slim = prune(net, torch.randn(1, 3, 32, 32), .3, ratios='uniform').model if name in ('vgg19', 'densenet40') else None
    if slim: assert [p.shape for p in untrained(slim).parameters()]==[p.shape for p in slim.parameters()]
