"Parameter groups of every make, and the layers that they hold"
import warnings
from functools import partial
import pytest, torch
from torch import nn
from torchvision import models as tv
from spectral_nb.groups import group_layers, layer_groups
from spectral_nb.matrices import weight_layers
from spectral_nb.models import densenet40, vgg19

def encoder(): return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)
def vit(): return tv.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=7)

NETS = dict(vgg19=partial(vgg19, width=0.125), densenet40=partial(densenet40, growth=4, depth=16), resnet18=tv.resnet18, encoder=encoder, vit=vit,
            mobilenet=partial(tv.mobilenet_v2, width_mult=0.1), convnext=lambda: tv.ConvNeXt([tv.convnext.CNBlockConfig(8, 16, 1), tv.convnext.CNBlockConfig(16, None, 1)]))

def by_kind(net, ps):
    "Each parameter's last name apart: weights, biases, packed ones."
    names = {id(p): n.rpartition('.')[2] for n,p in net.named_parameters()}
    kinds = dict.fromkeys(names[id(p)] for p in ps)
    return [[p for p in ps if names[id(p)]==k] for k in kinds]

SPLITS = dict(decay    = lambda net, ps: [[p for p in ps if p.ndim>1], [p for p in ps if p.ndim<2]],
              kind     = by_kind,
              single   = lambda net, ps: [[p] for p in ps],
              backward = lambda net, ps: [ps[::-1]])

@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('name', NETS)
def test_a_layers_groups_however_split_are_its_own(name, split):
    "Every part of a layer's group is that layer's, and what belongs to no layer is nobody's."
    net = NETS[name]()
    groups = layer_groups(net)
    for order in (groups, groups[::-1]):
        parts = [(k, part) for k,ps in zip(group_layers(net, order), order) for part in SPLITS[split](net, ps) if part]
        assert group_layers(net, [part for _,part in parts])==[k for k,_ in parts]

@pytest.mark.parametrize('name', NETS)
def test_one_group_for_all_that_does_not_decay(name):
    "The usual two groups are an error; with the weights apart, the rest keeps the global rate and says so."
    net = NETS[name]()
    weights, others = [p for p in net.parameters() if p.ndim>1], [p for p in net.parameters() if p.ndim<2]
    with pytest.raises(ValueError, match=r'group 0 holds \d+ layers .* group by layer'): group_layers(net, [weights, others])
    with pytest.warns(UserWarning, match=f'group {len(weights)} holds biases or norms of .* layers'): held = group_layers(net, [[p] for p in weights] + [others])
    assert held[-1] is None and set(filter(None, held))==set(weight_layers(net))

def test_group_of_weights_with_foreign_parts():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    norms = [*net[1].parameters(), *net[3].parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert group_layers(net, [[*net[0].parameters()], [*net[2].parameters(), *norms], [*net[4].parameters()]])==['0', '2', '4']
    with pytest.raises(ValueError, match=r'group 0 holds 2 layers \(0, 2\)'): group_layers(net, [[net[0].weight, net[2].bias], [net[4].weight]])
    with pytest.warns(UserWarning, match=r'group 1 holds biases or norms of 2 layers \(0, 2\)'): assert group_layers(net, [[net[0].weight], norms])==['0', None]
    with pytest.warns(UserWarning, match='norms of 2 layers'): assert group_layers(net, [[net[0].weight], [net[2].bias, *net[1].parameters()]])==['0', None]
    assert group_layers(net, [[net[0].weight], [net[2].bias, *net[3].parameters()]])==['0', '2']

def test_groups_may_be_generators_and_foreign():
    net, other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
    assert group_layers(net, [net[0].parameters(), other.parameters(), net[1].parameters(), []])==['0', None, '1', None]
    with pytest.raises(ValueError, match='hold no layer of this Sequential'): group_layers(net, [other.parameters()])

class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.na, self.a, self.nb, self.b, self.out = nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2)
    def forward(self, x, y):
        assert x.shape==y.shape and x.abs().sum()>0                     # no graph
        return self.out(self.nb(self.a(x)) + self.na(self.b(y)))

@pytest.mark.parametrize('example', [(torch.ones(2, 4), torch.ones(2, 4)), [torch.ones(2, 4)]*2, dict(y=torch.ones(2, 4), x=torch.ones(2, 4))], ids=['tuple', 'list', 'dict'])
def test_examples_of_several_inputs(example):
    net = TwoInputs()
    names = {id(p): n for n,p in net.named_parameters()}
    groups = [[names[id(p)] for p in ps] for ps in layer_groups(net, example)]
    assert groups==[['a.weight', 'a.bias', 'nb.weight', 'nb.bias'], ['na.weight', 'na.bias', 'b.weight', 'b.bias'], ['out.weight', 'out.bias']]

WITHOUT = dict(meta=('on the meta device, so without values: load the weights', lambda: vgg19(width=0.125).to('meta')),
               part=('parameter 1.weight .* on the meta device', lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device='meta'))),
               lazy=('parameter 1.weight .* lazy, so without values: run a batch', lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))))

@pytest.mark.filterwarnings('ignore:Lazy modules')
@pytest.mark.parametrize('kind', WITHOUT)
def test_networks_without_values(kind):
    message, make = WITHOUT[kind]
    net = make()
    for f in (layer_groups, lambda net: group_layers(net, [[p] for p in net.parameters()])):
        with pytest.raises(ValueError, match=message): f(net)
