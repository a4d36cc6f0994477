"A console script by name, from this checkout: `command.py spectral_train --help`. With LIGHT set, it must end before anything heavy is imported"
import os, sys
from spectral_nb import cli

sys.argv = sys.argv[1:]
try: getattr(cli, sys.argv[0])()
finally: assert not ('LIGHT' in os.environ and {'torch', 'fastai', 'pandas'} & sys.modules.keys()), 'heavy'
