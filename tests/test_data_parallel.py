"""Data parallel: sums and counts against loops over items, buckets against DistributedDataParallel, groups, odd sizes, and ranks that fail."""
import itertools
import random
import sys

import pytest
import torch
import torch._dynamo  # noqa: F401  here once, or in every rank for seconds: optimisers and DistributedDataParallel ask for it
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from deepclustering.core.distributed import RankError, check_parity, count_bytes, ring_bytes, run
from deepclustering.core.tinylm import TinyLM
from deepclustering.parallelism.data import (GradientBuckets, average_gradients, broadcast_state, check_same_layout, overlap_timeline, plan_buckets, ring_all_gather,
                                             ring_reduce_scatter, ring_seconds, total_items)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False), nn.Linear(3, 2)).to(dtype)


def loss(model, x): return model(x).square().sum()


# ---- the mean over items


def test_mean_over_items_in_any_split():
    "Against one gradient for each item, added up in a loop; some ranks may be empty."
    seeds = range(3)
    def items(seed): return torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    def cuts(seed): return sorted(random.Random(seed).choices(range(10), k=3))  # four parts
    def by_loop(x):
        wanted = [torch.zeros_like(p) for p in net().parameters()]
        for item in x:
            model = net()
            loss(model, item[None]).backward()
            for w, p in zip(wanted, model.parameters()): w += p.grad / len(x)
        return wanted

    def work(rank, seed):
        model, mine = net(), items(seed).tensor_split(cuts(seed))[rank]
        loss(model, mine).backward()
        average_gradients(model.parameters(), len(mine))
        bucketed = net()
        buckets = GradientBuckets(bucketed.parameters(), 200)
        with buckets.averaging(len(mine)): loss(bucketed, mine).backward()
        return [p.grad for p in model.parameters()], [p.grad for p in bucketed.parameters()]
    found = run(lambda rank, world: [work(rank, seed) for seed in seeds], 4)
    for seed in seeds:
        wanted = by_loop(items(seed))
        for rank in found:
            for grads in rank[seed]:
                for g, w in zip(grads, wanted, strict=True): torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_a_rank_that_computed_nothing():
    def work(rank, world):
        model = net()
        if rank == 0: loss(model, torch.ones(4, 5).double()).backward()
        average_gradients(model.parameters(), 4 * (rank == 0))
        return [p.grad for p in model.parameters()]
    alone = net()
    loss(alone, torch.ones(4, 5).double()).backward()
    for grads in run(work, 3):
        for g, p in zip(grads, alone.parameters()): torch.testing.assert_close(g, p.grad / 4, rtol=1e-12, atol=0)


def test_groups_average_among_themselves():
    def work(rank, world):
        halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        group, model = halves[rank % 2], nn.Linear(1, 1, bias=False)
        buckets = GradientBuckets(model.parameters(), group=group)
        with buckets.averaging(1): (model.weight * rank).sum().backward()
        bare = nn.Parameter(torch.ones(1))
        (bare * rank).sum().backward()
        average_gradients([bare], 1, group)
        x = torch.arange(3.) + 10 * rank
        ring = ring_all_gather(x, group) if ring_reduce_scatter(x, group) is not None else None
        nn.init.constant_(model.weight, rank)
        broadcast_state(model, source=1, group=group)  # the second of the group
        return model.weight.grad.item(), bare.grad.item(), ring.tolist(), model.weight.item(), total_items(rank, "cpu", group).item()
    even, odd = (1., 1., [20., 22., 24.], 2., 2.), (2., 2., [40., 42., 44.], 3., 4.)
    assert run(work, 4) == [even, odd, even, odd]


# ---- the ring


@pytest.mark.parametrize("world, sizes", [(1, (0,)), (2, (0,)), (3, (1, 10)), (4, (3,))])
def test_ring_halves(world, sizes):
    cases = [(n, dtype) for n in sizes for dtype in (torch.int64, torch.float32, torch.float64)]
    inputs = [[torch.randint(50, (n,), generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world)] for n, dtype in cases]
    def halves(x):
        with count_bytes() as traffic: mine = ring_reduce_scatter(x).clone()
        return mine, ring_all_gather(x), traffic.sent("send"), traffic.received("recv")
    ranks = run(lambda rank, world: [halves(x[rank].clone()) for x in inputs], world)  # all cases in one set of ranks
    for (n, dtype), x, found in zip(cases, inputs, zip(*ranks), strict=True):
        total = sum(x)
        for rank, (mine, all_, _, _) in enumerate(found):
            assert mine.dtype == dtype and mine.tolist() == total.tensor_split(world)[rank].tolist() and all_.tolist() == total.tolist()
        assert sum(f[2] for f in found) == sum(f[3] for f in found) == world * ring_bytes("reduce_scatter", n * total.element_size(), world)


@pytest.mark.parametrize("x", [torch.ones(2, 3), torch.ones(()), torch.ones(6)[::2]], ids=["matrix", "scalar", "strided"])
def test_ring_wants_a_vector(x):
    for f in (ring_reduce_scatter, ring_all_gather):
        with pytest.raises(RankError, match=r"^rank . of .: ValueError: x must be a contiguous vector"): run(lambda r, w: f(x), 1)


# ---- buckets


@pytest.mark.parametrize("seed", range(20))
def test_plan_properties(seed):
    draw = random.Random(seed)
    parameters = [torch.empty(draw.randint(1, 9), dtype=draw.choice([torch.float32, torch.float64])) for _ in range(draw.randint(1, 12))]
    limit = draw.randint(1, 120)
    plan = plan_buckets(parameters, limit)
    flat = [p for bucket in plan for p in bucket]
    assert [id(p) for p in flat] == [id(p) for p in reversed(parameters)]
    for bucket in plan: assert len({p.dtype for p in bucket}) == 1 and (sum(p.nbytes for p in bucket) <= limit or len(bucket) == 1)
    for a, b in itertools.pairwise(plan): assert b[0].dtype != a[0].dtype or sum(p.nbytes for p in a) + b[0].nbytes > limit  # no bucket could have taken more


def test_extreme_limits_and_torch():
    "As many buckets as parameters, or one; the same gradients as DistributedDataParallel, which averages over ranks."
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    def work(limit, rank, world):
        ours, theirs = net(), nn.parallel.DistributedDataParallel(net())
        buckets = GradientBuckets(ours.parameters(), limit)
        with count_bytes() as traffic, buckets.averaging(3): loss(ours, x.tensor_split(world)[rank]).backward()
        (loss(theirs, x.tensor_split(world)[rank]) / 3).backward()
        return len(buckets.buckets), traffic.calls(), max((a.grad - b.grad).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters()))
    for found in run(lambda rank, world: [work(limit, rank, world) for limit in (1, 10**6)], 2):
        for many, (buckets, calls, error) in zip((5, 1), found, strict=True): assert buckets == many and calls == many + 1 and error < 1e-14


def test_language_model_with_frozen_part_and_mixed_types():
    "A transformer whose embedding is frozen, and two layers of two types."
    ids = torch.randint(11, (5, 9), generator=torch.Generator().manual_seed(0))
    def model():
        torch.manual_seed(1)
        lm = TinyLM(11, dim=16, depth=1, heads=2, kv_heads=1).double()
        next(lm.parameters()).requires_grad_(False)
        return lm
    def nll(lm, rows): return F.cross_entropy(lm(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    def whole():
        lm = model()
        (nll(lm, ids) / ids[:, 1:].numel()).backward()
        return {n: p.grad for n, p in lm.named_parameters() if p.requires_grad}
    def work(rank, world):
        lm, rows = model(), ids.tensor_split(world)[rank]
        buckets = GradientBuckets(lm.parameters(), 3000)
        with buckets.averaging(rows[:, 1:].numel()): nll(lm, rows).backward()
        assert next(lm.parameters()).grad is None
        return {n: p.grad for n, p in lm.named_parameters() if p.requires_grad}
    check_parity(work, whole, (1, 3), 1e-12)

    def two_types(rank, world):
        pair = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()])
        buckets = GradientBuckets(pair.parameters())
        with buckets.averaging(1): (pair[0](torch.ones(1, 2)).sum() + pair[1](torch.ones(1, 2).bfloat16()).sum() * rank).backward()
        return [p.grad.dtype for p in pair.parameters()], [p.grad.float().mean().item() for p in pair.parameters()]
    assert run(two_types, 2) == [([torch.float32] * 2 + [torch.bfloat16] * 2, [1, 1, .5, .5])] * 2


def test_steps_do_not_leak_into_each_other():
    "Zeroed to None or in place, then again; micro-batches outside send nothing; a body that raised leaves the object usable."
    def work(rank, world):
        w = nn.Parameter(torch.ones(2))
        buckets, seen = GradientBuckets([w]), []
        for to_none in (True, False):
            with count_bytes() as quiet: (w.sum() * rank).backward()
            with buckets.averaging(2): (w.sum() * rank).backward()
            seen += [quiet.calls(), w.grad.tolist()]
            torch.optim.SGD([w], 0.1).zero_grad(set_to_none=to_none)
        try:
            with buckets.averaging(1): raise ArithmeticError
        except ArithmeticError: pass
        with buckets.averaging(1): w.sum().backward()
        return seen, w.grad.tolist()
    assert run(work, 2) == [([0, [.5, .5]] * 2, [1, 1])] * 2


def test_retained_graph_and_a_parameter_used_twice():
    def work(rank, world):
        w = nn.Parameter(torch.full((1,), 3.))
        buckets = GradientBuckets([w])
        with buckets.averaging(1): (w * w * (rank + 1)).sum().backward()
        return w.grad.item()
    assert run(work, 2) == [9, 9]  # 2 w (1 + 2) / 2


# ---- the model of time


@pytest.mark.parametrize("seed", range(10))
def test_overlap_against_a_clock(seed):
    "Tick by tick, in whole units of time."
    draw = random.Random(seed)
    c, t = [draw.randint(0, 4) for _ in range(5)], [draw.randint(0, 4) for _ in range(5)]
    passes, messages = overlap_timeline(c, t)
    queue, made, sent, left, now, ends = [], 0, 0, 0, 0, {}
    done = list(itertools.accumulate(c))
    while sent < 5:
        while made < 5 and done[made] <= now: queue.append(made); made += 1
        while sent < 5 and sent in queue and left == 0:
            left = t[sent]
            if left == 0: ends[sent] = now; sent += 1
            else: break
        if sent < 5 and left:
            left -= 1
            if left == 0: ends[sent] = now + 1; sent += 1
        now += 1
    assert [s + n for s, n, _ in messages] == [ends[b] for b in range(5)]
    assert [s + n for s, n, _ in passes] == done


def test_ring_seconds_limits():
    assert ring_seconds(1e9, 1, 1, 1) == 0 and ring_seconds(0, 5, 0.5, 1) == 4
    for latency, bandwidth in ((-1, 1), (0, 0), (0, -1), (float("nan"), 1), (0, float("nan"))):
        with pytest.raises(ValueError, match="latency must be at least 0 and bandwidth positive"): ring_seconds(1, 2, latency, bandwidth)


# ---- what is refused


@pytest.mark.parametrize("items", [-1, 1.5, True, None])
def test_items_refused(items):
    with pytest.raises(RankError, match=r"^rank . of .: ValueError: items must be"): run(lambda r, w: total_items(items, "cpu"), 1)


@pytest.mark.parametrize("limit", [0, -5, 2.5])
def test_limit_refused(limit):
    with pytest.raises(ValueError, match="limit must be"): plan_buckets([torch.ones(1)], limit)


DIFFERENT = {"shape": lambda r: [torch.ones(2 + r, requires_grad=True)], "number": lambda r: [torch.ones(2, requires_grad=True)] * (1 + r), "type": lambda r: [torch.ones(2, dtype=(torch.float32, torch.float64)[r], requires_grad=True)],
             "order": lambda r: [torch.ones(2 + (r + i) % 2, requires_grad=True) for i in range(2)], "what learns": lambda r: [torch.ones(2, requires_grad=bool(r))], "nothing on one": lambda r: [torch.ones(2, requires_grad=True)] * r}


def test_layouts_that_differ():
    "Every rank hears of it, so that none is left waiting."
    def said(parameters):
        try: check_same_layout(parameters)
        except ValueError as e: return str(e)
    for found in run(lambda rank, world: {what: said(make(rank)) for what, make in DIFFERENT.items()}, 2):
        assert len(found) == 6
        for what, text in found.items(): assert "parameters must be the same in number, shape, type and order on every rank" in text, what


def test_a_rank_that_dies_in_backward():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): raise ZeroDivisionError("in backward")
    def work(rank, world):
        model = net()
        buckets = GradientBuckets(model.parameters(), 1)
        with buckets.averaging(1):
            hidden = model[:2](torch.ones(1, 5).double())
            model[2:](Fails.apply(hidden) if rank == 1 else hidden).sum().backward()
    with pytest.raises(RankError, match="^rank 1 of 3: ZeroDivisionError: in backward"): run(work, 3, timeout=30)
