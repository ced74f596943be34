"""Sums, maxima and logsumexps of slots in Triton: kernels in the interpreter against a loop in float64, the operators around them, and every kernel compiled for three generations of GPUs."""
import logging
import math
import os
import resource

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: each test file has a process of its own

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from deepclustering.core import aggregate
from deepclustering.core.aggregate import (_LogSumExp, _Max, _segment_logsumexp, _segment_max, _segment_sum, _slices, _Sum, segment_logsumexp, segment_max, segment_mean, segment_softmax_sum,
                                           segment_sum)
from deepclustering.core.kernels import compile_ahead
from deepclustering.core.operators import Unfit, operator
from deepclustering.core.reduce_triton import AHEAD, _sizes, launch_logsumexp, launch_max, launch_sum

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
inf, nan = math.inf, math.nan


def unweighted(x, *rest, **more): return launch_sum(x, None, *rest, **more)


LAUNCH = {"sum": unweighted, "max": launch_max, "logsumexp": launch_logsumexp}
PUBLIC = {"sum": segment_sum, "max": segment_max, "logsumexp": segment_logsumexp, "mean": segment_mean}
OPERATORS = {"sum": lambda x, *by_slot: (_segment_sum, x, None, *by_slot), "max": lambda x, *by_slot: (_segment_max, x, *by_slot), "logsumexp": lambda x, *by_slot: (_segment_logsumexp, x, *by_slot)}
every = pytest.mark.parametrize("name", LAUNCH)


@pytest.fixture(autouse=True)
def empty_memory_is_nan():
    "What a kernel does not write would show: in deterministic mode torch.empty is filled with NaN."
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def loop(name, x, index, k, w=None):
    "Deliberately dumb, in float64."
    out = torch.full((k, x.shape[1]), -inf if name in ("max", "logsumexp") else 0.).double()
    for j in range(k):
        rows = x[index == j].double()
        if not len(rows): continue
        if name == "sum": out[j] = (rows if w is None else rows * w[index == j, None].double()).sum(0)
        else: out[j] = {"max": rows.amax, "logsumexp": rows.logsumexp, "mean": rows.mean}[name](0)
    return out


def make(n, d, k, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(n, d, generator=generator)).to(dtype), torch.randn(n, generator=generator), torch.randint(k, (n,), generator=generator)


def close(name, got, x, index, k, w=None):
    "Within float32's rounding of what was added up."
    assert got.dtype == torch.float32 and got.is_contiguous()
    scale = loop("sum", x.abs(), index, k, None if w is None else w.abs()) if name == "sum" else 8.
    want = loop(name, x, index, k, w)
    error = torch.where(got.double() == want, 0., (got.double() - want).abs())
    assert (error <= (0 if name == "max" else 4 * torch.finfo(torch.float32).eps) * scale).all(), float(error.max())


# --- kernels in the interpreter -----------------------------------------------------------------------------------------

SIZES = [(0, 3, 4, None), (4, 0, 2, None), (1, 1, 1, None), (5, 3, 5, 2), (70, 17, 3, 16), (130, 65, 4, None), (33, 130, 2, 16), (129, 1, 3, 32), (64, 2, 1, 64), (65, 2, 1, 64),
         (600, 1, 1, None), (20, 5, 300, None), (12, 40, 9, 1)]


@all_dtypes
@pytest.mark.parametrize("n, d, k, rows", SIZES)
def test_against_the_loop_in_float64(n, d, k, rows, dtype):
    x, w, index = make(n, d, k, dtype)
    if n % 2: index = index.sort().values
    by_slot = index, *_slices(index, k)
    for name, launcher in LAUNCH.items(): close(name, launcher(x, *by_slot, rows=rows), x, index, k)
    close("sum", launch_sum(x, w, *by_slot, rows=rows), x, index, k, w)


@pytest.mark.parametrize("seed", range(2))
@every
def test_same_bits_twice_whatever_the_windows_hold(name, seed):
    n, d, k = 90, 6, 4
    x, _, _ = make(n, d, k, torch.float32, seed)
    index = (4 * torch.rand(n, generator=torch.Generator().manual_seed(seed)) ** 3).long()  # one large slot, some small
    seen = []
    for rows in (8, 8, 31, 90):
        seen.append(LAUNCH[name](x, index, *_slices(index, k), rows=rows))
        close(name, seen[-1], x, index, k)
    assert torch.equal(*seen[:2])
    assert name == "max" or not torch.equal(seen[0], seen[3])  # other windows, other order of addition


@every
def test_one_giant_slot_with_more_pieces_than_the_merge_takes_in_a_step(name):
    x, _, index = make(134, 33, 1, torch.float32)
    assert 134 / 2 > 4096 // _sizes(134, 1, 33)[3]
    close(name, LAUNCH[name](x, index, *_slices(index, 1), rows=2), x, index, 1)


def test_what_a_slot_holds_is_its_own_business():
    "Slots of 1, 2, 3 ... rows in one program: each sum is as if the others were not there."
    sizes = torch.tensor([7, 0, 1, 40, 2, 0, 5, 3, 16, 17, 0])
    index = torch.arange(11).repeat_interleave(sizes)
    x = make(len(index), 64, 1, torch.float32)[0]
    got = launch_sum(x, None, index, *_slices(index, 30))                   # the last 19 are empty
    assert _sizes(len(index), 30, 64)[1:3] == (4, 4)
    for j in range(11):
        others = x.masked_fill((index != j)[:, None], nan)
        assert torch.equal(launch_sum(others, None, index, *_slices(index, 30))[j], got[j]) and got[j].isfinite().all()


@all_dtypes
@pytest.mark.parametrize("rows", (64, 3, 1))
def test_nan_and_infinities(rows, dtype):
    index = torch.tensor([4, 0, 3, 3, 1, 4, 0, 3, 1, 1, 4, 3, 0, 0, 4, 3])  # slot 2 is empty
    x = make(16, 3, 5, dtype)[0] + 64 * index[:, None].to(dtype)
    x[index == 0] = -inf                                                    # all of a slot
    x[2, 0], x[4, 1], x[7, 0], x[15, 2], x[11, 2] = nan, inf, inf, nan, -inf
    x[index == 4, 2] = inf
    by_slot = index, *_slices(index, 5)
    for name, launcher in LAUNCH.items():
        got = launcher(x, *by_slot, rows=rows)
        want = loop(name, x, index, 5)
        torch.testing.assert_close(got.double(), want, atol=0 if name == "max" else 2e-5, rtol=1e-6, equal_nan=True)
        torch.testing.assert_close(got, PUBLIC[name](x.float(), index, 5), atol=2e-5, rtol=1e-6, equal_nan=True)
        assert got.isnan().sum() == want.isnan().sum() >= 2 and (name == "sum" or not got[1].isnan().any())


def test_every_place_of_a_nan():
    "First or last of its slot, of a step, of a piece: it wins over all, and in no other slot."
    index = torch.arange(40) // 20
    for place in (0, 4, 19, 39):
        x = torch.arange(40.)[:, None] - 20
        x[place] = nan
        for rows in (64, 10):
            for launcher in LAUNCH.values(): assert launcher(x, index, *_slices(index, 2), rows=rows).isnan().flatten().tolist() == [place < 20, place >= 20]


@pytest.mark.parametrize("level", (-1e30, -200., 0., 200., 3e38))
def test_logsumexp_at_every_level(level):
    x, _, index = make(60, 3, 4, torch.float32)
    x = torch.where(torch.arange(3) == 1, -inf, x + level)
    for rows in (64, 7): torch.testing.assert_close(launch_logsumexp(x, index, *_slices(index, 4), rows=rows).double(), loop("logsumexp", x, index, 4), rtol=3e-7, atol=3e-6)
    alone = torch.arange(60)                                                # the logsumexp of one number is that number
    assert torch.equal(launch_logsumexp(x, alone, *_slices(alone, 60)), x)


def test_layouts():
    x, w, index = make(40, 6, 3, torch.float32)
    by_slot = index, *_slices(index, 3)
    wide = lambda t: torch.cat([t, -t], 1)[:, :6]               # rows further apart
    every_second = lambda t: torch.stack([t, -t], -1)[..., 0]   # columns apart
    turned = lambda t: t.T.contiguous().T
    for name, launcher in LAUNCH.items():
        plain = launcher(x, *by_slot)
        for view in (wide, every_second, turned):
            assert view(x).stride() != x.stride() and torch.equal(launcher(view(x), *by_slot), plain)
        assert torch.equal(launcher(x, torch.stack([index, index], 1)[:, 0], *by_slot[1:]), plain)
        assert torch.equal(launcher(x[:1].expand(40, 6), *by_slot), launcher(x[:1].repeat(40, 1), *by_slot))
    assert torch.equal(launch_sum(x, torch.stack([w, -w], 1)[:, 0], *by_slot), launch_sum(x, w, *by_slot))
    assert torch.equal(launch_sum(x, w[:1].expand(40), *by_slot), launch_sum(x, w[:1].repeat(40), *by_slot))


def test_a_row_of_weight_w_is_w_rows():
    x, _, _ = make(9, 3, 2, torch.float32)
    x, repeats, index = x.round(), torch.tensor([1, 4, 2, 3, 1, 0, 2, 5, 1]), torch.arange(9) % 2
    many, labels = x.repeat_interleave(repeats, 0), index.repeat_interleave(repeats)
    assert torch.equal(launch_sum(x, repeats.float(), index, *_slices(index, 2)), launch_sum(many, None, labels, *_slices(labels, 2)))


@pytest.mark.parametrize("rows", (64, 1))
def test_offsets_beyond_32_bits(rows):
    torch.use_deterministic_algorithms(False)                   # which would fill the gigabytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    far = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((3, 5), (2**30, 1))
    assert far[2].storage_offset() >= 2**31
    x, index = make(3, 5, 2, torch.bfloat16)[0], torch.tensor([1, 0, 1])
    far.copy_(x)
    for launcher in LAUNCH.values(): assert torch.equal(launcher(far, index, *_slices(index, 2), rows=rows), launcher(x, index, *_slices(index, 2), rows=rows))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes: the storage was touched"


@every
def test_what_does_not_fit(name):
    x, _, index = make(5, 2, 2, torch.float32)
    order, ends = _slices(index, 2)
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(Unfit, match=str(dtype)): LAUNCH[name](x.to(dtype), index, order, ends)
    with pytest.raises(Unfit, match="programs"): LAUNCH[name](x[:, :1].expand(5, 64), index, order, ends[:1].expand(2**33))
    with pytest.raises(Unfit, match="programs"): LAUNCH[name](x[:, :1].expand(5, 64 * 2**16), index, order, ends)


# --- the operators ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@every
def test_opcheck_and_fakes(name, dtype):
    x, w, index = make(12, 3, 4, dtype)
    by_slot, wide = (index, *_slices(index, 5)), torch.promote_types(dtype, torch.float32)
    f, *args = OPERATORS[name](x, *by_slot)
    assert set(torch.library.opcheck(f.op, args).values()) == {"SUCCESS"}
    if name == "sum": assert set(torch.library.opcheck(f.op, (x, w.to(wide), *by_slot)).values()) == {"SUCCESS"}
    torch.testing.assert_close(f.op(*args).double(), loop(name, x, index, 5), atol=1e-5, rtol=1e-6)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        out = f.op(*fake)
    assert out.dtype == f.op(*args).dtype == wide and out.shape == (5, 3)


@every
def test_on_fake_cuda_tensors(name):
    "The public functions reach the operators there, with shapes alone."
    torch.use_deterministic_algorithms(False)                   # which would fill memory that is not there
    for dtype in DTYPES:
        with FakeTensorMode():
            y = PUBLIC[name](torch.empty(20, 2, 3, device="cuda", dtype=dtype), torch.empty(20, dtype=torch.int64, device="cuda"), 5, check=False)
        assert y.shape == (5, 2, 3) and y.dtype == dtype and y.device.type == "cuda"


class Names(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def names(call):
    with Names() as mode:
        mode.seen = []
        result = call()
    return mode.seen, result


WAITS = {"bincount", "_local_scalar_dense", "aminmax", "nonzero", "_unique2"}


def everything(x, w, index, k):
    "Every reduction that sorts, with the number of its sorts: name, call, sorts, kernels."
    return [("sum", lambda: segment_sum(x, index, k, check=False), 1, ["sum"]), ("weighted sum", lambda: segment_sum(x, index, k, weights=w, check=False), 1, ["sum"]),
            ("mean", lambda: segment_mean(x, index, k, check=False), 1, ["sum"]), ("weighted mean", lambda: segment_mean(x, index, k, weights=w, check=False), 1, ["sum", "sum"]),
            ("max", lambda: segment_max(x, index, k, check=False), 1, ["max"]), ("logsumexp", lambda: segment_logsumexp(x, index, k, check=False), 1, ["logsumexp"]),
            ("pooled", lambda: segment_softmax_sum(x, x, index, k, check=False), 1, ["softmax", "sum"]), ("attention", lambda: segment_softmax_sum(x, w, index, k, check=False), 1, ["softmax", "sum"])]


@all_dtypes
def test_cuda_tensors_go_to_the_kernels_sort_once_and_the_host_asks_nothing(dtype, monkeypatch):
    x, w, index = make(50, 5, 4, dtype)
    w = w.abs()
    c = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain, leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = [(y := call(), torch.autograd.grad(y, plain, c)[0]) for _, call, *_ in everything(plain, w, index, 4)]
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))  # every tensor is on the CPU and says it was on CUDA
    for (name, call, sorts, kernels), (want, to_x) in zip(everything(leaf, w, index, 4), expected):
        seen, y = names(call)
        assert seen.count("sort") == sorts and not (WAITS | {"scatter_reduce_", "index_add_", "_embedding_bag_forward_only"}) & set(seen), name
        assert [s.removeprefix("aggregate_segment_") for s in seen if s.startswith("aggregate_segment_")] == kernels, name
        assert y.dtype == dtype
        torch.testing.assert_close(y, want, atol=2e-5 if dtype == torch.float32 else 4e-2, rtol=2e-2 if dtype != torch.float32 else 1e-5)
        seen, (dx,) = names(lambda: torch.autograd.grad(y, leaf, c))
        assert not WAITS & set(seen) and dx.dtype == dtype, name
        torch.testing.assert_close(dx, to_x, atol=2e-5 if dtype == torch.float32 else 4e-2, rtol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", (torch.float64, torch.int64), ids=str)
def test_float64_and_whole_numbers_do_not_reach_an_operator_there(dtype, monkeypatch, caplog):
    x, w, index = make(50, 5, 4, torch.float64)
    x, floating = x.to(dtype), dtype.is_floating_point
    kinds = [k for k in everything(x, w.double(), index, 4) if k[0] in ("sum", "max", "logsumexp", "mean", "weighted sum", "weighted mean") and (floating or k[0] in ("sum", "max"))]
    plain = [call() for _, call, *_ in kinds]
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    with caplog.at_level(logging.WARNING):
        for (name, call, *_), want in zip(kinds, plain):
            seen, y = names(call)
            assert not [s for s in seen if s.startswith("aggregate_")], name
            torch.testing.assert_close(y, want)
    assert not caplog.records


def test_empty_input_there(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    for dtype in (*DTYPES, torch.float64):
        for shape in ((0, 3), (4, 0)):
            x, index = torch.zeros(shape, dtype=dtype, requires_grad=True), torch.zeros(shape[0], dtype=torch.int64)
            for name, f in PUBLIC.items():
                y = f(x, index, 2)
                assert y.shape == (2, shape[1]) and y.dtype == dtype and (y == (-inf if name in ("max", "logsumexp") else 0)).all()
                assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.fixture
def kernels_for_the_cpu(monkeypatch):
    "Operators with the kernels as what the CPU runs, in the place of the package's; every tensor says it was on CUDA."
    def behind(name, schema, launcher, plain):
        def run(*args): return launcher(*args) if args[0].dtype != torch.float64 else plain.reference(*args)
        run.__name__ = f"cpu_{name}"
        made = operator(schema, cuda="")(run)
        made.fake(lambda x, *rest: x.new_empty(len(rest[-1]), x.shape[1], dtype=torch.float32))
        monkeypatch.setattr(aggregate, f"_segment_{name}", made)
    three = "(Tensor x, Tensor index, Tensor order, Tensor ends) -> Tensor"
    behind("sum", three.replace("Tensor x,", "Tensor x, Tensor? weights,"), launch_sum, _segment_sum)
    behind("max", three, launch_max, _segment_max)
    behind("logsumexp", three, launch_logsumexp, _segment_logsumexp)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))


@all_dtypes
def test_kernels_behind_the_public_functions_and_their_gradients(dtype, kernels_for_the_cpu):
    x, w, index = make(30, 3, 4, dtype)
    index = index + (index > 1).long()                                     # slot 2 is empty
    c, tolerance = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).to(dtype), 2e-5 if dtype == torch.float32 else 3e-2
    for name in ("sum", "mean", "max", "logsumexp"):
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        y = PUBLIC[name](leaf, index, 5)
        rows = [exact[index == j] for j in range(5)]
        reduce = {"sum": lambda t: t.sum(0), "mean": lambda t: t.mean(0), "max": lambda t: t.amax(0), "logsumexp": lambda t: t.logsumexp(0)}[name]
        total = sum((reduce(t) * c[j].double()).sum() for j, t in enumerate(rows) if len(t))
        torch.testing.assert_close(y.double(), loop(name, x, index, 5), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(torch.autograd.grad(y, leaf, c)[0].double(), torch.autograd.grad(total, exact)[0], atol=tolerance, rtol=tolerance)
    equal = torch.tensor([2., 7., 7., 7.], dtype=dtype).requires_grad_()
    assert torch.autograd.grad(segment_max(equal, torch.tensor([0, 0, 0, 1])).sum(), equal)[0].tolist() == [0, .5, .5, 1]
    v = w.requires_grad_()
    dx, dw = torch.autograd.grad(segment_sum(x.requires_grad_(), index, 5, weights=v), (x, v), c)
    torch.testing.assert_close(dw, (c.float()[index] * x.float()).sum(1), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(dx.float(), c.float()[index] * w[:, None], atol=tolerance, rtol=tolerance)


def test_torch_func_and_second_derivatives_there(kernels_for_the_cpu):
    x, _, index = make(12, 2, 3, torch.float32)
    for f in (segment_sum, segment_logsumexp):
        value = lambda t: f(t, index, 3, check=False).square().sum()
        torch.testing.assert_close(torch.func.grad(value)(x), torch.autograd.grad(value(leaf := x.clone().requires_grad_()), leaf)[0])
        first, = torch.autograd.grad(value(leaf), leaf, create_graph=True)
        second, = torch.autograd.grad(first.square().sum(), leaf)
        exact = x.double().requires_grad_()
        first, = torch.autograd.grad(value(exact), exact, create_graph=True)
        torch.testing.assert_close(second.double(), torch.autograd.grad(first.square().sum(), exact)[0], rtol=1e-4, atol=1e-3)


@every
def test_compiled(name):
    x, w, index = make(20, 3, 4, torch.float32)
    by_slot = index, *_slices(index, 4)
    f, *args = OPERATORS[name](x, *by_slot)
    compiled = torch.compile(lambda *args: f.op(*args) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), f.reference(*args) + 1)
    function = {"sum": lambda t: _Sum.apply(t, None, index, 4, *by_slot[1:]), "max": lambda t: _Max.apply(t, index, 4), "logsumexp": lambda t: _LogSumExp.apply(t, index, 4)}[name]
    leaf = x.requires_grad_()
    got = torch.compile(function, backend="aot_eager")(leaf)
    torch.testing.assert_close(got, function(leaf))
    torch.testing.assert_close(torch.autograd.grad(got.sum(), leaf), torch.autograd.grad(function(leaf).sum(), leaf))


def test_a_sort_done_before_is_used():
    x = torch.rand(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    index = torch.tensor([3, 0, 0, 4, 3, 3, 0, 4, 3])
    for slices in ((None, None), _slices(index, 6)):
        assert gradcheck(lambda t: _Sum.apply(t, None, index, 6, *slices), x)
    assert not {"sort"} & set(names(lambda: _Sum.apply(x, None, index, 6))[0])  # float64 on the CPU never sorts


def test_launching_falls_back_with_a_line_in_the_log(caplog):
    "Only for what never comes from the public functions."
    x, w, index = make(20, 3, 4, torch.float64)
    by_slot = index, *_slices(index, 4)
    with caplog.at_level(logging.WARNING):
        for name in LAUNCH:
            f, *args = OPERATORS[name](x, *by_slot)
            torch.testing.assert_close(f._launch(*args), loop(name, x, index, 4))
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [f"aggregate_segment_{name}" for name in LAUNCH]


# --- the compiler -------------------------------------------------------------------------------------------------------

def test_every_kernel_compiles_for_three_generations_without_spills():
    ahead = compile_ahead("deepclustering.core.reduce_triton")
    assert len(ahead) == 3 * len(AHEAD) and {r["sm"] for r in ahead} == {75, 80, 90}
    assert {r["kernel"] for r in ahead} == {"_reduce_places", "_reduce_merge"} and {r["constants"]["KIND"] for r in ahead} == {0, 1, 2}
    for row in ahead:
        assert row["fits"] and row["spills"] == 0 and row["shared"] <= 4096, row
        assert row["registers"] <= 128, row  # 65,536 registers: 16 programs of 32 threads


def test_what_is_compiled_is_what_is_launched():
    "Sizes of `AHEAD` against those that `_sizes` gives."
    possible = {(slots, step, columns) for k in (1, 10**4, 10**5, 10**6) for d in (1, 64, 65, 1000) for _, slots, step, columns in [_sizes(10**6, k, d)]}
    for kernel, types, _ in AHEAD:
        if kernel.fn.__name__ == "_reduce_places": assert (types["SLOTS"], types["STEP"], types["COLUMNS"]) in possible


# --- a GPU --------------------------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@all_dtypes
def test_on_a_gpu(dtype):
    for n, d, k in ((20_000, 65, 50), (20_000, 1, 3), (20_000, 8, 1), (20_000, 64, 19_000), (1, 3, 1), (100_000, 64, 90_000)):
        x, w, index = make(n, d, k, dtype)
        for name, launcher in LAUNCH.items():
            got = [launcher(x.cuda(), index.cuda(), *_slices(index.cuda(), k)) for _ in range(2)]
            assert torch.equal(*got)
            want = PUBLIC[name](x.double(), index, k)
            scale = segment_sum(x.double().abs(), index, k).amax() if name == "sum" else 16.
            torch.testing.assert_close(got[0].cpu().double(), want, atol=float(scale) * (0 if name == "max" else 1e-6), rtol=0)
