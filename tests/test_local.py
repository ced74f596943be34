"""Local steps: the outer step against torch's and against numbers by hand, real ranks against ranks that were played, bytes, state, and faults that every rank must name."""
import copy
import io
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from deepclustering.core.distributed import RankError, check_parity, count_bytes, ring_bytes, run
from deepclustering.parallelism.local import LocalSGD, Outer, round_timeline

ranks = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")
DATA = torch.randn(24, 4, 6, generator=torch.Generator().manual_seed(0)).double()          # steps, items, features


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def flat(module): return torch.cat([p.detach().flatten() for p in module.parameters()])


def learn(module, optimiser, t, rank):
    "One step on two items that depend on the rank."
    optimiser.zero_grad()
    x = DATA[t, [rank % 4, (rank + 1) % 4]]
    (module(x) - x.sum(1, keepdim=True)).square().mean().backward()
    optimiser.step()


# ---- the outer step alone


@pytest.mark.parametrize("rate, momentum, nesterov", [(1.0, 0.0, False), (0.5, 0.9, False), (0.7, 0.9, True)])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 4)])
def test_without_penalty_and_clip_it_is_torchs_sgd(rate, momentum, nesterov, shape):
    x, outer, w = torch.ones(shape), Outer(rate, momentum, nesterov), nn.Parameter(torch.ones(shape))
    theirs = torch.optim.SGD([w], lr=rate, momentum=momentum, nesterov=nesterov)
    for t in range(6):
        w.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
        outer.step(x, w.grad.clone(), late=t % 2 == 1)
        theirs.step()
        assert torch.allclose(x, w.detach(), atol=1e-6)


def test_three_late_steps_by_hand():
    "Rate 0.5, momentum 0.5, gap, clip 2, in numbers: changes of length 5, 5 and 10."
    x, outer = torch.zeros(2, dtype=torch.float64), Outer(0.5, 0.5, penalty="gap", clip=2.0)
    outer.step(x, torch.tensor([3.0, 4.0]).double(), late=True)           # nothing has moved: Λ = 1, m = (2, 2) of (3, 4), x = -(1, 1)
    assert outer.m.tolist() == [2, 2] and x.tolist() == [-1, -1]
    outer.step(x, torch.tensor([0.0, -5.0]).double(), late=True)          # moved √2: Λ = 1 + √2 / 5
    lam = 1 + 2 ** 0.5 / 5
    m = np.array([1.0, 1 - 5 / lam]).clip(-2, 2)
    assert np.allclose(outer.m.numpy(), m) and np.allclose(x.numpy(), -1 - m / 2)
    before = x.numpy().copy()
    outer.step(x, torch.tensor([6.0, 8.0]).double(), late=False)          # on time: no penalty, whatever has moved
    m = (m / 2 + [6, 8]).clip(-2, 2)
    assert np.allclose(outer.m.numpy(), m) and np.allclose(x.numpy(), before - m / 2)


def test_a_constant_penalty_is_a_smaller_change_and_a_zero_change_is_no_division_by_zero():
    a, b = torch.ones(3), torch.ones(3)
    one, other = Outer(0.3, 0.8, penalty=4), Outer(0.3, 0.8)
    for t in range(3): one.step(a, torch.full((3,), 4.0 * t)); other.step(b, torch.full((3,), float(t)))
    assert torch.allclose(a, b)
    outer, x = Outer(penalty="gap"), torch.ones(3)
    outer.step(x, torch.ones(3), late=True)
    outer.step(x, torch.zeros(3), late=True)
    assert x.tolist() == [0, 0, 0]


def test_rows_are_trainings_of_their_own_and_scale_does_not_matter():
    changes = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    def path(rows, scale=1.0):
        x, outer = torch.zeros(3, 5).double()[rows], Outer(0.9, 0.4, penalty="gap", clip=0.3 * scale)
        for c in changes: outer.step(x, scale * c[rows], late=True)
        return x
    both = path([0, 1, 2])
    assert all(torch.allclose(path([r])[0], both[r]) for r in range(3))
    assert torch.allclose(path([0, 1, 2], 8.0), 8 * both)


@pytest.mark.parametrize("c", (0.2, 0.6, 0.95))
def test_a_late_round_shrinks_by_the_size_of_the_root(c):
    x, queue, path, outer = torch.ones(1).double(), [], [], Outer()
    for _ in range(400):
        queue.append(c * x)
        if len(queue) > 1: outer.step(x, queue.pop(0), late=True)
        path.append(abs(float(x)))
    decay = (max(path[-60:]) / max(path[-260:-200])) ** (1 / 200)
    assert decay == pytest.approx(max(abs(np.roots([1, -1, c]))), abs=5e-3)


# ---- ranks


def train(rank, world, every, delay, steps, settings=None, seed=0):
    module = net(seed)
    optimiser, local = torch.optim.AdamW(module.parameters(), lr=0.05), LocalSGD(module, every, None if settings is None else Outer(**settings), delay)
    for t in range(steps):
        learn(module, optimiser, t, rank)
        local.step()
    local.finish()
    return flat(module)


def played(world, every, delay, steps, rate=1.0, momentum=0.0):
    "The same without an engine: a list of changes, the oldest used first; the last round may be short."
    modules = [net() for _ in range(world)]
    optimisers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in modules]
    x, m, queue = flat(modules[0]), 0, []
    for t in range(steps):
        for r in range(world): learn(modules[r], optimisers[r], t, r)
        if (t + 1) % every == 0 or t == steps - 1:
            queue.append(sum(x - flat(module) for module in modules) / world)
            while len(queue) > (delay if t < steps - 1 else 0):
                m = momentum * m + queue.pop(0)
                x = x - rate * m
            for module in modules: nn.utils.vector_to_parameters(x.clone(), module.parameters())
    return x


@ranks
@pytest.mark.parametrize("every, delay, steps", [(1, 0, 3), (3, 0, 9), (3, 0, 8), (4, 1, 12), (4, 1, 10), (1, 1, 3), (50, 1, 5)])
def test_the_engine_is_the_played_program(every, delay, steps):
    "Adam inside, unfinished last rounds, rounds longer than the training: on two ranks or three, and all models are equal at the end."
    world = 2 + steps % 2
    wanted = played(world, every, delay, steps, 0.8, 0.5)
    for weights in run(train, world, every, delay, steps, dict(rate=0.8, momentum=0.5)): assert torch.allclose(weights, wanted, rtol=0, atol=1e-12)


@ranks
def test_one_rank_alone_walks_as_without_us():
    def alone():
        module = net()
        optimiser = torch.optim.AdamW(module.parameters(), lr=0.05)
        for t in range(7): learn(module, optimiser, t, 0)
        return flat(module)
    check_parity(lambda r, w: train(r, w, 3, 0, 7), alone, worlds=(1,), tolerance=1e-12)


@ranks
def test_frozen_parameters_half_precision_buffers_and_counters():
    def work(rank, world):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        module[0].to(torch.bfloat16)
        module[0].bias.requires_grad_(False)
        before = copy.deepcopy(module.state_dict())
        local = LocalSGD(module, 2)
        local.step(); local.step()                                      # nothing was learned: nothing may move, whatever bfloat16 rounds
        still = all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values()))
        with torch.no_grad():
            module[0].weight += rank
            module[0].bias += rank                                      # frozen: not ours
            module[1].running_mean += 2 * rank
            module[1].num_batches_tracked += rank                       # a whole number: stays with its rank
        local.step()
        local.finish()
        return still, module[0].weight.float() - before["0.weight"].float(), local.x.dtype, module[0].bias.float() - before["0.bias"].float(), module[1].running_mean, int(module[1].num_batches_tracked)
    torch.manual_seed(0)
    for rank, (still, moved, wide, bias, mean, count) in enumerate(run(work, 2)):
        assert still and wide == torch.float32 and count == rank and bias.abs().max() == pytest.approx(rank, abs=0.01)
        assert torch.allclose(moved, torch.full((4, 3), 0.5), atol=0.01) and mean.tolist() == [1.0] * 4


@ranks
@pytest.mark.parametrize("delay", (0, 1))
def test_bytes_are_one_message_a_round(delay):
    def work(rank, world):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        local = LocalSGD(module, 5, delay=delay)
        with count_bytes() as traffic:
            for _ in range(15): local.step()
        with count_bytes() as last: local.finish()
        return [m.sent for m in traffic], traffic.ring(world), [(m.op, m.sent) for m in last], local.nbytes
    for sent, on_ring, last, nbytes in run(work, 3):
        assert nbytes == 4 * (12 + 4 + 4 + 4 + 4 + 4 + 1) and sent == [nbytes] * 3       # weight, bias, and of the norm two parameters and two buffers, one word
        assert on_ring == pytest.approx(3 * ring_bytes("all_reduce", nbytes, 3))
        assert last == [("all_reduce", nbytes), ("all_gather", 8)]


@ranks
def test_a_group_of_its_own():
    def work(rank, world):
        groups = dist.new_group([0, 2]), dist.new_group([1, 3])
        w = nn.Parameter(torch.zeros(2))
        module = nn.ParameterList([w])
        local = LocalSGD(module, 1, group=groups[rank % 2])
        with torch.no_grad(): w += rank
        local.step()
        local.finish()
        return w.detach()
    assert [w.tolist() for w in run(work, 4)] == [[1, 1], [2, 2], [1, 1], [2, 2]]


@ranks
def test_saved_anywhere_it_goes_on_with_the_same_bits():
    "Through `torch.save`, after every number of steps: within rounds, between them, with a message on its way and without, before the first and after the last."
    settings = dict(rate=0.8, momentum=0.5, penalty="gap", clip=0.05)
    def work(rank, world):
        out = [train(rank, world, 3, 1, 8, settings)]
        for cut in range(9):
            build = lambda: (m := net(), torch.optim.AdamW(m.parameters(), lr=0.05), LocalSGD(m, 3, Outer(**settings), 1))
            parts = build()
            for t in range(9):
                if t == cut:
                    torch.save([p.state_dict() for p in parts], file := io.BytesIO())
                    parts = build()
                    for p, state in zip(parts, torch.load(io.BytesIO(file.getvalue()), weights_only=True)): p.load_state_dict(state)
                if t == 8: break
                learn(parts[0], parts[1], t, rank)
                parts[2].step()
            parts[2].finish()
            out.append(flat(parts[0]))
        return out
    for whole, *resumed in run(work, 2): assert all(torch.equal(whole, r) for r in resumed)


@ranks
def test_asking_for_the_state_changes_nothing_and_training_may_go_on_after_finish():
    def work(rank, world, ask):
        module = net()
        optimiser, local = torch.optim.SGD(module.parameters(), lr=0.1), LocalSGD(module, 2, Outer(penalty="gap"), 1)
        for t in range(12):
            learn(module, optimiser, t, rank)
            local.step()
            if ask: local.state_dict()["x"].zero_()
            if t == 5: local.finish()
        local.finish()
        return flat(module)
    plain, asked = run(work, 2, False), run(work, 2, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, asked)) and torch.equal(plain[0], plain[1])


@ranks
def test_after_finish_the_first_late_change_is_fresh():
    "x rests in the round after `finish`, so the next change began where x still is: no penalty."
    def work(rank, world):
        w = nn.Parameter(torch.zeros(1))
        local = LocalSGD(nn.ParameterList([w]), 1, Outer(penalty="gap"), 1)
        for _ in range(2):
            with torch.no_grad(): w -= 1
            local.step()
        local.finish()
        here = float(w)
        with torch.no_grad(): w -= 1
        local.step()
        local.finish()
        return float(w) - here
    assert run(work, 1) == [-1.0]


# ---- time


def test_rounds_by_hand_and_in_the_long_run():
    assert round_timeline([2, 2], [3, 1]) == ([(0, 2, "round 0"), (5, 2, "round 1")], [(2, 3, "message 0"), (7, 1, "message 1")])
    assert round_timeline([2, 2], [3, 1], 1) == ([(0, 2, "round 0"), (2, 2, "round 1")], [(2, 3, "message 0"), (5, 1, "message 1")])
    assert round_timeline([], []) == ([], [])
    for c, n in ((5, 2), (2, 5), (3, 3)):
        starts = [s for s, *_ in round_timeline([c] * 50, [n] * 50, 1)[0]]
        assert starts[-1] - starts[-11] == 10 * max(c, n)
        late, on_time = (round_timeline([c] * 50, [n] * 50, d)[1][-1][0] for d in (1, 0))
        assert late <= on_time


# ---- what is refused, on every rank and without a hang


def refused(work, world=2):
    "The text of the ValueError that each rank got."
    def catch(rank, world):
        try: work(rank, world)
        except ValueError as e: return str(e)
        return None
    return run(catch, world, timeout=30)


@ranks
def test_models_that_differ():
    def values(rank, world):
        module = net()
        if rank == 2:
            with torch.no_grad(): module[2].bias += 1e-9
        LocalSGD(module, 2)
    for said in refused(values, 3): assert said.startswith("model must have the same values on every rank") and said.endswith("[2]")
    def buffers(rank, world):
        module = nn.BatchNorm1d(3)
        module.running_var += rank
        LocalSGD(module, 2)
    for said in refused(buffers): assert said.endswith("got others than rank 0's on [1]")
    for settings in ([dict(every=2), dict(every=3)], [dict(every=2), dict(every=2, delay=1)], [dict(every=2, outer=Outer()), dict(every=2, outer=Outer(momentum=0.5))]):
        for said in refused(lambda rank, world: LocalSGD(net(), **settings[rank])): assert said == "every, delay and outer must be the same on every rank, got others than rank 0's on [1]"
    for said in refused(lambda rank, world: LocalSGD(nn.Linear(3, 2 + rank), 2)): assert said.startswith("parameters must be the same in number, shape, type and order")
    for said in refused(lambda rank, world: LocalSGD(nn.Linear(3, 2).requires_grad_(False), 2)): assert said.startswith("parameters must hold at least one that requires a gradient")


@ranks
@pytest.mark.parametrize("delay", (0, 1))
def test_uneven_numbers_of_steps(delay):
    def uneven(more):
        def work(rank, world):
            local = LocalSGD(net(), 3, delay=delay)
            for _ in range(6 + more * rank): local.step()
            local.finish()
        return work
    for said in refused(uneven(1)): assert said == "step must be called equally often on every rank, got [0, 1] steps since the last round"
    for said in refused(uneven(3)): assert said == "step must be called equally often on every rank, got 1 of 2 ranks that had finished while others began a further round"
    assert refused(uneven(0), 3) == [None] * 3


@ranks
@pytest.mark.parametrize("delay", (0, 1))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_nan_of_one_rank_is_named_on_all(delay, bad):
    def work(rank, world):
        module = net()
        local = LocalSGD(module, 2, delay=delay)
        for t in range(4):
            if rank == 1 and t == 1:
                with torch.no_grad(): module[0].weight[0, 0] = bad
            local.step()
    for said in refused(work, 3): assert said == "model must be finite at the end of a round, got NaN or infinity on ranks [1]"


@ranks
def test_a_rank_that_dies_is_reported():
    def work(rank, world):
        local = LocalSGD(net(), 2, delay=1)
        for t in range(6):
            if rank == 1 and t == 3: raise RuntimeError("power cut")
            local.step()
        local.finish()
    with pytest.raises(RankError, match="rank 1 of 2: RuntimeError: power cut"): run(work, 2, timeout=30)


@ranks
def test_it_keeps_three_numbers_for_each_parameter():
    "And one word of a message, one length: storages, so that no view keeps more alive."
    def work(rank, world):
        local = LocalSGD(nn.Linear(40, 25), 1, Outer(momentum=0.5, penalty="gap"), 1)
        for _ in range(3): local.step()
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (local.x, local.b, local.outer.m, local.outer.moved, local.pending[0]) if t.untyped_storage().nbytes()}
        return sum(kept.values())
    assert run(work, 1) == [4 * (3 * 1025 + 2)]


@ranks
@pytest.mark.parametrize("delay, waited", [(0, [0] * 3 + [1] * 4 + [2] * 4 + [3]), (1, [0] * 7 + [1] * 4 + [2])])
def test_a_late_round_does_not_wait_for_its_own_message(delay, waited, monkeypatch):
    "How many messages were waited for after each of twelve steps, without a clock."
    def work(rank, world):
        local, real, seen, after = LocalSGD(net(), 4, delay=delay), dist.all_reduce, [], []
        class Watched:
            def __init__(self, work): self.work = work
            def wait(self): seen.append(1); self.work.wait()
        monkeypatch.setattr(dist, "all_reduce", lambda *args, async_op, **kwargs: Watched(real(*args, async_op=True, **kwargs)))
        for _ in range(12):
            local.step()
            after.append(len(seen))
        local.finish()
        return after
    assert run(work, 2) == [waited] * 2


@ranks
def test_wide_buffers_stay_wide_and_close_settings_differ():
    def work(rank, world):
        model = nn.Linear(2, 2)                                                 # float32
        model.register_buffer("extra", torch.tensor([1 / 3], dtype=torch.float64))
        local = LocalSGD(model, 1)
        local.step()
        return local.buffers[0].item(), repr(Outer(0.12345671)) == repr(Outer(0.12345674))
    assert run(work, 2) == [(1 / 3, False)] * 2


def with_buffer(values):
    model = net()
    model.register_buffer("extra", values)
    return model


@ranks
def test_bad_arguments_and_foreign_states():
    def work(rank, world):
        said, used = [], Outer(0.7, 0.9, True, "gap")
        used.step(torch.zeros(3), torch.ones(3))
        state = LocalSGD(net(), 2).state_dict()
        for call in (lambda: LocalSGD(net(), 0), lambda: LocalSGD(net(), 1.5), lambda: LocalSGD(net(), 2, delay=2), lambda: LocalSGD(net(), 2, outer=0.7), lambda: LocalSGD(net(), 2, outer=used), lambda: LocalSGD(net(), 3).load_state_dict(state),
                     lambda: LocalSGD(net(), 2, delay=1).load_state_dict(state), lambda: LocalSGD(nn.Linear(2, 2), 2).load_state_dict(state), lambda: LocalSGD(net(), 2, Outer(0.5)).load_state_dict(state),
                     lambda: LocalSGD(with_buffer(torch.zeros(3)), 2).load_state_dict(state), lambda: LocalSGD(with_buffer(torch.tensor([0., -torch.inf])), 2)):
            try: call()
            except ValueError as e: said.append(str(e))
        return said
    assert run(work, 1)[0] == ["every must be at least 1, got 0", "every must be a whole number at least 1, got 1.5", "delay must be between 0 and 1, got 2", "outer must be None or an Outer that has taken no step, got 0.7",
                               "outer must be None or an Outer that has taken no step, got Outer(rate=0.7, momentum=0.9, nesterov=True, penalty='gap', clip=inf)",
                               "state must be of a LocalSGD with the same every, got 2 for 3", "state must be of a LocalSGD with the same delay, got 0 for 1", "state must be of a LocalSGD with the same parameters, got 41 for 6",
                               "state must be of a LocalSGD with the same outer, got Outer(rate=1.0, momentum=0.0, nesterov=False, penalty=1.0, clip=inf) for Outer(rate=0.5, momentum=0.0, nesterov=False, penalty=1.0, clip=inf)",
                               "state must be of a LocalSGD with the same buffers, got 0 for 3", "model must have buffers that are finite, as they are averaged; a mask of -inf can be one of booleans"]


@pytest.mark.parametrize("message, call", [
    ("rate must be a positive number, got 0", lambda: Outer(0)), ("momentum must be zero or a positive number, got -0.1", lambda: Outer(momentum=-0.1)), ("momentum must be below 1, got 1", lambda: Outer(momentum=1)),
    ("penalty must be a positive number, got 'wide'", lambda: Outer(penalty="wide")), ("penalty must be at least 1, or 'gap', got 0.5", lambda: Outer(penalty=0.5)), ("clip must be a positive number, got 0", lambda: Outer(clip=0)),
    ("compute and network must have one entry a round, got 1 and 2", lambda: round_timeline([1], [1, 2])), ("delay must be between 0 and 1, got 2", lambda: round_timeline([1], [1], 2))])
def test_bad_input(message, call):
    with pytest.raises(ValueError, match=message): call()
