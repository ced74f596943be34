"""The segment reductions over dtypes, layouts and sizes; gradients; repeatability; PyTorch Geometric as oracle and as pace."""
import importlib.util
import math

import pytest
import torch
from conftest import ROOT
from torch.autograd import gradcheck, gradgradcheck

from deepclustering.core.aggregate import (dense_blocks, segment_logsumexp, segment_max, segment_mean, segment_softmax, segment_softmax_sum,
                                           segment_sum, sort_by_slot, unsort)

REDUCTIONS = {"sum": segment_sum, "mean": segment_mean, "max": segment_max, "logsumexp": segment_logsumexp,
              "softmax_sum": lambda x, *a, **kw: segment_softmax_sum(x, x, *a, **kw)}
DENSE = {"sum": lambda t: t.sum(0), "mean": lambda t: t.sum(0) / max(1, len(t)), "softmax_sum": lambda t: (t.softmax(0) * t).sum(0),
         "max": lambda t: t.amax(0) if len(t) else torch.full(t.shape[1:], -math.inf, dtype=t.dtype), "logsumexp": lambda t: t.logsumexp(0)}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-12}
ALL = [*REDUCTIONS, "softmax"]


def call(name, *args, **kw): return (segment_softmax if name == "softmax" else REDUCTIONS[name])(*args, **kw)


def make(n, shape, k, dtype, layout, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=g, dtype=torch.float64).to(dtype)
    if layout == "strided": x = torch.stack([x, -x], -1)[..., 0]
    if layout == "transposed" and x.dim() > 1: x = x.transpose(0, -1).contiguous().transpose(0, -1)
    index = torch.randint(max(k, 1), (n,), generator=g)
    if k > 3: index[index == 1] = 2  # an empty slot inside
    return x, index.sort().values if layout == "sorted" else index


@pytest.mark.parametrize("layout", ("random", "sorted", "strided", "transposed"))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_against_the_loop_in_float64(name, dtype, layout):
    for n, shape, k in [(0, (3,), 0), (0, (3,), 4), (1, (), 1), (5, (0,), 3), (63, (), 5), (257, (1,), 300), (257, (7,), 31), (257, (8,), 31), (257, (3, 5), 1),
                        (1500, (65,), 40), (700, (3, 33), 900)]:
        x, index = make(n, shape, k, dtype, layout)
        before = x.clone(), index.clone()
        got = call(name, x, index, k)
        assert got.dtype == dtype and got.shape == (k, *shape)
        assert torch.equal(x, before[0]) and torch.equal(index, before[1])
        expected = torch.stack([DENSE[name](x[index == j].double()) for j in range(k)]) if k else got.double()
        torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype] * (10 if name == "sum" else 1), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_softmax_against_the_loop(dtype):
    for n, shape, k in [(0, (3,), 4), (1, (), 1), (257, (1,), 300), (257, (3, 5), 1), (3000, (65,), 40)]:
        x, index = make(n, shape, k, dtype, "random")
        p = segment_softmax(30 * x, index, k)
        assert p.dtype == dtype and p.shape == x.shape
        for j in index.unique():
            torch.testing.assert_close(p[index == j].double(), (30 * x)[index == j].double().softmax(0), atol=TOLERANCE[dtype], rtol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("n, d", ((40, 5), (6000, 50)))  # plain and blocked
def test_slots_on_different_levels_and_masks(n, d):
    g = torch.Generator().manual_seed(0)
    index = torch.randint(30, (n,), generator=g)
    x = torch.randn(n, d, generator=g) + 2.0**14 * (index[:, None] % 3 - 1)
    values = torch.randn(n, d, generator=g)
    x[index == 4] = -math.inf
    x[index == 5, 0] = -math.inf
    p, y, z = segment_softmax(x, index, 31), segment_softmax_sum(values, x, index, 31), segment_logsumexp(x, index, 31)
    for j in range(31):
        own = x[index == j].double()
        expected = own.softmax(0).nan_to_num(0)
        torch.testing.assert_close(p[index == j].double(), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(y[j].double(), (expected * values[index == j].double()).sum(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(z[j].double(), own.logsumexp(0), atol=2e-3, rtol=0)
    x[index == 7] = math.nan
    assert segment_softmax(x, index, 31)[index == 7].isnan().all() and segment_softmax(x, index, 31)[index != 7].isfinite().all()
    assert segment_softmax_sum(values, x, index, 31)[7].isnan().all() and segment_softmax_sum(values, x, index, 31)[8].isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_gradients_to_second_order(name):
    g = torch.Generator().manual_seed(0)
    index = torch.randint(9, (15,), generator=g)
    used = index.unique()
    x = torch.rand(15, 2, 2, generator=g, dtype=torch.float64).requires_grad_()
    finite = lambda t: call(name, t, index, 11) if name == "softmax" else call(name, t, index, 11)[used]
    assert gradcheck(finite, x)
    if name != "max": assert gradgradcheck(finite, x)
    assert torch.allclose(torch.func.grad(lambda t: finite(t).square().sum())(x), torch.autograd.grad(finite(x).square().sum(), x)[0])


def test_gradient_of_the_blocked_softmax_sum():
    g = torch.Generator().manual_seed(0)
    x, l = (torch.randn(6000, 50, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    index, c = torch.randint(70, (6000,), generator=g), torch.randn(71, 50, generator=g, dtype=torch.float64)
    loop = sum((c[j] * (l[index == j].softmax(0) * x[index == j]).sum(0)).sum() for j in range(70))
    ours = (c * segment_softmax_sum(x, l, index, 71)).sum()
    for got, expected in zip(torch.autograd.grad(ours, (x, l)), torch.autograd.grad(loop, (x, l))): torch.testing.assert_close(got, expected)


def test_gradient_of_the_softmax_sum_of_itself():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 50, generator=g, dtype=torch.float64).requires_grad_()
    for far in (0, 1000):  # without a maximum and with one per slot
        index, c = torch.randint(70, (6000,), generator=g), torch.randn(71, 50, generator=g, dtype=torch.float64)
        y = x + far
        loop = sum((c[j] * (y[index == j].softmax(0) * y[index == j]).sum(0)).sum() for j in range(70))
        got, = torch.autograd.grad((c * segment_softmax_sum(y, y, index, 71)).sum(), x, retain_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(loop, x)[0])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n, k", ((300, 20), (6000, 20), (6000, 5900)))
def test_both_sides_of_the_range(dtype, n, k):
    x, index = make(n, (50,), k, torch.float64, "random")
    reach = -math.log(torch.finfo(torch.promote_types(dtype, torch.float32)).tiny) / 2
    x *= 0.98 * reach / x.abs().max()
    x[index == 0], x[index == 2] = -0.98 * reach, 0.98 * reach
    index[-1] = 3
    for outlier in (0.98, 1.05, 300, -300):  # a single number of slot 3 decides for all
        x[-1, 0] = outlier * reach
        short = x.to(dtype)
        p, y = segment_softmax(short, index, k).double(), segment_softmax_sum(short, short, index, k).double()
        for j in index.unique()[:50]:
            own = short[index == j].double()
            torch.testing.assert_close(p[index == j], own.softmax(0), atol=TOLERANCE[dtype] if dtype.itemsize < 4 else 0, rtol=TOLERANCE[dtype])
            torch.testing.assert_close(y[j], (own.softmax(0) * own).sum(0), atol=reach * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ALL)
def test_empty_input_passes_gradients(name):
    x = torch.zeros(0, 3, requires_grad=True)
    call(name, x, torch.zeros(0, dtype=torch.int64), 4).sum().backward()
    assert x.grad.shape == (0, 3)


@pytest.mark.parametrize("name", ALL)
def test_same_bits_on_every_run_and_any_number_of_threads(name):
    before = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # none of the calls may be one that PyTorch declares nondeterministic
        for d in (3, 64):
            x, index = make(20_000, (d,), 50, torch.float32, "random")
            bits = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                bits.append(call(name, x, index, 50))
            assert torch.equal(bits[0], bits[1]) and torch.equal(bits[1], bits[2])
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)


def test_whole_numbers_are_exact():
    x = torch.tensor([[2**53, -128], [1, 127], [1, 127]])
    assert segment_sum(x, torch.tensor([0, 0, 0])).tolist() == [[2**53 + 2, 126]]
    assert segment_sum(x.to(torch.int8)[:, 1], torch.tensor([1, 1, 1])).tolist() == [0, 126]
    assert segment_max(torch.tensor([3, 200], dtype=torch.uint8), torch.tensor([0, 2])).tolist() == [3, 0, 200]
    assert segment_sum(torch.tensor([True, True]), torch.tensor([0, 0])).tolist() == [2]


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
def test_any_whole_number_type_of_index(dtype):
    x, index = make(50, (9,), 7, torch.float32, "random")
    for name in ALL: assert torch.equal(call(name, x, index.to(dtype), 7), call(name, x, index, 7))


@pytest.mark.parametrize("k", (1, 2**15, 2**15 + 1, 10**6))
def test_sort_by_slot_is_stable_and_comes_back(k):
    index = torch.randint(k, (3001,), generator=torch.Generator().manual_seed(0))
    order, counts = sort_by_slot(index, k)
    assert torch.equal(order, torch.argsort(index, stable=True)) and torch.equal(counts, torch.bincount(index, minlength=k))
    x = torch.randn(3001, 2)
    assert torch.equal(unsort(x[order], order), x)


@pytest.mark.parametrize("size", (1, 10, 10**6))
def test_dense_blocks_partition_the_items(size):
    index = (torch.rand(5000, generator=torch.Generator().manual_seed(0)) ** -1.2).long().clamp(max=400) - 1
    blocks = list(dense_blocks(index, 400, size))
    assert torch.equal(torch.cat([items.flatten() for _, items in blocks]).sort().values, torch.arange(5000))
    for slots, items in blocks:
        assert len(slots) == len(items) and (len(slots) == 1 or items.numel() <= size)
        assert (index[items] == slots[:, None]).all() and (items.diff(dim=1) > 0).all()


def test_bad_input_names_the_argument():
    x, index = torch.randn(4, 2), torch.tensor([0, 1, 1, 5])
    for name in ALL:
        for message, args in [("index must be at least 0 and below n_segments = 5, got 5", (x, index, 5)), ("index .* got -1", (x, index - 1, 5)),
                              ("index must be a vector", (x, index.float(), 6)), ("index must be a vector", (x, index > 0, 6)),
                              ("x must have one row per entry", (x[:3], index, 6)), ("index must be a vector", (x, index[:, None], 6)),
                              ("n_segments must be", (x, index, 2.5)), ("x must", (x > 0 if name != "sum" else x + 0j, index, 6))]:
            with pytest.raises(ValueError, match=message): call(name, *args)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ALL)
def test_cuda_equals_cpu_and_repeats(name):
    x, index = make(20_000, (65,), 50, torch.float32, "random")
    on_gpu = [call(name, x.cuda(), index.cuda(), 51) for _ in range(2)]
    assert torch.equal(*on_gpu)
    torch.testing.assert_close(on_gpu[0].cpu(), call(name, x, index, 51), atol=1e-4, rtol=1e-5)


@pytest.mark.peers
def test_pytorch_geometric_agrees():
    nn, utils = pytest.importorskip("torch_geometric.nn"), pytest.importorskip("torch_geometric.utils")
    x, index = make(3000, (50,), 70, torch.float32, "random")
    torch.testing.assert_close(segment_softmax(x, index, 70), utils.softmax(x, index, num_nodes=70))
    for name, peer in [("sum", nn.SumAggregation()), ("mean", nn.MeanAggregation()), ("softmax_sum", nn.SoftmaxAggregation(t=1.0))]:
        torch.testing.assert_close(call(name, x, index, 70), peer(x, index, dim_size=70), atol=1e-4, rtol=1e-5)
    far = 1e4 + x[:, :1]  # the chapter's exercise quotes this
    assert (nn.VarAggregation()(far, index, dim_size=70) < -1).any()


@pytest.mark.peers
@pytest.mark.slow
def test_pace_beside_pytorch_geometric():
    pytest.importorskip("torch_geometric")
    spec = importlib.util.spec_from_file_location("segment_softmax", ROOT / "benchmarks" / "segment_softmax.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    before = torch.get_num_threads()
    try: found = {(k, ordered): benchmark.ratios(k=k, ordered=ordered, rounds=3) for k in (1000, 100_000) for ordered in (False, True)}
    finally: torch.set_num_threads(before)
    for (k, _), pace in found.items():
        assert pace["segment_softmax_sum"] > (8 if k == 1000 else 3), found
        assert pace["segment_softmax"] > 2, found  # its bound is "exp", 5 to 6
