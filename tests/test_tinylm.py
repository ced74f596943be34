"""The small language model under random shapes, caches that forget, padding, and the needles that it is trained on."""
import math
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepclustering.core.models import model_spec
from deepclustering.core.tinylm import (STAGES, Attention, Cache, TinyLM, attend, attention_weights, needle_loss, needles, recall, rotate, train_needle_lm, trained_needle_lm,
                                        trained_once)

SHAPES = {"grouped": {"dim": 12, "heads": 6, "kv_heads": 2, "head_dim": 4}, "one key head": {"dim": 8, "heads": 4, "kv_heads": 1, "shift": False, "depth": 3}, "as many": {"dim": 6, "heads": 1, "kv_heads": 1, "gated": False, "depth": 1}}
each = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def lm(shape, seed=0, vocab=13):
    torch.manual_seed(seed)
    return TinyLM(vocab, std=0.4, **shape).double().eval().requires_grad_(False)


def close(a, b, atol=1e-10): torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- rotations and attention --------------------------------------------------------------------------------------------

def test_rotate_is_a_rotation():
    torch.manual_seed(0)
    for D, base in ((2, 1e4), (6, 500.), (64, 1e6)):
        x, at = torch.randn(2, 3, 7, D).double(), torch.randint(0, 10**6, (2, 1, 7))
        y = rotate(x, at, base)
        close(y.norm(dim=-1), x.norm(dim=-1))
        matrix = torch.zeros(D, D).double()
        for i in range(D // 2):
            angle = int(at[1, 0, 4]) * base ** (-2 * i / D)
            matrix[i, i] = matrix[i + D // 2, i + D // 2] = math.cos(angle)
            matrix[i + D // 2, i], matrix[i, i + D // 2] = math.sin(angle), -math.sin(angle)
        close(y[1, 2, 4], matrix @ x[1, 2, 4], 1e-8)
        close(rotate(rotate(x, at, base), -at, base), x)
    assert rotate(torch.randn(3, 4).bfloat16(), torch.arange(3)).dtype == torch.bfloat16
    assert rotate(torch.randn(4, 8, 2).mT[..., :2], torch.arange(2)).shape == (4, 2, 2)


def test_rotate_in_float32_stays_exact_far_out():
    torch.manual_seed(0)
    q, k = torch.randn(1, 16), torch.randn(1, 16)
    near, far = ((rotate(q, torch.tensor([n + 9])) * rotate(k, torch.tensor([n]))).sum() for n in (0, 10**7))
    close(near, far, 1e-4)


@pytest.mark.parametrize("B, H, K, T, S", [(1, 1, 1, 1, 1), (2, 4, 2, 3, 7), (3, 6, 1, 5, 5), (2, 3, 3, 1, 9)])
def test_attend_is_pytorchs(B, H, K, T, S):
    torch.manual_seed(B)
    q, k, v = torch.randn(B, H, T, 4).double(), torch.randn(B, K, S, 4).double(), torch.randn(B, K, S, 4).double()
    for mask_shape, bias_shape in (((1, 1), (1, 1, 1)), ((B, K), (B, K, T)), ((B, 1), (1, K, 1)), ((1, K), (B, 1, T))):
        visible, bias = torch.rand(*mask_shape, T, S) < 0.8, torch.randn(*bias_shape, S).double()
        visible[..., 0] = True
        full = visible.expand(B, K, T, S).repeat_interleave(H // K, 1)
        for b in (None, bias):
            mask = torch.zeros(B, H, T, S).double().masked_fill(~full, -math.inf) + (0 if b is None else b.expand(B, K, T, S).repeat_interleave(H // K, 1))
            close(attend(q, k, v, visible, b), F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))
            weights = attention_weights(q, k, visible, b)
            close(weights @ v.repeat_interleave(H // K, 1), attend(q, k, v, visible, b)); close(weights.sum(-1), torch.ones(B, H, T).double())
            assert (weights[~full] == 0).all()


def test_a_query_that_sees_nothing_gets_zero_and_harmless_gradients():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    visible = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()[None, None]
    for bias in (None, torch.zeros(1, 1, 1, 3)):
        out = attend(q, k, v, visible, bias)
        assert (out[:, :, 1] == 0).all() and (attention_weights(q, k, visible, bias)[:, :, 1] == 0).all()
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert all(torch.isfinite(g).all() for g in grads) and (grads[0][:, :, 1] == 0).all()


# --- the model ------------------------------------------------------------------------------------------------------------

@each
def test_causal_to_the_bit(shape):
    torch.manual_seed(0)
    model, tokens = lm(shape).float(), torch.randint(13, (4, 40))
    before = model(tokens)
    for t in (1, 17, 39):
        other = tokens.clone()
        other[:, t:] = torch.randint(13, (4, 40 - t))
        assert torch.equal(model(other)[:, :t], before[:, :t])


@each
def test_any_partition_gives_the_same(shape):
    torch.manual_seed(1)
    model, tokens = lm(shape), torch.randint(13, (3, 12))
    whole = model(tokens)
    for _ in range(5):
        cuts = [0, *sorted(torch.randperm(11)[:3].add(1).tolist()), 12]
        cache = Cache()
        close(torch.cat([model(tokens[:, a:b], cache) for a, b in zip(cuts, cuts[1:])], 1), whole)
        assert cache.seen.tolist() == [12] * 3 and all(p.shape == (3, shape["kv_heads"], 12) for _, _, p in cache.layers.values()) and len(cache.layers) == len(model.blocks)


class Forgetful(Cache):
    "Empties slots by chance, head by head, and writes down what each step saw."
    def __init__(self, seed): super().__init__(); self.generator, self.log = torch.Generator().manual_seed(seed), []
    def update(self, layer, keys, values, positions, queries=None):
        assert queries.shape[2] == keys.shape[2] and queries.shape[0] == len(keys)
        seen = super().update(layer, keys, values, positions)
        self.log.append((layer, seen[2]))
        lost = torch.rand(seen[2].shape, generator=self.generator) < 0.3
        self.layers[layer] = *seen[:2], torch.where(lost, -1, seen[2])
        return seen


@each
def test_forgetting_is_masking(shape):
    "Steps with a cache that loses entries, against attention over all of them with a mask that the cache's log dictates."
    torch.manual_seed(2)
    model, tokens = lm(shape), torch.randint(13, (2, 10))
    cache = Forgetful(3)
    stepwise = torch.cat([model(t, cache) for t in tokens.split(1, 1)], 1)
    K = shape["kv_heads"]
    masks = torch.zeros(len(model.blocks), 2, K, 10, 10, dtype=torch.bool)
    for i, (layer, positions) in enumerate(cache.log):
        t = i // len(model.blocks)
        for b in range(2):
            for h in range(K): masks[layer, b, h, t, positions[b, h][positions[b, h] >= 0]] = True

    class Masked(Attention):
        def forward(self, x, positions, layer, **context):
            q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            k, v, mask = (u.repeat_interleave(q.shape[1] // K, 1) for u in (rotate(k, positions), v, masks[layer]))
            return self.o_proj(F.scaled_dot_product_attention(rotate(q, positions), k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    twin = TinyLM(13, **shape, attention=lambda dim: Masked(dim, shape["heads"], K, shape.get("head_dim"))).double()
    twin.load_state_dict(model.state_dict())
    close(stepwise, twin(tokens).detach())
    assert (stepwise - model(tokens)).abs().max() > 1e-3


@each
def test_dropping_a_slot_is_emptying_it(shape):
    torch.manual_seed(3)
    model, tokens = lm(shape), torch.randint(13, (2, 9))
    keep = torch.tensor([0, 2, 3, 6])
    dropped, emptied = Cache(), Cache()
    for cache in (dropped, emptied): model(tokens[:, :7], cache)
    for layer in dropped.layers:
        k, v, p = dropped.layers[layer]
        dropped.layers[layer] = k[:, :, keep], v[:, :, keep], p[:, :, keep]
        k, v, p = emptied.layers[layer]
        emptied.layers[layer] = torch.full_like(k, 7.), torch.full_like(v, 9.), torch.full_like(p, -1)
        for new, old in zip(emptied.layers[layer], (k, v, p)): new[:, :, keep] = old[:, :, keep]
    shuffled = Cache()
    shuffled.seen, shuffled.last = dropped.seen, dropped.last
    shuffled.layers = {layer: tuple(t[:, :, [2, 0, 3, 1]] for t in entry) for layer, entry in dropped.layers.items()}
    out = model(tokens[:, 7:], dropped)
    close(model(tokens[:, 7:], emptied), out); close(model(tokens[:, 7:], shuffled), out)        # the order of slots is nobody's business


@each
def test_padding_on_either_side(shape):
    torch.manual_seed(4)
    model = lm(shape)
    for _ in range(5):
        lengths = torch.randint(1, 8, (4,))
        rows, more = [torch.randint(13, (1, int(n))) for n in lengths], torch.randint(13, (4, 3))
        for left in (False, True):
            tokens, positions = torch.randint(13, (4, 7)), torch.full((4, 7), -1)
            for b, row in enumerate(rows):
                n = row.shape[1]
                where = slice(7 - n, 7) if left else slice(0, n)
                tokens[b, where], positions[b, where] = row[0], torch.arange(n)
            cache = Cache()
            out, after = model(tokens, cache, positions), model(more, cache)
            assert torch.isfinite(out).all() and torch.equal(cache.seen, lengths + 3)
            for b, row in enumerate(rows):
                close(out[b][positions[b] >= 0], model(row)[0])
                close(after[b], model(torch.cat([row, more[b:b + 1]], 1))[0, -3:])


def test_positions_that_do_not_begin_at_zero():
    "Without a shift only distances count; with it, nothing is known before the first token that was given."
    torch.manual_seed(5)
    tokens, at = torch.randint(13, (2, 6)), torch.arange(6).expand(2, 6)
    for shape in SHAPES.values(): close(lm(shape)(tokens, positions=at + 1000), lm(shape)(tokens), 1e-9)


@each
def test_gradients_pass_through_the_cache(shape):
    torch.manual_seed(6)
    model, tokens = lm(shape).requires_grad_(True), torch.randint(13, (2, 8))
    whole = torch.autograd.grad(model(tokens).square().sum(), list(model.parameters()))
    cache = Cache()
    parts = torch.autograd.grad(torch.cat([model(t, cache) for t in tokens.split(3, 1)], 1).square().sum(), list(model.parameters()))
    for a, b in zip(whole, parts): close(a, b, 1e-9 * max(1, float(a.abs().max())))


def test_grouped_is_ungrouped_with_copied_keys():
    torch.manual_seed(7)
    model, tokens = lm(SHAPES["grouped"]), torch.randint(13, (2, 8))
    wide, state = TinyLM(**{**model.config, "kv_heads": 6}).double(), model.state_dict()
    for key in state:
        if "k_proj" in key or "v_proj" in key: state[key] = state[key].unflatten(0, (2, 4)).repeat_interleave(3, 0).flatten(0, 1)
    wide.load_state_dict(state)
    close(wide(tokens).detach(), model(tokens))


@each
def test_states_are_what_the_model_used(shape):
    torch.manual_seed(8)
    model, tokens = lm(shape), torch.randint(13, (2, 7))
    logits, states = model(tokens, return_states=True)
    assert torch.equal(logits, model(tokens)) and len(states) == len(model.blocks)
    G = shape["heads"] // shape["kv_heads"]
    for block, s in zip(model.blocks, states):
        assert (s.positions == torch.arange(7)).all() and s.positions.shape == s.keys.shape[:3]
        close(s.attention, s.attention.tril()); close(s.attention.sum(-1), torch.ones_like(s.attention[..., 0]))
        used = []
        hook = block.attention.o_proj.register_forward_pre_hook(lambda module, inputs: used.append(inputs[0]))
        model(tokens); hook.remove()
        close((s.attention @ s.values.repeat_interleave(G, 1)).transpose(1, 2).flatten(2), used[0])
    cache = Cache()
    chunks = [model(t, cache, return_states=True)[1] for t in tokens.split(3, 1)]
    close(chunks[-1][-1].keys, states[-1].keys); close(chunks[-1][-1].attention, states[-1].attention[:, :, -1:])


def test_low_precision():
    torch.manual_seed(9)
    model, tokens = TinyLM(13, dim=32, std=0.2), torch.randint(13, (2, 30))
    expected = model(tokens)
    assert (model.bfloat16()(tokens).float() - expected).abs().max() < 0.1 * expected.abs().max() and torch.isfinite(model(tokens)).all()
    with torch.autocast("cpu", torch.bfloat16): assert (model.float()(tokens).float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_row_and_a_batch_must_fit_the_cache():
    model, cache = lm(SHAPES["grouped"]), Cache()
    model(torch.zeros(2, 3, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="the 2 rows that the cache has, got 3"): model(torch.zeros(3, 1, dtype=torch.int64), cache)
    assert cache.seen.tolist() == [3, 3] and cache.layers[0][0].shape[2] == 3                    # refused before anything was stored


# --- needles --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", [{}, {"length": 2, "n_needles": 1}, {"length": 33, "n_needles": 16, "n_keys": 16}, {"length": 10, "n_needles": 5, "n_keys": 500, "n_values": 1, "n_noise": 1}], ids=str)
def test_a_row_answers_its_questions(task):
    tokens, labels = needles(torch.Generator().manual_seed(0), n_rows=300, **task)
    n, m, keys, values, noise = (task.get(name, default) for name, default in (("length", 128), ("n_needles", 16), ("n_keys", 64), ("n_values", 64), ("n_noise", 126)))
    assert tokens.shape == labels.shape == (300, n + 2 + m) and tokens.max() == keys + values + noise + 1
    for row, answers in zip(tokens.tolist(), labels.tolist()):
        hay, memory = row[1:n + 1], {}
        for i, w in enumerate(hay):
            if w < keys: assert i % 2 == 0 and w not in memory and keys <= hay[i + 1] < keys + values; memory[w] = hay[i + 1]
            elif w < keys + values: assert i % 2 == 1 and hay[i - 1] < keys
        assert sorted(memory) == sorted(row[n + 2:]) and [memory[k] for k in row[n + 2:]] == answers[n + 2:] and set(answers[:n + 2]) == {-100}


def test_chance_level():
    "Values are uniform and questions come in every order: a model that knows nothing is right one time in 64."
    _, labels = needles(torch.Generator().manual_seed(1), n_rows=2000)
    counts = torch.bincount(labels[labels >= 0] - 64, minlength=64)
    assert counts.min() > 400 and counts.max() < 600                                             # 500 each, standard deviation 22
    class Constant(nn.Module):
        def __init__(self): super().__init__(); self.unused = nn.Parameter(torch.zeros(1))
        def forward(self, tokens): return F.one_hot(torch.full_like(tokens, 70), 256).float()
    assert abs(recall(Constant(), n_rows=2000) - 1 / 64) < 0.005


def test_training_is_repeatable_and_leaves_the_generators_alone():
    stages = ((12, 2, 6, 4e-3), (16, 2, 4, 1e-3))
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    a, records = train_needle_lm(5, stages, every=3)
    assert torch.equal(torch.rand(3), expected)
    b, _ = train_needle_lm(5, stages, every=3)
    c, _ = train_needle_lm(6, stages, every=3)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())) and not torch.equal(a.head.weight, c.head.weight)
    assert [r["step"] for r in records] == [3, 6, 9, 10] and all(r.keys() == {"step", "loss", "recall"} for r in records) and not a.training


def test_the_trained_model_is_shared_and_perfect():
    model, records = trained_needle_lm(records=True)
    assert model_spec(model)["class"] == "TinyLM" and sum(p.numel() for p in model.parameters()) == 123_200
    assert recall(model, seed=1001, n_rows=128) == 1 and records[-1]["recall"] == 1 and records[-1]["step"] == sum(s[2] for s in STAGES)
    start = time.process_time()
    again = trained_needle_lm()
    assert time.process_time() - start < 2 and all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters())) and not again.training
    tokens, labels = needles(torch.Generator().manual_seed(1002), n_rows=4)
    cache = Cache()
    with torch.no_grad():
        stepwise = torch.cat([model(t, cache) for t in tokens.split([130] + [1] * 16, 1)], 1)
        assert (stepwise - model(tokens)).abs().max() < 1e-4 * stepwise.abs().max() and torch.equal(stepwise[labels >= 0].argmax(-1), labels[labels >= 0])
        assert needle_loss(model, (tokens, labels)) < 0.05


def test_two_who_come_at_once_train_once(tmp_path):
    made = []
    def make():
        made.append(1); time.sleep(0.3)
        return TinyLM(5, dim=4, depth=1, heads=2, kv_heads=1), [{"step": 1}]
    results = []
    threads = [threading.Thread(target=lambda: results.append(trained_once("toy", {}, make, folder=tmp_path))) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert len(made) == 1 and len(results) == 3 and len({float(m.head.weight.detach().sum()) for m, _ in results}) == 1


def test_a_recipe_must_be_plain(tmp_path):
    with pytest.raises(TypeError): trained_once("toy", {"make": print}, None, folder=tmp_path)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"): trained_needle_lm(-1, folder=tmp_path)
