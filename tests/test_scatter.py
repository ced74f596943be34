"""Products that fetch and deliver: four modes against loops in NumPy, the bank against one token at a time in float64 with second derivatives, bytes kept; the kernels in the interpreter and compiled."""
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: each test file has a process of its own

import logging

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from deepclustering.moe import scatter
from deepclustering.moe.layer import MoE, SwiGLUExperts, TopKRouter
from deepclustering.moe.routing import Routing
from deepclustering.moe.scatter import kept_bytes, parallel_linear, scatter_experts

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TINY = 16, 16, 16, 4, 1


@pytest.fixture(autouse=True)
def empty_memory_is_nan():
    "What a kernel does not write would show: in deterministic mode torch.empty is filled with NaN."
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(T, E, K, drop=0., dtype=torch.float64, seed=0, unpopular=False):
    "A random routing; `unpopular`: expert 0 is never chosen."
    g = torch.Generator().manual_seed(seed)
    w, e = torch.rand(T, E - unpopular, generator=g, dtype=dtype).topk(K, 1)
    gone = torch.rand(T, K, generator=g) < drop
    e, w = (e + unpopular).masked_fill(gone, -1), w.masked_fill(gone, 0).requires_grad_()
    return e, w, Routing(e, w, num_experts=E).to_dispatch(), g


def linear_by_hand(x, W, counts, into, out, scale, rows):
    x, W, y, i = x.numpy(), W.numpy(), np.zeros((rows, W.shape[1])), 0
    for e, c in enumerate(counts.tolist()):
        for _ in range(c):
            y[i if out is None else int(out[i])] = (1 if scale is None else float(scale[i])) * (W[e] @ x[i if into is None else int(into[i])])
            i += 1
    return torch.from_numpy(y)


def loop(x, e, w, up, down):
    "Deliberately dumb: one token, one choice."
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for i, v in zip(e[t].tolist(), w[t]):
            if i < 0: continue
            gate, more = (up[i] @ x[t]).chunk(2)
            y = y + v * (down[i] @ (gate * torch.sigmoid(gate) * more))
        rows.append(y)
    return torch.stack(rows)


# --- the product ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, E, K, P, Q, drop", [(1, 1, 1, 1, 1, 0), (9, 4, 2, 5, 3, 0), (20, 7, 3, 2, 6, .4), (5, 3, 2, 4, 4, 1.)])
def test_four_modes_by_hand(T, E, K, P, Q, drop):
    _, _, d, g = make(T, E, K, drop, unpopular=E > K)
    into, out, n = d.pairs // K, d.pairs, len(d.pairs)
    W = torch.randn(E, P, Q, generator=g, dtype=torch.float64)
    for i, o, rows in ((into, None, n), (None, None, n), (None, out, T * K), (into, out, T * K + 2)):
        x = torch.randn(T if i is not None else n, Q, generator=g, dtype=torch.float64)
        torch.testing.assert_close(parallel_linear(x, W, d.counts, i, o, rows), linear_by_hand(x, W, d.counts, i, o, None, rows), rtol=0, atol=1e-12)
        scale = torch.rand(n, generator=g, dtype=torch.float64)
        torch.testing.assert_close(scatter._linear(x, W.mT.contiguous(), d.counts, i, o, scale, rows, True), linear_by_hand(x, W, d.counts, i, o, scale, rows), rtol=0, atol=1e-12)
        if n: assert gradcheck(lambda x, W: parallel_linear(x, W, d.counts, i, o, rows), (x.requires_grad_(), W.clone().requires_grad_()))


def test_the_formulas_that_cuda_gets():
    _, _, d, g = make(6, 4, 2, .2)
    into, out, n = d.pairs // 2, d.pairs, len(d.pairs)
    x, W = torch.randn(6, 3, generator=g, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    for arguments in ((into, None, None, n, False), (into, out, None, 12, False)):
        assert gradcheck(lambda x, W: scatter._linear.op(x, W, d.counts, *arguments), (x, W))
    assert set(torch.library.opcheck(scatter._linear.op, (x, W, d.counts, into, out, None, 12, False)).values()) == {"SUCCESS"}
    turned = W.detach().mT.contiguous().requires_grad_()
    assert gradcheck(lambda x, W: scatter._linear.op(x, W, d.counts, into, out, None, 12, True), (x, turned))
    for op, arguments in ((scatter._outer, (x.detach(), x.detach(), d.counts, into, into)), (scatter._gated, (x.detach(), W.detach()[:, :4].contiguous(), d.counts, into)), (scatter._gate_gradient, (torch.randn(n, 6), torch.randn(n, 3), torch.rand(n)))):
        assert set(torch.library.opcheck(op.op, arguments).values()) == {"SUCCESS"}


# --- the bank -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, D, width, E, K, drop", [(1, 3, 5, 1, 1, 0), (1, 4, 2, 7, 3, 0), (13, 7, 5, 4, 4, 0), (100, 5, 3, 29, 2, 0), (17, 6, 9, 5, 3, .4)])
def test_every_gradient_is_the_loop_s(T, D, width, E, K, drop):
    e, w, d, g = make(T, E, K, drop, unpopular=E > K)
    x, up, down = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((T, D), (E, 2 * width, D), (E, D, width)))
    got, want = scatter_experts(x, d, up, down), loop(x, e, w, up, down)
    for a, b in zip((got, *torch.autograd.grad(got.cos().sum(), (x, w, up, down))), (want, *torch.autograd.grad(want.cos().sum(), (x, w, up, down)))): torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_second_derivatives():
    e, w, _, g = make(4, 3, 2, .2)
    leaves = torch.randn(4, 3, generator=g, dtype=torch.float64, requires_grad=True), w.detach().requires_grad_(), torch.randn(3, 4, 3, generator=g, dtype=torch.float64, requires_grad=True), torch.randn(3, 3, 2, generator=g, dtype=torch.float64, requires_grad=True)
    def f(x, w, up, down): return scatter_experts(x, Routing(e, w.masked_fill(e < 0, 0), num_experts=3).to_dispatch(), up, down)
    assert gradcheck(f, leaves) and gradgradcheck(f, leaves)


def test_only_what_is_wanted():
    e, w, d, g = make(5, 3, 2, dtype=torch.float32)
    for wanted in range(3):
        tensors = [torch.randn(*s, generator=g).requires_grad_(i == wanted) for i, s in enumerate(((5, 4), (3, 6, 4), (3, 4, 3)))]
        calls = []
        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                calls.append(op.overloadpacket.__name__)
                return op(*args, **(kwargs or {}))
        y = scatter_experts(tensors[0], Routing(e, w.detach(), num_experts=3).to_dispatch(), *tensors[1:])
        with Watch(): y.sum().backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(3)]
        assert ("stack" in calls) == (wanted > 0)                   # the sum of outer products is for matrices


def test_bytes_kept_are_h_alone():
    e, w, d, g = make(50, 6, 3, dtype=torch.float32)
    for D, width in ((8, 4), (4, 16)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            bank, x = SwiGLUExperts(D, width, 6, "scatter").to(dtype), torch.randn(50, D, generator=g).to(dtype).requires_grad_()
            assert kept_bytes(lambda: bank(x, d), x, *bank.parameters(), w, e, d.pairs, d.counts) == 150 * 2 * width * dtype.itemsize


def test_in_the_layer_and_dtypes():
    torch.manual_seed(0)
    layer, x = MoE(TopKRouter(8, 6, 2), SwiGLUExperts(8, 5, 6, "scatter")), torch.randn(3, 5, 8)
    y = layer(x)
    layer.experts.implementation = "loop"
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)
    layer.experts.implementation = "scatter"
    layer(x[:0]).sum().backward()
    assert layer.experts.gate_up_proj.grad.abs().sum() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
        assert z.dtype == torch.bfloat16
        z.float().sum().backward()
    assert layer.experts.gate_up_proj.grad.dtype == torch.float32
    half = SwiGLUExperts(8, 5, 6, "scatter").bfloat16()
    e, w, d, g = make(9, 6, 2, dtype=torch.float32)
    assert half(torch.randn(9, 8).bfloat16(), d).dtype == torch.bfloat16
    few = MoE(TopKRouter(8, 6, 2), SwiGLUExperts(8, 5, 6, "scatter"), capacity_factor=.5)
    few(x).sum().backward()
    assert few.routing.stats["dropped"] > 0


def test_checkpointing_and_same_bits():
    e, w, d, g = make(30, 5, 2, dtype=torch.float32)
    bank, x = SwiGLUExperts(6, 4, 5, "scatter"), torch.randn(30, 6, generator=g, requires_grad=True)
    runs = []
    for f in (lambda: bank(x, d), lambda: bank(x, d), lambda: torch.utils.checkpoint.checkpoint(bank, x, d, use_reentrant=False)):
        y = f()
        runs.append((y, *torch.autograd.grad(y.sin().sum(), (x, *bank.parameters()))))
    for other in runs[1:]: assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


# --- kernels --------------------------------------------------------------------------------------------------------------

def triton_module(): return pytest.importorskip("deepclustering.moe.scatter_triton")


@pytest.fixture
def kernels(monkeypatch):
    "The operators run their kernels in tiny tiles, also on the CPU."
    t = triton_module()
    for op, kernel in ((scatter._linear, t.launch_linear), (scatter._gated, t.launch_gated), (scatter._outer, t.launch_outer)):
        monkeypatch.setattr(op, "reference", lambda *a, kernel=kernel: kernel(*a, tile=TINY))
    monkeypatch.setattr(scatter._gate_gradient, "reference", t.launch_gate_gradient)


@all_dtypes
@pytest.mark.parametrize("T, E, K, P, Q, drop", [(1, 1, 1, 1, 1, 0), (9, 3, 2, 32, 16, 0), (33, 5, 2, 17, 35, .3), (3, 2, 1, 5, 5, 1.)])
def test_kernels_by_hand(T, E, K, P, Q, drop, dtype):
    t, (_, _, d, g) = triton_module(), make(T, E, K, drop, torch.float32, unpopular=E > K)
    into, out, n = d.pairs // K, d.pairs, len(d.pairs)
    W, scale = torch.randn(E, P, Q, generator=g).to(dtype), torch.rand(n, generator=g)
    for i, o, s, rows, turned in ((into, None, None, n, False), (None, out, scale, T * K, False), (into, out, None, T * K + 1, True)):
        x = torch.randn(T if i is not None else n, Q, generator=g).to(dtype)
        got, want = t.launch_linear(x, W.mT.contiguous() if turned else W, d.counts, i, o, s, rows, turned, TINY), linear_by_hand(x.double(), W.double(), d.counts, i, o, s, rows)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2 * torch.finfo(dtype).eps * float(want.abs().max()) if n else 0)
    x, y = torch.randn(T, Q, generator=g).to(dtype), torch.randn(n, P, generator=g).to(dtype)
    G, i = torch.zeros(E, P, Q, dtype=torch.float64), 0
    for e, c in enumerate(d.counts.tolist()):
        for _ in range(c):
            G[e] += torch.outer(y[i].double(), x[into[i]].double())
            i += 1
    torch.testing.assert_close(t.launch_outer(y, x, d.counts, None, into, TINY).double(), G, rtol=0, atol=2 * torch.finfo(dtype).eps * float(G.abs().max()))


@all_dtypes
@pytest.mark.parametrize("T, D, width, E, K, drop", [(1, 3, 5, 1, 1, 0), (30, 19, 16, 5, 2, .2)])
def test_the_bank_through_the_kernels(T, D, width, E, K, drop, dtype, kernels):
    e, w, d, g = make(T, E, K, drop, torch.float32, unpopular=E > K)
    x, up, down, arriving = (torch.randn(*s, generator=g) / s[-1] ** .5 for s in ((T, D), (E, 2 * width, D), (E, D, width), (T, D)))
    exact = [t.to(dtype).double().requires_grad_() for t in (x, w.detach(), up, down)]
    exact[1] = w.detach().double().requires_grad_()
    want = loop(exact[0], e, *exact[1:])
    want = want, *torch.autograd.grad(want, exact, arriving.to(dtype).double())
    leaves = [t.to(dtype).requires_grad_() for t in (x, up, down)]
    y = scatter_experts(leaves[0], d, *leaves[1:])
    for a, b in zip((y, *torch.autograd.grad(y, (leaves[0], w, *leaves[1:]), arriving.to(dtype))), want):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=8 * torch.finfo(dtype).eps * float(b.detach().abs().max()))


def test_layouts_and_large_tiles():
    t, (_, _, d, g) = triton_module(), make(20, 3, 2, 0, torch.float32)
    into, n = d.pairs // 2, len(d.pairs)
    x, W = torch.randn(20, 24, generator=g), torch.randn(3, 40, 24, generator=g)
    want = scatter._linear(x, W, d.counts, into, None, None, n, False)
    for view in (torch.cat([x, x], 1)[:, :24], torch.stack([x, x], -1)[..., 0], x.T.contiguous().T):
        for tile in (TINY, None): torch.testing.assert_close(t.launch_linear(view, W, d.counts, into, None, None, n, False, tile), want, rtol=0, atol=1e-5)
    expanded = torch.ones(1, 1).expand(20, 24)                      # the gradient of a sum
    torch.testing.assert_close(t.launch_linear(expanded, W, d.counts, into, None, None, n, False, TINY), scatter._linear(expanded, W, d.counts, into, None, None, n, False), rtol=0, atol=1e-5)
    torch.testing.assert_close(t.launch_linear(x, W.mT.contiguous().mT, d.counts, into, None, None, n, False, TINY), want, rtol=0, atol=1e-5)


def test_extreme_gates():
    t = triton_module()
    h, r, w = torch.tensor([[-200., 0., 200., 1., 1., 1.]]), torch.ones(1, 3), torch.ones(1)
    dh, wa, dw = t.launch_gate_gradient(h, r, w)
    torch.testing.assert_close(wa, torch.tensor([[0., 0., 200.]]))
    torch.testing.assert_close(dh, torch.tensor([[0., .5, 1., 0., 0., 200.]]))
    assert dw.item() == 200


def test_falling_back_says_so(caplog):
    _, _, d, g = make(5, 3, 2)
    x, W = torch.randn(5, 4, generator=g, dtype=torch.float64), torch.randn(3, 2, 4, generator=g, dtype=torch.float64)
    with caplog.at_level(logging.WARNING): got = scatter._linear._launch(x, W, d.counts, d.pairs // 2, None, None, 10, False)
    assert torch.equal(got, scatter._linear(x, W, d.counts, d.pairs // 2, None, None, 10, False)) and "float64" in caplog.text


def test_every_kernel_compiles_without_spills():
    t = triton_module()
    from deepclustering.core.kernels import compile_ahead
    ahead = compile_ahead("deepclustering.moe.scatter_triton", (80, 90))
    assert len(ahead) == sum(2 - (options.get("since") == 90) for *_, options in t.AHEAD) and {r["kernel"] for r in ahead} == {"_linear", "_gated", "_outer", "_gate_gradient"}
    for row in ahead: assert row["fits"] and row["spills"] == 0, row
    for row in ahead:
        if row["kernel"] in ("_linear", "_outer") and "bf16" in row["types"] and row["sm"] == 90 and row["constants"]["COLUMNS"] == 128:
            assert row["shared"] <= 113 * 1024 and row["registers"] <= 128, row  # two programs on a processor


# --- bad input ---------------------------------------------------------------------------------------------------------------

def test_bad_input():
    e, w, d, g = make(4, 3, 2, dtype=torch.float32)
    x, W, into, out = torch.randn(4, 5), torch.randn(3, 2, 5), d.pairs // 2, d.pairs
    for call, message in ((lambda: parallel_linear(x[:, :4], W, d.counts, into), "must fit"), (lambda: parallel_linear(x, W, d.counts[:2], into), "must fit"), (lambda: parallel_linear(x[0], W, d.counts), "must fit"), (lambda: parallel_linear(x.double(), W, d.counts, into), "dtype of weight"),
                          (lambda: parallel_linear(x, W, d.counts, into.int()), "into must be int64"), (lambda: parallel_linear(x, W, d.counts, into, out[:2]), "out must be int64 of shape"), (lambda: parallel_linear(x, W, d.counts - 1, into), "counts must be"),
                          (lambda: parallel_linear(x, W, d.counts, into - 1), "into must be between 0 and 3"), (lambda: parallel_linear(x, W, d.counts, into, out, 5), "out must be between 0 and 4"), (lambda: parallel_linear(x, W, d.counts, into, out % 4, 8), "twice"),
                          (lambda: parallel_linear(x, W, d.counts, into, None, 9), "rows must be the 8 pairs"), (lambda: parallel_linear(x, W, torch.tensor([9, -1, 0]), into), "counts must be")):
        with pytest.raises(ValueError, match=message): call()
    up, down = torch.randn(3, 8, 5), torch.randn(3, 5, 4)
    for arguments, message in (((x[:3], d, up, down), "x must have shape"), ((x[0], d, up, down), "x must have shape"), ((x, d, up[:, :7], down), "must fit"), ((x, d, up, down.mT), "must fit"), ((x, d, up[:2], down[:2]), "experts of d"), ((x.double(), d, up, down), "dtype of the weights")):
        with pytest.raises(ValueError, match=message): scatter_experts(*arguments)
    with pytest.raises(ValueError, match="implementation must be one of loop"): SwiGLUExperts(4, 4, 2, "scattered")


def test_no_second_derivatives_through_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))   # every tensor is on the CPU and says it was on CUDA
    e, w, d, g = make(4, 3, 2)
    x, up, down = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (3, 4, 3), (3, 3, 2)))
    first, = torch.autograd.grad(scatter_experts(x, d, up, down).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative|no autograd formula"): torch.autograd.grad(first.sum(), x)
