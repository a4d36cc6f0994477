"Runs that are killed, crash or fail; exact resuming across processes; statistics against other formulas"
import os, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from spectral_nb.compare import detectable, half_width, holm, mean_interval, paired_power, paired_table, seeds_needed
from spectral_nb.experiment import LR_ARMS, STATE, epochs_kept, run_all, run_lr, run_name, single_thread

root = Path(__file__).parent.parent

def fragile(x, folder):
    "Fails for 1 and then takes its process along for 2, until a file says that this is mended."
    one, mended = folder.parent.parent/'one', (folder.parent.parent/'mended').exists()
    if x==1 and not mended: one.touch(); raise ValueError('one is wrong')
    if x==2 and not mended:
        while not one.exists(): time.sleep(.1)
        time.sleep(2)
        os._exit(3)
    return dict(y=x/3)

def test_workers(tmp_path):
    "Failures are told with their config and stop nobody; the next call makes what is missing."
    configs = [dict(x=x) for x in (0, 1, 3, 4, 2)]
    run = lambda n: run_all(configs, fragile, tmp_path/'res.csv', n, tmp_path, progress=False)
    with pytest.warns(UserWarning) as w: df = run(2)
    said = ' '.join(str(o.message) for o in w)
    assert "{'x': 1}: ValueError: one is wrong" in said and "{'x': 2}: BrokenProcessPool" in said
    assert 0 in df.x.values and not {1, 2} & set(df.x)
    (tmp_path/'mended').touch()
    df = run(0)
    assert df.x.tolist()==[0, 1, 3, 4, 2] and np.allclose(df.y, df.x/3, rtol=1e-5)
    assert not [p for p in (tmp_path/'res').iterdir() if p.is_dir()]

SMALL = dict(arch='vgg19', lr=.05, seed=3, width=.0625, epochs=3, data='digits', size=16, bs=256, last=2)
KILLED = '''
import os, sys
from spectral_nb.experiment import KeepRun, run_all, run_lr
save = KeepRun._save
def save_and_die(self, state): save(self, state); state['epoch']==1 and os._exit(9)
KeepRun._save = save_and_die
run_all([dict(arm=sys.argv[1], **eval(sys.argv[2]))], run_lr, sys.argv[3]+'/res.csv', 0, sys.argv[3], progress=False)
'''

@pytest.mark.parametrize('arm', ['spectral', 'lars'])
def test_killed_run(tmp_path, arm):
    "Killed after two epochs and resumed by another process, a run ends with the numbers of an uninterrupted one."
    config = dict(arm=arm, **SMALL)
    res = subprocess.run([sys.executable, '-c', KILLED, arm, repr(SMALL), str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert res.returncode==9, res.stderr
    assert (tmp_path/'res'/run_name(config)/STATE).exists() and not (tmp_path/'res.csv').exists()
    epochs = []
    def resumed(folder, **kwargs):
        epochs.append(epochs_kept(folder/STATE))
        return run_lr(folder=folder, **kwargs)
    row = run_all([config], resumed, tmp_path/'res.csv', 0, tmp_path, progress=False).iloc[0]
    with single_thread(): whole = run_lr(**config)
    assert epochs==[2] and {k: row[k] for k in whole}=={k: float(f'{v:.6g}') for k,v in whole.items()}

def test_arms_differ():
    "Every arm is a training of its own, from the same start."
    with single_thread(): loss = {a: run_lr(arm=a, **SMALL | dict(epochs=2, last=1))['loss'] for a in LR_ARMS if a!='linear'}
    assert len(set(loss.values()))==len(loss), loss

@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm(ps):
    "By its definition: reject in order of p while p is at most level/(number left)."
    for level in (.01, .05, .3):
        rejected, order = set(), np.argsort(ps)
        for k,i in enumerate(order):
            if ps[i]*(len(ps)-k)>level: break
            rejected.add(i)
        assert {i for i,p in enumerate(holm(ps)) if p<=level}==rejected

@pytest.mark.parametrize('n', [3, 6, 15, 60])
def test_power(n):
    "The noncentral t distribution, which the noncentral F of the module is the square of."
    t = stats.t.ppf(.975, n-1)
    for e in (.1, .5, 1.):
        d = e*n**.5
        assert abs(paired_power(e, n)-stats.nct.sf(t, n-1, d)-stats.nct.cdf(-t, n-1, d))<1e-7
    assert abs(paired_power(detectable(1., n, .9), n)-.9)<1e-8

@settings(max_examples=50)
@given(st.floats(.01, 10), st.floats(.1, 3))
def test_seeds_needed(sd, width):
    n = seeds_needed(sd, width)
    assert half_width(sd, n)<=width and (n==2 or half_width(sd, n-1)>width)

def test_intervals_are_scipys():
    rng = np.random.default_rng(1)
    df = pd.DataFrame(dict(arm=np.repeat(['a', 'b', 'c'], 9), seed=[*range(9)]*3, acc=rng.normal(size=27)))
    res, a = paired_table(df, 'acc', 'a').set_index('arm'), df.acc[:9].to_numpy()
    for arm,x in (('b', df.acc[9:18]), ('c', df.acc[18:])):
        t, r = stats.ttest_rel(x, a), res.loc[arm]
        ci = t.confidence_interval()
        np.testing.assert_allclose([r.p, r.lo, r.hi], [t.pvalue, ci.low, ci.high], rtol=1e-9)
        assert abs(r.p_wilcoxon-stats.wilcoxon(x, a).pvalue)<1e-12 and abs(r.p_signs-t.pvalue)<.1
    assert (res.p_holm>=res.p).all() and mean_interval(a)['n']==9
