"KS fits and norms against weightwatcher 0.7.7, layer by layer, on random and on trained networks."
import contextlib, io, numpy as np, pytest, torch, weightwatcher
from sklearn.datasets import load_digits
from torch.nn import functional as F
from spectral_nb.metrics import analyze
from spectral_nb.models import densenet40, vgg19

COLUMNS = ['alpha', 'D', 'xmin', 'sigma', 'num_evals', 'num_pl_spikes', 'norm', 'spectral_norm', 'log_norm', 'log_spectral_norm',
           'stable_rank', 'alpha_weighted', 'log_alpha_norm', 'entropy']


def digits(size):
    x, y = (torch.tensor(o) for o in load_digits(return_X_y=True))
    x = F.interpolate((x.float()/16).view(-1, 1, 8, 8), size=size, mode='bilinear').expand(-1, 3, -1, -1)
    return x, y


def train(model, steps, size, bs=32):
    x, y = digits(size)
    opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(steps):
        i = torch.randint(len(x), (bs,))
        opt.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        opt.step()
    return model


def weightwatcher_details(model):
    with contextlib.redirect_stdout(io.StringIO()): df = weightwatcher.WeightWatcher(model=model).analyze()
    return df.assign(name=df.longname)


@pytest.mark.parametrize('steps', [0, 30])
@pytest.mark.parametrize('make,size', [(vgg19, 16), (densenet40, 8)])
def test_equals_weightwatcher(make, size, steps):
    model = train(make(), steps, size)
    ours = analyze(model, fit='weightwatcher', progress=False)
    theirs = weightwatcher_details(model)
    assert ours.name.tolist() == theirs.name.tolist()
    for c in COLUMNS: np.testing.assert_allclose(ours[c], theirs[c].astype(float), rtol=1e-3, atol=1e-6, err_msg=c)
