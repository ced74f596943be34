"""Power means, GeM and graph aggregation: SciPy, mpmath, PyTorch Geometric and loops as oracles; bounds, monotony, homogeneity; dtypes, layouts, zeros, masks, bad input."""
import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special, stats
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from deepclustering.pooling import (GGeM, GeMPool2d, GeneralizedConv, LSEPool1d, LSEPool2d, LSEPool3d, MessageNorm, NormPool, ResidualBlock, gem_pool2d, ggem, log_mean_exp, lse_pool1d, lse_pool2d,
                                    lse_pool3d, norm_pool, power_mean, power_mean_aggregation, replace_pooling, softmax_aggregation)

EXPONENTS = (-math.inf, -40., -3., -1., -1e-3, -1e-8, 0., 1e-12, 1e-4, .3, 1., 2., 7.5, 300., math.inf)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def positive(*shape, seed=0, dtype=torch.float64): return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + .05).to(dtype)


def exactly(values, p, weights=None):
    "The power mean by its definition, in 60 digits."
    with mpmath.workdps(60):
        v = [mpmath.mpf(float(t)) for t in values]
        w = [mpmath.mpf(float(t)) for t in (weights if weights is not None else [1] * len(v))]
        w = [a / sum(w) for a in w]
        if math.isinf(p): return float((max if p > 0 else min)(t for t, a in zip(v, w) if a))
        if p == 0: return float(mpmath.exp(sum(a * mpmath.log(t) for t, a in zip(v, w))))
        return float(sum(a * t ** mpmath.mpf(p) for t, a in zip(v, w)) ** (1 / mpmath.mpf(p)))


# --- values -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p", EXPONENTS)
def test_against_60_digits(p):
    x = positive(4, 9)
    want = torch.tensor([exactly(r, p) for r in x], dtype=torch.float64)
    torch.testing.assert_close(power_mean(x, p), want, rtol=4e-15, atol=0)
    torch.testing.assert_close(power_mean(x.float() * 1e30, p).double() / 1e30, torch.tensor([exactly(r, p) for r in x.float()], dtype=torch.float64), rtol=3e-6, atol=0)
    w = positive(9, seed=1)
    torch.testing.assert_close(power_mean(x, p, weights=w), torch.tensor([exactly(r, p, w) for r in x], dtype=torch.float64), rtol=4e-15, atol=0)


def test_named_means_of_scipy():
    x = positive(5, 8)
    for p, f in ((1, np.mean), (0, stats.gmean), (-1, stats.hmean), (math.inf, np.max), (-math.inf, np.min)): np.testing.assert_allclose(power_mean(x, p), f(x.numpy(), axis=1), rtol=1e-14)
    for p in (-7., .5, 2., 11.): np.testing.assert_allclose(power_mean(x, p), stats.pmean(x.numpy(), p, axis=1), rtol=1e-13)
    y = x * 40 - 20
    for t in (-3., .25, 1., 50.): np.testing.assert_allclose(log_mean_exp(y, t), (special.logsumexp(t * y.numpy(), axis=1) - math.log(8)) / t, rtol=1e-13)
    torch.testing.assert_close(log_mean_exp(y, 0.), y.mean(1)); assert torch.equal(log_mean_exp(y, math.inf), y.amax(1)) and torch.equal(log_mean_exp(y, -math.inf), y.amin(1))
    torch.testing.assert_close(log_mean_exp(y * 1e4, 2.), (torch.logsumexp(2e4 * y, 1) - math.log(8)) / 2)


def test_a_quasi_arithmetic_family():
    "ln M_p(e^x) is the log-mean-exp, at every exponent."
    x = positive(6, 5) * 6 - 3
    for p in EXPONENTS: torch.testing.assert_close(power_mean(x.exp(), p).log(), log_mean_exp(x, p), rtol=1e-12, atol=1e-13)


def test_properties():
    x = positive(200, 6) * torch.logspace(-3, 3, 200, dtype=torch.float64)[:, None]
    means = torch.stack([power_mean(x, p) for p in EXPONENTS])
    assert (means.diff(dim=0) >= -1e-14 * means[1:]).all()                                           # monotone
    assert (means >= x.amin(1) * (1 - 1e-14)).all() and (means <= x.amax(1) * (1 + 1e-14)).all()      # between the extremes
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    for p, m in zip(EXPONENTS, means):
        torch.testing.assert_close(power_mean(3 * x, p), 3 * m)                                      # of degree 1
        torch.testing.assert_close(power_mean(x.repeat(1, 4), p), m)                                 # duplicates change nothing
        torch.testing.assert_close(power_mean(x[:, order], p), m)
        torch.testing.assert_close(power_mean(x[:, :1].expand(-1, 5), p), x[:, 0])                   # of equals: the item
        torch.testing.assert_close(power_mean(1 / x, -p), 1 / m)
    sums = norm_pool(x.T.repeat(2, 1), torch.zeros(12, dtype=torch.int64), 1, 0)
    torch.testing.assert_close(sums[0], 2 * x.sum(1))                                                # a sum notices


def test_weights_are_repetitions_and_masks_hide_anything():
    x, times = positive(3, 5), torch.tensor([2, 0, 1, 3, 1])
    for p in EXPONENTS:
        want = power_mean(x.repeat_interleave(times, 1), p)
        dirty = x.clone(); dirty[:, 1] = torch.tensor([math.nan, -1., math.inf], dtype=x.dtype)
        torch.testing.assert_close(power_mean(dirty, p, weights=times.double() / 3), want)
        torch.testing.assert_close(power_mean(dirty, p, weights=times > 0), power_mean(x[:, times > 0], p))
        leaf = dirty.clone().requires_grad_()
        dx, = torch.autograd.grad(power_mean(leaf, p, weights=times > 0).sum(), leaf)
        assert dx.isfinite().all() and (dx[:, 1] == 0).all()
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    leaf, p = x.clone().requires_grad_(), torch.tensor(2., dtype=torch.float64, requires_grad=True)
    y = power_mean(leaf, p, weights=nothing)
    assert torch.equal(y, torch.zeros_like(y)) and all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(y.sum(), (leaf, p)))


def test_nan_stays_in_its_set():
    x = torch.tensor([[1., math.nan], [1, 2]])
    for p in EXPONENTS: assert power_mean(x, p).isnan().tolist() == [True, False]
    assert power_mean(torch.tensor([1., math.inf]), 2.) == math.inf and power_mean(torch.tensor([1., math.inf]), -1.) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision(dtype):
    x = (positive(4, 33) * (6e4 if dtype == torch.float16 else 1e20)).to(dtype)
    eps = torch.finfo(dtype).eps
    for p in (-3., 0., 1e-3, 3., 20.):
        leaf = x.clone().requires_grad_()
        y = power_mean(leaf, p)
        dx, = torch.autograd.grad(y.sum(), leaf)
        wide = x.double().requires_grad_()
        Y = power_mean(wide, p)
        assert y.dtype == dx.dtype == dtype
        torch.testing.assert_close(y.double(), Y, rtol=max(eps, 2e-6), atol=0)
        torch.testing.assert_close(dx.double(), torch.autograd.grad(Y.sum(), wide)[0], rtol=2 * max(eps, 1e-6), atol=1e-7 if dtype == torch.float16 else 1e-12)


def test_dimensions():
    x = positive(2, 3, 4, 5)
    for dim in (0, 1, 2, 3, -1, (0, 2), (-1, 1), [0, 1, 2, 3]):
        dims = dim if isinstance(dim, int) else tuple(dim)
        torch.testing.assert_close(power_mean(x, 3., dim), x.pow(3).mean(dims) ** (1 / 3))
        torch.testing.assert_close(power_mean(x, 3., dim, keepdim=True), x.pow(3).mean(dims, keepdim=True) ** (1 / 3))
    got = power_mean(x.transpose(1, 3), torch.tensor([1., 2, 3]), 2)                                   # not contiguous; an exponent for each of the last dimension
    torch.testing.assert_close(got, torch.stack([power_mean(x[:, c], float(c + 1), 1) for c in range(3)], 2))


# --- gradients ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("f", (power_mean, log_mean_exp), ids=lambda f: f.__name__)
def test_gradcheck_and_the_switch_to_the_series(f):
    x = positive(3, 4).requires_grad_()
    for p in (-5., -1e-3, -3e-4, 0., 1e-7, 3e-4, 1e-3, 1., 6.):
        assert gradcheck(f, (x, torch.tensor(p, dtype=torch.float64, requires_grad=True)))
    assert gradcheck(lambda x, p: f(x, p, 0, weights=positive(3, 1, seed=2)), (x, positive(4, seed=3).requires_grad_()))
    grid = torch.linspace(-2e-3, 2e-3, 4001, dtype=torch.float64).requires_grad_()
    slopes, = torch.autograd.grad(f(x[0].detach().expand(4001, 4), grid).sum(), grid)
    assert (slopes.diff(n=2).abs() < 1e-10).all()                                                     # no step where the formula changes


def test_float32_slope_in_the_exponent():
    x = positive(16)
    for p in np.concatenate([-np.logspace(-7, 1, 25), np.logspace(-7, 1, 25)]):
        slopes = []
        for dtype in (torch.float32, torch.float64):
            leaf = torch.tensor(float(np.float32(p)), dtype=dtype, requires_grad=True)
            slopes.append(float(torch.autograd.grad(power_mean(x.float().to(dtype), leaf), leaf)[0]))
        assert abs(slopes[0] / slopes[1] - 1) < 3e-5, p


def test_a_second_derivative_is_refused():
    x = positive(4).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"): torch.autograd.grad(power_mean(x, 2.), x, create_graph=True)


def test_relus_zeros_do_not_make_nan():
    x = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).relu().requires_grad_()
    for p in (1., 1.5, 3., -1., -5.):
        leaf = torch.tensor(p, requires_grad=True)
        assert all(g.isfinite().all() for g in torch.autograd.grad(power_mean(x, leaf).sum(), (x, leaf)))


# --- segments -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p", EXPONENTS)
def test_segments_are_sets(p):
    x, index = positive(40, 3), torch.randint(0, 7, (40,), generator=torch.Generator().manual_seed(1))
    index[index == 4] = 5
    leaf, q = x.clone().requires_grad_(), torch.tensor(p, dtype=torch.float64, requires_grad=True)
    y = power_mean_aggregation(leaf, index, q, 9)
    assert y.shape == (9, 3) and (y[[4, 7, 8]] == 0).all()
    want = torch.zeros_like(y)
    other, r = x.clone().requires_grad_(), torch.tensor(p, dtype=torch.float64, requires_grad=True)
    for k in index.unique(): want = want.index_put((k,), power_mean(other[index == k], r, 0))
    torch.testing.assert_close(y, want)
    g = positive(9, 3, seed=5)
    for a, b in zip(torch.autograd.grad((y * g).sum(), (leaf, q)), torch.autograd.grad((want * g).sum(), (other, r))): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_segments_of_every_shape():
    index = torch.tensor([0, 1, 0], dtype=torch.int32)
    for shape in ((3,), (3, 2), (3, 2, 4), (3, 0)): assert power_mean_aggregation(positive(*shape), index, 2., 2).shape == (2, *shape[1:])
    assert power_mean_aggregation(positive(0, 2), index[:0], 2., 3).tolist() == [[0, 0]] * 3
    per_set = torch.tensor([[1.], [-1]], dtype=torch.float64)
    x = positive(3, 2)
    torch.testing.assert_close(power_mean_aggregation(x, index, per_set), torch.stack([x[[0, 2]].mean(0), x[1]]))
    torch.testing.assert_close(power_mean_aggregation(x, index, 2., weights=torch.tensor([3., 1, 1]))[0], ((3 * x[0] ** 2 + x[2] ** 2) / 4).sqrt())


def test_pytorch_geometric():
    aggr = pytest.importorskip("torch_geometric.nn.aggr")
    from torch_geometric.nn.norm import MessageNorm as Theirs
    x, index = positive(50, 4, dtype=torch.float32), torch.randint(0, 8, (50,), generator=torch.Generator().manual_seed(2))
    for p in (.5, 2., 5.):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        mine, q = power_mean_aggregation(a, index, torch.tensor([p] * 4), 8), None
        theirs = aggr.PowerMeanAggregation(p, learn=True, channels=4, clamp_min=1e-12, clamp_max=1e9)
        y = theirs(b, index, dim_size=8)
        torch.testing.assert_close(mine, y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(mine.sum(), a)[0], torch.autograd.grad(y.sum(), b)[0], rtol=1e-4, atol=1e-5)
    for t in (-1., .3, 4.): torch.testing.assert_close(softmax_aggregation(x - .5, index, t, 8), aggr.SoftmaxAggregation(t)(x - .5, index, dim_size=8))
    h, m = positive(8, 4, seed=3, dtype=torch.float32) - .5, positive(8, 4, seed=4, dtype=torch.float32) - .5
    torch.testing.assert_close(MessageNorm()(h, m), Theirs(True)(h, m))
    capped = aggr.PowerMeanAggregation(3., learn=True)(torch.tensor([[50.]]), torch.tensor([0]))      # why we wrote our own
    assert abs(capped.item() - 100 ** (1 / 3)) < 1e-3 and abs(power_mean_aggregation(torch.tensor([[50.]]), torch.tensor([0]), 3.).item() - 50) < 1e-4


# --- GeM ----------------------------------------------------------------------------------------------------------------

def test_gem_is_scaled_lp_pooling():
    x = positive(2, 4, 9, 7)
    for p in (1., 2.5, 6.):
        for K, s in ((2, None), (3, 1), ((3, 2), (2, 1))):
            size = K * K if isinstance(K, int) else math.prod(K)
            torch.testing.assert_close(gem_pool2d(x, p, K, s), F.lp_pool2d(x, p, K, s) / size ** (1 / p))
        torch.testing.assert_close(gem_pool2d(x, p), F.avg_pool2d(x.clamp(min=1e-6) ** p, (9, 7)) ** (1 / p))        # the authors' formula
        torch.testing.assert_close(gem_pool2d(x[0], p), gem_pool2d(x, p)[0])
    y = x - .5                                                                                       # negatives are raised to eps
    torch.testing.assert_close(gem_pool2d(y, 2.), F.avg_pool2d(y.clamp(min=1e-6) ** 2, (9, 7)).sqrt())
    torch.testing.assert_close(gem_pool2d(y, 2., 3, 2, 1, 2, True, eps=.1), gem_pool2d(y.clamp(min=.1), 2., 3, 2, 1, 2, True))
    torch.testing.assert_close(gem_pool2d(x, math.inf, 3, 2, 1, 2, True), F.max_pool2d(x, 3, 2, 1, 2, True))
    assert torch.equal(gem_pool2d(x[:0], 3., 2), x[:0, :, :4, :3])


def test_groups():
    x, p = positive(2, 6, 5, 5), torch.tensor([1., 4, -2], dtype=torch.float64)
    want = torch.cat([gem_pool2d(x[:, 2 * g:2 * g + 2], p[g], 2) for g in range(3)], 1)
    torch.testing.assert_close(gem_pool2d(x, p, 2), want)
    tokens = x.flatten(2).mT
    torch.testing.assert_close(ggem(tokens, p), gem_pool2d(x, p).flatten(1))
    torch.testing.assert_close(ggem(tokens, torch.tensor([2.], dtype=torch.float64)), ggem(tokens, 2.))
    for groups in (1, 2, 6):
        layer = GGeM(groups, p=2.)
        layer(tokens.float()).sum().backward()
        assert layer.p.shape == layer.p.grad.shape == (groups,) and (layer.p.grad > 0).all()           # the curve rises
    whole, windows = GeMPool2d(groups=2).double(), GeMPool2d(2, groups=2)
    torch.testing.assert_close(whole(x), gem_pool2d(x, 3.)); torch.testing.assert_close(windows(x.float()), gem_pool2d(x.float(), 3., 2))
    windows.load_state_dict(whole.state_dict())


# --- LSE pooling --------------------------------------------------------------------------------------------------------

def signed(*shape, seed=0, dtype=torch.float64): return (6 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def unfolded(x, beta, K, s, p, d):
    "LSE pooling by `F.unfold` and `torch.logsumexp`; what lies in the padding is -inf."
    windows = F.unfold(F.pad(x, (p,) * 4, value=-math.inf), K, d, 0, s).unflatten(1, (x.shape[1], K * K))
    y = ((beta * windows).logsumexp(2) - windows.isfinite().sum(2).to(x).log()) / beta
    return y.unflatten(2, F.max_pool2d(x, K, s, p, d).shape[-2:])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("K, s, p, d", ((2, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 2), (1, 2, 0, 1), (4, 3, 2, 1)))
def test_lse_against_unfold(K, s, p, d, seed):
    x = signed(2, 3, 11, 8, seed=seed)
    for beta in (.1, 1., 7.):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = lse_pool2d(a, K, beta, s, p, d), unfolded(b, beta, K, s, p, d)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        g = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.float64)
        torch.testing.assert_close(torch.autograd.grad(got, a, g)[0], torch.autograd.grad(want, b, g)[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(lse_pool2d(x + 1e3, K, beta, s, p, d), got + 1e3, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse_pool2d(x, K, math.inf, s, p, d), F.max_pool2d(x, K, s, p, d), rtol=0, atol=0)
    torch.testing.assert_close(lse_pool2d(x, K, 1e4, s, p, d), F.max_pool2d(x, K, s, p, d), rtol=0, atol=math.log(K * K) / 1e4 + 1e-12)  # the bound, and rounding
    if d == 1:
        mean = F.avg_pool2d(x, K, s, p, count_include_pad=False)
        for beta in (1e-9, 1e-300, torch.tensor(0.)): torch.testing.assert_close(lse_pool2d(x, K, beta, s, p), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse_pool2d(x, K, .5, s, p, d, True), lse_pool2d(x.mT, K, .5, s, p, d, True).mT)


def test_lse_in_one_two_and_three_dimensions():
    x = signed(2, 3, 4, 5, 7)
    torch.testing.assert_close(lse_pool3d(x, (1, 2, 3), 2., (1, 1, 2), (0, 1, 1)), torch.stack([lse_pool2d(x[:, :, i], (2, 3), 2., (1, 2), 1) for i in range(4)], 2))
    torch.testing.assert_close(lse_pool2d(x[0], (1, 3), 2., (1, 2)), lse_pool1d(x[0].flatten(0, 1), 3, 2., 2).unflatten(0, (3, 4)))
    torch.testing.assert_close(lse_pool3d(x, (4, 5, 7), .3).flatten(), ((.3 * x).flatten(2).logsumexp(2) - math.log(140)).flatten() / .3)
    for size in (0, 1): assert lse_pool2d(x[:size, 0], 2).shape == (size, 4, 2, 3)


def test_lse_at_the_ends_of_every_dtype():
    for dtype in (*DTYPES, torch.float64):
        top = torch.finfo(dtype).max
        x = torch.tensor([[top, top, -top, -top, top, -top, 0, 0]], dtype=dtype).requires_grad_()
        for beta in (1., .01, 300.):
            y = lse_pool1d(x, 2, beta)
            below = torch.tensor(top - math.log(2) / beta, dtype=torch.float64).to(dtype).item()
            assert y.dtype == dtype and y.isfinite().all() and y[0].tolist() == [top, -top, below, 0]
            dx, = torch.autograd.grad(y.sum(), x)
            assert dx[0].tolist() == [.5, .5, .5, .5, 1, 0, .5, .5]
        z = signed(2, 3, 8, 8).to(dtype)
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        torch.testing.assert_close(lse_pool2d(z, 3, 2., 1, 1).double(), unfolded(z.double(), 2., 3, 1, 1, 1), rtol=torch.finfo(dtype).eps, atol=8 * eps)
        torch.testing.assert_close(lse_pool2d(z.to(memory_format=torch.channels_last), 3), lse_pool2d(z, 3), rtol=0, atol=0)


def test_lse_of_infinities_and_nan():
    inf, nan = math.inf, math.nan
    x = torch.tensor([[-inf, 2., -inf, -inf, inf, 1, nan, 1, 3, 3]], dtype=torch.float64).requires_grad_()
    y = lse_pool1d(x, 2, 2.)
    torch.testing.assert_close(y, torch.tensor([[2 - math.log(2) / 2, -inf, inf, nan, 3]], dtype=torch.float64), equal_nan=True)
    for create in (False, True):
        dx, = torch.autograd.grad(y.sum(), x, create_graph=create, retain_graph=True)
        assert dx[0, [0, 1, 8, 9]].tolist() == [0, 1, .5, .5] and dx[0, :6].isfinite().all() and dx[0, 6].isnan()


def test_lse_gradients():
    x, beta = signed(1, 4, 4, 3, seed=1).requires_grad_(), torch.tensor([.7, 3.], dtype=torch.float64, requires_grad=True)
    def f(x, b): return lse_pool2d(x / 6, 2, b, 1, 1)
    assert gradcheck(f, (x, beta)) and gradgradcheck(f, (x, beta))
    for b in (-2., 0., 1e-7, 1e-3, 1., 40.):                                                          # across the switch to the series
        scalar = torch.tensor(b, dtype=torch.float64, requires_grad=True)
        assert gradcheck(f, (x, scalar)) and gradgradcheck(f, (x, scalar), atol=1e-4)
    step = 1e-5                                                                                       # by hand, not by gradcheck
    slope, = torch.autograd.grad(f(x, beta).sum(), x, create_graph=True)
    second, = torch.autograd.grad(slope[0, 0, 1, 1], x)
    moved = []
    for sign in (1, -1):
        other = x.detach().clone(); other[0, 0, 1, 2] += sign * step
        moved.append(torch.autograd.grad(f(other.requires_grad_(), beta).sum(), other)[0][0, 0, 1, 1])
    torch.testing.assert_close(second[0, 0, 1, 2], (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-9)
    once, = torch.autograd.grad(f(x, beta).sum(), x)
    torch.testing.assert_close(once, slope, rtol=1e-13, atol=0)                                       # both ways of the backward pass
    window = signed(1, 9).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(lse_pool1d(window, 9).sum(), window)[0], window.detach().softmax(1))
    t = torch.tensor(math.inf, dtype=torch.float64, requires_grad=True)                               # also at the end of the curve
    once, again = (torch.autograd.grad(log_mean_exp(x.flatten(1), t).sum(), (x, t), create_graph=c) for c in (False, True))
    for a, b in zip(once, again): torch.testing.assert_close(a, b.detach(), rtol=0, atol=0)


def test_lse_groups_and_layers():
    x, beta = signed(2, 6, 5, 5), torch.tensor([.5, 4, 2], dtype=torch.float64)
    torch.testing.assert_close(lse_pool2d(x, 2, beta), torch.cat([lse_pool2d(x[:, 2 * g:2 * g + 2], 2, float(beta[g])) for g in range(3)], 1))
    torch.testing.assert_close(lse_pool2d(x[0], 2, beta), lse_pool2d(x, 2, beta)[0])
    for layer, old, shape in ((LSEPool1d, nn.MaxPool1d, (2, 6, 9)), (LSEPool2d, nn.MaxPool2d, (2, 6, 9, 8)), (LSEPool3d, nn.MaxPool3d, (2, 6, 9, 8, 7))):
        net = replace_pooling(nn.Sequential(old(3, 2, 1, ceil_mode=True)), old, layer)
        z = signed(*shape, dtype=torch.float32)
        y = net(z)
        assert y.shape == old(3, 2, 1, ceil_mode=True)(z).shape
        y.square().sum().backward()
        assert net[0].beta.grad.isfinite().all() and net[0].beta.grad.abs().sum() > 0
        one = layer(3, beta=2., groups=6, learn=False)
        assert one.beta.tolist() == [2.] * 6 and not one.beta.requires_grad and "groups=6" in repr(one)
        big = layer(3, beta=1e6, learn=False)(z)
        torch.testing.assert_close(big, old(3)(z), rtol=0, atol=1e-4)


# --- graphs -------------------------------------------------------------------------------------------------------------

def test_norm_pool_by_its_definition():
    x, index = positive(30, 2) - .5, torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(3))
    for p, q in ((1, 0), (1, 1), (2, .5), (-1.5, 1), (-1, -.5), (6, 2)):
        want = torch.stack([(x[index == k].abs().pow(p).sum(0) / (index == k).sum() ** q).pow(1 / p) for k in range(4)])
        torch.testing.assert_close(norm_pool(x, index, p, q, eps=None), want)
    both = NormPool().double()(x, index)
    torch.testing.assert_close(both[:, :2], norm_pool(x, index, 1, .5)); torch.testing.assert_close(both[:, 2:], norm_pool(x, index, -1, .5))


def test_permuted_nodes_and_edges():
    "A graph network does not see the order."
    torch.manual_seed(0)
    x, edges = torch.randn(12, 6), torch.randint(0, 12, (2, 40))
    to, shuffled = torch.randperm(12), torch.randperm(40)
    moved = torch.empty_like(x); moved[to] = x
    for aggregation in ("softmax", "power", "mean", "max"):
        block = ResidualBlock(6, GeneralizedConv(6, aggregation, 2.))
        want = block(x, edges)
        torch.testing.assert_close(block(moved, to[edges][:, shuffled])[to], want, rtol=1e-4, atol=1e-5)
        want.sum().backward()
        assert all(q.grad is not None and q.grad.isfinite().all() for q in block.parameters())
        assert block(x, edges[:, :0]).isfinite().all()


@pytest.mark.parametrize("call, says", (
    (lambda: power_mean(np.ones(3), 1), "x must be a floating-point tensor"), (lambda: power_mean(torch.ones(3), True), "p must be a real"), (lambda: power_mean(torch.ones(3), 1j), "p must be a real"),
    (lambda: power_mean(torch.tensor([1., -1]), 2.), "x must not be negative"), (lambda: power_mean(torch.ones(2, 3), 1, (0, 0)), "dim must name"), (lambda: power_mean(torch.ones(2, 3), 1, weights=torch.ones(2)), "weights must broadcast"),
    (lambda: power_mean(torch.ones(3), 1, weights=torch.ones(2, 3)), "weights must broadcast"), (lambda: power_mean(torch.ones(3), 1, weights=torch.tensor([1., math.nan, 1])), "weights must be finite"),
    (lambda: power_mean(torch.ones(3), 1, eps=-1.), "eps must be a positive"), (lambda: log_mean_exp(torch.ones(3), torch.ones(2)), "t must be a number or broadcast"),
    (lambda: power_mean_aggregation(torch.ones(3, 2), torch.tensor([0, 1]), 1.), "x must have one row per entry of index"), (lambda: power_mean_aggregation(torch.ones(2), torch.tensor([0, 3]), 1., 2), "index must be at least 0"),
    (lambda: power_mean_aggregation(torch.tensor(1.), torch.tensor(0), 1.), "x must have one row"), (lambda: gem_pool2d(torch.ones(1, 3, 4, 4), torch.ones(2)), "divides the 3 channels"), (lambda: gem_pool2d(torch.ones(1, 1, 2, 2), 3., 5), "kernel_size must fit"),
    (lambda: GGeM(0), "groups must be at least 1"), (lambda: GeMPool2d(p=math.inf), "p must be a finite"), (lambda: ggem(torch.ones(1, 2, 3), mask=torch.ones(1, 2)), "mask must be Boolean"),
    (lambda: norm_pool(torch.ones(2, 1), torch.zeros(2, dtype=torch.int64), 0., 1), "p must not be 0"), (lambda: softmax_aggregation(torch.ones(2, 1), torch.zeros(3, dtype=torch.int64)), "index must have one label"),
    (lambda: lse_pool2d(torch.ones(1, 2, 2, dtype=torch.int64), 2), "x must be a floating-point tensor"), (lambda: lse_pool2d(np.ones((1, 2, 2)), 2), "x must be a floating-point tensor"), (lambda: lse_pool3d(torch.ones(2, 2, 2), 2), "x must have 4 or 5"),
    (lambda: lse_pool1d(torch.ones(1, 4), 2, 0), "beta must be a positive"), (lambda: lse_pool1d(torch.ones(1, 4), 2, math.nan), "beta must be a positive"), (lambda: lse_pool1d(torch.ones(1, 4), 2, True), "beta must be a positive"),
    (lambda: lse_pool1d(torch.ones(1, 4), 2, torch.tensor(1j)), "beta must hold real"), (lambda: lse_pool1d(torch.ones(3, 4), 2, torch.ones(2)), "beta must be a number or a vector whose length divides the 3"), (lambda: lse_pool2d(torch.ones(1, 4, 4), (2, 2, 2)), "kernel_size must be a whole number or 2"),
    (lambda: lse_pool2d(torch.ones(1, 4, 4), 2, padding=2), "padding must be at most half"), (lambda: lse_pool2d(torch.ones(1, 4, 4), 5), "kernel_size must fit"), (lambda: LSEPool2d(2, beta=0.), "beta must be positive"), (lambda: LSEPool2d(2, beta=math.inf), "beta must be a finite"),
    (lambda: LSEPool2d(2, groups=0), "groups must be at least 1"), (lambda: LSEPool3d((2, 2)), "kernel_size must be a whole number or 3"),
    (lambda: GeneralizedConv(0), "dim must be at least 1"), (lambda: GeneralizedConv(2, "sum"), "aggregation must be"),
))
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says): call()


def test_gradients_reach_every_exponent():
    "Through a whole small network."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), GeMPool2d(2, groups=4), nn.Conv2d(4, 8, 3), nn.ReLU(), GeMPool2d(groups=2), nn.Flatten(), nn.Linear(8, 2))
    net(torch.randn(5, 1, 12, 12)).square().sum().backward()
    assert all(q.grad.isfinite().all() and q.grad.abs().sum() > 0 for q in net.parameters())


def test_one_number_in_a_tuple_is_for_both_dimensions():
    "As in `lse_pool2d` and torch: not a pooling of the last dimension alone."
    x = torch.rand(1, 2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + .1
    for pool in (gem_pool2d, lse_pool2d): assert torch.equal(pool(x, kernel_size=(2,)), pool(x, kernel_size=2))
