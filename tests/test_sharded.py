"""ZeRO: against one process and torch's own sharding, on models, groups and passes that the notebook does not try; padding, precision, memory, and what is refused."""
import sys

import pytest
import torch
import torch._dynamo  # noqa: F401  here once, or in every rank for seconds
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepclustering.core.distributed import DeadlockError, RankError, check_parity, count_bytes, run
from deepclustering.core.tinylm import TinyLM
from deepclustering.parallelism.sharded import ZeRO, zero_memory, zero_traffic

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")
STAGES = (1, 2, 3)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)).double()


def adam(p): return torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)


def weights(engine, model):
    with engine.gathered(): return {n: p.detach().clone() for n, p in model.named_parameters()}


X = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


# ---- the same as one process


def stages(of): return {stage: of(stage) for stage in STAGES}  # in one set of ranks: a fork costs more than these steps


def test_uneven_micro_batches_and_empty_ranks():
    "Two steps of three micro-batches; on four ranks one has nothing at all."
    cuts = {1: [], 2: [3], 3: [0, 7], 4: [4, 4, 9]}
    def whole():
        model = net()
        step = adam(model.parameters())
        for k in (1, 2):
            step.zero_grad()
            (k * model(X).square().sum() / len(X)).backward()
            step.step()
        return dict(model.named_parameters())
    def work(stage, rank, world):
        model, mine = net(), X.tensor_split(cuts[world])[rank]
        engine = ZeRO(model, adam, stage)
        for k in (1, 2):
            for part in mine.tensor_split((1, 3)): (k * model(part).square().sum()).backward()
            engine.step(len(mine))
        return weights(engine, model)
    check_parity(lambda rank, world: stages(lambda s: work(s, rank, world)), lambda: dict.fromkeys(STAGES, whole()), tolerance=1e-11)


class Tied(nn.Module):
    "One matrix used twice, a norm whose weight is saved as itself, several outputs, an unused one, a keyword."
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.w, self.norm = nn.Parameter(torch.randn(3, 3)), nn.LayerNorm(3)
    def forward(self, x, *, scale): return {"y": self.norm(x @ self.w) @ self.w.T * scale, "aside": self.w.sum()}


def test_a_unit_with_ties_and_several_outputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tied, self.last = Tied(), nn.Linear(3, 1)
        def forward(self, x): return self.last(self.tied(self.tied(x, scale=2.)["y"], scale=.5)["y"])  # called twice
    def make(): torch.manual_seed(4); return Model().double()
    def whole():
        model = make()
        step = adam(model.parameters())
        for _ in range(2):
            step.zero_grad(); (model(X).square().sum() / 10).backward(); step.step()
        return dict(model.named_parameters())
    def work(stage, rank, world):
        model = make()
        engine, mine = ZeRO(model, adam, stage), X.tensor_split(world)[rank]
        for _ in range(2): model(mine).square().sum().backward(); engine.step(len(mine))
        return weights(engine, model)
    check_parity(lambda rank, world: stages(lambda s: work(s, rank, world)), lambda: dict.fromkeys(STAGES, whole()), (1, 3), 1e-11)


def test_checkpointed_units():
    "A unit that is recomputed during backward must stay until its gradients are there."
    def whole():
        model = net()
        (model(X).square().sum() / 10).backward()
        adam(model.parameters()).step()
        return dict(model.named_parameters())
    def work(stage, rank, world):
        model, mine = net(), X.tensor_split(world)[rank]
        engine = ZeRO(model, adam, stage)
        hidden = checkpoint(model[0], mine, use_reentrant=False)
        checkpoint(model[2], model[1](hidden), use_reentrant=False).square().sum().backward()
        engine.step(len(mine))
        return weights(engine, model)
    check_parity(lambda rank, world: stages(lambda s: work(s, rank, world)), lambda: dict.fromkeys(STAGES, whole()), (2,), 1e-12)


def test_a_micro_batch_that_uses_a_part_of_a_unit():
    "First both parameters, then one of them: what the second pass leaves unfinished is sent in the step."
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.q = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
        def forward(self, x, both): return (self.p * x + (self.q * x if both else 0)).sum()
    def work(stage, rank):
        model = nn.Sequential(Two())
        engine = ZeRO(model, lambda p: torch.optim.SGD(p, 1.), stage)
        for both in (True, False): model[0](rank + 1., both).backward()
        engine.step(2)
        return {n: p.tolist() for n, p in weights(engine, model).items()}
    assert run(lambda rank, world: stages(lambda s: work(s, rank)), 2) == [dict.fromkeys(STAGES, {"0.p": [1 - 6 / 4] * 3, "0.q": [1 - 3 / 4] * 3})] * 2


def test_language_model_as_one_unit():
    ids = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
    def make(): torch.manual_seed(1); return TinyLM(11, dim=16, depth=1, heads=2, kv_heads=1).double()
    def nll(lm, rows): return F.cross_entropy(lm(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    def whole():
        lm = make()
        (nll(lm, ids) / 32).backward()
        torch.optim.SGD(lm.parameters(), 0.1).step()
        return {n: p for n, p in lm.named_parameters()}
    def work(stage, rank, world):
        lm, rows = make(), ids.tensor_split(world)[rank]
        engine = ZeRO(lm, lambda p: torch.optim.SGD(p, 0.1), stage, [lm])
        nll(lm, rows).backward()
        engine.step(rows[:, 1:].numel())
        return weights(engine, lm)
    check_parity(lambda rank, world: stages(lambda s: work(s, rank, world)), lambda: dict.fromkeys(STAGES, whole()), (3,), 1e-12)


def test_stage_one_against_torchs_redundancy_optimizer():
    def work(rank, world):
        ours, theirs, mine = net(), net(), X.tensor_split(world)[rank]
        engine, ddp = ZeRO(ours, adam, 1), nn.parallel.DistributedDataParallel(theirs)
        zero = ZeroRedundancyOptimizer(theirs.parameters(), torch.optim.AdamW, lr=0.05, weight_decay=0.1)
        for _ in range(3):
            ours(mine).square().sum().backward(); engine.step(len(mine))
            zero.zero_grad(); (ddp(mine).square().sum() / len(mine)).backward(); zero.step()
        return max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters()))
    assert max(run(work, 2)) < 1e-12


def test_clipping_is_by_the_norm_of_the_whole():
    def alone(limit):
        model = net()
        (model(X).square().sum() / 10).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        torch.optim.SGD(model.parameters(), 1.).step()
        return {"norm": norm, **dict(model.named_parameters())}
    def work(stage, limit, rank, world):
        model, mine = net(), X.tensor_split(world)[rank]
        engine = ZeRO(model, lambda p: torch.optim.SGD(p, 1.), stage)
        model(mine).square().sum().backward()
        return {"norm": engine.step(len(mine), limit), **weights(engine, model)}
    def each(of): return {f"limit {limit:g}": stages(lambda s: of(s, limit)) for limit in (1e-3, 1e6)}
    check_parity(lambda rank, world: each(lambda s, limit: work(s, limit, rank, world)), lambda: each(lambda s, limit: alone(limit)), (3,), 1e-12)


# ---- groups, beginnings, evaluation


def test_two_groups_train_apart_and_begin_as_their_first():
    def work(rank, world):
        group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
        model = net(seed=rank)
        engine = ZeRO(model, adam, 3, group=group)
        begun = weights(engine, model)
        model(X[rank::2]).square().sum().backward()
        engine.step(1)
        return begun, weights(engine, model)
    found = run(work, 4)
    for rank, first in ((0, 0), (1, 0), (2, 2), (3, 2)):
        for name, p in net(seed=first).named_parameters(): assert torch.equal(found[rank][0][name], p)
        for name in found[rank][1]: assert torch.equal(found[rank][1][name], found[first][1][name])
    assert not torch.equal(found[0][1]["0.weight"], found[2][1]["0.weight"])


def test_evaluation_and_saving_in_stage_three():
    def work(rank, world):
        model = net()
        engine = ZeRO(model, adam, 3)
        with torch.no_grad(): out = model(X)
        freed = all(p.isnan().all() for p in model.parameters()) and engine.memory()["parameters"] < sum(p.nbytes for p in model.parameters())
        with engine.gathered(): saved = {k: v.clone() for k, v in model.state_dict().items()}
        return out, freed, saved, [tuple(p.shape) for p in model.parameters()]
    for out, freed, saved, shapes in run(work, 2):
        torch.testing.assert_close(out, net()(X).detach(), rtol=0, atol=1e-14)
        assert freed and all(torch.equal(saved[k], v) for k, v in net().state_dict().items()) and shapes == [tuple(p.shape) for p in net().parameters()]


# ---- padding, precision, memory, bytes


@pytest.mark.parametrize("world", [2, 4])
def test_padding_stays_zero_and_memory_is_its_closed_form(world):
    "A unit of one parameter, one of seven: padded, with weight decay."
    def work(stage):
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 7, bias=False)).bfloat16()
        engine = ZeRO(model, adam, stage)
        for _ in range(2):
            model(torch.ones(1, 1).bfloat16()).float().sum().backward()
            held = engine.memory()
            engine.step(1)
        with engine.gathered(): pads = [float(u.flat[sum(u.sizes):].abs().sum()) for u in engine.units]
        return held, [m.dtype for m in engine.masters], pads, sum(u.flat.numel() for u in engine.units)
    for found in run(lambda rank, world: stages(work), world):
        for stage, (held, types, pads, padded) in found.items():
            assert padded == {2: 2 + 8, 4: 4 + 8}[world] and types == [torch.float32] * 2 and pads == [0, 0]
            # what autograd makes is not padded, chunks and vectors are
            gradient = 2 * 8 if stage == 1 else 2 * padded / world
            assert held == {**zero_memory(padded, world, stage), "gradients": gradient}


def test_masters_keep_small_steps():
    "A hundred steps of a thousandth of a bfloat16 weight, which alone would not move it."
    def work(rank, world):
        engines = {}
        for name, master in (("float32", None), ("bfloat16", torch.bfloat16)):
            copy = nn.Sequential(nn.Linear(1, 1, bias=False)).bfloat16()
            nn.init.ones_(copy[0].weight)
            engine = ZeRO(copy, lambda p: torch.optim.SGD(p, lr=1e-3), 2, master=master)
            for _ in range(100): copy(torch.ones(1, 1).bfloat16()).sum().backward(); engine.step(1)
            engines[name] = copy[0].weight.item()
        return engines
    assert run(work, 2) == [{"float32": 0.8984375, "bfloat16": 1.0}] * 2  # 0.9 rounded once, and 1 - 0.001 rounded a hundred times


def test_bytes_with_padding():
    def work(stage, micro, world):
        model = net()
        engine = ZeRO(model, adam, stage)
        with count_bytes() as traffic:
            for _ in range(micro): model(X).square().sum().backward()
            engine.step(micro)
        return traffic.ring(world, without=("all_reduce",)), sum(u.flat.nbytes for u in engine.units), traffic.sent("all_reduce")
    cases = [(stage, micro) for stage in STAGES for micro in (1, 4)]
    for found in run(lambda rank, world: [work(*case, world) for case in cases], 3):
        for (stage, micro), (sent, n, rest) in zip(cases, found, strict=True):
            assert sent == pytest.approx(zero_traffic(n, 3, stage, micro), abs=1e-9) and n == 8 * (21 + 12) and rest == 16


def test_closed_forms_against_loops():
    for world in (1, 3, 16):
        for stage in range(4):
            owners = {"parameters": stage >= 3, "gradients": stage >= 2, "optimizer": stage >= 1}
            sizes = {"parameters": 4, "gradients": 3, "optimizer": 5}
            assert zero_memory(48, world, stage, 4, 3, 5) == {k: sum(sizes[k] for i in range(48) if not owners[k] or i % world == 0) for k in owners}
    assert sum(zero_memory(1, 1, 3).values()) == 16 and zero_traffic(10, 2, 0, 9) == 10


# ---- what is refused, and what fails


def part(m): return [m[0]]
BAD = {"stage must be between 1 and 3": lambda: ZeRO(net(), adam, 4), "stage must be a whole number": lambda: ZeRO(net(), adam, 2.), "without 2.weight, 2.bias": lambda: ZeRO(m := net(), adam, 3, part(m)),
       "got 4 of 4, without": lambda: ZeRO(m := net(), adam, 3, [m[0], m[0]]), "got 8 of 4": lambda: ZeRO(m := net(), adam, 1, [m, m]), "got 6 of 4": lambda: ZeRO(m := net(), adam, 1, [m, m[0]]),
       "got 6 of 4 ": lambda: ZeRO(m := net(), adam, 1, [m[0], m[2], nn.Linear(1, 1)])}


def test_refused():
    def said(call):
        try: call()
        except ValueError as e: return str(e)
    for message, got in run(lambda rank, world: {message: said(call) for message, call in BAD.items()}, 1)[0].items(): assert message.strip() in got


@pytest.mark.parametrize("limit", [0., -1., float("nan")])
def test_clip_norm_refused(limit):
    with pytest.raises(RankError, match=r"^rank . of .: ValueError: clip_norm must be positive or None"): run(lambda r, w: ZeRO(net(), adam, 1).step(1, limit), 1)


def test_no_items_anywhere():
    with pytest.raises(RankError, match=r"^rank . of .: ValueError: items must be at least 1 on one rank"): run(lambda r, w: ZeRO(net(), adam, 1).step(0), 2)


def test_models_of_different_shape():
    with pytest.raises(RankError, match=r"^rank . of .: ValueError: parameters must be the same in number, shape"): run(lambda r, w: ZeRO(nn.Sequential(nn.Linear(2, 2 + r)), adam, 2), 2)


@pytest.mark.parametrize("what, error, message", [("another", RankError, "^rank . of 2: "), ("nothing", DeadlockError, "rank 0 waits .* in all_gather")])
def test_ranks_that_do_not_run_the_same_units(what, error, message):
    "Two gathers of different sizes meet, or nobody comes: either is named. Equal sizes would not be noticed, as the docstring warns."
    def work(rank, world):
        model = net()
        ZeRO(model, adam, 3)
        if rank == 0: model(X)
        elif what == "another": model[2](torch.ones(1, 5).double())
    with pytest.raises(error, match=message): run(work, 2, patience=0.5)
