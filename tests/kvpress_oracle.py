"""What kvpress itself scores, for tests/test_kv_kvpress.py: `python tests/kvpress_oracle.py > tests/kvpress_oracle.json`, in an environment with kvpress (`make oracles`), whose transformers is older than ours.

No test runs this; the versions it was run with stand in the file. The data come from NumPy and the turning from transformers, so that no line of ours has a part in the values.
"""
import json
import sys
from types import SimpleNamespace

import numpy as np

B, H, G, T, D = 2, 2, 2, 40, 8  # rows, heads of keys, query heads for each, tokens, width
WINDOW, AHEAD = 6, 32
RATIOS = (.25, .5, .75)         # removed; exact in binary


def prompt(seed=0):
    "Queries `(B, G H, T, D)` and keys before they are turned, `(B, H, T, D)`, and values."
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, G * H, T, D)), rng.normal(size=(B, H, T, D)), rng.normal(size=(B, H, T, D))


def answers():
    import torch
    from kvpress import (AdaKVPress, ExpectedAttentionPress, KeyDiffPress, KnormPress, ObservedAttentionPress, PyramidKVPress, SnapKVPress, StreamingLLMPress, TOVAPress)
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb, repeat_kv

    config = LlamaConfig(hidden_size=G * H * D, num_attention_heads=G * H, num_key_value_heads=H, head_dim=D, num_hidden_layers=4, rope_theta=1e4, attn_implementation="sdpa")
    module = LlamaAttention(config, 0).double()
    module.rotary_emb = LlamaRotaryEmbedding(config)
    q, k, values = map(torch.tensor, prompt())
    hidden = q.transpose(1, 2).flatten(2)
    module.q_proj.weight.data = torch.eye(G * H * D, dtype=torch.float64)               # kvpress makes the queries from the hidden states: they are the queries
    cos, sin = module.rotary_emb(hidden, torch.arange(T)[None])
    turned, keys = apply_rotary_pos_emb(q, k, cos, sin)
    logits = turned @ repeat_kv(keys, G).transpose(2, 3) / D**.5
    attention = logits.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    call = (module, hidden, keys, values, attention, {"position_embeddings": (cos, sin)})
    ahead = dict(n_future_positions=AHEAD)
    presses = {"observed": ObservedAttentionPress(), "tova": TOVAPress(), "snapkv": SnapKVPress(window_size=WINDOW), "snapkv, 1": SnapKVPress(window_size=WINDOW, kernel_size=1), "keydiff": KeyDiffPress(), "knorm": KnormPress(),
               "expected": ExpectedAttentionPress(**ahead), "expected, mean": ExpectedAttentionPress(use_covariance=False, **ahead), "expected, no norm": ExpectedAttentionPress(use_vnorm=False, n_sink=1, **ahead)}
    with torch.no_grad():
        scores = {name: press.score(*call) for name, press in presses.items()}
        kept = {f"streaming, {r}": StreamingLLMPress(r).score(*call) > 0 for r in RATIOS}
        for r in RATIOS:
            AdaKVPress(SnapKVPress(r, window_size=WINDOW), .2).compress(*call)
            kept[f"adakv, {r}"] = torch.ones(B, H, T, dtype=torch.bool)
            kept[f"adakv, {r}"][module.masked_key_indices] = False
        budgets = {}
        for n in (400, 640):
            for r in RATIOS:
                press = PyramidKVPress(r, window_size=1)
                budgets[f"{n}, {r}"] = [press.get_layer_budget(SimpleNamespace(config=config, layer_idx=i), n) for i in range(4)]
    return {"scores": {n: [float(f"{x:.9g}") for x in s.flatten().tolist()] for n, s in scores.items()}, "kept": {n: "".join("01"[x] for x in m.flatten().tolist()) for n, m in kept.items()}, "pyramid": budgets}


if __name__ == "__main__":
    from importlib.metadata import version
    json.dump({"versions": {n: version(n) for n in ("kvpress", "transformers", "torch")}, **answers()}, sys.stdout)
    print()
