"""V-MoE: numbers that the authors' own functions gave, buffers filled by a loop in plain Python, closed forms, gradients by differences, a model with its knob."""
import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepclustering.core.models import FeedForward, TinyViT
from deepclustering.moe.layer import MoE, SwiGLUExperts, aux_loss
from deepclustering.moe.routers import Router, prob_in_topk, property_card
from deepclustering.moe.routing import Routing, softmax_topk, token_by_token
from deepclustering.moe.vision import VMoERouter, at_capacity, batch_priority, expert_blocks, prob_above_kth


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_formula(T, E, seed):
    "Logits and noise that anybody can make again, in any library."
    t, e = torch.arange(T, dtype=torch.float64)[:, None], torch.arange(E, dtype=torch.float64)
    return 2 * torch.sin(1.7 * t * t + 3.1 * e * e + .9 * t * e + seed), torch.cos(2.3 * t * t + 1.3 * e * e + .7 * t * e + seed)


# --- against google-research/vmoe, its functions run with NumPy in the place of JAX (commit 942a78bc81) -------------------------

KEPT = {(12, 4, 2, 4, 0, False): "xx x. x. x. xx x. xx xx x. x. xx ..", (12, 4, 2, 4, 0, True): "xx x. x. x. xx x. xx x. x. xx xx ..",        # x: the choice has a place
        (15, 5, 3, 3, 1, False): "xx. x.. x.. xx. x.. x.. x.. xx. x.. x.. ... ... x.. x.. ...", (15, 5, 3, 3, 1, True): ".x. x.. x.. xx. x.. x.. x.. xx. x.. ... x.. x.. x.. x.. ..."}
LOSSES = {(12, 4, 2, 0): (0.06524108020545845, 0.08899581698291208), (15, 5, 3, 1): (0.03705589893594338, 0.017563616306906386), (9, 6, 1, 2): (0.23958368500280927, 0.5640531250387654)}


@pytest.mark.parametrize("case", KEPT, ids=str)
def test_places_of_the_authors(case):
    T, E, K, C, seed, priority = case
    r = softmax_topk(by_formula(T, E, seed)[0], K)
    kept = r.to_dispatch(C, batch_priority(r) if priority else "choice").routing.experts >= 0
    assert " ".join("".join(".x"[int(k)] for k in row) for row in kept) == KEPT[case]


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_losses_of_the_authors(case, monkeypatch):
    T, E, K, seed = case
    h, eps = by_formula(T, E, seed)
    router = VMoERouter(E, E, K, importance_coef=.3, load_coef=.7).double()
    with torch.no_grad(): router.weight.copy_(torch.eye(E))                # the tokens are the logits
    monkeypatch.setattr(torch, "randn_like", lambda t: eps)
    r = router(h)
    importance, load = LOSSES[case]
    assert r.stats["importance_cv2"].item() == pytest.approx(importance, rel=1e-9)
    assert r.stats["load_cv2"].item() == pytest.approx(load, rel=1e-9)
    assert r.aux.item() == pytest.approx(.3 * importance + .7 * load, rel=1e-9)
    assert torch.allclose(r.logits, h + eps / E, atol=1e-14)


# --- batch priority -------------------------------------------------------------------------------------------------------------

def filled(routing, C):
    "Buffers filled one pair at a time."
    weights, buffers = routing.weights.tolist(), [[] for _ in range(routing.num_experts)]
    tokens = sorted(range(len(weights)), key=lambda t: -max(weights[t]))    # stable
    for j in range(routing.experts.shape[1]):
        for t in tokens:
            e = int(routing.experts[t, j])
            if e >= 0 and len(buffers[e]) < C: buffers[e].append(t)
    return buffers


@pytest.mark.parametrize("T, E, K", [(1, 1, 1), (1, 3, 2), (7, 3, 3), (23, 5, 2), (64, 8, 1), (65, 9, 4)])
@pytest.mark.parametrize("C", [1, 3, 1000])
def test_buffers_by_a_loop(T, E, K, C):
    r = softmax_topk(normal(T, E, seed=T), K)
    d = r.to_dispatch(C, batch_priority(r))
    tokens = [[t for t in row if t >= 0] for row in d.table()[0].tolist()]
    assert tokens == filled(r, C)


def test_choices_given_up_take_no_place():
    r = softmax_topk(normal(20, 4), 2)
    gone = torch.rand(20, 2, generator=torch.Generator().manual_seed(1)) < .3
    r = Routing(r.experts.masked_fill(gone, -1), r.weights.masked_fill(gone, 0), r.logits)
    d = r.to_dispatch(4, batch_priority(r))
    assert [[t for t in row if t >= 0] for row in d.table()[0].tolist()] == filled(r, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_priority_is_an_order(dtype):
    r = softmax_topk(normal(30, 6), 3)
    p = batch_priority(Routing(r.experts, r.weights.to(dtype), num_experts=6))
    assert p.dtype == torch.int64 and sorted(p.flatten().tolist()) == list(range(-89, 1))                       # every pair its own place, however close the weights
    assert (p[:, 0].min() > p[:, 1].max()) and (p[:, 1].min() > p[:, 2].max())
    assert torch.equal(p[:, 0].argsort(descending=True), r.weights[:, 0].to(dtype).argsort(descending=True, stable=True))


def test_priority_scale_and_permutation():
    "The order of the tokens changes nothing but names; the scale of the weights nothing at all."
    r, new = softmax_topk(normal(30, 6), 2), torch.randperm(30, generator=torch.Generator().manual_seed(2))
    scaled = Routing(r.experts, 7 * r.weights, num_experts=6)
    assert torch.equal(batch_priority(scaled), batch_priority(r))
    moved = Routing(r.experts[new], r.weights[new], num_experts=6)
    kept, kept_moved = (q.to_dispatch(4, batch_priority(q)).routing.experts for q in (r, moved))
    assert torch.equal(kept[new], kept_moved)
    vanilla, vanilla_moved = (q.to_dispatch(4, "choice").routing.experts for q in (r, moved))
    assert not torch.equal(vanilla[new], vanilla_moved)


def test_priority_keeps_more_weight():
    "Of first choices, batch priority keeps at least the weight that any other order does: for K = 1 the buffers hold the heaviest."
    for seed in range(5):
        r = softmax_topk(normal(60, 6, seed=seed), 1)
        kept = {name: r.to_dispatch(5, p).routing.weights.sum().item() for name, p in (("BPR", batch_priority(r)), ("token", "token"), ("choice", "choice"))}
        best = sum(r.weights[r.experts[:, 0] == e, 0].sort(descending=True).values[:5].sum().item() for e in range(6))
        assert kept["BPR"] == pytest.approx(best, abs=1e-12) and kept["BPR"] > max(kept["token"], kept["choice"])


def test_priority_empty_and_gradient():
    assert batch_priority(Routing(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), num_experts=3)).shape == (0, 2)
    w = torch.rand(5, 2, requires_grad=True)
    assert not batch_priority(Routing(torch.tensor([[0, 1]] * 5), w, num_experts=2)).requires_grad


# --- the router -----------------------------------------------------------------------------------------------------------------

def test_chance_by_scipy_and_by_draws():
    h, eps = normal(6, 5), .3 * normal(6, 5, seed=1)
    noisy = (h + eps).numpy()
    for K in range(1, 6):
        kth = np.sort(noisy, 1)[:, -K]
        want = 1 - norm.cdf((kth[:, None] - h.numpy()) / .3)
        assert np.allclose(prob_above_kth(h, h + eps, .3, K).numpy(), want, atol=1e-12)
        out = torch.as_tensor(noisy < kth[:, None])                                      # for an expert that is out, the two estimators agree
        if K < 5: assert torch.allclose(prob_above_kth(h, h + eps, .3, K)[out], prob_in_topk(h, h + eps, torch.full_like(h, .3), K)[out])
    leaf = h.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: prob_above_kth(h, h + eps, .3, 2).sum(0), leaf)


def test_router_modes():
    torch.manual_seed(0)
    router, x = VMoERouter(8, 5, 2, router_aux_loss_coef=.1), torch.randn(300, 8)
    a, b = router(x), router(x)
    assert not torch.equal(a.logits, b.logits) and a.aux.requires_grad and {"importance_cv2", "load_cv2", "aux_loss"} == set(a.stats)
    assert (a.logits - F.linear(x, router.weight)).std().item() == pytest.approx(1 / 5, rel=.05)
    a.check()
    assert torch.allclose(a.weights, a.logits.softmax(1).gather(1, a.experts)) and (a.weights.sum(1) < 1).all()
    calm = router.eval()(x)
    assert torch.equal(calm.experts, Router.route(router, x).experts) and torch.equal(router(x).weights, calm.weights) and set(calm.stats) == {"aux_loss"}


def test_losses_pull_the_load_even():
    "A router that wants one expert, trained on its losses alone, spreads its tokens; with coefficients of 0 it does not move."
    for coefs, even in ((dict(), True), (dict(importance_coef=0.), True), (dict(load_coef=0.), True), (dict(importance_coef=0., load_coef=0.), False)):
        torch.manual_seed(0)
        router, x = VMoERouter(4, 4, 1, **coefs), torch.randn(256, 4) + 1
        with torch.no_grad(): router.weight.zero_(); router.weight[0] = .3
        before = torch.bincount(router.eval()(x).experts[:, 0], minlength=4)
        optimiser = torch.optim.SGD(router.train().parameters(), lr=20.)
        for _ in range(60):
            loss = router(x).aux
            if loss.requires_grad: optimiser.zero_grad(); loss.backward(); optimiser.step()
        importance = router.eval()(x).logits.softmax(1).sum(0)
        assert before[0] > 200 and (importance.max() / importance.mean() < 1.15) == even


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_router_dtypes_and_sizes(dtype):
    router = VMoERouter(6, 3, 2)
    for T in (0, 1, 5):
        r = router(torch.randn(T, 6).to(dtype))
        assert r.logits.dtype == torch.promote_types(dtype, torch.float32) and r.experts.shape == (T, 2) and torch.isfinite(r.aux)
    assert torch.isfinite(router.double()(torch.randn(12, 6, dtype=torch.float64).T.contiguous().T).aux)


def test_checkpoint_and_gradients():
    "Recomputed under activation checkpointing with the same noise: the same gradients, one routing."
    torch.manual_seed(0)
    moe, x = MoE(VMoERouter(6, 4), SwiGLUExperts(6, 3, 4), capacity_factor=.7, priority=batch_priority), torch.randn(3, 10, 6)
    grads = []
    for f in (moe, lambda x: checkpoint(moe, x, use_reentrant=False)):
        torch.manual_seed(7)
        y = f(x)
        grads.append(torch.autograd.grad(y.square().sum() + moe.routing.aux, list(moe.parameters())))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads)) and all(g.abs().sum() > 0 for g in grads[0])


# --- in a layer and in a model ----------------------------------------------------------------------------------------------------

def test_layer_is_the_oracle():
    torch.manual_seed(0)
    moe, x = MoE(VMoERouter(6, 4), SwiGLUExperts(6, 3, 4), eval_capacity_factor=.5, priority=batch_priority).double().eval(), normal(3, 10, 6)
    y = moe(x).flatten(0, 1)
    r = moe.router(x.flatten(0, 1))
    buffers = filled(r, math.ceil(.5 * 60 / 4))
    kept = torch.tensor([[t in buffers[e] for e in row] for t, row in enumerate(r.experts.tolist())])
    want = token_by_token(x.flatten(0, 1), r.experts.masked_fill(~kept, -1), r.weights, moe.experts.expert)
    assert torch.allclose(y, want, atol=1e-12) and moe.routing.stats["dropped"] == 60 - sum(map(len, buffers)) > 0
    assert (y[(~kept).all(1)] == 0).all()                                    # skipped: nothing is added to the residual stream


def test_function_as_priority():
    "A function gives what its scores give; a wrong shape is refused by name."
    torch.manual_seed(0)
    router, bank, x = VMoERouter(6, 4).eval(), SwiGLUExperts(6, 3, 4), torch.randn(20, 6)
    scores = torch.rand(20, 2)
    a, b = (MoE(router, bank, eval_capacity_factor=.5, priority=p).eval() for p in (lambda r: scores, scores))
    assert torch.equal(a(x), b(x)) and a.routing.stats["dropped"] == 20
    with pytest.raises(ValueError, match="priority must have the shape of experts"): MoE(router, bank, eval_capacity_factor=.5, priority=lambda r: scores[:3]).eval()(x)
    model = MoE(router, bank, eval_capacity_factor=.5, priority=batch_priority).eval()
    assert torch.equal(copy.deepcopy(model)(x), model(x)) and torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize("depth, options, where", [(8, {}, [1, 3, 5, 7]), (8, dict(last=2), [5, 7]), (24, dict(last=2), [21, 23]), (12, dict(every=6), [5, 11]), (5, dict(every=1), [0, 1, 2, 3, 4]), (2, dict(last=1), [1]), (1, dict(every=1), [0])])
def test_blocks_of_the_configurations(depth, options, where):
    "`range(n - 1, depth, n)` for every n, the last n of `range(1, depth, 2)` for last n."
    every = options.get("every", 2)
    assert where == list(range(every - 1, depth, every))[-options.get("last", depth):]
    layers = expert_blocks(depth, "experts", dense="dense", **options)
    assert [b for b, f in enumerate(layers) if f == "experts"] == where and layers.count("dense") == depth - len(where)


@pytest.mark.parametrize("call, message", [(lambda: expert_blocks(0, None), "depth must be at least 1"), (lambda: expert_blocks(1, None), r"every must be between 1 and 1"), (lambda: expert_blocks(4, None, 0), "every must be between"),
                                           (lambda: expert_blocks(4, None, last=3), "last must be between 1 and 2"), (lambda: expert_blocks(4, None, last=0), "last must be"), (lambda: expert_blocks(4.5, None), "depth must be a whole number"),
                                           (lambda: VMoERouter(4, 4, 5), "top_k must be"), (lambda: VMoERouter(4, 4, noise_std=-1.), "noise_std must be positive"), (lambda: VMoERouter(4, 4, noise_std=math.nan), "noise_std must be"),
                                           (lambda: VMoERouter(4, 4, load_coef=math.nan), "load_coef must be"), (lambda: VMoERouter(4, 4)(torch.full((3, 4), math.nan)), "logits must not hold NaN"), (lambda: VMoERouter(4, 4)(torch.zeros(3, 5)), "x must have shape"),
                                           (lambda: prob_above_kth(torch.zeros(3, 4), torch.zeros(3, 5), 1., 1), "clean and noisy"), (lambda: prob_above_kth(torch.zeros(3, 4), torch.zeros(3, 4), -1., 1), "std must be"), (lambda: prob_above_kth(torch.zeros(3, 4), torch.zeros(3, 4), 1., 0), "k must be")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    def layer(D): return MoE(VMoERouter(D, 4), SwiGLUExperts(D, 8, 4), capacity_factor=1.05, eval_capacity_factor=1.05, priority="choice")
    return TinyViT((1, 8, 8), patch=2, dim=16, depth=4, heads=2, pool="mean", feed_forward=expert_blocks(4, layer, dense=lambda D: FeedForward(D, 16))).eval()


def test_knob(vit):
    x = torch.randn(12, 1, 8, 8)
    layers = [m for m in vit.modules() if isinstance(m, MoE)]
    with torch.no_grad():
        before, loads = vit(x), {}
        for c in (None, .25, .5, 1.):
            with at_capacity(vit, c, batch_priority) as same:
                assert same is vit and all(m.eval_capacity_factor == c for m in layers)
                vit(x)
                loads[c] = [int(m.routing.stats["load"].max()) for m in layers]
        for c in (.25, .5, 1.): assert max(loads[c]) <= math.ceil(c * 2 * 12 * 16 / 4)
        with at_capacity(vit, None): assert torch.allclose(torch.cat([vit(x[i:i + 1]) for i in range(12)]), vit(x), atol=1e-5)        # no limit: no mates
        with at_capacity(vit, .5, batch_priority):
            some = vit(x)[:4]
            assert not torch.allclose(some, vit(x[:4]), atol=1e-4)                                                                 # with one: mates
            new = torch.tensor([3, 1, 11, 0, 2, 4, 10, 5, 6, 7, 9, 8])
            assert torch.allclose(vit(x[new]), vit(x)[new], atol=1e-5)                                                              # but their order means nothing
        assert torch.equal(vit(x), before) and {(m.eval_capacity_factor, m.priority) for m in layers} == {(1.05, "choice")}
        with at_capacity(vit, .5, batch_priority):
            with at_capacity(vit, .25, "weight"): assert layers[0].priority == "weight"
            assert (layers[0].eval_capacity_factor, layers[0].priority) == (.5, batch_priority)


@pytest.mark.parametrize("args, message", [((0.,), "capacity_factor must be positive"), ((-1.,), "capacity_factor must be"), ((math.nan,), "capacity_factor must be"), ((.5, "best"), "priority must be one of token, choice, weight or a function"), ((.5, None), "priority must be")])
def test_knob_refuses(vit, args, message):
    with pytest.raises(ValueError, match=message), at_capacity(vit, *args): pass
    assert all(m.eval_capacity_factor == 1.05 for m in vit.modules() if isinstance(m, MoE))


def test_knob_needs_layers_and_evaluation(vit):
    with pytest.raises(ValueError, match="model must have MoE layers"), at_capacity(nn.Linear(2, 2), .5): pass
    with pytest.raises(ValueError, match="evaluation mode"), at_capacity(copy.deepcopy(vit).train(), .5): pass


def test_training_reaches_every_parameter(vit):
    model = copy.deepcopy(vit).train()
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    (F.cross_entropy(model(x), torch.arange(16) % 10) + aux_loss(model)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(m.router.weight.grad.abs().sum() > 0 for m in model.modules() if isinstance(m, MoE))


def test_cards():
    "No limit, no dependence; the order of tokens keeps the future out; both of V-MoE's orders look ahead and around."
    x = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    router = VMoERouter(8, 4).eval()
    free, token, vanilla, bpr = (property_card(router, x, **queue) for queue in ({}, dict(eval_capacity_factor=.5), dict(eval_capacity_factor=.5, priority="choice"), dict(eval_capacity_factor=.5, priority=batch_priority)))
    assert (free["leak"], free["mates"], free["dropped"]) == (0, 0, 0) and token["leak"] == 0 < token["mates"]
    assert min(vanilla["leak"], bpr["leak"], vanilla["mates"], bpr["mates"]) > .02 and bpr["dropped"] == vanilla["dropped"] == token["dropped"] >= .5 and bpr["deterministic"]
