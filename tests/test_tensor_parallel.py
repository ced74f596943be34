"""Tensor parallel: layers, loss and whole models of other shapes than the notebook's against one process, groups, finite differences, bytes, and what is refused."""
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from deepclustering.core.distributed import DeadlockError, RankError, check_parity, count_bytes, ring_bytes, run
from deepclustering.core.tinylm import TinyLM
from deepclustering.parallelism.tensor import (ColumnParallel, RowParallel, VocabParallelEmbedding, clip_gradients, copy_to, cut_dimensions, gather_from, gather_state, reduce_from,
                                               scatter_to, tensor_bytes, tensor_parallel, vocab_parallel_cross_entropy)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")


def lm(seed=0, **changes):
    torch.manual_seed(seed)
    return TinyLM(**{**dict(vocab=30, dim=12, depth=1, heads=12, kv_heads=6, head_dim=2, hidden=18), **changes}).double()


TOKENS = torch.randint(30, (2, 13), generator=torch.Generator().manual_seed(5))
X, Y = TOKENS[:, :-1], TOKENS[:, 1:].clone()
Y[0, :4] = -100


def one_pass(model, loss):
    "Gradients after two backward passes of different halves, which add up."
    for rows in (slice(0, 1), slice(1, 2)): loss(model, X[rows], Y[rows]).backward()
    return {n: p.grad for n, p in model.named_parameters()}


# ---- the same as one process


@pytest.mark.parametrize("sequence", (False, True))
@pytest.mark.parametrize("changes", ({"gated": False, "shift": False}, {"depth": 3, "heads": 6, "kv_heads": 6}), ids=str)
def test_other_models_and_accumulated_gradients(changes, sequence):
    def whole():
        model = lm(**changes)
        gradient = one_pass(model, lambda m, x, y: F.cross_entropy(m(x).flatten(0, 1), y.flatten(), reduction="sum"))
        return {"gradient": gradient, "state": model.state_dict()}
    def work(rank, world):
        model = tensor_parallel(lm(**changes), sequence=sequence)
        cuts = cut_dimensions(model)
        gradient = one_pass(model, lambda m, x, y: vocab_parallel_cross_entropy(m(x), y, reduction="sum"))
        def part(name, t): return t if cuts[name] is None else t.chunk(world, cuts[name])[rank]
        full = whole()["gradient"]  # compared here: the reference's own part
        worst = max(float((g - part(n, full[n])).abs().max()) for n, g in gradient.items())
        assert worst < 1e-11, worst
        return {"state": gather_state(model), "gradient": {n: full[n] for n in gradient}}
    check_parity(work, whole, (2, 3))


@pytest.mark.parametrize("sequence", (False, True))
def test_each_group_is_a_model_of_its_own(sequence):
    "Two groups of two ranks, each with other weights and other tokens: nothing may leak."
    def whole(which):
        model = lm(which)
        loss = F.cross_entropy(model(X[which:which + 1]).flatten(0, 1), Y[which:which + 1].flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        return loss.detach(), norm
    def work(rank, world):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        which, group = rank // 2, groups[rank // 2]
        model = tensor_parallel(lm(which), group, sequence)
        loss = vocab_parallel_cross_entropy(model(X[which:which + 1]), Y[which:which + 1], group)
        loss.backward()
        return loss.detach(), clip_gradients(model, 1e9, group)
    for rank, found in enumerate(run(work, 4)):
        for a, b in zip(found, whole(rank // 2)): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gathered_state_is_a_checkpoint_for_any_world():
    def work(rank, world):
        model = tensor_parallel(lm())
        with torch.no_grad():
            for p in model.parameters(): p.mul_(1.5)
        return gather_state(model), model(X)
    for world in (1, 2, 3):
        ranks = run(work, world)
        model = lm(7)
        model.load_state_dict(ranks[0][0])
        torch.testing.assert_close(torch.cat([logits for _, logits in ranks], -1), model(X), rtol=1e-12, atol=1e-12)


def test_float32_and_no_gradient():
    def work(rank, world):
        model = tensor_parallel(lm().float())
        with torch.no_grad(): return model(X)
    torch.testing.assert_close(torch.cat(run(work, 3), -1), lm().float()(X), rtol=1e-4, atol=1e-5)


# ---- layers


@pytest.mark.parametrize("leave", ("reduce", "scatter"))
def test_biases(leave):
    torch.manual_seed(0)
    first, second, x = nn.Linear(5, 12).double(), nn.Linear(12, 6).double(), torch.randn(2, 6, 5).double()
    def whole():
        a, b = (nn.Linear(5, 12).double(), nn.Linear(12, 6).double())
        a.load_state_dict(first.state_dict()); b.load_state_dict(second.state_dict())
        y = b(a(x).relu())
        y.square().sum().backward()
        return y, [b.bias.grad, a.bias.grad]
    def work(rank, world):
        row = RowParallel(second, leave=reduce_from if leave == "reduce" else scatter_to)
        column = ColumnParallel(first)
        y = row(column(x).relu())
        y.square().sum().backward()
        if leave == "scatter": dist.all_reduce(row.bias.grad)  # it saw its own tokens
        return y, row.bias.grad, column.bias.grad
    y, (row_bias, column_bias) = whole()
    ranks = run(work, 3)
    for r in ranks: torch.testing.assert_close(r[1], row_bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[2] for r in ranks]), column_bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[0] for r in ranks], 1) if leave == "scatter" else ranks[0][0], y, rtol=1e-12, atol=1e-12)


def test_the_layers_copy_what_they_get():
    linear = nn.Linear(4, 4)
    before = {n: p.clone() for n, p in linear.named_parameters()}
    def work(rank, world):
        parts = [ColumnParallel(linear), RowParallel(linear)]
        for m in parts:
            for p in m.parameters(): p.data.fill_(9)
        return [linear.weight, linear.bias]
    for found in run(work, 2):
        for a, b in zip(found, before.values()): assert torch.equal(a, b)


def test_words_of_other_ranks_get_no_gradient():
    words = nn.Embedding(6, 2).double()
    def work(rank, world):
        mine = VocabParallelEmbedding(words)
        reduce_from(mine(torch.tensor([[0, 5, 5]]))).sum().backward()
        return mine.weight.grad
    assert torch.cat(run(work, 3)).tolist() == [[1, 1], [0, 0], [0, 0], [0, 0], [0, 0], [2, 2]]


# ---- pairs


@pytest.mark.parametrize("dim", (0, 1, 2))
def test_slices_in_any_dimension(dim):
    x = torch.randn(6, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).transpose(0, 2)  # not contiguous
    def work(rank, world):
        own = x.chunk(world, dim)[rank]
        gathered, scattered = gather_from(own, dim=dim), scatter_to(x * (rank + 1), dim=dim)
        return gathered, scattered
    for rank, (gathered, scattered) in enumerate(run(work, 3)):
        assert torch.equal(gathered, x)
        torch.testing.assert_close(scattered, 6 * x.chunk(3, dim)[rank])


def test_gradient_is_the_slope():
    "Finite differences of the loss over an input that all ranks share."
    torch.manual_seed(0)
    first, second, x = nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), torch.randn(2, 3).double()
    def work(rank, world):
        up, down = ColumnParallel(first), RowParallel(second)
        def loss(x): return down(up(copy_to(x)).tanh()).square().sum()
        point, slopes = x.clone().requires_grad_(), torch.zeros_like(x)
        loss(point).backward()
        for i in range(2):
            for j in range(3):
                step = torch.zeros_like(x)
                step[i, j] = 1e-6
                slopes[i, j] = (loss(x + step) - loss(x - step)).detach() / 2e-6
        return point.grad, slopes
    for gradient, slopes in run(work, 2): torch.testing.assert_close(gradient, slopes, rtol=1e-7, atol=1e-8)


def test_the_input_of_a_sum_is_left_alone_and_no_second_gradient():
    def work(rank, world):
        x = torch.ones(3, requires_grad=True)
        y = reduce_from(x)
        g, = torch.autograd.grad(copy_to(x).square().sum(), x, create_graph=True)
        try: g.sum().backward()
        except RuntimeError as e: return x.tolist(), y.tolist(), str(e)
    for x, y, message in run(work, 2):
        assert x == [1, 1, 1] and y == [2, 2, 2] and "once_differentiable" in message


# ---- the loss


@pytest.mark.parametrize("seed", range(3))
def test_loss_like_torchs(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 50 * torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    logits[0, 0] = 1e4 * torch.randn(12, generator=generator, dtype=torch.float64)
    labels = torch.randint(12, (2, 5), generator=generator)
    labels[1, 2:] = 77
    weight = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    def work(rank, world):
        found = {}
        for reduction in ("mean", "sum", "none"):
            z = logits.chunk(world, -1)[rank].clone().requires_grad_()
            loss = vocab_parallel_cross_entropy(z, labels, ignore_index=77, reduction=reduction)
            (loss * weight if reduction == "none" else loss).sum().backward()
            found[reduction] = loss.detach(), z.grad
        return found
    for world in (1, 3):
        ranks = run(work, world)
        for reduction in ("mean", "sum", "none"):
            z = logits.clone().requires_grad_()
            loss = F.cross_entropy(z.flatten(0, 1), labels.flatten(), ignore_index=77, reduction=reduction)
            loss = loss.view(2, 5) if reduction == "none" else loss
            (loss * weight if reduction == "none" else loss).sum().backward()
            for r in ranks: torch.testing.assert_close(r[reduction][0], loss.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(torch.cat([r[reduction][1] for r in ranks], -1), z.grad, rtol=1e-12, atol=1e-12)


def test_nothing_to_predict():
    def work(rank, world):
        z = torch.randn(3, 4, requires_grad=True)
        empty, none = torch.full((3,), -100), vocab_parallel_cross_entropy(z[:0], torch.zeros(0, dtype=torch.int64), reduction="sum")
        total = vocab_parallel_cross_entropy(z, empty, reduction="sum")
        total.backward()
        return total.item(), z.grad.abs().max().item(), vocab_parallel_cross_entropy(z, empty).isnan().item(), none.item()
    assert run(work, 2) == [(0, 0, True, 0)] * 2


# ---- bytes


@pytest.mark.parametrize("depth", (1, 2))
@pytest.mark.parametrize("world", (2, 3))
def test_bytes(depth, world):
    "The same for both forms, by the ledger; the norms' weights come on top where tokens are cut."
    def work(rank, world):
        found = []
        for sequence in (False, True):
            model = tensor_parallel(lm(depth=depth), sequence=sequence)
            with count_bytes() as traffic: vocab_parallel_cross_entropy(model(X), Y).backward()
            found.append(traffic.ring(world))
        return found
    stream = tensor_bytes(24, 12, depth, world, 8) + ring_bytes("all_reduce", 3 * 24 * 8, world)
    norms = ring_bytes("all_reduce", (2 * depth + 1) * 12 * 8, world)
    for plain, sequence in run(work, world): assert plain == pytest.approx(stream, rel=1e-12) and sequence == pytest.approx(stream + norms, rel=1e-12)
    assert tensor_bytes(24, 12, depth, 1) == 0 and tensor_bytes(24, 12, depth, 2, 8, ends=False) == 4 * depth * 24 * 12 * 8


# ---- clipping


@pytest.mark.parametrize("max_norm", (1e-3, 1e6))
def test_clipping_like_torchs(max_norm):
    def whole():
        model = lm()
        F.cross_entropy(model(X).flatten(0, 1), Y.flatten()).backward()
        model.norm.weight.grad = None
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return norm, model.blocks[0].norm1.weight.grad
    def work(rank, world):
        model = tensor_parallel(lm())
        vocab_parallel_cross_entropy(model(X), Y).backward()
        model.norm.weight.grad = None
        return clip_gradients(model, max_norm), model.blocks[0].norm1.weight.grad
    for found in run(work, 3):
        for a, b in zip(found, whole()): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# ---- what is refused


@pytest.mark.parametrize("world, changes, message", [
    (4, {"heads": 12, "kv_heads": 2}, "kv_heads of model must be divisible by the number of ranks, 4, got 2"),
    (4, {"kv_heads": 12, "hidden": 18}, "hidden of model must be divisible by the number of ranks, 4, got 18"),
    (2, {"vocab": 31}, "vocab of model must be divisible by the number of ranks, 2, got 31"),
    (2, {"depth": 2, "attention": lambda dim: nn.Identity()}, "model must have blocks of Attention and FeedForward, got Identity and FeedForward in block 0")], ids=lambda v: str(v)[:12])
def test_a_model_that_cannot_be_cut_is_left_as_it_was(world, changes, message):
    def work(rank, world):
        model = lm(**changes)
        before = [(n, p.shape) for n, p in model.named_parameters()]
        try: tensor_parallel(model)
        except ValueError as e: assert str(e) == message, e
        else: raise AssertionError("not refused")
        assert [(n, p.shape) for n, p in model.named_parameters()] == before and not model.blocks[0]._forward_pre_hooks
    run(work, world)


@pytest.mark.parametrize("message, work", [
    ("labels must be -100 or between 0 and 7, got -1 to 3", lambda r, w: vocab_parallel_cross_entropy(torch.zeros(2, 4), torch.tensor([-1, 3]))),
    ("labels must be -100 or between 0 and 7, got 0 to 8", lambda r, w: vocab_parallel_cross_entropy(torch.zeros(2, 4), torch.tensor([0, 8]))),
    ("labels must have the shape of logits without the words (2,), got (2, 1)", lambda r, w: vocab_parallel_cross_entropy(torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64))),
    ("max_norm must be positive, got nan", lambda r, w: clip_gradients(nn.Linear(1, 1), float("nan"))),
    ("x must have a dimension 0 that 2 ranks divide, got shape (3, 4)", lambda r, w: scatter_to(torch.zeros(3, 4), dim=0)),
    ("x must have a dimension 1 that 2 ranks divide, got shape (2, 13, 12)", lambda r, w: tensor_parallel(lm(), sequence=True)(TOKENS))], ids=lambda v: v[:24] if isinstance(v, str) else "")
def test_bad_input(message, work):
    with pytest.raises(RankError, match="of 2: ValueError: ") as error: run(work, 2)
    assert message in str(error.value)


def test_a_rank_that_stays_away():
    def work(rank, world):
        model = tensor_parallel(lm())
        if rank == 0: model(X)
    with pytest.raises(DeadlockError, match="rank 0 waits"): run(work, 2, patience=0.5)
