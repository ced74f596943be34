"""The contrastive loss's kernels under Triton's interpreter, against float64. (Compiled ahead for three GPUs in the notebook, which asserts that each kernel fits and nothing spills.)"""
import math
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
from deepclustering.core.kernels import accesses  # noqa: E402
from deepclustering.core.operators import Unfit, on_cpu  # noqa: E402
from deepclustering.parallelism import contrastive  # noqa: E402
from deepclustering.parallelism import contrastive_triton as kernels  # noqa: E402

LAUNCHERS = {contrastive._both: kernels.both_logsumexps, contrastive._both_gradient: kernels.both_gradients}
DTYPES = torch.float32, torch.float16, torch.bfloat16
EPS = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 2**-13}  # the interpreter cuts bfloat16 off, 2^-14 for two halves; a GPU rounds


def inputs(n, k, d, dtype=torch.float32, scale=6.):
    "Features, sums and gradients of both signs; sums as they are for these features."
    g = torch.Generator().manual_seed(n + k)
    x, y = (F.normalize(torch.randn(rows, d, generator=g), dim=1).to(dtype) for rows in (n, k))
    t = scale * x.double() @ y.double().T
    return x, y, t.logsumexp(1).float(), t.logsumexp(0).float(), torch.randn(n, generator=g), torch.randn(k, generator=g), scale


def by_matrix(x, y, R, C, gR, gC, scale):
    x, y, R, C, gR, gC = (t.double() for t in (x, y, R, C, gR, gC))
    t = scale * x @ y.T
    G = torch.einsum("i,ij->ij", gR, (t - R.unsqueeze(1)).exp()) + torch.einsum("j,ij->ij", gC, (t - C.unsqueeze(0)).exp())
    return torch.einsum("ij,jd->id", G, y), torch.einsum("ij,id->jd", G, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, k, d, numbers", ((1, 1, 1, 1), (3, 4, 5, 1), (19, 17, 19, kernels.TILE), (10, 17, 150, 64), (2, 40, 16, 30), (40, 2, 33, 30), (2, 2, 0, 4)), ids=str)
def test_sums_and_gradients(n, k, d, numbers, dtype):
    "No tile divides these; with one score a tile everything is merging."
    given = inputs(n, k, d, dtype)
    for got, want in zip(kernels.both_logsumexps(*given[:2], 6., numbers), given[2:4]):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for got, want in zip(kernels.both_gradients(*given, numbers), by_matrix(*given)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=EPS[dtype], rtol=EPS[dtype])


def test_columns_in_shares_and_blocks():
    "Several shares of rows, more than 128 columns of a program, more than 1,024 of a step."
    g = torch.Generator().manual_seed(1)
    for m, k, each in ((70, 3, 32), (2, 1100, 512), (17, 257, 16)):
        t = torch.randn(m, k, generator=g)
        rows, columns = kernels._tile_sums(t, -3., each)
        torch.testing.assert_close(rows.double(), (-3 * t.double()).logsumexp(1), atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(columns.double(), (-3 * t.double()).logsumexp(0), atol=1e-5, rtol=1e-6)
    given = inputs(2, 1100, 6, torch.float16)
    for got, want in zip(kernels.both_gradients(*given), by_matrix(*given)): torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_each_weight_alone():
    "Rows only and columns only: the softmax of either side."
    x, y, R, C, gR, gC, scale = inputs(40, 30, 8)
    t = scale * x.double() @ y.double().T
    to_x, _ = kernels.both_gradients(x, y, R, C, torch.ones(40), torch.zeros(30), scale)
    torch.testing.assert_close(to_x.double(), t.softmax(1) @ y.double(), atol=1e-5, rtol=1e-5)
    _, to_y = kernels.both_gradients(x, y, R, C, torch.zeros(40), torch.ones(30), scale)
    torch.testing.assert_close(to_y.double(), t.softmax(0).T @ x.double(), atol=1e-5, rtol=1e-5)
    for dtype in DTYPES: assert all((t == 0).all() for t in kernels.both_gradients(x.to(dtype), y.to(dtype), R, C, torch.zeros(40), torch.zeros(30), scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (1e-25, 1., 1e25), ids=str)
def test_gradients_of_any_size(size, dtype):
    "float16 ends at 6e-8 and 65,504; rows may differ by 2^20."
    x, y, R, C, gR, gC, scale = inputs(12, 9, 8, dtype)
    gR, gC = size * gR / 2**20, size * gC / 2**20
    gR[3] *= 2**20
    got, want = kernels.both_gradients(x, y, R, C, gR, gC, scale), by_matrix(x, y, R, C, gR, gC, scale)
    for a, b in zip(got, want): torch.testing.assert_close(a.double() / size, b / size, atol=EPS[dtype], rtol=EPS[dtype])
    small = torch.arange(12) != 3                                   # their weights are a millionth of the largest
    torch.testing.assert_close(got[0][small].double() / size * 2**20, want[0][small] / size * 2**20, atol=2**-13, rtol=2**-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", (5., -5., 0.))
def test_what_is_not_finite(scale, dtype):
    "As plain PyTorch on the same tensors."
    g = torch.Generator().manual_seed(2)
    for value, place in ((math.nan, "x"), (math.inf, "y"), (-math.inf, "x"), (math.nan, "gR"), (math.inf, "gC"), (-math.inf, "gR")):
        x, y = (torch.randn(n, 3, generator=g).to(dtype) for n in (5, 4))
        gR, gC = torch.randn(5, generator=g), torch.randn(4, generator=g)
        {"x": x[2], "y": y[1], "gR": gR, "gC": gC}[place][0] = value
        for plain, launcher, rest in ((contrastive._both.reference, kernels.both_logsumexps, ()), (contrastive._both_gradient.reference, kernels.both_gradients, (*contrastive._both.reference(x, y, scale), gR, gC))):
            with np.errstate(invalid="ignore"): found = launcher(x, y, *rest, scale, 6)
            for got, want in zip(found, plain(x, y, *rest, scale)): torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3, equal_nan=True)


def test_huge_scores():
    for scale in (1e4, -1e4):
        given = inputs(20, 20, 6, scale=scale)
        for got, want in zip(kernels.both_logsumexps(*given[:2], scale, 150), given[2:4]): torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-5)


def test_nothing_layouts_and_far_rows():
    x, y, R, C, gR, gC, scale = inputs(9, 7, 6)
    want = kernels.both_gradients(x, y, R, C, gR, gC, scale)
    for n, k in ((0, 3), (3, 0), (0, 0)):
        to_x, to_y = kernels.both_gradients(x[:n], y[:k], R[:n], C[:k], gR[:n], gC[:k], scale)
        assert to_x.shape == (n, 6) and to_y.shape == (k, 6) and (to_x == 0).all() and (to_y == 0).all()
        found = kernels.both_logsumexps(x[:n], y[:k], scale)
        assert [t.shape for t in found] == [(n,), (k,)] and all((t == -math.inf).all() for t in found)
    spread = torch.full((9, 2, 13), torch.nan)
    spread[:, 0, :12:2] = x
    far = torch.empty(2**31 + 64).as_strided(y.shape, (2**28, 1))
    far.copy_(y)
    kept = [t.clone() for t in (x, y, R, C, gR, gC)]
    for a, b in ((spread[:, 0, :12:2], y), (x.T.contiguous().T, y), (F.pad(x, (3, 4), value=9)[:, 3:-4], y), (x, far)):
        for got, expected in zip(kernels.both_gradients(a, b, R, C, gR, gC, scale), want): torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert all(map(torch.equal, kernels.both_gradients(x, y, R, C, torch.stack([gR, gR], 1)[:, 0], gC, scale), want))
    assert all(map(torch.equal, (x, y, R, C, gR, gC), kept))         # nothing of the caller's is written


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits(dtype):
    given = inputs(9, 11, 5, dtype)
    for numbers in (20, kernels.TILE):
        assert all(map(torch.equal, kernels.both_gradients(*given, numbers), kernels.both_gradients(*given, numbers)))
        assert all(map(torch.equal, kernels.both_logsumexps(*given[:2], 6., numbers), kernels.both_logsumexps(*given[:2], 6., numbers)))


def test_each_score_once(monkeypatch):
    "Twice for the sums, once for the weights; each half is written once."
    real, tiles = kernels._product, []
    def product(a, b): tiles.append(real(a, b)); return tiles[-1]
    monkeypatch.setattr(kernels, "_product", product)
    given = inputs(40, 70, 6, torch.bfloat16)
    with accesses() as seen: kernels.both_logsumexps(*given[:2], 6.)
    def touched(t, stored): return sum(int(((a.addresses >= t.data_ptr()) & (a.addresses < t.data_ptr() + t.nbytes)).sum()) for a in seen if a.stored == stored)
    assert (touched(tiles[0], False), touched(tiles[0], True)) == (2 * 40 * 70, 0)
    tiles.clear()
    with accesses() as seen: kernels.both_gradients(*given)
    assert (touched(tiles[0], False), touched(tiles[0], True)) == (40 * 70, 0)
    assert sum(len(a.addresses) for a in seen if a.stored) == 2 * 40 * 70 and {a.size for a in seen if a.stored} == {2}


class Watch(TorchDispatchMode):
    "The largest tensor that an operator made, and whether Python asked for a number."
    largest = waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_memory_and_waiting(monkeypatch):
    "Two numbers a score of a tile, whatever the batch; and no number is read back."
    monkeypatch.setattr(kernels, "launch", lambda *args, **constants: None)
    x, R = torch.randn(200, 4).half(), torch.randn(200)
    with Watch() as seen: kernels.both_gradients(x, x, R, R, R, R, 1., 2025)
    assert seen.largest == 2 * 2025 and not seen.waits
    with Watch() as seen: kernels.both_logsumexps(x, x, 1., 2030)
    assert seen.largest == 45**2 and not seen.waits


def test_refuses_what_has_no_kernel():
    given = [t.double() if isinstance(t, torch.Tensor) else t for t in inputs(3, 3, 2)]
    with pytest.raises(Unfit, match="float64"): kernels.both_gradients(*given)
    with pytest.raises(Unfit, match="float64"): kernels.both_logsumexps(*given[:2], 1.)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", (True, False))
def test_the_loss_by_kernels(symmetric, dtype, monkeypatch):
    monkeypatch.setitem(LAUNCHERS, contrastive._both_gradient, lambda *args: kernels.both_gradients(*args, numbers=150))
    x, y, *_ = inputs(20, 20, 20)
    def gradients(dtype, wide=False):
        leaves = [t.detach().to(dtype) for t in (x, y)] + [torch.tensor(9.)]
        leaves = [(t.double() if wide else t).requires_grad_() for t in leaves]
        losses = contrastive.contrastive_losses(*leaves, symmetric)
        return losses.detach(), *torch.autograd.grad(losses.mean(), leaves)
    with on_cpu(LAUNCHERS): found = gradients(dtype)
    for i, (got, want) in enumerate(zip(found, gradients(dtype, True))):
        eps = torch.finfo(dtype).eps if i in (1, 2) else EPS[dtype] if i == 3 else 1e-5
        torch.testing.assert_close(got.double(), want, atol=max(3e-6, eps * float(want.abs().max())), rtol=0)
