"The fast convolution against the plain one: outputs, gradients, networks, loss curves"
import copy, pickle, pytest, torch
from torch import nn
from torch.nn import functional as F
from spectral_nb.models import build_model, densenet40, vgg19
from spectral_nb.small_conv import Conv3x3, _SmallConv, _image_factors

def plain(model):
    "A copy of `model` with PyTorch's convolutions, in the plain memory layout."
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for m in model.modules():
        if type(m) is Conv3x3: m.__class__ = nn.Conv2d
    return model

def dense_by_cat(state, x, n, growth=12):
    "DenseNet written out from its state dict: norms with batch statistics, concatenations."
    def read(k, x): return F.relu(F.batch_norm(x, None, None, state[f'{k}.norm.weight'], state[f'{k}.norm.bias'], training=True))
    x = F.conv2d(x, state['stem.weight'], padding=1)
    for b in 1,2,3:
        for i in range(n): x = torch.cat([x, F.conv2d(read(f'block{b}.{i}', x), state[f'block{b}.{i}.conv.weight'], padding=1)], 1)
        if b<3: x = F.avg_pool2d(F.conv2d(read(f'trans{b}', x), state[f'trans{b}.conv.weight']), 2)
    return F.linear(read('head', x).mean((2,3)), state['head.fc.weight'], state['head.fc.bias'])

def calls(monkeypatch):
    "How often the fast convolution runs, as a list that grows."
    seen, f = [], _SmallConv.apply
    monkeypatch.setattr(_SmallConv, 'apply', lambda x, w: seen.append(tuple(x.shape)) or f(x, w))
    return seen

def out_grads(f, x, w):
    x, w = (o.clone().requires_grad_() for o in (x, w))
    y = f(x, w)
    return y, *torch.autograd.grad(y, (x, w), torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))

@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('h,w', [(1,1), (2,2), (1,2), (3,3), (4,4), (2,5), (7,7), (8,8), (14,6), (16,16)])
def test_small_conv(h, w, layout):
    "Any size, both layouts: 1e-12 in double precision, 1e-5 of the largest in single."
    torch.manual_seed(0)
    x, weight = torch.randn(5, 7, h, w).to(memory_format=layout), torch.randn(6, 7, 3, 3).to(memory_format=layout)
    conv = lambda x, w: F.conv2d(x, w, padding=1)
    exact = out_grads(conv, x.double(), weight.double())
    for a,b in zip(out_grads(_SmallConv.apply, x.double(), weight.double()), exact): torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    for a,b in zip(out_grads(_SmallConv.apply, x, weight), exact): assert a.dtype==torch.float32 and (a-b).abs().max() < 1e-5*b.abs().max()

def test_small_conv_gradcheck():
    x, w = torch.randn(2, 2, 3, 5, dtype=torch.double, requires_grad=True), torch.randn(3, 2, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(_SmallConv.apply, (x, w))

def test_multiplications():
    "36 instead of 144 for 4x4 outputs, 9 instead of 36 for 2x2, one for a single pixel."
    for size,n in ((1,1), (2,9), (4,36), (8,144), (16,576)):
        a,_,g = _image_factors(size, size)
        assert len(a[0])*len(a[1])==n

def test_only_needed_gradients(monkeypatch):
    m, x = Conv3x3(64, 64), torch.randn(32, 64, 4, 4)
    seen = calls(monkeypatch)
    m(x).sum().backward(); assert seen and x.grad is None and m.weight.grad is not None
    m.requires_grad_(False); x.requires_grad_(); m(x).sum().backward(); assert x.grad is not None

@pytest.mark.parametrize('what', ['eval', 'few images', 'large images', 'few channels', 'autocast', 'half'])
def test_plain_where_it_does_not_pay(what, monkeypatch):
    seen, m = calls(monkeypatch), Conv3x3(64, 32 if what=='few channels' else 64)
    x = torch.randn(8 if what=='few images' else 32, 64, *[20 if what=='large images' else 4]*2)
    if what=='half': m, x = m.bfloat16(), x.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=what=='autocast'): m.train(what!='eval')(x)
    assert not seen

@pytest.mark.parametrize('size', [16, 32])
def test_vgg_is_plain(size, monkeypatch):
    "The network with all its convolutions, in double precision: outputs, gradients, running statistics."
    torch.manual_seed(0)
    a, x, y = vgg19(cfg=[8,'M',64,64,'M',64,'M',64,'M',64]).double(), torch.randn(32, 3, size, size, dtype=torch.double), torch.arange(32)%10
    b, seen = plain(a), calls(monkeypatch)
    for m in a,b: F.cross_entropy(m(x), y).backward()
    assert len(seen)==4 and list(a.state_dict())==list(b.state_dict())
    for p,q in zip([*(p.grad for p in a.parameters()), *a.buffers()], [*(p.grad for p in b.parameters()), *b.buffers()]): torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)

def losses(model, x, y, steps=8):
    opt, res = torch.optim.SGD(model.parameters(), lr=.01, momentum=.9), []
    for _ in range(steps): opt.zero_grad(); l = F.cross_entropy(model(x), y); l.backward(); opt.step(); res.append(l.item())
    return torch.tensor(res)

def test_vgg_loss_curve(monkeypatch):
    "In single precision both curves follow the exact one."
    torch.manual_seed(0)
    model, x, y = vgg19(cfg=[16,'M',64,64,'M',64,'M',64]), torch.randn(32, 3, 16, 16), torch.arange(32)%10
    exact, direct = losses(plain(model).double(), x.double(), y), losses(plain(model), x, y)
    seen = calls(monkeypatch)
    fast = losses(model, x, y)
    assert len(seen)==8*3 and exact[-1]<exact[0]-.1
    assert (fast-exact).abs().max() < 1e-4*exact[0] and (direct-exact).abs().max() < 1e-4*exact[0]

def test_densenet_is_plain():
    torch.manual_seed(0)
    a, x = densenet40(depth=13).double(), torch.randn(4, 3, 8, 8, dtype=torch.double)
    out = dense_by_cat(dict(a.named_parameters()), x, 3)
    grads = torch.autograd.grad(out.sin().sum(), list(a.parameters()))
    torch.testing.assert_close(a(x), out, rtol=1e-10, atol=1e-10)
    for p,q in zip(torch.autograd.grad(a(x).sin().sum(), list(a.parameters())), grads): torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)

@pytest.mark.parametrize('model', [lambda: vgg19(width=.1), lambda: densenet40(depth=7)])
def test_copies(model):
    "Deep copies, pickles and configs give the same network."
    a, x = model().eval(), torch.randn(2, 3, 16, 16)
    b = build_model(a.config).eval(); b.load_state_dict(a.state_dict())
    for m in b, copy.deepcopy(a), pickle.loads(pickle.dumps(a)): assert torch.equal(m(x), a(x))

def test_in_a_learner(monkeypatch):
    "fastai's tensors pass through, and one parameter group per layer is found."
    import fastai.callback.progress
    from fastai.basics import Learner, SGD
    from spectral_nb.data import digits_dls
    from spectral_nb.lr import layer_groups
    seen, dls = calls(monkeypatch), digits_dls(16, bs=512)
    learn = Learner(dls, vgg19(cfg=[16,'M',64,64,'M','M',64]), opt_func=SGD, splitter=layer_groups)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
    assert len(seen)==2*len(dls.train) and [len(o) for o in learn.opt.param_lists]==[3]*4+[2]
    assert torch.tensor(learn.recorder.losses[-1]) < learn.recorder.losses[0]
