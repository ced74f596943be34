"""The contrastive loss's kernels under Triton's interpreter, against float64. (Compiled ahead for three GPUs in the notebook, which asserts that each kernel fits.)"""
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from deepclustering.core.operators import Unfit, on_cpu  # noqa: E402
from deepclustering.parallelism import contrastive  # noqa: E402
from deepclustering.parallelism import contrastive_triton as kernels  # noqa: E402

LAUNCHERS = {contrastive._both: kernels.both_logsumexps, contrastive._both_gradient: kernels.both_gradients}


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


@pytest.mark.parametrize("n, k, d, dtype", ((1, 1, 1, torch.float32), (65, 33, 17, torch.float32), (3, 70, 150, torch.float32), (33, 65, 16, torch.float16), (20, 30, 140, torch.float16),
                                            (65, 66, 65, torch.bfloat16), (9, 10, 270, torch.bfloat16), (2, 2, 0, torch.float32)), ids=str)
def test_gradients(n, k, d, dtype):
    given = inputs(n, k, d, dtype)
    for got, want in zip(kernels.both_gradients(*given), by_matrix(*given)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_sums(dtype):
    x, y, *_ = inputs(70, 40, 30, dtype)
    t = 6 * x.double() @ y.double().T
    for got, dim in zip(kernels.both_logsumexps(x, y, 6.), (1, 0)): torch.testing.assert_close(got.double(), t.logsumexp(dim), atol=1e-5, rtol=1e-5)


def test_each_weight_alone():
    "Rows only and columns only: the softmax of either side."
    x, y, R, C, gR, gC, scale = inputs(40, 30, 8)
    t = scale * x.double() @ y.double().T
    to_x, _ = kernels.both_gradients(x, y, R, C, torch.ones(40), torch.zeros(30), scale)
    torch.testing.assert_close(to_x.double(), t.softmax(1) @ y.double(), atol=1e-5, rtol=1e-5)
    _, to_y = kernels.both_gradients(x, y, R, C, torch.zeros(40), torch.ones(30), scale)
    torch.testing.assert_close(to_y.double(), t.softmax(0).T @ x.double(), atol=1e-5, rtol=1e-5)
    assert all((t == 0).all() for t in kernels.both_gradients(x, y, R, C, torch.zeros(40), torch.zeros(30), scale))


def test_nothing_layouts_and_far_rows():
    x, y, R, C, gR, gC, scale = inputs(9, 7, 6)
    want = kernels.both_gradients(x, y, R, C, gR, gC, scale)
    for n, k in ((0, 3), (3, 0)):
        to_x, to_y = kernels.both_gradients(x[:n], y[:k], R[:n], C[:k], gR[:n], gC[:k], scale)
        assert to_x.shape == (n, 6) and to_y.shape == (k, 6) and (to_x == 0).all() and (to_y == 0).all()
    spread = torch.full((9, 2, 13), torch.nan)
    spread[:, 0, :12:2] = x
    far = torch.empty(2**31 + 64).as_strided(y.shape, (2**28, 1))
    far.copy_(y)
    for a, b in ((spread[:, 0, :12:2], y), (x.T.contiguous().T, y), (F.pad(x, (3, 4), value=9)[:, 3:-4], y), (x, far)):
        assert all(map(torch.equal, kernels.both_gradients(a, b, R, C, gR, gC, scale), want))
    assert all(map(torch.equal, kernels.both_gradients(x, y, R, C, torch.stack([gR, gR], 1)[:, 0], gC, scale), want))


def test_shares_change_only_rounding(monkeypatch):
    given = inputs(10, 300, 5)
    once = kernels.both_gradients(*given)
    monkeypatch.setattr(kernels, "_share", lambda programs, k, columns: (columns, max(1, -(-k // columns))))
    for got, want in zip(kernels.both_gradients(*given), once): torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_refuses_what_has_no_kernel():
    given = [t.double() if isinstance(t, torch.Tensor) else t for t in inputs(3, 3, 2)]
    with pytest.raises(Unfit, match="float64"): kernels.both_gradients(*given)
    with pytest.raises(Unfit, match="float64"): kernels.both_logsumexps(*given[:2], 1.)


@pytest.mark.parametrize("symmetric", (True, False))
def test_the_loss_by_kernels(symmetric):
    x, y, *_ = inputs(70, 70, 20)
    def gradients(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, y, torch.tensor(9.))]
        losses = contrastive.contrastive_losses(*leaves, symmetric)
        return losses.detach(), *torch.autograd.grad(losses.mean(), leaves)
    with on_cpu(LAUNCHERS): found = gradients(torch.float32)
    for got, want in zip(found, gradients(torch.float64)): torch.testing.assert_close(got.double(), want, atol=3e-6, rtol=3e-6)
