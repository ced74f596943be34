"""The kernels of transport under Triton's interpreter, against float64; the operators themselves; compiled for three GPUs."""
import logging
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

pytest.importorskip("triton")
from deepclustering.core import operators, transport  # noqa: E402
from deepclustering.core import transport_triton as kernels  # noqa: E402
from deepclustering.core.kernels import compile_ahead  # noqa: E402
from deepclustering.core.operators import Unfit  # noqa: E402
from deepclustering.core.transport import sinkhorn, sinkhorn_factored  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)


def inputs(n, k, p, c=None, batch=(), dtype=torch.float32, seed=0):
    "x, y, w, and with values u, v too; the tables' entries are of size 1."
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(*batch, rows, p, generator=g).to(dtype) for rows in (n, k))
    w = torch.randn(*batch, k, generator=g)
    if c is None: return x, y, w
    return x, y, torch.randn(*batch, n, generator=g) - 3, w, torch.randn(*batch, k, c, generator=g)


def wide(*tensors): return [t.double() for t in tensors]


def close(got, want, scale=1.):
    "float32's rounding over sums of some hundred terms."
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=2e-5 * scale, rtol=2e-5)


@DTYPES
@pytest.mark.parametrize("n, k, p, batch", ((1, 1, 1, ()), (65, 63, 16, ()), (130, 67, 17, (2,)), (3, 1100, 130, ()), (129, 2, 64, ()), (5, 7, 0, ()), (2, 3, 100, (2, 2))))
def test_logsumexp(dtype, n, k, p, batch):
    x, y, w = inputs(n, k, p, batch=batch, dtype=dtype)
    close(kernels.logsumexp_tiles(x, y, w, 0.3), transport._logsumexp_product.reference(*wide(x, y, w), 0.3))


@DTYPES
@pytest.mark.parametrize("n, k, p, c, batch", ((1, 1, 1, 1, ()), (65, 33, 16, 17, ()), (70, 40, 17, 65, (2,)), (3, 600, 130, 2, ()), (5, 7, 0, 3, ())))
def test_sumexp(dtype, n, k, p, c, batch):
    x, y, u, w, v = inputs(n, k, p, c, batch, dtype)
    want = transport._sumexp_product.reference(*wide(x, y, u, w, v), 0.3)
    close(kernels.sumexp_tiles(x, y, u, w, v, 0.3), want, float(want.abs().max().clamp(min=1)))


def test_infinities_and_nan_as_the_plain_version():
    x, y, w = inputs(4, 70, 5)
    for at, value in ((slice(0, 64), -torch.inf), (slice(None), -torch.inf), (69, torch.inf), (3, torch.nan)):
        bias = w.clone()
        bias[at] = value
        torch.testing.assert_close(kernels.logsumexp_tiles(x, y, bias, 1.), transport._logsumexp_product.reference(x, y, bias, 1.), equal_nan=True, atol=1e-5, rtol=1e-5)
    for spoilt in (x.index_fill(0, torch.tensor([1]), torch.nan), x.index_fill(0, torch.tensor([1]), torch.inf)):
        torch.testing.assert_close(kernels.logsumexp_tiles(spoilt, y, w, 1.)[[0, 2, 3]], transport._logsumexp_product.reference(x, y, w, 1.)[[0, 2, 3]], atol=1e-5, rtol=1e-5)
        assert not kernels.logsumexp_tiles(spoilt, y, w, 1.)[1].isfinite()
    x, y, u, w, v = inputs(4, 70, 5, 3)
    u[1], w[:65] = -torch.inf, -torch.inf
    got = kernels.sumexp_tiles(x, y, u, w, v, 1.)
    assert (got[1] == 0).all()
    close(got, transport._sumexp_product.reference(*wide(x, y, u, w, v), 1.))


def test_nothing():
    for n, k in ((0, 3), (3, 0), (0, 0)):
        x, y, u, w, v = inputs(n, k, 4, 2)
        assert torch.equal(kernels.logsumexp_tiles(x, y, w, 1.), torch.full((n,), -torch.inf))
        assert torch.equal(kernels.sumexp_tiles(x, y, u, w, v, 1.), torch.zeros(n, 2))
    x, y, u, w, v = inputs(3, 3, 4, 0)
    assert kernels.sumexp_tiles(x, y, u, w, v, 1.).shape == (3, 0)
    assert kernels.logsumexp_tiles(*(t[None][:0] for t in (x, y, w)), 1.).shape == (0, 3)


def test_layouts():
    x, y, u, w, v = inputs(9, 11, 6, 5)
    want, values = kernels.logsumexp_tiles(x, y, w, 1.), kernels.sumexp_tiles(x, y, u, w, v, 1.)
    spread = torch.full((9, 2, 13), torch.nan)
    spread[:, 0, :12:2] = x
    for x1, y1, w1, v1 in ((x.T.contiguous().T, y, w, v), (spread[:, 0, :12:2], y, torch.stack([w, w], 1)[:, 0], v.T.contiguous().T), (torch.nn.functional.pad(x, (3, 4), value=9)[:, 3:-4], y.flip(0).flip(0), w, v)):
        assert torch.equal(kernels.logsumexp_tiles(x1, y1, w1, 1.), want) and torch.equal(kernels.sumexp_tiles(x1, y1, u, w1, v1, 1.), values)
    assert torch.equal(kernels.logsumexp_tiles(x.expand(2, 3, -1, -1), y.expand(2, 3, -1, -1), w.expand(2, 3, -1), 1.), want.expand(2, 3, -1))


@DTYPES
def test_offsets_beyond_32_bits(dtype):
    "Rows 2^30 entries apart in memory that nobody touches."
    x, y, u, w, v = inputs(3, 3, 4, 2, dtype=dtype)
    far = []
    for t in (x, y):
        storage = torch.empty(2**31 + 8, dtype=dtype)
        far.append(storage.as_strided(t.shape, (2**30, 1)))
        far[-1].copy_(t)
    assert torch.equal(kernels.logsumexp_tiles(*far, w, 1.), kernels.logsumexp_tiles(x, y, w, 1.))
    assert torch.equal(kernels.sumexp_tiles(*far, u, w, v, 1.), kernels.sumexp_tiles(x, y, u, w, v, 1.))
    batch = [torch.empty(2**31 + 16, dtype=dtype).as_strided((3, *t.shape), (2**30, 4, 1)) for t in (x, y)]
    for t, source in zip(batch, (x, y)): t.copy_(source)
    assert torch.equal(kernels.logsumexp_tiles(*batch, w.expand(3, -1), 1.), kernels.logsumexp_tiles(x, y, w, 1.).expand(3, -1))


def test_same_bits_twice_and_shares_change_only_rounding(monkeypatch):
    x, y, u, w, v = inputs(70, 900, 20, 3)
    calls = [lambda: kernels.logsumexp_tiles(x, y, w, 0.5), lambda: kernels.sumexp_tiles(x, y, u, w, v, 0.5)]
    before = [call() for call in calls]
    assert all(torch.equal(call(), once) for call, once in zip(calls, before))
    for shares in (1, 2, 15):
        monkeypatch.setattr(kernels, "_share", lambda programs, k, columns: (-(-k // shares // columns) * columns, -(-k // (-(-k // shares // columns) * columns))))
        for call, once in zip(calls, before): close(call(), once.double(), float(once.abs().max()))


def test_shares_cover_everything():
    for programs in (0, 1, 7, 511, 512, 10**6):
        for k in (0, 1, 511, 513, 10**6):
            each, shares = kernels._share(programs, k, 64)
            assert each % 64 == 0 and shares >= 1 and each * shares >= k and (shares == 1 or each * (shares - 1) < k) and (shares - 1) * programs < 1024


# --- the operators ------------------------------------------------------------------------------------------------------------

def small(dtype=torch.float64, k=3):
    return [t.to(dtype).requires_grad_() for t in inputs(4, k, 2, 2, batch=(2,))]


def test_opcheck():
    x, y, u, w, v = small()
    assert set(torch.library.opcheck(transport._logsumexp_product.op, (x, y, w, 0.5)).values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(transport._sumexp_product.op, (x, y, u, w, v, 0.5)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("form", ("op", "reference"))
def test_gradients(form):
    logsumexp, sumexp = getattr(transport._logsumexp_product, form), getattr(transport._sumexp_product, form)
    x, y, u, w, v = small()
    for check in (gradcheck, gradgradcheck):
        assert check(lambda *t: logsumexp(*t, 0.5), (x, y, w)) and check(lambda *t: sumexp(*t, 0.5), (x, y, u, w, v))


def launched(operator, *args): return operator._launch(*args)


def test_what_a_cuda_tensor_would_get(monkeypatch, caplog):
    "The launch as the operator does it: the kernel, or for float64 the plain version and one line in the log."
    x, y, u, w, v = inputs(40, 20, 5, 3)
    assert torch.equal(transport._logsumexp_product._launch(x, y, w, 0.5), kernels.logsumexp_tiles(x, y, w, 0.5))
    assert torch.equal(transport._sumexp_product._launch(x, y, u, w, v, 0.5), kernels.sumexp_tiles(x, y, u, w, v, 0.5))
    monkeypatch.setattr(operators, "_said", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(2): assert torch.equal(transport._logsumexp_product._launch(*wide(x, y, w), 0.5), transport._logsumexp_product.reference(*wide(x, y, w), 0.5))
    assert [r.getMessage() for r in caplog.records] == ["transport_logsumexp_product: no kernel (torch.float64 and torch.float64, biases torch.float64), plain PyTorch instead"]
    for bad in ((x.double(), y, w), (x.half(), y, w), (x, y, w.double()), (x.long(), y.long(), w)):
        with pytest.raises(Unfit): kernels.logsumexp_tiles(*bad, 1.)


@DTYPES
@pytest.mark.parametrize("policy", ({}, {"rho_a": 0.5, "rho_b": 0.5}, {"rho_b": 0.3}, {"mass": 0.5}), ids=("balanced", "unbalanced", "semi-relaxed", "partial"))
def test_sinkhorn_by_kernels(monkeypatch, dtype, policy):
    "Every half step and every sum of values by a kernel: the plan, and what the slots receive."
    monkeypatch.setattr(transport, "_run", launched)
    x, y = (torch.nn.functional.normalize(t, dim=1).to(dtype) for t in inputs(70, 33, 20)[:2])
    settings = {"eps": 0.1, "n_iters": 4, "tol": 0} | policy
    free, want = sinkhorn_factored(x, y, **settings), sinkhorn(x.double() @ y.double().T, full=True, **settings)
    torch.testing.assert_close(free.rows().double(), want.plan, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(free.to_slots(x).double(), want.plan.T @ x.double(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(free.error().double(), want.error, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_large_logits_by_kernels(monkeypatch, dtype):
    monkeypatch.setattr(transport, "_run", launched)
    x, y = ((100 * t).to(dtype) for t in inputs(70, 33, 8, seed=3)[:2])
    assert (x.double() @ y.double().T).abs().max() > 1e4
    free = sinkhorn_factored(x, y, eps=0.01, n_iters=5, tol=0)
    assert free.rows().isfinite().all() and free.error().isfinite() and free.to_items(y).isfinite().all()


def test_gradient_by_kernels(monkeypatch):
    "The registered formula with kernels in it, against autograd of the plain version in float64."
    def gradient(operator, *args):
        leaves = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
        out = operator.op(*leaves)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        return torch.autograd.grad(out, [t for t in leaves if isinstance(t, torch.Tensor)], g)
    x, y, u, w, v = inputs(70, 40, 6, 3)
    wanted = gradient(transport._logsumexp_product, *wide(x, y, w), 0.4)
    used = []
    def by_kernel(operator, *args):
        used.append(operator.name)
        return operator._launch(*args)
    monkeypatch.setattr(transport, "_run", by_kernel)
    for got, want in zip(gradient(transport._logsumexp_product, x, y, w, 0.4), wanted): close(got, want, float(want.abs().max()))
    assert used == 2 * ["transport_sumexp_product"]


def test_compiled_ahead(monkeypatch):
    rows = compile_ahead("deepclustering.core.transport_triton")
    assert {(r["kernel"], r["sm"]) for r in rows} == {(kernel, sm) for kernel in ("_logsumexp_product", "_sumexp_product") for sm in (75, 80, 90)}
    assert all(r["fits"] for r in rows)
    assert max(r["spills"] for r in rows if "*bf16" in r["types"] and not r["constants"]["SPLIT"]) == 0 and all(r["spills"] <= (512 if r["constants"]["SPLIT"] else 128) for r in rows)
    def tiles():
        return {(dtype, values): kernels._tile(torch.empty(1, 1, 64, dtype=dtype), values) for dtype in (torch.float32, torch.bfloat16) for values in (False, True)}
    chosen = {(*key, True): tile for key, tile in tiles().items()}
    monkeypatch.setattr(kernels, "splits_float32", lambda x: False)  # an A100
    chosen |= {(*key, False): tile for key, tile in tiles().items()}
    listed = {(torch.bfloat16 if a["x"] == "*bf16" else torch.float32, "VALUES" in a, a["SPLIT"]): (*(a[name] for name in ("ROWS", "COLUMNS", "FEATURES", "WHOLE", "SPLIT")), o["num_warps"]) for _, a, o in kernels.AHEAD}
    assert listed == chosen  # what is compiled here is what is launched
