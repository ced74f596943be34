"""Routers that solve for the balance: brute force over all assignments, linear programming, Sinkhorn by hand in NumPy, loops over places, limits."""
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepclustering.core.tinylm import TinyLM
from deepclustering.moe.balanced import (BaseRouter, ExpertChoiceRouter, SinkhornRouter, Slots, SoftMoE, base_assignment, exact_assignment, expert_choice, share_of_optimum,
                                         sinkhorn_topk, slots_of, soft_slots, through_slots)
from deepclustering.moe.layer import MoE, SwiGLUExperts, aux_loss
from deepclustering.moe.routers import property_card
from deepclustering.moe.routing import Routing, softmax_topk, token_by_token

MAKERS = {"BASE": lambda D, E: BaseRouter(D, E), "Sinkhorn": lambda D, E: SinkhornRouter(D, E), "Sinkhorn, two": lambda D, E: SinkhornRouter(D, E, 2, eps=.3),
          "expert choice": lambda D, E: ExpertChoiceRouter(D, E), "Sinkhorn expert choice": lambda D, E: ExpertChoiceRouter(D, E, 2., "sinkhorn")}
makers = pytest.mark.parametrize("name", MAKERS)


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the assignment ----------------------------------------------------------------------------------------------------------

def brute(h, C):
    T, E = h.shape
    seats = [a for a in itertools.product(range(E), repeat=T) if max(a.count(e) for e in range(E)) <= C]
    return max(sum(h[t, e].item() for t, e in enumerate(a)) for a in seats)


@pytest.mark.parametrize("T, E, C", [(1, 1, None), (1, 3, None), (4, 2, None), (6, 3, None), (5, 3, None), (7, 2, 5), (3, 4, 2), (6, 2, 6)])
@pytest.mark.parametrize("seed", range(3))
def test_exact_by_brute_force(T, E, C, seed):
    h = normal(T, E, seed=seed)
    a = exact_assignment(h, C)
    places = C or math.ceil(T / E)
    assert torch.bincount(a, minlength=E).max() <= places
    assert h.gather(1, a[:, None]).sum().item() == pytest.approx(brute(h, places), abs=1e-12)
    if C is None: assert h.gather(1, base_assignment(h).experts).sum().item() >= brute(h, places) - 1e-3 * places * E * h.abs().max().item()


@pytest.mark.parametrize("T, E", [(60, 6), (61, 7), (64, 1), (30, 30)])
def test_base_is_the_linear_programme(T, E):
    "The relaxation has whole-numbered solutions: its value is the assignment's."
    h, C = normal(T, E, seed=T), math.ceil(T / E)
    ones = np.zeros((T, T * E)), np.zeros((E, T * E))
    for t in range(T): ones[0][t, t * E:(t + 1) * E] = 1
    for e in range(E): ones[1][e, e::E] = 1
    lp = linprog(-h.numpy().ravel(), ones[1], np.full(E, C), ones[0], np.ones(T))
    r = base_assignment(h, tol=1e-9).check()
    assert h.gather(1, r.experts).sum().item() == pytest.approx(-lp.fun, abs=1e-6)
    assert torch.bincount(r.experts[:, 0], minlength=E).max() <= C
    assert share_of_optimum(r, h) == pytest.approx(1, abs=1e-6)


def test_base_weights_and_gradient():
    h = normal(12, 3).requires_grad_()
    r = base_assignment(h)
    assert torch.allclose(r.weights, 1 / (1 + torch.exp(-h.gather(1, r.experts))))
    slope = torch.autograd.grad(r.weights.sum(), h)[0]
    s = r.weights * (1 - r.weights)
    assert torch.allclose(slope, torch.zeros(12, 3, dtype=torch.float64).scatter(1, r.experts, s.detach()))
    assert torch.autograd.gradcheck(lambda l: base_assignment(l).weights, h)                   # a small step changes nobody's seat
    assert torch.equal(base_assignment(h + normal(12, 1, seed=1)).experts, r.experts)          # shifts of tokens change nothing
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(base_assignment(h[order]).experts, r.experts[order])                    # nor does their order


# --- the plan -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, E, K, eps", [(40, 5, 1, 1.), (33, 4, 2, .5), (17, 6, 6, 1.), (5, 1, 1, 1.)])
def test_sinkhorn_by_hand(T, E, K, eps):
    h = normal(T, E, seed=E)
    P = np.exp(h.numpy() / eps)
    for _ in range(2000):
        P /= P.sum(0, keepdims=True) * E
        P /= P.sum(1, keepdims=True) * T
    r = sinkhorn_topk(h, K, eps, n_iters=2000, tol=1e-9).check()
    assert np.array_equal(r.experts.numpy(), np.argsort(-P, axis=1, kind="stable")[:, :K])
    p = h.sigmoid() if K == 1 else h.softmax(1)
    assert torch.allclose(r.weights, p.gather(1, r.experts))


def test_sinkhorn_between_greedy_and_base():
    h = normal(240, 6) + torch.linspace(0, 2, 6)
    large = sinkhorn_topk(h, eps=.02, n_iters=20_000, tol=1e-6)
    agree = (large.experts == base_assignment(h, 1e-9).experts).double().mean()
    assert agree > .97 and torch.bincount(large.experts[:, 0]).max() <= 44
    assert torch.bincount(softmax_topk(h, 1).experts[:, 0]).max() > 80
    flat = torch.zeros(12, 3)
    assert torch.equal(sinkhorn_topk(flat).experts, torch.zeros(12, 1, dtype=torch.int64))      # equals: the lower expert


# --- experts choose --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, E, c", [(1, 1, 1.), (10, 4, 1.), (10, 4, 2.), (9, 3, .5), (5, 2, 50.)])
def test_expert_choice_by_hand(T, E, c):
    h = normal(T, E, seed=T)
    r = expert_choice(h, c).check()
    C = min(T, math.ceil(c * T / E))
    p = h.softmax(1)
    want = torch.zeros(T, E, dtype=torch.float64)
    for e in range(E):
        for t in sorted(range(T), key=lambda t: -p[t, e].item())[:C]: want[t, e] = p[t, e]
    assert torch.allclose(r.to_map(), want)
    assert torch.equal(r.logits, h)


def test_expert_choice_is_the_flax_router_s():
    "One-hot of the best tokens of the transposed probabilities, as coded with Switch in transformers; here written with NumPy."
    h = normal(24, 4, seed=2)
    p = h.softmax(1).numpy()
    index = np.argsort(-p.T, axis=1, kind="stable")[:, :6]                                       # (E, C)
    mask = np.moveaxis(np.eye(24)[index], 2, 0)                                                   # (T, E, C)
    combine = np.take_along_axis(p.T, index, 1)[None] * mask
    A, B = slots_of(expert_choice(h).to_dispatch(6))
    assert np.allclose(A.sum(2), mask.sum(2)) and np.allclose(B.sum(2), combine.sum(2))


# --- the share of the optimum -----------------------------------------------------------------------------------------------------

def test_share_of_random_and_best():
    h = normal(120, 6) + torch.linspace(0, 1, 6)
    shares = []
    for seed in range(200):
        e = torch.arange(120)[torch.randperm(120, generator=torch.Generator().manual_seed(seed))] % 6
        shares.append(share_of_optimum(Routing(e[:, None], torch.ones(120, 1), num_experts=6), h))
    assert abs(np.mean(shares)) < 4 * np.std(shares) / 200**.5 and max(shares) < .5
    assert share_of_optimum(Routing(exact_assignment(h)[:, None], torch.ones(120, 1), num_experts=6), h) == pytest.approx(1)
    r = softmax_topk(h, 1).to_dispatch(20).routing
    assert share_of_optimum(r, h + normal(120, 1, seed=1)) == pytest.approx(share_of_optimum(r, h))
    assert share_of_optimum(r, 7 * h) == pytest.approx(share_of_optimum(r, h))


def test_share_by_hand():
    h = torch.tensor([[1., 0.], [4., 0.], [2., 0.], [0., 0.]])                                    # the optimum: tokens 1 and 2 at expert 0
    r = Routing(torch.tensor([[0, 1], [1, -1], [-1, -1], [0, -1]]), torch.tensor([[1., 1], [1, 0], [0, 0], [1, 0]]), num_experts=2)
    # token 0 counts at expert 0, token 1 at expert 1, token 3 at expert 0: the free place is at expert 1, where token 2 is worth 0
    assert share_of_optimum(r, h) == pytest.approx((1 + 0 + 0 + 0 - 3.5) / (6 - 3.5))


@pytest.mark.parametrize("seed", range(20))
def test_share_is_the_mean_over_all_seatings(seed):
    "Who has no place gets a free one by lot: enumerate the lots. Never above 1."
    T, E, C = 6, 3, 2 + seed % 2
    h, r = normal(T, E, seed=seed), expert_choice(normal(T, E, seed=100 + seed), .5 + seed % 3 / 2)
    if (r.experts >= 0).sum(0).max() and torch.bincount(r.experts[r.experts >= 0]).max() > C: return
    seats = [max(((h[t, e].item(), e) for e in row if e >= 0), default=None) for t, row in enumerate(r.experts.tolist())]
    free = [e for e in range(E) for _ in range(C - sum(s is not None and s[1] == e for s in seats))]
    out = [t for t in range(T) if seats[t] is None]
    lots = [sum(h[t, e].item() for t, e in zip(out, lot)) for lot in itertools.permutations(free, len(out))]
    total = sum(s[0] for s in seats if s) + np.mean(lots)
    mean = h.mean(1).sum().item()
    share = share_of_optimum(r, h, C)
    assert share == pytest.approx((total - mean) / (brute(h, C) - mean)) and share <= 1 + 1e-12


# --- two tensors --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, E, C", [(1, 1, 1), (7, 3, 2), (6, 4, 5)])
def test_slots_by_loops(T, E, C):
    h, x = normal(T, E, C, seed=T), normal(T, 4, seed=E)
    A, B = soft_slots(h)
    bank = SwiGLUExperts(4, 3, E).double()
    want = torch.zeros(T, 4, dtype=torch.float64)
    for e in range(E):
        for c in range(C):
            weight = h[:, e, c].exp() / h[:, e, c].exp().sum()
            made = bank.expert(e, (weight[:, None] * x).sum(0)[None])[0]
            for t in range(T): want[t] += h[t, e, c].exp() / h[t].exp().sum() * made
    assert torch.allclose(through_slots(x, Slots(A, B), bank.expert), want, atol=1e-12)


def test_soft_of_a_single_place_is_a_mean():
    "One expert, one place: everybody hears what the expert makes of the weighted mean."
    h, x = normal(5, 1, 1), normal(5, 3)
    y = through_slots(x, soft_slots(h), lambda e, rows: 2 * rows)
    assert torch.allclose(y, (2 * h[:, 0].softmax(0).T @ x).expand(5, 3))


@makers
def test_slots_equal_the_layer(name):
    torch.manual_seed(1)
    router, bank = MAKERS[name](6, 4).double(), SwiGLUExperts(6, 3, 4).double()
    x, moe = normal(20, 6), MoE(router, bank, capacity_factor=1., priority="weight")
    y = moe(x)
    d = router(x).to_dispatch(math.ceil(router(x).experts.numel() / 4), "weight")
    assert torch.allclose(y, through_slots(x, slots_of(d), bank.expert), atol=1e-12)
    assert torch.allclose(y, token_by_token(x, d.routing.experts, d.routing.weights, bank.expert), atol=1e-12)


def test_soft_layer_s_gradients():
    layer, x = SoftMoE(3, SwiGLUExperts(3, 2, 2), 2, 2).double(), normal(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    slopes = torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters()))
    for p, slope in zip(layer.parameters(), slopes):
        flat, at = p.data.flatten(), slope.abs().argmax()
        was = flat[at].item()
        ends = []
        for step in (1e-6, -1e-6):
            p.data.view(-1)[at] = was + step
            ends.append(layer(x).sin().sum().item())
        p.data.view(-1)[at] = was
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope.flatten()[at].item(), rel=1e-5)


def test_soft_layer_in_other_shapes():
    layer = SoftMoE(6, SwiGLUExperts(6, 3, 2), 2, 3)
    x = torch.randn(2, 3, 5, 6)
    assert layer(x).shape == x.shape and layer(x[0, 0]).shape == (5, 6) and layer(x[:, :, :1]).shape == (2, 3, 1, 6)
    assert torch.allclose(layer(x)[1, 2], layer(x[1, 2]), atol=1e-6)
    assert torch.isfinite(layer(0 * x)).all() and torch.equal(layer(5 * x).shape and layer.slots(5 * x).combine.argmax(-1), layer.slots(x).combine.argmax(-1))


# --- routers in the layer -----------------------------------------------------------------------------------------------------------

X = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(5))


@makers
@pytest.mark.parametrize("train", [True, False])
def test_cards(name, train):
    torch.manual_seed(1)
    card = property_card(MAKERS[name](8, 4).train(train), X)
    looks = train or "choice" in name
    assert (card["leak"] > 0) == looks and (card["mates"] > 0) == looks
    assert card["deterministic"] and card["gradient"] > 0 and card["dropped"] == 0
    if name in ("BASE", "expert choice") and looks: assert card["max_violation"] == 0 and card["load_cv"] == 0


@makers
def test_evaluation_is_greedy_or_the_same(name):
    torch.manual_seed(0)
    router, x = MAKERS[name](8, 4), X[0]
    h = F.linear(x, router.weight)
    train, test = router(x), router.eval()(x)
    if "choice" in name: assert torch.equal(train.to_map(), test.to_map())
    else: assert torch.equal(test.experts, h.topk(test.experts.shape[1]).indices) and not torch.equal(train.experts, test.experts)
    if name in ("BASE", "Sinkhorn"): assert torch.allclose(test.weights, h.amax(1, keepdim=True).sigmoid())


@makers
def test_in_the_layer_with_checkpointing(name):
    torch.manual_seed(0)
    moe, x = MoE(MAKERS[name](8, 4), SwiGLUExperts(8, 4, 4)), torch.randn(24, 8, requires_grad=True)
    leaves = [x, *moe.experts.parameters(), moe.router.weight]
    plain = torch.autograd.grad(moe(x).sin().sum(), leaves)
    again = torch.autograd.grad(checkpoint(moe, x, use_reentrant=False).sin().sum(), leaves)
    for a, b in zip(plain, again): assert torch.allclose(a, b, atol=1e-6)


@makers
@pytest.mark.parametrize("train", [True, False])
def test_dtypes_and_sizes(name, train):
    moe = MoE(MAKERS[name](8, 4), SwiGLUExperts(8, 4, 4)).train(train)
    for T in (0, 1, 3): assert moe(torch.randn(T, 8)).shape == (T, 8)
    assert moe.router(torch.randn(5, 8).bfloat16()).logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16): assert moe.router(torch.randn(5, 8)).logits.dtype == torch.float32
    moe.double()
    assert moe(torch.randn(5, 8, dtype=torch.float64)).dtype == torch.float64
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="logits must"): moe.router(torch.full((2, 8), bad, dtype=torch.float64))


def test_in_a_language_model():
    torch.manual_seed(0)
    model = TinyLM(11, dim=8, depth=2, heads=2, kv_heads=1, feed_forward=[lambda D: MoE(BaseRouter(D, 4, router_z_loss_coef=.1), SwiGLUExperts(D, 8, 4)), lambda D: MoE(ExpertChoiceRouter(D, 4), SwiGLUExperts(D, 8, 4))])
    (model(torch.randint(11, (2, 6))).sum() + aux_loss(model)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None) and aux_loss(model) > 0


# --- bad input ------------------------------------------------------------------------------------------------------------------------

h = torch.zeros(4, 2)


@pytest.mark.parametrize("call, message", [
    (lambda: base_assignment(torch.zeros(4)), "logits must be floats"), (lambda: base_assignment(h + math.nan), "logits must be finite"), (lambda: base_assignment(h, tol=0), "tol must be"),
    (lambda: sinkhorn_topk(h, 3), "top_k must be between"), (lambda: sinkhorn_topk(h, 0), "top_k must be between"), (lambda: sinkhorn_topk(h, eps=0), "eps must be positive"),
    (lambda: expert_choice(h, -1.), "capacity_factor must be positive"), (lambda: expert_choice(h, affinities=h.T), "affinities must have the shape"), (lambda: exact_assignment(h, 1), "capacity must be at least 2"),
    (lambda: exact_assignment(h, 1.5), "capacity must be a whole number"), (lambda: share_of_optimum(softmax_topk(h, 1), h), "at most 2 tokens, got 4"), (lambda: share_of_optimum(softmax_topk(h, 1), h[:3]), "affinities must have shape"),
    (lambda: soft_slots(h), "logits must have shape"), (lambda: through_slots(h, Slots(h, h), None), "must fit"), (lambda: SoftMoE(4, None, 2, 0), "slots must be"), (lambda: SoftMoE(4, None, 2, 1)(h), "x must have shape"),
    (lambda: BaseRouter(8, 0), "num_experts must be"), (lambda: SinkhornRouter(8, 4, 5), "top_k must be between"), (lambda: ExpertChoiceRouter(8, 4, affinity="none"), "affinity must be")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()
