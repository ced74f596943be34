"""Signatures: rules against algebra, every conversion and detour, random trees against all their plans, plans executed and counted, groups, and what is refused."""
import itertools
import random
import sys
from functools import cache

import pytest
import torch
import torch.distributed as dist

from deepclustering.core.distributed import RankError, count_bytes, run
from deepclustering.parallelism.signatures import Step, all_signatures, box, boxing_bytes, cheapest_signatures, execute_plan, find_rules, parts_of, whole_of

ranks = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")


# ---- parts and rules


@pytest.mark.parametrize("shape", [(), (6,), (6, 12), (6, 6, 6)])
@pytest.mark.parametrize("world", (1, 2, 3))
def test_parts_make_the_whole(shape, world):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for signature in all_signatures(len(shape)):
        parts = parts_of(x, signature, world, 4)
        assert len(parts) == world and all(p.dtype == x.dtype for p in parts)
        torch.testing.assert_close(whole_of(parts, signature), x, rtol=1e-12, atol=1e-12)
        if signature in ("P", "Pmax") and world > 1: assert not torch.equal(parts[0], x) or not shape


LINEAR = [torch.neg, lambda x: 3 * x, lambda x: x.cumsum(0), lambda x: x.mean(0), lambda x: x.flip(1), lambda x: x - x.mean(1, keepdim=True)]
RISING = [torch.exp, torch.tanh, torch.relu, lambda x: x + 1, lambda x: 3 * x, lambda x: x.amax(0)]


@pytest.mark.parametrize("world", (2, 3))
def test_parts_of_a_sum_pass_what_is_linear_and_of_a_maximum_what_rises(world):
    shape = (6, 12)
    for op in LINEAR: assert find_rules(op, shape, world=world)["P",] == "P"
    for op in (torch.exp, torch.relu, torch.square, lambda x: x + 1, lambda x: x.amax(0)): assert ("P",) not in find_rules(op, shape, world=world)
    for op in RISING: assert find_rules(op, shape, world=world)["Pmax",] == "Pmax"
    for op in (torch.neg, torch.square, lambda x: x.sum(0)): assert ("Pmax",) not in find_rules(op, shape, world=world)


def test_rules_of_other_operators():
    batched = find_rules(torch.matmul, (6, 4, 2), (6, 2, 8))
    assert batched["S0", "S0"] == "S0" and batched["S1", "B"] == "S1" and batched["B", "S2"] == "S2" and batched["S2", "S1"] == "P" and ("P", "P") not in batched
    assert find_rules(lambda x: x.cumsum(0), (6, 4)) == {("B",): "B", ("S1",): "S1", ("P",): "P"}
    assert find_rules(lambda x: torch.nn.functional.layer_norm(x, (4,)), (6, 4)) == {("B",): "B", ("S0",): "S0"}
    assert find_rules(lambda x: x.sum(), (4, 6)) == {("B",): "B", ("S0",): "P", ("S1",): "P", ("P",): "P"}
    assert find_rules(torch.add, (4, 6), (4, 6))["P", "P"] == "P" and ("P", "B") not in find_rules(torch.add, (4, 6), (4, 6))


# ---- conversions


@ranks
@pytest.mark.parametrize("shape, world", [((6, 6, 12), 3), ((4,), 2), ((4, 4), 4)])
def test_conversions_in_a_row(shape, world):
    "A random walk over signatures, on a tensor that is not contiguous: bytes and numbers of each step."
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).movedim(0, -1)
    walk = random.Random(1).choices(all_signatures(x.dim()), k=16)
    def work(rank, world):
        own, found = parts_of(x, walk[0], world, 2)[rank], []
        for a, b in zip(walk, walk[1:]):
            before = own.clone()
            with count_bytes() as traffic: new = box(own, a, b)
            assert torch.equal(own, before), "the input was changed"
            assert traffic.ring(world) == pytest.approx(boxing_bytes(a, b, x.nbytes, world)), (a, b)
            own = new
            found.append(own)
        return found
    results = run(work, world)
    for i, signature in enumerate(walk[1:]): torch.testing.assert_close(whole_of([r[i] for r in results], signature), x, rtol=1e-5, atol=1e-5)


def test_no_detour_is_cheaper_and_groups_cost_as_the_source_counts():
    names = all_signatures(2)
    for a, b, c in itertools.product(names, repeat=3): assert boxing_bytes(a, c, 1., 4) <= boxing_bytes(a, b, 1., 4) + boxing_bytes(b, c, 1., 4)
    for p in (2, 3, 8):  # all devices together, in tensors: OneFlow's source
        for (a, b), total in {("S0", "S1"): (p - 1) / p, ("S0", "B"): p - 1, ("P", "S0"): p - 1, ("P", "B"): 2 * (p - 1), ("B", "S0"): 0, ("B", "P"): 0}.items():
            assert p * boxing_bytes(a, b, 1., p) == pytest.approx(total)


@ranks
def test_a_group_is_one_axis():
    def work(rank, world):
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        return box(torch.tensor([1. + rank, 10.]), "P", "B", groups[rank % 2])
    assert [r.tolist() for r in run(work, 4)] == [[4, 20], [6, 20], [4, 20], [6, 20]]


# ---- plans


MATMUL = {k: v for k, v in find_rules(torch.matmul, (4, 6), (6, 8)).items() if set(k) != {"B"}}
ADD, RELU = find_rules(torch.add, (4, 6), (4, 6)), find_rules(torch.relu, (4, 6))


def tree(seed):
    "A random tree: ((x A) + (u C)) B with a relu somewhere, random sizes and starting signatures."
    r = random.Random(seed)
    n, d, e, h, k = (12 * r.choice((1, 2, 4, 8)) for _ in range(5))
    def start(*s): return [*r.sample(s, r.randint(1, len(s)))]
    leaves = {"x": ((n, d), start("S0", "S1", "P")), "A": ((d, h), start("S0", "S1")), "u": ((n, e), start("S0", "B")), "C": ((e, h), start("S0", "S1", "B")), "B": ((h, k), start("S0", "S1"))}
    steps = [Step("xA", torch.matmul, ("x", "A"), MATMUL), Step("uC", torch.matmul, ("u", "C"), MATMUL), Step("sum", torch.add, ("xA", "uC"), ADD), Step("relu", torch.relu, ("sum",), RELU),
             Step("y", torch.matmul, ("relu", "B"), MATMUL)]
    return leaves, steps, r.choice(("S0", "S1", "B", "P")), {"n": n, "d": d, "e": e, "h": h, "k": k}


@pytest.mark.parametrize("seed", range(3))
def test_cheapest_of_all_plans(seed):
    "Against every combination of starting signatures and rules, with the cheapest beginnings folded in nowhere."
    leaves, steps, target, s = tree(seed)
    size = {"x": s["n"] * s["d"], "A": s["d"] * s["h"], "u": s["n"] * s["e"], "C": s["e"] * s["h"], "B": s["h"] * s["k"], "xA": s["n"] * s["h"], "uC": s["n"] * s["h"], "sum": s["n"] * s["h"], "relu": s["n"] * s["h"], "y": s["n"] * s["k"]}
    @cache
    def pay(name, a, b): return boxing_bytes(a, b, 8 * size[name], 4)
    costs = []
    for sx, sa, su, sc, sb in itertools.product(*(leaves[k][1] for k in "xAuCB")):
        for (i1, o1), (i2, o2) in itertools.product(MATMUL.items(), repeat=2):
            first = pay("x", sx, i1[0]) + pay("A", sa, i1[1]) + pay("u", su, i2[0]) + pay("C", sc, i2[1])
            for (i3, o3), (i4, o4), (i5, o5) in itertools.product(ADD.items(), RELU.items(), MATMUL.items()):
                costs.append(first + pay("xA", o1, i3[0]) + pay("uC", o2, i3[1]) + pay("sum", o3, i4[0]) + pay("relu", o4, i5[0]) + pay("B", sb, i5[1]) + pay("y", o5, target))
            if len(costs) > 400_000: costs = [min(costs)]
    assert cheapest_signatures(leaves, steps, target, 4)[0] == pytest.approx(min(costs))


@ranks
@pytest.mark.parametrize("world", (2, 3, 4))
def test_plans_executed(world):
    "Numbers of one process, and exactly the bytes that were promised."
    seeds = range(6)
    def work(rank, world):
        found = []
        for seed in seeds:
            leaves, steps, target, _ = tree(seed)
            generator = torch.Generator().manual_seed(seed)
            whole = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, (shape, _) in leaves.items()}
            cost, plan = cheapest_signatures(leaves, steps, target, world)
            own = {name: parts_of(x, plan[name], world, 9)[rank] for name, x in whole.items()}
            with count_bytes() as traffic: y = execute_plan(own, steps, plan)
            found.append((y, traffic.ring(world) - cost))
        return found
    results = run(work, world)
    for i, seed in enumerate(seeds):
        leaves, _, target, _ = tree(seed)
        generator = torch.Generator().manual_seed(seed)
        x, A, u, C, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in leaves.values())
        wanted = (x @ A + u @ C).relu() @ B
        torch.testing.assert_close(whole_of([r[i][0] for r in results], target), wanted, rtol=1e-10, atol=1e-8)
        assert all(abs(r[i][1]) < 1e-6 for r in results)


def test_one_rank_sends_nothing():
    for seed in range(4):
        leaves, steps, target, _ = tree(seed)
        assert cheapest_signatures(leaves, steps, target, 1)[0] == 0


# ---- what is refused


@pytest.mark.parametrize("call, message", [
    (lambda: parts_of(torch.ones(3), "S0", 2), "x must have a dimension 0 that 2 ranks divide, got shape \\(3,\\)"), (lambda: parts_of(torch.ones(3), "b", 2), "signature must be one of B, S0, P, Pmax, got 'b'"),
    (lambda: parts_of(torch.ones(3), "B", 0), "world must be at least 1"), (lambda: whole_of([torch.ones(1), torch.zeros(1)], "B"), "parts must be equal for B"), (lambda: boxing_bytes("", "B", 1, 2), "source must be B, P, Pmax or S"),
    (lambda: boxing_bytes("B", "Smax", 1, 2), "target must be B, P, Pmax or S"), (lambda: boxing_bytes("B", "B", 1, True), "world must be a whole number"),
    (lambda: cheapest_signatures({"x": ((2, 2), ["B"]), "z": ((2, 2), ["B"])}, [Step("y", torch.relu, ("x",), RELU)], "B", 2), "steps must use each tensor once"),
    (lambda: cheapest_signatures({"x": ((2, 2), ["B"])}, [Step("y", torch.relu, ("w",), RELU)], "B", 2), "steps must use each tensor once"),
    (lambda: cheapest_signatures({"x": ((2, 2), ["X"])}, [Step("y", torch.relu, ("x",), RELU)], "B", 2), "source must be B, P, Pmax or S and a dimension, got 'X'")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


@ranks
@pytest.mark.parametrize("message, work", [("x must have a dimension 1 that 2 ranks divide, got shape (2, 3)", lambda r, w: box(torch.ones(2, 3), "B", "S1")), ("signature must be one of B, S0, P, Pmax, got 'S1'", lambda r, w: box(torch.ones(2), "S1", "B")),
                                           ("x must have a dimension 0 that 2 ranks divide, got shape (1, 4)", lambda r, w: box(torch.ones(1, 4), "S1", "S0"))])
def test_bad_input_on_ranks(message, work):
    with pytest.raises(RankError, match="of 2: ValueError: ") as error: run(work, 2)
    assert message in str(error.value)
