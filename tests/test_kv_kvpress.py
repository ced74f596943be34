"""Scores, masks and budgets against kvpress itself: its answers lie in kvpress_oracle.json (its transformers is too old to be installed beside ours)."""
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from deepclustering.core.tinylm import State, attention_weights, rotate
from deepclustering.kv.budgets import AdaSnapKV, pyramid
from deepclustering.kv.eviction import StreamingLLM, expected_attention_score, h2o_score, key_norm_score, keydiff_score, snapkv_score, tova_score
from kvpress_oracle import AHEAD, B, D, G, H, RATIOS, T, WINDOW, prompt

ORACLE = json.loads((Path(__file__).parent / "kvpress_oracle.json").read_text())
SEEN_BY = torch.arange(T, 0, -1)   # queries that could look at a slot: kvpress divides by it, H2O's authors do not


@pytest.fixture(scope="module")
def state():
    q, k, v = map(torch.tensor, prompt())
    at = torch.arange(T)
    q, k = rotate(q, at), rotate(k, at)
    return State(q, k, v, at.expand(B, H, T), attention_weights(q, k, (at <= at.unsqueeze(1))[None, None]))


SAME = {"observed": lambda s: h2o_score(s) / SEEN_BY, "tova": tova_score, "snapkv": lambda s: snapkv_score(s, WINDOW) / WINDOW, "snapkv, 1": lambda s: snapkv_score(s, WINDOW, 1) / WINDOW, "keydiff": keydiff_score, "knorm": key_norm_score,
        "expected": partial(expected_attention_score, n_future=AHEAD), "expected, mean": partial(expected_attention_score, n_future=AHEAD, covariance=False),
        "expected, no norm": partial(expected_attention_score, n_future=AHEAD, n_sink=1, value_norm=False)}


@pytest.mark.parametrize("name", SAME)
def test_scores(state, name):
    "Equal wherever kvpress scores; what it protects by a number above all others is infinite here. Its table of turns is float32."
    assert set(SAME) == set(ORACLE["scores"])
    ours, theirs = SAME[name](state), torch.tensor(ORACLE["scores"][name], dtype=torch.float64).view(B, H, T)
    kept = ours == math.inf
    if name == "tova": kept[..., -1] = True                                            # kvpress protects the last token; TOVA's authors score it
    assert kept.sum() == B * H * {"tova": 1, "snapkv": WINDOW, "snapkv, 1": WINDOW, "expected": 4, "expected, mean": 4, "expected, no norm": 1}.get(name, 0)
    assert (theirs[kept] > theirs[~kept].max()).all() if kept.any() else True
    torch.testing.assert_close(ours[~kept], theirs[~kept], rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("ratio", RATIOS)
def test_what_is_kept(state, ratio):
    "The same slots, where a float can say the ratio."
    def theirs(name): return torch.tensor([c == "1" for c in ORACLE["kept"][f"{name}, {ratio}"]]).view(B, H, T)
    assert torch.equal(StreamingLLM([state], compression_ratio=ratio)[0], theirs("streaming"))
    got = AdaSnapKV([state], compression_ratio=ratio, window_size=WINDOW)[0]
    assert torch.equal(got, theirs("adakv")) and (got.sum(2) != T * (1 - ratio)).any()


def test_pyramids():
    "kvpress rounds each layer's point on the line and has no sum to keep: a slot apart at most."
    for name, line in ORACLE["pyramid"].items():
        n, ratio = name.split(", ")
        kept = int(int(n) * (1 - float(ratio)))
        ours = pyramid([torch.zeros(1, 1, int(n)).index_fill(2, torch.tensor([int(n) - 1]), math.inf)] * 4, torch.full((4, 1, 1), kept)).flatten().tolist()
        assert sum(ours) == 4 * kept and max(abs(a - b) for a, b in zip(ours, line)) <= 1, name
