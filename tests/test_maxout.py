"""Maxout: NumPy loops and convolutions as oracles, gradients, dtypes, layouts; dropout's average by enumeration; bad input."""
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from deepclustering.pooling import Maxout, Maxout2d, channel_max_pool, geometric_mean, submodel_predictions


def normal(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- the maximum over channels -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, dim", (((3, 12), 1), ((12,), 0), ((12,), -1), ((2, 12, 5), 1), ((2, 12, 4, 3), -3), ((4, 3, 12), -1), ((0, 12), 1)))
@pytest.mark.parametrize("k", (1, 2, 3, 12))
def test_loop_over_units(shape, dim, k):
    x = normal(*shape)
    want = np.stack([x.numpy().take(range(i * k, i * k + k), axis=dim).max(axis=dim) for i in range(12 // k)], axis=dim % x.dim())
    np.testing.assert_array_equal(channel_max_pool(x, k, dim), want)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.int64))
def test_a_maximum_is_exact_in_every_dtype(dtype):
    x = (normal(4, 6) * 9).to(dtype)
    assert channel_max_pool(x, 3).dtype == dtype and torch.equal(channel_max_pool(x, 3), x.view(4, 2, 3).amax(-1))


def test_layouts():
    x = normal(2, 6, 4, 5)
    for odd in (x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1), normal(2, 12, 4, 5)[:, ::2]): assert torch.equal(channel_max_pool(odd, 2), channel_max_pool(odd.contiguous(), 2))


def test_gradients_go_to_the_winner_and_are_shared_by_ties():
    x = normal(3, 6).requires_grad_()
    assert gradcheck(lambda x: channel_max_pool(x, 3), x) and gradgradcheck(lambda x: channel_max_pool(x, 3), x)
    g, = torch.autograd.grad(channel_max_pool(x, 3).sum(), x)
    assert torch.equal(g.view(3, 2, 3).argmax(-1), x.view(3, 2, 3).argmax(-1)) and torch.equal(g.sum(), torch.tensor(6.).double())
    tied = torch.tensor([[1., 1, 0]], requires_grad=True)
    assert torch.autograd.grad(channel_max_pool(tied, 3).sum(), tied)[0].tolist() == [[.5, .5, 0]]


def test_nan_stays_in_its_unit():
    x = torch.zeros(1, 6); x[0, 1] = float("nan")
    assert channel_max_pool(x, 3).isnan().tolist() == [[True, False]]


# --- layers --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("k", (1, 2, 5))
def test_linear_layer_by_loops(k, bias):
    layer, x = Maxout(3, 4, k, bias).double(), normal(2, 7, 3)
    W, b = layer.affine.weight.detach().numpy(), layer.affine.bias.detach().numpy() if bias else np.zeros(4 * k)
    want = np.array([[[max(W[i * k + j] @ v + b[i * k + j] for j in range(k)) for i in range(4)] for v in part] for part in x.numpy()])
    np.testing.assert_allclose(layer(x).detach(), want, atol=1e-13)
    assert f"k={k}" in repr(layer)


def test_convolution_by_patches():
    layer, x = Maxout2d(2, 3, 3, 4, stride=2, padding=1).double(), normal(2, 2, 7, 6)
    linear = Maxout(18, 3, 4).double()
    linear.affine.load_state_dict({"weight": layer.affine.weight.flatten(1), "bias": layer.affine.bias})
    want = linear(F.unfold(x, 3, padding=1, stride=2).transpose(1, 2)).transpose(1, 2).view(2, 3, 4, 3)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x[1]), want[1])
    assert "k=4" in repr(layer)


def test_a_unit_is_convex_and_positively_homogeneous():
    unit = Maxout(5, 3, 6).double()
    a, b, t = normal(200, 5), normal(200, 5, seed=1), torch.rand(200, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert (unit(t * a + (1 - t) * b) <= t * unit(a) + (1 - t) * unit(b) + 1e-12).all()
    free = Maxout(5, 3, 6, bias=False).double()
    torch.testing.assert_close(free(3 * a), 3 * free(a))


def test_state_and_compile_free_round_trip():
    a, b = Maxout2d(1, 2, 3), Maxout2d(1, 2, 3)
    b.load_state_dict(a.state_dict())
    x = normal(1, 1, 5, 5, dtype=torch.float32)
    assert torch.equal(a(x), b(x)) and sum(p.numel() for p in a.parameters()) == 2 * 2 * (9 + 1)


# --- dropout's average ---------------------------------------------------------------------------------------------------------

def test_drawn_masks_converge_to_the_enumerated_mean():
    torch.manual_seed(0)
    first, last, x = Maxout(4, 3, 3).double(), nn.Linear(3, 3).double(), normal(3, 4)
    masks = torch.tensor(list(product((0., 2.), repeat=7)), dtype=torch.float64)
    log_p = torch.stack([last(first(x * m[:4]) * m[4:]).log_softmax(-1) for m in masks]).detach()
    product_of = log_p.exp().prod(0) ** (1 / len(masks))
    want = product_of / product_of.sum(-1, keepdim=True)
    torch.testing.assert_close(geometric_mean(log_p).exp(), want)
    net = nn.Sequential(nn.Dropout(.5), first, nn.Dropout(.5), last)
    drawn = submodel_predictions(net, x, 4000)
    error = (drawn.mean(0) - log_p.mean(0)).abs() / (drawn.std(0) / 4000 ** .5)
    assert error.max() < 5 and drawn.shape == (4000, 3, 3)
    torch.testing.assert_close(drawn.exp().sum(-1), torch.ones(4000, 3, dtype=torch.float64))


def test_single_pass_is_exact_without_bends():
    for p in (.2, .5, .7):
        linear, x = nn.Linear(5, 3).double(), normal(2, 5)
        masks = torch.tensor(list(product((0., 1.), repeat=5)), dtype=torch.float64)
        weight = torch.where(masks == 1, 1 - p, p).prod(1)[:, None, None]
        mean = (weight * torch.stack([linear(x * m / (1 - p)).log_softmax(-1) for m in masks])).sum(0).log_softmax(-1)
        torch.testing.assert_close(mean, linear(x).log_softmax(-1))


def test_the_network_and_the_generators_are_left_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(.5), nn.Linear(4, 2))
    net[1].eval()
    before, state, x = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state(), normal(6, 3, dtype=torch.float32)
    a, b, c = submodel_predictions(net, x, 3), submodel_predictions(net, x, 3), submodel_predictions(net, x, 3, seed=1)
    assert torch.equal(a, b) and not torch.equal(a, c) and not a.requires_grad and torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net] == [True, False, True, True] and net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    class Breaks(nn.Module):
        def __init__(self): super().__init__(); self.d = nn.Dropout(.5)
        def forward(self, x): raise RuntimeError("no")
    bad = Breaks()
    with pytest.raises(RuntimeError): submodel_predictions(bad, x, 1)
    assert bad.training and bad.d.training


# --- bad input -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, named", (
    (lambda: channel_max_pool(torch.zeros(2, 5), 2), "multiple of k=2"), (lambda: channel_max_pool(torch.zeros(2, 4), 0), "k must be"), (lambda: channel_max_pool(torch.zeros(2, 4), 2., 1), "k must be"), (lambda: channel_max_pool(torch.zeros(4), 2, 1), "dim must be"),
    (lambda: channel_max_pool(torch.zeros(4), 2, -2), "dim must be"), (lambda: Maxout(3, 2, 0), "k must be"), (lambda: Maxout(0, 2), "in_features"), (lambda: Maxout(3, 0), "out_features"), (lambda: Maxout2d(3, 0, 3), "out_channels"), (lambda: Maxout2d(3, 1, 3, 0), "k must be"),
    (lambda: submodel_predictions(nn.Linear(2, 2), torch.zeros(1, 2), 3), "net must have an active dropout"), (lambda: submodel_predictions(nn.Dropout(0), torch.zeros(1, 2), 3), "net must have an active dropout"),
    (lambda: submodel_predictions(nn.Dropout(.5), torch.zeros(1, 2), 0), "n_masks"), (lambda: submodel_predictions(nn.Dropout(.5), torch.zeros(1, 2), 1, -1), "seed"), (lambda: geometric_mean(torch.zeros(2, 3)), "log_p must be"), (lambda: geometric_mean(torch.zeros(0, 2, 3)), "log_p must be")))
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named): call()
