"Nothing vanishes: every tensor of two or more dimensions has a row or a reason, and a network and its file agree; real formats, changing files, threads"
import argparse, collections, json, os, pathlib, pickle, subprocess, sys, tarfile, types, warnings, zipfile
import numpy as np, pytest, torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from spectral_nb.checkpoints import delta, load_weights
from spectral_nb.matrices import esd, layer_matrices, named_tensors, plain_names, skipped_layers, weight_layers
from spectral_nb.metrics import analyze
from spectral_nb.models import densenet40, vgg19

class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos, self.cls = nn.Parameter(torch.randn(1, 9, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.gate_up_proj, self.gate_up_proj_bias = nn.Parameter(torch.randn(4, 8, 40)), nn.Parameter(torch.randn(4, 40))
        self.deep = nn.Parameter(torch.randn(2, 3, 8, 40))
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.register_buffer('index', torch.arange(16).view(4, 4)); self.register_buffer('hidden', torch.randn(3, 3), persistent=False)

class Lora(nn.Linear):
    def __init__(self): super().__init__(8, 6); self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))

class Gptq(nn.Module):
    def __init__(self):
        super().__init__()
        for k,v in dict(qweight=torch.ones(4, 8, dtype=torch.int32), qzeros=torch.ones(2, 1, dtype=torch.int32), scales=torch.rand(2, 8).half()).items(): self.register_buffer(k, v)

def tied():
    net = nn.Sequential(nn.Embedding(12, 6), nn.LSTM(6, 5), nn.Linear(6, 12))
    net[2].weight = net[0].weight
    return net

MAKERS = dict(
    lstm=lambda: nn.LSTM(7, 5, 2, bidirectional=True), projected=lambda: nn.LSTM(7, 6, proj_size=3), gru=lambda: nn.GRU(7, 5), rnn=lambda: nn.RNN(7, 5),
    lstm_cell=lambda: nn.LSTMCell(7, 5), gru_cell=lambda: nn.GRUCell(7, 5), square=lambda: nn.GRU(5, 5), bilinear=lambda: nn.Bilinear(5, 6, 4),
    transformer=lambda: nn.Transformer(8, 2, 1, 1, 16), attention=lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), widths=lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5),
    embeddings=lambda: nn.ModuleList([nn.Embedding(9, 4), nn.EmbeddingBag(9, 4)]), norms=lambda: nn.Sequential(nn.LayerNorm((4, 5)), nn.GroupNorm(2, 4), nn.PReLU(4), nn.Linear(5, 5)),
    convs=lambda: nn.ModuleList([nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (2, 3), groups=2), nn.Conv3d(2, 3, 2), nn.ConvTranspose2d(4, 6, 3), nn.Conv1d(1, 8, 200), nn.Conv1d(6, 6, 3, groups=6)]),
    dicts=lambda: nn.ModuleDict(dict(e=nn.ParameterDict(dict(a=torch.randn(5, 6), s=torch.randn(3, 8, 9), v=torch.randn(4))), l=nn.ParameterList([torch.randn(3, 4), torch.randn(2, 5, 6)]))),
    bare=Bare, lora=Lora, tied=tied, gptq=lambda: nn.Sequential(Gptq(), nn.Linear(3, 3)), vgg=lambda: vgg19(width=.125), densenet=lambda: densenet40(growth=2), lazy=lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)),
    wrapped=lambda: nn.DataParallel(nn.Sequential(nn.Linear(3, 4))), scripted=lambda: torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)), torch.randn(1, 3, 4, 4)))

def names_of(net): return [k for k,_,_ in layer_matrices(net)]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', MAKERS)
def test_network_and_file_agree(name, tmp_path):
    net = MAKERS[name]()
    sd = net.state_dict()
    assert names_of(net)==names_of(sd) and skipped_layers(net)==skipped_layers(sd)
    if name=='lazy': return
    torch.save(sd, tmp_path/'m.pt')
    w = load_weights(tmp_path/'m.pt')
    assert names_of(w)==names_of(plain_names(sd)) and skipped_layers(w)==skipped_layers(plain_names(sd))
    for (_,_,a),(_,_,b) in zip(layer_matrices(sd), layer_matrices(w)): assert torch.equal(a, b)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', [k for k in MAKERS if k not in ('lazy', 'tied')])
def test_nothing_vanishes(name):
    "The entries of the rows and of the skipped tensors together are all entries of tensors with two or more dimensions"
    sd = MAKERS[name]().state_dict()
    skipped = skipped_layers(sd)
    left = {k for k in sd if k in skipped or k.removesuffix('.qweight') in skipped}
    want = sum(w.numel() for k,w in sd.items() if w.ndim>1 and k not in left)
    assert sum(w.numel() for _,_,w in layer_matrices(sd))==want

def test_gates_against_slices():
    net = nn.ModuleDict(dict(lstm=nn.LSTM(7, 5), gru=nn.GRU(7, 5)))
    rows = {k: (m, w) for k,m,w in layer_matrices(net)}
    for kind,gates in (('lstm', 'ifgo'), ('gru', 'rzn')):
        for part in ('weight_ih_l0', 'weight_hh_l0'):
            whole = getattr(net[kind], part).detach()
            for i,g in enumerate(gates):
                m, w = rows.pop(f'{kind}.{part}[{g}]')
                assert m is net[kind] and torch.equal(w[0], whole[5*i:5*i+5])
                assert f'{kind}.{part}[{g}]'.rpartition('.')[0] in weight_layers(net)
    assert not rows

def test_experts_against_slices():
    net = Bare()
    rows = {k: w for k,_,w in layer_matrices(net)}
    assert list(rows)==['pos', *(f'gate_up_proj[{i}]' for i in range(4)), *(f'deep[{i},{j}]' for i in range(2) for j in range(3)), '(model)']
    assert torch.equal(rows['gate_up_proj[2]'][0], net.gate_up_proj[2]) and torch.equal(rows['deep[1,2]'][0], net.deep[1, 2])
    assert list(skipped_layers(net))==['cls', 'gate_up_proj_bias', 'index'] and not weight_layers(net)

@pytest.mark.filterwarnings('ignore')
def test_pieces():
    net = nn.Sequential(weight_norm(nn.Linear(4, 5)), parametrizations.weight_norm(nn.Linear(5, 4)), prune.l1_unstructured(nn.Linear(4, 4), 'weight', .5), parametrizations.spectral_norm(nn.Linear(4, 4)))
    assert names_of(net)==list('0123')
    assert set(skipped_layers(net.state_dict()))==set('0123')

def test_torchvision_on_the_meta_device():
    from torchvision.models import get_model
    for name in ('vit_b_16', 'swin_v2_t', 'convnext_tiny', 'maxvit_t', 'resnet18', 'efficientnet_b0', 'raft_small', 'r3d_18'):
        with torch.device('meta'): net = get_model(name, weights=None)
        assert skipped_layers(net)==skipped_layers(net.state_dict()) and skipped_layers(net), name

def test_grad_and_nesting():
    net = nn.Sequential(nn.Linear(9, 8), nn.LSTM(8, 5))
    for sd in (dict(net.named_parameters()), net.state_dict(keep_vars=True), dict(net=net.state_dict(), acc=93., loss=torch.tensor(.3)), {'model': {'state_dict': net.state_dict()}}):
        assert analyze(sd, progress=False).name.tolist()==analyze(net, progress=False).name.tolist()
    assert list(delta(net, dict(net.named_parameters())))==list(net.state_dict())
    assert 'NumPy' in skipped_layers({'a.weight': np.ones((3, 3))})['a']
    with pytest.raises(ValueError, match="'generator' .*'student'"): analyze(dict(generator=net.state_dict(), student=net.state_dict()), progress=False)

# Files as they are really written --------------------------------------------------------------------------------------

def adam(net):
    opt = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 8)).sum().backward(); opt.step()
    return opt.state_dict()

class AttributeDict(dict): __module__ = 'lightning_fabric.utilities.data'

def written(kind, net):
    sd, opt = net.state_dict(), adam(net)
    return {
        'timm.pth.tar': dict(epoch=3, arch='resnet50', state_dict=sd, optimizer=opt, version=2, args=argparse.Namespace(lr=.1, out=pathlib.Path('x')), amp_scaler={}, state_dict_ema=sd, metric=np.float64(93.)),
        'torchvision.pth': dict(model=sd, optimizer=opt, lr_scheduler=dict(_last_lr=[.1]), epoch=3, args=argparse.Namespace(lr=.1), model_ema={'n_averaged': torch.tensor(1)} | {f'module.{k}': v for k,v in sd.items()}, scaler={}),
        'lightning.ckpt': {'epoch': 1, 'global_step': 10, 'pytorch-lightning_version': '2.4', 'state_dict': sd, 'loops': {'fit_loop': {'state_dict': {}}}, 'callbacks': {"ModelCheckpoint{'mode': 'min'}": {'best_model_score': torch.tensor(.3)}},
                           'optimizer_states': [opt], 'lr_schedulers': [], 'hparams_name': 'kwargs', 'hyper_parameters': AttributeDict(lr=.1)},
        'basicsr.pth': dict(params_ema=sd), 'nested.pt': dict(model=dict(state_dict=sd), ema=sd), 'defaultdict.pt': collections.defaultdict(list, sd), 'noending': sd}[kind]

@pytest.mark.parametrize('kind', ['timm.pth.tar', 'torchvision.pth', 'lightning.ckpt', 'basicsr.pth', 'nested.pt', 'defaultdict.pt', 'noending'])
def test_training_checkpoints(kind, tmp_path, monkeypatch):
    parts = 'lightning_fabric', 'lightning_fabric.utilities', AttributeDict.__module__
    for m in parts: monkeypatch.setitem(sys.modules, m, types.ModuleType(m))
    sys.modules[AttributeDict.__module__].AttributeDict = AttributeDict
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    torch.save(written(kind, net), tmp_path/kind)
    monkeypatch.undo()
    before = torch.serialization.get_safe_globals()
    w = load_weights(tmp_path/kind)
    assert torch.serialization.get_safe_globals()==before
    assert list(w)==list(net.state_dict()) and all(torch.equal(w[k], v) for k,v in net.state_dict().items())

@pytest.mark.filterwarnings('ignore')
def test_learn_save(tmp_path):
    "What fastai writes, with the optimizer's state"
    from fastai.basics import DataLoader, DataLoaders, Learner
    import fastai.callback.all
    x = torch.randn(32, 8)
    dl = DataLoader(list(zip(x, x[:, :5])), bs=8)
    learn = Learner(DataLoaders(dl, dl), nn.Linear(8, 5), loss_func=nn.MSELoss(), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    w = load_weights(learn.save('m'))
    assert torch.equal(w['weight'], learn.model.weight.detach().cpu())

def test_folder_of_a_trainer(tmp_path):
    net = nn.Linear(8, 5)
    torch.save(net.state_dict(), tmp_path/'pytorch_model.bin')
    for f in ('optimizer.bin', 'scheduler.bin', 'training_args.bin', 'rng_state.pth', 'scaler.pt', 'random_states_0.pkl'): torch.save(dict(o=argparse.ArgumentParser), tmp_path/f)
    assert list(load_weights(tmp_path))==['weight', 'bias']

def test_other_kinds_are_named(tmp_path):
    net = nn.Linear(3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.save(torch.jit.trace(net, torch.randn(1, 3)), tmp_path/'script.pt')
    np.savez(tmp_path/'a.npz', a=np.ones(3)); np.save(tmp_path/'a.npy', np.ones(3))
    torch.save({'a.weight': np.ones((3, 3))}, tmp_path/'arrays.pt')
    (tmp_path/'bare.pkl').write_bytes(pickle.dumps({}, 4))
    with tarfile.open(tmp_path/'m.tar', 'w') as t: t.add(tmp_path/'a.npy')
    for n,b in {'m.gguf': b'GGUF\3', 'm.h5': b'\x89HDF\r\n', 'm.onnx': b'\x08\x0a\x12\x07pytorch', 'lfs.bin': b'version https://git-lfs.github.com/spec/v1', 'page.pt': b'<!DOCTYPE html><html>', 'm.gz': b'\x1f\x8b\x08', 'cfg.json': b'{}'}.items(): (tmp_path/n).write_bytes(b)
    says = {'script.pt': 'TorchScript', 'a.npz': 'NumPy', 'a.npy': 'NumPy', 'arrays.pt': 'NumPy arrays', 'bare.pkl': 'a pickle, but none of torch.save', 'm.tar': 'tar archive', 'm.gguf': 'GGUF', 'm.h5': 'HDF5', 'm.onnx': 'ONNX', 'lfs.bin': 'git lfs pull', 'page.pt': 'web page', 'm.gz': 'unpack', 'cfg.json': 'JSON'}
    for f,text in says.items():
        with pytest.raises(ValueError) as e: load_weights(tmp_path/f)
        assert text in str(e.value) and f in str(e.value) and 'damaged' not in str(e.value) and '\n' not in str(e.value), e.value

def test_hostile_names_in_messages(tmp_path):
    name = '\x1b[2J' + 'x'*10_000 + '\r\n.weight'
    save_file({name: torch.zeros(0, 3)}, tmp_path/'m.safetensors')
    w = load_weights(tmp_path/'m.safetensors')
    for f in (lambda: analyze(w, progress=False), lambda: analyze(w, layers='no', progress=False), lambda: list(layer_matrices(w)), lambda: delta(w, {'a': torch.ones(2)})):
        with pytest.raises(ValueError) as e: f()
        assert str(e.value).isprintable() and len(str(e.value))<1000

# Changing files, other processes, threads ------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['m.safetensors', 'm.pt'])
@pytest.mark.parametrize('how', ['replaced', 'cut', 'written', 'gone'])
def test_change_is_noticed(name, how, tmp_path):
    p, sd = tmp_path/name, {f'l.{i}.weight': torch.randn(64, 64) for i in range(20)}
    save = save_file if name.endswith('safetensors') else torch.save
    save(sd, p)
    w = load_weights(p)
    w['l.0.weight']
    sent = pickle.dumps(w)
    assert torch.equal(pickle.loads(sent)['l.1.weight'], sd['l.1.weight'])
    if how=='replaced': save(sd, tmp_path/'new'); os.replace(tmp_path/'new', p)
    elif how=='cut': os.truncate(p, p.stat().st_size//3)
    elif how=='written': save({k: v+1 for k,v in sd.items()}, p); os.utime(p, ns=(1, 1))
    else: p.unlink()
    for o in (w, pickle.loads(sent)):
        with pytest.raises((ValueError, OSError)) as e: dict(o)
        assert name in str(e.value)

BUSY = """
import threading, torch, sys
from spectral_nb.matrices import esd, _blas
def now(): return {o.num_threads for o in _blas().lib_controllers}
w = torch.randn(60, 60)
esd(w); before = now()
for _ in range(int(sys.argv[1])):
    ts = [threading.Thread(target=esd, args=(torch.randn(n, n+9),)) for n in (60, 90, 120)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert now()==before, (now(), before)
print(*before)
"""
LONG = bool(os.environ.get('SPECTRAL_LONG'))

def test_threads_leave_blas_as_it_was():
    res = subprocess.run([sys.executable, '-c', BUSY, '1000' if LONG else '60'], capture_output=True, text=True, env=os.environ | dict(OPENBLAS_NUM_THREADS='2', OMP_NUM_THREADS='2'))
    assert res.returncode==0 and set(res.stdout.split())=={'2'}, res.stderr

def test_large_layers_get_the_threads():
    "A call that has the machine for itself works on all threads, and inside another loop it leaves the limit alone"
    code = "from spectral_nb.matrices import _one_thread, _blas\nf = lambda: {o.num_threads for o in _blas().lib_controllers}\nwith _one_thread() as on:\n    a = f(), on(2, f), f()\n    with _one_thread() as inner: b = inner(2, f)\nprint(a, b, f())"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=os.environ | dict(OPENBLAS_NUM_THREADS='2')).stdout
    assert out.strip()=='({1}, {2}, {1}) {1} {2}'
