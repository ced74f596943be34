"""Balance losses of six libraries against their formulas as dumb loops and against transformers itself; loads under checkpointing, ranks and accumulation."""
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepclustering.core.distributed import run
from deepclustering.core.tinylm import TinyLM
from deepclustering.moe.balance import CONVENTIONS, AttachedMoE, GlobalBalanceRouter, attach_loss, balance_as, ideal, update_bias
from deepclustering.moe.layer import MoE, SwiGLUExperts, aux_loss
from deepclustering.moe.routers import GShardRouter, NoisyTopKRouter, Router, balance_loss, wanted_load
from deepclustering.moe.routing import sigmoid_topk, softmax_topk


def some_logits(L, B, T, E, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(L, B, T, E, generator=g, dtype=torch.float64) + torch.randn(L, 1, 1, E, generator=g, dtype=torch.float64)


# --- the libraries' formulas, written as loops from their sources -------------------------------------------------------------

def probabilities(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def chosen(row, k): return sorted(range(len(row)), key=lambda e: -row[e])[:k]


def megatron(logits, K, mask=None):
    "aux = sum(sum of probs * tokens per expert) * E / (K n n), each layer for itself; padding leaves probabilities, counts and n."
    total = 0.
    for layer in logits.tolist():
        rows = [r for b, s in enumerate(layer) for t, r in enumerate(s) if mask is None or mask[b][t]]
        E, n = len(rows[0]), len(rows)
        p, c = [0.] * E, [0] * E
        for r in rows:
            for e, v in enumerate(probabilities(r)): p[e] += v
            for e in chosen(r, K): c[e] += 1
        total += sum(x * y for x, y in zip(p, c)) * E / (K * n * n)
    return total


def deepspeed(logits, K, used=None, topk=False):
    "mean(me * ce) E E, ce of the first choice in top1gating and top2gating, of all over k in topkgating; used_token touches the mask alone."
    total = 0.
    for layer in logits.tolist():
        rows = [(r, used is None or used[b][t]) for b, s in enumerate(layer) for t, r in enumerate(s)]
        E, n = len(rows[0][0]), len(rows)
        me, ce = [0.] * E, [0.] * E
        for r, u in rows:
            for e, v in enumerate(probabilities(r)): me[e] += v / n
            for e in chosen(r, K if topk else 1): ce[e] += int(u) / n
        total += sum(x * y for x, y in zip(me, ce)) / E * E * E / (K if topk else 1)
    return total


def mesh(logits, K):
    "density_1 and its proxy: means over each group of tokens; mean of their product over groups and experts, times E squared."
    total = 0.
    for layer in logits.tolist():
        products = []
        for s in layer:
            E = len(s[0])
            density, proxy = [0.] * E, [0.] * E
            for r in s:
                density[chosen(r, 1)[0]] += 1 / len(s)
                for e, v in enumerate(probabilities(r)): proxy[e] += v / len(s)
            products += [x * y for x, y in zip(density, proxy)]
        total += sum(products) / len(products) * len(layer[0][0])**2
    return total


@pytest.mark.parametrize("L, B, T, E, K", [(1, 1, 1, 2, 1), (1, 2, 5, 4, 2), (3, 2, 7, 5, 3), (2, 4, 6, 3, 3)])
def test_the_formulas_as_loops(L, B, T, E, K):
    logits = some_logits(L, B, T, E, seed=T)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < .7
    mask[:, 0] = True
    for name, want in (("megatron", megatron(logits, K)), ("deepspeed top-1, top-2", deepspeed(logits, K)), ("deepspeed top-k", deepspeed(logits, K, topk=True)), ("mesh, st-moe", mesh(logits, K))):
        assert balance_as(name, logits, K).item() == pytest.approx(want, abs=1e-12), name
    assert balance_as("megatron", logits, K, mask).item() == pytest.approx(megatron(logits, K, mask), abs=1e-12)
    assert balance_as("deepspeed top-1, top-2", logits, K, mask).item() == pytest.approx(float(deepspeed(logits, K, mask)), abs=1e-12)


@pytest.mark.parametrize("L, B, T, E, K", [(1, 1, 9, 4, 1), (2, 3, 8, 6, 2), (3, 2, 5, 5, 4)])
def test_transformers_itself(L, B, T, E, K):
    mixtral, nllb, switch = (pytest.importorskip(f"transformers.models.{m}.modeling_{m}") for m in ("mixtral", "nllb_moe", "switch_transformers"))
    logits = some_logits(L, B, T, E, seed=E).float()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < .6
    mask[0, 0] = True
    flat = tuple(layer.flatten(0, 1) for layer in logits)
    assert balance_as("hf mixtral", logits, K).item() == pytest.approx(float(mixtral.load_balancing_loss_func(flat, E, K)), abs=1e-5)
    for f in (mixtral, nllb): assert balance_as("hf mixtral", logits, K, mask).item() == pytest.approx(float(f.load_balancing_loss_func(flat, E, K, mask.long())), abs=1e-5)
    rows = torch.cat(tuple(logits), 1)                                                   # as _unpack_router_logits: layers behind one another in a sequence
    assert balance_as("hf switch", logits, K).item() == pytest.approx(float(switch.load_balancing_loss_func(rows.softmax(-1), rows.topk(K, -1).indices)), abs=1e-5)


def test_gradients_agree_with_transformers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = some_logits(2, 2, 6, 5).float().requires_grad_()
    ours = torch.autograd.grad(balance_as("hf mixtral", logits, 2), logits)[0]
    theirs = torch.autograd.grad(mixtral.load_balancing_loss_func(tuple(layer.flatten(0, 1) for layer in logits), 5, 2), logits)[0]
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("K, L", [(1, 1), (2, 3), (4, 2)])
def test_ideal(name, K, L):
    "A wheel of choices with equal probabilities; and no routing of equal probabilities can be below it."
    wheel = (torch.arange(8)[:, None] + torch.arange(K)) % 8
    level = torch.zeros(L, 2, 8, 8, dtype=torch.float64)
    assert balance_as(name, level, K, first=wheel.expand(L, 2, 8, K)).item() == pytest.approx(ideal(name, K, L), abs=1e-12)
    crowded = level.clone()
    crowded[..., 0] = 4
    assert balance_as(name, crowded, K).item() > 1.05 * ideal(name, K, L)


def test_pooled_layers_hide_a_collapse():
    logits = torch.full((3, 1, 6, 3), -30.)
    for layer in range(3): logits[layer, ..., layer] = 30.
    for name, how in CONVENTIONS.items():
        assert balance_as(name, logits, 1).item() == pytest.approx(1 if how[3] == "pooled" else 9, abs=1e-5)


# --- hung on the output ------------------------------------------------------------------------------------------------------------

def model_of(kind, router):
    torch.manual_seed(0)
    return TinyLM(11, dim=8, depth=2, heads=2, kv_heads=1, feed_forward=lambda D: kind(router(D), SwiGLUExperts(D, 8, 4)))


@pytest.mark.parametrize("router", [lambda D: Router(D, 4, 2, router_aux_loss_coef=.5, router_z_loss_coef=.1), lambda D: NoisyTopKRouter(D, 4, 2), lambda D: GShardRouter(D, 4)])
def test_attached_is_collected(router):
    tokens, slopes = torch.randint(11, (3, 7)), []
    for kind in (MoE, AttachedMoE):
        model = model_of(kind, router)
        torch.manual_seed(1)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        (loss + aux_loss(model)).backward()
        slopes.append([p.grad for p in model.parameters()])
        assert (kind is MoE) == (aux_loss(model) != 0)
    for a, b in zip(*slopes): assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_neither_loses_nor_doubles(reentrant):
    torch.manual_seed(0)
    moe, x = AttachedMoE(NoisyTopKRouter(8, 4, 2), SwiGLUExperts(8, 4, 4)), torch.randn(16, 8)
    def slopes(call):
        moe.zero_grad()
        torch.manual_seed(3)
        call(x.clone().requires_grad_()).square().sum().backward()
        return [p.grad.clone() for p in moe.parameters()], moe.routing.stats["load"]
    (plain, load), (again, load_) = slopes(moe), slopes(lambda t: checkpoint(moe, t, use_reentrant=reentrant))
    for a, b in zip(plain, again): assert torch.allclose(a, b, atol=1e-6)
    assert torch.equal(load, load_) and load.sum() == 32


def test_attach_loss_keeps_the_value_and_adds_one():
    y, w = torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)
    out = attach_loss(y, w.pow(3).sum())
    assert torch.equal(out, y)
    (out * 5).sum().backward()
    assert torch.allclose(w.grad, 3 * w.detach()**2) and torch.equal(y.grad, torch.full((3, 2), 5.))
    moe = AttachedMoE(Router(8, 4, 2), SwiGLUExperts(8, 4, 4)).bfloat16()
    assert moe(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16 and moe(torch.randn(0, 8, dtype=torch.bfloat16)).shape == (0, 8)


# --- the whole batch ----------------------------------------------------------------------------------------------------------------

def a_router(kind=GlobalBalanceRouter, **options):
    torch.manual_seed(0)
    return kind(6, 5, 2, router_aux_loss_coef=1., **options).double()


DATA = torch.randn(24, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def test_ranks_and_micro_batches_against_one_process():
    "Two ranks with two micro-batches each: the last micro-batch sees all counts; the shares are those of the whole batch."
    def steps(rank, world):
        router, out = a_router(), []
        for micro in DATA.view(2, 2, 6, 6)[:, rank]:                                       # micro-batch i of this rank
            r = router(micro)
            p = r.logits.softmax(1).mean(0)
            out.append((r.aux.item(), p.detach(), wanted_load(r)))
            router.next_micro_batch()
        return out, router.seen
    (a, seen_a), (b, seen_b) = run(steps, 2)
    whole = wanted_load(softmax_topk(DATA @ a_router().weight.T, 2))
    assert torch.equal(seen_a, whole) and torch.equal(seen_b, whole)
    early = a[0][2] + b[0][2]
    for rank in (a, b):
        for (value, p, _), counts in zip(rank, (early, whole)):
            assert value == pytest.approx(5 * float((counts.double() / counts.sum() * p).sum()), abs=1e-12)


def test_alone_it_is_the_plain_loss():
    plain, router = a_router(Router), a_router()
    assert router(DATA).aux.item() == plain(DATA).aux.item()
    assert list(router.state_dict()) == ["weight"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_counts_once_on_ranks(reentrant):
    def step(rank, world):
        torch.manual_seed(rank)
        moe = AttachedMoE(a_router(), SwiGLUExperts(6, 4, 5).double())
        checkpoint(moe, DATA[rank::2].clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
        moe.router.next_micro_batch()
        return moe.router.seen, moe.router.weight.grad
    (seen, slope), (seen_, slope_) = run(step, 2)
    assert seen.sum() == 48 and torch.equal(seen, seen_) and slope.abs().sum() > 0 and not torch.equal(slope, slope_)


def test_groups_of_ranks():
    def step(rank, world):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        router = a_router(group=groups[rank // 2])
        router(DATA[rank * 6:rank * 6 + 6])
        return router.last
    loads = run(step, 4)
    plain = a_router(Router)
    for pair in (0, 1):
        want = wanted_load(plain(DATA[pair * 12:pair * 12 + 12]))
        assert torch.equal(loads[2 * pair], want) and torch.equal(loads[2 * pair + 1], want)


# --- the bias ----------------------------------------------------------------------------------------------------------------------

def test_bias_by_hand():
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        router, load, before = Router(4, 6, 2, sigmoid_topk, correction_bias=True), torch.randint(5, (6,), generator=g), torch.randn(6, generator=g)
        router.e_score_correction_bias.copy_(before)
        update_bias(router, load, .25)
        mean = sum(load.tolist()) / 6
        want = [b + (.25 if c < mean else -.25 if c > mean else 0.) for b, c in zip(before.tolist(), load.tolist())]
        assert np.allclose(router.e_score_correction_bias.tolist(), want, atol=1e-6)


def test_bias_balances_without_touching_weights():
    torch.manual_seed(0)
    router, x = Router(8, 6, 2, sigmoid_topk, correction_bias=True), torch.randn(300, 8) + 1
    weight, logits = router.weight.clone(), router(x).logits
    before = wanted_load(router(x)).double()
    for _ in range(300): update_bias(router, wanted_load(router(x)), .01)
    r = router(x)
    after = wanted_load(r).double()
    assert after.std() < .2 * before.std() and torch.equal(router.weight, weight) and torch.equal(r.logits, logits)
    scores = r.logits.sigmoid().gather(1, r.experts)
    assert torch.allclose(r.weights, scores / scores.sum(1, keepdim=True))


# --- bad input -------------------------------------------------------------------------------------------------------------------------

Z = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize("call, message", [
    (lambda: balance_as("tutel", Z, 1), "library must be one of"), (lambda: balance_as("megatron", Z[0], 1), "logits must have shape"), (lambda: balance_as("megatron", Z, 5), "top_k must be between 1 and 4"),
    (lambda: balance_as("megatron", Z, 1, torch.ones(2, 3)), "mask must be booleans"), (lambda: balance_as("hf switch", Z, 1, torch.ones(2, 3).bool()), "without padding"), (lambda: balance_as("megatron", Z, 1, torch.zeros(2, 3).bool()), "mask must keep"),
    (lambda: ideal("tutel", 1), "library must be one of"), (lambda: ideal("megatron", 0), "top_k must be at least 1"), (lambda: attach_loss(Z, Z), "loss must be a single number"),
    (lambda: update_bias(Router(8, 4, 2), torch.ones(4)), "router must have an e_score_correction_bias"), (lambda: update_bias(Router(8, 4, 2, sigmoid_topk, correction_bias=True), torch.ones(5)), "load must have shape"),
    (lambda: update_bias(Router(8, 4, 2, sigmoid_topk, correction_bias=True), torch.ones(4), math.nan), "rate must be positive")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()
