"Slim networks of full size against their masked twins, budgets by property, and files"
import json, numpy as np, onnxruntime, pytest, torch
from hypothesis import given, settings, assume, strategies as st
from torch import nn
from spectral_nb.models import vgg19, densenet40
from spectral_nb.importance import IMPORTANCES, NEED_GRADIENTS
from spectral_nb.prune import prune, save_slim, load_slim
from spectral_nb.ratios import ARRAY_RATIOS, channel_ratios, RATIOS

ARCHS = dict(vgg19=vgg19, densenet40=densenet40)
TOL = {torch.float32: 1e-5, torch.float64: 1e-10}

def randomized(arch, dtype=torch.float32, seed=0, **kwargs):
    "A network whose norms differ in every channel, on the scale that its data have, and a batch for it."
    torch.manual_seed(seed)
    model, x = arch(**kwargs).to(dtype), torch.randn(8, 3, 16, 16, dtype=dtype)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms: nn.init.uniform_(m.weight, -1.5, 1.5); nn.init.uniform_(m.bias, -1, 1); m.momentum = 1.
    with torch.no_grad():
        model.train()(x)
        for m in norms: m.running_mean += torch.randn_like(m.bias)/10; m.running_var *= torch.rand_like(m.bias)+.5
    return model.eval(), x[:4]

@pytest.fixture(scope='module')
def nets(): return {(a,d): randomized(f, d, **(dict(width=.25) if a=='vgg19' else {})) for a,f in ARCHS.items() for d in TOL}

def macs_by_hooks(model, x):
    "Multiply-adds of convolutions and linear layers for one item, from the shapes they see."
    total = 0
    def count(m, i, o):
        nonlocal total
        total += o[0].numel()*(m.weight[0].numel() if isinstance(m, nn.Conv2d) else m.in_features)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model(x).sum()                                                             # with gradients: the path on which all layers are called
    for h in hooks: h.remove()
    return total

@pytest.mark.parametrize('dtype', TOL, ids=str)
@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('target', [.2, .4, .6, .8, .95])
def test_slim_is_masked(nets, tmp_path, arch, dtype, target):
    model, x = nets[arch,dtype]
    for importance in IMPORTANCES:
        model.zero_grad()
        if importance in NEED_GRADIENTS: nn.functional.cross_entropy(model(x), torch.arange(len(x))).backward()
        r = prune(model, x[:1], target, ratios='uniform' if target==.8 else 'spectral', importance=importance)
        loaded = load_slim(save_slim(r.model, tmp_path/'slim.safetensors')).eval()
        with torch.no_grad(): full, slim, masked, again = model(x), r.model(x), r.masked(x), loaded(x)
        assert slim.dtype==again.dtype==dtype and (full-masked).abs().max()>1e-2
        assert (slim-masked).abs().max()<TOL[dtype] and (r.model(x)-masked).abs().max()<TOL[dtype]
        assert torch.equal(slim, again)
        assert r.table.channels_after.min()>=1 and all(m.out_channels for m in r.model.modules() if isinstance(m, nn.Conv2d))
        assert r.channels[0]-r.channels[1]==round(target*r.channels[0])
        assert r.params==(sum(p.numel() for p in model.parameters()), sum(p.numel() for p in r.model.parameters()))
        assert r.flops==(macs_by_hooks(model, x[:1]), macs_by_hooks(r.model, x[:1])) and r.flops[1]<r.flops[0]

@pytest.mark.parametrize('by', ['params', 'flops'])
@pytest.mark.parametrize('how', [*RATIOS, *ARRAY_RATIOS])
def test_budgets(how, by):
    "Parameters and multiply-adds are met within half a percent"
    for model in (vgg19(width=.25), densenet40(growth=4, depth=16)):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight, .1, 1, generator=torch.Generator().manual_seed(m.num_features))
        r = prune(model, torch.randn(1, 3, 16, 16), .5, by=by, ratios=how)
        before, after = getattr(r, by)
        assert abs(1-after/before-.5)<=.005 and r.channels[1]<r.channels[0]

@pytest.mark.parametrize('arch', ARCHS)
def test_contiguous_layout(arch):
    model, x = randomized(ARCHS[arch], channels_last=False)
    r = prune(model, x, .6)
    assert all(p.is_contiguous() for p in r.model.parameters())
    with torch.no_grad(): assert (r.model(x)-r.masked(x)).abs().max()<1e-5

@pytest.mark.parametrize('arch', ARCHS)
def test_trains_at_95(arch):
    model, x = randomized(ARCHS[arch])
    net, losses = prune(model, x, .95).model.train(), []
    opt = torch.optim.SGD(net.parameters(), .02, momentum=.9)
    for _ in range(25):
        loss = nn.functional.cross_entropy(net(x), torch.arange(len(x))); losses.append(loss.item())
        opt.zero_grad(); loss.backward(); opt.step()
    assert losses[-1]<.7*losses[0]

@pytest.fixture(params=ARCHS)
def small_slim(request):
    "A slim network and its input."
    model, x = randomized(ARCHS[request.param], **(dict(width=.125) if request.param=='vgg19' else dict(growth=4, depth=10)))
    return prune(model, x, .6, min_evals=8).model, x

def test_export(small_slim):
    "torch.export gives the same logits, for other batch sizes too."
    slim, x = small_slim
    program = torch.export.export(slim, (x,), dynamic_shapes=({0: torch.export.Dim('n')},)).module()
    for n in (2, 4):
        with torch.no_grad(): torch.testing.assert_close(program(x[:n]), slim(x[:n]), rtol=1e-4, atol=1e-5)

def test_onnx(small_slim, tmp_path):
    "onnxruntime gives the same logits, for other batch sizes too."
    slim, x = small_slim
    torch.onnx.export(slim.eval(), (x,), tmp_path/'slim.onnx', dynamic_shapes=({0: torch.export.Dim('n')},), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path/'slim.onnx')
    for n in (2, 4):
        logits, = session.run(None, {session.get_inputs()[0].name: x[:n].numpy()})
        with torch.no_grad(): torch.testing.assert_close(torch.from_numpy(logits), slim(x[:n]), rtol=1e-4, atol=1e-5)

def test_skip(nets):
    model, x = nets['vgg19',torch.float32]
    r = prune(model, x, .5, skip=['features.0', 'features.4?'])
    assert r.model.config['cfg'][0]==model.config['cfg'][0] and r.channels[0]<sum(u!='M' and u for u in model.config['cfg'])
    assert (r.table.set_index('layer').loc[['features.0', 'features.40'], 'warning']=='skipped').all()

def test_checkpoints_of_others(nets, tmp_path):
    "Weights of one architecture under the config of another."
    a, b = (prune(nets[k,torch.float32][0], nets[k,torch.float32][1], .5).model for k in ARCHS)
    a.config, path = b.config, tmp_path/'mixed.safetensors'
    save_slim(a, path)
    with pytest.raises(ValueError, match='do not belong together'): load_slim(path)

@pytest.mark.parametrize('arch', ARCHS)
def test_slim_with_any_statistics(arch):
    "Statistics that have nothing to do with the data make large logits: compare relative to them."
    model, x = randomized(ARCHS[arch], torch.float64)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.normal_(m.running_mean); nn.init.uniform_(m.running_var, .1, 3)
    r = prune(model, x, .6)
    with torch.no_grad(): torch.testing.assert_close(r.model(x), r.masked(x), rtol=1e-10, atol=1e-10)

@pytest.mark.parametrize('arch', ARCHS)
def test_slim_keeps_training_like_masked(nets, arch):
    "All parameters get gradients, and those of the last layer are the masked network's."
    model, x = nets[arch,torch.float64]
    r = prune(model, x, .6)
    for m in (r.model, r.masked): m.train().zero_grad(); nn.functional.cross_entropy(m(x), torch.arange(len(x))).backward()
    assert all(p.grad is not None for p in r.model.parameters())
    unit, keep = list(r.keep.items())[-1]
    last = 'classifier' if arch=='vgg19' else 'head.fc'
    torch.testing.assert_close(r.model.get_submodule(last).weight.grad, r.masked.get_submodule(last).weight.grad[:,keep], rtol=1e-8, atol=1e-10)
    before, opt = r.model(x).detach(), torch.optim.SGD(r.model.parameters(), 1e-2)
    opt.step()
    assert not torch.allclose(r.model(x), before)

@pytest.mark.parametrize('arch', ARCHS)
def test_model_stays_untouched(nets, arch):
    model, x = nets[arch,torch.float32]
    before, rng = {k: v.clone() for k,v in model.state_dict().items()}, torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    r = prune(model, x, .5)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and modes==[m.training for m in model.modules()]
    assert not ({p.data_ptr() for p in model.parameters()} & {p.data_ptr() for m in (r.model, r.masked) for p in m.parameters()})
    assert json.loads(json.dumps(r.model.config))==r.model.config

def test_dense_reads_only_what_it_kept(nets):
    "Every trunk channel of the slim network has a reader, but for layers kept alive by their last one."
    model, x = nets['densenet40',torch.float32]
    slim = prune(model, x, .8).model
    outs, reads, n = slim.config['outs'], slim.config['reads'], 13
    for b in range(3):
        widths, rs = outs[b*n:(b+1)*n], reads[b*n:(b+1)*n]
        used = set().union(*[range(sum(widths[:i+1])) if r is None else r for i,r in enumerate(rs)])
        ends = np.cumsum(widths)
        assert all(w==1 or set(range(e-w, e))<=used for w,e in zip(widths, ends))
    assert sum(outs)<24+2*12*39

def test_gradual_is_possible(nets):
    "A slim network can be pruned again, and its own masked twin agrees."
    model, x = nets['densenet40',torch.float32]
    r = prune(prune(model, x, .4).model, x, .4)
    assert r.channels==(5616, 5616-2246)
    with torch.no_grad(): assert (r.model(x)-r.masked(x)).abs().max()<1e-5

def test_score_protects(nets):
    "The layer with the lowest alpha loses the smallest share, the one with the highest the largest."
    model, x = nets['densenet40',torch.float32]
    t = prune(model, x, .4).table.dropna(subset='score')
    t = t[t.channels_before>100].sort_values('score')
    assert (t.ratio.diff().dropna()>-1/100).all() and t.ratio.iloc[-1]-t.ratio.iloc[0]>.1

def test_weights_that_are_not_numbers():
    "A layer with NaN weights has no score and stays neutral; a norm with NaN has no importance, which is an error."
    model, x = randomized(densenet40, growth=4, depth=10)
    model.block2[0].conv.weight.data[0] = float('nan')
    t = prune(model, x, .3, min_evals=8).table.set_index('layer')
    assert 'NaN' in t.warning['block2.0.conv'] and t.score['block2.0.conv']!=t.score['block2.0.conv']
    with pytest.raises(ValueError, match='block2.0.conv: importance .l1. is NaN'): prune(model, x, .3, importance='l1', min_evals=8)

layers = st.integers(1, 12).flatmap(lambda n: st.tuples(st.lists(st.integers(1, 600), min_size=n, max_size=n),
                                                         st.lists(st.floats(-50, 50), min_size=n, max_size=n)))
@settings(max_examples=300, deadline=None)
@given(layers, st.floats(.01, .99), st.sampled_from(list(RATIOS)), st.floats(0, .99), st.integers(1, 4))
def test_budget_is_met(layers, target, how, eps, min_channels):
    "Exactly the budget, caps kept, the order of the scores kept; or an error when and only when the caps forbid it."
    sizes, scores = [dict(enumerate(l)) for l in layers]
    n, cap = sum(sizes.values()), {k: max(0, min(int((1+target)/2*s+1e-9), s-min_channels)) for k,s in sizes.items()}
    go = lambda: channel_ratios(scores, sizes, target, how=how, eps=eps, min_channels=min_channels)
    if not 0<round(target*n)<=sum(cap.values()):
        with pytest.raises(ValueError): go()
        return
    removed = {k: r*sizes[k] for k,r in go().items()}
    assert all(abs(v-round(v))<1e-6 and -1e-9<=v<=cap[k]+1e-6 for k,v in removed.items())
    assert round(sum(removed.values()))==round(target*n)
    for i in sizes:
        for j in sizes:
            if eps>.01 and how=='spectral' and sizes[i]==sizes[j] and scores[i]<scores[j]-.01: assert removed[i]<=removed[j]+1e-6
