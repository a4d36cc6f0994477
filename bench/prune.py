"Inference of slim networks against what their multiply-adds promise, also with widths in steps of 16, beside selection in a full trunk and torch-pruning; seconds that pruning takes"
import math, time
from copy import deepcopy
from statistics import median
import torch
from torch import nn
from spectral_nb.models import densenet40, macs, vgg19
from spectral_nb.prune import prune
from common import begin, parser, table

ARCHS = dict(vgg19=vgg19, densenet40=densenet40)
POINTS = dict(vgg19=(.5, .7), densenet40=(.4, .6))

def network(arch):
    "Random weights, scales that differ, as after training for sparsity, and the statistics of noise"
    torch.manual_seed(0)
    model = ARCHS[arch]()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms: nn.init.uniform_(m.weight); nn.init.normal_(m.bias, std=.1); m.momentum = 1.
    with torch.no_grad(): model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()

class Select(nn.Module):
    "What a norm becomes when its channels are selected from a trunk of full width, as in Network Slimming's channel_selection"
    def __init__(self, norm, idx):
        super().__init__()
        self.norm = nn.BatchNorm2d(len(idx)).to(norm.weight.device)
        self.register_buffer('idx', idx)
        self.norm.load_state_dict({k: v if v.ndim==0 else v[idx] for k,v in norm.state_dict().items()})
    def forward(self, x): return self.norm(x.index_select(1, self.idx))

def selecting(model, report):
    "`model` with a selection before each norm and convolutions cut on their inputs; every layer still writes all it did"
    model = deepcopy(model)
    units = list(report.keep.items())
    for i,(u,idx) in enumerate(units):
        if u.dim==1: norm, layer = u.norm, model.get_submodule(u.layer)                # DenseNet: the unit's own layer reads
        else:                                                                          # VGG: the norm selects, the next layer reads
            after = units[i+1][0].layer if i+1<len(units) else 'classifier'
            norm, layer = u.norm, model.get_submodule(after)
        layer.weight = nn.Parameter(layer.weight.detach().index_select(1, idx).contiguous(memory_format=torch.channels_last if layer.weight.ndim==4 else torch.contiguous_format))
        if isinstance(layer, nn.Conv2d): layer.in_channels = len(idx)
        model.set_submodule(norm, Select(model.get_submodule(norm), idx))
    return model.eval()

def by_torch_pruning(model, x, target):
    "The same share of the channels by torch-pruning alone: uniform, by size of the weights, its own graph"
    import torch_pruning as tp
    copy = deepcopy(model)
    last = copy.classifier if hasattr(copy, 'classifier') else copy.head.fc
    tp.pruner.MagnitudePruner(copy, x[:1], importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=target, ignored_layers=[last]).step()
    return copy.eval()

def seconds(model, x):
    "Seconds of the second of two batches in a row: the first brings the weights into the caches, where the others have been in between"
    with torch.inference_mode():
        model(x)
        start = time.perf_counter()
        model(x)
        return time.perf_counter()-start

def points(repeats, batch, size):
    "One row per contestant; `off` is how far its outputs are from those of the masked network, where they should agree"
    for arch,targets in POINTS.items():
        model = network(arch)
        x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        for target in targets:
            took = []
            for _ in range(3):
                start = time.perf_counter()
                r = prune(model, x[:1], target)
                took.append(time.perf_counter()-start)
            even = prune(model, x[:1], target, round_to=16)
            nets = dict(full=model, slim=r.model, slim_by_16=even.model, select=selecting(model, r), torch_pruning=by_torch_pruning(model, x, target))
            masked = dict(slim=r.masked, slim_by_16=even.masked, select=r.masked)
            rounds = [{k: seconds(m, x) for k,m in nets.items()} for _ in range(repeats)]
            for k,m in nets.items():
                less, gain = macs(model, x[:1])/macs(m, x[:1]), median(o['full']/o[k] for o in rounds)
                with torch.inference_mode(): off = (m(x[:8])-masked[k](x[:8])).abs().max().item() if k in masked else math.nan
                yield dict(network=arch, removed=target, contestant=k, seconds=median(o[k] for o in rounds), fewer_flops=less, speed_up=gain, speed_up_by_flops=gain/less,
                           prune_s=median(took) if k=='slim' else math.nan, off=off)

def main():
    p = parser(__doc__, 9)
    p.add_argument('--batch', type=int, default=64, help='images per batch (64)')
    p.add_argument('--size', type=int, default=32, help='pixels a side (32)')
    args = p.parse_args()
    begin(args)
    table(points(args.repeats, args.batch, args.size), args.out/'prune.csv')

if __name__=='__main__': main()
