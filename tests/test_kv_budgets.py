"""Budgets: allocations against exhaustive search, apportionment by quotas, the published programs in whole numbers, laws of every allocation on random scores, groups by dynamic programming, streams against a hand-run model."""
import itertools
import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from deepclustering.core.tinylm import TinyLM
from deepclustering.kv import RaggedCache
from deepclustering.kv.budgets import AdaSnapKV, EntropySnapKV, PyramidKV, adakv, by_entropy, deal, in_proportion, layer_groups, layer_similarity, pyramid, squeeze
from deepclustering.kv.eviction import H2O, EvictingCache, KeyDiff, SnapKV, uniform

L, B, H, N = 3, 2, 2, 13


def scores(seed=0, layers=L, rows=B, heads=H, n=N, ties=False):
    "Positive scores with empty and protected slots: up to two of each in a head."
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(layers):
        s = torch.randint(1, 4, (rows, heads, n), generator=g).double() if ties else torch.rand(rows, heads, n, generator=g, dtype=torch.float64) ** 3
        order = torch.rand(rows, heads, n, generator=g).argsort(2)
        s = s.scatter(2, order[..., :2], torch.where(torch.rand(rows, heads, 2, generator=g) < .5, -math.inf, s.gather(2, order[..., :2])))
        found.append(s.scatter(2, order[..., 2:4], torch.where(torch.rand(rows, heads, 2, generator=g) < .5, math.inf, s.gather(2, order[..., 2:4]))))
    return found


def room(s): return torch.stack([(x > -math.inf).sum(2) for x in s])


def must(s): return torch.stack([(x == math.inf).sum(2) for x in s])


def alike(s, m): return room(s).clamp(max=m)


SIMILARITY = torch.tensor([[.2, .9], [.5, .3], [.95, .91]])
ALLOCATIONS = {"adakv": adakv, "adakv, no promise": partial(adakv, alpha=0), "pyramid": pyramid, "pyramid, gentle": partial(pyramid, beta=2.5), "entropy": by_entropy, "squeeze": partial(squeeze, similarity=SIMILARITY), "squeeze, p": partial(squeeze, similarity=SIMILARITY, p=.1, n_groups=2)}
each = pytest.mark.parametrize("name", ALLOCATIONS)


@each
def test_sums_are_exact_and_nothing_is_dealt_twice(name):
    for seed, m in itertools.product(range(20), (2, 3, 7, 12, N)):
        s = scores(seed, ties=seed % 2 == 0)
        counts = alike(s, m)
        got = ALLOCATIONS[name](s, counts)
        assert got.dtype == torch.int64 and got.shape == (L, B, H)
        assert torch.equal(got.sum((0, 2)), counts.sum((0, 2)))
        assert (got >= must(s)).all() and (got <= room(s)).all()
        if name.startswith("adakv"): assert torch.equal(got.sum(2), counts.sum(2))   # and each layer on its own
    assert torch.equal(ALLOCATIONS[name](s, room(s)), room(s))                        # room for all


@each
def test_rows_are_independent(name):
    allocate, s = ALLOCATIONS[name], scores(3)
    counts = alike(s, 6)
    for b in range(B):
        alone = partial(allocate, similarity=SIMILARITY[:, b:b + 1]) if name.startswith("squeeze") else allocate
        assert torch.equal(alone([x[b:b + 1] for x in s], counts[:, b:b + 1]), allocate(s, counts)[:, b:b + 1])


@each
def test_order_unit_padding_and_inputs(name):
    allocate, s = ALLOCATIONS[name], scores(4)
    counts = alike(s, 6)
    got = allocate(s, counts)
    shuffle = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    before = [x.clone() for x in s], counts.clone()
    assert torch.equal(allocate([x[..., shuffle] for x in s], counts), got)           # where slots lie
    assert torch.equal(allocate([7 * x for x in s], counts), got)                     # the unit of all scores
    assert torch.equal(allocate([torch.nn.functional.pad(x, (4, 3), value=-math.inf) for x in s], counts), got)
    assert torch.equal(allocate([x.flip(1) for x in s], counts.flip(2)).flip(2).sum(2), got.sum(2)) and torch.equal(allocate([x.float() for x in s], counts).sum(), got.sum())
    assert all(torch.equal(x, y) for x, y in zip(s, before[0])) and torch.equal(counts, before[1])
    narrow = [torch.nn.functional.pad(x, (0, l), value=-math.inf) for l, x in enumerate(s)]   # layers of a ragged cache differ in width
    assert torch.equal(allocate(narrow, counts), got)


@each
def test_protected_beyond_the_budget(name):
    s = [torch.full((B, H, N), math.inf)] * L
    with pytest.raises(ValueError, match="budget must cover what is protected"): ALLOCATIONS[name](s, torch.full((L, B, H), 4))


@each
def test_as_a_method(name):
    "In `Method`, with padding in a row: sums, protected slots, and what a real cache holds."
    torch.manual_seed(0)
    lm = TinyLM(11, dim=16, depth=L, heads=4, kv_heads=H).eval()
    tokens, at = torch.randint(11, (B, 30)), torch.arange(30).expand(B, -1).clone()
    at[1, 20:] = -1
    with torch.no_grad(): states = lm(tokens, positions=at, return_states=True)[1]
    masks = replace(SnapKV, allocate=ALLOCATIONS[name])(states, .4, window_size=4, kernel_size=1)
    assert torch.stack([m.sum((1, 2)) for m in masks]).sum(0).tolist() == [L * H * 12, L * H * 8]
    for m in masks: assert m[0, :, 26:].all() and m[1, :, 16:20].all() and not m[1, :, 20:].any()
    held = sum(RaggedCache().append(s.keys, s.values).keep(m).nbytes for s, m in zip(states, masks))
    assert held == L * H * 20 * (2 * 4 * 4 + 4) + L * 2 * 8 * B * H                   # slots of a key, a value and a position; two tables of a layer


def test_bytes_of_unequal_heads():
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 4, 600, 16, generator=g)
    s = [torch.rand(2, 4, 600, generator=g) ** torch.tensor([1., 9, 3, 30]).view(4, 1)]
    counts = adakv(s, torch.full((1, 2, 4), 150))[0]
    assert counts.max() > 2 * counts.min()
    cache = RaggedCache().append(k, v).keep(torch.arange(600) < counts.unsqueeze(2))
    assert cache.nbytes == 8 * 150 * (2 * 16 * 4 + 4) + 2 * 8 * 8                     # as above
    assert 4 * int(counts.max()) * 2 > 1.3 * 8 * 150                                  # a rectangle would not have


def test_deal_against_all_splits():
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        gains, least = torch.rand(1, 3, 4, generator=g).sort(2, descending=True).values, torch.randint(0, 3, (1, 3), generator=g)
        total = int(torch.randint(int(least.sum()), 13, (), generator=g))
        worth = {c: sum(float(gains[0, u, :k].sum()) for u, k in enumerate(c)) for c in itertools.product(range(5), repeat=3) if sum(c) == total and all(k >= l for k, l in zip(c, least[0].tolist()))}
        assert tuple(deal(gains[..., torch.randperm(4, generator=g)], torch.tensor([total]), least)[0].tolist()) == max(worth, key=worth.get)


def test_adakv_minimises_the_bound_by_all_subsets():
    "Every way to keep ten of 3 x 5 slots that honours the promise, not only beginnings of sorted heads: kept attention is never more."
    g = torch.Generator().manual_seed(1)
    sets = np.array([c for c in itertools.product((0, 1), repeat=15) if sum(c) == 10]).reshape(-1, 3, 5)
    for alpha, promised in ((0, 0), (Fraction(1, 3), 1), (.67, 2), (1, 3)):
        for _ in range(20):
            A = (6 * torch.rand(1, 3, 5, generator=g, dtype=torch.float64)).softmax(2)
            allowed = sets[(sets.sum(2) >= promised).all(1)] if alpha != 1 else sets[(sets.sum(2) >= 3).all(1)]
            got = adakv([A], torch.tensor([[[4, 3, 3]]]), alpha)[0, 0]
            kept = sum(float(A[0, h].sort(descending=True).values[:got[h]].sum()) for h in range(3))
            if alpha == 1: assert got.tolist() == [4, 3, 3]
            else: assert kept == pytest.approx(float((allowed * A[0].numpy()).sum((1, 2)).max()), abs=1e-12)


def test_adakv_as_kvpress_writes_it():
    "Top indices over all heads after the best `int(kept * alpha)` of each were set to the largest number; ratios that are exact in binary."
    g = torch.Generator().manual_seed(2)
    for n, gone in itertools.product((40, 64), (.25, .5, .75)):
        x = torch.rand(3, 4, n, generator=g)
        kept = int(n * (1 - gone)); safe = int(kept * .2)
        boosted = x.scatter(-1, x.topk(safe, dim=-1).indices, torch.finfo(x.dtype).max)
        dropped = torch.zeros(3, 4 * n).scatter(1, (-boosted.reshape(3, -1)).topk(4 * (n - kept), dim=1).indices, 1).view(3, 4, n)
        assert torch.equal(adakv([x], torch.full((1, 3, 4), kept))[0], (n - dropped.sum(2)).long())


def test_proportion_keeps_quotas_and_is_fair():
    "Webster: whole quotas come out; no slot can move from one head to another and bring the two closer to their weights."
    g = torch.Generator().manual_seed(3)
    for _ in range(40):
        w = torch.rand(2, 1, 3, generator=g, dtype=torch.float64) * 9 + .1
        total = int(torch.randint(4, 60, (), generator=g))
        start = torch.zeros(2, 1, 3).long(); start[0, 0, 0] = total
        c, w = in_proportion([torch.zeros(1, 3, 70)] * 2, w, start).flatten().tolist(), w.flatten().tolist()
        assert sum(c) == total
        for i, j in itertools.permutations(range(6), 2): assert not c[i] or w[i] / (c[i] - .5) >= w[j] / (c[j] + .5)   # no slot would be worth more elsewhere
    whole = torch.randint(0, 20, (4, 3, 2), generator=g)
    assert torch.equal(in_proportion([torch.zeros(3, 2, 20)] * 4, whole * .3, whole), whole)


def test_pyramid_against_the_programs():
    "The authors' whole numbers, where the step has no remainder; kvpress's rounded line, without a window."
    same = 0
    for layers, n, capacity, window in itertools.product((2, 3, 5, 9), (200, 500), (72, 104, 136), (0, 32)):
        low = (capacity - window) // 20
        high = 2 * (capacity - window) - low
        if high >= n - window: high, low = n - window, 2 * (capacity - window) - (n - window)
        line = [window + high - l * ((high - low) // (layers - 1)) for l in range(layers)]
        s = [torch.zeros(1, 1, n).index_fill(2, torch.arange(n - window, n), math.inf)] * layers
        ours = pyramid(s, torch.full((layers, 1, 1), capacity)).flatten().tolist()
        assert sum(ours) == layers * capacity and ours == sorted(ours, reverse=True) and abs(ours[0] - line[0]) <= 1
        if (high - low) % (layers - 1) == 0 and (capacity - window) % 20 == 0 or sum(line) == layers * capacity: same += ours == line
    assert same >= 10
    for layers, n, ratio in itertools.product((4, 8), (400, 640), (.25, .5, .75)):
        kept = n * (1 - ratio)
        low, high = kept / 20, 2 * kept - kept / 20
        if high >= n: high, low = n, 2 * kept - n
        theirs = [round(high - l * (high - low) / (layers - 1)) for l in range(layers)]
        ours = pyramid([torch.zeros(1, 1, n)] * layers, torch.full((layers, 1, 1), int(kept))).flatten().tolist()
        assert max(abs(a - b) for a, b in zip(ours, theirs)) <= 1


def intervals(x, k=3):
    "The optimum of one-dimensional k-means, by dynamic programming over sorted values."
    x = np.sort(x)
    best = [0.] + [math.inf] * len(x)                                                 # of the first j values in no groups
    for _ in range(k): best = [math.inf] + [min(best[i] + ((x[i:j] - x[i:j].mean()) ** 2).sum() for i in range(j)) for j in range(1, len(x) + 1)]
    return best[-1]


@pytest.mark.parametrize("layers, optimal, worst", [(4, 1, 1 + 1e-9), (8, 1, 1 + 1e-9), (16, .9, 1.3), (32, .5, 1.3)])
def test_groups_against_dynamic_programming(layers, optimal, worst):
    g = torch.Generator().manual_seed(layers)
    x = torch.cat([torch.rand(layers, 20, generator=g, dtype=torch.float64), torch.rand(layers, 20, generator=g, dtype=torch.float64) ** .2], 1)
    labels = layer_groups(x)
    ratios = []
    for values, group in zip(x.T.numpy(), labels.T.numpy()):
        means = [values[group == k].mean() for k in range(3)]
        assert means == sorted(means)
        ratios.append(sum(((values[group == k] - means[k]) ** 2).sum() for k in range(3)) / intervals(values))
    assert min(ratios) > 1 - 1e-9 and max(ratios) < worst and np.mean(np.array(ratios) < 1 + 1e-9) >= optimal
    assert torch.equal(layer_groups(x.flip(0)).flip(0), labels) and torch.equal(layer_groups(x.float()), labels)


def test_squeeze_as_the_authors_share():
    "a of the program: (L ini - L3 p ini) / (L - L3), cut to whole numbers; ours is within one slot of it and has the exact sum."
    g = torch.Generator().manual_seed(4)
    for _ in range(30):
        rho = torch.rand(10, 1, generator=g)
        group = layer_groups(rho)[:, 0]
        low = int((group == 2).sum())
        a = (10 * .3 - low * .1) / (10 - low)
        theirs = [int((.1 if k == 2 else a) * 200) for k in group.tolist()]
        ours = squeeze([torch.zeros(1, 1, 200)] * 10, torch.full((10, 1, 1), 60), rho, p=1 / 3).flatten().tolist()
        assert sum(ours) == 600 and max(abs(x - y) for x, y in zip(ours, theirs)) <= 1
    two = torch.tensor([[.5, .5], [.5, .9]])                                          # fewer layers than groups; one row of layers that are alike
    assert squeeze([torch.zeros(2, 1, 50)] * 2, torch.full((2, 2, 1), 10), two)[..., 0].T.tolist() == [[10, 10], [16, 4]]


def test_entropy_of_uniform_heads_is_their_width():
    s = torch.zeros(1, 4, 64)
    for h, k in enumerate((1, 2, 4, 8)): s[0, h, :k] = .1
    assert by_entropy([s], torch.full((1, 1, 4), 15), alpha=0).tolist() == [[[4, 8, 16, 32]]]
    with pytest.raises(ValueError, match="scores must be at least 0"): replace(KeyDiff, allocate=by_entropy)([state()], 3)


def state():
    torch.manual_seed(1)
    with torch.no_grad(): return TinyLM(11, dim=16, depth=1, heads=4, kv_heads=2).eval()(torch.randint(11, (1, 12)), return_states=True)[1][0]


def test_similarity_of_a_model_by_hand():
    torch.manual_seed(2)
    lm = TinyLM(11, dim=8, depth=2, heads=2, kv_heads=1).double().eval()
    tokens = torch.randint(11, (3, 9))
    rho = layer_similarity(lm, tokens)
    assert rho.shape == (2, 3) and not rho.requires_grad and (rho <= 1).all()
    with torch.no_grad():
        for block in lm.blocks: block.attention.o_proj.weight.zero_()
    assert torch.allclose(layer_similarity(lm, tokens), torch.ones(2, 3).double())    # attention that adds nothing
    with torch.no_grad():
        lm.blocks[0].attention.o_proj.weight.normal_()
    assert layer_similarity(lm, tokens)[0].max() < .99
    with pytest.raises(ValueError, match="tokens must be"): layer_similarity(lm, tokens + 11)
    assert all(not m._forward_pre_hooks for m in lm.modules())                        # also after an error


def test_streams_and_exported_methods():
    "A layer at a time, a cache knows no other layer: heads compete, layers do not."
    torch.manual_seed(0)
    lm = TinyLM(11, dim=16, depth=2, heads=4, kv_heads=2).eval()
    tokens = torch.randint(11, (2, 40))
    cache = EvictingCache(replace(H2O, allocate=adakv), 10)
    with torch.no_grad():
        for word in tokens.split(1, 1): lm(word, cache)
    assert (cache.stored.sum(2) <= 20).all() and cache.stored.float().mean() > 8
    assert [m.name for m in (PyramidKV, AdaSnapKV, EntropySnapKV)] == ["PyramidKV", "Ada-SnapKV", "Entropy-SnapKV"] and all(m.score is SnapKV.score for m in (PyramidKV, AdaSnapKV, EntropySnapKV))


BAD = {"alpha must be from 0 to 1, got 1.5": lambda s, c: adakv(s, c, 1.5), "alpha must be a number": lambda s, c: by_entropy(s, c, "much"), "alpha must be from 0 to 1, got -1": lambda s, c: by_entropy(s, c, -1), "beta must be a number, at least 1, got 0.9": lambda s, c: pyramid(s, c, .9),
       "similarity must be finite, one number for each of \\(3, 2\\)": lambda s, c: squeeze(s, c, SIMILARITY[:2]), "p must be above 0 up to 1, got 0": lambda s, c: squeeze(s, c, SIMILARITY, 0), "n_groups must be a whole number at least 2, got 0": lambda s, c: squeeze(s, c, SIMILARITY, n_groups=0),
       "scores must not be NaN": lambda s, c: adakv([x * math.nan for x in s], c), "NaN": lambda s, c: by_entropy([x * math.nan for x in s], c)}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    s = scores(5)
    with pytest.raises(ValueError, match=message): BAD[message](s, alike(s, 5))


def test_uniform_is_the_limit():
    s = scores(6)
    counts = alike(s, 7)
    for same in (partial(adakv, alpha=1), partial(squeeze, similarity=SIMILARITY, p=1), partial(squeeze, similarity=torch.ones(L, B))): assert torch.equal(same(s, counts), uniform(s, counts))
    plain = [torch.rand(2, 2, 20)] * 4
    assert torch.equal(pyramid(plain, torch.full((4, 2, 2), 6), beta=1), torch.full((4, 2, 2), 6))


def test_what_a_method_protects_is_promised_before_slots_are_dealt():
    "Two heads, one that wants everything: the other keeps its sink and its newest slot all the same."
    from dataclasses import replace
    from deepclustering.kv.eviction import StreamingLLM
    scores = torch.tensor([[[9., 9, 9, 9, 9, 9], [0, 0, 0, 0, 0, 0]]])
    method = replace(StreamingLLM, sinks=1, recent=1, allocate=lambda s, c: adakv(s, c, alpha=0))
    kept, = method.choose([scores], [torch.arange(6).expand(1, 2, 6)], torch.tensor([[[4, 4]]]))
    assert kept.sum() == 8 and kept[0, :, 0].all() and kept[0, :, 5].all()
