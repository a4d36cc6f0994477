"Images per second in training on the CPU: the networks as they come, beside the same in PyTorch's plain layout and modules, and in bfloat16; what the spectral step adds to an epoch"
import time
from functools import partial
from statistics import median
import torch
from torch import nn
from torch.nn import functional as F
from spectral_nb.lr import LayerAllocator, group_layers, layer_groups
from spectral_nb.models import densenet40, vgg19
from common import begin, parser, table

class PlainDense(nn.Module):
    "DenseNet40 written out: norm, ReLU, convolution, concatenation"
    def __init__(self, n_out=10, growth=12, n=12):
        super().__init__()
        width, self.n, self.stem = 2*growth, n, nn.Conv2d(3, 2*growth, 3, padding=1, bias=False)
        self.norms, self.convs = nn.ModuleList(), nn.ModuleList()
        for b in range(3):
            for _ in range(n):
                self.norms.append(nn.BatchNorm2d(width)); self.convs.append(nn.Conv2d(width, growth, 3, padding=1, bias=False))
                width += growth
            self.norms.append(nn.BatchNorm2d(width))
            if b<2: self.convs.append(nn.Conv2d(width, width, 1, bias=False))
        self.fc = nn.Linear(width, n_out)

    def forward(self, x):
        x, convs = self.stem(x), iter(self.convs)
        for i,norm in enumerate(self.norms):
            y = F.relu(norm(x))
            if i==len(self.norms)-1: return self.fc(y.mean((2,3)))
            y = next(convs)(y)
            x = F.avg_pool2d(y, 2) if i%(self.n+1)==self.n else torch.cat([x, y], 1)

def compiled(make):
    model = make()
    model.compile()
    return model

NETWORKS = dict(vgg19=dict(plain=partial(vgg19, channels_last=False), spectral_nb=vgg19), densenet40=dict(plain=PlainDense, spectral_nb=densenet40))

EPOCH = 50_000 # training images of CIFAR-10

class Contestant:
    "A network in training on one batch, from given weights, perhaps in bfloat16"
    def __init__(self, make, weights, x, y, bf16):
        self.model, self.x, self.y, self.bf16, self.losses = make(), x, y, bf16, []
        with torch.no_grad():
            for p,w in zip(self.model.parameters(), weights, strict=True): p.copy_(w)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=.001, momentum=.9)

    def step(self, clock):
        "Seconds of forward, backward and update"
        start = clock()
        self.opt.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=self.bf16): loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.opt.step()
        self.losses.append(loss.item())
        return clock()-start

def weights_of(make):
    "Function that gives the same weights for each way of writing the network"
    torch.manual_seed(0)
    named = [(k, p.detach().clone()) for k,p in make().named_parameters()]
    grouped = [p for ends in (('stem.weight',), ('norm.weight', 'norm.bias'), ('conv.weight',), ('fc.weight', 'fc.bias')) for k,p in named if k.endswith(ends)]
    return lambda model: grouped if isinstance(model, PlainDense) else [p for _,p in named]

def compare(name, size, batch, rounds, clock, with_compile):
    "One row per contestant"
    make = NETWORKS[name] | dict(bfloat16=NETWORKS[name]['spectral_nb']) | (dict(compiled=lambda: compiled(NETWORKS[name]['spectral_nb'])) if with_compile else {})
    weights = weights_of(make['spectral_nb'])
    x, y = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    runs = {k: Contestant(f, weights(f()), x, y, k=='bfloat16') for k,f in make.items()}
    for r in runs.values(): r.step(clock)                                    # first calls
    spectral = spectral_step(make['spectral_nb'], rounds, clock)
    times = [{k: r.step(clock) for k,r in runs.items()} for _ in range(rounds)]
    for k,r in runs.items():
        gap = max(abs(a-b) for a,b in zip(r.losses, runs['plain'].losses))
        epoch = EPOCH/batch*median(t[k] for t in times)
        yield dict(network=name, size=size, contestant=k, images_per_s=EPOCH/epoch, by_plain=median(t['plain']/t[k] for t in times),
                   epoch_s=epoch, spectral_s=spectral, spectral_share=spectral/epoch, loss=r.losses[-1], largest_gap=gap)

def spectral_step(make, rounds, clock):
    "Seconds in which `SpectralLR` reads the spectra before an epoch"
    model, times = make(), []
    held = group_layers(model, layer_groups(model))
    for _ in range(rounds+1):
        start = clock()
        LayerAllocator().look(model, held, 0)
        times.append(clock()-start)
    return median(times[1:])                                                 # without the first call

def main():
    p = parser(__doc__, 5)
    p.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=list(NETWORKS))
    p.add_argument('--sizes', nargs='+', type=int, default=[32, 16], help='sides of the images (32 16)')
    p.add_argument('--batch', type=int, default=128, help='images per step (128)')
    p.add_argument('--cpu-time', action='store_true', help='count processor time instead of time: with one thread it is less spoilt by the work of others')
    p.add_argument('--compile', action='store_true', help='also run through torch.compile, which needs a C++ compiler')
    args = p.parse_args()
    begin(args)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"`by_plain` is how many times as fast as plain; `epoch_s` what the {EPOCH:,} images of CIFAR-10 take, `spectral_share` what reading the spectra before it adds")
    table((r for name in args.networks for size in args.sizes for r in compare(name, size, args.batch, args.repeats, clock, args.compile)), args.out/'train.csv')

if __name__=='__main__': main()
