"""Two stages: a pyramid against a loop with masks, pooled budgets against sorting, a cache in two parts against a diary; padding, low precision, edge cases, bad input."""
import itertools
import math

import pytest
import torch

from deepclustering.core.tinylm import Attention, State, TinyLM, attention_weights, rotate
from deepclustering.kv.eviction import H2O, EvictingCache, Looked, Random, SnapKV, snapkv_score
from deepclustering.kv.ragged import RaggedCaches
from deepclustering.kv.stages import DynamicKV, PyramidInfer, ScopeCache, dynamic_budgets, pivotal_score, pyramid_lengths, pyramid_prefill, pyramid_shares

B, H, G, T, D = 2, 2, 2, 33, 4


def model(depth=3, shift=True, seed=0):
    torch.manual_seed(seed)
    return TinyLM(13, dim=16, depth=depth, heads=G * H, kv_heads=H, head_dim=D, std=.3, shift=shift).double().eval()


WORDS = torch.randint(13, (B, T), generator=torch.Generator().manual_seed(7))


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(n=21, seed=1, dtype=torch.float64):
    at = torch.arange(n)
    q, k, v = normal(B, G * H, n, D, seed=seed), normal(B, H, n, D, seed=seed + 1), normal(B, H, n, D, seed=seed + 2)
    q, k = (rotate(t, at).to(dtype) for t in (q, k))
    return State(q, k, v.to(dtype), at.expand(B, H, n), attention_weights(q, k, (at <= at.unsqueeze(1))[None, None]))


# --- PyramidInfer -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("R, newest", [(1, 1.2), (4, 1.2), (5, 1.), (7, 3.)])
def test_votes_against_loops(R, newest):
    s = state()
    A, got = s.attention.tolist(), pivotal_score(s, R, newest)
    for b in range(B):
        for i in range(21 - R):
            total = 0
            for j in range(R):
                weight = 1 + (newest - 1) * (j / (R - 1) if R > 1 else 0)              # torch.linspace(1, newest, R), as the authors write it
                total += weight * sum(A[b][h][21 - R + j][i] for h in range(G * H)) / (G * H)
            assert got[b, :, i].tolist() == pytest.approx([total / R] * H, rel=1e-12)
        assert got[b, :, 21 - R:].isinf().all()
    mean = s.attention[:, :, -R:, :21 - R].mean((1, 2))
    torch.testing.assert_close(pivotal_score(s, R, 1.)[:, 0, :21 - R], mean)               # all weights one: the mean


def test_votes_of_each_rows_window():
    s = state()
    both = pivotal_score(s, torch.tensor([3, 6]))
    assert torch.equal(both[0], pivotal_score(s, 3)[0]) and torch.equal(both[1], pivotal_score(s, 6)[1])


def test_shares_against_the_program():
    "Lengths as the program multiplies them, before rounding."
    for depth, decay in itertools.product((1, 2, 5, 32), (.3, .9, 1.)):
        context, expected = 1., []
        for l in range(depth):
            expected.append(context)
            context *= (1 - decay) * (math.cos(math.pi * l / depth) + 1) / 2 + decay
        assert pyramid_shares(depth, decay) == pytest.approx(expected, rel=1e-12)
        assert pyramid_shares(depth, decay, "constant") == pytest.approx([decay**l for l in range(depth)], rel=1e-12)
    assert all(a >= b > 0 for a, b in itertools.pairwise(pyramid_shares(32, .9)))


def looped(lm, words, shares, recent=5, sinks=4, newest=1.2):
    "One row, plain loops: every token in every layer, those that did not survive hidden; logits of the last and what each layer keeps."
    n, alive, kept = len(words), list(range(len(words))), []
    x = [lm.embed.weight[w] + (lm.shift.weight[words[i - 1]] if i and lm.shift is not None else 0) for i, w in enumerate(words)]
    R = n // recent + 1
    for l, block in enumerate(lm.blocks):
        a, W = block.attention, lambda p, y: p.weight @ y
        y = [block.norm1(v) for v in x]
        q, k, v = ([W(p, t).view(-1, D) for t in y] for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = ([rotate(t[i].unsqueeze(1), torch.tensor([[i]]))[:, 0] for i in range(n)] for t in (q, k))
        kept.append(list(alive))
        votes, out = [0.] * n, []
        for i in range(n):
            heads = []
            for h in range(G * H):
                seen = [j for j in alive if j <= i] or [i]
                weights = torch.softmax(torch.stack([q[i][h] @ k[j][h // G] / math.sqrt(D) for j in seen]), 0)
                heads.append(sum(w * v[j][h // G] for w, j in zip(weights, seen)))
                if i >= n - R:
                    for w, j in zip(weights.tolist(), seen): votes[j] += w * (1 + (newest - 1) * (i - n + R) / max(R - 1, 1)) / (G * H) / R
            out.append(torch.cat(heads))
        x = [x[i] + W(a.o_proj, out[i]) for i in range(n)]
        x = [t + block.feed_forward(block.norm2(t)) for t in x]
        if l + 1 < len(shares):
            room = math.floor(round(shares[l + 1] * (n - R), 9))
            pool = sorted((j for j in alive if j < n - R), key=lambda j: (j >= sinks, -votes[j] if j >= sinks else 0, j))
            alive = sorted(pool[:room]) + list(range(n - R, n))
    return lm.head(lm.norm(x[-1])), kept


@torch.no_grad()
@pytest.mark.parametrize("shift", [True, False])
def test_prefill_against_loops(shift):
    lm, shares, cache = model(shift=shift), [1, .5, .25], RaggedCaches()
    logits, lengths = pyramid_prefill(lm, WORDS, shares, cache)
    for b in range(B):
        expected, kept = looped(lm, WORDS[b].tolist(), shares)
        torch.testing.assert_close(logits[b], expected, rtol=1e-10, atol=1e-10)
        assert [cache.layers[l].rectangle()[2][b, h].tolist() for l in range(3) for h in range(H)] == [kept[l] for l in range(3) for _ in range(H)]
    assert lengths.tolist() == [[33] * B, [7 + 13] * B, [7 + 6] * B]
    assert cache.seen.tolist() == [T] * B and cache.last.tolist() == WORDS[:, -1].tolist()
    assert sum(layer.stored for layer in cache.layers.values()) == int(lengths.sum()) * H


@torch.no_grad()
def test_prefill_of_all_is_the_model():
    lm = model()
    for cache in (None, RaggedCaches(), EvictingCache(H2O, T)):
        logits, lengths = pyramid_prefill(lm, WORDS, [1, 1, 1], cache)
        torch.testing.assert_close(logits, lm(WORDS)[:, -1], rtol=1e-12, atol=1e-12)
        assert lengths.unique().tolist() == [T]
        if cache is not None: torch.testing.assert_close(lm(WORDS[:, :1], cache), lm(torch.cat([WORDS, WORDS[:, :1]], 1))[:, -1:], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_prefill_rows_and_padding():
    lm, shares = model(), [1, .6, .3]
    at = torch.cat([torch.full((1, 8), -1), torch.arange(25).view(1, -1)], 1)
    for where, inside in ((at, slice(8, 33)), (torch.cat([at[:, 8:], at[:, :8]], 1), slice(0, 25))):
        both = RaggedCaches()
        logits, lengths = pyramid_prefill(lm, WORDS, shares, both, torch.cat([torch.arange(T).view(1, -1), where]))
        for b, part in ((0, slice(0, T)), (1, inside)):
            alone = RaggedCaches()
            expected, n = pyramid_prefill(lm, WORDS[b:b + 1, part], shares, alone)
            torch.testing.assert_close(logits[b], expected[0], rtol=1e-10, atol=1e-10)
            assert lengths[:, b].tolist() == n[:, 0].tolist()
            for l in range(3): assert [p for p in both.layers[l].rectangle()[2][b, 0].tolist() if p >= 0] == alone.layers[l].rectangle()[2][0, 0].tolist()


@torch.no_grad()
def test_prefill_small_and_low_precision():
    lm = model()
    one, lengths = pyramid_prefill(lm, WORDS[:, :1], [1, .5, .5])
    torch.testing.assert_close(one, lm(WORDS[:, :1])[:, 0]); assert lengths.unique().tolist() == [1]
    single = lm.float()
    caches = RaggedCaches(), RaggedCaches()
    a, b = pyramid_prefill(single, WORDS, [1, .7, .5], caches[0])[0], pyramid_prefill(model(), WORDS, [1, .7, .5], caches[1])[0]
    assert all(torch.equal(c.rectangle()[2], d.rectangle()[2]) for c, d in zip(caches[0].layers.values(), caches[1].layers.values()))
    torch.testing.assert_close(a, b.float())                                          # as float32 allows
    assert pyramid_prefill(model().bfloat16(), WORDS, [1, .7, .5])[0].isfinite().all()


def test_prefill_gives_no_gradient(): assert not pyramid_prefill(model(), WORDS, [1, .5, .5])[0].requires_grad


# --- DynamicKV ----------------------------------------------------------------------------------------------------------

def sorted_budgets(scores, base, H):
    "Count by sorting one row's (score, layer) pairs; largest remainders."
    L = len(scores)
    pool = sorted(((-float(x), l, h, i) for l, s in enumerate(scores) for h, row in enumerate(s) for i, x in enumerate(row) if math.isfinite(x)))
    c = [sum(l == layer for _, l, *_ in pool[:base * L * H]) for layer in range(L)]
    m = [x // H for x in c]
    for l in sorted(range(L), key=lambda l: (-(c[l] % H), l))[:base * L - sum(m)]: m[l] += 1
    return m


@pytest.mark.parametrize("L, heads, ties", [(1, 2, False), (2, 1, False), (5, 3, False), (4, 2, True), (7, 3, True)])
def test_one_update_is_a_sort(L, heads, ties):
    scores = [normal(3, heads, 17, seed=l) * (1 + l) for l in range(L)]
    if ties: scores = [s.round() for s in scores]
    for base in (1, 4, 11):
        got, peak = dynamic_budgets(scores, torch.full((L, 3, heads), base), every=L, most=17, return_peak=True)
        for b in range(3): assert got[:, b].tolist() == [[m] * heads for m in sorted_budgets([s[b] for s in scores], base, heads)]
        assert peak.tolist() == [17 * L] * 3 and (base > 1 or L < 3 or ties or got.unique().numel() > 1)


@pytest.mark.parametrize("every", [1, 2, 3, 8])
@pytest.mark.parametrize("most", [1, 2.5, 10])
def test_totals_and_peaks(every, most):
    L, n, w = 8, 40, 3
    scores = [torch.nn.functional.pad(normal(2, 2, n - w, seed=l) * (9 - l), (0, w), value=math.inf) for l in range(L)]
    for base in (1, 4, 37):
        counts = torch.full((L, 2, 2), base + w)
        got, peak = dynamic_budgets(scores, counts, every, most, return_peak=True)
        assert got.sum(0).tolist() == counts.sum(0).tolist() and int(got.min()) >= w and int(got.max()) <= min(int(most * base), n - w) + w
        assert int(peak.max()) <= min(L * (base + w) + every * (int(most * base)), L * n) and int(peak.min()) >= int(got.sum(0).max())
        if most == 1 or base == 37: assert torch.equal(got, counts)                        # no room to differ: uniform
    assert dynamic_budgets(scores, torch.full((L, 2, 2), 7), 3)[0, 0, 0] > 7 > dynamic_budgets(scores, torch.full((L, 2, 2), 7), 3)[7, 0, 0]


def test_trimming_is_final():
    "What an early update drops does not come back: m matters."
    a = torch.tensor([[[.9, .8, .7, .1]]]); b = torch.tensor([[[1., 1., 1., 1.]]]); c = torch.tensor([[[0., 0., 0., 0.]]])
    counts = torch.full((3, 1, 1), 1)
    assert dynamic_budgets([a, b, c], counts, every=3).flatten().tolist() == [0, 3, 0] and dynamic_budgets([a, c, b], counts, every=1, most=2).flatten().tolist() == [1, 0, 2]


def test_the_same_everywhere_is_uniform():
    s = state()
    for budget in (9, 13): assert all(torch.equal(x, y) for x, y in zip(DynamicKV([s] * 3, budget, window_size=4), SnapKV([s] * 3, budget, window_size=4)))


def test_rows_have_their_own_budgets():
    scores = [torch.stack([normal(2, 9, seed=1), normal(2, 9, seed=2) * 9]), torch.stack([normal(2, 9, seed=3) * 9, normal(2, 9, seed=4)])]
    counts = torch.tensor([[[3, 3], [2, 2]], [[3, 3], [2, 2]]])
    got = dynamic_budgets(scores, counts)
    assert got[0, 0, 0] < got[1, 0, 0] and got[0, 1, 0] > got[1, 1, 0] and got.sum(0).tolist() == [[6, 6], [4, 4]]
    for b in range(2): assert torch.equal(got[:, b:b + 1], dynamic_budgets([s[b:b + 1] for s in scores], counts[:, b:b + 1]))


# --- SCOPE --------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("strategy, interval", [("slide", 15), ("adaptive", 3), ("discontinuous", 4), ("adaptive", 1)])
def test_scope_against_a_diary(strategy, interval):
    "A layer's slots as lists; the attention of the newest query chooses, computed again from what the lists say."
    lm, P, heavy, recent = model(depth=1), 9, 4, 3
    cache, attention = ScopeCache(heavy, recent, strategy, interval), lm.blocks[0].attention
    x = lm.blocks[0].norm1(lm.embed(WORDS) + torch.cat([torch.zeros(B, 1, 16).double(), lm.shift(WORDS[:, :-1])], 1))
    q, k = (rotate(p(x).unflatten(-1, (-1, D)).transpose(1, 2), torch.arange(T)) for p in (attention.q_proj, attention.k_proj))
    lm(WORDS[:, :P], cache)
    diary, chosen = {(b, h): list(range(P)) for b in range(B) for h in range(H)}, 0
    for t in range(P, T):
        lm(WORDS[:, t:t + 1], cache)
        step = t - P + 1
        room = recent + (heavy if strategy == "slide" else min(heavy, (step - 1) // interval))
        dropped = False
        for (b, h), slots in diary.items():
            slots.append(t)
            if strategy == "discontinuous" and step % interval: continue
            looked = sum(torch.softmax(torch.stack([q[b, g, t] @ k[b, h, p] / 2 for p in slots]), 0) for g in range(h * G, (h + 1) * G))
            weight = dict(zip(slots, looked.tolist()))
            written = [p for p in slots if p >= P]
            if len(written) > room:
                best = sorted(written[:-recent], key=lambda p: (-weight[p], p))[:room - recent]
                diary[b, h], dropped = [p for p in slots if p < P or p in best or p in written[-recent:]], True
        chosen += dropped
        held = cache.layers[0].rectangle()[2]
        for (b, h), slots in diary.items(): assert held[b, h].tolist() == slots
    assert cache.selections == chosen > 0 and cache.stored.tolist() == [[[len(diary[b, h]) for h in range(H)] for b in range(B)]]


@torch.no_grad()
def test_an_interval_of_one_is_slide():
    lm = model()
    outs = []
    for strategy in ("slide", "adaptive", "discontinuous"):
        cache = ScopeCache(5, 2, strategy, 1)
        outs.append(torch.cat([lm(WORDS[:, :10], cache)] + [lm(w, cache) for w in WORDS[:, 10:].split(1, 1)], 1))
        assert cache.stored.unique().tolist() == [17]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2]) and (outs[0] - lm(WORDS)).abs().max() > 1e-3


@torch.no_grad()
def test_the_prompt_never_goes():
    lm = model()
    whole, cut = ScopeCache(0, 1), ScopeCache(2, 2, "discontinuous", 4, method=H2O, budget=6)
    for cache, n in ((whole, 12), (cut, 6)):
        lm(WORDS[:, :12], cache)
        before = [layer.rectangle()[2].clone() for layer in cache.layers.values()]
        assert cache.stored.unique().tolist() == [n]
        for word in WORDS[:, 12:].split(1, 1): lm(word, cache)
        assert all(torch.equal(layer.rectangle()[2][..., :n], b) for layer, b in zip(cache.layers.values(), before))
    assert whole.stored.unique().tolist() == [13] and whole.layers[0].rectangle()[2][0, 0, -1] == T - 1


@torch.no_grad()
def test_scope_rows_with_padding():
    "A short prompt beside a long one, and a row that has ended."
    lm, at = model(), torch.arange(12).repeat(B, 1)
    at[1, 9:] = -1
    both, alone = ScopeCache(2, 2, "adaptive", 2), ScopeCache(2, 2, "adaptive", 2)
    lm(WORDS[:, :12], both, at), lm(WORDS[1:, :9], alone)
    for t in range(12, 24):
        torch.testing.assert_close(lm(WORDS[:, t:t + 1], both)[1], lm(WORDS[1:, t:t + 1], alone)[0], rtol=1e-10, atol=1e-10)
    assert both.ends[0].tolist() == [11, 8] and both.stored[:, :, 0].tolist() == [[16, 13]] * 3
    held, step = both.layers[0].rectangle()[2][1].clone(), both.selections
    lm(WORDS[:, 24:25], both, torch.tensor([[24], [-1]]))
    assert torch.equal(both.layers[0].rectangle()[2][1], held) and both.selections == step + 3


@torch.no_grad()
def test_bytes_go_back():
    lm, scope, full = model(), ScopeCache(3, 3), RaggedCaches()
    for cache in (scope, full):
        lm(WORDS[:, :12], cache)
        for word in WORDS[:, 12:].split(1, 1): lm(word, cache)
    tables = 2 * B * H * 3 * 8
    assert scope.nbytes == 3 * B * H * 18 * scope.layers[0].slot_bytes + tables < full.nbytes


@torch.no_grad()
def test_a_pyramid_then_scope():
    lm, cache = model(), ScopeCache(2, 3)
    pyramid_prefill(lm, WORDS[:, :25], [1, .5, .3], cache)
    for word in WORDS[:, 25:].split(1, 1): lm(word, cache)
    assert cache.stored[:, 0, 0].tolist() == [25 + 5, 6 + 9 + 5, 6 + 5 + 5] and cache.seen.tolist() == [T] * B


# --- bad input ----------------------------------------------------------------------------------------------------------

def test_bad_input():
    lm, s, used = model(), state(), RaggedCaches()
    lm(WORDS, used)
    scores, counts = [normal(B, H, 9)] * 3, torch.full((3, B, H), 4)
    for message, call in {"window_size must be a whole number at least 1, got 2.5": lambda: pivotal_score(s, 2.5), "newest must be at least 0, got nan": lambda: pivotal_score(s, 3, float("nan")), "depth must be": lambda: pyramid_shares(0), "decay must be above 0 and at most 1, got 1.5": lambda: pyramid_shares(2, 1.5),
                          "strategy must be cosine or constant": lambda: pyramid_shares(2, .5, "step"), "shares must start at 1": lambda: pyramid_prefill(lm, WORDS, [.5, .5, .5]), "shares must be 3, one for each layer, got 2": lambda: pyramid_prefill(lm, WORDS, [1, .5]),
                          "may only fall": lambda: pyramid_lengths(torch.tensor([9]), [1, .2, .3]), "cache must be empty": lambda: pyramid_prefill(lm, WORDS, [1, 1, 1], used), "budget must cover what is protected": lambda: pyramid_prefill(lm, WORDS, [1, .1, .1]), "tokens must be": lambda: pyramid_prefill(lm, WORDS.double(), [1, 1, 1]),
                          "every must be at least 1": lambda: dynamic_budgets(scores, counts, 0), "most must be at least 1": lambda: dynamic_budgets(scores, counts, most=0), "counts must be the same for all heads": lambda: dynamic_budgets(scores, counts + torch.arange(H)),
                          "budget must cover what is protected, got 2 rows of layers where it is up to 1 slots short": lambda: DynamicKV([s], 3, window_size=4), "strategy must be slide, adaptive or discontinuous, got None": lambda: ScopeCache(1, 1, None), "heavy must be": lambda: ScopeCache(.5, 1), "recent must be at least 1": lambda: ScopeCache(1, 0),
                          "interval must be": lambda: ScopeCache(1, 1, interval=0), "method and budget must be given together, got None and 3": lambda: ScopeCache(1, 1, budget=3), "scores must not be NaN": lambda: dynamic_budgets([x * torch.nan for x in scores], counts)}.items():
        with pytest.raises(ValueError) as error: call()
        assert message in str(error.value)
