"Networks against their definition: outputs, gradients, loss curves, copies"
import copy, pickle, pytest, torch
from torch.nn import functional as F
from spectral_nb.models import build_model, densenet40, vgg19

def plain(model): return copy.deepcopy(model).to(memory_format=torch.contiguous_format)

def dense_by_cat(state, x, n, growth=12):
    "DenseNet written out from its state dict: norms with batch statistics, concatenations."
    def read(k, x): return F.relu(F.batch_norm(x, None, None, state[f'{k}.norm.weight'], state[f'{k}.norm.bias'], training=True))
    x = F.conv2d(x, state['stem.weight'], padding=1)
    for b in 1,2,3:
        for i in range(n): x = torch.cat([x, F.conv2d(read(f'block{b}.{i}', x), state[f'block{b}.{i}.conv.weight'], padding=1)], 1)
        if b<3: x = F.avg_pool2d(F.conv2d(read(f'trans{b}', x), state[f'trans{b}.conv.weight']), 2)
    return F.linear(read('head', x).mean((2,3)), state['head.fc.weight'], state['head.fc.bias'])

def losses(model, x, y, steps=8):
    opt, res = torch.optim.SGD(model.parameters(), lr=.01, momentum=.9), []
    for _ in range(steps): opt.zero_grad(); l = F.cross_entropy(model(x), y); l.backward(); opt.step(); res.append(l.item())
    return torch.tensor(res)

def test_channels_last_loss_curve():
    "In single precision the curves of both layouts follow the exact one."
    model, x, y = vgg19(cfg=[16,'M',64,64,'M',64,'M',64]), torch.randn(32, 3, 16, 16), torch.arange(32)%10
    exact, nchw, fast = losses(plain(model).double(), x.double(), y), losses(plain(model), x, y), losses(model, x, y)
    assert exact[-1]<exact[0]-.1 and max((o-exact).abs().max() for o in (nchw, fast)) < 1e-4*exact[0]

def test_densenet_is_plain():
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
