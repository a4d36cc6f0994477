"The matrices of a layer against operators built by hand, and what must leave their eigenvalues alone."
from copy import deepcopy
from functools import partial
import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from itertools import product
from torch import nn
from torch.nn import functional as F
from spectral_nb.matrices import CONVS, esd, fft_matrices, fixed_aspect, grouped_weight, layer_matrices, skipped_layers, weight_layers, weight_matrices

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
# dimensions, channels in, channels out, kernel, groups
SHAPES = [(1, 4, 6, 3, 1), (1, 6, 4, 4, 2), (2, 3, 5, 3, 1), (2, 6, 4, (2, 3), 2), (2, 6, 6, 3, 6), (2, 4, 8, 3, 4), (3, 2, 4, 3, 1), (3, 4, 2, (1, 2, 3), 2)]


def squares(m): return np.linalg.svd(np.asarray(m, dtype=float), compute_uv=False)**2

def same(a, b, rtol=1e-5):
    "Equal spectra, where the longer one may have zeros in front."
    a, b = (np.sort(np.asarray(o, dtype=float).ravel()) for o in (a, b))
    n = max(len(a), len(b))
    a, b = (np.pad(o, (n-len(o), 0)) for o in (a, b))
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol*1e-2*b[-1])

def make(kinds, dims, c_in, c_out, kernel, groups):
    torch.manual_seed(0)
    return kinds[dims](c_in, c_out, kernel, groups=groups, bias=False).double()

def responses(layer, dims, c_in):
    "What the layer makes of a single bright pixel in each channel: shape (positions, out, in), zeros between groups."
    k = layer.kernel_size
    x = torch.zeros(c_in, c_in, *k, dtype=torch.float64)
    x[(range(c_in), range(c_in), *[0]*dims)] = 1
    with torch.no_grad(): y = layer(x if layer.transposed else F.pad(x, [o for n in reversed(k) for o in (n-1, 0)]))
    return y[(..., *[slice(n) for n in k])].flatten(2).permute(2, 1, 0)


@pytest.mark.parametrize('kinds', [CONV, TRANSPOSED])
@pytest.mark.parametrize('shape', SHAPES)
def test_pool_equals_responses(kinds, shape):
    layer = make(kinds, *shape)
    dense = responses(layer, *shape[:2])
    ours = esd(weight_matrices(grouped_weight(layer)))
    assert len(ours)==len(dense)*min(shape[1], shape[2])
    same(ours, 0.5*np.concatenate([squares(m) for m in dense]))

@pytest.mark.parametrize('kinds', [CONV, TRANSPOSED])
@pytest.mark.parametrize('shape', SHAPES)
def test_flat_equals_loop(kinds, shape):
    layer, (_, c_in, c_out, _, groups) = make(kinds, *shape), shape
    dense = responses(layer, *shape[:2]).numpy()
    o, i = c_out//groups, c_in//groups
    want = [squares(np.concatenate([m[g*o:(g+1)*o, g*i:(g+1)*i] for m in dense], 1)) for g in range(groups)]
    same(esd(weight_matrices(grouped_weight(layer), 'flat')), np.concatenate(want))

def circular_operator(dense, kernel, size):
    "The matrix of the circular convolution, pixel by pixel and loop by loop."
    dims, (_, c_out, c_in) = len(kernel), dense.shape
    op = np.zeros((c_out, *[size]*dims, c_in, *[size]*dims))
    for p,m in zip(product(*map(range, kernel)), dense):
        for x in product(range(size), repeat=dims):
            y = tuple((a+b)%size for a,b in zip(x, p))
            op[(slice(None), *y, slice(None), *x)] += m
    return op.reshape(c_out*size**dims, c_in*size**dims)

@pytest.mark.parametrize('kinds', [CONV, TRANSPOSED])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('size', [4, 5])
def test_fft_equals_circular_operator(kinds, shape, size):
    if shape[0]==3: size = 4
    layer = make(kinds, *shape)
    want = squares(circular_operator(responses(layer, *shape[:2]).numpy(), layer.kernel_size, size))
    ours = esd(fft_matrices(grouped_weight(layer), size))
    assert len(ours)==size**shape[0]*min(shape[1], shape[2])
    same(ours, want)

@pytest.mark.parametrize('shape', [(1, 4, 6, 3, 1), (2, 3, 5, 3, 1), (2, 6, 4, 3, 2), (3, 2, 3, 3, 1)])
def test_fft_equals_circular_padding(shape):
    "PyTorch's own circular convolution, asked for its matrix column by column."
    dims, c_in, c_out, kernel, groups = shape
    torch.manual_seed(0)
    layer = CONV[dims](c_in, c_out, kernel, groups=groups, bias=False, padding=1, padding_mode='circular').double()
    x = torch.eye(c_in*4**dims, dtype=torch.float64).view(-1, c_in, *[4]*dims)
    with torch.no_grad(): want = squares(layer(x).flatten(1).T)
    same(esd(weight_matrices(grouped_weight(layer), partial(fft_matrices, grid=4))), want)

def test_fft_of_a_large_kernel():
    "A kernel larger than the grid is not cut."
    w = torch.randn(1, 3, 2, 11, dtype=torch.float64)
    same(esd(fft_matrices(w, 4)), squares(circular_operator(w[0].permute(2, 0, 1).numpy(), (11,), 11)))

def test_fft_in_slices():
    "More matrices than fit into a slice."
    w = fft_matrices(torch.randn(1, 300, 260, 3, 3), 8)
    assert w.numel()>2**22
    np.testing.assert_allclose(esd(w, torch.float32), np.sort((torch.linalg.svdvals(w)**2).flatten()), rtol=1e-3, atol=1e-4*float(w.abs().square().sum(-1).max()))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(16, 16), nn.MultiheadAttention(8, 2)).to(dtype)
    for (_,_,a),(_,_,b) in zip(layer_matrices(net), layer_matrices(deepcopy(net).double())):
        assert a.dtype==torch.float32
        same(esd(a), esd(b))

def test_foreign_modules():
    "Modules that are only named after a known one, or compute their weight anew, do no harm."
    class Conv1D(nn.Module): pass
    class Computed(nn.Linear):
        weight = property(lambda self: self.base*2)
        def __init__(self, n): nn.Module.__init__(self); self.register_buffer('base', torch.randn(n, n))
    net = nn.Sequential(Conv1D(), Computed(4), Computed(4), Computed(4))
    assert list(weight_layers(net))==['1', '2', '3']
    for name,m,w in layer_matrices(net): torch.testing.assert_close(w[0], 2*m.base)

def test_torchao_weight_is_skipped():
    class Packed(torch.Tensor): __module__ = 'torchao.dtypes'
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = nn.Parameter(torch.randn(4, 4).as_subclass(Packed))
    assert list(weight_layers(net))==['0']
    assert 'quantized' in skipped_layers(net)['1']

@pytest.mark.filterwarnings('ignore')
def test_dynamic_quantization_keeps_the_rest():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 4))
    q = torch.ao.quantization.quantize_dynamic(net)
    assert [k for k,_,_ in layer_matrices(q)]==['0']
    assert 'quantized' in skipped_layers(q)['1']

def test_int8_tensors_of_a_checkpoint():
    sd = {'a.weight': torch.ones(4, 4, dtype=torch.int8), 'b.weight': torch.randn(4, 4), 'bn.weight': torch.ones(4), 'steps': 3}
    assert [k for k,_,_ in layer_matrices(sd)]==['b']
    assert list(skipped_layers(sd))==['a']


seeds, sides = st.integers(0, 2**31-1), st.integers(1, 9)
check = settings(deadline=None, max_examples=25)

def weight(seed, groups, out, inp, kernel):
    return torch.randn(groups, out, inp, *kernel, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

weights = st.builds(weight, seeds, st.integers(1, 3), sides, sides, st.lists(st.integers(1, 3), max_size=2))
ways = st.tuples(st.sampled_from(list(CONVS)), st.sampled_from([None, 1, 1.5, 3]))

def orthogonal(n, seed): return torch.linalg.qr(weight(seed, 1, n, n, ())[0])[0]
def mixed(w, q): return torch.einsum('po,goi...->gpi...', q, w)


@check
@given(weights, ways, st.floats(1e-3, 1e3))
def test_scale(w, way, c): same(esd(weight_matrices(c*w, *way)), c**2*esd(weight_matrices(w, *way)), 1e-9)

@check
@given(weights, st.sampled_from(list(CONVS)), seeds)
def test_permutations(w, conv, seed):
    g = torch.Generator().manual_seed(seed)
    rows, cols = (torch.randperm(n, generator=g) for n in w.shape[1:3])
    same(esd(weight_matrices(w[:, rows][:, :, cols], conv)), esd(weight_matrices(w, conv)), 1e-9)

@check
@given(weights, st.sampled_from(['pool', 'fft']), st.sampled_from([None, 1, 1.5, 3]))
def test_transposition(w, conv, aspect):
    assume(aspect in (None, 1) or w.shape[1]!=w.shape[2])                # windows of a square matrix lie along its rows
    same(esd(weight_matrices(w.transpose(1, 2), conv, aspect)), esd(weight_matrices(w, conv, aspect)), 1e-9)

@check
@given(weights, st.sampled_from(list(CONVS)), seeds, seeds)
def test_rotations(w, conv, s1, s2):
    turned = mixed(mixed(w, orthogonal(w.shape[1], s1)).transpose(1, 2), orthogonal(w.shape[2], s2)).transpose(1, 2)
    same(esd(weight_matrices(turned, conv)), esd(weight_matrices(w, conv)), 1e-9)

@check
@given(weights, st.sampled_from(list(CONVS)))
def test_sum_of_squares(w, conv):
    "The trace is the sum of the squared weights, times the factor of the convention."
    factor = 1 if w.ndim==3 or conv=='flat' else 0.5 if conv=='pool' else np.prod([max(8, k) for k in w.shape[3:]])
    np.testing.assert_allclose(esd(weight_matrices(w, conv)).sum(), factor*w.square().sum(), rtol=1e-9)

@check
@given(weights, st.floats(1, 4))
def test_windows_cover_everything(w, aspect):
    m = torch.arange(1., w.numel()+1).view(-1, *w.shape[-2:])
    f = fixed_aspect(m, aspect)
    M, N = sorted(m.shape[1:])
    k, n = f.shape[1:]
    assert set(f.flatten().tolist())==set(m.flatten().tolist())
    assert k<=M and n<=N and (n==N or n==round(k*aspect))
    assert k==M or round((k+1)*aspect)>N or (k+1)*aspect>N
    assert len(f)*k*n<4*m.numel()
