"""What a cache costs: parameters and cache of models that transformers builds, ceilings in limit cases, bytes of packed codes, bad input."""
import math

import pytest
import torch

from deepclustering.kv import ModelShape, bits_per_value, bytes_per_token, compression_ceiling, decode_step, growth_traffic
from deepclustering.kv.cost import LLAMA_3_1_8B


def test_parameters_are_those_of_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False)
    with torch.device("meta"): model = transformers.LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == LLAMA_3_1_8B.parameters
    assert LLAMA_3_1_8B[:3] == (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)


@pytest.mark.parametrize("dtype, bits", [(torch.float32, 32), (torch.bfloat16, 16)])
def test_bytes_are_those_of_a_cache_that_transformers_filled(dtype, bits):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=17, hidden_size=24, intermediate_size=8, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    cache = model(torch.zeros(2, 5, dtype=torch.int64)).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == 2 * 5 * bytes_per_token(ModelShape(3, 2, 4, 0), bits) == decode_step(ModelShape(3, 2, 4, 9), 5, 2, bits=bits).cache


@pytest.mark.parametrize("seed", range(5))
def test_step_is_linear_and_a_ceiling_has_its_limits(seed):
    g = torch.Generator().manual_seed(seed)
    def draw(high): return 1 + int(torch.randint(high, (), generator=g))
    shape, n, B, kept = ModelShape(draw(9), draw(9), draw(99), draw(10**6)), draw(10**4), draw(64), float(torch.rand((), generator=g)) + 1e-3
    kept = min(kept, 1.)
    step, machine = decode_step(shape, n, B), {"bandwidth": 1e9 * draw(9)}
    assert math.isclose(step.seconds * 4.8e12, step.weights + step.cache)
    assert math.isclose(decode_step(shape, n, B, kept).cache, kept * step.cache) and decode_step(shape, 2 * n, B).cache == 2 * step.cache == decode_step(shape, n, 2 * B).cache
    c = compression_ceiling(shape, n, B, kept, **machine)
    assert 1 <= c.end_to_end <= c.attention + 1e-12 and math.isclose(c.attention, 1 / kept)
    assert c.end_to_end <= 1 + step.cache / step.weights + 1e-12 and math.isclose(compression_ceiling(shape, n, B, 0).end_to_end, 1 + step.cache / step.weights)
    assert compression_ceiling(shape, n, B, 0).attention == math.inf
    assert math.isclose(c.end_to_end, compression_ceiling(shape, n, B, kept, bandwidth=1.).end_to_end)   # whatever the memory
    free = shape._replace(parameters=0)                                               # no weights: the step is the attention
    assert math.isclose(compression_ceiling(free, n, B, kept).end_to_end, 1 / kept)
    assert compression_ceiling(shape, n, B + 1, kept).end_to_end >= c.end_to_end      # more rows share the weights


@pytest.mark.parametrize("bits, group, overhead", [(2, 32, 32), (4, 64, 32), (3, 16, 16), (2, 128, 64)])
def test_bits_are_those_of_codes_and_scales(bits, group, overhead):
    values = 16 * group
    codes = bits * values                                                             # packed without gaps
    assert bits_per_value(bits, group, overhead) == (codes + values // group * overhead) / values
    assert bits_per_value(bits, group, 0) == bits


def test_traffic_of_many_steps():
    "Cat: every step reads n + 1, writes n + 1 and reads n + 1 slots; in place it reads and writes one and reads n + 1."
    for n in (0, 1, 77):
        assert growth_traffic(n, in_place=False) == 3 * (n + 1) and growth_traffic(n) == 2 + (n + 1)
    total = [sum(growth_traffic(n, in_place) for n in range(1000)) for in_place in (False, True)]
    assert total == [3 * 1000 * 1001 // 2, 1000 * 1001 // 2 + 2000] and 2.9 < total[0] / total[1] < 3


BAD = [(lambda s: bytes_per_token(s, 0), "bits must be above 0, got 0"), (lambda s: bytes_per_token(s, math.nan), "bits must be above 0, got nan"), (lambda s: decode_step(s, 1.5), "context must be a whole number"),
       (lambda s: decode_step(s, -1), "context must be at least 0, got -1"), (lambda s: decode_step(s, 1, True), "batch must be a whole number"), (lambda s: decode_step(s, 1, kept=1.01), "kept must be a share between 0 and 1, got 1.01"),
       (lambda s: decode_step(s, 1, bandwidth=0), "bandwidth must be above 0"), (lambda s: decode_step(s, 1, weight_bits=0), "weight_bits must be above 0"), (lambda s: compression_ceiling(s, 1, kept=-1), "kept must be a share"),
       (lambda s: compression_ceiling(s, 1, bits=-2), "bits must be above 0"), (lambda s: bits_per_value(2, 0), "group must be at least 1"), (lambda s: bits_per_value(-1, 8), "bits must be above 0"), (lambda s: bits_per_value(2, 8, -1), "overhead must be at least 0"),
       (lambda s: bits_per_value(2, 2.5), "group must be a whole number"), (lambda s: growth_traffic(-1), "context must be at least 0")]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call(LLAMA_3_1_8B)
