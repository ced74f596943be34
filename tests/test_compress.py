"""Compressors of gradients: bits against Python's own, every support and every noise against exact expectations, ranks against sums, engines, layers against brute force, and what is refused."""
import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from deepclustering.core.distributed import RankError, count_bytes, run
from deepclustering.parallelism.compress import (QSGD, Cast, CompressedReduceScatter, Compression, PowerSGD, TopK, adapt, compressed_bytes, fewest_bytes, layerwise, low_rank_mean, pack_bits,
                                                 stochastic_levels, unpack_bits)

ranks = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")
EVERY = [TopK(0.1), TopK(1.0), QSGD(2), QSGD(5, 7), PowerSGD(2), PowerSGD(50), Cast(), Cast(torch.float16), Cast(torch.float32)]


# ---- a compressor alone


@pytest.mark.parametrize("bits", (1, 3, 8, 13))
@pytest.mark.parametrize("n", (0, 1, 7, 8, 33))
def test_bits_are_those_of_python(bits, n):
    numbers = torch.randint(2 ** bits, (n,), generator=torch.Generator().manual_seed(n))
    stream = sum(int(v) << (bits * i) for i, v in enumerate(numbers))       # one long number, lowest first
    packed = pack_bits(numbers, bits)
    assert bytes(packed.tolist()) == stream.to_bytes(math.ceil(n * bits / 8), "little")
    assert torch.equal(unpack_bits(packed, bits, n), numbers)


@pytest.mark.parametrize("c", EVERY, ids=repr)
@pytest.mark.parametrize("shape", ((), (1,), (37,), (6, 5), (9, 2, 3, 3), (1, 40)), ids=str)
def test_a_message_has_the_length_that_was_announced(c, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    code = c.encode(x, torch.Generator().manual_seed(0))
    assert code.dtype == torch.uint8 and code.shape == (c.nbytes(shape),)
    for like in (x, x.double(), x.bfloat16()):
        back = c.decode(code, like)
        assert back.shape == x.shape and back.dtype == like.dtype
    if repr(c) in ("TopK(1)", "PowerSGD(50)", "Cast(float32)"): assert torch.equal(c.decode(code, x), x) and float(c.error(x)) == 0
    zero = torch.zeros(shape)
    assert torch.equal(c.decode(c.encode(zero), zero), zero) and float(c.error(zero)) == 0


@pytest.mark.parametrize("c", [c for c in EVERY if not isinstance(c, (QSGD, PowerSGD))] + [PowerSGD(50)], ids=repr)
def test_error_is_that_of_the_message(c):
    x = torch.randn(12, 11, generator=torch.Generator().manual_seed(2)).T          # not contiguous
    assert float(c.error(x)) == pytest.approx(float((c.decode(c.encode(x), x) - x).double().square().sum()), rel=1e-5, abs=1e-12)


def test_top_k_is_the_best_support():
    x = torch.tensor([0.3, -2.0, 1.1, 0.0, -0.9, 1.0])
    best = min(float(x[list(rest)].square().sum()) for rest in itertools.combinations(range(6), 3))
    assert float(TopK(0.5).error(x)) == pytest.approx(best)
    assert TopK(0.5).decode(TopK(0.5).encode(x), x).nonzero().flatten().tolist() == [1, 2, 5]


@pytest.mark.parametrize("bits", (2, 3, 5))
def test_rounding_is_unbiased_over_all_noise(bits):
    "Three entries of a Pythagorean quadruple: their fractions are multiples of 1/7, so seven values of the noise are all there is to see, for each entry."
    v, s, noise = torch.tensor([2.0, -3.0, 6.0], dtype=torch.float64), 2 ** (bits - 1) - 1, (torch.arange(7).double() + 0.5) / 7
    every = torch.tensor(list(itertools.product(noise.tolist(), repeat=3)), dtype=torch.float64)
    level, norm = stochastic_levels(v.expand(343, 3), s, every)
    Q = norm * level / s
    assert torch.equal(norm, torch.full((343, 1), 7.0, dtype=torch.float64)) and torch.allclose(Q.mean(0), v, atol=1e-12)
    variance = float((Q - v).square().sum(1).mean())
    assert variance == pytest.approx(float(QSGD(bits, 3).error(v))) and variance <= min(3 / s ** 2, 3 ** 0.5 / s) * 49
    assert level.abs().max() <= s


def test_the_bound_of_qsgd_for_any_vector():
    for n, bits in itertools.product((1, 4, 64), (2, 4, 8)):
        x, s = torch.randn(n, generator=torch.Generator().manual_seed(n)), 2 ** (bits - 1) - 1
        assert float(QSGD(bits, n).error(x)) <= min(n / s ** 2, n ** 0.5 / s) * float(x.square().sum()) + 1e-6


def test_rounding_never_leaves_its_bits_and_shows_nan():
    x = torch.tensor([0.0, 0.0, 5.0])
    level, _ = stochastic_levels(x, 1, torch.full((3,), 1 - 2 ** -24))
    assert level.tolist() == [0, 0, 1]
    assert QSGD(4).decode(QSGD(4).encode(torch.tensor([1.0, float("nan")])), x[:2]).isnan().all()


def test_low_rank_is_a_projection_and_reaches_the_best_one():
    M = torch.randn(9, 6, generator=torch.Generator().manual_seed(3)).double() * torch.tensor([9.0, 7, 3, 1, 1, 0.5]).double()
    values, Q = torch.linalg.svdvals(M), torch.eye(6, 2).double()
    for _ in range(100): (P,), (Q,) = low_rank_mean([M], [Q], lambda xs: xs)
    assert torch.allclose(P.T @ P, torch.eye(2).double(), atol=1e-12) and torch.allclose(P @ Q.T, P @ P.T @ M, atol=1e-12)
    assert float((M - P @ Q.T).square().sum()) == pytest.approx(float(values[2:].square().sum()), rel=1e-9)
    assert float(PowerSGD(2).error(M.float())) == pytest.approx(float(values[2:].square().sum()), rel=1e-5)
    x = M.float().view(9, 2, 3)                                             # a convolution's weight is a matrix, too
    back = PowerSGD(2).decode(PowerSGD(2).encode(x), x)
    assert torch.linalg.matrix_rank(back.flatten(1)) == 2 and PowerSGD(2).nbytes((9, 2, 3)) == 4 * 2 * 15
    assert not PowerSGD(4).pays((9, 6)) and PowerSGD(4).nbytes((9, 6)) == 4 * 54      # 4 (9 + 6) is more than 54


# ---- ranks


SHAPES = [(8, 6), (5,), (3, 2, 4)]


def gradients(rank, step): return [torch.randn(s, generator=torch.Generator().manual_seed(100 * step + 10 * rank + i)) for i, s in enumerate(SHAPES)]


@ranks
@pytest.mark.parametrize("world", (1, 3))
def test_nothing_is_lost(world):
    "What was sent and the mean of what is remembered is the sum of the mean gradients: for every compressor with memory, forced upon those that have none, and while settings change."
    def work(rank, world):
        gaps = []
        for first, second, feedback in ((TopK(0.2), TopK(0.05), None), (PowerSGD(2), PowerSGD(1), None), (PowerSGD(1), PowerSGD(3), None), (Cast(), Cast(), True), (QSGD(8), TopK(0.3), True), (TopK(0.1), PowerSGD(1), True)):
            state, total = Compression(first, feedback), [torch.zeros(s) for s in SHAPES]
            for step in range(4):
                if step == 2: state.compressor = second
                for t, m in zip(total, state.mean("abc", gradients(rank, step))): t += m
            left = [torch.zeros(s) if k not in state.errors else state.errors[k].clone() for k, s in zip("abc", SHAPES)]
            for e in left: dist.all_reduce(e)
            wanted = [sum(gradients(r, step)[i] for r in range(world) for step in range(4)) / world for i in range(3)]
            gaps.append(max(float((t + e / world - w).abs().max()) for t, e, w in zip(total, left, wanted)))
        return gaps
    for gaps in run(work, world): assert max(gaps[:3] + gaps[4:]) < 1e-5 and gaps[3] < 5e-2     # a sum in bfloat16 rounds on the way, which nobody remembers


@ranks
def test_means_are_the_same_on_every_rank_and_belong_to_the_group():
    def work(rank, world):
        group, out = dist.new_group([0, 2]), []
        if rank == 1: return None
        for c in EVERY:
            with count_bytes() as traffic: means = Compression(c, group=group).mean("abc", gradients(rank, 0))
            out.append((means, traffic.ring(2)))
        return out
    a, none, b = run(work, 3)
    exact = [(x + y) / 2 for x, y in zip(gradients(0, 0), gradients(2, 0))]
    assert none is None
    for c, (means, sent), (others, _) in zip(EVERY, a, b):
        assert all(torch.equal(m, o) for m, o in zip(means, others))
        assert sent == compressed_bytes(c, SHAPES, 2)
        if repr(c) in ("TopK(1)", "PowerSGD(50)", "Cast(float32)"): assert all(torch.allclose(m, e, atol=1e-6) for m, e in zip(means, exact))


@ranks
def test_scattered_means():
    "Own rows of the mean where messages add up; where they do not, by hand: each rank's message about each block."
    shapes = [(6, 4), (3,)]
    def draw(rank): return [torch.randn(s, generator=torch.Generator().manual_seed(rank)) for s in shapes]
    def work(rank, world):
        found = {}
        for c in (Cast(torch.float32), PowerSGD(1), TopK(0.3)):
            state = Compression(c)
            means = state.mean("ab", draw(rank), scatter=True)
            found[repr(c)] = means, Compression(c).mean("ab", draw(rank)), [state.errors.get(k, torch.zeros(s)) for k, s in zip("ab", shapes)]
        return found
    out = run(work, 3)
    for rank in range(3):
        for name in ("Cast(float32)", "PowerSGD(1)"):
            mine, full, _ = out[rank][name]
            assert all(torch.allclose(m, f.chunk(3)[rank], atol=1e-6) for m, f in zip(mine, full))
        mine, _, errors = out[rank]["TopK(0.3)"]
        c = TopK(0.3)
        for i in range(2):
            sent = [[c.decode(c.encode(part), part) for part in draw(r)[i].chunk(3)] for r in range(3)]
            assert torch.allclose(mine[i], sum(sent[r][rank] for r in range(3)) / 3, atol=1e-6)
            assert torch.allclose(errors[i], draw(rank)[i] - torch.cat(sent[rank]), atol=1e-6)


@ranks
def test_float16_does_not_run_over_and_ranks_draw_their_own_noise():
    def work(rank, world):
        big = Compression(Cast(torch.float16)).mean("a", [torch.full((3,), 40000.0)])[0]
        x = torch.full((400,), 0.3)
        once = Compression(QSGD(2, 4), seed=5).mean("a", [x])[0]
        again = Compression(QSGD(2, 4), seed=5).mean("a", [x])[0]
        return big, once, torch.equal(once, again), once.unique().numel()
    for big, once, same, values in run(work, 2):
        assert torch.allclose(big, torch.full((3,), 40000.0), rtol=1e-3)
        assert same and values == 3          # 0, half and all of the norm: with the same noise on both ranks there would be no half


def test_bytes_by_hand():
    assert compressed_bytes(Cast(torch.float32), [(10, 3), (7,)], 4) == 2 * 4 * 37 * 3 / 4
    assert compressed_bytes(TopK(0.1), [(10, 3)], 4) == 3 * (3 * 4 + math.ceil(3 * 5 / 8))      # 3 entries of 30, 5 bits for a place
    assert compressed_bytes(PowerSGD(1), [(10, 3), (7,)], 4) == 2 * 4 * (13 + 7) * 3 / 4
    assert compressed_bytes(Cast(), [(10, 3)], 4, scatter=True) == 2 * 12 * 3 * 3 / 4           # ten rows become twelve
    assert compressed_bytes(QSGD(4), [(8, 16)], 4, scatter=True) == 3 * (4 + 16)                # a message about 2 rows for each of 3 others
    assert all(compressed_bytes(c, SHAPES, 1) == 0 for c in EVERY)


# ---- a setting for each layer


def all_choices(errors, sizes, budget):
    best = math.inf
    for ks in itertools.product(range(errors.shape[1]), repeat=len(errors)):
        if sum(e[k] for e, k in zip(errors, ks)) <= budget * (1 + 1e-9): best = min(best, sum(s[k] for s, k in zip(sizes, ks)))
    return best


def test_every_small_table_is_solved_as_by_brute_force():
    "All tables of two layers and two settings with errors 0 to 2 and lengths 1 to 2, and every budget of whole bins."
    for entries in itertools.product(range(3), repeat=4):
        E = np.array(entries).reshape(2, 2)
        for lengths in itertools.product((1, 2), repeat=4):
            S = np.array(lengths).reshape(2, 2)
            for budget in (1, 2, 4):
                best = all_choices(E, S, budget)
                if best == math.inf:
                    with pytest.raises(ValueError, match="budget must allow one choice"): fewest_bytes(E, S, budget, budget)
                else:
                    k = fewest_bytes(E, S, budget, budget)
                    assert S[[0, 1], k].sum() == best and E[[0, 1], k].sum() <= budget


def test_four_layers_within_the_bound_of_the_bins():
    draw, r = np.random.default_rng(4), np.arange(4)
    for _ in range(25):
        S = draw.random((4, 4))
        E = draw.random((4, 4)) / S
        k = layerwise(E, S, 2, bins=500)
        budget = E[:, 2].sum()
        assert E[r, k].sum() <= budget * (1 + 1e-12) and all_choices(E, S, budget) <= S[r, k].sum() + 1e-12 <= min(all_choices(E, S, budget * (1 - 4 / 500)), S[:, 2].sum()) + 1e-9


def test_what_must_not_matter_to_a_choice():
    draw, r = np.random.default_rng(5), np.arange(5)
    E, S = draw.integers(1, 20, (5, 6)), draw.integers(1, 50, (5, 6))
    budget = int(E.min(1).sum()) + 12
    used = S[r, fewest_bytes(E, S, budget, budget)].sum()
    order = draw.permutation(5)
    assert S[order][r, fewest_bytes(E[order], S[order], budget, budget)].sum() == used
    assert S[r, fewest_bytes(E * 0.25, S, budget * 0.25, budget)].sum() == used
    worse = np.c_[E, E.max(1) + 1], np.c_[S, S.max(1) + 1]                    # a setting that nobody should take
    assert worse[1][r, fewest_bytes(*worse, budget, budget)].sum() == used
    assert fewest_bytes([[0, 0]], [[3, 2]], 0).tolist() == [1]               # no error at all, and it costs less
    assert layerwise([[0.0, 1.0], [0.0, 1.0]], [[4, 1], [4, 1]], 0).tolist() == [0, 0]


# ---- what is refused


@pytest.mark.parametrize("message, call", [
    ("density must be above 0 and at most 1, got 0", lambda: TopK(0)), ("density must be above 0 and at most 1, got 1.5", lambda: TopK(1.5)), ("bits must be between 2 and 16, got 1", lambda: QSGD(1)),
    ("bucket must be at least 1, got 0", lambda: QSGD(4, 0)), ("rank must be at least 1, got 0", lambda: PowerSGD(0)), ("dtype must be a type of float, got torch.int8", lambda: Cast(torch.int8)),
    ("compressor must be a TopK, QSGD, PowerSGD or Cast, got 0.01", lambda: Compression(0.01)), ("seed must be at least 0, got -1", lambda: Compression(TopK(0.1), seed=-1)),
    ("keys and tensors must be of one length, got 2 and 1", lambda: Compression(TopK(0.1)).mean("ab", [torch.ones(2)])),
    ("parameters must be those that the module shards itself, got none", lambda: CompressedReduceScatter(Compression(TopK(0.1)), [])), ("world must be at least 1, got 0", lambda: compressed_bytes(Cast(), [(2,)], 0)),
    (r"errors and sizes must be tables of one shape \(layers, settings\), got \(2, 1\) and \(1, 2\)", lambda: fewest_bytes([[1], [2]], [[1, 2]], 1)), ("errors must be finite and not negative", lambda: fewest_bytes([[float("nan")]], [[1]], 1)),
    ("sizes must be finite and not negative", lambda: fewest_bytes([[1]], [[-1]], 1)), ("budget must be finite and not negative", lambda: fewest_bytes([[1]], [[1]], -1.0)), ("bins must be at least 1", lambda: fewest_bytes([[1]], [[1]], 1, 0)),
    ("budget must allow one choice, got 1, and the least error is 2", lambda: fewest_bytes([[2, 3]], [[1, 1]], 1)), ("reference must be between 0 and 1, got 2", lambda: layerwise([[1, 2]], [[1, 1]], 2)),
    ("state must have kept gradients", lambda: adapt(Compression(TopK(0.1)), [TopK(0.1)], 0))])
def test_bad_input(message, call):
    with pytest.raises(ValueError, match=message): call()


@ranks
def test_a_reduce_scatter_of_other_parameters_is_refused():
    def work(rank, world):
        comm = CompressedReduceScatter(Compression(TopK(0.5)), nn.Linear(4, 2).parameters())
        comm(torch.empty(8), torch.ones(16), None, dist.ReduceOp.SUM)
    with pytest.raises(RankError, match="ValueError: parameters must be those that the module shards itself, got 10 numbers with padding, and the module reduces 16"): run(work, 2)


@ranks
def test_the_sum_and_the_mean_that_fully_shard_asks_for():
    def work(rank, world):
        layer, out = nn.Linear(3, 2, bias=False), []
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            comm, mine = CompressedReduceScatter(Compression(Cast(torch.float32)), layer.parameters()), torch.empty(3)
            comm(mine, torch.arange(6.0) * (rank + 1), None, op)
            out.append(mine)
        try: comm(mine, torch.ones(6), None, dist.ReduceOp.MAX)
        except ValueError as e: return *out, str(e)
    for rank, (total, mean, refused) in enumerate(run(work, 2)):
        assert total.tolist() == [3 * (3 * rank + i) for i in range(3)] and mean.tolist() == [t / 2 for t in total.tolist()] and refused.startswith("op must be a sum or a mean")
