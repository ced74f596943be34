"""Prices by quantiles: sorting in plain Python, the linear programme, exhaustive search over prices of two experts, loads, a router's bias."""
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from deepclustering.core.metrics import balance
from deepclustering.moe.balance import update_bias
from deepclustering.moe.layer import MoE, SwiGLUExperts, TopKRouter
from deepclustering.moe.quantile import quantile_prices, update_by_quantile
from deepclustering.moe.routers import Router, property_card, wanted_load
from deepclustering.moe.routing import sigmoid_topk, softmax_topk


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def load(s, K): return wanted_load(softmax_topk(s, K))


def step(s, K, beta):
    "One step with Python's sort."
    alpha = [sorted((row - beta).tolist(), reverse=True)[K] for row in s]
    C, prices = len(s) * K // s.shape[1], []
    for e in range(s.shape[1]):
        margin = sorted((x - a for x, a in zip(s[:, e].tolist(), alpha)), reverse=True)
        prices.append((margin[C - 1] + margin[C]) / 2)
    return torch.tensor(prices, dtype=s.dtype) - sum(prices) / len(prices)


@pytest.mark.parametrize("T, E, K", [(2, 2, 1), (5, 3, 2), (13, 7, 1), (40, 8, 7), (101, 6, 3)])
def test_steps_by_sorting(T, E, K):
    s, beta = normal(T, E, seed=T), torch.zeros(E, dtype=torch.float64)
    for n in (1, 2, 5):
        want = beta
        for _ in range(n): want = step(s, K, want)
        assert torch.allclose(quantile_prices(s, K, steps=n), want, atol=1e-12)
    start = normal(E, seed=1)
    assert torch.allclose(quantile_prices(s, K, start), step(s, K, start), atol=1e-12)


def test_two_experts_at_once():
    "With two experts and one choice a single step gives an even load, from any prices: the differences alone count."
    for T in (2, 10, 100):
        s = normal(T, 2, seed=T) * 3 + torch.tensor([5., 0.])
        for start in (None, torch.tensor([3., -3.])):
            assert load(s - quantile_prices(s, 1, start), 1).tolist() == [T // 2, T // 2]


@pytest.mark.parametrize("T, E, K", [(24, 4, 1), (30, 5, 2), (24, 6, 3)])
def test_dual_reaches_the_linear_programme(T, E, K):
    "Many steps: the dual's value is near that of the relaxed assignment, and never below it."
    s, C = normal(T, E, seed=E) + torch.linspace(0, 2, E, dtype=torch.float64), T * K // E
    rows, columns = np.zeros((T, T * E)), np.zeros((E, T * E))
    for t in range(T): rows[t, t * E:(t + 1) * E] = 1
    for e in range(E): columns[e, e::E] = 1
    optimum = -linprog(-s.numpy().ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.r_[np.full(T, K), np.full(E, C)], bounds=(0, 1)).fun
    beta = quantile_prices(s, K, steps=200)
    alpha = (s - beta).sort(1, descending=True).values[:, K]
    value = ((s - alpha[:, None] - beta).clamp(min=0).sum() + K * alpha.sum() + C * beta.sum()).item()
    assert optimum - 1e-9 <= value <= optimum + .05 * abs(optimum)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_load_falls(K):
    for seed in range(5):
        s = normal(1000, 8, seed=seed) + torch.linspace(0, 3, 8)
        loads = [balance(load(s - (quantile_prices(s, K, steps=n) if n else 0), K)).max_over_mean for n in (0, 1, 30)]
        assert loads[2] < 1.05 and loads[0] > loads[1] >= loads[2] - .02


def test_invariances():
    s, new = normal(60, 5), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    p = quantile_prices(s, 2, steps=3)
    assert torch.allclose(quantile_prices(s[new], 2, steps=3), p)                                      # tokens in another order
    assert torch.allclose(quantile_prices(s + normal(60, 1, seed=1), 2, steps=3), p)                   # a token that likes all experts more
    moved = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(quantile_prices(s[:, moved], 2, steps=3), p[moved])                          # experts renamed
    liked = torch.tensor([0., 0, 5, 0, 0], dtype=torch.float64)
    assert torch.allclose(quantile_prices(s + liked, 2, liked), quantile_prices(s, 2) + liked - 1)      # popularity is what the price takes away
    assert torch.allclose(quantile_prices(torch.cat([s, s]), 2), quantile_prices(s, 2), atol=.2)        # copies move a quantile by one place at most
    assert abs(p.sum()) < 1e-12
    assert torch.allclose(quantile_prices(4 * s, 2, steps=3), 4 * p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    s = normal(64, 4)
    p = quantile_prices(s.to(dtype), 2)
    assert p.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(p.double(), quantile_prices(s.to(dtype).double(), 2), atol=1e-5)
    assert torch.equal(quantile_prices(s.T.contiguous().T, 2), quantile_prices(s, 2))


def test_router_gets_the_prices_of_its_own_scores():
    torch.manual_seed(0)
    router, x = Router(6, 4, 2, sigmoid_topk, correction_bias=True), torch.randn(200, 6) + 1
    r = router(x)
    update_by_quantile(router, r)
    want = -step(r.logits.detach().sigmoid().double(), 2, torch.zeros(4, dtype=torch.float64))
    assert torch.allclose(router.e_score_correction_bias.double(), want, atol=1e-6)
    bias = router.e_score_correction_bias.clone()
    r = router(x)
    update_by_quantile(router, r, keep=.6)
    want = .6 * bias - .4 * step(r.logits.detach().sigmoid().double(), 2, -bias.double())
    assert torch.allclose(router.e_score_correction_bias.double(), want, atol=1e-6)
    chosen = router(x)
    assert torch.allclose(chosen.weights.sum(1), torch.ones(200)) and not chosen.logits.isnan().any()           # the bias chooses and does not weigh


def test_fewer_steps_than_the_rate():
    "Ten updates: the quantile is even where the rate has hardly begun."
    loads = {}
    for name, update in (("quantile", lambda r, routing: update_by_quantile(r, routing)), ("rate", lambda r, routing: update_bias(r, wanted_load(routing), 1e-3))):
        torch.manual_seed(1)
        router, x = TopKRouter(8, 16, 2, sigmoid_topk, correction_bias=True), torch.randn(2000, 8) + 1
        for _ in range(10): update(router, router(x))
        loads[name] = balance(wanted_load(router(x))).max_over_mean
    assert loads["quantile"] < 1.1 and loads["rate"] > 1.5


def test_causal_in_a_layer():
    torch.manual_seed(0)
    router, x = Router(6, 4, 2, sigmoid_topk, correction_bias=True), torch.randn(3, 20, 6)
    moe = MoE(router, SwiGLUExperts(6, 4, 4))
    moe(x)
    update_by_quantile(router, moe.routing)
    card = property_card(router, x)
    assert (card["leak"], card["mates"], card["deterministic"]) == (0, 0, True)
    assert "e_score_correction_bias" in moe.router.state_dict()


@pytest.mark.parametrize("call, message", [(lambda: quantile_prices(normal(5, 3), 3), "top_k must be between 1 and 2"), (lambda: quantile_prices(normal(5, 3), 0), "top_k must be"), (lambda: quantile_prices(normal(5, 1), 1), "top_k must be"),
                                           (lambda: quantile_prices(normal(2, 3), 1), "scores must hold at least E / top_k = 3 tokens, got 2"), (lambda: quantile_prices(normal(0, 3), 1), "scores must hold"), (lambda: quantile_prices(normal(5, 3) * math.nan, 1), "scores must be finite"),
                                           (lambda: quantile_prices(normal(5), 1), "scores must be floats"), (lambda: quantile_prices(torch.ones(5, 3, dtype=torch.int64), 1), "scores must be floats"), (lambda: quantile_prices(normal(5, 3), 1, normal(2)), r"prices must have shape \(3,\)"),
                                           (lambda: quantile_prices(normal(5, 3), 1, steps=0), "steps must be at least 1"), (lambda: update_by_quantile(Router(4, 4, 2), None), "router must have an e_score_correction_bias"),
                                           (lambda: update_by_quantile(Router(4, 4, 2, sigmoid_topk, correction_bias=True), None, -.1), "keep must be"), (lambda: update_by_quantile(Router(4, 4, 2, sigmoid_topk, correction_bias=True), None, math.nan), "keep must be")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()
