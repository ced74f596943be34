"""Merging: laws after every exported `Method`, a replay of a stream in plain loops, the authors' program's own operators where its rule and ours coincide, kvpress's rule number by number."""
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_kv_laws import B, D, G, H, METHODS, T, normal, options, raw, row, state

from deepclustering.core.tinylm import TinyLM
from deepclustering.kv.eviction import H2O, EvictingCache, Looked, uniform
from deepclustering.kv.merge import WEIGHTS, MergingCache, attention_variance, by_variance, d2o, ema_threshold, merge_pairs, nearest_kept

SCORED = {name: m for name, m in METHODS.items() if name != "Random"}                 # each call draws anew
each = pytest.mark.parametrize("name", SCORED)
rules = pytest.mark.parametrize("weights", WEIGHTS)


def layers(): return [state(*raw(seed)) for seed in (0, 10)]


def merged(states, m, budget=11, weights="similarity", **kw): return d2o(states, budget, method=m, by_layer=False, weights=weights, **options(m), **kw)


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def stays(found): return [(x[keep], y[keep], c[keep]) for keep, (x, y, c, _) in found]


def same(a, b):
    for (keep, new), (keep2, new2) in zip(a, b, strict=True):
        assert torch.equal(keep, keep2)
        for x, y in zip(new[:3], new2[:3]): close(x[keep], y[keep2])


@each
def test_merging_changes_no_choice(name):
    m, states = SCORED[name], layers()
    for given in (dict(budget=12), dict(budget=.3), dict(compression_ratio=.625)):
        masks = m(states, **given, **options(m))
        assert all(torch.equal(keep, mask) for (keep, _), mask in zip(d2o(states, method=m, by_layer=False, **given, **options(m)), masks))


@each
def test_rows_are_independent(name):
    whole = merged(layers(), SCORED[name])
    for b in range(B): same([(keep[b:b + 1], type(new)(*(t[b:b + 1] for t in new))) for keep, new in whole], merged([row(s, b) for s in layers()], SCORED[name]))


@each
def test_padding_changes_nothing(name):
    m, (q, k, v), at = SCORED[name], raw(), torch.arange(30).expand(B, -1)
    plain = merged([state(*(t[:, :, :30] for t in (q, k, v)))], m)
    holes = torch.full((B, 10), -1)
    same_right = merged([state(q, k, v, torch.cat([at, holes], 1))], m)
    left = merged([state(*(torch.cat([t[:, :, 30:], t[:, :, :30]], 2) for t in (q, k, v)), torch.cat([holes, at], 1))], m)
    for (x, y, c), (x2, y2, c2), (x3, y3, c3) in zip(stays(plain), stays(same_right), stays(left)):
        for a, b in ((x, x2), (y, y2), (c, c2), (x, x3), (y, y3), (c, c3)): close(a, b)


@each
def test_groups_and_order_of_slots(name):
    m, (q, k, v) = SCORED[name], raw()
    same(merged([state(q, k, v)], m), merged([state(q.repeat_interleave(2, 1), k, v)], m))
    if "positions" in m.differs: return                                               # its choice follows the slots
    s, order = state(q, k, v), torch.randperm(T, generator=torch.Generator().manual_seed(5))
    s = Looked(*s, s.positions[:, 0])
    moved = s._replace(keys=s.keys[:, :, order], values=s.values[:, :, order], positions=s.positions[..., order], attention=s.attention[..., order])
    (keep, new), = merged([s], m)
    (keep2, new2), = merged([moved], m)
    assert torch.equal(keep[..., order], keep2)
    for a, b in zip(new[:3], new2[:3]): close(a[:, :, order] * (keep2.unsqueeze(3) if a.dim() == 4 else keep2), b * (keep2.unsqueeze(3) if b.dim() == 4 else keep2))


@rules
@each
def test_everything_stays(name, weights):
    states = layers()
    for (keep, new), s in zip(merged(states, SCORED[name], 1., weights), states):
        assert keep.all() and torch.equal(new.keys, s.keys) and torch.equal(new.values, s.values) and (new.counts == 1).all() and new.passed.numel() == 0


@each
def test_deterministic_and_errors(name):
    m, s = SCORED[name], state(*raw())
    a, b = merged([s], m), merged([s], m)
    assert all(torch.equal(x, y) for x, y in zip(a[0][1], b[0][1]))
    for bad in (0, 0., -1, 1.5, True, None, float("nan")):
        with pytest.raises(ValueError, match="budget"): merged([s], m, bad)
    with pytest.raises(ValueError, match="compression_ratio"): d2o([s], compression_ratio=1., method=m, **options(m))
    s.keys[1, 0, 20, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"): merged([s._replace(attention=torch.nan_to_num(s.attention))], m)


@rules
def test_inputs_stay_and_no_token_is_lost(weights):
    for seed in range(5):
        k, v = normal(2, 3, 20, D, seed=seed), normal(2, 3, 20, D, seed=seed + 50)
        keep = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(seed)) < .3
        keep[..., 0], at, before = True, torch.arange(20).expand(2, 3, 20), (k.clone(), v.clone())
        pairs = nearest_kept(k, keep, at)
        new = merge_pairs(k, v, pairs, weights=weights)
        assert torch.equal(k, before[0]) and torch.equal(v, before[1]) and (new.counts * keep).sum(2).eq(20).all() and new.passed.equal(pairs.gone >= 0)
        strict = merge_pairs(k, v, pairs, 2., weights)
        assert torch.equal(strict.keys, k) and torch.equal(strict.values, v) and not strict.passed.any()
        if weights in ("exponential", "count"):                                        # convex: each coordinate stays in the range of what is there
            for new_, old in ((new.keys, k), (new.values, v)): assert (new_.amax(2) <= old.amax(2) + 1e-12).all() and (new_.amin(2) >= old.amin(2) - 1e-12).all()
        if weights == "similarity": assert (new.keys.norm(dim=3) <= k.norm(dim=3).amax(2, keepdim=True) + 1e-12).all()
        scaled = merge_pairs(3 * k, v, nearest_kept(3 * k, keep, at), weights=weights)  # cosines do not know lengths
        close(scaled.keys, 3 * new.keys); close(scaled.values, new.values)


def test_ties_go_to_the_lower_slot():
    k = torch.tensor([[1., 0], [0, 1], [1, 0], [2, 0], [0, 3]]).view(1, 1, 5, 2)
    keep = torch.tensor([[[True, True, True, False, False]]])
    assert nearest_kept(k, keep, torch.arange(5).view(1, 1, 5)).into.tolist() == [[[0, 1]]]


@pytest.mark.parametrize("alpha", [.5, .3])
def test_the_programs_operators(alpha):
    "One row and one head, where its rule and ours are one: cosines, a mean as first threshold, `scatter_reduce` with the mean and the slot itself in it; then a second step of four tokens."
    k, v = normal(1, 1, 30, D, seed=1), normal(1, 1, 30, D, seed=2)
    tau, ours, last = None, None, None
    for step in range(2):
        keep = torch.zeros(1, 1, k.shape[2], dtype=torch.bool)
        keep[..., torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(step))[:12]] = True
        stay, out = k[keep].view(1, 1, -1, D), k[~keep].view(1, 1, -1, D)
        best = ((out / out.norm(dim=-1, keepdim=True)) @ (stay / stay.norm(dim=-1, keepdim=True)).mT).max(-1)
        tau = best.values.mean() if tau is None else alpha * tau + (1 - alpha) * best.values.mean()
        passes = best.values[0, 0] >= tau
        index, u = (t[..., passes].unsqueeze(-1).expand(-1, -1, -1, D) for t in (best.indices, best.values))
        theirs = [torch.scatter_reduce(x[keep].view(1, 1, -1, D), 2, index, u * x[~keep].view(1, 1, -1, D)[:, :, passes], "mean", include_self=True) for x in (k, v)]
        pairs = nearest_kept(k, keep, torch.arange(k.shape[2]).view(1, 1, -1))
        ours = ema_threshold(pairs.similarity, ours, 1 - alpha)
        close(ours[0, 0], tau)
        new = merge_pairs(k, v, pairs, ours)
        close(new.keys[keep].view_as(theirs[0]), theirs[0]); close(new.values[keep].view_as(theirs[1]), theirs[1])
        k, v = (torch.cat([x, normal(1, 1, 4, D, seed=3 + i)], 2) for i, x in enumerate(theirs))


def test_kvpress_rule():
    "Its `MergingPress` number by number: values alone, weighted by cosine and by lengths, divided by one plus the weights."
    k, v = normal(2, 2, 15, D, seed=0).numpy(), normal(2, 2, 15, D, seed=1).numpy()
    keep = (np.arange(15) % 3 == 0) & np.ones((2, 2, 15), bool)
    for least in (0., .3):
        new = merge_pairs(torch.tensor(k), torch.tensor(v), nearest_kept(torch.tensor(k), torch.tensor(keep), torch.arange(15).expand(2, 2, 15)), least, "values")
        assert np.array_equal(new.keys, k)
        for b, h in np.ndindex(2, 2):
            total, weight = v[b, h].copy(), np.ones(15)
            for j in np.flatnonzero(~keep[b, h]):
                cosine = k[b, h][keep[b, h]] @ k[b, h, j] / np.linalg.norm(k[b, h][keep[b, h]], axis=1) / np.linalg.norm(k[b, h, j])
                i = np.flatnonzero(keep[b, h])[cosine.argmax()]
                if cosine.max() < least: continue
                w = max(cosine.max(), 0) * np.linalg.norm(v[b, h, j]) / (np.linalg.norm(v[b, h, j]) + np.linalg.norm(v[b, h, i]) + 1e-6)
                total[i] += w * v[b, h, j]; weight[i] += w
            np.testing.assert_allclose(new.values[b, h][keep[b, h]], (total / weight[:, None])[keep[b, h]], atol=1e-5)   # its 1e-6


def replay(q, k, v, m, step, beta, count):
    "A stream through one head with G queries, in plain loops: slots, keys, values, counts, threshold."
    slots, sums, tau = [], [], None                                                   # a slot: position, key, value, count
    for start in range(0, len(k), step):
        slots += [[t, k[t].copy(), v[t].copy(), 1.] for t in range(start, min(start + step, len(k)))]
        sums += [0.] * (len(slots) - len(sums))
        for g in range(q.shape[0]):
            for t in range(start, min(start + step, len(k))):
                logits = np.array([q[g, t] @ s[1] / math.sqrt(D) + (math.log(s[3]) if count else 0) if s[0] <= t else -math.inf for s in slots])
                p = np.exp(logits - logits.max())
                sums = list(np.array(sums) + p / p.sum() / q.shape[0])
        if len(slots) <= m: continue
        newest, recent = max(s[0] for s in slots), max(1, m // 2)
        order = sorted(range(len(slots)), key=lambda i: (-(math.inf if slots[i][0] > newest - recent else sums[i]), i))
        keep, gone = sorted(order[:m]), sorted(order[m:])
        def cosine(a, b): return a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        best = {j: max(keep, key=lambda i: (cosine(slots[i][1], slots[j][1]), -i)) for j in gone}
        u = {j: cosine(slots[best[j]][1], slots[j][1]) for j in gone}
        tau = np.mean(list(u.values())) if tau is None else (1 - beta) * tau + beta * np.mean(list(u.values()))
        new = [list(s) for s in slots]
        for i in keep:
            js = [j for j in gone if best[j] == i and u[j] >= tau]
            for x in (1, 2):
                w, own = ([slots[j][3] for j in js], slots[i][3]) if count else ([u[j] for j in js], 1)
                new[i][x] = (own * slots[i][x] + sum((a * slots[j][x] for a, j in zip(w, js)), np.zeros(D))) / (own + sum(w) if count else 1 + len(js))
            new[i][3] += sum(slots[j][3] for j in js)
        slots, sums = [new[i] for i in keep], [sums[i] for i in keep]
    return slots, tau


@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("step", [1, 4, 40])
def test_a_stream_in_plain_loops(step, count):
    s, m, beta = state(*raw()), 9, .3
    cache = MergingCache(H2O, m, beta=beta, weights="count" if count else "similarity", count=count)
    for part in torch.arange(T).split(step): cache.update(0, s.keys[:, :, part], s.values[:, :, part], s.positions[:, :, part], queries=s.queries[:, :, part])
    keys, values, slots = cache.layers[0].rectangle()
    for b, h in np.ndindex(B, H):
        want, tau = replay(s.queries[b, h * G:(h + 1) * G].numpy(), s.keys[b, h].numpy(), s.values[b, h].numpy(), m, step, beta, count)
        assert slots[b, h].tolist() == [w[0] for w in want]
        for got, x in ((keys, 1), (values, 2)): np.testing.assert_allclose(got[b, h], [w[x] for w in want], atol=1e-9)
        np.testing.assert_allclose(cache.counts[0][b, h], [w[3] for w in want])
        np.testing.assert_allclose(cache.thresholds[0][b, h], tau, atol=1e-9)


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    return TinyLM(11, dim=16, depth=2, heads=4, kv_heads=2, std=.3).double().eval()


@torch.no_grad()
def reads(lm, cache, tokens, step=5, at=None): return torch.cat([lm(part, cache, positions=None if at is None else p) for part, p in zip(tokens.split(step, 1), (tokens if at is None else at).split(step, 1))], 1)


def test_cache_limits(lm):
    tokens = torch.randint(11, (3, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): close(reads(lm, MergingCache(H2O, 30, count=True), tokens), lm(tokens))
    strict, evict = MergingCache(H2O, 9, threshold=2.), EvictingCache(H2O, 9)
    assert torch.equal(reads(lm, strict, tokens), reads(lm, evict, tokens)) and strict.nbytes == evict.nbytes and strict.merged == 0
    for weights in WEIGHTS:
        cache = MergingCache(H2O, torch.tensor([9, 6]).view(2, 1, 1), weights=weights)
        assert reads(lm, cache, tokens).isfinite().all() and cache.stored.tolist() == [[[9] * 2] * 3, [[6] * 2] * 3] and cache.left == 3 * 2 * (21 + 24) and 0 < cache.merged < cache.left


def test_cache_rows_and_padding(lm):
    tokens = torch.randint(11, (2, 30), generator=torch.Generator().manual_seed(2))
    at = torch.arange(30).expand(2, 30).clone(); at[1] -= 7; at[1, :7] = -1
    both = reads(lm, MergingCache(H2O, 8, count=True, weights="count"), tokens, at=at)
    close(both[:1], reads(lm, MergingCache(H2O, 8, count=True, weights="count"), tokens[:1]))
    cut = [tokens[1:, 7:10], *tokens[1:, 10:].split(5, 1)]
    with torch.no_grad(): close(both[1:, 7:], torch.cat([lm(part, c) for c in [MergingCache(H2O, 8, count=True, weights="count")] for part in cut], 1))


def test_counts_are_counted_in_bytes(lm):
    tokens = torch.randint(11, (1, 30), generator=torch.Generator().manual_seed(3))
    a, b = MergingCache(H2O, 8), MergingCache(H2O, 8, count=True)
    reads(lm, a, tokens), reads(lm, b, tokens)
    assert b.nbytes - a.nbytes == 2 * 2 * 8 * 8                                        # layers, heads, slots, bytes of a float64
    assert all((c.sum(2) <= 30).all() and (c >= 1).all() for c in b.counts.values())


def test_cache_errors():
    for bad, match in ((dict(budget=0), "budget"), (dict(budget=4, threshold=None), "threshold"), (dict(budget=4, threshold=math.nan), "threshold"), (dict(budget=4, beta=2), "beta"), (dict(budget=4, weights="mean"), "weights"), (dict(budget=torch.ones(2)), "budget"), (dict(budget=4, queries=8), "options must be the score's, got queries"), (dict(budget=4, base=1e3, consecutive=True), "got base, consecutive of")):
        with pytest.raises(ValueError, match=match): MergingCache(H2O, **bad)


@pytest.mark.parametrize("scaled", [True, False])
def test_budgets_by_variance(scaled):
    lengths = torch.tensor([40, 33, 21])
    at = torch.where(torch.arange(T) < lengths.view(3, 1), torch.arange(T), -1)
    states = [state(*raw(seed), at) for seed in (0, 10, 20)]
    variance = attention_variance(states, scaled)
    for b in range(B): close(attention_variance([row(s, b) for s in states], scaled)[:, 0], variance[:, b])
    close(attention_variance([state(*(t[1:2, :, :33] for t in raw(seed))) for seed in (0, 10, 20)], scaled)[:, 0], variance[:, 1])   # padding
    masks = replace(H2O, allocate=partial(by_variance, variance=variance))(states, .25)
    assert sum(m.sum((1, 2)) for m in masks).tolist() == [3 * H * (n // 4) for n in lengths.tolist()]
    whole = d2o(states, .25, scaled=scaled)
    assert all(torch.equal(keep, m) for (keep, _), m in zip(whole, masks))
    equal = by_variance([torch.zeros(1, 2, 50)] * 3, torch.full((3, 1, 2), 7), torch.full((3, 1), 4.))
    assert equal.flatten().tolist() == [7] * 6                                        # layers alike: nothing changes
    assert H2O.allocate is uniform


@rules
def test_nan_in_empty_slots(weights):
    "Padding on the left that holds NaN: nothing of it reaches what stays, nor does what leaves without being merged."
    k, v, at = normal(2, 2, 12, D, seed=1), normal(2, 2, 12, D, seed=2), torch.arange(12).expand(2, 2, 12).clone()
    at[1] -= 4; at[1, :, :4] = -1
    keep = (at >= 0) & (torch.arange(12) % 3 == 0)
    holes = (at < 0).unsqueeze(3)
    pairs = nearest_kept(k.masked_fill(holes, math.nan), keep, at)
    assert (pairs.gone[1] < 0).any() and (pairs.gone[0] >= 0).all()
    for tau in (-math.inf, .3):
        got, want = merge_pairs(k.masked_fill(holes, math.nan), v.masked_fill(holes, math.nan), pairs, tau, weights), merge_pairs(k, v, nearest_kept(k, keep, at), tau, weights)
        alone = merge_pairs(k[1:, :, 4:], v[1:, :, 4:], nearest_kept(k[1:, :, 4:], keep[1:, :, 4:], at[1:, :, 4:]), tau, weights)
        for a, b, c in zip(got[:3], want[:3], alone[:3]):
            assert a[keep].isfinite().all() and torch.equal(a[keep], b[keep])
            close(a[1:][keep[1:]], c[keep[1:, :, 4:]])
    values = v.clone()
    b, h, j = ((pairs.similarity < .3) & (pairs.gone >= 0)).nonzero()[0].tolist()
    values[b, h, pairs.gone[b, h, j]] = math.nan                                      # leaves, and is not merged
    assert merge_pairs(k, values, nearest_kept(k, keep, at), .3, weights).values[keep].isfinite().all()


@pytest.mark.parametrize("dtype, steps", [(torch.bfloat16, [250] + [1] * 50 + [300]), (torch.float16, [2000] + [1] * 100 + [900])])
def test_counts_do_not_stop_in_half_precision(dtype, steps):
    "256 + 1 is 256 in bfloat16, and 2,048 + 1 is 2,048 in float16."
    tokens, cache = torch.ones(1, 1, sum(steps), 4, dtype=dtype), MergingCache(H2O, 2, .9, weights="count", count=True)
    for part in torch.arange(sum(steps)).split(steps): keys, values, _, bias = cache.update(0, tokens[:, :, part], tokens[:, :, part], part.view(1, 1, -1), queries=tokens[:, :, part])
    assert keys.dtype == values.dtype == dtype and cache.layers[0].keys.dtype == dtype and bias.isfinite().all()
    assert cache.counts[0].dtype == torch.float32 and cache.counts[0].sum() == sum(steps) == {torch.bfloat16: 600, torch.float16: 3000}[dtype]
    assert (keys == 1).all() and (values == 1).all() and cache.nbytes == cache.layers[0].nbytes + 2 * 4   # two slots, a float32 each
