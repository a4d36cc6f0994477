"Kills, full disks, closed pipes, damaged files and odd loaders: nothing is lost, nothing half written, and one line says why"
import os
import json, os, random, resource, signal, subprocess, sys, tempfile, time
from itertools import count
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader as TorchDL, TensorDataset
from fastai.basics import DataLoaders, Learner, SGD, accuracy
from fastai.data.load import DataLoader
from spectral_nb.data import ImageTensors, csv_text, digits_dls, sweep, whole_file
from spectral_nb.experiment import run_all, run_lr, run_name
from spectral_nb.models import densenet40
from spectral_nb.prune import save_slim
from spectral_nb.train import KeepRun, fit_run, learner_for, make_learner, read_state, write_state

pytestmark = pytest.mark.skipif(os.environ.get('SPECTRAL_LONG')!='1', reason='long: set SPECTRAL_LONG=1')

root = Path(__file__).parent.parent
KILLS = 20 if os.environ.get('SPECTRAL_LONG') else 1
ENV = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONPATH=str(root))

def process(args, **kwargs):
    "A process with pipes, away from the checkout."
    kwargs = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, cwd=tempfile.gettempdir()) | kwargs
    return subprocess.Popen([sys.executable, *map(str, args)], **kwargs)

def start(code, *args, **kwargs): return process(['-c', code, *args], **kwargs)
def command(name, *args, **kwargs): return process([root/'tests'/'command.py', name, *args], **kwargs)

def results(folder):
    "What a finished run leaves, but for times and places."
    res = {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.suffix in ('.csv', '.safetensors')}
    assert 'state.safetensors' not in res and not (folder/'unfinished.json').exists()
    assert not [f for f in folder.iterdir() if '.part' in f.name]
    return res

def killed_until_done(make, seconds, rng, kills):
    "Kills that many processes at random moments, then lets one finish."
    for _ in range(kills):
        p = make()
        try: p.communicate(timeout=rng.uniform(.3, 1)*seconds)
        except subprocess.TimeoutExpired:
            p.kill()
            p.communicate()
    p = make()
    out, err = p.communicate()
    assert p.returncode==0, err

TRAIN = '--epochs', 4, '--bs', 128, '--arch', 'densenet40', '--size', 8
def test_killed_train(tmp_path):
    "spectral_train, killed at random moments and resumed, ends with the files of an unkilled run."
    begin = time.time()
    p = command('spectral_train', *TRAIN, '--out', tmp_path/'whole')
    assert p.communicate() and p.returncode==0
    took, rng = time.time()-begin, random.Random(time.time())
    killed_until_done(lambda: command('spectral_train', *TRAIN, '--out', tmp_path/'cut', '--resume'), took, rng, KILLS)
    assert results(tmp_path/'cut')==results(tmp_path/'whole')

def test_killed_prune(tmp_path):
    "spectral_prune the same."
    save_slim(densenet40(growth=6, depth=16), tmp_path/'model.safetensors')
    args = tmp_path/'model.safetensors', '--size', 8, '--epochs', 4
    begin = time.time()
    p = command('spectral_prune', *args, '--out', tmp_path/'whole')
    assert p.communicate() and p.returncode==0
    took, rng = time.time()-begin, random.Random(time.time())
    killed_until_done(lambda: command('spectral_prune', *args, '--out', tmp_path/'cut', '--resume'), took, rng, KILLS)
    assert results(tmp_path/'cut')==results(tmp_path/'whole')

RUNS = '''
import sys
from spectral_nb.experiment import run_all, run_lr
base = dict(arch='vgg19', lr=.05, width=.0625, epochs=4, data='digits', size=16, bs=128, last=2)
run_all([dict(arm=a, seed=0, **base) for a in ('uniform', 'spectral')], run_lr, sys.argv[1]+'/res.csv', 0, sys.argv[1], progress=False)
'''
def test_killed_run_all(tmp_path):
    "run_all the same, but for the column of processor times."
    begin = time.time()
    for d in ('whole', 'cut'): (tmp_path/d).mkdir()
    p = start(RUNS, tmp_path/'whole')
    assert p.communicate() and p.returncode==0
    took, rng = time.time()-begin, random.Random(time.time())
    killed_until_done(lambda: start(RUNS, tmp_path/'cut'), took, rng, KILLS)
    a, b = (pd.read_csv(tmp_path/d/'res.csv').drop(columns='cpu_s') for d in ('whole', 'cut'))
    assert a.equals(b) and [f.name for f in (tmp_path/'cut'/'res').iterdir()]==['lock']

def wait_for(path, p, seconds=60):
    for _ in range(10*seconds):
        if path.exists() or p.poll() is not None: return
        time.sleep(.1)

def test_interrupt(tmp_path):
    "Ctrl-C ends a training in one line that says what is kept; another process on the folder is refused meanwhile."
    p = command('spectral_train', '--epochs', 200, '--bs', 512, '--out', tmp_path/'x', preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    wait_for(tmp_path/'x'/'state.safetensors', p)
    other = command('spectral_train', '--out', tmp_path/'x', '--resume').communicate()[1]
    assert 'another process is at work in' in other and len(other.strip().splitlines())==1
    p.send_signal(signal.SIGINT)
    out, err = p.communicate()
    last = err.strip().splitlines()[-1]
    assert p.returncode==130 and 'Traceback' not in err, err
    assert 'spectral_train: stopped' in last and 'whole epochs are kept in' in last and 'go on with --resume' in last
    again = command('spectral_train', '--epochs', 2, '--out', tmp_path/'x')
    assert 'holds a run that is not finished' in again.communicate()[1] and again.returncode==1

def small_files(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))

def test_full_disk(tmp_path):
    "Where a file cannot grow, one line names it and what is free; what was there stays, and nothing else is left."
    args = '--epochs', 1, '--bs', 512, '--arch', 'densenet40', '--size', 8, '--out', tmp_path/'x'
    p = command('spectral_train', *args, preexec_fn=lambda: small_files(200_000))
    out, err = p.communicate()
    last = err.strip().splitlines()[-1]
    assert p.returncode==1 and 'Traceback' not in err, err
    assert 'state.safetensors cannot be written' in last and 'MB are free' in last, last
    assert {f.name for f in (tmp_path/'x').iterdir()}=={'.lock', 'unfinished.json'}

@pytest.mark.parametrize('screen', ['closed', 'full', 'ascii'])
def test_screen(tmp_path, screen):
    "Whatever becomes of the screen, all files are written, and there is no traceback."
    from safetensors.torch import save_file
    save_file({'schön\x1b.weight': torch.randn(60, 50), 'a\rb.weight': torch.randn(60, 50)}, tmp_path/'w.safetensors')
    kwargs = {}
    if screen=='full': kwargs = dict(stdout=open('/dev/full', 'w'))
    if screen=='ascii': kwargs = dict(env=ENV | dict(PYTHONIOENCODING='ascii'))
    p = command('spectral_analyze', tmp_path/'w.safetensors', '--csv', tmp_path/'x.csv', '--html', tmp_path/'x.html', **kwargs)
    if screen=='closed': p.stdout.close(); p.stdout = None
    out, err = p.communicate()
    assert 'Traceback' not in err and 'Exception ignored' not in err, err
    assert len(pd.read_csv(tmp_path/'x.csv'))==2 and (tmp_path/'x.html').read_text(encoding='utf-8').startswith('<!doctype html>')
    if screen=='full': assert p.returncode==1 and 'all files are' in err
    else: assert p.returncode==0
    if screen=='ascii': assert '\\xf6' in out and '\x1b' not in out

def test_train_closed_pipe(tmp_path):
    p = command('spectral_train', '--epochs', 1, '--bs', 512, '--out', tmp_path/'x', '--arch', 'densenet40', '--size', 8)
    p.stdout.close(); p.stdout = None
    out, err = p.communicate()
    assert p.returncode==0 and 'Traceback' not in err and len(results(tmp_path/'x'))==3, err
    assert err.strip().splitlines()[-1]=='densenet40, spectral rates'   # one line per phase, no bar

REFUSED = [('spectral_analyze', 'notes.txt'), ('spectral_analyze', 'lost.pt'), ('spectral_analyze', 'w.pt', '--fit', 'x'),
    ('spectral_analyze', 'w.pt', '--html', '.'), ('spectral_analyze', 'w.pt', '--csv', 'w.pt'),
    ('spectral_train', '--arch', 'vgg91'), ('spectral_train', '--epochs', 0), ('spectral_train', '--out', 'notes.txt'),
    ('spectral_prune', 'lost.safetensors'), ('spectral_prune', 'w.pt', '--target', 2), ('spectral_compare', 'lost.csv'),
    ('spectral_compare', 'notes.txt', '--md', 'notes.txt'), ('spectral_demo', '--epochs', 0)]

def test_refused_at_once(tmp_path):
    "What can be checked is checked before anything heavy is imported, and said in one line."
    (tmp_path/'notes.txt').write_text('some text')
    (tmp_path/'w.pt').write_bytes(b'PK\3\4')
    for name,*args in REFUSED:
        p = command(name, *args, cwd=tmp_path, env=ENV | dict(LIGHT='1'))
        out, err = p.communicate()
        assert p.returncode==1 and err.startswith(name+': ') and len(err.strip().splitlines())==1, (name, args, err)
    assert (tmp_path/'w.pt').read_bytes()==b'PK\3\4' and (tmp_path/'notes.txt').read_text()=='some text'

MANY = '''
import sys
from pathlib import Path
from spectral_nb.cli import out_folder
from spectral_nb.data import whole_file
for i in range(200):
    out_folder(sys.argv[1])
    with whole_file(Path(sys.argv[1])/'x.csv') as part: part.write_text(sys.argv[2]*1000)
'''
def test_two_writers(tmp_path):
    "Two processes that write one file in one folder never meet: the file is that of one of them, and nothing is left over."
    ps = [start(MANY, tmp_path, k) for k in 'ab']
    for p in ps: assert p.wait()==0, p.stderr.read()
    assert (tmp_path/'x.csv').read_text() in ('a'*1000, 'b'*1000) and os.listdir(tmp_path)==['x.csv']

def test_killed_writer(tmp_path):
    "What a killed process leaves is cleared away by the next."
    code = "import sys, time; from spectral_nb.data import whole_file\nwith whole_file(sys.argv[1]) as p: p.write_text('half'); print('ready', flush=True); time.sleep(60)"
    p = start(code, tmp_path/'x')
    p.stdout.readline()
    p.kill(); p.communicate()
    assert len(os.listdir(tmp_path))==1 and not (tmp_path/'x').exists()
    sweep(tmp_path)
    assert not os.listdir(tmp_path)

NAMES = st.text(min_size=1, max_size=8).filter(lambda s: '\0' not in s)
@settings(max_examples=300, deadline=None)
@given(st.lists(NAMES | st.sampled_from(['=1+1', '-x', '@a', '+b', '\ta', '\r', 'a\rb', 'a\r\nb', '-1', '"', ','])))
def test_csv(names):
    "Any names survive a table; what a spreadsheet would compute gets an apostrophe, and nothing else changes."
    names = [n for n in names if n.isprintable() or set(n)&set('\r\n\t')]
    df = pd.DataFrame(dict(name=pd.Series(names, dtype=object), x=range(len(names))))
    with tempfile.TemporaryDirectory() as d:
        f = Path(d)/'x.csv'
        f.write_bytes(csv_text(df).encode())
        back = pd.read_csv(f, keep_default_na=False, dtype=dict(name=str))
    assert back.x.tolist()==df.x.tolist()
    for n,b in zip(names, back.name):
        assert b in (n, "'"+n)
        try: number = float(n)==float(n)
        except ValueError: number = False
        assert (b!=n)==(n[0] in '=+-@\t\r' and not number)

def state_file(folder):
    learn = make_learner(digits_dls(bs=256), 'densenet40', growth=2, depth=10)
    fit_run(learn, 1, .05, file=folder/'state.safetensors')
    return folder/'state.safetensors'

def test_damaged_states(tmp_path):
    "No byte of a state can change, go or come unnoticed; the error names the file."
    file = state_file(tmp_path)
    good, rng = file.read_bytes(), random.Random(0)
    for i in range(600):
        bad = bytearray(good)
        at = rng.randrange(len(bad)) if i%2 else rng.randrange(4000)
        if i%3==0: bad[at] ^= 1<<rng.randrange(8)
        elif i%3==1: del bad[at:at+rng.choice([1, 100, 10**9])]
        else: bad[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
        file.write_bytes(bad)
        with pytest.raises(ValueError, match='state.safetensors is damaged'): KeepRun(file)
    file.write_bytes(good)
    assert KeepRun(file).start==1

class Evil:
    def __reduce__(self): return os.system, ('touch /tmp/spectral_evil',)

def test_planted_state(tmp_path):
    "A pickle in the place of a state is refused, and nothing in it runs."
    torch.save(dict(epoch=0, evil=Evil()), tmp_path/'state.safetensors')
    mark = Path('/tmp/spectral_evil')
    mark.unlink(missing_ok=True)
    with pytest.raises(ValueError, match='damaged, or no state'): KeepRun(tmp_path/'state.safetensors')
    assert not mark.exists()

def test_forged_states(tmp_path):
    "A state with a right checksum and wrong contents ends in one line that names the file."
    file = state_file(tmp_path)
    good = read_state(file)
    for k in sorted(good.keys()-{'epoch', 'n_epoch'}):
        for v in (None, 3, [], {}, 'x', {'a': torch.ones(2)}):
            if k=='cbs' and v=={}: continue
            write_state(good | {k: v}, file)
            learn = make_learner(digits_dls(bs=256), 'densenet40', growth=2, depth=10)
            try: fit_run(learn, 1, .05, file=file)
            except ValueError as e:                       # fastai puts a line in front of what a callback says
                said = str(e).splitlines()[-1]
                assert said.strip().startswith(str(file)), (k, v, e)

def plain_loaders(kind, workers=0):
    torch.manual_seed(1); random.seed(1)
    x, y = torch.randn(96, 3, 8, 8), torch.arange(96)%10
    if kind=='torch': make = lambda shuffle: TorchDL(TensorDataset(x, y), 16, shuffle=shuffle, drop_last=shuffle)
    elif kind=='generator': make = lambda shuffle: TorchDL(TensorDataset(x, y), 16, shuffle=shuffle, generator=torch.Generator().manual_seed(3))
    else: make = lambda shuffle: DataLoader([(a, b) for a,b in zip(x, y)], bs=16, shuffle=shuffle, num_workers=0)
    return DataLoaders(make(True), make(False))

@pytest.mark.parametrize('kind', ['torch', 'generator', 'fastai'])
def test_plain_loaders(tmp_path, kind):
    "Loaders of fastai and PyTorch resume bit for bit too."
    from fastai.basics import Callback, CancelFitException
    class CutOff(Callback):
        def after_batch(self):
            if self.epoch==2 and self.iter==1: raise CancelFitException
    def run(file=None, cbs=()):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 10))
        learn = Learner(plain_loaders(kind), net, loss_func=torch.nn.functional.cross_entropy, opt_func=SGD, metrics=accuracy, cbs=cbs)
        fit_run(learn, 4, .1, file=file)
        return learn
    whole = run()
    run(tmp_path/'s', CutOff())
    again = run(tmp_path/'s')
    assert again.recorder.values==whole.recorder.values
    for a,b in zip(again.model.parameters(), whole.model.parameters()): assert torch.equal(a, b)

class OwnLoader:
    dataset, n_inp, device = [], 1, torch.device('cpu')
    def __len__(self): return 1
    def __iter__(self): yield torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=int)
    def to(self, device): return self

@pytest.mark.parametrize('case', ['own', 'persistent', 'distributed'])
def test_refused_loaders(tmp_path, case, monkeypatch):
    "What cannot be resumed is refused before the first batch."
    dls = plain_loaders('torch')
    if case=='own': dls = DataLoaders(OwnLoader(), OwnLoader())
    if case=='persistent':
        dls = DataLoaders(TorchDL(dls.train.dataset, 16, num_workers=1, persistent_workers=True), dls.valid)
    if case=='distributed': monkeypatch.setattr('spectral_nb.train.num_distrib', lambda: 2)
    seen = []
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    net.register_forward_hook(lambda *a: seen.append(1))
    learn = Learner(dls, net, loss_func=torch.nn.functional.cross_entropy, opt_func=SGD, metrics=accuracy)
    msg = dict(own='order of a OwnLoader', persistent='persistent_workers', distributed='distributed run')[case]
    with pytest.raises(ValueError, match=msg): fit_run(learn, 1, .1, file=tmp_path/'s')
    assert not seen and not list(tmp_path.iterdir())
