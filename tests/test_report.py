"Reports and the files they are written to: whole or not there, under the user's rights, with an error that names the file"
import errno, multiprocessing, os, re, resource, stat, subprocess, sys, threading
from pathlib import Path
import numpy as np, pandas as pd, pytest, matplotlib.pyplot as plt
from bs4 import BeautifulSoup
from spectral_nb import report
from spectral_nb.plots import PALETTE, alt_text
from spectral_nb.report import Picture, Table, html_report, report_part, write_text

root = Path(__file__).parent.parent
def names(folder): return sorted(p.name for p in folder.iterdir())

# Files ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mask, mode', [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_umask(tmp_path, mask, mode):
    old = os.umask(mask)
    try: write_text(tmp_path/'a.csv', 'x')
    finally: os.umask(old)
    assert stat.S_IMODE((tmp_path/'a.csv').stat().st_mode)==mode

FAULTS = {errno.ENOSPC: 'no space is left', errno.EDQUOT: 'no space is left', errno.EACCES: 'no permission', errno.EPERM: 'no permission',
          errno.EROFS: 'no permission', errno.EIO: 'input/output error', errno.EFBIG: 'file too large'}

@pytest.mark.parametrize('step', ['open', 'fsync', 'replace'])
@pytest.mark.parametrize('code, words', FAULTS.items())
def test_faults(tmp_path, monkeypatch, code, words, step):
    "Whatever goes wrong at whichever step: one line with the file's name, the old file as it was, and nothing beside it"
    f = write_text(tmp_path/'a.csv', 'old')
    def fail(*args, **kwargs): raise OSError(code, os.strerror(code))
    if step=='open': monkeypatch.setattr(report, 'open', fail, raising=False)
    if step=='fsync': monkeypatch.setattr(report.os, 'fsync', fail)
    if step=='replace': monkeypatch.setattr(report.Path, 'replace', fail)
    with pytest.raises(OSError) as e: write_text(f, 'new')
    assert words in str(e.value) and str(f) in str(e.value) and '\n' not in str(e.value)
    assert f.read_text()=='old' and names(tmp_path)==['a.csv']

def test_interrupt(tmp_path, monkeypatch):
    f = write_text(tmp_path/'a.csv', 'old')
    def interrupt(fd): raise KeyboardInterrupt
    monkeypatch.setattr(report.os, 'fsync', interrupt)
    with pytest.raises(KeyboardInterrupt): write_text(f, 'new')
    assert f.read_text()=='old' and names(tmp_path)==['a.csv']

def test_real_limit(tmp_path):
    "A file system that really stops in the middle of the file"
    f = write_text(tmp_path/'a.csv', 'old')
    code = f'''import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from spectral_nb.report import write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try: write_text({str(f)!r}, 'new'*10_000)
except OSError as e: print(e)'''
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert res.stdout==f'{f} was not written: file too large\n', res.stderr
    assert f.read_text()=='old' and names(tmp_path)==['a.csv']

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='there is no /dev/full')
def test_devices(tmp_path):
    "A device or a pipe is written to and stays what it is"
    with pytest.raises(OSError, match='/dev/full was not written: no space is left'): write_text('/dev/full', 'x')
    assert stat.S_ISCHR(os.stat('/dev/full').st_mode)
    os.mkfifo(tmp_path/'pipe')
    got = []
    t = threading.Thread(target=lambda: got.append((tmp_path/'pipe').read_text()))
    t.start(); write_text(tmp_path/'pipe', 'through'); t.join()
    assert got==['through'] and names(tmp_path)==['pipe']

def test_places(tmp_path):
    (tmp_path/'dir').mkdir(); (tmp_path/'file').touch()
    for bad in ('dir', 'file/a.csv', 'x'*300): 
        with pytest.raises(OSError, match='was not written'): write_text(tmp_path/bad, 'x')
    os.symlink(tmp_path/'file', tmp_path/'link')
    write_text(tmp_path/'link', 'x')
    assert (tmp_path/'link').is_symlink() and (tmp_path/'file').read_text()=='x'
    write_text(tmp_path/('y'*250), 'a name of 250 letters leaves no room for a longer one')
    assert write_text(tmp_path/'odd.txt', 'from a file name: \udcff\r\n').read_bytes()==b'from a file name: \\udcff\r\n'
    assert names(tmp_path)==sorted(['dir', 'file', 'link', 'odd.txt', 'y'*250])

def _write_many(path, letter, n):
    for _ in range(n): write_text(path, letter*20_000)

def test_two_processes(tmp_path):
    "Writers of one file never meet, and a reader sees one of their texts"
    ctx = multiprocessing.get_context('fork')
    ps = [ctx.Process(target=_write_many, args=(tmp_path/'a.csv', c, 100)) for c in 'ab']
    for p in ps: p.start()
    while any(p.is_alive() for p in ps):
        if (tmp_path/'a.csv').exists(): assert (tmp_path/'a.csv').read_text() in ('a'*20_000, 'b'*20_000)
    for p in ps: p.join()
    assert [p.exitcode for p in ps]==[0, 0] and names(tmp_path)==['a.csv']

# Tables ---------------------------------------------------------------------------------------------------------------

HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onclick='alert(1)", '{{ 7*7 }}', '{% raw %}', '\x1b[2J', '\u202e', 'x'*10_000, '</style><b>', '&amp;', '']

def test_hostile():
    "Text is only text wherever it stands: in cells, heads, captions, explanations, alternative texts"
    for s in HOSTILE:
        fig = plt.figure()
        df = pd.DataFrame({'name': [s], s or 'b': [s], 'status': ['fine']})
        page = html_report(s, s, Table(df, s, {s or 'b': s}, dict(status=dict(fine='good'))), Picture(fig, s or 'p', s))
        soup = BeautifulSoup(page, 'html.parser')
        assert len(soup.find_all('script'))==1 and len(soup.find_all('img'))==1 and not soup.find_all('b')
        assert not [o for o in soup.find_all(True) if any(k.startswith('on') for k in o.attrs)]
        assert soup.h1.text==s and soup.tbody.th.text==s and soup.img['alt']==(s or 'p') and soup.caption.text==s

@pytest.mark.parametrize('values, texts, keys', [
    ([1234567, 2], ['1,234,567', '2'], ['1234567.0', '2.0']),
    ([0.5, np.nan], ['0.5000', ''], ['0.5', '']),
    ([1e-7, 2.], ['1.000e-07', '2.000'], ['1e-07', '2.0']),
    ([np.inf, 1.], ['inf', '1.000'], ['inf', '1.0']),
    ([True, False], ['True', 'False'], ['True', 'False']),
    ([None, pd.NA], ['', ''], ['', '']),
    (['b', 'a'], ['b', 'a'], ['b', 'a'])])
def test_cells(values, texts, keys):
    "Cells show what can be compared and are sorted by their value"
    soup = BeautifulSoup(report_part(pd.DataFrame(dict(name=['x', 'y'], v=values))), 'html.parser')
    cells = soup.tbody.find_all('td')
    assert [c.text for c in cells]==texts and [c['data-sort'] for c in cells]==keys

def test_accessible_tables():
    soup = BeautifulSoup(report_part(pd.DataFrame(dict(name=['x'], v=[1]))), 'html.parser')
    assert soup.caption.text and soup.thead.th['scope']=='col' and soup.tbody.th['scope']=='row'
    assert soup.thead.button and soup.div['tabindex']=='0' and soup.div['aria-label']

# Pictures -------------------------------------------------------------------------------------------------------------

def luminance(c): return sum(w*((v+.055)/1.055)**2.4 if v>.04045 else w*v/12.92 for w,v in zip((.2126, .7152, .0722), (int(c[i:i+2], 16)/255 for i in (1, 3, 5))))
def contrast(a, b):
    hi, lo = sorted((luminance(a), luminance(b)), reverse=True)
    return (hi+.05)/(lo+.05)

def test_contrast():
    "Words in colour can be read, by day and by night (WCAG AA: 4.5 to 1)"
    css = (root/'spectral_nb'/'templates'/'report.css').read_text()

    for block in re.findall(r':root \{(.*?)\}', css, re.S):
        c = dict(re.findall(r'--(\w+): (#\w+)', block))
        c = {k: v if len(v)==7 else '#'+''.join(x*2 for x in v[1:]) for k,v in c.items()}
        for word in ('text', 'soft', 'good', 'look', 'bad', 'open', 'plain'):
            for ground in ('page', 'panel'): assert contrast(c[word], c[ground])>4.5, (word, ground)
    assert luminance('#ffffff')==1 and contrast('#ffffff', '#000000')==21

def test_palette():
    "The colours of series stay apart for the colour-blind (Machado, Oliveira and Fernandes 2009, full deuteranomaly and protanomaly)"
    M = dict(deutan=[[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
             protan=[[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]])
    rgb = np.array([[int(c[i:i+2], 16)/255 for i in (1, 3, 5)] for c in list(PALETTE.values())[:4]])
    linear = np.where(rgb>.04045, ((rgb+.055)/1.055)**2.4, rgb/12.92)
    for m in M.values():
        seen = np.clip(linear@np.array(m).T, 0, 1)
        srgb = np.where(seen>.0031308, 1.055*seen**(1/2.4)-.055, 12.92*seen)
        d = np.linalg.norm(srgb[:,None]-srgb, axis=-1)[np.triu_indices(len(srgb), 1)]
        assert d.min()>.15, d

def test_alt_text():
    fig, axs = plt.subplots(1, 2)
    axs[0].set(xlabel='epoch', ylabel=r'$\alpha$', title='a'); axs[1].set(xlabel='epoch')
    axs[1].plot([1], label='one')
    assert alt_text(fig)=='2 panels. a: α by epoch. α by epoch (one).'

# Packaging ------------------------------------------------------------------------------------------------------------

def test_templates_are_packed(tmp_path):
    "The templates travel with the package"
    res = subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info', '-e', str(tmp_path), 'build_py', '-d', str(tmp_path/'lib')], cwd=root, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    assert names(tmp_path/'lib'/'spectral_nb'/'templates')==names(root/'spectral_nb'/'templates')
