"""The MoE layer: routings written in three forms by brute force, experts against one token at a time, blocks against transformers."""
import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepclustering.core.models import FeedForward, TinyViT
from deepclustering.core.tinylm import TinyLM
from deepclustering.moe.layer import EXPERTS, MoE, SwiGLUExperts, TopKRouter, aux_loss, combine, dispatch, grouped_matmul
from deepclustering.moe.routing import PRIORITIES, Routing, map_to_routing, queues, sigmoid_topk, softmax_topk, table_to_routing, topk_softmax
from deepclustering.moe.weights import LAYOUTS, from_layout, moe_from_hf, moe_to_hf, to_layout

SIZES = [(0, 4, 2), (1, 1, 1), (1, 7, 3), (9, 3, 3), (23, 5, 2), (40, 29, 4)]
sizes = pytest.mark.parametrize("T, E, K", SIZES)


def random_routing(T, E, K, seed=0, drop=0.2, dtype=torch.float64, ties=False):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(3, (T, E), generator=g).to(dtype) if ties else torch.rand(T, E, generator=g, dtype=dtype)
    e = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]) if T else torch.zeros(0, K, dtype=torch.int64)
    gone = torch.rand(T, K, generator=g) < drop
    return Routing(e.masked_fill(gone, -1), scores.gather(1, e).masked_fill(gone, 0), num_experts=E)


def queues_by_hand(routing, priority, capacity):
    "Who stands where and who is turned away, pair by pair."
    T, K = routing.experts.shape
    pairs = [(t, j) for t in range(T) for j in range(K)]
    if priority == "choice": pairs.sort(key=lambda p: p[1])
    if priority == "weight": pairs.sort(key=lambda p: -routing.weights[p].item())
    lines, gone = [[] for _ in range(routing.num_experts)], [[] for _ in range(routing.num_experts)]
    for t, j in pairs:
        e = int(routing.experts[t, j])
        if e >= 0: (lines[e] if len(lines[e]) < capacity else gone[e]).append(t * K + j)
    return lines, [p for line in gone for p in line]


# --- the three forms -----------------------------------------------------------------------------------------------------

@sizes
@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("capacity", [1, 3, None])
def test_queues_by_brute_force(T, E, K, priority, capacity):
    for seed in range(3):
        r = random_routing(T, E, K, seed, ties=seed == 2)
        d = r.to_dispatch(capacity, priority)
        lines, gone = queues_by_hand(r, priority, capacity or T * K + 1)
        assert [q.tolist() for q in d.pairs.split(d.counts.tolist())] == lines and d.dropped.tolist() == gone
        place = {p: i for line in lines for i, p in enumerate(line)}
        assert d.places.flatten().tolist() == [place.get(p, -1) for p in range(T * K)]
        lost = torch.tensor([p not in place for p in range(T * K)], dtype=torch.bool).view(T, K)
        assert torch.equal(d.routing.experts, r.experts.masked_fill(lost, -1)) and torch.equal(d.routing.weights, r.weights.masked_fill(lost, 0))
        d.routing.check()
        tokens, w = d.table()
        assert tokens.shape == (E, capacity or max(1, max(map(len, lines))))
        assert [[t for t in row if t >= 0] for row in tokens.tolist()] == [[p // K for p in line] for line in lines]
        assert torch.equal(w[tokens < 0], w.new_zeros(int((tokens < 0).sum())))
        back = table_to_routing(tokens, w, T)
        assert torch.equal(back.to_map(), d.routing.to_map())
        assert [set(row) - {-1} for row in back.experts.tolist()] == [set(row) - {-1} for row in d.routing.experts.tolist()]  # weights of 0 keep their place, too


@sizes
def test_map_and_back(T, E, K):
    for seed, ties in ((0, False), (1, True)):
        r = random_routing(T, E, K, seed, ties=ties)
        dense = r.to_map()
        for t in range(T):
            for e in range(E): assert dense[t, e] == sum(w for i, w in zip(r.experts[t].tolist(), r.weights[t].tolist()) if i == e)
        chosen = torch.zeros(T, E + 1, dtype=torch.bool).scatter(1, r.experts % (E + 1), True)[:, :E]
        back = map_to_routing(dense, chosen).check()
        assert torch.equal(back.to_map(), dense) and [set(x) - {-1} for x in back.experts.tolist()] == [set(x) - {-1} for x in r.experts.tolist()]
        again = map_to_routing(back.to_map(), chosen)
        assert torch.equal(again.experts, back.experts) and torch.equal(again.weights, back.weights)


def test_a_router_s_own_order_survives_the_map():
    torch.manual_seed(0)
    for choose in (softmax_topk, topk_softmax, sigmoid_topk):
        r = choose(torch.randn(50, 9), 4)
        back = map_to_routing(r.to_map(), logits=r.logits)
        assert torch.equal(back.experts, r.experts) and torch.equal(back.weights, r.weights) and back.logits is r.logits


def test_all_forms_carry_gradients():
    r = random_routing(6, 5, 3, drop=.3)
    def forms(w):
        routing = Routing(r.experts, w.masked_fill(r.experts < 0, 0), num_experts=5)
        chosen = torch.zeros(6, 6, dtype=torch.bool).scatter(1, r.experts % 6, True)[:, :5]
        tokens, table = routing.to_dispatch(2).table()
        return routing.to_map(), map_to_routing(routing.to_map(), chosen).weights, table, table_to_routing(tokens, table, 6).to_map()
    assert torch.autograd.gradcheck(forms, r.weights.clone().requires_grad_())


def test_capacity_is_never_exceeded_and_enough_is_dropless():
    for T, E, K in SIZES:
        r = random_routing(T, E, K, drop=0)
        for c in (1, 2, T + 1):
            d = r.to_dispatch(c)
            assert (d.counts <= c).all() and len(d.pairs) + len(d.dropped) == T * K and (c <= T or len(d.dropped) == 0)


def test_in_order_of_tokens_nobody_sees_ahead():
    torch.manual_seed(0)
    for _ in range(20):
        logits, c = torch.randn(30, 6), int(torch.randint(1, 12, ()))
        other = torch.cat([logits[:17], torch.randn(13, 6)])
        a, b = (softmax_topk(l, 2).to_dispatch(c).routing.experts[:17] for l in (logits, other))
        assert torch.equal(a, b)


def test_scores_as_priority():
    r = random_routing(11, 4, 2, drop=0)
    first = torch.arange(22.).view(11, 2)                                              # the last pair first
    lines = [sorted(((r.experts == e).flatten().nonzero().flatten()).tolist(), reverse=True)[:2] for e in range(4)]
    d = r.to_dispatch(2, first)
    assert [q.tolist() for q in d.pairs.split(d.counts.tolist())] == lines


@pytest.mark.parametrize("values, message", [(dict(experts=[[0, 5]]), "experts must be between -1 and 4, got 5"), (dict(experts=[[0, -3]]), "got -3"), (dict(experts=[[2, 2]]), "twice for one token"),
                                             (dict(weights=[[0.5, math.nan]]), "weights must be finite"), (dict(weights=[[math.inf, 1.]]), "weights must be finite"), (dict(experts=[[1, -1]]), "weights must be 0 where experts is -1")])
def test_bad_values(values, message):
    e, w = torch.tensor(values.get("experts", [[0, 1]])), torch.tensor(values.get("weights", [[0.5, 0.5]]))
    r = Routing(e, w, num_experts=5)
    for f in (r.check, r.to_dispatch, lambda: r.to_dispatch(3, "weight")):
        with pytest.raises(ValueError, match=message): f()


def test_a_routing_is_not_changed():
    r = random_routing(20, 4, 2)
    e, w = r.experts.clone(), r.weights.clone()
    for p in PRIORITIES: r.to_dispatch(1, p)
    assert torch.equal(r.experts, e) and torch.equal(r.weights, w)
    with pytest.raises(AttributeError): r.weights = w


# --- there and back, and the experts -------------------------------------------------------------------------------------

def one_at_a_time(x, routing, gate_up, down):
    "A dumb oracle: a token, a choice, its expert written out."
    rows = []
    for t in range(len(x)):
        y = x[t] * 0
        for j in range(routing.experts.shape[1]):
            e = int(routing.experts[t, j])
            if e < 0: continue
            n = gate_up.shape[1] // 2
            gate, up = gate_up[e][:n] @ x[t], gate_up[e][n:] @ x[t]
            y = y + routing.weights[t, j] * (down[e] @ (gate * torch.sigmoid(gate) * up))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", EXPERTS)
@pytest.mark.parametrize("T, D, width, E, K, capacity", [(1, 3, 2, 4, 1, None), (7, 8, 4, 3, 3, None), (37, 5, 7, 31, 2, None), (19, 4, 8, 5, 2, 3), (12, 1, 1, 2, 2, 1)])
def test_experts_and_every_gradient(implementation, T, D, width, E, K, capacity):
    torch.manual_seed(T)
    bank, router = SwiGLUExperts(D, width, E, implementation).double(), TopKRouter(D, E, K).double()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    leaves = [x, router.weight, bank.gate_up_proj, bank.down_proj]
    d = router(x).to_dispatch(capacity, "weight")
    got, want = bank(x, d), one_at_a_time(x, d.routing, bank.gate_up_proj, bank.down_proj)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    direction = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, direction, retain_graph=True), torch.autograd.grad(want, leaves, direction)): torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("implementation", EXPERTS)
def test_gradients_of_gradients(implementation):
    torch.manual_seed(0)
    bank, r = SwiGLUExperts(3, 2, 4, implementation).double(), random_routing(5, 4, 2, drop=.2)
    def f(x, w, up, down):
        d = Routing(r.experts, w.masked_fill(r.experts < 0, 0), num_experts=4).to_dispatch()
        return combine(EXPERTS[implementation](dispatch(x, d), d.counts, up, down), d)
    values = tuple(t.detach().clone().requires_grad_() for t in (torch.randn(5, 3, dtype=torch.float64), r.weights, bank.gate_up_proj, bank.down_proj))
    assert torch.autograd.gradcheck(f, values) and torch.autograd.gradgradcheck(f, values)


@pytest.mark.parametrize("implementation", EXPERTS)
def test_no_rows_at_all(implementation):
    bank = SwiGLUExperts(4, 4, 3, implementation)
    for r in (Routing(torch.full((5, 2), -1), torch.zeros(5, 2), num_experts=3), Routing(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), num_experts=3)):
        x = torch.randn(len(r.experts), 4, requires_grad=True)
        y = bank(x, r.to_dispatch())
        assert y.shape == x.shape and (y == 0).all()
        y.sum().backward()
        assert (x.grad == 0).all() and (bank.gate_up_proj.grad == 0).all()


def test_strides_do_not_matter():
    torch.manual_seed(0)
    d, x = random_routing(9, 3, 2).to_dispatch(), torch.randn(9, 8)
    strided = torch.stack([x, x], -1)[..., 0]
    for name in EXPERTS:
        bank = SwiGLUExperts(8, 4, 3, name)
        torch.testing.assert_close(bank(strided, d), bank(x, d), rtol=0, atol=0)
        turned = nn.Parameter(bank.gate_up_proj.detach().mT.contiguous().mT)
        torch.testing.assert_close(EXPERTS[name](dispatch(x, d), d.counts, turned, bank.down_proj), EXPERTS[name](dispatch(x, d), d.counts, bank.gate_up_proj, bank.down_proj))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)], ids=str)
@pytest.mark.parametrize("implementation", EXPERTS)
def test_narrow_dtypes(dtype, tolerance, implementation):
    torch.manual_seed(0)
    bank, r = SwiGLUExperts(16, 8, 5, implementation), random_routing(33, 5, 2, dtype=torch.float32)
    x, d = torch.randn(33, 16), r.to_dispatch()
    want = one_at_a_time(x.double(), Routing(r.experts, r.weights.double(), num_experts=5), bank.gate_up_proj.double(), bank.down_proj.double())
    got = copy.deepcopy(bank).to(dtype)(x.to(dtype), d)
    assert got.dtype == dtype and float((got.double() - want).detach().abs().max()) < tolerance * float(want.detach().abs().max())


def test_the_sum_is_in_float32():
    "256 equal choices of weight 1/256: bfloat16's own sum would stop growing."
    d = Routing(torch.arange(256)[None], torch.full((1, 256), 1 / 256), num_experts=256).to_dispatch()
    assert float(combine(torch.ones(256, 8, dtype=torch.bfloat16), d)[0, 0]) == 1
    x = torch.ones(1, 8, dtype=torch.bfloat16, requires_grad=True)
    dispatch(x, d).sum().backward()
    assert float(x.grad[0, 0]) == 256


def test_same_bits_twice():
    torch.manual_seed(0)
    moe, x = MoE(TopKRouter(16, 8, 2), SwiGLUExperts(16, 8, 8)), torch.randn(300, 16)
    runs = []
    for _ in range(2):
        moe.zero_grad()
        moe(x).square().sum().backward()
        runs.append([p.grad.clone() for p in moe.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


# --- grouped_mm's traps ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("D, width", [(8, 4), (7, 4), (8, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grouped_matmul_any_size_and_dtype(D, width, dtype):
    torch.manual_seed(0)
    for counts in ([3, 0, 5], [0, 0, 0], [0, 9, 0], [1, 1, 1]):
        rows, weight = torch.randn(sum(counts), D).to(dtype).requires_grad_(), torch.randn(3, width, D).to(dtype).requires_grad_()
        y = grouped_matmul(rows, weight, torch.tensor(counts))
        want = torch.cat([p.double() @ w.double().T for p, w in zip(rows.split(counts), weight)])
        direction = torch.randn(len(rows), width + 1).to(dtype)[:, :width]                 # odd strides
        eps = max(torch.finfo(dtype).eps, 1e-15) * 20
        for a, b in zip((y, *torch.autograd.grad(y, (rows, weight), direction)), (want, *torch.autograd.grad(want, (rows, weight), direction.double()))):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b.double(), rtol=eps, atol=eps * 4)


def test_grouped_matmul_from_a_file_s_memory():
    "Numbers that begin at an odd address, as a memory-mapped file's may."
    memory = np.zeros(4 * (5 * 8 + 2 * 4 * 8) + 4, dtype=np.uint8)[4:]
    rows, weight = torch.from_numpy(memory[:160].view(np.float32)).view(5, 8), torch.from_numpy(memory[160:].view(np.float32)).view(2, 4, 8)
    torch.manual_seed(0)
    rows.normal_(); weight.normal_()
    torch.testing.assert_close(grouped_matmul(rows, weight, torch.tensor([2, 3])), torch.cat([rows[:2] @ weight[0].T, rows[2:] @ weight[1].T]))


def test_grouped_matmul_without_torch_s(monkeypatch):
    torch.manual_seed(0)
    rows, weight, counts = torch.randn(6, 8), torch.randn(3, 4, 8), torch.tensor([1, 0, 5])
    there = grouped_matmul(rows, weight, counts)
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    torch.testing.assert_close(grouped_matmul(rows, weight, counts), there)


@pytest.mark.parametrize("rows, weight, counts, message", [((6, 8), (3, 4, 8), [1, 0, 4], "add up to the 6 rows"), ((6, 8), (3, 4, 8), [7, -1, 0], "at least 0"), ((6, 8), (3, 4, 8), [9, 0, 0], "add up"), ((6, 8), (3, 4, 7), [1, 0, 5], "must fit"),
                                                           ((6, 8), (3, 4, 8), [6], "must fit"), ((6,), (3, 4, 8), [6, 0, 0], "must fit")])
def test_grouped_matmul_refuses(rows, weight, counts, message):
    with pytest.raises(ValueError, match=message): grouped_matmul(torch.zeros(rows), torch.zeros(weight), torch.tensor(counts))


def test_autocast_reaches_all_experts():
    torch.manual_seed(0)
    x, r = torch.randn(9, 8), random_routing(9, 3, 2, dtype=torch.float32)
    for name in EXPERTS:
        bank = SwiGLUExperts(8, 8, 3, name)
        want = bank(x, r.to_dispatch())
        with torch.autocast("cpu", dtype=torch.bfloat16): got = bank(x, r.to_dispatch())
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=.1, atol=.05)
        got.float().sum().backward()
        assert bank.gate_up_proj.grad.dtype == torch.float32


# --- rules ---------------------------------------------------------------------------------------------------------------

def test_rules_by_hand():
    torch.manual_seed(0)
    for _ in range(10):
        h = torch.randn(8, 6, dtype=torch.float64)
        for t, row in enumerate(h.tolist()):
            order = sorted(range(6), key=lambda e: -row[e])[:3]
            p = [math.exp(v) for v in row]
            for rule, w in ((softmax_topk(h, 3), [p[e] / sum(p) for e in order]), (softmax_topk(h, 3, True), [p[e] / sum(p[i] for i in order) for e in order]), (topk_softmax(h, 3), [p[e] / sum(p[i] for i in order) for e in order])):
                assert rule.experts[t].tolist() == order
                torch.testing.assert_close(rule.weights[t], torch.tensor(w, dtype=torch.float64), rtol=1e-12, atol=0)


def test_groups_by_hand():
    torch.manual_seed(1)
    for n_group, topk_group, K in ((1, 1, 3), (2, 1, 2), (4, 2, 4), (8, 3, 3)):
        h, b = torch.randn(12, 8), torch.randn(8)
        r = sigmoid_topk(h, K, b, n_group, topk_group, norm_topk_prob=True, routed_scaling_factor=1.7)
        for t in range(12):
            s = h[t].sigmoid()
            wish, size = (s + b).tolist(), 8 // n_group
            groups = sorted(range(n_group), key=lambda i: -sum(sorted(wish[i * size:(i + 1) * size])[-2:]))[:topk_group]
            order = sorted((e for i in groups for e in range(i * size, (i + 1) * size)), key=lambda e: -wish[e])[:K]
            assert r.experts[t].tolist() == order
            torch.testing.assert_close(r.weights[t], 1.7 * s[order] / s[order].sum())


def test_the_bias_gets_no_gradient_and_the_logits_do():
    h, b = torch.randn(5, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    r = sigmoid_topk(h, 2, b)
    (r.weights * torch.tensor([1., 2.])).sum().backward()
    assert b.grad is None and h.grad.abs().sum() > 0


def test_renormalised_top_1_warns():
    for options in (dict(choose=topk_softmax), dict(norm_topk_prob=True), dict(choose=sigmoid_topk)):
        with pytest.warns(UserWarning, match="no gradient"): TopKRouter(4, 3, 1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopKRouter(4, 3, 1)


def test_rules_under_extreme_logits():
    for rule in (softmax_topk, topk_softmax, sigmoid_topk):
        r = rule(torch.tensor([[1e30, -1e30, 0.], [1e4, 1e4, -1e4]]), 2).check()
        assert r.experts.tolist() == [[0, 2], [0, 1]]


# --- the layer -----------------------------------------------------------------------------------------------------------

def test_in_the_place_of_a_feed_forward_layer():
    torch.manual_seed(0)
    def layer(dim): return MoE(TopKRouter(dim, 4, 2), SwiGLUExperts(dim, 8, 4))
    lm, vit = TinyLM(11, dim=8, heads=2, kv_heads=1, feed_forward=layer), TinyViT((1, 8, 8), dim=8, depth=2, heads=2, feed_forward=layer)
    lm(torch.randint(11, (3, 6))).square().sum().backward()
    vit(torch.randn(3, 1, 8, 8)).square().sum().backward()
    for model in (lm, vit):
        assert not [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert len([m for m in model.modules() if isinstance(m, MoE) and m.routing is not None]) == 2 and aux_loss(model) == 0


def test_a_dropless_language_model_is_causal_and_one_in_order_of_tokens_too():
    torch.manual_seed(0)
    tokens = torch.randint(11, (1, 12))
    other = torch.cat([tokens[:, :7], torch.randint(11, (1, 5))], 1)
    for options in ({}, dict(capacity_factor=.5)):
        lm = TinyLM(11, dim=8, heads=2, kv_heads=1, feed_forward=lambda dim: MoE(TopKRouter(dim, 4, 2), SwiGLUExperts(dim, 8, 4), **options))
        torch.testing.assert_close(lm(tokens)[:, :7], lm(other)[:, :7], rtol=0, atol=1e-6)


def test_copies_and_pickles_leave_the_graph_behind():
    torch.manual_seed(0)
    moe, x = MoE(TopKRouter(4, 3, 2), SwiGLUExperts(4, 3, 3)), torch.randn(5, 4)
    y = moe(x)
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))): assert twin.routing is None and torch.equal(twin(x), y)


def test_capacity_in_training_and_in_evaluation():
    torch.manual_seed(0)
    moe, x = MoE(TopKRouter(4, 8, 2), SwiGLUExperts(4, 3, 8), capacity_factor=.5, eval_capacity_factor=1.), torch.randn(2, 20, 4)
    for mode, places in ((True, 5), (False, 10)):
        moe.train(mode)(x)
        load, dropped = moe.routing.stats["load"], moe.routing.stats["dropped"]
        assert int(load.max()) == places and int(load.sum()) + dropped == 80


def test_empty_batches_and_bad_input():
    moe = MoE(TopKRouter(4, 3, 2), SwiGLUExperts(4, 3, 3))
    assert moe(torch.zeros(0, 4)).shape == (0, 4) and moe(torch.zeros(2, 0, 4)).shape == (2, 0, 4)
    for x, message in ((torch.full((2, 4), math.nan), "logits must not hold NaN"), (torch.zeros(2, 5), "x must have shape")):
        with pytest.raises(ValueError, match=message): moe(x)
    with pytest.raises(ValueError, match="top_k must be between 1 and 3"): TopKRouter(4, 3, 4)
    with pytest.raises(ValueError, match="capacity must be at least 1"): softmax_topk(torch.zeros(2, 3), 1).to_dispatch(0)
    with pytest.raises(ValueError, match="capacity_factor"): MoE(moe.router, moe.experts, capacity_factor=0)


def test_other_routers_need_no_logits():
    class Hashed(nn.Module):
        def forward(self, x): return Routing((torch.arange(len(x)) % 3)[:, None], torch.ones(len(x), 1), num_experts=3, aux=x.sum() * 0 + 2)
    moe = MoE(Hashed(), SwiGLUExperts(4, 3, 3))
    x = torch.randn(7, 4)
    torch.testing.assert_close(moe(x), torch.cat([moe.experts.expert(t % 3, x[t:t + 1]) for t in range(7)]))
    assert float(aux_loss(nn.ModuleList([moe, moe.experts]))) == 2


def test_queues_on_their_own():
    pairs, counts, places = queues(torch.tensor([[1, -1], [1, 0]]), 3)
    assert (pairs.tolist(), counts.tolist(), places.tolist()) == ([3, 0, 2, 1], [1, 2, 0], [[0, -1], [1, 0]])


# --- weights from elsewhere ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_keep_every_bit(layout, dtype):
    bank = SwiGLUExperts(5, 3, 7).to(dtype)
    back = from_layout(to_layout(bank.gate_up_proj, bank.down_proj, layout), layout)
    assert all(torch.equal(a, b) and a.dtype == dtype and a.is_contiguous() for a, b in zip(back, (bank.gate_up_proj, bank.down_proj)))


def test_layouts_as_their_owners_multiply():
    "One expert, written as each library's own code multiplies: which half is the gate, and what stands transposed."
    torch.manual_seed(0)
    bank, x = SwiGLUExperts(5, 3, 2).double(), torch.randn(4, 5, dtype=torch.float64)
    want = bank.expert(1, x)
    s = {name: {k: v[1] for k, v in to_layout(bank.gate_up_proj, bank.down_proj, name).items()} for name in ("gpt-oss", "torchtitan", "scattermoe", "sonicmoe")}
    h = x @ s["gpt-oss"]["gate_up_proj"]
    torch.testing.assert_close(F.silu(h[..., ::2]) * h[..., 1::2] @ s["gpt-oss"]["down_proj"], want)
    t = s["torchtitan"]
    torch.testing.assert_close(F.silu(x @ t["w1_EFD"].T) * (x @ t["w3_EFD"].T) @ t["w2_EDF"].T, want)
    h, gates = (x @ s["scattermoe"]["experts.weight"].T).chunk(2, -1)
    torch.testing.assert_close(F.silu(gates) * h @ s["scattermoe"]["output_experts.weight"].T, want)
    h = x @ s["sonicmoe"]["c_fc.weight"].T
    torch.testing.assert_close(h[..., 1::2] * F.silu(h[..., ::2]) @ s["sonicmoe"]["c_proj.weight"].T, want)


BLOCKS = {"mixtral": ("MixtralSparseMoeBlock", dict(num_local_experts=5, num_experts_per_tok=2, intermediate_size=6)),
          "olmoe": ("OlmoeSparseMoeBlock", dict(num_experts=6, num_experts_per_tok=3, intermediate_size=4, norm_topk_prob=False)),
          "qwen3_moe": ("Qwen3MoeSparseMoeBlock", dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=4, norm_topk_prob=True)),
          "deepseek_v3": ("DeepseekV3MoE", dict(n_routed_experts=8, num_local_experts=8, num_experts_per_tok=3, moe_intermediate_size=4, n_shared_experts=2, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5))}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_hugging_face_s(kind, seed):
    pytest.importorskip("transformers")
    from importlib import import_module
    name, options = BLOCKS[kind]
    module, prefix = import_module(f"transformers.models.{kind}.modeling_{kind}"), name.removesuffix("SparseMoeBlock").removesuffix("V3MoE") + "V3" * (kind == "deepseek_v3")
    config = getattr(import_module(f"transformers.models.{kind}.configuration_{kind}"), f"{prefix}Config")(hidden_size=8, **options)
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    theirs = getattr(module, name)(config)
    for p in theirs.parameters(): nn.init.normal_(p, std=.4)
    if kind == "deepseek_v3": theirs.gate.e_score_correction_bias.normal_()
    ours = moe_from_hf({f"mlp.{k}": v for k, v in theirs.state_dict().items()}, config, "mlp.")
    state, back = theirs.state_dict(), moe_to_hf(ours)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    theirs.load_state_dict(back)
    layout = "mixtral files" if kind == "mixtral" else "huggingface files"
    again = moe_to_hf(moe_from_hf(moe_to_hf(ours, layout), config))
    assert all(torch.equal(again[k], state[k]) for k in state)
    x = torch.randn(2, 9, 8)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for ours.experts.implementation in EXPERTS:
        ours.zero_grad(); theirs.zero_grad(); a.grad = b.grad = None
        y, z = ours(a), theirs(b)
        torch.testing.assert_close(y, z, rtol=1e-6, atol=1e-6)
        direction = torch.randn_like(y)
        y.backward(direction); z.backward(direction)
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=3e-5)
        grads = {k: p.grad for k, p in theirs.named_parameters()}
        mine = {"gate.weight": ours.router.weight, "experts.gate_up_proj": ours.experts.gate_up_proj, "experts.down_proj": ours.experts.down_proj} | \
               ({} if ours.shared is None else {f"shared_experts.{k}": p for k, p in ours.shared.named_parameters()})
        assert grads.keys() == mine.keys()
        for k in grads: torch.testing.assert_close(mine[k].grad, grads[k], rtol=0, atol=3e-5)


def test_what_does_not_fit_is_refused():
    moe = MoE(TopKRouter(4, 3, 2), SwiGLUExperts(4, 5, 3), FeedForward(4, 6, gated=True, bias=False))
    state, config = moe_to_hf(moe), {"model_type": "qwen3_moe", "num_experts_per_tok": 2, "norm_topk_prob": True}
    assert moe_from_hf(state, config)(torch.zeros(2, 4)).shape == (2, 4)
    for s, c, message in ((state, config | {"model_type": "gpt_oss"}, "model_type must be one of"), (state, {k: config[k] for k in ("model_type", "num_experts_per_tok")}, "config must have norm_topk_prob"), (state, config | {"hidden_act": "gelu"}, "hidden_act"),
                          (state, config | {"num_experts_per_tok": 9}, "top_k must be between 1 and 3"), ({k: v for k, v in state.items() if k != "gate.weight"}, config, "gate.weight"), (state | {"norm.weight": torch.zeros(1)}, config, "got norm.weight"),
                          ({k: v for k, v in state.items() if "down" not in k}, config, "down_proj"), (state | {"experts.down_proj": torch.zeros(3, 4, 6)}, config, "gate and up"), (state | {"gate.weight": torch.zeros(9, 4)}, config, r"gate.weight of shape \(3, 4\)"),
                          (state | {"shared_experts.up_proj.weight": torch.zeros(7, 4)}, config, "does not fit a block of qwen3_moe"), (state | {"gate.bias": torch.zeros(3)}, config, "does not fit")):
        with pytest.raises(ValueError, match=message): moe_from_hf(s, c)
