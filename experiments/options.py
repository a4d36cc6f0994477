"What both experiments can be told"
import argparse, math
from pathlib import Path

def parser(doc, nets, seeds, what):
    "Options that both have; `nets` are the settings by network, `what` is what `seeds` counts"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--archs', nargs='+', choices=nets, default=[*nets], help='networks')
    p.add_argument('--seeds', type=int, default=seeds, help=what)
    p.add_argument('--minutes', type=float, default=math.inf, help='start no run after so many minutes')
    p.add_argument('--workers', type=int, default=2, help='processes of one thread each')
    p.add_argument('--epochs', type=int, help='epochs of training, instead of the defaults')
    p.add_argument('--data', default='cifar10', help='cifar10, or digits for a trial')
    p.add_argument('--out', type=Path, default=Path(__file__).parent, help='folder of the tables')
    return p

def sparse_option(p): p.add_argument('--sparse', action='store_true', help='networks trained with a penalty on their norm scales')

def overrides(args): return (dict(epochs=args.epochs) if args.epochs else {}) | (dict(items=None) if args.data=='digits' else {})
