"""The quantised cache: codes by loops in float64 and NumPy's packbits, a cache of Python lists that attends token by token, bits that never change, transformers' QuantizedLayer and DynamicLayer, a language model, bytes and time."""
import math
import os
import time

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: each test file has a process of its own

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepclustering.core.tinylm import Cache, TinyLM
from deepclustering.kv import QuantisedAttention, QuantisedCache, QuantisedCaches, bits_per_value, folded_product
from deepclustering.kv.quantised import BLOCK, PLANES, dequantise, pack, quantise, unpack, with_quantised_attention


def normal(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def group_by_hand(numbers, nbits):
    "Codes and what they stand for, of one group in Python's floats."
    low, high = min(numbers), max(numbers)
    scale = (high - low) / (2**nbits - 1)
    codes = [round((x - low) / scale) if scale else 0 for x in numbers]
    return codes, [low + scale * c for c in codes]


def by_hand(x, nbits, axis, group):
    "All groups of a matrix `(n, D)`, one by one."
    codes, back = np.zeros(x.shape, int), np.zeros(x.shape)
    n, D = x.shape
    spans = [(slice(t, t + group), d) for t in range(0, n, group) for d in range(D)] if axis == -1 else [(t, slice(d, d + group)) for t in range(n) for d in range(0, D, group)]
    for span in spans: codes[span], back[span] = group_by_hand(x[span].tolist(), nbits)
    return codes, back


@pytest.mark.parametrize("axis", (-1, 0))
@pytest.mark.parametrize("nbits", (1, 2, 3, 4, 7, 8))
def test_codes_are_those_of_a_loop(nbits, axis):
    x = normal(2, 24, 18, seed=nbits)
    codes, scale, zero = quantise(x, nbits, axis, 6, torch.float64)
    back = dequantise(codes, scale, zero, torch.float64)
    for b in range(2):
        want, numbers = by_hand(x[b].numpy(), nbits, axis, 6)
        assert (codes[b].numpy() == want).all() and int(codes.max()) == 2**nbits - 1 and int(codes.min()) == 0
        np.testing.assert_allclose(back[b].numpy(), numbers, atol=1e-12)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1).mT.contiguous().mT
    assert not strided.is_contiguous() and torch.equal(quantise(strided, nbits, axis, 6, torch.float64)[0], codes)


@pytest.mark.parametrize("kind", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_no_number_is_further_than_half_a_step(seed, kind):
    "Whatever the offset: rounding it to nearest would push the ends of a group out of range."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 32, 16, generator=g, dtype=torch.float64) * 10 ** torch.empty(50, 1, 1).uniform_(-4, 1, generator=g) + 10 ** torch.empty(50, 1, 1).uniform_(-4, 3, generator=g) * torch.randn(50, 1, 1, generator=g)
    for axis in (-1, 0):
        codes, scale, zero = quantise(x, 4, axis, 16, kind)
        step = scale.double().repeat_interleave(32 // scale.shape[1], 1).repeat_interleave(16 // scale.shape[2], 2)
        assert ((dequantise(codes, scale, zero, torch.float64) - x).abs() <= step / 2 * (1 + 1e-9)).all()
        low = quantise(x, 4, axis, 16, torch.float64)
        assert (scale.double() >= low[1] * (1 - 1e-12)).all() and (scale.double() - low[1] <= 4 * torch.finfo(kind).eps * (low[1] + low[2].abs() / 15) + 2e-7).all()   # never a smaller step, and hardly a larger one


def test_error_of_even_numbers_is_a_twelfth_of_the_step_squared():
    for nbits in (2, 3, 4):
        x = torch.rand(4000, 64, generator=torch.Generator().manual_seed(nbits), dtype=torch.float64)
        codes, scale, zero = quantise(x, nbits, 0, 64, torch.float64)
        inner = (codes > 0) & (codes < 2**nbits - 1)
        ratio = ((dequantise(codes, scale, zero, torch.float64) - x).square() / (scale**2 / 12))[inner].mean()
        assert abs(float(ratio) - 1) < .02


def test_limit_cases():
    for x in (torch.full((8, 8), 3.), torch.zeros(8, 8)):
        codes, scale, zero = quantise(x, 2, -1, 8)
        assert codes.max() == 0 and torch.equal(dequantise(codes, scale, zero), x)
    two = torch.tensor([[-1.], [5.]])                                                  # two numbers are the ends
    assert torch.equal(dequantise(*quantise(two, 1, -1, 2)), two) and torch.equal(dequantise(*quantise(two, 8, 0, 1)), two)
    grid = (torch.arange(256.).view(256, 1) - 128) / 4
    assert torch.equal(dequantise(*quantise(grid, 8, -1, 256)), grid)
    for value, message in ((math.nan, "finite"), (math.inf, "finite"), (-math.inf, "finite"), (7e4, "65504"), (-7e4, "65504")):
        with pytest.raises(ValueError, match=message): quantise(torch.tensor([[0.], [value]]) + (value if abs(value) < 1e9 else 0), 4, -1, 2)
    assert torch.isfinite(dequantise(*quantise(torch.tensor([[0.], [7e4]]), 4, -1, 2, torch.bfloat16))).all()
    for t in (quantise(torch.zeros(0, 8, 8), 4, -1, 8), quantise(torch.zeros(3, 0, 8), 4, -1, 8)): assert t[0].numel() == 0


@pytest.mark.parametrize("nbits", PLANES)
def test_packed_bytes_are_numpys(nbits):
    codes = torch.randint(2**nbits, (3, 5, 32, 7), generator=torch.Generator().manual_seed(nbits), dtype=torch.uint8)
    planes, below = pack(codes, nbits), 0
    for width, plane in zip(PLANES[nbits], planes):
        part = codes.numpy() >> below & 2**width - 1
        per = 8 // width
        fields = part.reshape(3, 5, per, 32 // per, 7)                                  # the j-th field of a byte: the j-th part of the page
        bits = np.stack([fields[:, :, j] >> i & 1 for j in range(per) for i in range(width)])
        assert (np.packbits(bits, axis=0, bitorder="little")[0] == plane.numpy()).all()
        below += width
    assert below == nbits and sum(8 * p.numel() for p in planes) == nbits * codes.numel()
    assert torch.equal(unpack(planes, nbits), codes)
    assert torch.equal(unpack([p[:, 1:3] for p in planes], nbits), codes[:, 1:3])      # a block of pages, as a view


@pytest.mark.parametrize("axis", (-1, 0))
@pytest.mark.parametrize("shape, group", [((24, 16), 8), ((2, 3, 8, 40), 8), ((1, 8, 8), 8), ((5, 16, 8), 4)])
def test_folded_product_is_the_product(shape, group, axis):
    x = normal(*shape) + 5 * normal(*shape[:-2], 1, shape[-1], seed=1)
    q = quantise(x, 3, axis, group, torch.float64)
    whole = dequantise(*q, torch.float64)
    for M in (1, 6):
        left, weights = normal(*shape[:-2], M, shape[-1], seed=2), normal(*shape[:-2], M, shape[-2], seed=3)
        torch.testing.assert_close(folded_product(left, *(t.mT for t in q)), torch.einsum("...md,...td->...mt", left, whole), atol=1e-11, rtol=0)
        torch.testing.assert_close(folded_product(weights, *q), torch.einsum("...mt,...td->...md", weights, whole), atol=1e-11, rtol=0)


# --- the cache ------------------------------------------------------------------------------------------------------------

class Lists:
    "Deliberately dumb: lists of tokens, pages quantised number by number, attention query by query."
    def __init__(self, nbits, axes, g, R): self.nbits, self.axes, self.g, self.R = nbits, axes, g, R
    def run(self, q, keys, values):
        B, heads, T, D = q.shape
        H, out = keys.shape[1], torch.zeros_like(q)
        for b in range(B):
            for h in range(heads):
                stored = [t[b, h * H // heads].clone() for t in (keys, values)]
                pages = 0
                for m in range(T):
                    if m + 1 - pages * self.g >= self.R + self.g:
                        span = slice(pages * self.g, (pages + 1) * self.g)
                        for s, axis in zip(stored, self.axes): s[span] = torch.from_numpy(by_hand(s[span].numpy(), self.nbits, axis, self.g if axis else min(self.g, D))[1])
                        pages += 1
                    out[b, h, m] = (stored[0][:m + 1] @ q[b, h, m] / math.sqrt(D)).softmax(0) @ stored[1][:m + 1]
        return out


@pytest.mark.parametrize("seed", range(10))
def test_any_history_is_that_of_lists(seed):
    g = torch.Generator().manual_seed(seed)
    def draw(low, high): return low + int(torch.randint(high - low, (), generator=g))
    B, H, G, size, R, T = draw(1, 3), draw(1, 3), draw(1, 4), 8 * draw(1, 3), draw(1, 30), draw(40, 90)
    D, nbits, axes = size * draw(1, 3) if seed % 2 else draw(2, 8), (2, 3, 4, 8)[seed % 4], ((-1, 0), (0, -1), (0, 0), (-1, -1))[seed % 3]
    q, keys, values = (torch.randn(B, h, T, D, generator=g, dtype=torch.float64) for h in (G * H, H, H))
    cache, t, out = QuantisedCache(nbits, *axes, size, R, growth=(1 / 8, 2.)[seed % 2], scale_dtype=torch.float64), 0, []
    while t < T:
        n = min(T - t, draw(1, 3 * size))
        out.append(cache.step(*(x[:, :, t:t + n] for x in (q, keys, values))))
        t += n
        assert cache.seen == t and R <= cache.window < R + size or t < R
    torch.testing.assert_close(torch.cat(out, 2), Lists(nbits, axes, size, R).run(q, keys, values), atol=1e-10, rtol=0)
    for dense, exact in zip(cache.rectangle(), (keys, values)):
        assert torch.equal(dense[:, :, T - cache.window:], exact[:, :, T - cache.window:])     # the window is in full


@pytest.mark.parametrize("nbits", PLANES)
def test_a_code_never_changes(nbits):
    "Hundreds of steps, any chunks, other rows and heads beside it, moves to larger stores: the same bits."
    B, H, T, D = 3, 2, 700, 16
    keys, values = normal(B, H, T, D, dtype=torch.float32), normal(B, H, T, D, seed=1, dtype=torch.float32)
    make = lambda: QuantisedCache(nbits, q_group_size=16, residual_length=20)
    def pages(c, n=None): return [t[:, :n or c.pages].clone() for store in c.stores for t in store]
    whole = make().append(keys, values)
    cache, g, t, seen = make(), torch.Generator().manual_seed(nbits), 0, []
    while t < T:
        n = 1 if 200 < t < 500 else 1 + int(torch.randint(60, (), generator=g))
        cache.append(keys[:, :, t:t + n], values[:, :, t:t + n])
        t += n
        if cache.pages: seen.append((cache.pages, pages(cache)))
    assert len(seen) > 250 and len({s[0] for s in seen}) > 15
    for n, held in seen[::20] + seen[-1:]:
        for now, then, once in zip(pages(cache, n), held, pages(whole, n)): assert torch.equal(now, then) and torch.equal(now, once)
    for b in range(B):
        for h in range(H):
            lone = make().append(keys[b:b + 1, h:h + 1], values[b:b + 1, h:h + 1])
            for mine, one in zip(pages(whole), pages(lone)): assert torch.equal(mine[b * H + h], one[0])
    noisy = keys.clone(); noisy[:, :, 640:] = 99.                                       # what comes later does not reach back
    for a, b in zip(pages(make().append(noisy, values), 40), pages(whole, 40)): assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("nbits, g, R, D", [(2, 64, 128, 128), (3, 32, 40, 128), (4, 64, 1, 16), (8, 8, 5, 24)])
def test_bytes_are_those_of_the_formula(nbits, g, R, D, dtype):
    B, H, T = 2, 3, 1000
    cache = QuantisedCache(nbits, q_group_size=g, residual_length=R)
    assert cache.nbytes == 0
    cache.append(normal(B, H, T, D, dtype=dtype), normal(B, H, T, D, seed=1, dtype=dtype))
    pages = (T - R) // g
    assert cache.pages == pages and cache.window == T - pages * g
    room = pages + math.ceil(pages / 8)
    bits = bits_per_value(nbits, g) + bits_per_value(nbits, min(g, D))
    assert cache.nbytes == B * H * D * (room * g * bits / 8 + 2 * (R + g - 1) * dtype.itemsize)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in (*cache.recent, *cache.stores[0], *cache.stores[1]))    # no view into something larger
    other = QuantisedCache(nbits, q_group_size=g, residual_length=R, scale_dtype=torch.float32).append(normal(B, H, T, D, dtype=dtype), normal(B, H, T, D, seed=1, dtype=dtype))
    assert other.nbytes - cache.nbytes == B * H * D * room * g * (32 / g + 32 / min(g, D)) / 8


def test_moves_are_few_however_long():
    for n in (320, 3200):
        cache = QuantisedCache(q_group_size=8, residual_length=1).append(*torch.zeros(2, 1, 1, n, 2))
        copied, new = 0, torch.zeros(2, 1, 1, 8, 2)
        for _ in range(n // 8):
            slab, before = cache.stores[0][0].data_ptr(), cache.pages
            cache.append(*new)
            copied += before * (cache.stores[0][0].data_ptr() != slab)
        assert copied / (n // 8) < 1 + 8


def test_blocks_and_layouts_do_not_matter():
    keys, values, q = normal(2, 2, 300, 16), normal(2, 2, 300, 16, seed=1), normal(2, 6, 1, 16, seed=2)
    cache = QuantisedCache(3, q_group_size=16, residual_length=30).append(keys, values)
    want, before = cache.attend(q, return_lse=True), dict(BLOCK)
    try:
        for size in (1, 700, 5000, 2**26):
            BLOCK["cpu"] = size
            for a, b in zip(cache.attend(q, return_lse=True), want): torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    finally: BLOCK.update(before)
    strided = QuantisedCache(3, q_group_size=16, residual_length=30).append(keys.mT.contiguous().mT, values.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(strided.attend(q.expand(2, 6, 1, 16)), want[0])
    dense = cache.rectangle()
    scores = (q @ dense[0].repeat_interleave(3, 1).mT / 4).double()
    torch.testing.assert_close(want[1], scores.logsumexp(-1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision_accumulates_in_float32(dtype):
    keys, values, q = normal(1, 2, 600, 64, dtype=dtype), normal(1, 2, 600, 64, seed=1, dtype=dtype), normal(1, 4, 3, 64, seed=2, dtype=dtype)
    wide = QuantisedCache(4).append(keys.double(), values.double())
    out, lse = QuantisedCache(4).append(keys, values).attend(q, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), wide.attend(q.double()), atol=2 * torch.finfo(dtype).eps, rtol=0)
    torch.testing.assert_close(lse.double(), wide.attend(q.double(), return_lse=True)[1], atol=1e-5, rtol=0)


def test_gradients_reach_queries_and_not_the_store():
    keys = normal(1, 2, 60, 8).requires_grad_()
    cache = QuantisedCache(4, q_group_size=8, residual_length=9).append(keys, keys)
    assert cache.pages and torch.autograd.gradcheck(lambda q: cache.attend(q), (normal(1, 4, 2, 8, seed=1).requires_grad_(),))
    assert not any(t.requires_grad for t in (*cache.recent, *cache.stores[0]))


# --- other libraries ------------------------------------------------------------------------------------------------------

def test_transformers_quantises_again_and_drifts():
    "Its own QuantizedLayer with our quantiser and quanto's groups for axis -1: old tokens change at each full window; ours do not."
    cache_utils = pytest.importorskip("transformers.cache_utils")
    class Layer(cache_utils.QuantizedLayer):
        def _quantize(self, tensor, axis): return tensor.shape, quantise(tensor.reshape(-1, tensor.shape[-1]), self.nbits, -1, self.q_group_size)
        def _dequantize(self, q): return dequantise(*q[1]).view(q[0])
    for seed in range(3):
        keys = normal(1, 8, 104 + 2 * 128, 64, seed=seed, dtype=torch.float32)
        theirs, ours, errors, prefix = Layer(nbits=2), QuantisedCache(2, residual_length=8), [], []
        theirs.update(keys[:, :, :104], keys[:, :, :104]); ours.append(keys[:, :, :104], keys[:, :, :104])
        old = ours.rectangle()[0][:, :, :64].clone()
        for t in range(104, keys.shape[2]):
            got = theirs.update(keys[:, :, t:t + 1], keys[:, :, t:t + 1])[0][:, :, :104]
            ours.append(keys[:, :, t:t + 1], keys[:, :, t:t + 1])
            errors.append(float((got - keys[:, :, :104]).square().mean()))
        errors.append(float((theirs.update(keys[:, :, :1], keys[:, :, :1])[0][:, :, :104] - keys[:, :, :104]).square().mean()))
        prefix = sorted(set(errors))
        assert len(prefix) == 3 and errors[0] == prefix[0] and errors[-1] == prefix[2]  # one more error for each flush, each larger
        assert torch.equal(ours.rectangle()[0][:, :, :64], old)
        assert theirs.keys.numel() == 0 or theirs.keys.shape[2] < 128                   # and its window runs empty: the newest tokens are codes


def test_as_transformers_dynamic_layer_until_the_first_page():
    cache_utils = pytest.importorskip("transformers.cache_utils")
    theirs, ours = cache_utils.DynamicLayer(), QuantisedCache(2)
    for seed, T in enumerate((100, 1, 90)):
        keys, values, q = normal(2, 2, T, 16, seed=seed, dtype=torch.float32), normal(2, 2, T, 16, seed=seed + 9, dtype=torch.float32), normal(2, 4, T, 16, seed=seed + 20, dtype=torch.float32)
        full = theirs.update(keys, values)
        mask = torch.arange(full[0].shape[2]) <= torch.arange(full[0].shape[2] - T, full[0].shape[2]).unsqueeze(1)
        torch.testing.assert_close(ours.step(q, keys, values), F.scaled_dot_product_attention(q, *full, attn_mask=mask, enable_gqa=True), atol=2e-6, rtol=0)
    assert ours.seen == theirs.get_seq_length() == 191 and ours.pages == 0 and torch.equal(ours.rectangle()[0], full[0])
    assert ours.append(keys[:, :, :1], values[:, :, :1]).pages == 1


def test_a_step_is_faster_than_transformers_dynamic_cache():
    "16,384 tokens, 8 and 32 heads of 128, float32, one thread."
    cache_utils = pytest.importorskip("transformers.cache_utils")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        H, G, n, D = 8, 4, 16_384, 128
        keys, values = torch.randn(2, 1, H, n, D)
        q, new = torch.randn(1, G * H, 1, D), torch.randn(2, 1, H, 1, D)
        theirs, caches = cache_utils.DynamicLayer(), {b: QuantisedCache(b).append(keys, values) for b in (2, 3, 4)}
        theirs.update(keys, values)
        def dynamic(): return F.scaled_dot_product_attention(q, *theirs.update(*new), enable_gqa=True)
        ways = {0: dynamic, **{b: lambda c=c: c.append(*new).attend(q) for b, c in caches.items()}}
        best = dict.fromkeys(ways, math.inf)
        for _ in range(8):
            for name, way in ways.items():
                start = time.perf_counter(); way(); best[name] = min(best[name], time.perf_counter() - start)
            if all(best[b] < best[0] for b in caches): break
        assert all(best[b] < best[0] for b in caches), {k: round(1e3 * v, 1) for k, v in best.items()}
    finally: torch.set_num_threads(threads)


# --- under a model --------------------------------------------------------------------------------------------------------

def twins(**config):
    torch.manual_seed(0)
    config = {"dim": 24, "heads": 6, "kv_heads": 2, "head_dim": 6, "std": .4} | config
    plain = TinyLM(13, **config).double().eval().requires_grad_(False)
    ours = TinyLM(13, **config, attention=lambda dim: QuantisedAttention(dim, config["heads"], config["kv_heads"], config["head_dim"])).double().eval().requires_grad_(False)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("config", [{}, {"shift": False, "depth": 3}, {"kv_heads": 1, "rope_base": 100.}], ids=str)
def test_a_copy_with_quantised_attention(config):
    "The same network in the same dtype, built here by hand; the model itself stays as it was."
    torch.manual_seed(0)
    config = {"dim": 24, "heads": 6, "kv_heads": 2, "head_dim": 6, "std": .4} | config
    plain = TinyLM(13, **config).double()
    by_hand = TinyLM(13, **config, attention=lambda dim: QuantisedAttention(dim, 6, config["kv_heads"], 6, config.get("rope_base", 1e4))).double().eval()
    by_hand.load_state_dict(plain.state_dict())
    made, tokens, settings = with_quantised_attention(plain), torch.randint(13, (2, 30), generator=torch.Generator().manual_seed(1)), dict(nbits=2, q_group_size=8, residual_length=7)
    with torch.no_grad(): assert torch.equal(made(tokens, QuantisedCaches(**settings)), by_hand(tokens, QuantisedCaches(**settings)))
    assert plain.training and not made.training and not any(isinstance(m, QuantisedAttention) for m in plain.modules()) and made.embed.weight is not plain.embed.weight


@pytest.mark.parametrize("config", [{}, {"shift": False, "depth": 3}, {"heads": 2}, {"kv_heads": 1}], ids=str)
def test_models_do_not_care_how_a_text_is_cut(config):
    plain, ours = twins(**config)
    tokens, settings = torch.randint(13, (2, 50), generator=torch.Generator().manual_seed(1)), dict(nbits=3, q_group_size=8, residual_length=7)
    want = ours(tokens, QuantisedCaches(**settings))
    for sizes in ([1] * 50, [20, 1, 1, 17, 11], [14, 36], [15, 35]):
        cache = QuantisedCaches(**settings)
        torch.testing.assert_close(torch.cat([ours(t, cache) for t in tokens.split(sizes, 1)], 1), want, atol=1e-9, rtol=0)
        assert cache.seen.tolist() == [50, 50] and cache.layers[0].seen == 50 and cache.nbytes == sum(c.nbytes for c in cache.layers.values())
    by_rectangle = QuantisedCaches(**settings)
    torch.testing.assert_close(torch.cat([plain(t, by_rectangle) for t in tokens.split(1, 1)], 1), want, atol=1e-9, rtol=0)
    torch.testing.assert_close(want[:, :14], plain(tokens)[:, :14], atol=1e-10, rtol=0)        # before the first page
    assert (want - plain(tokens))[:, 14:].abs().max() > 1e-4
    fine = ours(tokens, QuantisedCaches(**settings | dict(nbits=8, scale_dtype=torch.float64)))
    assert (fine - plain(tokens)).abs().max() < .2 * (want - plain(tokens)).abs().max()
    torch.testing.assert_close(ours(tokens, Cache()), plain(tokens), atol=1e-10, rtol=0)
    alone = ours(tokens[1:], QuantisedCaches(**settings))
    torch.testing.assert_close(alone[0], want[1], atol=1e-9, rtol=0)


def test_padding_is_refused():
    _, ours = twins()
    at = torch.arange(6).repeat(2, 1) - torch.tensor([[0], [2]]); at[at < 0] = -1
    with pytest.raises(ValueError, match="without padding, got"): ours(torch.zeros(2, 6).long(), QuantisedCaches(), at)
    cache = QuantisedCaches()
    ours(torch.zeros(2, 6).long(), cache)
    with pytest.raises(ValueError, match="from the 6 tokens"): ours(torch.zeros(2, 1).long(), cache, torch.full((2, 1), 7))


BAD = [("keys must be floats", lambda c, k, q: c.append(k.long(), k)), ("keys must be floats", lambda c, k, q: c.append(k[0], k[0])), ("none of them 0", lambda c, k, q: c.append(k[:, :, :0], k[:, :, :0])), ("values must be like keys", lambda c, k, q: c.append(k, k.float())),
       ("keys must have the B, H, D, dtype and device", lambda c, k, q: c.append(k.float(), k.float())), ("keys must have the B, H, D", lambda c, k, q: c.append(k[..., :2], k[..., :2])), ("keys must have the B, H, D", lambda c, k, q: c.append(k[:1], k[:1])),
       ("keys must be finite and within 65504", lambda c, k, q: c.append(k * math.nan, k)), ("values must be finite", lambda c, k, q: c.append(k, k * math.inf)), ("values must be finite and within 65504", lambda c, k, q: c.step(q.expand(2, 6, 30, 16), k, 1e6 * k)),
       ("q must be torch.float64 of shape", lambda c, k, q: c.attend(q[:1])), ("a multiple of 3", lambda c, k, q: c.attend(q[:, :5])), ("q must be torch.float64", lambda c, k, q: c.attend(q.half())), ("q must be", lambda c, k, q: c.attend(q[0])), ("1 to 14", lambda c, k, q: c.attend(q.expand(2, 6, 15, 16))),
       ("a multiple of 3, 30, 16", lambda c, k, q: c.step(q, k, k)), ("q must be torch.float64", lambda c, k, q: c.step(q.float(), k[:, :, :1], k[:, :, :1])), ("nothing was appended", lambda c, k, q: QuantisedCache().attend(q)), ("nothing was appended", lambda c, k, q: QuantisedCache().rectangle()),
       ("that q_group_size = 8 divides", lambda c, k, q: QuantisedCache(q_group_size=8).append(k[..., :12], k[..., :12])), ("nbits must be one of 2, 3, 4, 8, got 1", lambda c, k, q: QuantisedCache(1)), ("nbits must be one of", lambda c, k, q: pack(k.to(torch.uint8), 5)), ("codes must be uint8", lambda c, k, q: pack(k[:, :, :16], 4)), ("axis_value must be -1", lambda c, k, q: QuantisedCaches(axis_value=1)), ("q_group_size must be a multiple of 8", lambda c, k, q: QuantisedCache(q_group_size=20)),
       ("residual_length must be at least 1", lambda c, k, q: QuantisedCaches(residual_length=0)), ("growth must be above 0, got nan", lambda c, k, q: QuantisedCache(growth=math.nan)), ("axis must be", lambda c, k, q: quantise(k, 4, 2)), ("a multiple of group = 7", lambda c, k, q: quantise(k, 4, 0, 7)), ("nbits must be between 1 and 8", lambda c, k, q: quantise(k, 9))]


@pytest.mark.parametrize("message, call", BAD)
def test_bad_input_changes_nothing(message, call):
    keys, q = normal(2, 3, 30, 16), normal(2, 6, 1, 16)
    cache = QuantisedCache(q_group_size=8, residual_length=9).append(keys, keys)
    before = cache.attend(q), cache.nbytes, cache.seen
    assert cache.pages == 2 and cache.window == 14
    with pytest.raises(ValueError, match=message): call(cache, keys, q)
    assert torch.equal(cache.attend(q), before[0]) and (cache.nbytes, cache.seen) == before[1:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("nbits", PLANES)
def test_on_a_gpu(nbits):
    keys, values, q = (normal(2, h, 700, 64, seed=h, dtype=torch.float32) for h in (4, 4, 8))
    here, there = QuantisedCache(nbits), QuantisedCache(nbits)
    want, got = here.step(q, keys, values), there.step(q.cuda(), keys.cuda(), values.cuda())
    torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=0)
    for a, b in zip(here.stores[0] + here.stores[1], there.stores[0] + there.stores[1]): assert torch.equal(a, b.cpu())


# --- the kernel, by Triton's interpreter ---

CASES = [(2, (-1, 0), 64, 1, 32, 8), (3, (-1, 0), 32, 3, 20, 1), (4, (0, -1), 16, 7, 16, 40), (8, (0, 0), 128, 2, 48, 128), (3, (-1, -1), 16, 20, 144, 5), (2, (0, 0), 32, 65, 16, 8)]

@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("nbits, axes, g, M, D, window", CASES)
def test_kernel_is_attention_over_the_dequantised_pages(nbits, axes, g, M, D, window, dtype):
    triton = pytest.importorskip("deepclustering.kv.quantised_triton")
    cache = QuantisedCache(nbits, *axes, q_group_size=g, residual_length=window).append(normal(1, 2, window + 3 * g, D, dtype=dtype), normal(1, 2, window + 3 * g, D, seed=1, dtype=dtype))
    q = normal(2, M, D, seed=2, dtype=dtype)
    out, lse = triton.launch_pages(q, *cache.stores, cache.pages, g, nbits, each=2)
    keys, values = (dequantise(unpack(planes, nbits).flatten(1, 2), *(t.flatten(1, 2) for t in scales), torch.float64) for store in cache.stores
                    for planes, scales in [([t[:, :cache.pages] for t in store[:-2]], [t[:, :cache.pages] for t in store[-2:]])])
    scores = q.double() @ keys.mT / math.sqrt(D)
    assert cache.pages == 3 and out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), scores.softmax(2) @ values, atol=6 * torch.finfo(dtype).eps, rtol=0)
    torch.testing.assert_close(lse.double(), scores.logsumexp(2), atol=12 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("large, small", [(0, 1e-6), (1, 1e5)])
def test_kernel_where_a_page_is_wider_than_float16(large, small):
    "Keys or values within 60,000 either way, the queries tiny or beyond float16."
    triton = pytest.importorskip("deepclustering.kv.quantised_triton")
    from deepclustering.kv.quantised import _over_pages
    sizes = (6e4, 6e4) if not large else (1e-6, 6e4)
    cache = QuantisedCache(2, q_group_size=16, residual_length=1).append(*(torch.empty(1, 1, 65, 32).uniform_(-size, size, generator=torch.Generator().manual_seed(i)).bfloat16() for i, size in enumerate(sizes)))
    q = normal(1, 3, 32, seed=5, dtype=torch.bfloat16) * small
    out, lse = triton.launch_pages(q, *cache.stores, cache.pages, 16, 2)
    want, logarithm = _over_pages.reference(q.double(), *cache.stores, cache.pages, 16, 2)
    torch.testing.assert_close(out.double() / 6e4, want / 6e4, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse.double(), logarithm, atol=2e-2, rtol=1e-2)


def test_kernel_in_a_step_and_what_it_leaves_to_plain_pytorch(caplog):
    triton = pytest.importorskip("deepclustering.kv.quantised_triton")
    from deepclustering.core.operators import on_cpu
    from deepclustering.kv.quantised import _over_pages
    keys, values, q = (normal(2, h, 90, 16, seed=h, dtype=torch.float32) for h in (2, 3, 4))
    values = values[:, :2]
    seen = []

    def counting(*args): seen.append(args[0].shape); return triton.launch_pages(*args)
    plain = QuantisedCache(2, q_group_size=16, residual_length=8).step(q, keys, values)
    with on_cpu({_over_pages: counting}):
        torch.testing.assert_close(QuantisedCache(2, q_group_size=16, residual_length=8).step(q, keys, values), plain, atol=5e-6, rtol=0)
        assert seen == [(4, 32, 16)] * 4 + [(4, 6, 16)]                            # G = 2 queries of each of 16 tokens, then of the 3 that are left, but for the first 23, which see no page
        cache = QuantisedCache(2, q_group_size=24, residual_length=8).append(keys, values)
        with pytest.raises(triton.Unfit, match="pages of 24 tokens"): cache.attend(q[:, :, :1])
    with caplog.at_level("WARNING"): out, _ = _over_pages._launch(q[:, :, 0].reshape(4, 2, 16), *cache.stores, cache.pages, 24, 2)
    assert "pages of 24 tokens" in caplog.text and torch.equal(out, _over_pages.reference(q[:, :, 0].reshape(4, 2, 16), *cache.stores, cache.pages, 24, 2)[0])


def test_a_gradient_takes_the_plain_way(monkeypatch):
    from deepclustering.core.operators import Operator
    cache = QuantisedCache(4, residual_length=1).append(*normal(2, 1, 1, 80, 16))
    q = normal(1, 2, 1, 16, seed=3).requires_grad_()

    def never(*args): raise AssertionError
    with monkeypatch.context() as m:
        m.setattr(Operator, "__call__", never)
        loss = cache.attend(q).square().sum()
        with pytest.raises(AssertionError): cache.attend(q.detach())
    got, = torch.autograd.grad(loss, q)
    direction, h = normal(1, 2, 1, 16, seed=4), 1e-6
    with torch.no_grad(): slope = (cache.attend(q + h * direction).square().sum() - cache.attend(q - h * direction).square().sum()) / (2 * h)
    assert float((got * direction).sum()) == pytest.approx(float(slope), rel=1e-7)
