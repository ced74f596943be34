"""SoftPool and the windows: PyTorch's own pooling and loops in NumPy over a lattice of windows, gradients, layouts, dtypes, NaN, bad input; the kernels in the interpreter and compiled."""
import logging
import math
import os
import resource
from itertools import product

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: each test file has a process of its own

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from deepclustering.core.aggregate import segment_softmax_sum
from deepclustering.pooling import (SoftPool1d, SoftPool2d, SoftPool3d, gather_windows, max_weights, mean_weights, pool_windows, power_weights, replace_pooling, soft_pool1d, soft_pool2d, soft_pool3d,
                                    soft_weights, window_grid)
from deepclustering.pooling.windows import _soft_windows, _soft_windows_gradient, _spread, _soft

POOLS = {1: soft_pool1d, 2: soft_pool2d, 3: soft_pool3d}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LATTICE = [(K, s, p, d, ceil) for K, s, p, d, ceil in product((1, 2, 3), (1, 2, 3), (0, 1), (1, 2), (False, True)) if p <= (d * (K - 1) + 1) // 2]


def normal(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loops(x, grid):
    "Deliberately dumb: window by window in NumPy, over `(..., *sizes)`; y and its gradient for ones."
    x, dims = x.double().numpy(), len(grid.out)
    y, dx = np.full((*x.shape[:-dims], *grid.out), -np.inf), np.zeros_like(x)
    for plane in np.ndindex(x.shape[:-dims]):
        for o in np.ndindex(grid.out):
            places = [tuple(s * i - p + d * k for s, i, p, d, k in zip(grid.stride, o, grid.padding, grid.dilation, offset)) for offset in np.ndindex(grid.kernel)]
            places = [z for z in places if all(0 <= q < n for q, n in zip(z, x.shape[-dims:]))]
            if not places: continue
            v = np.array([x[plane + z] for z in places])
            w = np.exp(v - v.max()); w /= w.sum()
            y[plane + o] = w @ v
            for z, share in zip(places, w * (1 + v - w @ v)): dx[plane + z] += share
    return torch.from_numpy(y), torch.from_numpy(dx)


# --- which windows there are ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", (1, 4, 7))
def test_number_of_windows_is_pytorchs(n):
    for K, s, p, d, ceil in LATTICE:
        try: want = F.max_pool1d(torch.zeros(1, n), K, s, p, d, ceil).shape[-1]
        except RuntimeError:
            with pytest.raises(ValueError): window_grid((n,), K, s, p, d, ceil)
            continue
        assert window_grid((n,), K, s, p, d, ceil).out == (want,)


def test_gathered_windows_are_unfolds():
    x = normal(2, 3, 7, 6)
    for K, s, p, d, ceil in LATTICE:
        if ceil or 7 + 2 * p < d * (K - 1) + 1 or 6 + 2 * p < d + 1: continue
        values, inside = gather_windows(x, (K, 2), s, p if p <= 1 else 0, d)
        assert torch.equal(values.flatten(2, 3).transpose(2, 3).flatten(1, 2), F.unfold(x, (K, 2), d, p, s))
        ones = F.unfold(torch.ones_like(x), (K, 2), d, p, s)[:1, :K * 2]
        assert torch.equal(inside.flatten(0, 1).T, ones[0].bool())


def test_weighings_are_pytorchs_poolings():
    x = normal(2, 3, 7, 6)
    for K, s, p, d, ceil in LATTICE:
        if 6 + 2 * p < d * (K - 1) + 1: continue
        assert torch.equal(pool_windows(x, max_weights, (K, K), s, p, d, ceil), F.max_pool2d(x, K, s, p, d, ceil))
        if d == 1 and p <= K // 2: torch.testing.assert_close(pool_windows(x, mean_weights, (K, K), s, p, 1, ceil), F.avg_pool2d(x, K, s, p, ceil, count_include_pad=False))
        if d == 1 and p == 0 and not ceil: torch.testing.assert_close(pool_windows(x.abs(), power_weights(3.), (K, K), s), F.lp_pool2d(x.abs(), 3., K, s))
    volume = normal(2, 4, 5, 6)
    torch.testing.assert_close(pool_windows(volume, mean_weights, (2, 3, 2), (1, 2, 2), (1, 1, 0)), F.avg_pool3d(volume, (2, 3, 2), (1, 2, 2), (1, 1, 0), count_include_pad=False))
    assert torch.equal(pool_windows(volume, max_weights, (3,), 2, 1), F.max_pool1d(volume.flatten(0, 1), 3, 2, 1).view(2, 4, 5, 3))


def test_weight_zero_takes_no_part():
    x = torch.tensor([[[-math.inf, 2., 3., math.nan]]])
    assert pool_windows(x, max_weights, (2,)).tolist()[0][0][0] == 2
    assert pool_windows(x, soft_weights, (2,))[0, 0, 0] == 2 and pool_windows(x, soft_weights, (2,))[0, 0, 1].isnan()


# --- the operator ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ceil", (False, True))
def test_lattice_against_loops(ceil):
    x = normal(2, 5, 6) * 3
    for K, s, p, d, c in LATTICE:
        if c != ceil or 5 + 2 * p < d * (K - 1) + 1: continue
        grid = window_grid((5, 6), K, s, p, d, ceil)
        y, dx = by_loops(x, grid)
        leaf = x.clone().requires_grad_()
        got = soft_pool2d(leaf, K, s, p, d, ceil)
        torch.testing.assert_close(got, y)
        torch.testing.assert_close(torch.autograd.grad(got[y.isfinite()].sum(), leaf)[0], dx)


@pytest.mark.parametrize("dims", (1, 2, 3))
def test_dimensions_batches_and_modules(dims):
    x, arguments = normal(2, 3, *(6, 5, 4)[:dims]), ((2, 3, 2)[:dims], (1, 2, 2)[:dims], (1, 1, 0)[:dims], (2, 1, 1)[:dims], True)
    y, _ = by_loops(x, window_grid(x.shape[2:], *arguments))
    torch.testing.assert_close(POOLS[dims](x, *arguments), y)
    torch.testing.assert_close(POOLS[dims](x[0], *arguments), y[0])
    layer = {1: SoftPool1d, 2: SoftPool2d, 3: SoftPool3d}[dims](*arguments)
    assert torch.equal(layer(x), POOLS[dims](x, *arguments)) and layer.state_dict() == {} and "dilation" in repr(layer)
    assert POOLS[dims](x[:0], *arguments).shape == (0, *y.shape[1:])
    small = x[:1, :1, ..., :3].clone()[(..., *(slice(4),) * (dims - 1), slice(None))].requires_grad_()
    assert gradcheck(lambda t: POOLS[dims](t, *arguments), small) and gradgradcheck(lambda t: POOLS[dims](t, *arguments), small)


@pytest.mark.parametrize("version", ("op", "reference"))
def test_all_outputs_have_their_gradients(version):
    grid = window_grid((4, 3), 3, 2, 1)
    x, a, c = normal(1, 4, 3).requires_grad_(), normal(1, 2, 2, seed=1).requires_grad_(), normal(1, 2, 2, seed=2).requires_grad_()
    forward, backward = (getattr(f, version) for f in (_soft_windows, _soft_windows_gradient))
    assert gradcheck(lambda t: forward(t, *grid), x) and gradgradcheck(lambda t: forward(t, *grid), x)
    L = forward(x, *grid)[1].detach().requires_grad_()
    assert gradcheck(lambda *t: backward(*t, *grid), (x, L, a, c)) and gradgradcheck(lambda *t: backward(*t, *grid), (x, L, a, c))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_and_order_in_memory(dtype):
    x, g = normal(2, 5, 8, 7, dtype=dtype) * 4, normal(2, 5, 4, 4, seed=1, dtype=dtype)
    want, dwant = (lambda leaf: (y := soft_pool2d(leaf, 3, 2, 1), torch.autograd.grad(y, leaf, g.double())[0]))(x.double().requires_grad_())
    seen = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=layout).requires_grad_()
        y = soft_pool2d(leaf, 3, 2, 1)
        dx, = torch.autograd.grad(y, leaf, g)
        assert y.dtype == dx.dtype == dtype and y.is_contiguous(memory_format=layout) and dx.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y.double(), want, atol=4 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(dx.double(), dwant, atol=8 * torch.finfo(dtype).eps * float(g.abs().max()), rtol=4 * torch.finfo(dtype).eps)
        seen.append((y, dx))
    assert all(torch.equal(a, b) for a, b in zip(*seen))
    every = torch.stack([x, -x], -1)[..., 0]                                    # columns apart
    assert not every.is_contiguous() and torch.equal(soft_pool2d(every, 3, 2, 1), seen[0][0])


def test_bfloat16_gradients_of_large_activations_still_sum_to_one():
    "y rounded to bfloat16 would be off by a quarter at 100."
    leaf = (100 + normal(1, 8, 64, dtype=torch.bfloat16)).requires_grad_()
    dx, = torch.autograd.grad(soft_pool1d(leaf, 8).sum(), leaf)
    torch.testing.assert_close(dx.double().unflatten(2, (8, 8)).sum(3), torch.ones(1, 8, 8, dtype=torch.float64), atol=.02, rtol=0)


def test_blocks_do_not_change_the_result():
    x = normal(9, 4, 30, 30)
    whole = soft_pool2d(x, 3, 1, 1)
    big = x.repeat(4, 3, 1, 1)                                                  # 432 planes of 8,100 numbers: many blocks
    assert torch.equal(soft_pool2d(big, 3, 1, 1)[-9:, -4:], whole)
    assert torch.equal(soft_pool2d(big.to(memory_format=torch.channels_last), 3, 1, 1)[-9:, -4:], whole)


def test_large_numbers():
    assert soft_pool2d(torch.full((1, 1, 2, 2), 90.), 2).item() == 90
    assert soft_pool1d(torch.tensor([[6e4, 5e4]], dtype=torch.float16), 2).item() == torch.tensor(6e4).half().item()
    x = normal(1, 3, 16, dtype=torch.float16) * 1000
    assert soft_pool1d(x, 4).isfinite().all()
    torch.testing.assert_close(soft_pool1d(normal(2, 8, dtype=torch.float32) + 1e6, 4).double(), by_loops((normal(2, 8, dtype=torch.float32) + 1e6), window_grid((8,), 4))[0], atol=.1, rtol=0)


def test_nan_and_infinity_stay_in_their_windows():
    x = normal(1, 2, 6, 6)
    clean = soft_pool2d(x, 3, 2, 1)
    x[0, 0, 0, 0], x[0, 0, 5, 5], x[0, 1, 2, 2] = math.nan, math.inf, -math.inf
    leaf = x.requires_grad_()
    y = soft_pool2d(leaf, 3, 2, 1)
    assert y.isnan().nonzero().tolist() == [[0, 0, 0, 0], [0, 0, 2, 2]]
    untouched = torch.ones_like(y, dtype=torch.bool)
    untouched[0, 0, 0, 0] = untouched[0, 0, 2, 2] = False
    untouched[0, 1, 1, 1] = False                                               # holds the -inf, which has weight 0
    assert torch.equal(y[untouched], clean[untouched]) and y[0, 1].isfinite().all()
    dx, = torch.autograd.grad(y.sum(), leaf)
    assert dx[0, 0].isnan().nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], *([i, j] for i in (3, 4, 5) for j in (3, 4, 5))] and dx[0, 1, 2, 2] == 0 and dx[0, 1].isfinite().all()
    nothing = torch.full((1, 4), -math.inf, requires_grad=True)
    y = soft_pool1d(nothing, 2)
    assert (y == -math.inf).all() and (torch.autograd.grad(y.sum(), nothing)[0] == 0).all()


def test_a_window_that_holds_nothing_is_as_in_max_pooling():
    x = normal(1, 1)[None]
    assert F.max_pool1d(x, 2, 1, 1, 2).item() == soft_pool1d(x, 2, 1, 1, 2).item() == -math.inf


# --- identities -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_identities(seed):
    x = normal(2, 3, 5, 4, seed=seed)
    assert torch.equal(soft_pool2d(x, 1), x) and torch.equal(soft_pool2d(x, 1, 2), x[..., ::2, ::2])
    torch.testing.assert_close(soft_pool2d(x, (5, 4)).flatten(), segment_softmax_sum(x.flatten(), x.flatten(), torch.arange(6).repeat_interleave(20), 6))
    torch.testing.assert_close(soft_pool2d(x + 5, 2), soft_pool2d(x, 2) + 5)
    y, L, H = _soft_windows(x, *window_grid((5, 4), 2))
    assert ((F.avg_pool2d(x, 2) <= y) & (y <= F.max_pool2d(x, 2)) & (y <= L)).all() and (H >= -1e-12).all() and (H <= math.log(4) + 1e-12).all()
    torch.testing.assert_close(y, L - H)
    for t, limit in ((1e-6, F.avg_pool2d(x, 2)), (1e5, F.max_pool2d(x, 2))): torch.testing.assert_close(soft_pool2d(t * x, 2) / t, limit, atol=1e-5, rtol=0)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(soft_pool2d(leaf, (5, 4)).sum(), leaf)[0].sum((2, 3)), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(soft_pool2d(x.flip(3), 2), soft_pool2d(x, 2).flip(3))
    torch.testing.assert_close(soft_pool3d(x[:, None], (1, 2, 2), (1, 2, 2))[:, 0], soft_pool2d(x, 2))


# --- bad input ------------------------------------------------------------------------------------------------------------

MAP = torch.ones(1, 2, 5, 5)

@pytest.mark.parametrize("change, message", [
    (dict(x=MAP.long()), "x must be a floating-point tensor, got torch.int64"), (dict(x=MAP.numpy()), "x must be a floating-point tensor, got ndarray"), (dict(x=MAP * 1j), "x must be a floating-point"),
    (dict(x=MAP[0, 0]), "x must have 3 or 4"), (dict(x=MAP[None]), "x must have 3 or 4"), (dict(x=MAP[..., :0]), "x must have at least one activation"),
    (dict(kernel_size=6), "kernel_size must fit into the padded map"), (dict(kernel_size=0), "kernel_size must be at least 1"), (dict(kernel_size=2.), "kernel_size must be a whole number"),
    (dict(kernel_size=(2, 2, 2)), "kernel_size must be a whole number or 2"), (dict(stride=0), "stride must be at least 1"), (dict(stride=(1, -1)), "stride must be at least 1"),
    (dict(padding=2), "padding must be at most half"), (dict(padding=-1), "padding must be at least 0"), (dict(dilation=0), "dilation must be at least 1"), (dict(dilation=5), "kernel_size must fit")])
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message): soft_pool2d(**(dict(x=MAP, kernel_size=2) | change))


def test_bad_layers_and_gathers():
    for bad in (dict(kernel_size=0), dict(kernel_size=3, padding=2), dict(kernel_size=2, stride=0)):
        with pytest.raises(ValueError): SoftPool2d(**bad)
    for kernel in (2, (), (1, 1, 1, 1)):
        with pytest.raises(ValueError, match="kernel_size must be a tuple"): gather_windows(MAP, kernel)
    with pytest.raises(ValueError, match="x must have at least 3"): gather_windows(MAP[0, 0], (1, 1, 1))


def test_replacing():
    shared = nn.MaxPool2d(2)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), shared, nn.Sequential(shared, nn.AdaptiveAvgPool2d(1))).eval()
    keys, out = list(net.state_dict()), net(MAP[:, :1].repeat(1, 1, 3, 3))
    assert replace_pooling(net, nn.MaxPool2d, SoftPool2d) is net
    assert net[1] is net[2][0] and isinstance(net[1], SoftPool2d) and not net[1].training and isinstance(net[2][1], nn.AdaptiveAvgPool2d)
    assert list(net.state_dict()) == keys and net(MAP[:, :1].repeat(1, 1, 3, 3)).shape == out.shape
    assert str(replace_pooling(nn.Sequential(nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2), ceil_mode=True)), nn.MaxPool2d, SoftPool2d)[0]) == "SoftPool2d(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), ceil_mode=True)"
    back = replace_pooling(replace_pooling(net, SoftPool2d, nn.AvgPool2d), (nn.AvgPool2d, nn.MaxPool2d), SoftPool2d)
    assert isinstance(back[1], SoftPool2d)
    with pytest.raises(ValueError, match="got none"): replace_pooling(nn.ReLU(), nn.MaxPool2d, SoftPool2d)
    with pytest.raises(ValueError, match="new must know dilation"): replace_pooling(nn.Sequential(nn.MaxPool2d(2, dilation=2)), nn.MaxPool2d, nn.AvgPool2d)
    with pytest.raises(ValueError, match="returns indices, got 0"): replace_pooling(nn.Sequential(nn.MaxPool2d(2, return_indices=True)), nn.MaxPool2d, SoftPool2d)


# --- operators and kernels ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
def test_opcheck(layout):
    x, grid = normal(2, 3, 5, 4, dtype=torch.float32).to(memory_format=layout), window_grid((5, 4), 3, 2, 1)
    assert set(torch.library.opcheck(_soft_windows.op, (x.requires_grad_(), *grid)).values()) == {"SUCCESS"}
    y, L, H = (t.detach() for t in _soft_windows(x, *grid))
    assert set(torch.library.opcheck(_soft_windows_gradient.op, (x, L.requires_grad_(), y, H, *grid)).values()) == {"SUCCESS"}


def test_transforms_and_autocast():
    x = normal(1, 2, 4, dtype=torch.float32)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(lambda t: soft_pool1d(t, 2).sum())(x), torch.autograd.grad(soft_pool1d(leaf, 2).sum(), leaf)[0])
    with torch.autocast("cpu", torch.bfloat16): assert soft_pool1d(x.bfloat16(), 2).dtype == torch.float32
    with pytest.raises(RuntimeError): torch.func.vmap(lambda t: soft_pool1d(t, 2))(x)
    with pytest.raises(RuntimeError): torch.func.jvp(lambda t: soft_pool1d(t, 2), (x,), (x,))


class Names(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def test_cuda_tensors_go_to_the_operators_and_the_host_asks_nothing(monkeypatch):
    x = normal(1, 2, 4, 4, dtype=torch.float32).requires_grad_()
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))   # on the CPU, and says it was on CUDA
    with Names() as mode:
        mode.seen = []
        torch.autograd.grad(soft_pool2d(x, 2).sum(), x)
    assert mode.seen.count("windows_soft_windows") == mode.seen.count("windows_soft_windows_gradient") == 1 and "_local_scalar_dense" not in mode.seen


KERNEL_CASES = [(1, (3, 7), (3, 2, 1)), (2, (2, 3, 6, 5), ((3, 2), (1, 3), (0, 1), (2, 1), True)), (2, (1, 2, 4, 4), (4,)), (3, (2, 3, 4, 5), (2, (1, 2, 2), 0, (1, 2, 1))), (2, (0, 2, 4, 4), (2,)), (1, (1, 300), (2, 2, 1))]

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_against_float64(dtype):
    triton = pytest.importorskip("deepclustering.pooling.windows_triton")
    for dims, shape, arguments in KERNEL_CASES:
        x = normal(*shape, dtype=dtype) * 3
        grid = window_grid(shape[-dims:], *arguments)
        for x in (x, x.to(memory_format=torch.channels_last)) if len(shape) == 4 and dims == 2 else (x,):
            y, L, H = triton.launch_soft(x, *grid)
            a, c = normal(2, *L.shape, seed=1, dtype=torch.float32)
            dx = triton.launch_gradient(x, L, a, c, *grid)
            exact = _soft(x.double(), grid)
            want = _spread(x.double(), exact[1], a.double(), c.double(), grid)
            assert y.stride() == exact[0].stride() and dx.stride() == x.stride() and y.dtype == dx.dtype == dtype
            for got, expected, eps in ((y, exact[0], torch.finfo(dtype).eps), (L, exact[1], 1.2e-7), (H, exact[2], 5e-7), (dx, want, torch.finfo(dtype).eps)):
                torch.testing.assert_close(got.double(), expected, atol=4 * eps * max(1, float(expected.abs().max()) if expected.numel() else 1), rtol=0)


def test_kernel_offsets_beyond_32_bits():
    triton = pytest.importorskip("deepclustering.pooling.windows_triton")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    side = 2**15 + 1                                                            # a plane of 2^30 and some numbers; three planes, of which rows are used here and there
    x = torch.empty(3 * side * side, dtype=torch.bfloat16).view(3, side, side)
    grid = window_grid((side, side), (2, 2), (side - 2, side - 2))              # four windows a plane, in the corners
    assert grid.out == (2, 2) and x[2].storage_offset() >= 2**31
    corners = normal(3, 4, 4, dtype=torch.bfloat16)
    for i, j in product((0, 1), (0, 1)): x[:, i * (side - 2):i * (side - 2) + 2, j * (side - 2):j * (side - 2) + 2] = corners[:, 2 * i:2 * i + 2, 2 * j:2 * j + 2]
    y, L, H = triton.launch_soft(x, *grid)
    assert torch.equal(y, triton.launch_soft(corners, *window_grid((4, 4), 2))[0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes: the storage was touched"


def test_kernels_behind_autograd(caplog):
    triton = pytest.importorskip("deepclustering.pooling.windows_triton")
    x, grid = normal(2, 3, 4, dtype=torch.float32), window_grid((3, 4), 2, 1)
    y, L, H = _soft_windows._launch(x, *grid)
    assert torch.equal(y, triton.launch_soft(x, *grid)[0])
    assert torch.equal(_soft_windows_gradient._launch(x, L, y, H, *grid), triton.launch_gradient(x, L, y, H, *grid))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(_soft_windows._launch(x.double(), *grid)[0], soft_pool2d(x.double(), 2, 1))
    assert "float64" in caplog.text
    with pytest.raises(triton.Unfit, match="rows of"): triton.launch_soft(torch.zeros(0, 2**24 + 1), *window_grid((2**24 + 1,), 1))


def test_every_kernel_compiles_without_spills():
    triton = pytest.importorskip("deepclustering.pooling.windows_triton")
    from deepclustering.core.kernels import compile_ahead
    ahead = compile_ahead("deepclustering.pooling.windows_triton")
    assert len(ahead) == 3 * len(triton.AHEAD) and {r["sm"] for r in ahead} == {75, 80, 90} and {r["kernel"] for r in ahead} == {"_soft_forward", "_soft_backward"}
    for row in ahead: assert row["fits"] and row["spills"] == 0 and row["registers"] <= 128, row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype):
    for dims, shape, arguments in [*KERNEL_CASES, (2, (8, 16, 57, 63), (3, 2, 1)), (2, (4, 7, 64, 64), (2,))]:
        x, grid = normal(*shape, dtype=dtype), window_grid(shape[-dims:], *arguments)
        leaf = x.cuda().requires_grad_()
        y = _soft_windows(leaf, *grid)[0]
        g = normal(*y.shape, seed=1, dtype=dtype)
        dx, again = (torch.autograd.grad(y, leaf, g.cuda(), retain_graph=True)[0] for _ in range(2))
        double = x.double().requires_grad_()
        exact = _soft_windows(double, *grid)[0]
        eps = torch.finfo(dtype).eps
        assert torch.equal(dx, again)
        torch.testing.assert_close(y.cpu().double(), exact, atol=8 * eps, rtol=2 * eps)
        torch.testing.assert_close(dx.cpu().double(), torch.autograd.grad(exact, double, g.double())[0], atol=32 * eps, rtol=4 * eps)
