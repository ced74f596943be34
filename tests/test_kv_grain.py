"""Grain: choices by chunks against a walk through sorted chunks, in Python; pages against sets; limits where nothing may change."""
import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from deepclustering.kv.budgets import AdaSnapKV, EntropySnapKV, PyramidKV
from deepclustering.kv.eviction import H2O, EvictingCache, KeyNorm, Method, SnapKV, StreamingLLM
from deepclustering.kv.grain import Chunked, ChunkKV, by_chunk, chunk_order, chunk_scores, pages_held

B, H, N = 3, 2, 29


def drawn(seed, ties=False, empty=True):
    "Scores with ties, positions in any order and with gaps, some slots empty."
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (B, H, N), generator=g).double() if ties else torch.randn(B, H, N, generator=g, dtype=torch.float64)
    positions = torch.rand(B, H, 2 * N, generator=g).argsort(2)[..., :N]
    if empty: positions = positions.masked_fill(torch.rand(B, H, N, generator=g) < .2, -1)
    return scores, positions


def walk(scores, positions, size, m, sinks=0, recent=0, newest=0, other=()):
    "Slots of one head that stay, the slow way: protected ones, then chunk after chunk; `other`: scores and positions of the heads that join."
    def safe(p): return p < sinks or p > newest - recent
    slots = [s for s, p in enumerate(positions) if p >= 0]
    chosen, chunks = [s for s in slots if recent and safe(positions[s]) or positions[s] < sinks], {}
    for s in slots:
        if s not in chosen: chunks.setdefault(positions[s] // size, []).append(s)
    def value(j): return sum(math.fsum(x) / len(x) for x in ([scores[s] for s in chunks[j]], *([y for y, p in zip(*o) if p // size == j] for o in other)) if x)
    for j in sorted(chunks, key=lambda j: (-value(j), min(chunks[j]))):
        for s in sorted(chunks[j], key=lambda s: (-scores[s], s)):
            if len(chosen) < m: chosen.append(s)
    return sorted(chosen)


def given(scores): return Method("given", lambda state: scores)


@pytest.mark.parametrize("size", (1, 2, 3, 5, 16, 100))
@pytest.mark.parametrize("sinks, recent", ((0, 0), (3, 0), (3, 6)))
def test_against_a_walk_through_sorted_chunks(size, sinks, recent):
    for seed, m in itertools.product(range(4), (11, 17)):
        scores, positions = drawn(seed)
        mask, = by_chunk(replace(given(scores), sinks=sinks, recent=recent), size).choose([scores], [positions], torch.full((1, B, H), m))
        assert torch.equal(mask.sum(2), (positions >= 0).sum(2).clamp(max=m)) and not mask[positions < 0].any()   # exact to the token
        for b, h in itertools.product(range(B), range(H)):
            assert mask[b, h].nonzero()[:, 0].tolist() == walk(scores[b, h].tolist(), positions[b, h].tolist(), size, m, sinks, recent, int(positions[b].max()))


@pytest.mark.parametrize("size", (1, 2, 3, 8))
def test_ties_go_to_the_lower_slot(size):
    for seed in range(8):
        scores, positions = drawn(seed, ties=True, empty=False)
        positions = positions.sort(2).values                                           # slots in order: chunks in order
        masks = [by_chunk(given(scores), size).choose([scores], [positions], torch.full((1, B, H), 13))[0] for _ in range(2)]
        assert torch.equal(*masks)
        for b, h in itertools.product(range(B), range(H)):
            table = {}
            for s, p in enumerate(positions[b, h].tolist()): table.setdefault(p // size, []).append(s)
            want = []
            for j in sorted(table, key=lambda j: (-sum(scores[b, h, table[j]].tolist()) / len(table[j]), j)): want += sorted(table[j], key=lambda s: (-scores[b, h, s].item(), s))
            assert masks[0][b, h].nonzero()[:, 0].tolist() == sorted(want[:13])


def test_all_heads_by_the_sum_of_their_means():
    for seed in range(6):
        scores, positions = drawn(seed, empty=False)
        positions = positions[:, :1].expand(B, H, N).contiguous()
        mask, = by_chunk(given(scores), 4, heads=True).choose([scores], [positions], torch.full((1, B, H), 13))
        for b, h in itertools.product(range(B), range(H)):
            other = [(scores[b, 1 - h].tolist(), positions[b, 1 - h].tolist())]
            assert mask[b, h].nonzero()[:, 0].tolist() == walk(scores[b, h].tolist(), positions[b, h].tolist(), 4, 13, other=other)
        whole = mask.new_zeros(B, H, 2 * N + 6).scatter_(2, positions, mask).unflatten(2, (-1, 4)).sum(3)
        there = torch.zeros(B, H, 2 * N + 6, dtype=torch.int64).scatter_(2, positions, torch.ones_like(positions)).unflatten(2, (-1, 4)).sum(3)
        assert ((whole > 0) & (whole < there)).sum(2).max() <= 1 and torch.equal((whole == there) | (whole == 0), ((whole == there) | (whole == 0))[:, :1].expand(B, H, -1))   # the same chunk is cut


@pytest.mark.parametrize("method", (H2O, SnapKV, StreamingLLM, KeyNorm, AdaSnapKV, PyramidKV, EntropySnapKV), ids=lambda m: m.name)
def test_single_tokens_are_the_method_itself(method):
    for seed, dtype in itertools.product(range(4), (torch.float32, torch.float64)):
        layers = [tuple(t for t in drawn(seed + 10 * layer, ties=seed % 2 == 0)) for layer in range(2)]
        scores, positions = [s.to(dtype).abs() for s, _ in layers], [p for _, p in layers]
        counts = torch.stack([(p >= 0).sum(2).clamp(max=12) for p in positions])
        m = replace(method, sinks=min(method.sinks, 2))
        for one, old in zip(by_chunk(m, 1).choose(scores, positions, counts), m.choose(scores, positions, counts), strict=True): assert torch.equal(one, old)


@pytest.mark.parametrize("method", (AdaSnapKV, PyramidKV, EntropySnapKV), ids=lambda m: m.name)
@pytest.mark.parametrize("heads", (False, True))
def test_dealt_budgets_keep_their_sums(method, heads):
    scores, positions = zip(*(drawn(seed) for seed in (0, 1)))
    counts = torch.stack([(p >= 0).sum(2).clamp(max=12) for p in positions])
    masks = by_chunk(method, 4, heads).choose([s.abs() for s in scores], positions, counts)
    assert torch.equal(sum(m.sum((1, 2)) for m in masks), counts.sum((0, 2)))
    if method is AdaSnapKV: assert torch.equal(torch.stack([m.sum((1, 2)) for m in masks]), counts.sum(2))


def test_order_of_slots_rows_and_padding_change_nothing():
    scores, positions = drawn(5)
    counts, shuffle = torch.full((1, B, H), 11), torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for size, heads in itertools.product((3, 8), (False, True)):
        rule = by_chunk(given(scores), size, heads)
        mask, = rule.choose([scores], [positions], counts)
        assert torch.equal(rule.choose([scores[..., shuffle]], [positions[..., shuffle]], counts)[0], mask[..., shuffle])
        assert all(torch.equal(rule.choose([scores[b:b + 1]], [positions[b:b + 1]], counts[:, b:b + 1])[0], mask[b:b + 1]) for b in range(B))
        wide, = rule.choose([torch.nn.functional.pad(scores, (3, 4), value=9.)], [torch.nn.functional.pad(positions, (3, 4), value=-1)], counts)
        assert torch.equal(wide[..., 3:-4], mask) and wide.sum() == mask.sum()
        assert torch.equal(chunk_scores(scores[..., shuffle], positions[..., shuffle], size, heads), chunk_scores(scores, positions, size, heads)[..., shuffle])   # bit for bit


def test_newest_chunks_are_newest_tokens():
    "Means of positions order chunks as positions do: StreamingLLM by chunks is StreamingLLM, wherever the cut is."
    positions = torch.arange(60).expand(2, 1, 60)
    for size, m in itertools.product((2, 7, 16), (5, 12, 31)):
        assert torch.equal(by_chunk(StreamingLLM, size).choose([positions.float()], [positions], torch.full((1, 2, 1), m))[0], StreamingLLM.choose([positions.float()], [positions], torch.full((1, 2, 1), m))[0])


def test_a_cache_that_forgets_holds_its_budget():
    "Streamed token by token, sums of H2O by pages of 4: exact in every head, the newest two stay, positions are in order."
    g = torch.Generator().manual_seed(0)
    cache = EvictingCache(by_chunk(replace(H2O, recent=2), 4), 13)
    for t in range(50):
        k, v, q = (torch.randn(2, h, 1, 8, generator=g) for h in (2, 2, 4))
        cache.update(0, k, v, torch.full((2, 2, 1), t), queries=q)
    assert cache.stored.tolist() == [[[13, 13]] * 2]
    kept = cache.layers[0].rectangle()[2]
    assert (kept[..., -2:] == torch.tensor([48, 49])).all() and (kept.diff(dim=2) > 0).all()


def test_pages_against_sets():
    for seed, size in itertools.product(range(6), (1, 4, 16, 90)):
        scores, positions = drawn(seed)
        mask = scores > .3
        kept = [[{p // size for p, m in zip(positions[b, h].tolist(), mask[b, h].tolist()) if m and p >= 0} for h in range(H)] for b in range(B)]
        assert pages_held(mask, positions, size, heads=False).tolist() == [[len(s) for s in row] for row in kept]
        assert pages_held(mask, positions, size).tolist() == [len(set.union(*row)) for row in kept]
    assert pages_held(torch.zeros(2, 1, 0, dtype=torch.bool), torch.zeros(2, 1, 0, dtype=torch.int64)).tolist() == [0, 0]


def test_fewest_pages_where_nothing_is_protected():
    "Whole chunks at the places of pages hold as few pages as the budget allows, if every page is full."
    scores, positions = torch.randn(4, 2, 64, generator=torch.Generator().manual_seed(0)), torch.arange(64).expand(4, 2, 64)
    for m in (1, 16, 17, 40, 64):
        mask, = by_chunk(given(scores), 16, heads=True).choose([scores], [positions], torch.full((1, 4, 2), m))
        assert pages_held(mask, positions).tolist() == [-(-m // 16)] * 4


def test_exported_and_errors():
    assert isinstance(ChunkKV, Chunked) and (ChunkKV.size, ChunkKV.heads) == (10, True)
    paged = by_chunk(H2O, 16, heads=True)
    assert ChunkKV.score is SnapKV.score and paged.recent == H2O.recent and paged.accumulates and set(H2O.differs) < set(paged.differs)
    assert "ties" not in by_chunk(KeyNorm, 1).differs and "ties" in by_chunk(KeyNorm, 2).differs and not by_chunk(KeyNorm, 1).differs
    for bad in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="size must be"): by_chunk(H2O, bad)
    for bad in (H2O.score, "H2O", None):
        with pytest.raises(ValueError, match="method must be a Method"): by_chunk(bad, 4)
    scores, positions = drawn(0)
    with pytest.raises(ValueError, match="scores must not be NaN"): by_chunk(given(scores), 4).choose([scores.masked_fill(positions == positions.max(), torch.nan)], [positions], torch.full((1, B, H), 9))
    with pytest.raises(ValueError, match="budget must cover what is protected"): by_chunk(replace(given(scores), sinks=12), 4).choose([scores], [torch.arange(N).expand(B, H, N)], torch.full((1, B, H), 11))
    for call in (partial(chunk_scores, scores, positions), partial(chunk_order, scores, positions), partial(pages_held, scores > 0, positions)):
        with pytest.raises(ValueError, match="size must be"): call(0)
    with pytest.raises(ValueError, match="mask must be booleans of shape"): pages_held(scores > 0, positions[:, :1])
