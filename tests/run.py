"Run all tests on two processes and end with one line, `N passed, N failed`"
import os, subprocess, sys, tempfile, xml.etree.ElementTree as ET
from pathlib import Path

def counts(report, code):
    "Passed and failed tests in pytest's `report`; a crash counts as a failure"
    suite = ET.parse(report).getroot().find('testsuite') if report.exists() and report.stat().st_size else None
    n,bad,skipped = (0,0,0) if suite is None else (int(suite.get(k)) for k in ('tests','failures','skipped'))
    if suite is not None: bad += int(suite.get('errors'))
    return n-bad-skipped, max(bad, int(code!=0))

if __name__=='__main__':
    os.chdir(Path(__file__).parent.parent)
    os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', MPLBACKEND='agg')
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp)/'report.xml'
        code = subprocess.call([sys.executable, '-m', 'pytest', '-n', '2', '--dist', 'worksteal', '-q', '--durations=10', '--hypothesis-profile=ci', f'--junitxml={report}', *sys.argv[1:]])
        passed,failed = counts(report, code)
    print(f'{passed} passed, {failed} failed', flush=True)
    sys.exit(failed>0)
