"Importances against torch-pruning, NumPy and the gates they stand for"
from collections import namedtuple
from copy import deepcopy
import numpy as np, pytest, torch, torch_pruning as tp
from torch import nn
from torch.nn import functional as F
from torch_pruning.pruner.importance import GroupMagnitudeImportance, FPGMImportance, BNScaleImportance, GroupTaylorImportance
from spectral_nb.importance import *
from spectral_nb.importance import NEED_GRADIENTS
from spectral_nb.models import vgg19, densenet40, Reader

Channels = namedtuple('Channels', 'layer norm dim')

def mixed(model, x):
    "A network whose norms differ in every channel, on the scale of the data."
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms: nn.init.uniform_(m.weight, -1.5, 1.5); nn.init.uniform_(m.bias, -1, 1); m.momentum = 1.
    with torch.no_grad(): model.train()(x)
    return model.eval()

@pytest.fixture(scope='module')
def batch(): torch.manual_seed(0); return torch.randn(12, 3, 16, 16), torch.arange(12)%10
@pytest.fixture(scope='module')
def vgg(batch): return mixed(vgg19(width=1/8, channels_last=False), batch[0])
@pytest.fixture(scope='module')
def dense(batch): return mixed(densenet40(growth=6, depth=13), batch[0])

def vgg_units(m):
    convs = [k for k,o in m.features.named_children() if isinstance(o, nn.Conv2d)]
    return [Channels(f'features.{k}', f'features.{int(k)+1}', 0) for k in convs]
def dense_units(m): return [Channels(f"{k}.{'fc' if k=='head' else 'conv'}", f'{k}.norm', 1) for k,o in m.named_modules() if isinstance(o, Reader)]

def theirs(model, x, i, imp):
    "torch-pruning's importance of the outputs of convolution `i`."
    dg = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    conv = model.features[i]
    return imp(dg.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(conv.out_channels))))

@pytest.mark.parametrize('i', [0, 3, 14])
def test_torch_pruning_agrees(vgg, batch, i):
    model = deepcopy(vgg)
    model.features[i].weight.data.abs_()                            # torch-pruning measures distances of absolute weights
    first = dict(group_reduction='first', normalizer=None)
    u = Channels(f'features.{i}', f'features.{i+1}', 0)
    ours = {k: channel_importance(model, [u], k)[u] for k in ('l1', 'l2', 'fpgm', 'gamma')}
    go = lambda imp: theirs(model, batch[0], i, imp)
    torch.testing.assert_close(ours['l1'], go(GroupMagnitudeImportance(p=1, **first)))
    torch.testing.assert_close(ours['l2']**2, go(GroupMagnitudeImportance(p=2, **first)))
    torch.testing.assert_close(ours['fpgm'], go(FPGMImportance(p=1, **first)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours['gamma'], go(BNScaleImportance(group_reduction='mean', normalizer=None)))

def test_torch_prunings_taylor(vgg, batch):
    model = deepcopy(vgg)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    u = Channels('features.3', 'features.4', 0)
    ours = channel_importance(vgg, [u], 'taylor_weight', dl=[batch])[u]
    torch.testing.assert_close(ours, theirs(model, batch[0], 3, GroupTaylorImportance(group_reduction='first', normalizer=None)))

@pytest.mark.parametrize('arch', ['vgg','dense'])
def test_numpy_agrees(arch, request):
    "Every criterion that reads weights, written out with loops."
    model = request.getfixturevalue(arch)
    for u in (vgg_units if arch=='vgg' else dense_units)(model)[::4]:
        w = model.get_submodule(u.layer).weight.detach().double().numpy()
        rows = np.stack([w.take(i, u.dim).ravel() for i in range(w.shape[u.dim])])
        go = lambda k, **kw: channel_importance(model, [u], k, **kw)[u].double().numpy()
        np.testing.assert_allclose(go('l1'), [sum(abs(v) for v in r) for r in rows], rtol=1e-5)
        np.testing.assert_allclose(go('l2'), [sum(v*v for v in r)**.5 for r in rows], rtol=1e-5)
        np.testing.assert_allclose(go('fpgm'), [sum(np.sqrt(((r-q)**2).sum()) for q in rows) for r in rows], rtol=1e-4)
        for k in (1, 3): np.testing.assert_allclose(go('leverage', rank=k), (np.linalg.svd(rows)[0][:,:k]**2).sum(1), atol=1e-5)
        np.testing.assert_allclose(go('gamma'), abs(model.get_submodule(u.norm).weight.detach().numpy()))

@pytest.mark.parametrize('arch', ['vgg','dense'])
def test_taylor_is_the_gradient_of_a_gate(arch, request, batch):
    "Multiply what leaves each norm by a gate of ones: the squared gradient of the gates, averaged over batches, is the importance."
    model = deepcopy(request.getfixturevalue(arch)).double()
    units, dl = (vgg_units if arch=='vgg' else dense_units)(model), [(x.double(), y) for x,y in zip(batch[0].split(5), batch[1].split(5))]
    ours = channel_importance(model, units, 'taylor', dl=dl)
    gates = {u: torch.ones(model.get_submodule(u.norm).num_features, dtype=torch.float64, requires_grad=True) for u in units}
    for u in units: model.get_submodule(u.norm).register_forward_hook(lambda m, i, o, g=gates[u]: o*g[:,None,None])
    grads = [torch.autograd.grad(F.cross_entropy(model(x), y), list(gates.values())) for x,y in dl]
    for u,*gs in zip(units, *grads): torch.testing.assert_close(ours[u], sum(g**2 for g in gs)/len(gs), rtol=1e-8, atol=1e-16)

def test_taylor_predicts_what_a_small_channel_costs(vgg, batch):
    "For a channel with a small norm the first order is nearly all."
    model = deepcopy(vgg).double()
    u, dl = vgg_units(model)[2], [(batch[0].double(), batch[1])]
    norm = model.get_submodule(u.norm)
    with torch.no_grad(): norm.weight *= 1e-6; norm.bias *= 1e-6
    imp = channel_importance(model, [u], 'taylor', dl=dl)[u]
    loss = lambda m: F.cross_entropy(m(dl[0][0]), dl[0][1]).item()
    i = imp.argmax().item()
    silent = deepcopy(model); n = silent.get_submodule(u.norm); n.weight.data[i] = 0; n.bias.data[i] = 0
    assert (loss(silent)-loss(model))**2==pytest.approx(imp[i].item(), rel=.05)

def test_model_stays_untouched(vgg, batch):
    model = deepcopy(vgg).train()
    model.features[0].weight.requires_grad_(False)
    before, rng = {k: v.clone() for k,v in model.state_dict().items()}, torch.get_rng_state()
    for k in IMPORTANCES: channel_importance(model, vgg_units(model), k, dl=[batch], **(dict(seed=3) if k=='random' else {}))
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    assert model.training and all(p.grad is None for p in model.parameters()) and not model.features[0].weight.requires_grad

@pytest.mark.parametrize('k', [k for k in IMPORTANCES if k not in NEED_GRADIENTS|{'random','gamma'}])
def test_channels_may_be_reordered(k):
    "The importance moves with the channel, and inputs in another order change nothing."
    torch.manual_seed(1)
    a, b, p, q = nn.Conv2d(10, 20, 3), nn.Conv2d(10, 20, 3), torch.randperm(20), torch.randperm(10)
    b.weight.data = a.weight.data[p][:,q]
    torch.testing.assert_close(IMPORTANCES[k](b, None, 0), IMPORTANCES[k](a, None, 0)[p], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(IMPORTANCES[k](b, None, 1), IMPORTANCES[k](a, None, 1)[q], rtol=1e-4, atol=1e-5)

def test_leverage_is_a_projection():
    "It sums to the rank, lies in [0,1], ignores scale and rotation of what the channels connect to, and is 1 for a direction of one's own."
    lin = nn.Linear(60, 40, bias=False)
    with torch.no_grad(): lin.weight[7] *= 50
    w = lin.weight.data.clone()
    lev = leverage_importance(lin, None, 0)
    assert lev.sum().item()==pytest.approx(1, abs=1e-4) and lev[7]>.97 and (lev>=0).all() and (lev<=1).all()
    for k in (1, 4, 39): assert leverage_importance(lin, None, 0, rank=k).sum().item()==pytest.approx(k, abs=1e-3)
    lin.weight.data = 3*w@torch.linalg.qr(torch.randn(60, 60))[0]
    torch.testing.assert_close(leverage_importance(lin, None, 0), lev, rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize('shape', [(1,1), (1,9), (9,1), (2,3), (64,1), (30,200)])
def test_leverage_of_any_shape(shape):
    lin = nn.Linear(*shape[::-1], bias=False)
    for dim in (0, 1):
        lev = leverage_importance(lin, None, dim)
        assert lev.shape==(shape[dim],) and lev.isfinite().all() and .99<lev.sum()<=max(1, min(shape)-1)+.01
    nn.init.zeros_(lin.weight)
    assert torch.equal(leverage_importance(lin, None, 0), torch.zeros(shape[0]))

def test_random_differs_by_layer_and_seed(dense):
    "Readers of one trunk must not choose the same channels, or whole producers would die."
    units = dense_units(dense)
    a, b = (list(channel_importance(dense, units, 'random', seed=s).values()) for s in (0, 1))
    first = torch.stack([o[:12] for o in a])
    assert len(torch.unique(first, dim=0))==len(units) and not any(torch.equal(x, y) for x,y in zip(a, b))
    assert all(torch.equal(x, y) for x,y in zip(a, channel_importance(dense, units, 'random').values()))
