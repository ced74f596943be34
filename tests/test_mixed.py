"""Mixed, gated, tree and stochastic pooling: windows one by one in NumPy, PyTorch's poolings and convolutions, gradients of the paper's form, draws, sharing, dtypes, bad input."""
import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.autograd import gradcheck

from deepclustering.pooling import (GatedPool1d, GatedPool2d, GatedPool3d, MixedPool1d, MixedPool2d, MixedPool3d, StochasticPool1d, StochasticPool2d, StochasticPool3d, TreePool1d, TreePool2d,
                                    TreePool3d, expected_weights, gated_weights, gather_windows, max_weights, mean_weights, mixed_weights, pool_windows, replace_pooling, soft_pool1d,
                                    stochastic_weights, tree_weights, window_grid)

LAYERS = {1: (MixedPool1d, GatedPool1d, TreePool1d), 2: (MixedPool2d, GatedPool2d, TreePool2d), 3: (MixedPool3d, GatedPool3d, TreePool3d)}
STOCHASTIC = {1: StochasticPool1d, 2: StochasticPool2d, 3: StochasticPool3d}
LATTICE = [(K, s, p, d, ceil) for K, s, p, d, ceil in product((1, 2, 3), (1, 2), (0, 1), (1, 2), (False, True)) if p <= (d * (K - 1) + 1) // 2]


def normal(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
def sigmoid(t): return 1 / (1 + math.exp(-t))


def tree(x, leaves, gates, node=0):
    "Recursion over `(K,)` arrays."
    if node >= len(gates): return leaves[node - len(gates)] @ x
    s = sigmoid(gates[node] @ x)
    return s * tree(x, leaves, gates, 2 * node + 1) + (1 - s) * tree(x, leaves, gates, 2 * node + 2)


def by_loops(x, grid, one):
    "Window by window over `(batch, channels, *sizes)`; `one(values with 0 for nothing, inside, channel, window)`."
    x, dims = x.double().numpy(), len(grid.out)
    y = np.empty((*x.shape[:2], *grid.out))
    for b, c, *o in np.ndindex(y.shape):
        v, there = [], []
        for offset in np.ndindex(grid.kernel):
            z = tuple(s * i - p + d * k for s, i, p, d, k in zip(grid.stride, o, grid.padding, grid.dilation, offset))
            there.append(all(0 <= q < n for q, n in zip(z, x.shape[-dims:])))
            v.append(x[(b, c, *z)] if there[-1] else 0.)
        v, there = np.array(v), np.array(there)
        y[(b, c, *o)] = one(v, there, c, tuple(o)) if there.any() else -np.inf
    return torch.from_numpy(y)


def mix(a, v, there): return a * v[there].max() + (1 - a) * v[there].mean()


def randomised(layer, seed=0):
    layer = layer.double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters(): p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    return layer


@pytest.mark.parametrize("dims", (1, 2, 3))
def test_layers_against_loops(dims):
    x, arguments = normal(2, 3, *(6, 5, 4)[:dims]), ((2, 3, 2)[:dims], (1, 2, 2)[:dims], (1, 1, 0)[:dims], (2, 1, 1)[:dims], True)
    grid = window_grid(x.shape[2:], *arguments)
    Mixed, Gated, Tree = LAYERS[dims]
    for sharing, at in ((dict(), lambda c, o: (0, *(0,) * dims)), (dict(channels=3), lambda c, o: (c, *(0,) * dims)), (dict(size=grid.out), lambda c, o: (0, *o)), (dict(channels=3, size=grid.out), lambda c, o: (c, *o))):
        mixed, gated, deep = randomised(Mixed(*arguments, **sharing)), randomised(Gated(*arguments, **sharing)), randomised(Tree(*arguments, **sharing, levels=3))
        pick = lambda p, c, o: p.detach().numpy()[at(c, o)]
        torch.testing.assert_close(mixed(x), by_loops(x, grid, lambda v, t, c, o: mix(sigmoid(pick(mixed.logit, c, o)), v, t)))
        torch.testing.assert_close(gated(x), by_loops(x, grid, lambda v, t, c, o: mix(sigmoid(pick(gated.gate, c, o) @ v), v, t)))
        torch.testing.assert_close(deep(x), by_loops(x, grid, lambda v, t, c, o: tree(v, [pick(l, c, o) for l in deep.leaves], [pick(g, c, o) for g in deep.gates])))
        for layer in (mixed, gated, deep): torch.testing.assert_close(layer(x[0]), layer(x)[0]); assert layer(x[:0]).shape == (0, 3, *grid.out)


def test_lattice():
    x = normal(2, 2, 5, 4)
    gate = normal(3, 3)
    for K, s, p, d, ceil in LATTICE:
        if 4 + 2 * p < d * (K - 1) + 1: continue
        grid, w = window_grid((5, 4), K, s, p, d, ceil), gate.flatten()[:K * K]
        layer = GatedPool2d(K, s, p, d, ceil).double()
        with torch.no_grad(): layer.gate.copy_(w)
        torch.testing.assert_close(layer(x), by_loops(x, grid, lambda v, t, c, o: mix(sigmoid(w.numpy() @ v), v, t)))


def test_pytorchs_poolings():
    x = normal(2, 3, 7, 6)
    window = dict(kernel_size=(3, 2), stride=(2, 1), padding=1)
    for a in (0., .3, 1.): torch.testing.assert_close(pool_windows(x, mixed_weights(a), **window), a * F.max_pool2d(x, **window) + (1 - a) * F.avg_pool2d(x, **window, count_include_pad=False))
    for big, pool in ((40., F.max_pool2d(x, **window)), (-40., F.avg_pool2d(x, **window, count_include_pad=False))):
        layer = MixedPool2d(**window).double()
        with torch.no_grad(): layer.logit.fill_(big)
        torch.testing.assert_close(layer(x), pool)
    leaves = normal(4, 3, 1, 1, 6)
    torch.testing.assert_close(pool_windows(x, tree_weights(leaves, torch.zeros(3, 6)), (3, 2)), F.conv2d(x, leaves.mean(0).view(3, 1, 3, 2), stride=(3, 2), groups=3))


# --- identities -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_a_tree_of_depth_one_is_gated_pooling(seed):
    x, gate = normal(2, 3, 6, 6, seed=seed), normal(6, seed=seed + 9)
    values, inside = gather_windows(x, (3, 2), padding=1)
    both = torch.stack([max_weights(values, inside), mean_weights(values, inside)])
    torch.testing.assert_close(tree_weights(both, gate[None])(values, inside), gated_weights(gate)(values, inside))
    torch.testing.assert_close(gated_weights(torch.zeros(6))(values, inside), mixed_weights(.5)(values, inside))
    same = normal(6, seed=seed).expand(4, 6)                                       # equal leaves: the gates do not matter
    torch.testing.assert_close(tree_weights(same, normal(3, 6))(values, inside), tree_weights(same[:1], torch.zeros(0, 6))(values, inside))
    swapped, sign = both.flip(0), -gate                                            # a mirrored tree is the same tree
    torch.testing.assert_close(tree_weights(swapped, sign[None])(values, inside), tree_weights(both, gate[None])(values, inside))


def test_softpool_of_two_is_a_tree():
    x = normal(3, 2, 8)
    fork = lambda k: tree_weights(torch.eye(2, dtype=torch.float64), k * torch.tensor([[1., -1]], dtype=torch.float64))
    torch.testing.assert_close(pool_windows(x, fork(1), (2,)), soft_pool1d(x, 2))
    torch.testing.assert_close(pool_windows(x, fork(-1e6), (2,)), -F.max_pool1d(-x, 2))


# --- gradients --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", (2, 3))
def test_gradcheck(levels):
    x = normal(1, 2, 4, 3).requires_grad_()
    for layer in (MixedPool2d(2, 1, 1, channels=2), GatedPool2d(2, 1, 1, channels=2), TreePool2d(2, 1, 1, channels=2, levels=levels)):
        layer, names = randomised(layer), [n for n, _ in layer.named_parameters()]
        assert gradcheck(lambda t, *p: torch.func.functional_call(layer, dict(zip(names, p)), (t,)), (x, *(p.detach().requires_grad_() for p in layer.parameters())))


def test_the_gradients_written_out():
    "By the product rule, without autograd."
    x, g = normal(2, 4), normal(2, seed=1)
    gated, two = randomised(GatedPool1d(4)), randomised(TreePool1d(4))
    leaf = x[:, None].clone().requires_grad_()
    w = gated.gate.detach().flatten()
    got = torch.autograd.grad(gated(leaf).flatten(), (leaf, gated.gate), g)
    s = (x @ w).sigmoid()
    top, mean = x.max(1).values, x.mean(1)
    torch.testing.assert_close(got[1].flatten(), ((g * s * (1 - s) * (top - mean))[:, None] * x).sum(0))
    one_hot = F.one_hot(x.argmax(1), 4).double()
    torch.testing.assert_close(got[0][:, 0], g[:, None] * ((s * (1 - s) * (top - mean))[:, None] * w + s[:, None] * one_hot + (1 - s[:, None]) / 4))
    (v1, v2), (w,) = two.leaves.detach().flatten(1), two.gates.detach().flatten(1)
    got = torch.autograd.grad(two(leaf).flatten(), (leaf, two.leaves, two.gates), g)
    s = (x @ w).sigmoid()
    torch.testing.assert_close(got[1].flatten(1), torch.stack([((g * s)[:, None] * x).sum(0), ((g * (1 - s))[:, None] * x).sum(0)]))
    torch.testing.assert_close(got[2].flatten(), ((g * s * (1 - s) * (x @ (v1 - v2)))[:, None] * x).sum(0))
    torch.testing.assert_close(got[0][:, 0], g[:, None] * ((s * (1 - s) * (x @ (v1 - v2)))[:, None] * w + s[:, None] * v1 + (1 - s[:, None]) * v2))


def test_a_weight_of_zero_still_learns():
    layer = TreePool1d(2).double()
    with torch.no_grad(): layer.leaves.copy_(torch.eye(2).view(2, 1, 1, 2)); layer.gates.zero_()
    x = torch.tensor([[[2., 3]]], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), layer.leaves)[0].flatten(), torch.tensor([1, 1.5, 1, 1.5], dtype=torch.float64))
    w = torch.tensor([1., 0], dtype=torch.float64, requires_grad=True)
    y = pool_windows(torch.tensor([[[2., 3, 4, float("nan")]]], dtype=torch.float64), lambda values, inside: w.expand_as(values), (2,))
    torch.testing.assert_close(y.flatten(), torch.tensor([2., 4], dtype=torch.float64)); torch.testing.assert_close(torch.autograd.grad(y.sum(), w)[0], torch.tensor([6., 3], dtype=torch.float64))


# --- stochastic -------------------------------------------------------------------------------------------------------------

def test_draws_have_their_frequencies():
    x = torch.tensor([1., 0, 2, -3, 5]).expand(20_000, 5)
    inside = torch.tensor([True] * 5)
    counts = stochastic_weights(torch.Generator().manual_seed(0))(x, inside).sum(0)
    assert counts[1] == counts[3] == 0 and stats.chisquare(counts[[0, 2, 4]], 20_000 * np.array([1, 2, 5]) / 8).pvalue > 1e-3
    even = stochastic_weights(torch.Generator().manual_seed(1))(-x.abs(), torch.tensor([True, True, False, True, True])).sum(0)
    assert even[2] == 0 and stats.chisquare(even[[0, 1, 3, 4]]).pvalue > 1e-3


def test_expectation_is_the_mean_of_draws():
    x = normal(1, 2, 6, 6).relu()
    layer = StochasticPool2d(3, 2, 1)
    torch.manual_seed(0)
    drawn = torch.stack([layer(x) for _ in range(3000)])
    spread = drawn.std(0) / 3000 ** .5
    assert ((drawn.mean(0) - layer.eval()(x)).abs() <= 5 * spread + 1e-9).all()
    assert ((drawn[..., None] - gather_windows(x, (3, 3), 2, 1)[0]).abs().min(-1).values == 0).all()            # each is one of its window
    torch.testing.assert_close(StochasticPool2d(2).eval()(x.clamp(min=1e-9)), F.avg_pool2d(x ** 2, 2) / F.avg_pool2d(x.clamp(min=1e-9), 2), rtol=1e-6, atol=1e-8)


def test_draws_are_seeded_and_send_their_gradient_to_one():
    x = normal(2, 3, 6, 6).requires_grad_()
    layer = StochasticPool2d(2)
    torch.manual_seed(5); a = layer(x); torch.manual_seed(5); b = layer(x); c = layer(x)
    assert torch.equal(a, b) and not torch.equal(b, c)
    dx, = torch.autograd.grad(a.sum(), x)
    assert (gather_windows(dx, (2, 2))[0].sort(-1).values == torch.tensor([0., 0, 0, 1], dtype=torch.float64)).all()
    y = normal(1, 2, 4).abs().requires_grad_()
    assert gradcheck(StochasticPool1d(2).eval(), y)
    assert torch.equal(pool_windows(x, stochastic_weights(torch.Generator().manual_seed(2)), (2, 2)), pool_windows(x, stochastic_weights(torch.Generator().manual_seed(2)), (2, 2)))


# --- numbers ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_half_precision(dtype):
    x, eps = normal(2, 3, 8, 7, dtype=dtype) * 4, torch.finfo(dtype).eps
    for layer in (MixedPool2d(3, 2, 1), GatedPool2d(3, 2, 1), TreePool2d(3, 2, 1, levels=3), StochasticPool2d(3, 2, 1).eval()):
        y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), layer(x.double()), atol=16 * eps, rtol=4 * eps, check_dtype=False)
    big = torch.full((1, 1, 4), 6e4, dtype=torch.float32).to(dtype)
    assert MixedPool1d(4)(big).isfinite().all() and StochasticPool1d(4).eval()(big).isfinite().all()


def test_extremes():
    far = 1e4 * normal(1, 1, 4, dtype=torch.float32)
    for layer in (GatedPool1d(4), TreePool1d(4, levels=3)):
        with torch.no_grad():
            for p in layer.parameters(): p.fill_(100.)
        x = far.clone().requires_grad_()
        y = layer(x)
        assert y.isfinite().all() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    for layer in (MixedPool1d(2, 1, 1, 2), GatedPool1d(2, 1, 1, 2), TreePool1d(2, 1, 1, 2), StochasticPool1d(2, 1, 1, 2), StochasticPool1d(2, 1, 1, 2).eval()):
        assert layer(torch.ones(1, 1)).item() == -math.inf                         # a window that holds nothing, as in max pooling
    for L in (MixedPool2d, GatedPool2d, TreePool2d, StochasticPool2d): assert (L(2)(torch.zeros(1, 1, 4, 4)) == 0).all()


def test_parameters_and_sharing():
    count = lambda layer: sum(p.numel() for p in layer.parameters())
    assert [count(L(3)) for L in LAYERS[2]] == [1, 9, 27] and count(TreePool2d(3, levels=3)) == 63 and count(StochasticPool2d(3)) == 0
    shared = MixedPool2d(2)
    net = nn.Sequential(shared, nn.Conv2d(2, 2, 1), shared)
    net(normal(1, 2, 8, 8, dtype=torch.float32)).sum().backward()
    assert shared.logit.grad is not None and sum(p is shared.logit for p in net.parameters()) == 1
    fresh, old = TreePool2d(2, channels=2, levels=3), TreePool2d(2, channels=2, levels=3)
    fresh.load_state_dict(old.state_dict())
    assert torch.equal(*(layer(normal(1, 2, 8, 8, dtype=torch.float32)) for layer in (fresh, old))) and "parameters=56" in repr(old)


def test_replacing():
    for new in (MixedPool2d, GatedPool2d, TreePool2d, StochasticPool2d, partial(TreePool2d, levels=3)):
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2), ceil_mode=True))
        shape = net(normal(1, 1, 9, 8, dtype=torch.float32)).shape
        assert replace_pooling(net, nn.MaxPool2d, new)(normal(1, 1, 9, 8, dtype=torch.float32)).shape == shape
    assert len(net[1].leaves) == 4


# --- bad input --------------------------------------------------------------------------------------------------------------

MAP = torch.ones(1, 2, 5, 5)

@pytest.mark.parametrize("x, message", [(MAP.long(), "x must be a floating-point tensor, got torch.int64"), (MAP.numpy(), "got ndarray"), (MAP[0, 0], "x must have 3 or 4"), (MAP[..., :1], "kernel_size must fit"), (MAP[..., :0], "x must have at least one")])
def test_bad_maps(x, message):
    for layer in (*(L(2) for L in LAYERS[2]), StochasticPool2d(2)):
        with pytest.raises(ValueError, match=message): layer(x)


@pytest.mark.parametrize("bad, message", [(dict(channels=0), "channels must be at least 1"), (dict(channels=2.5), "channels must"), (dict(size=(2,)), "size must be 2"), (dict(size=(2, 0)), "size must be at least 1"), (dict(padding=2), "padding must"), (dict(stride=0), "stride must"), (dict(kernel_size=0), "kernel_size must")])
def test_bad_layers(bad, message):
    for L in LAYERS[2]:
        with pytest.raises(ValueError, match=message): L(**(dict(kernel_size=2) | bad))


def test_other_bad():
    for levels in (1, 9, 2.):
        with pytest.raises(ValueError, match="levels must"): TreePool2d(2, levels=levels)
    for layer in (GatedPool2d(2, channels=3), GatedPool2d(2, size=(3, 2))):
        with pytest.raises(ValueError, match=r"x must have the channels .* \(2, 2, 2\)"): layer(MAP)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_on_a_gpu(dtype):
    x, eps = normal(4, 8, 17, 15, dtype=dtype), torch.finfo(dtype).eps
    for layer in (MixedPool2d(3, 2, 1), GatedPool2d(3, 2, 1, channels=8), TreePool2d(3, 2, 1, levels=3), StochasticPool2d(3, 2, 1).eval()):
        want = layer(x.double())
        torch.testing.assert_close(layer.cuda()(x.cuda()).cpu().double(), want, atol=32 * eps, rtol=8 * eps, check_dtype=False)
    draw = StochasticPool2d(3, 2, 1)
    assert draw(x.cuda()).is_cuda
