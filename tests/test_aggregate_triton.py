"""The segment softmax in Triton: kernels in the interpreter against a loop in float64, the operators around them, and every kernel compiled for three generations of GPUs."""
import logging
import math
import os
import resource

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: each test file has a process of its own

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from deepclustering.core.aggregate import (_segment_softmax, _segment_softmax_gradient, _slices, segment_logsumexp, segment_softmax, segment_softmax_sum)
from deepclustering.core.aggregate_triton import AHEAD, _sizes, launch_softmax, launch_softmax_gradient
from deepclustering.core.kernels import compile_ahead
from deepclustering.core.operators import Unfit, operator

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def empty_memory_is_nan():
    "What a kernel does not write would show: in deterministic mode torch.empty is filled with NaN."
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with np.errstate(invalid="ignore"): yield  # inf - inf is NaN as it should be
    torch.use_deterministic_algorithms(before)


def loop(x, index):
    "Deliberately dumb."
    p = torch.empty(x.shape, dtype=torch.float64)
    for j in index.unique(): p[index == j] = x[index == j].double().softmax(0)
    return p


def loop_gradient(x, g, index):
    leaf = x.double().requires_grad_()
    total = sum((leaf[index == j].softmax(0) * g[index == j].double()).sum() for j in index.unique())
    return torch.autograd.grad(total, leaf)[0] if len(x) else x.double()


def make(n, d, k, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(2, n, d, generator=generator)
    return (4 * x).to(dtype), g.to(dtype), torch.randint(k, (n,), generator=generator)


# --- kernels in the interpreter -----------------------------------------------------------------------------------------

SIZES = [(0, 3, 4, None), (4, 0, 2, None), (1, 1, 1, None), (1, 3, 2, None), (5, 3, 5, 2), (70, 17, 3, 16), (130, 65, 4, None), (33, 130, 2, 16), (129, 1, 9, 8), (64, 2, 1, 64), (65, 2, 1, 64),
         (48, 2, 1, 8)]


@all_dtypes
@pytest.mark.parametrize("n, d, k, rows", SIZES)
def test_against_the_loop_in_float64(n, d, k, rows, dtype):
    x, g, index = make(n, d, k, dtype)
    by_slot, eps = _slices(index, k), torch.finfo(dtype).eps
    p = launch_softmax(x, index, *by_slot, rows=rows)
    dx = launch_softmax_gradient(p, g, index, *by_slot, rows=rows)
    assert p.dtype == dx.dtype == dtype and p.is_contiguous() and dx.is_contiguous()
    torch.testing.assert_close(p.double(), loop(x, index), atol=4 * eps, rtol=0)
    torch.testing.assert_close(dx.double(), loop_gradient(x, g, index), atol=4 * eps * float(g.abs().max()) if g.numel() else 0, rtol=0)  # p is rounded before


@pytest.mark.parametrize("seed", range(3))
def test_same_bits_twice_whatever_the_windows_hold(seed):
    n, d, k = 90, 6, 4
    x, g, _ = make(n, d, k, torch.float32, seed)
    index = (4 * torch.rand(n, generator=torch.Generator().manual_seed(seed)) ** 3).long()  # one large slot, some small
    by_slot, seen = _slices(index, k), []
    for rows in (8, 8, 31, 90):
        p = launch_softmax(x, index, *by_slot, rows=rows)
        seen.append((p, launch_softmax_gradient(p, g, index, *by_slot, rows=rows)))
        torch.testing.assert_close(p.double(), loop(x, index), atol=5e-7, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(*seen[:2]))
    assert not torch.equal(seen[0][0], seen[3][0])  # other windows, other order of addition


def test_more_pieces_than_the_merge_takes_in_a_step():
    x, g, index = make(65, 33, 1, torch.float32)
    assert 65 > 4096 // _sizes(65, 33)[2]
    by_slot = _slices(index, 1)
    p = launch_softmax(x, index, *by_slot, rows=1)
    torch.testing.assert_close(p.double(), loop(x, index), atol=5e-7, rtol=0)
    torch.testing.assert_close(launch_softmax_gradient(p, g, index, *by_slot, rows=1).double(), loop_gradient(x, g, index), atol=2e-6, rtol=0)


@all_dtypes
@pytest.mark.parametrize("rows", (64, 3))
def test_masks_infinities_and_levels(rows, dtype):
    index = torch.tensor([4, 0, 3, 3, 1, 4, 0, 3, 1, 1, 4, 3, 0, 0, 4, 3])  # slot 2 is empty
    x = make(16, 3, 5, dtype)[0] + 64 * index[:, None].to(dtype)
    x[index == 0] = -math.inf                                               # all of a slot
    x[0], x[2, 0], x[4, 1] = -math.inf, math.nan, math.inf
    x[7, 0] = math.inf                                                      # NaN and +inf together
    x[index == 4, 2] = -math.inf
    p = launch_softmax(x, index, *_slices(index, 5), rows=rows)
    expected = torch.nan_to_num(loop(x, index), nan=0)
    expected[index == 3, 0] = math.nan
    expected[index == 1, 1] = math.nan
    torch.testing.assert_close(p.double(), expected, atol=2 * torch.finfo(dtype).eps, rtol=0, equal_nan=True)
    torch.testing.assert_close(p, segment_softmax(x, index, 5), atol=2 * torch.finfo(dtype).eps, rtol=0, equal_nan=True)
    dx = launch_softmax_gradient(p, torch.ones_like(p), index, *_slices(index, 5), rows=rows)
    assert torch.equal(dx.isnan(), p.isnan()) and (dx[index == 0] == 0).all()


def test_layouts():
    x, g, index = make(40, 6, 3, torch.float32)
    by_slot = _slices(index, 3)
    p = launch_softmax(x, index, *by_slot)
    dx = launch_softmax_gradient(p, g, index, *by_slot)
    wide = lambda t: torch.cat([t, -t], 1)[:, :6]               # rows further apart
    every = lambda t: torch.stack([t, -t], -1)[..., 0]          # columns apart
    turned = lambda t: t.T.contiguous().T
    for view in (wide, every, turned):
        assert view(x).stride() != x.stride()
        assert torch.equal(launch_softmax(view(x), index, *by_slot), p)
        assert torch.equal(launch_softmax_gradient(view(p), view(g), index, *by_slot), dx)
    assert torch.equal(launch_softmax(x, torch.stack([index, index], 1)[:, 0], *by_slot), p)
    assert torch.equal(launch_softmax_gradient(p, g[:1].expand(40, 6), index, *by_slot), launch_softmax_gradient(p, g[:1].repeat(40, 1), index, *by_slot))


def test_many_slots_few_items():
    x, _, index = make(30, 1, 300, torch.float32)
    torch.testing.assert_close(launch_softmax(x, index, *_slices(index, 300)).double(), loop(x, index), atol=5e-7, rtol=0)


@pytest.mark.parametrize("rows", (64, 1))
def test_offsets_beyond_32_bits(rows):
    torch.use_deterministic_algorithms(False)                   # which would fill the gigabytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    far = [torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((3, 5), (2**30, 1)) for _ in range(2)]
    assert far[0][2].storage_offset() >= 2**31
    x, g, index = make(3, 5, 2, torch.bfloat16)
    index = torch.tensor([1, 0, 1])
    for t, values in zip(far, (x, g)): t.copy_(values)
    p = launch_softmax(far[0], index, *_slices(index, 2), rows=rows)
    assert torch.equal(p, launch_softmax(x, index, *_slices(index, 2), rows=rows))
    assert torch.equal(launch_softmax_gradient(far[0], far[1], index, *_slices(index, 2), rows=rows), launch_softmax_gradient(x, g, index, *_slices(index, 2), rows=rows))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes: the storage was touched"


def test_what_does_not_fit():
    x, _, index = make(5, 2, 2, torch.float32)
    order, ends = _slices(index, 2)
    with pytest.raises(Unfit, match="float64"): launch_softmax(x.double(), index, order, ends)
    with pytest.raises(Unfit, match="float64"): launch_softmax_gradient(x.double(), x.double(), index, order, ends)
    with pytest.raises(Unfit, match="programs"): launch_softmax(x, index, order, ends[:1].expand(2**31))
    with pytest.raises(Unfit, match="programs"): launch_softmax(x[:, :1].expand(5, 64 * 2**16), index, order, ends)


# --- the operators ------------------------------------------------------------------------------------------------------

def kernel_softmax(x, index, order, ends): return launch_softmax(x, index, order, ends, rows=8)
def kernel_gradient(p, g, index, order, ends): return launch_softmax_gradient(p, g, index, order, ends, rows=8)


def test_kernels_behind_autograd_and_the_compiler():
    "The same registration with the kernels in the place of the plain version, so that the CPU runs them."
    forward = operator("(Tensor x, Tensor index, Tensor order, Tensor ends) -> Tensor", cuda="")(kernel_softmax)
    backward = operator("(Tensor p, Tensor g, Tensor index, Tensor order, Tensor ends) -> Tensor", cuda="")(kernel_gradient)
    forward.fake(lambda x, index, order, ends: x.new_empty(x.shape))
    backward.fake(lambda p, g, index, order, ends: p.new_empty(p.shape))
    forward.gradient(keep=lambda x, index, order, ends, p: (p, index, order, ends))(lambda g, p, *by_slot: (backward.op(p, g, *by_slot), None, None, None))
    x, g, index = make(20, 3, 3, torch.float32)
    by_slot, leaf = (index, *_slices(index, 3)), x.requires_grad_()
    dx, = torch.autograd.grad(forward.op(leaf, *by_slot), leaf, g)
    torch.testing.assert_close(dx.double(), loop_gradient(x.detach(), g, index), atol=2e-6, rtol=0)
    assert set(torch.library.opcheck(forward.op, (leaf, *by_slot)).values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(backward.op, (x.detach(), g, *by_slot)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_opcheck(dtype):
    x, g, index = make(12, 3, 4, dtype)
    by_slot = index, *_slices(index, 5)
    assert set(torch.library.opcheck(_segment_softmax.op, (x.requires_grad_(), *by_slot)).values()) == {"SUCCESS"}
    p = segment_softmax(x.detach(), index, 5).requires_grad_()
    assert set(torch.library.opcheck(_segment_softmax_gradient.op, (p, g.requires_grad_(), *by_slot)).values()) == {"SUCCESS"}


def test_gradients_of_any_order():
    index = torch.tensor([3, 0, 0, 4, 3, 3])
    x, g = torch.rand(2, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, g, by_slot = x.requires_grad_(), g.requires_grad_(), (index, *_slices(index, 5))
    for version in ("op", "reference"):
        forward, backward = (lambda *tensors, f=getattr(f, version): f(*tensors, *by_slot) for f in (_segment_softmax, _segment_softmax_gradient))
        assert gradcheck(forward, x) and gradgradcheck(forward, x)
        assert gradcheck(backward, (x, g)) and gradgradcheck(backward, (x, g))
    third = []
    for f in (lambda t: _segment_softmax.op(t, *by_slot), lambda t: segment_softmax(t, index, 5)):
        value = (f(x) * g.detach()).square().sum()
        for _ in range(3): value = torch.autograd.grad(value, x, create_graph=True)[0].square().sum()
        third.append(value.item())
    assert third[0] == pytest.approx(third[1], rel=1e-9)


def test_half_precision_gradient_of_the_gradient():
    x, g, index = make(30, 3, 4, torch.float32)
    by_slot, second = (index, *_slices(index, 4)), {}
    for dtype in (torch.float64, *DTYPES):
        p, h = segment_softmax(x, index, 4).to(dtype).requires_grad_(), g.to(dtype).requires_grad_()
        out = _segment_softmax_gradient.op(p, h, *by_slot)
        second[dtype] = torch.autograd.grad(out, (p, h), torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype))
        for got, expected in zip(second[dtype], second[torch.float64]):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), expected, atol=10 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


class Names(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def names(call):
    with Names() as mode:
        mode.seen = []
        result = call()
    return mode.seen, result


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_cuda_tensors_go_to_the_operator_and_the_host_asks_nothing(dtype, monkeypatch):
    x, g, index = make(50, 5, 4, dtype)
    plain, leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    q = segment_softmax(plain, index, 4)
    dq, = torch.autograd.grad(q, plain, g)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))  # every tensor is on the CPU and says it was on CUDA
    seen, p = names(lambda: segment_softmax(leaf, index, 4, check=False))
    waits = {"bincount", "_local_scalar_dense", "aminmax", "nonzero", "_unique2"}
    assert seen.count("aggregate_segment_softmax") == seen.count("sort") == 1 and not (waits | {"scatter_reduce_"}) & set(seen)
    seen, (dx,) = names(lambda: torch.autograd.grad(p, leaf, g))
    assert seen.count("aggregate_segment_softmax_gradient") == 1 and not (waits | {"sort"}) & set(seen)
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(dx, dq, atol=4 * torch.finfo(dtype).eps, rtol=0)
    for call in (lambda: segment_softmax_sum(leaf, leaf, index, 4), lambda: torch.autograd.grad(segment_logsumexp(leaf, index, 4).sum(), leaf)):
        assert names(call)[0].count("aggregate_segment_softmax") == 1
    with torch.autocast("cpu", torch.bfloat16): assert segment_softmax(leaf, index, 4).dtype == dtype
    assert segment_softmax(x.view(50, 1, 5), index, 4).shape == (50, 1, 5)


def test_the_cpu_never_sorts_for_it():
    x, _, index = make(50, 5, 4, torch.float32)
    assert not {"sort", "aggregate_segment_softmax"} & set(names(lambda: segment_softmax(x, index, 4))[0])


def test_launching_falls_back_with_a_line_in_the_log(caplog):
    x, g, index = make(20, 3, 4, torch.float64)
    by_slot = index, *_slices(index, 4)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(_segment_softmax._launch(x, *by_slot), segment_softmax(x, index, 4))
        torch.testing.assert_close(_segment_softmax_gradient._launch(loop(x, index), g, *by_slot), loop_gradient(x, g, index))
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["aggregate_segment_softmax", "aggregate_segment_softmax_gradient"]


@pytest.mark.parametrize("k", (1, 2**15, 2**15 + 1, 10**5))
def test_slices(k):
    index = torch.randint(k, (3001,), generator=torch.Generator().manual_seed(0))
    order, ends = _slices(index, k)
    assert torch.equal(order, torch.argsort(index, stable=True)) and torch.equal(ends, torch.bincount(index, minlength=k).cumsum(0))
    assert order.dtype == ends.dtype == torch.int64


# --- the compiler -------------------------------------------------------------------------------------------------------

def test_every_kernel_compiles_for_three_generations_without_spills():
    ahead = compile_ahead("deepclustering.core.aggregate_triton")
    assert len(ahead) == 3 * len(AHEAD) and {r["sm"] for r in ahead} == {75, 80, 90}
    assert {r["kernel"] for r in ahead} == {"_softmax_pieces", "_softmax_merge", "_gradient_pieces", "_gradient_merge"}
    for row in ahead:
        assert row["fits"] and row["spills"] == 0 and row["shared"] <= 4096, row
        assert row["registers"] <= (128 if row["sm"] == 75 else 104), row  # 65,536 registers: 16 and 19 programs of 32 threads


# --- a GPU --------------------------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@all_dtypes
def test_on_a_gpu(dtype):
    for n, d, k in ((20_000, 65, 50), (20_000, 1, 3), (20_000, 8, 1), (20_000, 64, 19_000), (1, 3, 1)):
        x, g, index = make(n, d, k, dtype)
        run = lambda leaf: (p := segment_softmax(leaf, index.cuda(), k, check=False), torch.autograd.grad(p, leaf, g.cuda())[0])
        (p, dx), again = run(x.cuda().requires_grad_()), run(x.cuda().requires_grad_())
        assert torch.equal(p, again[0]) and torch.equal(dx, again[1])
        leaf = x.double().requires_grad_()
        exact = segment_softmax(leaf, index, k)
        torch.testing.assert_close(p.cpu().double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=0)
        torch.testing.assert_close(dx.cpu().double(), torch.autograd.grad(exact, leaf, g.double())[0], atol=8 * torch.finfo(dtype).eps * float(g.abs().max()), rtol=0)
