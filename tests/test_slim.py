"Slim files that are hostile, shared or wrapped, silent channels, every optimizer of fastai across a cut"
import json, os, random, stat, struct, pytest, torch
from copy import deepcopy
from functools import partial
from torch import nn
from safetensors.torch import save_file
from spectral_nb.models import vgg19, densenet40
from spectral_nb.importance import IMPORTANCES, NEED_GRADIENTS
from spectral_nb.prune import prune, save_slim, load_slim, _off
from spectral_nb.ratios import ARRAY_RATIOS, RATIOS
from test_prune import randomized

ARCHS = dict(vgg19=partial(vgg19, width=.125), densenet40=partial(densenet40, growth=4, depth=10))
LONG = bool(os.environ.get('SPECTRAL_LONG'))

@pytest.mark.parametrize('how', [*RATIOS, *ARRAY_RATIOS])
@pytest.mark.parametrize('arch', ARCHS)
def test_silent_channels_go_first(arch, how):
    "Whatever the cap and the importance, a cut of as many channels as are silent changes nothing."
    for seed in range(3):
        model, x = randomized(ARCHS[arch], torch.float64, seed)
        norms, n, dead = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)], 0, 0
        for i,m in enumerate(norms):
            k = max(1, m.num_features//8) if i%3==seed else m.num_features
            off = torch.randperm(m.num_features)[k:]
            with torch.no_grad(): m.weight[off] = 0; m.bias[off] = 0
            n, dead = n+m.num_features, dead+len(off)
        for importance in [k for k in IMPORTANCES if k not in NEED_GRADIENTS]:
            r = prune(model, x[:1], dead/n, ratios=how, importance=importance, min_evals=1)
            assert r.channels[0]-r.channels[1]==dead
            with torch.no_grad(): torch.testing.assert_close(r.model(x), model(x), rtol=1e-9, atol=1e-9)

def test_a_kept_silent_channel_is_named():
    model, x = randomized(ARCHS['vgg19'])
    with torch.no_grad(): model.features[1].weight[1:] = 0; model.features[1].bias[1:] = 0
    with pytest.warns(UserWarning, match='stay .features.0: '): r = prune(model, x[:1], .005, min_evals=1)
    assert 'silent' in r.table.warning[0]

def test_agreement_is_relative():
    b = torch.randn(4, 5)
    for scale in (1e-12, 1., 1e9): assert _off(scale*(b*1.4), scale*b)>.1 and _off(scale*b, scale*b)==0

def mutated(data, rnd):
    "A slim file with some bytes changed, or its config."
    n, = struct.unpack('<Q', data[:8])
    if rnd.random()<.5:
        data = bytearray(data)
        for _ in range(rnd.randint(1, 4)): data[rnd.randrange(min(len(data), n+8))] = rnd.randrange(256)
        return bytes(data)
    head = json.loads(data[8:8+n]); c = json.loads(head['__metadata__']['config'])
    if c.get('arch')=='graph': holder = rnd.choice(list(c['widths'].values()))
    else: holder = rnd.choice([c]+[v for v in c.values() if isinstance(v, list)])
    key = rnd.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key] = rnd.choice([None, -1, 0, 1, 3, 10**9, 1e300, 'M', [], {}, [[0]], True, 'x'*300, [8000]*1000])
    head['__metadata__']['config'] = json.dumps(c)
    head = json.dumps(head).encode(); head += b' '*(-len(head)%8)
    return struct.pack('<Q', len(head))+head+data[8+n:]

class Plain(nn.Sequential):
    def __init__(self): super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(576, 2))

@pytest.mark.parametrize('kind', [*ARCHS, 'graph'])
def test_mutated_files(kind, tmp_path):
    "One line, or a network that runs."
    full, x = (Plain().eval(), torch.randn(2, 3, 16, 16)) if kind=='graph' else randomized(ARCHS[kind])
    slim, rnd, bad = prune(full, x, .5, min_evals=1).model, random.Random(0), tmp_path/'bad.safetensors'
    data = save_slim(slim, tmp_path/'a.safetensors').read_bytes()
    for _ in range(3000 if LONG else 150):
        bad.write_bytes(mutated(data, rnd))
        try: net = load_slim(bad, full)
        except ValueError as e: assert '\n' not in str(e) and str(bad) in str(e)
        else:
            with torch.no_grad(): net.eval()(x)

@pytest.mark.parametrize('config', [
    dict(arch='vgg19', n_out=10, c_in=3, cfg=[8000,8000]), dict(arch='vgg19', n_out=10, c_in=3, cfg=[4]*100_000),
    dict(arch='densenet40', n_out=10, c_in=3, growth=12, depth=3*10**9+4, outs=None, reads=None)])
def test_nothing_is_built_for_a_config_without_tensors(config, tmp_path, monkeypatch):
    path = tmp_path/'huge.safetensors'
    save_file({'w': torch.ones(2)}, path, metadata=dict(format='spectral_nb.slim', version='1', config=json.dumps(config)))
    monkeypatch.setattr('spectral_nb.slim._build_like', lambda *a: pytest.fail('built'))
    with pytest.raises(ValueError, match='do not belong together'): load_slim(path)

def test_rights_follow_the_umask(tmp_path):
    was = os.umask(0o027)
    try: path = save_slim(ARCHS['vgg19'](), tmp_path/'a.safetensors')
    finally: os.umask(was)
    assert stat.S_IMODE(path.stat().st_mode)==0o640 and [p.name for p in tmp_path.iterdir()]==['a.safetensors']
