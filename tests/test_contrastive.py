"""The contrastive loss without its matrix: against the clustering family's dense loss, finite differences and limit cases; on a ring with parts of every kind; memory by torch's profiler; what is refused."""
import math
import sys
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from torch.autograd import gradcheck
from torch.nn import functional as F

from deepclustering.clustering.contrastive_spectral import clip_loss
from deepclustering.core.distributed import DeadlockError, RankError, check_parity, count_bytes, run
from deepclustering.parallelism import contrastive
from deepclustering.parallelism.contrastive import contrastive_losses, ring_contrastive_bytes, ring_contrastive_losses

forked = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")


def pairs(n, d, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1).to(dtype) for _ in range(2)]


def one_by_one(x, y, scale, symmetric=True):
    "A deliberately dumb loop in Python's own numbers."
    dot = lambda a, b: scale * sum(float(p) * float(q) for p, q in zip(a, b))
    losses = []
    for i in range(len(x)):
        rows = math.log(math.fsum(math.exp(dot(x[i], b)) for b in y))
        columns = math.log(math.fsum(math.exp(dot(a, y[i])) for a in x))
        losses.append((rows + columns) / 2 - dot(x[i], y[i]) if symmetric else rows - dot(x[i], y[i]))
    return torch.tensor(losses, dtype=torch.float64)


def gradients(f, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*leaves)
    return out.detach(), *torch.autograd.grad(out.sum(), leaves)


# ---- one process


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("n, d", ((1, 1), (2, 5), (13, 3), (30, 1)))
def test_as_a_loop(n, d, symmetric):
    x, y = pairs(n, d, n)
    torch.testing.assert_close(contrastive_losses(x, y, 3., symmetric), one_by_one(x, y, 3., symmetric), atol=1e-13, rtol=1e-13)


def test_as_the_clustering_familys_losses():
    "Its kernel is Gaussian, exp(-|x - y|^2 / temperature); of unit vectors that is exp(2 <x, y> / temperature) up to a factor that cancels."
    x, y = pairs(40, 6)
    for scale in (0.5, 2., 9.):
        torch.testing.assert_close(contrastive_losses(x, y, scale).mean(), clip_loss(x, y, gamma=2., temperature=2 / scale, normalize=False))


@pytest.mark.parametrize("symmetric", (True, False))
def test_gradcheck_and_unequal_weights(symmetric):
    x, y = (t.requires_grad_() for t in pairs(6, 3))
    scale, w = torch.tensor(2.5, dtype=torch.float64, requires_grad=True), torch.tensor([1., -2, 0, 3, 0.5, 7]).double()
    assert gradcheck(lambda *t: w * contrastive_losses(*t, symmetric), (x, y, scale))


def test_gradients_by_small_tiles(monkeypatch):
    "Tiles of one and of two rows give what one tile gives."
    x, y = pairs(7, 4)
    whole = gradients(contrastive_losses, x, y, torch.tensor(5.).double())
    for rows in (1, 2, 6):
        monkeypatch.setattr(contrastive, "_tiles", lambda x, k, rows=rows: [slice(i, min(i + rows, len(x))) for i in range(0, len(x), rows)])
        for a, b in zip(gradients(contrastive_losses, x, y, torch.tensor(5.).double()), whole): torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-13)


def test_tiles_cover_every_row_once():
    for n in (0, 1, 5, 1000):
        for k in (0, 1, 10**4, 10**7):
            x = torch.empty(n, 1)
            assert [i for r in contrastive._tiles(x, k) for i in range(r.start, r.stop)] == list(range(n))
            assert all((r.stop - r.start) * k <= max(k, 2**18) for r in contrastive._tiles(x, k))


def test_properties():
    x, y = pairs(50, 8)
    losses = contrastive_losses(x, y, 10.)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(contrastive_losses(x[order], y[order], 10.), losses[order])          # order of pairs
    torch.testing.assert_close(contrastive_losses(y, x, 10.), losses)                               # swapping the views
    torch.testing.assert_close(contrastive_losses(2 * x, y, 5.), losses)                            # the scale is a factor of x
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).double())[0]
    torch.testing.assert_close(contrastive_losses(x @ rotation, y @ rotation, 10.), losses)         # turning both
    assert (contrastive_losses(x, y, 10., False) - contrastive_losses(y, x, 10., False)).abs().max() > 0.1
    assert (contrastive_losses(x, y, 10., False) > 0).all()                                         # the own partner is among those summed over
    assert (contrastive_losses(torch.cat([x, -x]), torch.cat([y, -y]), 10.)[:50] > losses).all()    # more negatives, more loss


def test_limits():
    x, y = pairs(20, 4)
    torch.testing.assert_close(contrastive_losses(x, y, 0.), torch.full((20,), math.log(20), dtype=torch.float64))
    assert contrastive_losses(torch.eye(5), torch.eye(5), 200.).max() < 1e-6
    torch.testing.assert_close(contrastive_losses(x[:1], y[:1], 7.), torch.zeros(1, dtype=torch.float64), atol=1e-14, rtol=0)
    _, to_x, to_y, to_scale = gradients(contrastive_losses, x[:1], y[:1], torch.tensor(7.).double())
    assert to_x.abs().max() + to_y.abs().max() + to_scale.abs() < 1e-13


def test_nothing_overflows():
    "Scores of 1e4 in float32: the exponentials would be infinite."
    x, y = pairs(30, 4, dtype=torch.float32)
    found = gradients(contrastive_losses, x, y, torch.tensor(1e4))
    assert all(t.isfinite().all() for t in found)
    torch.testing.assert_close(found[0].double(), contrastive_losses(x.double(), y.double(), 1e4), atol=0.02, rtol=1e-5)


@pytest.mark.parametrize("dtype, limit", ((torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)))
def test_types(dtype, limit):
    x, y = pairs(200, 16, dtype=dtype)
    got, exact = (gradients(contrastive_losses, *(t.to(to) for t in (x, y)), torch.tensor(12., dtype=torch.promote_types(to, torch.float32))) for to in (dtype, torch.float64))
    assert [t.dtype for t in got] == [torch.float32, dtype, dtype, torch.float32]
    torch.testing.assert_close(got[0].double(), exact[0], atol=5e-6, rtol=0)
    for a, b in zip(got[1:], exact[1:]): assert (a.double() - b).abs().max() <= limit * b.abs().max() + 1e-7


def test_sixteen_bits_late_in_training():
    "Partners agree, so that the parts of a gradient nearly cancel: still the rounding of one number, not of its parts."
    x, _ = pairs(64, 32, dtype=torch.bfloat16)
    for a, b in zip(*(gradients(lambda x, y: contrastive_losses(x, y, 12.), t, t) for t in (x, x.double()))):
        assert (a.double() - b).abs().max() <= 2**-8 * b.abs().max()


def test_layout_autocast_and_what_is_not_touched():
    x, y = pairs(9, 6, dtype=torch.float32)
    want, spread = contrastive_losses(x, y, 4.), torch.full((9, 13), torch.nan)
    spread[:, :12:2] = x
    torch.testing.assert_close(contrastive_losses(spread[:, :12:2], y.T.contiguous().T, 4.), want, atol=1e-6, rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(contrastive_losses(x, y, 4.), want)
    kept = x.clone(), y.clone()
    gradients(contrastive_losses, x, y, torch.tensor(4.))
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
    x[3, 2] = torch.nan
    assert contrastive_losses(x, y).isnan().all()


def test_no_second_derivative_and_no_transforms():
    "The gradient counts as a constant, torch.func refuses."
    x, y = (t.requires_grad_() for t in pairs(4, 2))
    g, = torch.autograd.grad(contrastive_losses(x, y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"): g.sum().backward()
    with pytest.raises(RuntimeError): torch.func.grad(lambda x: contrastive_losses(x, y.detach()).sum())(x.detach())


def test_opcheck():
    x, y = pairs(4, 3, dtype=torch.float32)
    R, C = contrastive._both(x, y[:2], 2.)
    only = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(contrastive._both.op, (x, y[:2], 2.), test_utils=only).values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(contrastive._both_gradient.op, (x, y[:2], R, C, R, C, 2.), test_utils=only).values()) == {"SUCCESS"}


def test_memory_by_the_profiler():
    "The allocator's own account: from 1,024 to 4,096 pairs the matrix takes 16 times as much, the tiles at most 4."
    def peak(losses, n):
        x, y = (t.requires_grad_() for t in pairs(n, 16, dtype=torch.float32))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p: losses(x, y, 20.).sum().backward()
        events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
        return max(accumulate(size for _, size in events))
    def matrix(x, y, scale): return F.cross_entropy(scale * x @ y.T, torch.arange(len(x)), reduction="none")
    whole, parts = ({n: peak(f, n) for n in (1024, 4096)} for f in (matrix, contrastive_losses))
    assert 15 < whole[4096] / whole[1024] < 17
    assert parts[4096] < 4.2 * parts[1024]
    assert parts[4096] < whole[4096] / 20


@pytest.mark.parametrize("message, arguments", (
    ("x must be a floating point matrix", (torch.zeros(3), torch.zeros(3, 2))), ("y must be a floating point matrix", (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64))),
    ("x and y must have the same shape", (torch.zeros(3, 2), torch.zeros(3, 4))), ("x and y must have the same shape, type", (torch.zeros(3, 2), torch.zeros(3, 2).double())),
    ("x must hold at least one pair", (torch.zeros(0, 2), torch.zeros(0, 2))), ("scale must be one finite number", (torch.zeros(3, 2), torch.zeros(3, 2), math.inf)),
    ("scale must be one finite number", (torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(1)))))
def test_refused(message, arguments):
    with pytest.raises(ValueError, match=message): contrastive_losses(*arguments)


# ---- on a ring


def cut(t, sizes, rank): return t.split(sizes)[rank]


@forked
@pytest.mark.parametrize("sizes", ([7], [3, 4], [0, 7], [2, 0, 5], [1, 1, 1, 4], [7, 0, 0, 0]), ids=str)
@pytest.mark.parametrize("symmetric", (True, False))
def test_ring_as_a_loop(sizes, symmetric):
    "Losses by the dumb loop, gradients of weighted sums by autograd through the matrix."
    x, y = pairs(7, 3)
    w, scale = torch.arange(1., 8).double(), torch.tensor(3.).double()
    def dense(x, y, s):
        t, own = s * x @ y.T, torch.arange(len(x))
        rows = F.cross_entropy(t, own, reduction="none")
        return w * ((rows + F.cross_entropy(t.T, own, reduction="none")) / 2 if symmetric else rows)
    def reference():
        _, *grads = gradients(dense, x, y, scale)
        losses = one_by_one(x, y, 3., symmetric)
        return {r: [cut(t, sizes, r) for t in (losses, *grads[:2])] for r in range(len(sizes))} | {"scale": grads[2]}
    def work(rank, world):
        leaves = [cut(t, sizes, rank).clone().requires_grad_() for t in (x, y)] + [scale.clone().requires_grad_()]
        losses = ring_contrastive_losses(*leaves, symmetric)
        to_x, to_y, to_scale = torch.autograd.grad((cut(w, sizes, rank) * losses).sum(), leaves)
        dist.all_reduce(to_scale)
        return {rank: [losses, to_x, to_y], "scale": to_scale}
    check_parity(work, reference, (len(sizes),), 1e-12)


@forked
def test_ring_of_a_subgroup_and_two_losses_in_flight():
    "Ranks 0 and 2 are a ring; two forward passes before the two backward passes."
    x, y = pairs(6, 3)
    def work(rank, world):
        group = dist.new_group([0, 2])
        if rank == 1: return {}
        half = slice(0, 2) if rank == 0 else slice(2, 6)
        a, b = (t[half].clone().requires_grad_() for t in (x, y))
        first, second = ring_contrastive_losses(a, b, 2., group=group), ring_contrastive_losses(b, a, 5., False, group=group)
        (first.sum() + second.sum()).backward()
        return {f"x{rank}": a.grad, f"y{rank}": b.grad}
    def reference():
        _, to_x, to_y = gradients(lambda x, y: contrastive_losses(x, y, 2.) + contrastive_losses(y, x, 5., False), x, y)
        return {"x0": to_x[:2], "x2": to_x[2:], "y0": to_y[:2], "y2": to_y[2:]}
    check_parity(work, reference, (3,), 1e-12)


@forked
def test_ring_in_sixteen_bits_is_as_exact_as_one_process():
    "Partial gradients travel in float32: the error does not grow with the ranks."
    x, y = pairs(24, 8, dtype=torch.bfloat16)
    _, exact, _ = gradients(lambda x, y: contrastive_losses(x, y, 10.), x.double(), y.double())
    def work(rank, world):
        a, b = (t.tensor_split(world)[rank].clone().requires_grad_() for t in (x, y))
        ring_contrastive_losses(a, b, 10.).sum().backward()
        return a.grad
    errors = [float((torch.cat(run(work, world)).double() - exact).abs().max()) for world in (1, 4)]
    assert errors[1] <= 1.01 * errors[0] <= 2**-8 * float(exact.abs().max())


@forked
def test_bytes():
    sizes, (x, y) = [3, 0, 2, 4], pairs(9, 5)
    for dtype, wide in ((torch.float64, 8), (torch.float32, 4), (torch.float16, 4)):
        def work(rank, world):
            mine = [cut(t.to(dtype), sizes, rank).clone().requires_grad_() for t in (x, y)]
            with count_bytes() as ahead: losses = ring_contrastive_losses(*mine)
            with count_bytes() as back: losses.sum().backward()
            return ahead.sent("send"), ahead.sent("all_gather"), back.sent(), {m.peer for m in [*ahead, *back] if m.op == "send"} == {(rank + 1) % world}
        assert run(work, 4) == [(f, 32, b, True) for f, b in (ring_contrastive_bytes(sizes, r, 5, dtype.itemsize, wide) for r in range(4))]


def test_closed_form_by_adding_up_hops():
    for sizes in ([5, 1, 7], [2, 2], [0, 3, 1, 4, 4]):
        p = len(sizes)
        for r in range(p):
            features = sum(sizes[(r - step) % p] for step in range(p - 1))
            everything = sum(sizes[(r - step) % p] for step in range(p))
            assert ring_contrastive_bytes(sizes, r, 6, 2, 4) == (12 * features + 4 * everything, (12 + 8) * features + 24 * everything)
    assert ring_contrastive_bytes([9], 0, 6) == (0, 0)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match="rank must be between 0 and 1"): ring_contrastive_bytes([1, 1], rank, 2)


@forked
@pytest.mark.parametrize("message, make", (
    ("x must have the same number of columns on every rank, got [2.0, 3.0]", lambda r: (torch.zeros(2, 2 + r), torch.zeros(2, 2 + r))),
    ("x must be of the same type on every rank, got [4.0, 8.0] bytes", lambda r: [torch.zeros(2, 2, dtype=(torch.float32, torch.float64)[r])] * 2),
    ("scale must be the same on every rank, got [1.0, 2.0]", lambda r: (torch.zeros(2, 2), torch.zeros(2, 2), 1. + r)),
    ("x must hold at least one pair on one rank, got none", lambda r: (torch.zeros(0, 2), torch.zeros(0, 2)))), ids=lambda m: m[:20] if isinstance(m, str) else "")
def test_ring_refuses_on_every_rank(message, make):
    def work(rank, world):
        try: ring_contrastive_losses(*make(rank))
        except ValueError as error: return str(error)
    assert all(said.startswith(message) for said in run(work, 2))


@forked
def test_a_rank_that_dies_or_stays_away_is_named():
    x, y = pairs(4, 2)
    def dies(rank, world):
        if rank == 1: raise MemoryError("no room")
        ring_contrastive_losses(x, y)
    with pytest.raises(RankError, match="rank 1 of 2: MemoryError: no room"): run(dies, 2)
    def forgets(rank, world):
        a = x.clone().requires_grad_()
        losses = ring_contrastive_losses(a, y)
        if rank == 0: losses.sum().backward()
    with pytest.raises(DeadlockError, match="rank 0 waits"): run(forgets, 2, patience=1.)
