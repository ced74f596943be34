"""Eviction: scores against loops over the definitions of kvpress and the authors' programs, streaming caches against masked models and a diary of each slot, grouped queries, padding, dtypes."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepclustering.core.tinylm import Attention, Cache, State, TinyLM, attend, attention_weights, rotate
from deepclustering.kv import RaggedCache
from deepclustering.kv.eviction import (H2O, TOVA, EvictingCache, ExpectedAttention, KeyDiff, Looked, Method, SnapKV, StreamingLLM, close_gaps, expected_attention_score, group_scores, h2o_score, key_norm_score, keydiff_score,
                                        query_positions, random_score, snapkv_score, tova_score)

B, H, G, T, D = 2, 2, 3, 21, 6


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def prompt():
    "State of a prompt, and its queries before they were turned."
    q, k, v = normal(B, G * H, T, D, seed=1), normal(B, H, T, D, seed=2), normal(B, H, T, D, seed=3)
    at = torch.arange(T)
    keys = rotate(k, at)
    slots = at.expand(B, H, T)
    return State(rotate(q, at), keys, v, slots, attention_weights(rotate(q, at), keys, (at <= at.unsqueeze(1))[None, None])), q


def test_scores_against_loops(prompt):
    s, _ = prompt
    A, K = s.attention.numpy(), s.keys.numpy()
    w = 4
    for b, h in itertools.product(range(B), range(H)):
        group = range(h * G, (h + 1) * G)
        np.testing.assert_allclose(h2o_score(s)[b, h], [np.mean([sum(A[b, g, t, i] for t in range(T)) for g in group]) for i in range(T)], rtol=1e-12)
        np.testing.assert_allclose(tova_score(s)[b, h], [np.mean([A[b, g, T - 1, i] for g in range(G * H)]) for i in range(T)], rtol=1e-12)
        anchor = np.mean([K[b, h, i] / np.linalg.norm(K[b, h, i]) for i in range(T)], 0)
        np.testing.assert_allclose(keydiff_score(s)[b, h], [-K[b, h, i] @ anchor / np.linalg.norm(K[b, h, i]) / np.linalg.norm(anchor) for i in range(T)], rtol=1e-10)
        np.testing.assert_allclose(key_norm_score(s)[b, h], [-math.sqrt(sum(x * x for x in K[b, h, i])) for i in range(T)], rtol=1e-12)
        for c, pooling in ((1, "avg"), (3, "avg"), (5, "avg"), (5, "max")):
            voted = {g: [sum(A[b, g, t, i] for t in range(T - w, T)) for i in range(T - w)] for g in group}
            def near(g, i): return [voted[g][j] for j in range(i - c // 2, i + c // 2 + 1) if 0 <= j < T - w]
            score = [np.mean([(sum(near(g, i)) / c if pooling == "avg" else max(near(g, i))) for g in group]) for i in range(T - w)]
            np.testing.assert_allclose(snapkv_score(s, w, c, pooling)[b, h], [*score, *[math.inf] * w], rtol=1e-12)


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("n_sink", [0, 4])
def test_expected_attention_against_loops(prompt, covariance, n_sink):
    "As kvpress writes it: statistics of the queries before turning, turned by the mean of matrices, softmax over all but the first slots."
    s, q = prompt
    ahead, speed = 7, 1e4 ** (-np.arange(D // 2) / (D // 2))
    R = np.zeros((D, D))
    for m in range(T, T + ahead):
        c, z = np.diag(np.cos(m * speed)), np.diag(np.sin(m * speed))
        R += np.block([[c, -z], [z, c]]) / ahead
    got = expected_attention_score(s, ahead, n_sink, covariance)
    for b, h in itertools.product(range(B), range(H)):
        shares = []
        for g in range(h * G, (h + 1) * G):
            rows = q[b, g, n_sink:].numpy()
            mu, sigma = R @ rows.mean(0), R @ np.cov(rows.T, bias=True) @ R.T
            z = np.array([k @ mu / math.sqrt(D) + covariance * (k @ sigma @ k) / D / 2 for k in s.keys[b, h, n_sink:].numpy()])
            shares.append(np.exp(z - z.max()) / np.exp(z - z.max()).sum())
        np.testing.assert_allclose(got[b, h, n_sink:], np.mean(shares, 0) * np.linalg.norm(s.values[b, h, n_sink:].numpy(), axis=1), rtol=1e-9)
        assert (got[b, h, :n_sink] == math.inf).all()
    test = expected_attention_score(s, ahead, n_sink, covariance, value_norm=False)
    np.testing.assert_allclose(test[..., n_sink:].sum(2), 1, rtol=1e-12)


def test_streaming_is_kvpress_on_exact_ratios(prompt):
    s, _ = prompt
    s = State(*(t[:, :, :16] for t in s[:4]), s.attention[..., :16, :16])
    for gone in (.25, .5, .625):
        theirs = torch.ones(16).bool()
        theirs[4:4 + 16 - int(16 * (1 - gone))] = False
        assert torch.equal(StreamingLLM([s], compression_ratio=gone)[0], theirs.expand(B, H, 16))


def test_groups_and_where_queries_stand(prompt):
    x = torch.arange(12.).view(1, 6, 2)
    assert group_scores(x, 2).tolist() == [[[2, 3], [8, 9]]] and group_scores(x, 3, "max").tolist() == [[[2, 3], [6, 7], [10, 11]]] and group_scores(x, 1, "sum").tolist() == [[[30, 36]]]
    s, _ = prompt
    assert query_positions(s).tolist() == [list(range(T))] * B
    assert query_positions(s._replace(queries=s.queries[:, :, :3])).tolist() == [[T - 3, T - 2, T - 1]] * B          # the newest three
    context = State(s.queries, *(t[:, :, :15] for t in s[1:4]), s.attention[..., :15])                              # a context of 15 and 6 questions
    assert query_positions(context).tolist() == [list(range(T))] * B
    scores = snapkv_score(context, 6, 1)
    torch.testing.assert_close(scores, group_scores(s.attention[:, :, 15:, :15].sum(2), H)); assert scores.isfinite().all()
    assert snapkv_score(context, 8, 1)[..., -2:].isinf().all() and snapkv_score(context, 8, 1)[..., :-2].isfinite().all()   # two tokens of the context are in a window of 8
    torch.testing.assert_close(tova_score(context)[:, 0], s.attention[:, :, -1, :15].mean(1))


def test_random_is_seeded(prompt):
    s, _ = prompt
    assert torch.equal(random_score(s, 3), random_score(s, 3)) and not torch.equal(random_score(s, 3), random_score(s, 4))
    goes_on = torch.Generator().manual_seed(3)
    masks = Method("random", random_score)([s, s], 9, random_state=goes_on)
    assert not torch.equal(*masks)


# --- streams ------------------------------------------------------------------------------------------------------------

def model(attention=None, depth=2):
    torch.manual_seed(0)
    return TinyLM(13, dim=24, depth=depth, heads=G * H, kv_heads=H, head_dim=4, std=.3, attention=attention).double().eval()


def stream(lm, tokens, cache, at_once=1): return torch.cat([lm(part, cache) for part in tokens.split(at_once, 1)], 1)


WORDS = torch.randint(13, (B, 30), generator=torch.Generator().manual_seed(7))


class Sliding(Attention):
    "Sees itself, the first four and the six before it, by a mask over everything."
    def forward(self, x, positions, **context):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        back = positions.mT - positions
        visible = (back >= 0) & ((back <= 6) | (positions < 4))
        return self.o_proj(attend(rotate(q, positions), rotate(k, positions), v, visible[None, None]).transpose(1, 2).flatten(2))


class Near(Attention):
    "The same, with the first four moved up to stand before the others: StreamingLLM's positions within the cache."
    def forward(self, x, positions, **context):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = []
        for t in range(x.shape[1]):
            seen = [s for s in range(t + 1) if s < 4 or s >= t - 6]
            place = torch.arange(t + 1 - len(seen), t + 1)
            out.append(attend(rotate(q[:, :, t:t + 1], torch.tensor([t])), rotate(k[:, :, seen], place), v[:, :, seen], torch.ones(1, 1, 1, len(seen), dtype=torch.bool)))
        return self.o_proj(torch.cat(out, 2).transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("twin, consecutive", [(Sliding, False), (Near, True)])
def test_streaming_llm_is_a_mask(twin, consecutive):
    lm, masked = model(), model(lambda dim: twin(dim, G * H, H, 4, std=.3))
    masked.load_state_dict(lm.state_dict())
    cache = EvictingCache(StreamingLLM, 10, consecutive=consecutive)
    torch.testing.assert_close(stream(lm, WORDS, cache), masked(WORDS), rtol=1e-10, atol=1e-10)
    assert (masked(WORDS) - lm(WORDS))[:, 12:].abs().max() > 1e-3
    assert cache.seen.tolist() == [30] * B and cache.stored.tolist() == [[[10] * H] * B] * 2
    slots = B * H * 10 * 2
    assert cache.nbytes == slots * cache.layers[0].slot_bytes + 2 * B * H * 2 * 8       # kept slots, and the tables of starts and lengths


@torch.no_grad()
def test_h2o_against_a_diary():
    "Each head's slots as a dict from position to the attention received so far; half of the room for the newest."
    lm, cache, room = model(depth=1), EvictingCache(H2O, 7), 7
    block = lm.blocks[0].attention
    x = lm.blocks[0].norm1(lm.embed(WORDS) + torch.cat([torch.zeros(B, 1, 24).double(), lm.shift(WORDS[:, :-1])], 1))
    q, k = (rotate(p(x).unflatten(-1, (-1, 4)).transpose(1, 2), torch.arange(30)) for p in (block.q_proj, block.k_proj))
    diary = {(b, h): {} for b in range(B) for h in range(H)}
    for t in range(30):
        lm(WORDS[:, t:t + 1], cache)
        for (b, h), slots in diary.items():
            slots[t] = 0.
            for g in range(h * G, (h + 1) * G):
                a = torch.softmax(torch.stack([q[b, g, t] @ k[b, h, p] / 2 for p in slots]), 0)
                for p, weight in zip(slots, a.tolist()): slots[p] += weight / G
            newest = sorted(slots)[-(room // 2):] if len(slots) > room else list(slots)
            heavy = sorted((p for p in slots if p not in newest), key=lambda p: (-slots[p], p))[:room - len(newest)]
            diary[b, h] = {p: slots[p] for p in sorted([*newest, *heavy])}
    kept = cache.layers[0].rectangle()[2]
    for (b, h), slots in diary.items():
        assert kept[b, h].tolist() == list(slots)
        torch.testing.assert_close(cache.sums[0][b, h], torch.tensor(list(slots.values())).double())


@torch.no_grad()
@pytest.mark.parametrize("method", [H2O, TOVA, SnapKV, ExpectedAttention, KeyDiff, StreamingLLM], ids=lambda m: m.name)
def test_room_for_all_changes_nothing(method):
    lm = model()
    for at_once in (1, 9, 30):
        cache = EvictingCache(method, 30, queries=5)
        torch.testing.assert_close(stream(lm, WORDS, cache, at_once), lm(WORDS), rtol=1e-10, atol=1e-10)
        assert cache.stored.tolist() == [[[30] * H] * B] * 2


@torch.no_grad()
@pytest.mark.parametrize("method", [H2O, TOVA, KeyDiff, SnapKV, ExpectedAttention], ids=lambda m: m.name)
def test_padding_in_a_stream(method):
    "A row that is padded on the right, then goes on, keeps what it keeps alone."
    lm, kw = model(), dict(window_size=3) if method is SnapKV else {}
    at = torch.arange(12).repeat(B, 1); at[1, 8:] = -1
    both, alone = (EvictingCache(method, 9, queries=4, **kw) for _ in range(2))
    lm(WORDS[:, :12], both, at); lm(WORDS[1:, :8], alone)
    if method is SnapKV: assert both.stored[:, 1].tolist() == alone.stored[:, 0].tolist() == [[8] * H] * 2
    for t in range(12, 30):
        torch.testing.assert_close(lm(WORDS[:, t:t + 1], both)[1], lm(WORDS[1:, t:t + 1], alone)[0], rtol=1e-9, atol=1e-9)
    assert both.seen.tolist() == [30, 26] and alone.seen.tolist() == [26]
    assert torch.equal(both.layers[1].rectangle()[2][1], alone.layers[1].rectangle()[2][0])


@torch.no_grad()
def test_budgets_of_layers_and_heads():
    lm, budget = model(), torch.tensor([[[9, 4]], [[5, 12]]])
    cache = EvictingCache(TOVA, budget)
    stream(lm, WORDS, cache, 4)
    assert cache.stored.tolist() == [[[9, 4]] * B, [[5, 12]] * B]
    assert EvictingCache(TOVA, torch.full((1, 1, 1), 6)).budget.shape == (1, 1, 1)
    one = EvictingCache(TOVA, torch.full((1, 1, 1), 6)); stream(lm, WORDS, one)
    assert one.stored.unique().tolist() == [6]
    masks = TOVA([lm(WORDS, return_states=True)[1][0]] * 2, budget)
    assert [m.sum(2).tolist() for m in masks] == [[[9, 4]] * B, [[5, 12]] * B]


def test_dropping_is_masking(prompt):
    s, _ = prompt
    for method, kw in ((H2O, {}), (SnapKV, dict(window_size=4)), (KeyDiff, {})):
        mask, = method([s], .4, **kw)
        cache = RaggedCache().append(s.keys, s.values).keep(mask)
        q = normal(B, G * H, 1, D, seed=9)
        full = F.scaled_dot_product_attention(q, s.keys, s.values, attn_mask=mask.repeat_interleave(G, 1).unsqueeze(2), enable_gqa=True)
        torch.testing.assert_close(cache.attend(q), full, rtol=1e-12, atol=1e-12)


def test_close_gaps():
    raw, at = normal(1, 2, 5, D, seed=4), torch.tensor([[[-1, 3, 9, 4, 20], [0, 1, 2, 3, 4]]])                       # not in order, one empty; and nothing to close
    keys, moved = close_gaps(rotate(raw, at), at)
    assert moved.tolist() == [[[-1, 17, 19, 18, 20], [0, 1, 2, 3, 4]]]
    torch.testing.assert_close(keys, rotate(raw, moved), rtol=1e-12, atol=1e-12)
    q = normal(1, 2, 1, D, seed=5)
    kvpress = rotate(raw[0, 0, [1, 3, 2, 4]], torch.arange(4))                                                        # theirs begin at 0: all distances are the same
    torch.testing.assert_close(rotate(q, torch.tensor([25]))[0, 0] @ keys[0, 0, [1, 3, 2, 4]].T, rotate(q, torch.tensor([8]))[0, 0] @ kvpress.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(prompt, dtype):
    s = State(*(t.to(dtype) if t.is_floating_point() else t for t in prompt[0][:4]), prompt[0].attention.float())
    for method, kw in ((H2O, {}), (TOVA, {}), (SnapKV, dict(window_size=4)), (ExpectedAttention, {}), (KeyDiff, {}), (StreamingLLM, {})):
        mask, = method([s], 8, **kw)
        assert mask.sum(2).unique().tolist() == [8]
        agree = (mask & method([prompt[0]], 8, **kw)[0]).sum() / mask.sum()
        assert agree >= (.9 if dtype == torch.bfloat16 else .99)


def test_empty_and_small():
    one = State(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, 1))
    none = one._replace(positions=torch.full((1, 1, 1), -1), attention=torch.zeros(1, 1, 1, 1))
    for method in (H2O, TOVA, SnapKV, ExpectedAttention, KeyDiff, StreamingLLM):
        assert method([one], .5)[0].tolist() == [[[True]]] and method([none], .5)[0].tolist() == [[[False]]]


@torch.no_grad()
def test_bad_input(prompt):
    s, lm = prompt[0], model()
    for message, call in {"window_size must be at least 1, got 0": lambda: SnapKV([s], 9, window_size=0), "kernel_size must be odd, got 2": lambda: SnapKV([s], 9, kernel_size=2), "pooling must be avg or max, got 'min'": lambda: SnapKV([s], 9, pooling="min"),
                          "n_future must be at least 1": lambda: ExpectedAttention([s], 9, n_future=0), "reduce must be mean, max or sum": lambda: H2O([s], 9, reduce="median"), "budget must cover what is protected, got 4 heads where it is up to 1 slots short": lambda: StreamingLLM([s], 3),
                          "budget must be a whole number at least 1, got 0.25": lambda: EvictingCache(H2O, .25), "queries must be at least 0, got -2": lambda: EvictingCache(H2O, 4, queries=-2), "random_state must be": lambda: random_score(s, -1)}.items():
        with pytest.raises(ValueError) as error: call()
        assert message in str(error.value)
    cache = EvictingCache(StreamingLLM, 3)
    stream(lm, WORDS[:, :3], cache)
    with pytest.raises(ValueError, match="budget must cover"): lm(WORDS[:, 3:5], cache)
    assert isinstance(cache, Cache) and Looked._fields[:5] == State._fields
