"""Transport over dtypes, layouts and policies; batches; POT as oracle and as pace; the auction on random problems."""
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from scipy.optimize import linear_sum_assignment

from deepclustering.core.transport import auction, sinkhorn, sinkhorn_factored

POLICIES = {"balanced": {}, "semi-relaxed": {"rho_b": 0.4}, "semi-relaxed items": {"rho_a": 0.3}, "unbalanced": {"rho_a": 0.3, "rho_b": 0.7}, "partial": {"mass": 0.6}}
policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
sizes = pytest.mark.parametrize("n, k", ((1, 1), (1, 5), (6, 1), (7, 4), (4, 7), (33, 17)))


def problem(n, k, batch=(), seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    s, a, b = (torch.rand(*batch, *shape, generator=g, dtype=torch.float64) for shape in ((n, k), (n,), (k,)))
    a, b = a + 0.1, b + 0.1
    return (4 * s).to(dtype), (a / a.sum(-1, keepdim=True)).to(dtype), (b / b.sum(-1, keepdim=True)).to(dtype)


def converged(s, a, b, eps=0.1, **kw): return sinkhorn(s, a, b, eps=eps, **{"n_iters": 50_000, "tol": 1e-13, **kw})


@policies
@sizes
def test_marginals(policy, n, k):
    s, a, b = problem(n, k)
    P = converged(s, a, b, **policy)
    if "mass" in policy:
        torch.testing.assert_close(P.sum(), P.new_tensor(0.6))
        assert (P.sum(1) <= a + 1e-9).all() and (P.sum(0) <= b + 1e-9).all()
        return
    if "rho_a" not in policy: torch.testing.assert_close(P.sum(1), a)
    if "rho_b" not in policy: torch.testing.assert_close(P.sum(0), b)


@policies
def test_batches_layouts_and_transposes_agree(policy):
    s, a, b = problem(9, 5, batch=(2, 3))
    before = s.clone(), a.clone(), b.clone()
    P = converged(s, a, b, **policy)
    assert all(torch.equal(p, q) for p, q in zip(before, (s, a, b)))
    for i in range(2):
        for j in range(3): torch.testing.assert_close(P[i, j], converged(s[i, j], a[i, j], b[i, j], **policy), atol=1e-9, rtol=0)
    torch.testing.assert_close(converged(s.mT.contiguous().mT, a, b, **policy), P, atol=1e-12, rtol=0)
    turned = {{"rho_a": "rho_b", "rho_b": "rho_a"}.get(name, name): value for name, value in policy.items()}
    torch.testing.assert_close(converged(s.mT, b, a, **turned), P.mT, atol=1e-8, rtol=0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(converged(s[..., order, :], a[..., order], b, **policy), P[..., order, :], atol=1e-9, rtol=0)


@policies
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_shorter_types_against_float64(policy, dtype):
    s, a, b = problem(65, 20)
    short = s.to(dtype)
    got, expected = sinkhorn(short, a.float(), b.float(), eps=0.1, n_iters=5000, tol=1e-6, **policy), converged(short.double(), a, b, **policy)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("eps", (0.01, 0.1))
@policies
def test_no_nan_with_large_logits(policy, dtype, eps):
    g = torch.Generator().manual_seed(3)
    for make in (lambda: 2e4 * torch.rand(128, 40, generator=g) - 1e4, lambda: 1e4 * torch.randint(-1, 2, (128, 40), generator=g).float()):
        logits = make()
        if len(policy) == 2: logits = logits - 1e4  # nothing bounds the mass, e**(scores / (rho_a + rho_b)): inf is right for 1e4
        leaf = logits.to(dtype).requires_grad_()
        P = sinkhorn(leaf, eps=eps, n_iters=100, **policy)
        assert P.isfinite().all() and (P >= 0).all()
        with torch.no_grad(): assert sinkhorn(leaf, eps=eps, n_iters=3, tol=0, **policy).isfinite().all()
        sinkhorn(leaf, eps=eps, n_iters=5, grad="unroll", **policy).square().sum().backward()
        assert leaf.grad.isfinite().all() and leaf.grad.dtype == dtype


def test_weights_are_repetition():
    "Two copies of an item are one of twice the mass."
    s, a, b = problem(6, 4)
    twice = converged(torch.cat([s, s[:1]]), torch.cat([a[:1] / 2, a[1:], a[:1] / 2]), b)
    once = converged(s, a, b)
    torch.testing.assert_close(twice[0] + twice[-1], once[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(twice[1:-1], once[1:], atol=1e-10, rtol=0)


def test_a_price_for_one_slot_alone():
    s, a, b = problem(30, 3)
    P = converged(s, a, b, rho_b=torch.tensor([math.inf, 0.2, 0.2]))
    torch.testing.assert_close(P.sum(0)[0], b[0])
    torch.testing.assert_close(P.sum(1), a)
    assert (P.sum(0)[1:] - b[1:]).abs().min() > 1e-4


@policies
@pytest.mark.parametrize("shape", ((8, 5), (5, 8)))
def test_gradients_in_batches(policy, shape):
    s, a, b = problem(*shape, batch=(3,))
    weight = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaf = s.requires_grad_()
    found = [torch.autograd.grad((converged(leaf, a, b, eps=0.4, grad=grad, n_iters=3000, **policy) * weight).sum(), leaf)[0] for grad in ("implicit", "unroll")]
    torch.testing.assert_close(*found, atol=1e-9, rtol=0)


def test_potentials_and_error_have_gradients_where_they_should():
    s, a, b = problem(8, 5)
    leaf = s.requires_grad_()
    full = converged(leaf, a, b, eps=0.4, rho_a=0.5, rho_b=0.5, full=True)
    assert full.f.requires_grad and full.log_plan.requires_grad and not full.error.requires_grad
    assert torch.autograd.gradcheck(lambda t: converged(t, a, b, eps=0.4, rho_a=0.5, rho_b=0.5, full=True)[2:4], leaf)


def test_same_input_same_bits():
    s, a, b = problem(400, 60, dtype=torch.float32)
    assert torch.equal(sinkhorn(s, a, b), sinkhorn(s, a, b))
    assert torch.equal(auction(s), auction(s))


@pytest.mark.parametrize("seed", range(12))
def test_auction_against_scipy(seed):
    g = torch.Generator().manual_seed(seed)
    n, k = int(torch.randint(1, 150, (), generator=g)), int(torch.randint(1, 20, (), generator=g))
    scores = torch.randn(n, k, generator=g, dtype=torch.float64) * 10 ** (seed % 5 - 2)
    if seed % 3 == 0: scores = scores.round()
    capacity = torch.randint(0, 3, (k,), generator=g) + -(-n // k)
    labels = auction(scores, capacity)
    assert (torch.bincount(labels, minlength=k) <= capacity).all() and labels.shape == (n,)
    rows, columns = linear_sum_assignment(scores.repeat_interleave(capacity, 1).numpy(), maximize=True)
    best = scores.repeat_interleave(capacity, 1)[rows, columns].sum()
    assert abs(float(scores.gather(1, labels[:, None]).sum() - best)) <= 1e-9 * int(capacity.sum()) * float(scores.abs().max()) + 1e-12


# --- without the matrix -----------------------------------------------------------------------------------------------------

def vectors(n, k, p=3, batch=(), seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(*batch, rows, p, generator=g, dtype=torch.float64) for rows in (n, k))
    a, b = (torch.rand(*batch, size, generator=g, dtype=torch.float64) + 0.1 for size in (n, k))
    return x.to(dtype), y.to(dtype), a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


@policies
@pytest.mark.parametrize("n, k, p", ((1, 1, 1), (1, 5, 2), (6, 1, 3), (33, 17, 1), (17, 33, 40), (400, 1000, 5)))
def test_factored_is_the_matrix_version(policy, n, k, p):
    x, y, a, b = vectors(n, k, p)
    settings = {"eps": 0.7, "n_iters": 200, "tol": 1e-10} | policy
    dense, free = sinkhorn(x @ y.mT, a, b, full=True, **settings), sinkhorn_factored(x, y, a, b, **settings)
    near = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(free.rows(), dense.plan, **near)
    torch.testing.assert_close(free.error(), dense.error, **near)
    torch.testing.assert_close(free.f, dense.f, **near)
    torch.testing.assert_close(free.g, dense.g, **near)
    torch.testing.assert_close(free.to_slots(x), dense.plan.mT @ x, **near)
    torch.testing.assert_close(free.to_items(y), dense.plan @ y, **near)
    assert torch.equal(free.labels(), dense.plan.argmax(-1)) and free.n_iters == dense.n_iters


@policies
def test_factored_batches_and_layouts(policy):
    x, y, a, b = vectors(9, 5, batch=(2, 3))
    one_y = y[0, 0]
    free = sinkhorn_factored(x, one_y, a, b, eps=0.7, n_iters=300, tol=1e-12, **policy)
    assert free.rows().shape == (2, 3, 9, 5) and free.rows([1, 4]).shape == (2, 3, 2, 5) and free.error().shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = sinkhorn_factored(x[i, j], one_y, a[i, j], b[i, j], eps=0.7, n_iters=300, tol=1e-12, **policy)
            torch.testing.assert_close(free.rows()[i, j], alone.rows(), atol=1e-9, rtol=0)
    strided = sinkhorn_factored(x.mT.contiguous().mT, one_y, a, b, eps=0.7, n_iters=300, tol=1e-12, **policy)
    torch.testing.assert_close(strided.rows(), free.rows(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("eps", (0.01, 0.1))
@policies
def test_factored_no_nan_with_large_logits(policy, dtype, eps):
    if len(policy) == 2: policy = {"rho_a": 3e3, "rho_b": 7e3}  # cheap prices leave the mass of such logits unbounded
    x, y, _, _ = vectors(128, 40, 8, seed=3)
    x, y = (100 * x).to(dtype).requires_grad_(), (50 * y).to(dtype).requires_grad_()
    assert (x.double() @ y.double().mT).abs().max() > 1e4
    for settings in ({"n_iters": 60}, {"n_iters": 3, "tol": 0, "grad": "unroll"}):
        free = sinkhorn_factored(x, y, eps=eps, **settings, **policy)
        plan = free.rows()
        assert plan.isfinite().all() and (plan >= 0).all() and free.error().isfinite() and free.f.dtype == torch.float32
        if "grad" in settings:
            plan.square().sum().backward()
            for leaf in (x, y): assert leaf.grad.isfinite().all() and leaf.grad.dtype == dtype


def test_factored_closed_slots_and_items_without_mass():
    x, y, a, b = vectors(12, 6)
    a[3], b[2] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    leaves = [t.requires_grad_() for t in (x, y, a, b)]
    free, dense = (f(*leaves, eps=0.7, n_iters=2000, tol=1e-13) for f in (sinkhorn_factored, lambda x, y, *rest, **kw: sinkhorn(x @ y.mT, *rest, **kw)))
    assert (free.rows()[3] == 0).all() and (free.rows()[:, 2] == 0).all() and 2 not in free.labels()
    weight = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for got, want in zip(*(torch.autograd.grad((plan * weight).sum(), leaves) for plan in (free.rows(), dense))): torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


def test_factored_same_input_same_bits():
    x, y, a, b = vectors(500, 70, 16, dtype=torch.float32)
    first, second = (sinkhorn_factored(x, y, a, b, eps=0.5) for _ in range(2))
    assert torch.equal(first.rows(), second.rows()) and torch.equal(first.to_slots(x), second.to_slots(x))


def test_factored_needs_no_matrix():
    "A process of its own: the 96 MB of the scores never exist, in the forward pass, the implicit gradient, or that of a few iterations."
    code = """if True:
        import torch
        from deepclustering.core.transport import sinkhorn, sinkhorn_factored
        status = lambda name: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) / 1024
        def grown(run):
            with open("/proc/self/clear_refs", "w") as f: f.write("5")
            before = status("VmRSS")
            run()
            print(status("VmHWM") - before)
        def factored(**kw):
            free = sinkhorn_factored(x, y, eps=0.5, **kw)
            free.labels()
            free.to_slots(x).square().sum().backward()
        def matrix(): return sinkhorn(x.detach() @ y.detach().T, eps=0.5, n_iters=1)
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(50, 8, generator=g, requires_grad=True), torch.randn(5, 8, generator=g, requires_grad=True)
        factored(n_iters=1), factored(n_iters=1, grad="unroll"), matrix()
        x, y = torch.randn(24_000, 8, generator=g, requires_grad=True), torch.randn(1000, 8, generator=g, requires_grad=True)
        grown(lambda: factored(n_iters=1)), grown(lambda: factored(n_iters=1, grad="unroll")), grown(matrix)
    """
    if not os.path.exists("/proc/self/clear_refs"): pytest.skip("measures with Linux's own counters")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    implicit, unrolled, matrix = map(float, run.stdout.split())
    assert matrix > 96 and implicit < 80 and unrolled < 48, (implicit, unrolled, matrix)  # implicit: some copies of its 4 MB system


# --- beside POT -------------------------------------------------------------------------------------------------------------

@pytest.mark.peers
@sizes
@pytest.mark.parametrize("eps", (0.1, 1.))
def test_equal_to_pot(n, k, eps):
    ot = pytest.importorskip("ot")
    s, a, b = problem(n, k)
    tight = {"numItermax": 50_000, "stopThr": 1e-14}
    expected = ot.sinkhorn(a, b, -s, eps, method="sinkhorn_log", warn=False, **tight)
    torch.testing.assert_close(converged(s, a, b, eps), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(sinkhorn(s.float(), a.float(), b.float(), eps=eps, n_iters=50_000, tol=1e-6).double(), expected, atol=1e-6, rtol=0)
    for rho_a, rho_b in ((0.3, 0.7), (math.inf, 0.4), (0.2, math.inf)):
        expected = ot.unbalanced.sinkhorn_unbalanced(a, b, -s, eps, (rho_a, rho_b), method="sinkhorn", **tight)
        torch.testing.assert_close(converged(s, a, b, eps, rho_a=rho_a, rho_b=rho_b), expected, atol=1e-6, rtol=0)
    dummy = torch.cat([-s, s.new_zeros(n, 1)], 1)
    expected = ot.sinkhorn(a, torch.cat([0.6 * b, b.new_tensor([0.4])]), dummy, eps, method="sinkhorn_log", warn=False, **tight)[:, :-1]
    torch.testing.assert_close(converged(s, a, 0.6 * b, eps, mass=0.6), expected, atol=1e-10, rtol=0)


@pytest.mark.peers
@pytest.mark.parametrize("n, k", ((1, 1), (7, 4), (33, 17)))
def test_factored_equal_to_pot(n, k):
    ot = pytest.importorskip("ot")
    x, y, a, b = vectors(n, k)
    tight, ours = {"numItermax": 50_000, "stopThr": 1e-14}, {"eps": 1., "n_iters": 50_000, "tol": 1e-13}
    expected = ot.sinkhorn(a, b, -x @ y.mT, 1., method="sinkhorn_log", warn=False, **tight)
    torch.testing.assert_close(sinkhorn_factored(x, y, a, b, **ours).rows(), expected, atol=1e-10, rtol=0)
    for rho_a, rho_b in ((3., 7.), (math.inf, 4.)):
        expected = ot.unbalanced.sinkhorn_unbalanced(a, b, -x @ y.mT, 1., (rho_a, rho_b), method="sinkhorn", **tight)
        torch.testing.assert_close(sinkhorn_factored(x, y, a, b, rho_a=rho_a, rho_b=rho_b, **ours).rows(), expected, atol=1e-6, rtol=0)
    # POT's own solver without a matrix takes squared distances: of unit vectors 2 - 2 <x, y>
    x, y = (torch.nn.functional.normalize(t, dim=1) for t in (x, y))
    f, g = ot.bregman.empirical_sinkhorn(x, y, 2., a, b, isLazy=True, batchSize=5, numIterMax=50_000, stopThr=1e-14)
    free = sinkhorn_factored(x, y, a, b, **ours)
    torch.testing.assert_close(free.rows(), (f[:, None] + g + x @ y.mT - 1).exp(), atol=1e-9, rtol=0)


@pytest.mark.peers
def test_partial_approaches_pots_linear_program():
    ot = pytest.importorskip("ot")
    s, a, b = problem(12, 7)
    expected = ot.partial.partial_wasserstein(a.numpy(), b.numpy(), (-s + 10).numpy(), 0.6)
    assert abs(float((sinkhorn(s, a, b, eps=0.005, mass=0.6, n_iters=50_000, tol=1e-9) * s).sum()) - (expected * s.numpy()).sum()) < 5e-3


@pytest.mark.peers
def test_not_slower_than_pot():
    pytest.importorskip("ot")
    spec = importlib.util.spec_from_file_location("sinkhorn_benchmark", ROOT / "benchmarks" / "sinkhorn.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    threads = torch.get_num_threads()
    try: assert benchmark.ratio(n=1024, k=500, n_iters=50, rounds=3) > 1
    finally: torch.set_num_threads(threads)
