"Every notebook runs from top to bottom under `nbdev_test`."
import subprocess, sys, pytest
from pathlib import Path
from nbdev.doclinks import nbglob

@pytest.mark.parametrize('nb', sorted(nbglob()), ids=lambda p: p.rsplit('nbs/')[-1])
def test_notebook(nb):
    code = 'import sys, conftest; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], n_workers=0)'
    res = subprocess.run([sys.executable, '-c', code, nb], capture_output=True, text=True, cwd=Path(__file__).parent)
    if res.returncode: pytest.fail(res.stdout[-2000:]+res.stderr[-6000:], pytrace=False)
