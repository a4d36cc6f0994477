"Networks of all kinds through their dependency graph: slim equals masked, counts agree with other counts, and what cannot be done is refused"
import ast, re, sys, pytest, torch, torchvision
from unittest.mock import patch as mock
from hypothesis import given, settings, HealthCheck, Phase, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from spectral_nb.models import n_params
from spectral_nb.importance import IMPORTANCES, NEED_GRADIENTS
from spectral_nb.prune import load_slim, prune, save_slim
from spectral_nb.surgery import coupled_channels
from test_prune import macs_by_hooks

def resnet(): return ResNet(BasicBlock, [2,1,1,1], num_classes=10)
def wide_resnet(): return ResNet(Bottleneck, [1,1,1,1], num_classes=10, width_per_group=32)
def mobilenet(): return torchvision.models.mobilenet_v2(num_classes=10, width_mult=.25)
def densenet(): return torchvision.models.DenseNet(24, (2,2), 24, bn_size=2, num_classes=10)
def vit(): return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
def vgg(): return torchvision.models.VGG(torchvision.models.vgg.make_layers([8,'M',16,'M',16], batch_norm=True), num_classes=10)
def small_vgg():
    m = vgg(); m.avgpool, m.classifier = nn.AdaptiveAvgPool2d(2), nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return m
NETS = {f.__name__: f for f in (resnet, wide_resnet, mobilenet, densenet, vit, small_vgg)}
TOL = {torch.float32: 1e-5, torch.float64: 1e-10}

def disturbed(model, seed=0):
    "Norms and biases that differ in every channel, and no parameter that is zero everywhere."
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight, .5, 1.5); nn.init.normal_(m.bias, std=.3); nn.init.normal_(m.running_mean, std=.1); nn.init.uniform_(m.running_var, .5, 1.5)
    for p in model.parameters():
        if p.std()==0 or not p.any(): nn.init.normal_(p, std=.1)
    return model.eval()

def difference(a, b, x):
    with torch.no_grad(): a, b = a(x), b(x)
    return ((a-b).abs().max()/b.abs().max().clamp_min(1)).item()

def some(name, how): return 'l1' if name=='vit' and how=='gamma' else how

@pytest.mark.parametrize('target', [.2, .4, .6, .8, .95])
@pytest.mark.parametrize('name', NETS)
def test_slim_is_masked(name, target, tmp_path):
    "For every importance and both precisions, also after save and load."
    for dtype,how in [(torch.float32, h) for h in IMPORTANCES if target==.4] + [(torch.float64, 'gamma')]:
        how = some(name, how)
        model, x = disturbed(NETS[name]()).to(dtype), torch.randn(2, 3, 32, 32, dtype=dtype)
        if how in NEED_GRADIENTS:
            with torch.enable_grad(): F.cross_entropy(model(x), torch.tensor([0,1])).backward()
        if name in ('small_vgg', 'vit') and how in ('gamma', 'taylor'): how = 'l1'
        r = prune(model, x[:1], target, importance=how)
        y = torch.randn(3, 3, 32, 32, dtype=dtype)
        assert difference(r.model, r.masked, y)<TOL[dtype] and difference(r.masked, model, y)>1e-4
        assert r.channels[0]-r.channels[1]==round(target*r.channels[0]) and r.table.channels_after.min()>=1
        assert r.params==(n_params(model), n_params(r.model)) and r.params[1]<r.params[0] and r.flops[1]<r.flops[0]
        again = load_slim(save_slim(r.model, tmp_path/'slim.safetensors'), model).eval()
        assert difference(again, r.model, y)==0
        if name!='vit': assert r.flops==(macs_by_hooks(model, x[:1]), macs_by_hooks(r.model, x[:1]))

def test_attention_is_counted():
    "Products of queries and keys are in the count, as in the single steps of the counter."
    model, x = disturbed(vit()), torch.randn(1, 3, 32, 32)
    r = prune(model, x, .5, importance='l1')
    with FlopCounterMode(display=False) as c: model(x)
    assert r.flops[0]==c.get_total_flops()//2>macs_by_hooks(model, x)
    assert torch.backends.mha.get_fastpath_enabled()

def test_channels_last():
    model = disturbed(resnet()).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    r = prune(model, x, .5)
    assert difference(r.model, r.masked, x)<1e-5
    assert r.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)

def test_trains_at_95():
    "The slim network has gradients everywhere and its loss falls."
    model, x, y = disturbed(resnet()), torch.randn(8, 3, 32, 32), torch.arange(8)
    net = prune(model, x, .95).model.train()
    opt, losses = torch.optim.SGD(net.parameters(), .05, momentum=.9), []
    for _ in range(15):
        loss = F.cross_entropy(net(x), y); losses.append(loss.item())
        opt.zero_grad(); loss.backward(); assert all(p.grad is not None for p in net.parameters()); opt.step()
    assert losses[-1]<.7*losses[0]

def test_importance_is_the_mean_of_the_writers():
    "Of two layers on one shortcut, by hand."
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 2, 1)
        def forward(self, x): x = self.a(x); return self.c((x+self.b(x)).relu())
    net = Two(); w = lambda m: m.weight.detach().abs().flatten(1).sum(1)
    best = ((w(net.a)+w(net.b))/2).argsort(descending=True)[:2].sort().values
    r = prune(net, torch.randn(1, 3, 4, 4), .5, importance='l1', min_evals=1)
    assert torch.equal(next(i for u,i in r.keep.items() if u.layer=='a'), best)

def test_gamma_follows_channels_through_a_concatenation():
    "In DenseNet121's pattern a layer's channels pass a norm that is wider than the layer."
    class Cat(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.n, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.BatchNorm2d(10), nn.Conv2d(10, 2, 1)
        def forward(self, x): return self.c(self.n(torch.cat([self.a(x), self.b(x)], 1)))
    net = Cat().eval(); net.n.weight.data = torch.tensor([1.,4,2,3, 9,1,8,2,7,3])
    r = prune(net, torch.randn(1, 3, 4, 4), ratios=dict(a=.5, b=.5), min_evals=1)
    assert {u.layer: i.tolist() for u,i in r.keep.items() if u.layer!='c'}==dict(a=[1,3], b=[0,2,4])

# Random networks

ACTS = F.relu, F.gelu, torch.sigmoid, lambda x: F.softmax(x, 1)

class Random(nn.Module):
    "Builds itself from a list of choices: convolutions, shortcuts, concatenations, groups, splits."
    def __init__(self, steps, end):
        super().__init__()
        self.steps, self.end, self.mods, widths = [], end, nn.ModuleList(), [3]
        def add(*ms): self.mods.append(nn.Sequential(*ms)); return len(self.mods)-1
        for kind,i,j,w,act in steps:
            i, j = (len(widths)-1-i%min(3, len(widths)-1), 1+j%(len(widths)-1)) if len(widths)>1 else (0, 0) # not the image, whose channels are no choice
            c, norm = widths[i], lambda n: nn.BatchNorm2d(n) if w%2 else nn.Identity()
            if kind=='conv': self.steps.append((kind, i, j, act, add(nn.Conv2d(c, w, 1+2*(w%3==0), padding=int(w%3==0), bias=w%5>0), norm(w)))); n = w
            if kind=='depthwise': self.steps.append((kind, i, j, act, add(nn.Conv2d(c, c, 3, padding=1, groups=c), norm(c)))); n = c
            if kind=='grouped': self.steps.append((kind, i, j, act, add(nn.Conv2d(c, 4*w, 1, groups=2 if c%2==0 else 1)))); n = 4*w
            if kind=='add': self.steps.append((kind, i, j, act, add(nn.Conv2d(c, widths[j], 1), norm(widths[j])))); n = widths[j]
            if kind=='cat': self.steps.append((kind, i, j, act, None)); n = c+widths[j]
            if kind=='half': self.steps.append((kind, i, j, act, None)); n = max(1, c//2)
            widths.append(n)
        self.head = nn.Linear(widths[-1]*(16 if end=='flat' else 1), 5)
    def forward(self, x):
        xs = [x]
        for kind,i,j,act,m in self.steps:
            if kind=='cat': o = torch.cat([xs[i], xs[j]], 1)
            elif kind=='half': o = xs[i].split([max(1, xs[i].shape[1]//2), xs[i].shape[1]-max(1, xs[i].shape[1]//2)], 1)[0] if xs[i].shape[1]>1 else xs[i]
            elif kind=='add': o = xs[j]+self.mods[m](xs[i])
            else: o = self.mods[m](xs[i])
            xs.append(ACTS[act](o))
        return self.head(xs[-1].flatten(1) if self.end=='flat' else xs[-1].mean((2,3)))

steps = st.lists(st.tuples(st.sampled_from(['conv']*3 + ['depthwise','grouped'] + ['add','cat']*2 + ['half']), st.integers(0, 9), st.integers(0, 9), st.integers(2, 9), st.sampled_from([0,0,0,1,2,3])), min_size=1, max_size=6)
REFUSALS = 'no channels can go|mixes channels|cannot be met|rounds to none'
seen = dict(slim=0, refused=0)

@settings(max_examples=300, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.integers(2, 9), steps, st.sampled_from(['flat','mean']), st.sampled_from([.2,.5,.8]))
def check_random(first, steps, end, target):
    torch.manual_seed(0)
    model = disturbed(Random([('conv', 0, 0, first, 0), *steps], end)).double()
    state, x = {k: v.clone() for k,v in model.state_dict().items()}, torch.randn(2, 3, 4, 4, dtype=torch.float64)
    go = lambda skip=None: prune(model, x, target, ratios='uniform', importance='l1', min_evals=10**9, skip=skip)
    def heeding():
        "With the layers left whole that a first refusal names."
        try: return go()
        except ValueError as e:
            if not (hint := re.search(r'skip=(\[.*\])', str(e))): raise
            return go(ast.literal_eval(hint[1]))
    try: r = heeding()
    except ValueError as e:
        assert re.search(REFUSALS, str(e)), e
        seen['refused'] += 1
    else:
        y = torch.randn(3, 3, 4, 4, dtype=torch.float64)
        assert difference(r.model, r.masked, y)<1e-10
        assert n_params(r.model)<n_params(model) and r.table.channels_after.min()>=1
        seen['slim'] += 1
    assert all(torch.equal(v, state[k]) for k,v in model.state_dict().items())

@pytest.mark.filterwarnings('ignore')
def test_random_networks():
    check_random()
    assert sum(seen.values())==300 and seen["slim"]>=150, seen

# What is refused

class Dynamic(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)
    def forward(self, x): x = self.a(x); return self.b(x) if x.mean()>0 else self.b(-x)
class Shared(Dynamic):
    def __init__(self): super().__init__(); self.m = nn.Conv2d(8, 8, 1)
    def forward(self, x): return self.b(self.m(self.m(self.a(x))))
class Heads(nn.Module):
    "Attention whose heads are cut by hand, so that the graph cannot know them."
    def __init__(self): super().__init__(); self.qkv, self.out, self.mlp, self.back, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 3)
    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        a = (q@k.mT).softmax(-1)@v
        x = x+self.out(a.transpose(1, 2).flatten(2))
        return self.head((x+self.back(self.mlp(x).relu())).mean(1))

@pytest.mark.parametrize('make,shape,kwargs,text', [
    (Dynamic, (1,3,8,8), {}, 'control flow depends on the data'),
    (Shared, (1,3,8,8), {}, 'm: called 2 times'),
    (resnet, (1,1,32,32), {}, 'does not run'),
    (resnet, (3,32,32), {}, 'does not run'),
    (resnet, (0,3,32,32), {}, 'shape .0, 3, 32, 32.'),
    (vit, (1,3,16,16), {}, 'does not run'),
    (resnet, (1,3,32,32), dict(target=.9999), 'cannot be met'),
    (vit, (1,3,32,32), dict(importance='gamma'), "importance 'gamma' reads a batch norm"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (1,3,2,2), {}, 'no channels can go: 1: they are the output'),
])
def test_refused(make, shape, kwargs, text):
    model = disturbed(make()).train()
    state, modes = {k: v.clone() for k,v in model.state_dict().items()}, [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=text): prune(model, torch.randn(shape), **(dict(target=.5, importance='l1') | kwargs))
    assert all(torch.equal(v, state[k]) for k,v in model.state_dict().items())
    assert modes==[m.training for m in model.modules()] and all(p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())

def test_heads_cut_by_hand():
    "What the graph gets wrong is found out, and the rest can be pruned."
    model, x = Heads().eval(), torch.randn(2, 5, 8)
    kwargs = dict(importance='l1', min_evals=10**9, ratios='uniform')
    with pytest.raises(ValueError, match='qkv') as e: prune(model, x, .5, **kwargs)
    skip = ast.literal_eval(re.search(r'skip=(\[.*\])', str(e.value))[1])
    r = prune(model, x, .5, skip=skip, **kwargs)
    assert r.model.mlp.out_features==16 and difference(r.model, r.masked, torch.randn(2, 5, 8))<1e-5

def test_needs_torch_pruning():
    with mock.dict(sys.modules, torch_pruning=None), pytest.raises(ImportError, match='pip install torch-pruning'): prune(resnet(), torch.randn(1, 3, 32, 32), .5)

def test_checkpoints_of_others(tmp_path):
    model, x = disturbed(resnet()), torch.randn(1, 3, 32, 32)
    path = save_slim(prune(model, x, .5).model, tmp_path/'a.safetensors')
    for other,text in ((None, 'give the full network too'), (mobilenet(), 'holds a ResNet with other layers'), (ResNet(BasicBlock, [2,2,1,1]), 'do not belong together')):
        with pytest.raises(ValueError, match=text): load_slim(path, other)
    assert path.read_bytes()[8:9]==b'{' and b'pickle' not in path.read_bytes()[:200]

def test_frozen_and_half_stay():
    model = disturbed(resnet()).bfloat16()
    model.conv1.weight.requires_grad_(False); model.layer1.train()
    r = prune(model, torch.randn(1, 3, 32, 32, dtype=torch.bfloat16), .5)
    assert {p.dtype for p in r.model.parameters()}=={torch.bfloat16}
    assert [k for k,p in r.model.named_parameters() if not p.requires_grad]==['conv1.weight'] and r.model.layer1.training and not r.model.training
    for k,p in r.model.named_parameters():
        full = model.get_parameter(k).detach()
        for d,i in enumerate(r.axes[k]): full = full if i is None else full.index_select(d, i)
        assert torch.equal(p, full)

def test_gradual_in_a_learner(tmp_path):
    "A network with shortcuts is cut in two steps, keeps its optimizer, and a stopped run goes on."
    from fastai.basics import Adam, Learner
    from spectral_nb.data import digits, tensor_dls
    from spectral_nb.prune_callback import SpectralPrune
    d = digits()
    def learner():
        dls = tensor_dls(d.subset(slice(0, 64)), d.subset(slice(64, 96)), bs=32, device='cpu')
        return Learner(dls, disturbed(ResNet(BasicBlock, [1,1,1,1], num_classes=10)), opt_func=Adam, cbs=SpectralPrune(.6, steps=2))
    def fit(learn, n, **kwargs):
        with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3, **kwargs)
        return learn
    whole = fit(learner(), 2)
    n = whole.spectral_prune.counts
    assert n[1]==n[0]-round(.6*n[0]) and whole.spectral_prune.history.step.tolist()==[1,2]
    assert all(s['sqr_avg'].shape==p.shape for p,_,s,_ in whole.opt.all_params() if 'sqr_avg' in s)
    with pytest.warns(UserWarning, match='before epoch 1'): path = fit(learner(), 1).save_pruned(tmp_path/'half.safetensors')
    rest = fit(learner().load_pruned(path), 2, start_epoch=1)
    assert rest.spectral_prune.counts==n and rest.spectral_prune.done==2
