"""Block-sparse products: PyTorch's own block-sparse format and dense matrices with zeros, finite differences; the bank of experts against a loop over tokens; the kernels in the interpreter and compiled."""
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: each test file has a process of its own

import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from deepclustering.moe import blocksparse
from deepclustering.moe.blocksparse import blocksparse_experts, dds, dsd, expert_topology, padded_rows, sdd, to_dense, topology
from deepclustering.moe.layer import MoE, SwiGLUExperts, TopKRouter
from deepclustering.moe.routing import Routing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def empty_memory_is_nan():
    "What a kernel does not write would show: in deterministic mode torch.empty is filled with NaN."
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pattern(R, C, b, share, seed=0):
    g = torch.Generator().manual_seed(seed)
    there = torch.rand(R, C, generator=g) < share
    t = topology(*there.nonzero().T.contiguous(), R, C, b)
    return t, there.repeat_interleave(b, 0).repeat_interleave(b, 1), g


PATTERNS = [(1, 1, 1, 1., 1), (3, 5, 2, .5, 7), (5, 3, 4, .2, 3), (4, 4, 3, 0., 2), (2, 6, 5, 1., 1)]


@pytest.mark.parametrize("R, C, b, share, Q", PATTERNS)
def test_topology_is_pytorch_s(R, C, b, share, Q):
    t, mask, g = pattern(R, C, b, share)
    dense = torch.randn(R * b, C * b, generator=g) * mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = mask.double().to_sparse_bsr((b, b))
    assert torch.equal(theirs.crow_indices(), t.offsets) and torch.equal(theirs.col_indices(), t.column)
    values = torch.stack([dense[r * b:r * b + b, c * b:c * b + b] for r, c in zip(t.row.tolist(), t.column.tolist())]) if len(t.row) else dense.new_zeros(0, b, b)
    assert torch.equal(to_dense(values, t), dense)
    by_column = sorted(range(len(t.row)), key=lambda k: (int(t.column[k]), int(t.row[k])))
    assert t.order.tolist() == by_column and t.offsets_t.tolist() == [sum(int(c) < j for c in t.column) for j in range(C + 1)]


@pytest.mark.parametrize("R, C, b, share, Q", PATTERNS)
def test_products_are_those_of_dense_matrices(R, C, b, share, Q):
    t, mask, g = pattern(R, C, b, share, 1)
    X, W, V = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((R * b, Q), (C * b, Q), (len(t.row), b, b)))
    S = to_dense(V, t)
    for got, want in ((to_dense(sdd(X, W, t), t), (X @ W.T) * mask), (dsd(V, W, t), S @ W), (dsd(V, X, t, transposed=True), S.T @ X), (dds(X.T, V, t), X.T @ S)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        direction = torch.randn(got.shape, generator=g, dtype=torch.float64)
        grads = (torch.autograd.grad((y * direction).sum(), (X, W, V), allow_unused=True, retain_graph=True, materialize_grads=True) for y in (got, want))
        for a, c in zip(*grads): torch.testing.assert_close(a, c, rtol=0, atol=1e-12)
    if 0 < V.numel() < 60:
        for f in (lambda x, w, v: sdd(x, w, t), lambda x, w, v: dsd(v, w, t), lambda x, w, v: dsd(v, x, t, True)): assert gradcheck(f, (X, W, V)) and gradgradcheck(f, (X, W, V))


def test_opcheck():
    t, _, g = pattern(3, 4, 2, .6)
    X, W, V = (torch.randn(*s, generator=g) for s in ((6, 5), (2, 4, 5), (len(t.row), 2, 2)))
    for op, arguments in ((blocksparse._sdd, (X, W, t.row, t.column, t.offsets, 2)), (blocksparse._dsd, (V, W, None, t.column, t.offsets)), (blocksparse._dsd, (V, X[None], t.order, t.row, t.offsets_t))):
        assert set(torch.library.opcheck(op.op, arguments).values()) == {"SUCCESS"}


def test_an_attention_window_by_the_same_products():
    t, mask, g = pattern(4, 4, 3, .6, 2)
    mask |= torch.eye(4, dtype=torch.bool).repeat_interleave(3, 0).repeat_interleave(3, 1)
    t = topology(*mask[::3, ::3].nonzero().T.contiguous(), 4, 4, 3)
    q, k, v = torch.randn(3, 12, 5, generator=g, dtype=torch.float64)
    P = (sdd(q, k, t) / 5**.5).exp()
    y = dsd(P, v, t) / dsd(P, torch.ones(12, 1, dtype=torch.float64), t)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0])


@pytest.mark.parametrize("counts, b", [([3, 1], 2), ([0, 0], 4), ([0, 5, 8, 1], 4), ([7], 1), ([1, 1, 1], 16)])
def test_expert_topology_by_hand(counts, b):
    t, at = expert_topology(torch.tensor(counts), 2 * b, b), padded_rows(torch.tensor(counts), b, sum(counts))
    want, places, row = [], [], 0
    for e, c in enumerate(counts):
        places += range(row * b, row * b + c)
        for _ in range(-(-c // b)):
            want += [(row, 2 * e), (row, 2 * e + 1)]
            row += 1
    assert list(zip(t.row.tolist(), t.column.tolist())) == want and at.tolist() == places
    assert len(t.offsets) == row + 1 and len(t.offsets_t) == 2 * len(counts) + 1


# --- the bank -----------------------------------------------------------------------------------------------------------

def random_dispatch(T, E, K, drop=0., dtype=torch.float64, seed=0, empty=False):
    g = torch.Generator().manual_seed(seed)
    w, e = torch.rand(T, E, generator=g, dtype=dtype).topk(K, 1)
    if empty: w, e = torch.rand(T, E - 1, generator=g, dtype=dtype).topk(K, 1)
    gone = torch.rand(T, K, generator=g) < drop
    return e.masked_fill(gone, -1), w.masked_fill(gone, 0).requires_grad_(), g


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


@pytest.mark.parametrize("T, D, width, E, K, drop, block", [(1, 3, 4, 1, 1, 0, None), (13, 7, 6, 4, 4, 0, 3), (100, 5, 8, 7, 2, .3, None), (19, 4, 12, 9, 3, 0, 12), (9, 2, 5, 3, 2, 0, None)])
def test_every_gradient_is_the_loop_s(T, D, width, E, K, drop, block):
    e, w, g = random_dispatch(T, E, K, drop, empty=E > K)
    bank = SwiGLUExperts(D, width, E, "blocksparse").double()
    x = torch.randn(T, D, generator=g, dtype=torch.float64, requires_grad=True)
    leaves = x, w, bank.gate_up_proj, bank.down_proj
    d = Routing(e, w, num_experts=E).to_dispatch()
    got, want = blocksparse_experts(x, d, *leaves[2:], block), loop(x, e, w, *leaves[2:])
    for a, b in zip((got, *torch.autograd.grad(got.cos().sum(), leaves)), (want, *torch.autograd.grad(want.cos().sum(), leaves))): torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    torch.testing.assert_close(bank(x, d), got)


def test_in_the_layer():
    torch.manual_seed(0)
    layer = MoE(TopKRouter(8, 6, 2), SwiGLUExperts(8, 16, 6, "blocksparse"))
    x = torch.randn(3, 5, 8)
    y = layer(x)
    layer.experts.implementation = "loop"
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)
    layer.experts.implementation = "blocksparse"
    assert layer(x[:0]).shape == (0, 5, 8)
    layer(x[:0]).sum().backward()
    assert layer.experts.gate_up_proj.grad.abs().sum() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16): assert layer(x).dtype == torch.bfloat16


# --- kernels --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def kernels(monkeypatch):
    "The operators run their kernels, also on the CPU."
    triton = pytest.importorskip("deepclustering.moe.blocksparse_triton")
    for op, kernel in ((blocksparse._sdd, triton.launch_sdd), (blocksparse._dsd, triton.launch_dsd)): monkeypatch.setattr(op, "reference", kernel)
    return triton


@all_dtypes
@pytest.mark.parametrize("R, C, b, share, Q", [(3, 4, 16, .5, 40), (2, 3, 32, .7, 130), (1, 2, 64, 1., 64), (3, 2, 16, 0., 5)])
def test_kernels_against_float64(R, C, b, share, Q, dtype, kernels):
    t, mask, g = pattern(R, C, b, share, 3)
    X, W, V = (torch.randn(*s, generator=g).to(dtype) for s in ((R * b, Q), (C, Q, b), (len(t.row), b, b)))
    W = W.mT                                                        # in parts and with other strides
    x, w, S, eps = X.double(), W.double().reshape(-1, Q), to_dense(V.double(), t), 2 * torch.finfo(dtype).eps
    for got, want in ((to_dense(sdd(X, W, t), t), (x @ w.T) * mask), (dsd(V, W, t), S @ w), (dsd(V, X, t, transposed=True), S.T @ x)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0, atol=eps * float(want.abs().max()) if want.numel() else 0)


@all_dtypes
def test_the_bank_through_the_kernels(dtype, kernels):
    e, w, g = random_dispatch(50, 5, 2, .2, torch.float32, empty=True)
    x, up, down, arriving = (torch.randn(*s, generator=g) / 4 for s in ((50, 20), (5, 32, 20), (5, 20, 16), (50, 20)))
    exact = [t.double().requires_grad_() for t in (x, w.detach(), up, down)]
    want = loop(exact[0], e, *exact[1:])
    want = want, *torch.autograd.grad(want, exact, arriving.double())
    leaves = [t.to(dtype).requires_grad_() for t in (x, up, down)]
    got = blocksparse_experts(leaves[0], Routing(e, w, num_experts=5).to_dispatch(), *leaves[1:])
    got = got, *torch.autograd.grad(got, (leaves[0], w, *leaves[1:]), arriving.to(dtype))
    for a, b in zip(got, want): torch.testing.assert_close(a.double(), b, rtol=0, atol=10 * torch.finfo(dtype).eps * float(b.detach().abs().max()))
    again = blocksparse_experts(leaves[0], Routing(e, w, num_experts=5).to_dispatch(), *leaves[1:])
    assert torch.equal(again, got[0])


def test_odd_blocks_fall_back():
    triton = pytest.importorskip("deepclustering.moe.blocksparse_triton")
    t, _, g = pattern(2, 2, 3, 1.)
    X, W = torch.randn(6, 4, generator=g), torch.randn(1, 6, 4, generator=g)
    with pytest.raises(triton.Unfit, match="blocks of 3"): triton.launch_sdd(X, W, t.row, t.column, t.offsets, 3)
    assert torch.equal(blocksparse._sdd._launch(X, W, t.row, t.column, t.offsets, 3), blocksparse._sdd.reference(X, W, t.row, t.column, t.offsets, 3))


def test_every_kernel_compiles_without_spills():
    triton = pytest.importorskip("deepclustering.moe.blocksparse_triton")
    from deepclustering.core.kernels import compile_ahead
    ahead = compile_ahead("deepclustering.moe.blocksparse_triton", (80, 90))
    assert len(ahead) == 2 * len(triton.AHEAD) and {r["kernel"] for r in ahead} == {"_sdd", "_dsd"}
    for row in ahead: assert row["fits"] and row["spills"] == 0 and row["registers"] <= 255, row
    for row in ahead:
        if row["sm"] == 90 and "bf16" in row["types"]: assert row["shared"] <= 113 * 1024 and row["registers"] <= 128, row  # two programs on a processor


# --- bad input ---------------------------------------------------------------------------------------------------------------

def test_bad_input():
    t, _, g = pattern(3, 4, 2, 1.)
    X, W, V = torch.randn(6, 5, generator=g), torch.randn(8, 5, generator=g), torch.randn(12, 2, 2, generator=g)
    for call, message in ((lambda: sdd(X[:4], W, t), "x must have shape"), (lambda: sdd(X, W[:4], t), "w must have 8 rows"), (lambda: sdd(X, W[:, :2], t), "w must have the 5 columns"), (lambda: sdd(X, W.double(), t), "dtype"),
                          (lambda: dsd(V[:3], W, t), "values must have shape"), (lambda: dsd(V, X, t), "w must have 8 rows"), (lambda: dsd(V, W, t, transposed=True), "w must have 6 rows"), (lambda: topology(t.row, t.column, 3, 3, 2), "column must be between"),
                          (lambda: topology(t.row.flip(0), t.column, 3, 4, 2), "once"), (lambda: topology(t.row, t.column, 3, 4, 0), "block"), (lambda: expert_topology(torch.tensor([1]), 5, 2), "width must be a multiple"), (lambda: expert_topology(torch.tensor([1]), 0, 2), "width")):
        with pytest.raises(ValueError, match=message): call()
    e, w, g = random_dispatch(4, 3, 2, dtype=torch.float32)
    d, x, up, down = Routing(e, w, num_experts=3).to_dispatch(), torch.randn(4, 5), torch.randn(3, 8, 5), torch.randn(3, 5, 4)
    for arguments, message in (((x[:3], d, up, down), "x must have shape"), ((x, d, up[:, :7], down), "must fit"), ((x, d, up[:2], down[:2]), "experts of d"), ((x, d, up, down, 3), "multiple of block"), ((x.double(), d, up, down), "dtype")):
        with pytest.raises(ValueError, match=message): blocksparse_experts(*arguments)
