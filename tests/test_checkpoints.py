"Files of any size in little memory, and damaged or hostile ones: an error that names the file, never a crash, a hang or code that runs"
import io, json, os, pickle, struct, subprocess, sys, time, zipfile, numpy as np, pytest, torch
from pathlib import Path
from safetensors.torch import save_file
from spectral_nb.checkpoints import delta, load_weights, natural_order
from spectral_nb.metrics import analyze

def tensors(seed=0): torch.manual_seed(seed); return {f'layer.{i}.weight': torch.randn(12, 16) for i in (1, 2, 10)} | {'norm.weight': torch.ones(16), 'step': torch.tensor(3)}
def save_zip(sd, path): torch.save(sd, path)
def save_old(sd, path): torch.save(sd, path, _use_new_zipfile_serialization=False)
SAVE = {'st.safetensors': save_file, 'zip.pt': save_zip, 'old.bin': save_old}

@pytest.fixture
def files(tmp_path):
    for name,save in SAVE.items(): save(tensors(), tmp_path/name)
    return tmp_path

def read(path): return {k: (t.shape, t.flatten()[:1]) for k,t in load_weights(path).items()}
def refused(path, *says):
    with pytest.raises((ValueError, OSError)) as e: read(path)
    assert not isinstance(e.value, UnicodeError)
    for s in (path.name, *says): assert s in str(e.value), e.value

@pytest.mark.parametrize('name', SAVE)
def test_round_trip(files, name):
    w, sd = load_weights(files/name), tensors()
    assert sorted(w, key=natural_order)==sorted(sd, key=natural_order) and all(torch.equal(w[k], sd[k]) for k in sd)
    assert [n for n in analyze(w, progress=False).name]==['layer.1', 'layer.2', 'layer.10']

@pytest.mark.parametrize('name', SAVE)
def test_cut_anywhere(files, name):
    whole = (files/name).read_bytes()
    for n in range(0, len(whole), 41):
        (files/name).write_bytes(whole[:n])
        refused(files/name)

# Mutations ------------------------------------------------------------------------------------------------------------

def mutate(b, rng):
    "A few bytes changed, some cut out, some doubled, or a number made huge; near the front more often, where the tables stand."
    b, at = bytearray(b), lambda: int(len(b)*rng.random()**(3 if rng.random()<.5 else 1))
    for _ in range(rng.integers(1, 5)):
        i, n = at(), int(rng.integers(1, 9))
        match rng.integers(5):
            case 0: b[i:i+1] = bytes([rng.integers(256)])
            case 1: del b[i:i+n]
            case 2: b[i:i] = b[i:i+n]
            case 3: b[i:i+n] = rng.integers(0, 256, n, dtype=np.uint8).tobytes()
            case 4: b[i:i+4] = b'\xff\xff\xff\x7f'
    return bytes(b)

TRIED = 2000
@pytest.mark.parametrize('name', SAVE)
@pytest.mark.filterwarnings('ignore')
def test_mutated(files, name):
    "Each of `TRIED` damaged files gives tensors or an error with its name, within seconds"
    whole, rng, refusals = (files/name).read_bytes(), np.random.default_rng(0), 0
    for i in range(TRIED):
        (files/name).write_bytes(mutate(whole, rng))
        start = time.process_time()
        try: read(files/name)
        except (ValueError, OSError) as e: refusals += 1; assert name in str(e), (i, e)
        assert time.process_time()-start<5, i
    assert TRIED/5<refusals<TRIED

def test_mutated_analysis(files):
    "What can still be read is analysed or refused"
    whole, rng, n = (files/'st.safetensors').read_bytes(), np.random.default_rng(1), 0
    for i in range(150):
        (files/'st.safetensors').write_bytes(mutate(whole, rng))
        try: analyze(load_weights(files/'st.safetensors'), progress=False); n += 1
        except ValueError as e: assert 'st.safetensors' in str(e) or 'no layer to analyse' in str(e), (i, e)
    assert n

def test_mutated_index(tmp_path):
    save_file(tensors(), tmp_path/'m-1.safetensors')
    index, rng = tmp_path/'m.safetensors.index.json', np.random.default_rng(2)
    whole = json.dumps(dict(weight_map=dict.fromkeys(tensors(), 'm-1.safetensors'))).encode()
    for i in range(500):
        index.write_bytes(mutate(whole, rng))
        try: read(index)
        except (ValueError, OSError) as e: assert index.name in str(e), (i, e)

# Safetensors ----------------------------------------------------------------------------------------------------------

def safetensors(path, header, data=b'\0'*64, size=None):
    h = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(h) if size is None else size) + h + data)
    return path
def entry(start, end, shape=(4, 2), dtype='F32'): return dict(dtype=dtype, shape=shape, data_offsets=[start, end])

BAD_HEADERS = dict(overlap=dict(a=entry(0, 32), b=entry(16, 48)), same=dict(a=entry(0, 32), b=entry(0, 32)), hole=dict(a=entry(0, 32), b=entry(40, 64, (3, 2))), beyond=dict(a=entry(0, 3200, (400, 2))),
    backwards=dict(a=entry(32, 0)), negative=dict(a=entry(-32, 0)), shape=dict(a=entry(0, 64, (4, 5))), huge=dict(a=entry(0, 64, (2**62, 2**62))), dtype=dict(a=entry(0, 64, dtype='F31')),
    short=dict(a=entry(0, 32)), text=dict(a='x'), list=[1, 2], deep=b'['*100_000, json=b'{"a"', utf8=b'{"\xff": 1}', nothing=b'')

@pytest.mark.parametrize('kind', BAD_HEADERS)
def test_bad_header(tmp_path, kind): refused(safetensors(tmp_path/'bad.safetensors', BAD_HEADERS[kind]))

@pytest.mark.parametrize('size', [0, 1, 10**4, 10**8, 2**40, 2**63, 2**64-1])
def test_bad_header_length(tmp_path, size): refused(safetensors(tmp_path/'bad.safetensors', dict(a=entry(0, 64, (4, 4))), size=size))

def test_long_header(tmp_path):
    "100 MB of header are refused; half of that is read"
    h = json.dumps(dict(a=entry(0, 64, (4, 4)))).encode()
    refused(safetensors(tmp_path/'long.safetensors', h+b' '*10**8))
    assert list(load_weights(safetensors(tmp_path/'half.safetensors', h+b' '*(5*10**7))))==['a']

def test_many_tensors(tmp_path):
    n = 100_000
    w = load_weights(safetensors(tmp_path/'many.safetensors', {f'l.{i}.weight': entry(4*i, 4*i+4, (1, 1)) for i in range(n)}, np.ones(n, np.float32).tobytes()))
    start = time.process_time()
    assert len(w)==n and list(w)[2]=='l.2.weight' and w['l.99999.weight'].item()==1
    assert time.process_time()-start<5
    assert len(analyze(w, layers='l.9999?', progress=False))==10

def test_not_finite(tmp_path):
    sd = {f'{k}.weight': torch.full((10, 10), float(k)) for k in ('nan', 'inf', '-inf')}
    save_file(sd, tmp_path/'nan.safetensors')
    df = analyze(load_weights(tmp_path/'nan.safetensors'), progress=False)
    assert (df.warning=='100 of 100 weights are NaN or infinite').all() and df.alpha.isna().all()

NAMES = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', '$\\frac{', '../../x', 'a[0-9]*', '\x1b[2J', 'x'*10_000, '%s{0}', '\u202e', '']
@pytest.mark.filterwarnings('ignore:Glyph')
def test_names(tmp_path):
    "Strange names are only names: in the table, in the pictures and on the page"
    from spectral_nb.model_report import model_report
    sd = {f'{n}.weight': torch.randn(30, 40) for n in NAMES}
    save_file(sd, tmp_path/'names.safetensors')
    w = load_weights(tmp_path/'names.safetensors')
    df = analyze(w, progress=False)
    assert len(df)==len(NAMES)
    page = model_report(df, '<b>title</b>', w)
    assert page.count('<script')==1 and '<script>alert' not in page      # the one that sorts the tables
    assert '<img src=x' not in page and '<b>title' not in page and '&lt;script&gt;' in page

# Pickles --------------------------------------------------------------------------------------------------------------

class Call:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

def bombs(flag):
    sd = {'a.weight': torch.randn(3, 3)}
    for f,args in ((os.mkdir, (flag,)), (os.system, (f'mkdir {flag}',)), (eval, (f'__import__("os").mkdir({flag!r})',)), (exec, (f'import os; os.mkdir({flag!r})',)), (subprocess.check_call, (['mkdir', flag],))):
        yield Call(f, *args); yield dict(state_dict=sd | {'b': Call(f, *args)}); yield [sd, (1, {2: Call(f, *args)})]

def nested(o, path):
    "A file in which `o` is hidden inside a zip archive within another."
    inner = io.BytesIO(); torch.save(o, inner)
    with zipfile.ZipFile(path, 'w') as z: z.writestr('archive/data.pkl', inner.getvalue()); z.writestr('archive/version', '3\n')

WRITERS = dict(zip=save_zip, old=save_old, bare=lambda o,p: p.write_bytes(pickle.dumps(o)), nested=nested, safetensors_name=save_zip)
@pytest.mark.parametrize('writer', WRITERS)
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_no_code_runs(tmp_path, writer):
    flag, path = tmp_path/'boom', tmp_path/('w.safetensors' if writer=='safetensors_name' else 'w.pt')
    for o in bombs(str(flag)):
        WRITERS[writer](o, path)
        refused(path, *(['nothing in it was run'] if writer in ('zip', 'old') else []))
        assert not flag.exists()

def test_the_offender_is_named(tmp_path):
    save_zip({'a.weight': Call(os.system, 'true')}, tmp_path/'w.pt')
    refused(tmp_path/'w.pt', f'unsupported GLOBAL {os.name}.system')

def test_no_memory_bombs(tmp_path):
    p = tmp_path/'m.pt'
    for writer in (save_zip, save_old):
        writer({'a.weight': Call(bytearray, 10**11)}, p); refused(p, 'asks for a bytearray')
    save_zip({'a.weight': torch.zeros(1).expand(10**6, 10**6)}, p); refused(p, "'a.weight'", '4000000000000 bytes')
    with zipfile.ZipFile(p, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('archive/data.pkl', b'\0'*10**8)
    refused(p, 'more than the file has')

# Shards ---------------------------------------------------------------------------------------------------------------

def index(path, weight_map): (path/'m.safetensors.index.json').write_text(weight_map if isinstance(weight_map, str) else json.dumps(dict(weight_map=weight_map)))

@pytest.mark.parametrize('file', ['../secret.safetensors', '/etc/passwd', '..\\secret.safetensors', '..', '.', '', 'sub/../../secret.safetensors', 'C:\\x.safetensors', 7, None, ['m.safetensors'], 'passwd\0.safetensors'])
def test_index_stays_in_its_folder(tmp_path, file):
    save_file(tensors(), tmp_path/'secret.safetensors')
    (tmp_path/'model').mkdir()
    index(tmp_path/'model', {'layer.1.weight': file})
    with pytest.raises((ValueError, OSError), match='m.safetensors.index.json.*layer.1.weight'): load_weights(tmp_path/'model')

def test_shards(tmp_path):
    sd = tensors()
    save_file({'layer.10.weight': sd['layer.10.weight']}, tmp_path/'m-1.safetensors'); save_file({'layer.2.weight': sd['layer.2.weight']}, tmp_path/'m-2.safetensors')
    assert list(load_weights(tmp_path))==['layer.2.weight', 'layer.10.weight']
    for text in ('', '[]', '{}', '{"weight_map": []}', '{"weight_map": {}}', '['*10**5, '{"weight_map"'): index(tmp_path, text); refused(tmp_path/'m.safetensors.index.json')
    index(tmp_path, {'layer.2.weight': 'm-1.safetensors'}); refused(tmp_path/'m.safetensors.index.json', "'layer.2.weight'", 'm-1.safetensors')
    index(tmp_path, {'layer.2.weight': 'm-3.safetensors'}); refused(tmp_path/'m.safetensors.index.json', "'layer.2.weight'", 'm-3.safetensors')
    (tmp_path/'m.safetensors.index.json').unlink()
    save_file({'layer.2.weight': sd['layer.2.weight']}, tmp_path/'m-3.safetensors')
    with pytest.raises(ValueError, match="'layer.2.weight' is both in .*m-2.safetensors and in m-3.safetensors"): load_weights(tmp_path)

# Memory ---------------------------------------------------------------------------------------------------------------

PEAK = """
import sys, spectral_nb.metrics as m, spectral_nb.checkpoints as c, torch
torch.set_num_threads(1); torch.linalg.eigvalsh(torch.eye(64, dtype=torch.float64))
def mb(k): return int(next(l for l in open('/proc/self/status') if l.startswith(k)).split()[1])/1024
base = mb('VmRSS'); open('/proc/self/clear_refs', 'w').write('5')
w = c.delta(*sys.argv[1:]) if len(sys.argv)>2 else c.load_weights(sys.argv[1])
n = len(m.analyze(w, progress=False))
print(n, mb('VmHWM')-base)
"""
def peak(*paths):
    "Layers analysed, and the largest resident memory in MB above that after the imports."
    res = subprocess.run([sys.executable, '-c', PEAK, *map(str, paths)], capture_output=True, text=True, check=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    return [float(o) for o in res.stdout.split()]

@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='reads /proc')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_memory(tmp_path, dtype):
    "400 MB in 8 shards, or in one .pt file, or the difference of two: more than the bound, which therefore tells streaming from loading"
    w, per = torch.randn(128, 32768, dtype=dtype), 50*2**20
    n, mb = per//w.nbytes, w.nbytes/2**20
    for s in range(8): save_file({f'l.{s}.{i}.weight': w.roll(i, 1) for i in range(n)}, tmp_path/f'm-{s}.safetensors')
    bound, total = 2*mb+300, 8*n*mb
    assert bound<total
    layers, used = peak(tmp_path)
    assert layers==8*n and used<bound
    if dtype==torch.bfloat16: return
    assert peak(tmp_path, tmp_path)[1]<bound+2*mb<2*total
    torch.save({f'l.{i}.weight': w.roll(i, 1) for i in range(8*n)}, tmp_path/'one.pt')
    assert peak(tmp_path/'one.pt')[1]<bound

def test_delta_of_files(files):
    save_file({k: v+1 for k,v in tensors().items() if k!='step'} | {'layer.1.weight': torch.zeros(3, 3)}, files/'tuned.safetensors')
    d = delta(files/'zip.pt', files/'tuned.safetensors')
    assert d.skipped=={'layer.1.weight': 'shape (12, 16) in base, (3, 3) in tuned', 'step': 'only in base'}
    assert all(torch.allclose(d[k], torch.ones_like(d[k])) for k in d) and len(d)==3
