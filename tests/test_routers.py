"""Routers with noise, losses and random second choices: dumb loops, Monte Carlo, finite differences, and transformers' Switch and NLLB routers."""
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepclustering.core.tinylm import TinyLM
from deepclustering.moe.layer import MoE, SwiGLUExperts, TopKRouter, aux_loss
from deepclustering.moe.routers import GShardRouter, NoisyTopKRouter, PrototypeRouter, Router, balance_loss, cv_squared, prob_in_topk, property_card, prototype_topk, z_loss
from deepclustering.moe.routing import Routing, map_to_routing, sigmoid_topk, softmax_topk, topk_softmax

MAKERS = {  # every router of the module: (module, how MoE queues, is it causal, does a token depend on its batch mates)
    "softmax": lambda D, E: (Router(D, E, 2), {}, True, False),
    "sigmoid": lambda D, E: (Router(D, E, 2, sigmoid_topk, correction_bias=True), {}, True, False),
    "topk softmax": lambda D, E: (Router(D, E, 2, topk_softmax), {}, True, False),
    "noisy": lambda D, E: (NoisyTopKRouter(D, E, 2), {}, True, False),
    "groups": lambda D, E: (PrototypeRouter(D, E, 2, router_aux_loss_coef=.1), {}, True, False),
    "GShard dropless": lambda D, E: (GShardRouter(D, E), {}, True, False),
    "Switch": lambda D, E: (Router(D, E, 1, router_jitter_noise=.05, router_z_loss_coef=.1), {}, True, False),
    "Switch, tight": lambda D, E: (Router(D, E, 1), dict(capacity_factor=.5, eval_capacity_factor=.5), True, True),
    "GShard, tight by choice": lambda D, E: (GShardRouter(D, E), dict(capacity_factor=.5, eval_capacity_factor=.5, priority="choice"), False, True),
    "softmax, tight by weight": lambda D, E: (Router(D, E, 2), dict(capacity_factor=.5, eval_capacity_factor=.5, priority="weight"), False, True)}
makers = pytest.mark.parametrize("name", MAKERS)
modes = pytest.mark.parametrize("train", [True, False])


# --- the chance of being chosen --------------------------------------------------------------------------------------------

def chance_by_hand(clean, noisy, std, k):
    out = torch.zeros_like(clean)
    for t in range(len(clean)):
        for i in range(clean.shape[1]):
            others = sorted((v for j, v in enumerate(noisy[t].tolist()) if j != i), reverse=True)
            z = math.inf if k > len(others) else (clean[t, i].item() - others[k - 1]) / std[t, i].item()
            out[t, i] = .5 * (1 + math.erf(z / math.sqrt(2)))
    return out


@pytest.mark.parametrize("T, E, K", [(0, 3, 1), (1, 1, 1), (7, 2, 1), (5, 6, 2), (9, 7, 6), (4, 5, 5)])
def test_chance_by_hand(T, E, K):
    g = torch.Generator().manual_seed(T)
    clean, noise = (torch.randn(T, E, generator=g, dtype=torch.float64) for _ in range(2))
    std = torch.rand(T, E, generator=g, dtype=torch.float64) + .1
    noisy = clean + noise * std
    assert torch.allclose(prob_in_topk(clean, noisy, std, K), chance_by_hand(clean, noisy, std, K), atol=1e-12)


@pytest.mark.parametrize("E, K", [(4, 1), (6, 3)])
def test_chance_is_unbiased(E, K):
    g = torch.Generator().manual_seed(E)
    clean, std = torch.randn(E, generator=g), torch.rand(E, generator=g) + .2
    noisy = clean + std * torch.randn(100_000, E, generator=g)
    often = torch.zeros(len(noisy), E).scatter(1, noisy.topk(K).indices, 1.).mean(0)
    assert (prob_in_topk(clean.expand_as(noisy), noisy, std.expand_as(noisy), K).mean(0) - often).abs().max() < 5 * .5 / len(noisy)**.5 * 1.5


def test_load_loss_by_central_differences():
    "The whole term, through thresholds and deviations, with a step of our own."
    g = torch.Generator().manual_seed(3)
    eps = torch.randn(11, 5, generator=g, dtype=torch.float64)
    def loss(h, raw):
        std = F.softplus(raw) + .01
        return cv_squared(prob_in_topk(h, h + eps * std, std, 2).sum(0))
    leaves = [torch.randn(11, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    slopes = torch.autograd.grad(loss(*leaves), leaves)
    for leaf, slope in zip(range(2), slopes):
        for at in [(0, 0), (3, 4), (10, 2), (7, 1)]:
            step = torch.zeros(11, 5, dtype=torch.float64)
            step[at] = 1e-6
            up, down = ([l.detach() + s * step * (i == leaf) for i, l in enumerate(leaves)] for s in (1, -1))
            assert abs((loss(*up) - loss(*down)).item() / 2e-6 - slope[at].item()) < 1e-7


def test_cv_squared_is_numpy_s():
    for seed in range(5):
        v = np.random.default_rng(seed).random(seed + 1)
        assert cv_squared(torch.tensor(v)).item() == pytest.approx((v.std() / v.mean())**2, abs=1e-12)
    v = torch.zeros(4, requires_grad=True)
    cv_squared(v).backward()
    assert torch.isfinite(v.grad).all()                                                 # nobody was chosen: no NaN


# --- the losses ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, E, K, groups", [(1, 2, 1, 1), (13, 6, 2, 2), (40, 9, 3, 3), (17, 4, 4, 1)])
def test_balance_loss_by_hand(T, E, K, groups):
    g = torch.Generator().manual_seed(T)
    logits = torch.randn(T, E, generator=g, dtype=torch.float64)
    r = (prototype_topk if groups == K and K > 1 else softmax_topk)(logits, K)
    gone = torch.rand(T, K, generator=g) < .2
    r = Routing(r.experts.masked_fill(gone, -1), r.weights.masked_fill(gone, 0), logits)
    for first in (False, True):
        counts, size, p = [0] * E, E // groups, [0.] * E
        for t in range(T):
            for e in r.experts[t, :1 if first else K].tolist():
                if e >= 0: counts[e] += 1
            for e in range(E):
                group = range(e // size * size, e // size * size + size)
                p[e] += math.exp(logits[t, e]) / sum(math.exp(logits[t, i]) for i in group) / T / groups
        want = E * sum(c / max(1, sum(counts)) * q for c, q in zip(counts, p))
        assert balance_loss(r, first, groups).item() == pytest.approx(want, abs=1e-12)


def test_losses_are_switch_s_in_transformers():
    modeling = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=g)
    r = softmax_topk(logits, 1)
    assert balance_loss(r).item() == pytest.approx(float(modeling.load_balancing_loss_func(logits.softmax(-1)[None], r.experts[None, :, 0])), abs=1e-6)
    assert z_loss(logits).item() == pytest.approx(float(modeling.router_z_loss_func(logits[None])), rel=1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_switch_is_transformers_with_jitter_and_capacity(train):
    modeling = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    config = SimpleNamespace(num_experts=6, expert_capacity=5, hidden_size=8, router_bias=False, router_jitter_noise=.3, router_ignore_padding_tokens=False, router_dtype="float32")
    theirs = modeling.SwitchTransformersTop1Router(config).train(train)
    ours = Router(8, 6, 1, router_jitter_noise=.3).train(train)
    ours.weight.data.copy_(theirs.classifier.weight)
    x = torch.randn(40, 8)
    torch.manual_seed(4)
    mask, probs, logits = theirs(x[None].clone())
    torch.manual_seed(4)
    r = ours(x)
    assert torch.allclose(r.logits, logits[0], atol=1e-6)
    kept = r.to_dispatch(5).routing
    assert torch.equal(torch.zeros(40, 7, dtype=torch.int64).scatter(1, kept.experts % 7, 1)[:, :6], mask[0]) and (kept.experts < 0).any()
    assert torch.allclose(r.weights, probs[0], atol=1e-6)


def test_weights_pass_to_and_from_the_plain_router():
    plain, rich = TopKRouter(8, 4, 2), Router(8, 4, 2, router_aux_loss_coef=.1, router_jitter_noise=.1)
    rich.load_state_dict(plain.state_dict())
    x = torch.randn(9, 8)
    a, b = plain(x), rich.eval()(x)
    assert torch.equal(a.weights, b.weights) and list(rich.state_dict()) == ["weight"]


# --- GShard ------------------------------------------------------------------------------------------------------------------

def gshard_by_hand(logits, uniform, capacity):
    "Token by token: all first choices, then the second ones whose number falls below twice their weight."
    T, E = logits.shape
    p, full, out = logits.softmax(1), [0] * E, torch.zeros(T, E)
    order = p.argsort(dim=1, descending=True, stable=True)
    for j in (0, 1):
        for t in range(T):
            e, pair = int(order[t, j]), p[t, order[t, :2]].sum()
            if j == 1 and not uniform[t] < 2 * p[t, e] / pair: continue
            if full[e] < capacity: full[e] += 1; out[t, e] = p[t, e] / pair
    return out


@pytest.mark.parametrize("T, E, capacity", [(1, 2, 1), (30, 5, 4), (64, 8, 16), (33, 3, 100)])
def test_gshard_by_hand(T, E, capacity):
    router = GShardRouter(6, E)
    x = torch.randn(T, 6)
    torch.manual_seed(1)
    uniform = torch.rand(T)
    torch.manual_seed(1)
    r = router(x)
    assert torch.allclose(r.to_dispatch(capacity, "choice").routing.to_map(), gshard_by_hand(F.linear(x, router.weight).detach(), uniform, capacity), atol=1e-6)
    assert torch.allclose(r.aux, .01 * balance_loss(softmax_topk(r.logits, 1)))             # the loss does not know of seconds


def test_gshard_without_the_draw_is_nllb_in_transformers():
    modeling = pytest.importorskip("transformers.models.nllb_moe.modeling_nllb_moe")
    config = SimpleNamespace(num_experts=5, expert_capacity=7, hidden_size=6, router_bias=False, router_ignore_padding_tokens=False, router_dtype="float32", second_expert_policy="all",
                             normalize_router_prob_before_dropping=True, batch_prioritized_routing=False, moe_eval_capacity_token_fraction=-1)
    logits = torch.randn(30, 5)
    first, weights = modeling.NllbMoeTop2Router(config).route_tokens(logits.clone())
    kept = softmax_topk(logits, 2, norm_topk_prob=True).to_dispatch(7, "choice").routing
    assert torch.allclose(kept.to_map(), weights, atol=1e-6) and (kept.experts < 0).any()


def test_second_choices_fall_as_often_as_they_should():
    router, x = GShardRouter(6, 4), torch.randn(1, 6).expand(50_000, 6)
    second = router.eval()(x).weights[0, 1].item()
    assert abs((router.train()(x).experts[:, 1] >= 0).double().mean().item() - 2 * second) < 5 * .5 / 50_000**.5


# --- groups and noise ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, E, K", [(0, 4, 2), (1, 1, 1), (13, 6, 3), (9, 6, 1), (8, 5, 5)])
def test_prototypes_by_hand(T, E, K):
    logits = torch.randn(T, E, dtype=torch.float64)
    r = prototype_topk(logits, K).check()
    size = E // K
    for t in range(T):
        for z in range(K):
            part = logits[t, z * size:(z + 1) * size]
            e = int(part.argmax())
            assert r.experts[t, z] == z * size + e and r.weights[t, z].item() == pytest.approx((part[e].exp() / part.exp().sum()).item(), abs=1e-12)
    assert r.experts.shape == (T, K) and torch.equal(r.logits, logits)
    if K == 1: assert torch.equal(r.weights, softmax_topk(logits, 1).weights)
    if K == E: assert torch.equal(r.weights, torch.ones_like(r.weights))


def test_prototypes_carry_gradients():
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda l: prototype_topk(l, 2).to_map(), logits)


def test_noise_is_normal_with_the_deviation_it_says():
    torch.manual_seed(0)
    router = NoisyTopKRouter(4, 5, 2, noise_epsilon=.3)
    router.noise_weight.data.normal_()
    x = torch.randn(1, 4)
    h = router.train()(x.expand(100_000, 4)).logits.detach()
    std = F.softplus(F.linear(x, router.noise_weight))[0] + .3
    z = (h - F.linear(x, router.weight)) / std
    assert z.mean(0).abs().max() < .02 and (z.std(0) - 1).abs().max() < .02 and (z.T.corrcoef() - torch.eye(5)).abs().max() < .02


def test_noisy_losses_by_hand():
    torch.manual_seed(0)
    router, x = NoisyTopKRouter(4, 6, 3, importance_coef=.7, load_coef=.2, router_z_loss_coef=.5).double(), torch.randn(20, 4, dtype=torch.float64)
    router.noise_weight.data.normal_()
    r = router(x)
    importance = np.zeros(6)
    for row, w in zip(r.experts.tolist(), r.weights.tolist()):
        for e, v in zip(row, w): importance[e] += v
    load = chance_by_hand(F.linear(x, router.weight), r.logits, F.softplus(F.linear(x, router.noise_weight)) + .01, 3).sum(0).detach().numpy()
    z = (r.logits.exp().sum(1).log()**2).mean().item()
    assert r.aux.item() == pytest.approx(.7 * (importance.std() / importance.mean())**2 + .2 * (load.std() / load.mean())**2 + .5 * z, abs=1e-10)
    assert not any(v.requires_grad for v in r.stats.values())


def test_the_load_loss_moves_a_crowded_router():
    "Gradient descent on the aux loss alone evens the load."
    torch.manual_seed(0)
    router, x = NoisyTopKRouter(8, 6, 2), torch.randn(256, 8) + 1
    wanted = lambda: np.bincount(router.eval()(x).experts.flatten().numpy(), minlength=6)
    before = wanted()
    optimizer = torch.optim.Adam(router.parameters(), lr=.03)
    for _ in range(60):
        optimizer.zero_grad(); router.train()(x).aux.backward(); optimizer.step()
    after = wanted()
    assert after.std() < .5 * before.std()


# --- in the layer ---------------------------------------------------------------------------------------------------------------

@makers
def test_in_the_layer_with_checkpointing(name):
    "Noise is drawn again the same way when activations are recomputed: the same loss and gradients, in both variants."
    torch.manual_seed(0)
    router, queue, *_ = MAKERS[name](8, 4)
    moe, x = MoE(router, SwiGLUExperts(8, 4, 4), **queue), torch.randn(24, 8, requires_grad=True)
    def run(call):
        torch.manual_seed(7)
        y = call(x)
        return torch.autograd.grad(y.sin().sum(), [x, *moe.experts.parameters(), router.weight])
    plain = run(moe)
    loads = moe.routing.stats["load"]
    for reentrant in (False, True):
        if reentrant:
            torch.manual_seed(7)
            checkpoint(moe, x, use_reentrant=True).sin().sum().backward()
            slopes = [x.grad, *(p.grad for p in moe.experts.parameters()), router.weight.grad]
        else: slopes = run(lambda t: checkpoint(moe, t, use_reentrant=False))
        for a, b in zip(plain, slopes): assert torch.allclose(a, b, atol=1e-6)
        assert torch.equal(moe.routing.stats["load"], loads)


@makers
@modes
def test_dtypes_and_sizes(name, train):
    router, queue, *_ = MAKERS[name](8, 4)
    moe = MoE(router, SwiGLUExperts(8, 4, 4), **queue).train(train)
    for T in (0, 1, 3):
        moe(torch.randn(T, 8))
        assert torch.isfinite(torch.as_tensor(aux_loss(moe)))
    assert router(torch.randn(5, 8).bfloat16()).logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16): assert router(torch.randn(5, 8)).logits.dtype == torch.float32
    moe.double()
    assert moe(torch.randn(5, 8, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="x must have shape"): router(torch.randn(5, 7))
    with pytest.raises(ValueError, match="NaN"): router(torch.full((2, 8), math.nan))


def test_in_a_language_model():
    torch.manual_seed(0)
    model = TinyLM(11, dim=8, depth=2, heads=2, kv_heads=1, feed_forward=lambda D: MoE(NoisyTopKRouter(D, 4, 2), SwiGLUExperts(D, 8, 4)))
    model(torch.randint(11, (2, 6)))
    assert aux_loss(model) > 0
    assert aux_loss(model.eval()) > 0 and model(torch.randint(11, (2, 6))) is not None and aux_loss(model) == 0   # of the last pass; without noise there is none


# --- cards ----------------------------------------------------------------------------------------------------------------------

X = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(5))


@makers
@modes
def test_what_is_labelled_causal_shows_zero(name, train):
    torch.manual_seed(1)
    router, queue, causal, mates = MAKERS[name](8, 6)
    card = property_card(router.train(train), X, **queue)
    assert (card["leak"] == 0) == causal and (card["mates"] == 0) == (not mates)
    assert (card["dropped"] > 0) == mates and router.training == train
    assert card["gradient"] > 0


class ExpertChoice(nn.Module):
    "Each expert takes its two best tokens: looks at everybody."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))
    def forward(self, x):
        p = F.linear(x, self.weight).softmax(1)
        return map_to_routing(p, torch.zeros_like(p, dtype=torch.bool).scatter(0, p.topk(len(x) // 4, dim=0).indices, True))


class Average(nn.Module):
    "Each token by the mean of the tokens so far: causal in a sequence, and a gossip in a batch."
    def __init__(self, causal):
        super().__init__()
        self.causal = causal
    def forward(self, x):
        m = x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None] if self.causal else x.mean(0).expand_as(x) + 0 * x
        return softmax_topk(m[:, :5] * 50, 1)


def test_cards_see_what_routers_look_at():
    torch.manual_seed(0)
    assert property_card(ExpertChoice(), X)["leak"] > .1
    causal, all_of = property_card(Average(True), X), property_card(Average(False), X)
    assert causal["leak"] == 0 < causal["mates"] and all_of["leak"] > .9 and all_of["mates"] > .9
    assert causal["gradient"] == 0 and causal["deterministic"]


def test_leak_and_mates_by_brute_force():
    torch.manual_seed(2)
    router = Router(8, 6, 2).eval()
    queue = dict(eval_capacity_factor=.7, priority="weight")
    card = property_card(router, X, **queue)
    def map_of(x):
        r = router(x)
        return r.to_dispatch(max(1, math.ceil(.7 * r.experts.numel() / 6)), "weight").routing.to_map()
    moved = [(map_of(X[b])[:16] != map_of(torch.cat([X[b, :16], X[b - 1, 16:]]))[:16]).any(1).double().mean() for b in range(4)]
    assert card["leak"] == pytest.approx(float(sum(moved) / 4))
    moved = []
    for b in range(4):
        rows = [X[b] if i == b else X[b - 1] for i in range(4)]
        moved.append((map_of(X.flatten(0, 1)).view(4, 32, 6)[b] != map_of(torch.cat(rows)).view(4, 32, 6)[b]).any(1).double().mean())
    assert card["mates"] == pytest.approx(float(sum(moved) / 4))
    wanted = np.bincount(router(X.flatten(0, 1)).experts.flatten(), minlength=6)
    assert card["load_cv"] == pytest.approx(wanted.std() / wanted.mean()) and card["max_violation"] == pytest.approx(wanted.max() / wanted.mean() - 1)


def test_the_card_leaves_everything_as_it_was():
    torch.manual_seed(0)
    router = NoisyTopKRouter(8, 6, 2)
    state = torch.get_rng_state()
    a, b = property_card(router, X), property_card(router, X)
    assert a == b and torch.equal(torch.get_rng_state(), state) and router.weight.grad is None
    assert not a["deterministic"] and a["cost"] is None
    assert property_card(router, X, cost=True)["cost"] > .2


def test_renormalised_top_1_warns_and_has_no_gradient():
    for make in (lambda: Router(8, 4, 1, norm_topk_prob=True), lambda: Router(8, 4, 1, topk_softmax), lambda: NoisyTopKRouter(8, 4, 1)):
        with pytest.warns(UserWarning, match="no gradient"): router = make()
        assert property_card(router, X)["gradient"] < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert property_card(Router(8, 4, 1), X)["gradient"] > 1e-3


# --- bad input ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, message", [
    (lambda: Router(8, 4, 5), "top_k must be between 1 and 4"), (lambda: Router(8, 4, 2, router_jitter_noise=1), "router_jitter_noise must be below 1"),
    (lambda: Router(8, 4, 2, router_aux_loss_coef=-1.), "router_aux_loss_coef must be at least 0"), (lambda: Router(8, 4, 2, router_z_loss_coef=math.nan), "router_z_loss_coef must be at least 0"),
    (lambda: GShardRouter(8, 4, 1), "top_k must be between 2 and 2"), (lambda: GShardRouter(8, 4, second_expert_policy="some"), "second_expert_policy must be"),
    (lambda: NoisyTopKRouter(8, 4, 2, noise_epsilon=-1.), "noise_epsilon must be positive"), (lambda: NoisyTopKRouter(8, 4, 2, load_coef=-1.), "load_coef must be at least 0"),
    (lambda: PrototypeRouter(8, 6, 4), "num_experts must be a multiple"), (lambda: prototype_topk(torch.zeros(3), 1), "logits must have shape"), (lambda: prototype_topk(torch.zeros(3, 4), 0), "top_k must be between"),
    (lambda: prob_in_topk(torch.zeros(3), torch.zeros(3), torch.ones(3), 1), "clean, noisy and std"), (lambda: balance_loss(Routing(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), num_experts=2)), "routing must have logits"),
    (lambda: property_card(Router(8, 4, 2), torch.zeros(4, 8)), "x must have shape")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()
