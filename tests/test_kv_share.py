"""Shared layers: bytes to the byte, decoding through every cache, tied weights, conversion against the program's loop, gradients as sums over tied copies."""
import itertools
import math

import pytest
import torch

from deepclustering.core.tinylm import Cache, TinyLM
from deepclustering.kv.eviction import H2O, EvictingCache
from deepclustering.kv.merge import MergingCache
from deepclustering.kv.ragged import RaggedCaches
from deepclustering.kv.share import SharedLM, holding_layers, kv_token_bytes, share_kv
from deepclustering.kv.stages import ScopeCache

SHAPES = [(6, 4), (6, 1), (3, 2), (2, 4), (4, 1), (1, 1)]
shapes = pytest.mark.parametrize("m, g", SHAPES)


def model(m, g, seed=0):
    torch.manual_seed(seed)
    return SharedLM(11, dim=16, depth=6, heads=4, kv_heads=g, kv_layers=m, std=.3).double().eval()


def words(B=2, T=24): return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(1))


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@shapes
def test_decoding_through_every_cache(m, g):
    lm, tokens = model(m, g), words()
    with torch.no_grad():
        whole = lm(tokens)
        for make in (Cache, RaggedCaches, lambda: EvictingCache(H2O, 24), lambda: MergingCache(H2O, 24), lambda: ScopeCache(24, 24)):
            for steps in ([1] * 24, [9, 1, 1, 13], [24]):
                cache = make()
                close(torch.cat([lm(part, cache) for part in tokens.split(steps, 1)], 1), whole)
                assert sorted(cache.layers) == holding_layers(6, m) == lm.holders


@shapes
def test_bytes(m, g):
    lm, tokens, cache = model(m, g), words(), Cache()
    with torch.no_grad(): lm(tokens, cache)
    stored = sum(t.numel() * t.element_size() for keys, values, _ in cache.layers.values() for t in (keys, values))
    assert stored == tokens.numel() * kv_token_bytes(m, g, 4, 8) == tokens.numel() * 2 * m * g * 4 * 8
    assert sum(p.numel() for n, p in lm.named_parameters() if "k_proj" in n or "v_proj" in n) == 2 * m * g * 4 * 16


@shapes
def test_rows_and_padding(m, g):
    lm, tokens = model(m, g), words(3)
    at = torch.arange(24).expand(3, 24).clone(); at[1] -= 5; at[1, :5] = -1
    with torch.no_grad():
        whole = lm(tokens, positions=at)
        close(whole[1:2, 5:], lm(tokens[1:2, 5:])); close(whole[:1], lm(tokens[:1])); close(whole[2:], lm(tokens[2:]))
        cache = RaggedCaches()
        close(torch.cat([lm(tokens[:, :9], cache, positions=at[:, :9]), lm(tokens[:, 9:], cache, positions=at[:, 9:])], 1)[1, 5:], whole[1, 5:])


@shapes
def test_nothing_looks_ahead(m, g):
    lm, tokens = model(m, g), words()
    other = tokens.clone(); other[:, 15] = (other[:, 15] + 1) % 11
    with torch.no_grad(): a, b = lm(tokens), lm(other)
    assert torch.equal(a[:, :15], b[:, :15]) and not torch.equal(a[:, 15:], b[:, 15:])


def test_gradients_are_those_of_tied_weights():
    "Central differences in float64: the holder's weights get what all layers that look at them send back."
    lm, tokens = model(2, 1), words(1, 8)
    loss = lm(tokens).square().mean()
    loss.backward()
    for name in ("blocks.0.attention.k_proj.weight", "blocks.3.attention.v_proj.weight", "blocks.4.attention.q_proj.weight"):
        p = dict(lm.named_parameters())[name]
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values = []
        with torch.no_grad():
            for e in (1e-5, -2e-5): p += e * direction; values.append(float(lm(tokens).square().mean()))
            p += 1e-5 * direction
        assert math.isclose((values[0] - values[1]) / 2e-5, float((p.grad * direction).sum()), rel_tol=1e-6)


def the_program(weights, m, g, D):
    "Its loop over layers, on a list of `(heads D, dim)`: heads first, then each layer without keys into the nearest below that has them."
    depth, heads = len(weights), weights[0].shape[0] // D
    w = [torch.stack([x.view(heads, D, -1)[j * heads // g:(j + 1) * heads // g].mean(0) for j in range(g)]).view(g * D, -1) for x in weights]
    holders = [0] + [int((i + 1) * (depth / m)) for i in range(m - 1)]
    for i in range(depth):
        if i in holders: continue
        below = max(j for j in holders if j < i)
        w[below] = torch.mean(torch.stack([w[i], w[below]]), dim=0)
    return {h: w[h] for h in holders}


@shapes
def test_conversion_as_the_program_writes_it(m, g):
    torch.manual_seed(2)
    old = TinyLM(11, dim=16, depth=6, heads=4, kv_heads=4, std=.3).double().eval()
    for part in ("k_proj", "v_proj"):
        want = the_program([getattr(b.attention, part).weight.detach() for b in old.blocks], m, g, 4)
        for h, w in want.items(): close(getattr(share_kv(old, m, g, "halving").blocks[h].attention, part).weight.detach(), w)
    new = share_kv(old, m, g)
    assert new.config == {**{k: v for k, v in old.config.items() if k not in ("attention", "feed_forward")}, "kv_heads": g, "kv_layers": m} and not new.training
    kept, made = old.state_dict(), new.state_dict()
    assert all(torch.equal(made[n], kept[n]) for n in made if "k_proj" not in n and "v_proj" not in n)
    made["embed.weight"].zero_(); assert old.embed.weight.abs().sum() > 0              # nothing is shared with the old model
    if (m, g) == (6, 4):
        with torch.no_grad(): assert torch.equal(share_kv(old, m, g)(words()), old(words()))


def test_equal_heads_lose_nothing():
    torch.manual_seed(3)
    old = TinyLM(11, dim=16, depth=2, heads=4, kv_heads=4, std=.3).double().eval()
    with torch.no_grad():
        for block, part in itertools.product(old.blocks, ("k_proj", "v_proj")):
            w = getattr(block.attention, part).weight
            w.copy_(torch.cat([w[:4], w[:4], w[8:12], w[8:12]]))                      # heads 0 = 1, 2 = 3
        close(share_kv(old, 2, 2)(words()), old(words()))
        assert (share_kv(old, 2, 1)(words()) - old(words())).abs().max() > .01
        assert (share_kv(old, 1, 4)(words()) - old(words())).abs().max() > .01


def test_errors():
    for bad in (dict(kv_layers=0), dict(kv_layers=7), dict(kv_heads=3), dict(kv_layers=1.5)):
        with pytest.raises(ValueError): SharedLM(11, dim=16, depth=6, heads=4, **{"kv_heads": 1, "kv_layers": 2, **bad})
    with pytest.raises(ValueError, match="model must be a TinyLM"): share_kv(model(2, 1), 1, 1)
    with pytest.raises(ValueError, match="tokens must be"): model(2, 1)(torch.zeros(1, 2))
