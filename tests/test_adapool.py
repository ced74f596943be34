"""AdaPool: windows one by one in NumPy, limits, Euler and shift identities, gradients, transposes, dtypes, zero windows, layers, bad input."""
import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from deepclustering.pooling import (AdaPool1d, AdaPool2d, AdaPool3d, ada_pool1d, ada_pool2d, ada_pool3d, ada_unpool1d, ada_unpool2d, ada_unpool3d, dice_vector_weights, dice_weights,
                                    gather_windows, pool_windows, replace_pooling, soft_pool1d, soft_pool2d, soft_pool3d, window_grid)

POOLS, SOFT, BACK = ({1: a, 2: b, 3: c} for a, b, c in ((ada_pool1d, ada_pool2d, ada_pool3d), (soft_pool1d, soft_pool2d, soft_pool3d), (ada_unpool1d, ada_unpool2d, ada_unpool3d)))
LATTICE = [(K, s, p, d, ceil) for K, s, p, d, ceil in product((1, 2, 3), (1, 2), (0, 1), (1, 2), (False, True)) if p <= (d * (K - 1) + 1) // 2]


def normal(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loops(x, grid, beta, vectors=False):
    "Deliberately dumb: image by image, window by window, place by place, `(batch, channels, *sizes)`; `beta` `(channels, *out)` or a number."
    x, dims = x.double().numpy(), len(grid.out)
    y, beta = np.full((*x.shape[:2], *grid.out), -np.inf), np.broadcast_to(np.asarray(beta, dtype=float), (x.shape[1], *grid.out))
    for b, o in product(range(len(x)), np.ndindex(grid.out)):
        places = [tuple(s * i - p + d * k for s, i, p, d, k in zip(grid.stride, o, grid.padding, grid.dilation, offset)) for offset in np.ndindex(grid.kernel)]
        places = [z for z in places if all(0 <= q < n for q, n in zip(z, x.shape[-dims:]))]
        if not places: continue
        a = np.array([x[(b, slice(None), *z)] for z in places])                   # (n, channels)
        m = a.sum(0) / len(a)
        for c in range(x.shape[1]):
            s = []
            for v in a:
                u, w = (v, m) if vectors else (v[c:c + 1], m[c:c + 1])
                bottom = sum(u * u) + sum(w * w)
                s.append(2 * abs(sum(u * w)) / bottom if bottom else 1.)
            D, M = np.exp(s), np.exp(a[:, c] - a[:, c].max())
            share = beta[(c, *o)]
            y[(b, c, *o)] = sum((share * D / D.sum() + (1 - share) * M / M.sum()) * a[:, c])
    return torch.from_numpy(y)


@pytest.mark.parametrize("vectors", (False, True))
def test_lattice_against_loops(vectors):
    x = normal(2, 3, 5, 4)
    x[0, :, :2] = 0                                                                # windows of zeros, and partly zeros
    for K, s, p, d, ceil in LATTICE:
        if 4 + 2 * p < d * (K - 1) + 1: continue
        grid = window_grid((5, 4), K, s, p, d, ceil)
        beta = torch.rand(3, *grid.out, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(ada_pool2d(x, K, s, p, d, ceil, beta=beta, vectors=vectors), by_loops(x, grid, beta.numpy(), vectors))


@pytest.mark.parametrize("dims", (1, 2, 3))
def test_dimensions_limits_and_weights(dims):
    x, arguments = normal(2, 3, *(6, 5, 4)[:dims]), ((2, 3, 2)[:dims], (1, 2, 2)[:dims], (1, 1, 0)[:dims], (2, 1, 1)[:dims], True)
    grid = window_grid(x.shape[2:], *arguments)
    pool = POOLS[dims]
    torch.testing.assert_close(pool(x, *arguments, beta=.3), by_loops(x, grid, .3))
    torch.testing.assert_close(pool(x, *arguments, beta=.3, vectors=True)[0], pool(x[0], *arguments, beta=.3, vectors=True))
    assert torch.equal(pool(x, *arguments, beta=0), SOFT[dims](x, *arguments))
    torch.testing.assert_close(pool(x, *arguments, beta=1), pool_windows(x, dice_weights, *arguments))
    torch.testing.assert_close(pool(x, *arguments, beta=1, vectors=True), pool_windows(x, dice_vector_weights, *arguments))
    torch.testing.assert_close(pool(x[:, :1], *arguments, vectors=True), pool(x[:, :1], *arguments))
    y, w = pool(x, *arguments, beta=.3, return_weights=True)
    values, inside = gather_windows(x, *arguments)
    torch.testing.assert_close((w * values).sum(-1), y)
    torch.testing.assert_close(w.sum(-1), torch.ones_like(y))
    assert (w[..., ~inside] == 0).all() and (w[..., inside] > 0).all()
    assert pool(x[:0], *arguments).shape == (0, *y.shape[1:])
    # the way back: the transpose, and a mean kept wherever windows do not overlap
    g = normal(*y.shape, seed=1)
    there = BACK[dims](g, w, x.shape[2:], *arguments, keep="sum")
    torch.testing.assert_close((there * x).sum(), (g * y).sum())
    apart = (2,) * dims
    y, w = pool(x, apart, return_weights=True)
    again = BACK[dims](y, w, x.shape[2:], apart)
    torch.testing.assert_close(gather_windows(again, apart)[0].mean(-1), y)


@pytest.mark.parametrize("vectors", (False, True))
def test_gradients(vectors):
    x, beta = normal(1, 2, 4, 3).requires_grad_(), torch.rand(2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda t, b: ada_pool2d(t, (3, 2), (1, 2), 1, beta=b, vectors=vectors), (x, beta))
    assert gradgradcheck(lambda t, b: ada_pool2d(t, 2, beta=b, vectors=vectors), (x, beta))
    y = ada_pool2d(x, 2, beta=beta, vectors=vectors)
    want = (ada_pool2d(x, 2, beta=1, vectors=vectors) - soft_pool2d(x, 2)).sum((0, 2, 3))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), beta)[0].flatten(), want)


def test_gradients_of_the_way_back():
    y, w = normal(2, 3).requires_grad_(), normal(2, 3, 2, seed=1).requires_grad_()
    for keep in ("mean", "sum"): assert gradcheck(lambda a, b: ada_unpool1d(a, b, (4,), 2, 1, keep=keep), (y, w))


@pytest.mark.parametrize("seed", range(3))
def test_identities(seed):
    x = normal(2, 3, 6, 4, seed=seed)
    dice = partial(ada_pool2d, kernel_size=(3, 2), beta=1)
    for vectors in (False, True):
        torch.testing.assert_close(dice(-3 * x, vectors=vectors), -3 * dice(x, vectors=vectors))              # no unit
        leaf = x.clone().requires_grad_()
        dx, = torch.autograd.grad(dice(leaf, vectors=vectors).sum(), leaf)
        torch.testing.assert_close((x * dx).sum(), dice(x, vectors=vectors).sum())                             # Euler
        torch.testing.assert_close(dice(x + 1e9, vectors=vectors) - 1e9, F.avg_pool2d(x, (3, 2)), atol=1e-5, rtol=0)
        torch.testing.assert_close(dice(x.flip(2), vectors=vectors), dice(x, vectors=vectors).flip(2))
    torch.testing.assert_close(dice(x * torch.tensor([1., 10, -100]).view(3, 1, 1)), dice(x) * torch.tensor([1., 10, -100]).view(3, 1, 1))   # a channel each; vectors mix
    w = dice_weights(*gather_windows(x, (3, 2)))
    assert (w >= 1 / (1 + 5 * math.e) - 1e-12).all() and (w <= math.e / (math.e + 5) + 1e-12).all()
    r = x.abs() + .1
    s = 1 / torch.cosh((r / r.mean(-1, keepdim=True)).log())
    torch.testing.assert_close(dice_weights(r, torch.ones(4, dtype=torch.bool)), s.softmax(-1))
    assert torch.equal(ada_pool2d(x, 1, beta=.4), x)
    same = torch.full((1, 1, 4, 4), -2.5, dtype=torch.float64)
    torch.testing.assert_close(ada_pool2d(same, 2, beta=.4), same[..., :2, :2])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_half_precision(dtype):
    x = normal(2, 5, 8, 7, dtype=dtype) * 4
    eps = torch.finfo(dtype).eps
    for vectors in (False, True):
        leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        y, want = (ada_pool2d(t, 3, 2, 1, vectors=vectors) for t in (leaf, wide))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), want.detach(), atol=8 * eps, rtol=2 * eps)
        torch.testing.assert_close(*(torch.autograd.grad(a.sum(), b)[0].double() for a, b in ((y, leaf), (want, wide))), atol=32 * eps, rtol=4 * eps)
    big = torch.tensor([[3e4, 2e4, -3e4, 1e-3]], dtype=torch.float32).to(dtype)                                # squares overflow half precision
    assert ada_pool1d(big, 4).isfinite().all()
    w = ada_pool1d(x[0, 0], 2, return_weights=True)[1]
    assert w.dtype == torch.float32 and ada_unpool1d(ada_pool1d(x[0, 0], 2), w, (7,), 2).dtype == dtype


def test_tiny_and_huge_numbers():
    x = normal(1, 8, dtype=torch.float32)
    for scale in (1e-38, 1e30):                                                                                # squares vanish or overflow in float32
        torch.testing.assert_close(ada_pool1d((x.double() * scale).float(), 4, beta=1).double() / scale, ada_pool1d(x, 4, beta=1).double(), rtol=1e-3, atol=1e-3)


def test_windows_of_zeros():
    x = torch.zeros(1, 2, 4, 4, requires_grad=True)
    for vectors in (False, True):
        y, w = ada_pool2d(x, 2, vectors=vectors, return_weights=True)
        assert (y == 0).all() and (w == .25).all()
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, .25))
    relu = normal(4, 3, 8, 8, seed=2).relu().requires_grad_()
    dx, = torch.autograd.grad(ada_pool2d(relu, 2).sum(), relu)
    assert dx.isfinite().all() and (gather_windows(relu, (2, 2))[0].sum(-1) == 0).any()


def test_nan_and_infinity_stay_in_their_windows():
    x = normal(1, 2, 6, 6)
    clean = ada_pool2d(x, 2)
    x[0, 0, 0, 0], x[0, 1, 5, 5] = math.nan, math.inf
    y = ada_pool2d(x, 2)
    assert y.isnan().nonzero().tolist() == [[0, 0, 0, 0], [0, 1, 2, 2]]
    assert torch.equal(y[~y.isnan()], clean[~y.isnan()])
    beside = torch.ones(1, 1, requires_grad=True)                                                              # a window that holds nothing, as in max pooling
    beta = torch.tensor(.5, requires_grad=True)
    y = ada_pool1d(beside, 2, 1, 1, 2, beta=beta)
    assert y.item() == F.max_pool1d(torch.ones(1, 1, 1), 2, 1, 1, 2).item() == -math.inf
    assert all(g.item() == 0 for g in torch.autograd.grad(y.sum(), (beside, beta)))


def test_layouts_and_views():
    x = normal(2, 3, 6, 5, dtype=torch.float32)
    want = ada_pool2d(x, 2)
    assert torch.equal(ada_pool2d(x.to(memory_format=torch.channels_last), 2), want)
    assert torch.equal(ada_pool2d(torch.stack([x, -x], -1)[..., 0], 2), want)
    before = x.clone()
    y, w = ada_pool2d(x, 2, return_weights=True)
    ada_unpool2d(y, w, (6, 5), 2)
    assert torch.equal(x, before)


# --- the way back -----------------------------------------------------------------------------------------------------------

def test_way_back_by_hand():
    y, w = torch.tensor([8., 4.]), torch.tensor([[.25, .75], [.5, .5]])
    assert ada_unpool1d(y, w, (4,), 2).tolist() == [4, 12, 4, 4] and ada_unpool1d(y, w, (4,), 2, keep="sum").tolist() == [2, 6, 2, 2]
    assert ada_unpool1d(y, w, (3,), 2, 1).tolist() == [4, 8, 4] and ada_unpool1d(y, w, (3,), 2, 1, keep="sum").tolist() == [2, 8, 2]      # (12 + 4) / 2 and 6 + 2
    assert ada_unpool1d(y, w, (5,), 2).tolist() == [4, 12, 4, 4, 0]                                            # in no window
    outside = torch.tensor([[0., 1], [1, 0]])
    assert ada_unpool1d(y, outside, (2,), 2, 2, 1).tolist() == [8, 4]                                          # one inside each: no factor


def test_equal_weights_copy():
    x = normal(2, 3, 6, 8)
    y = F.avg_pool2d(x, 2)
    torch.testing.assert_close(ada_unpool2d(y, torch.full((*y.shape, 4), .25, dtype=y.dtype), (6, 8), 2), F.interpolate(y, scale_factor=2))
    ones = torch.ones(2, 3, 3, 4, dtype=torch.float64)
    inside = gather_windows(x, (3, 3), 2, 1)[1]
    w = (inside / inside.sum(-1, keepdim=True)).expand(2, 3, 3, 4, 9)
    torch.testing.assert_close(ada_unpool2d(ones, w, (6, 8), 3, 2, 1), torch.ones_like(x))


def test_softpools_weights_hold_the_picture():
    x = normal(2, 3, 8)
    y, w = ada_pool1d(x, 4, beta=0, return_weights=True)
    torch.testing.assert_close(y[..., None] - (w * w.log()).sum(-1, keepdim=True) + w.log(), gather_windows(x, (4,))[0])


# --- layers -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dims", (1, 2, 3))
def test_layers(dims):
    Layer, x = {1: AdaPool1d, 2: AdaPool2d, 3: AdaPool3d}[dims], normal(2, 3, *(4,) * dims, dtype=torch.float32)
    for options, shape in ((dict(), (1,) * (dims + 1)), (dict(channels=3), (3, *(1,) * dims)), (dict(size=(2,) * dims), (1, *(2,) * dims)), (dict(channels=3, size=(2,) * dims), (3, *(2,) * dims))):
        layer = Layer(2, **options, beta=.2)
        assert tuple(layer.logit.shape) == shape and [tuple(p.shape) for p in layer.parameters()] == [shape]
        torch.testing.assert_close(layer(x), POOLS[dims](x, 2, beta=.2))
        layer(x).sum().backward()
        assert layer.logit.grad.abs().sum() > 0
    with torch.no_grad(): layer.logit.fill_(30); assert (layer.beta <= 1).all() and layer(x).isfinite().all()
    layer.reset_parameters()
    torch.testing.assert_close(layer.beta, torch.full(shape, .2))
    fresh = Layer(2, **options); fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x)) and "vectors=False" in repr(layer)


def test_replacing():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2), ceil_mode=True)).eval()
    x = normal(1, 1, 9, 8, dtype=torch.float32)
    shape = net(x).shape
    replace_pooling(net, nn.MaxPool2d, AdaPool2d)
    assert net(x).shape == shape and not net[1].training
    torch.testing.assert_close(net(x), ada_pool2d(net[0](x), (3, 2), (2, 1), (1, 0), (1, 2), True))
    replace_pooling(net, AdaPool2d, partial(AdaPool2d, channels=2, vectors=True))
    assert net[1].vectors and tuple(net[1].logit.shape) == (2, 1, 1)


# --- bad input --------------------------------------------------------------------------------------------------------------

MAP = torch.ones(1, 2, 5, 5)

@pytest.mark.parametrize("change, message", [
    (dict(x=MAP.long()), "x must be a floating-point tensor"), (dict(x=MAP[0, 0]), "x must have 3 or 4"), (dict(kernel_size=6), "kernel_size must fit"), (dict(padding=2), "padding must be at most half"),
    (dict(stride=0), "stride must be at least 1"), (dict(beta=-.1), "beta must lie between 0 and 1, got -0.1"), (dict(beta=math.nan), "beta must lie between"), (dict(beta=torch.ones(3, 1, 1)), r"beta must be .* \(2, 2, 2\)"),
    (dict(beta=torch.ones(1, 2, 2, 2)), "beta must be"), (dict(beta=torch.ones(3)), "beta must be"), (dict(beta=torch.ones(2, dtype=torch.int32)), "beta must be .* torch.int32")])
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message): ada_pool2d(**(dict(x=MAP, kernel_size=2) | change))


@pytest.mark.parametrize("change, message", [
    (dict(keep="total"), "keep must be"), (dict(size=(5,)), "size must be 2"), (dict(size=(8, 5)), "y must have"), (dict(size=(1, 1)), "kernel_size must fit"), (dict(y=MAP), "y must have"),
    (dict(weights=torch.ones(1, 2, 2, 2, 5)), "weights must have shape"), (dict(weights=torch.ones(2, 2, 4)), "weights must have shape")])
def test_bad_way_back(change, message):
    with pytest.raises(ValueError, match=message): ada_unpool2d(**(dict(y=torch.ones(1, 2, 2, 2), weights=torch.ones(1, 2, 2, 2, 4), size=(5, 5), kernel_size=2) | change))


@pytest.mark.parametrize("bad, message", [(dict(beta=0), "beta"), (dict(beta=1), "beta"), (dict(beta=2), "beta"), (dict(channels=0), "channels must"), (dict(channels=2.), "channels must"), (dict(size=(2,)), "size must be 2"),
                                          (dict(size=(2, 0)), "size must"), (dict(padding=2), "padding"), (dict(kernel_size=0), "kernel_size")])
def test_bad_layers(bad, message):
    with pytest.raises(ValueError, match=message): AdaPool2d(**(dict(kernel_size=2) | bad))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_on_a_gpu(dtype):
    eps, x = torch.finfo(dtype).eps, normal(4, 8, 17, 15, dtype=dtype)
    for vectors in (False, True):
        leaf, wide = x.cuda().requires_grad_(), x.double().requires_grad_()
        y, want = (ada_pool2d(t, 3, 2, 1, vectors=vectors) for t in (leaf, wide))
        torch.testing.assert_close(y.cpu().double(), want, atol=8 * eps, rtol=2 * eps)
        torch.testing.assert_close(*(torch.autograd.grad(a.sum(), b)[0].cpu().double() for a, b in ((y, leaf), (want, wide))), atol=32 * eps, rtol=4 * eps)
    layer = AdaPool2d(2, channels=8).cuda()
    layer(x.cuda().float()).sum().backward()
    assert layer.logit.grad.is_cuda
