"""The stand-ins: brute force over all caches of a small row, evaluation against masks in a full cache, loops for the loss and the habits, algebra in float64, and what each head is for."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from deepclustering.core.data import load_tinyshakespeare
from deepclustering.core.tinylm import Cache, State, TinyLM, needles, trained_needle_lm
from deepclustering.kv import standins
from deepclustering.kv.standins import (NOTE, RECITE, STAND_INS, StandIn, character_loss, character_rows, evaluate, habits, has_habits, head_loss, head_rows, is_first, is_value, needle_rows, stand_in,
                                        train_characters, train_heads, with_outliers, with_sink)

TRAINED = ("needles", "sink", "outliers", "heads")
made = {}


def of(name):
    if name not in made: made[name] = stand_in(name)
    return made[name]


def random_lm(seed=0, **config):
    torch.manual_seed(seed)
    return TinyLM(13, **{"dim": 12, "heads": 6, "kv_heads": 2, "head_dim": 4, "std": .3, **config}).double().eval().requires_grad_(False)


def masked(stand_in, masks, n_rows, seed):
    "Logits of the questions from a full cache in which slots were emptied."
    context, questions, labels = stand_in.sample(torch.Generator().manual_seed(seed), n_rows)
    cache = Cache()
    with torch.no_grad():
        stand_in.model(context, cache)
        for layer, (k, v, p) in cache.layers.items(): cache.layers[layer] = k, v, torch.where(masks[layer], p, -1)
        return stand_in.model(questions, cache), labels


@pytest.mark.parametrize("name", TRAINED)
def test_evaluate_is_masking(name):
    s, g, n = of(name), torch.Generator().manual_seed(3), 6
    H = s.model.config["kv_heads"]
    masks = [torch.rand(n, H, 130, generator=g) < torch.rand(n, H, 1, generator=g) for _ in range(2)]
    masks[1][0, 0] = False                                                            # a head that keeps nothing
    got, held = evaluate(s, lambda states: iter(masks), n, 9, return_bytes=True)
    logits, labels = masked(s, masks, n, 9)
    assert torch.allclose(got, (logits.argmax(-1) == labels).float().mean(1))
    assert held == sum(int(m.sum()) for m in masks) * (2 * 16 * 4 + 4) + 2 * 8 * 2 * n * H     # keys, values, positions; two tables a layer
    everything, all_held = evaluate(s, None, n, 9, return_bytes=True)
    with torch.no_grad():
        context, questions, labels = s.sample(torch.Generator().manual_seed(9), n)
        direct = s.model(torch.cat([context, questions], 1))[:, 130:].argmax(-1) == labels
    assert torch.allclose(everything, direct.float().mean(1)) and all_held > held
    assert torch.equal(got, evaluate(s, lambda states: masks, n, 9)) and evaluate(s, None, n, 10).shape == (n,)
    wide = evaluate(s, lambda states: [torch.ones(1, 1, 130, dtype=torch.bool)] * 2, n, 9)   # for all rows and heads
    assert torch.equal(wide, everything)


def test_what_keep_sees():
    s = of("heads")
    context, questions, _ = s.sample(torch.Generator().manual_seed(2), 3)
    with torch.no_grad(): _, whole = s.model(torch.cat([context, questions], 1), return_states=True)
    for aware in (False, True):
        seen = []
        evaluate(s, lambda states: seen.extend(states) or [torch.ones(1, 1, 130, dtype=torch.bool)] * 2, 3, 2, query_aware=aware)
        T = 150 if aware else 130
        for state, w in zip(seen, whole, strict=True):
            torch.testing.assert_close(state.keys, w.keys[:, :, :130]); torch.testing.assert_close(state.values, w.values[:, :, :130])
            torch.testing.assert_close(state.queries, w.queries[:, :, :T]); torch.testing.assert_close(state.attention, w.attention[:, :, :T, :130])
            assert torch.equal(state.positions, torch.arange(130).expand(3, 2, 130))
    # a method that sees the questions finds the values by itself
    def by_attention(states): return [s.attention[:, :, 130:].unflatten(1, (2, -1)).sum((2, 3)).argsort(2, descending=True).argsort(2) < 22 for s in states]
    aware, blind = evaluate(s, by_attention, 32, 5, query_aware=True).mean(), evaluate(s, lambda states: [s.attention.unflatten(1, (2, -1)).sum((2, 3)).argsort(2, descending=True).argsort(2) < 22 for s in states], 32, 5).mean()
    assert aware > .9 > .6 > blind


def test_bad_input():
    s = of("needles")
    for message, keep in {"keep must return 2 masks, one for each layer, got 3": lambda states: [states[0].positions >= 0] * 3, "keep must return booleans, got .'torch.int64'": lambda states: [states[0].positions] * 2,
                          "which must have the shape": lambda states: [torch.ones(1, 1, 129, dtype=torch.bool)] * 2}.items():
        with pytest.raises(ValueError, match=message): evaluate(s, keep, 2)
    for message, call in {"n_rows must be at least 1": lambda: evaluate(s, None, 0), "seed must be at least 0": lambda: evaluate(s, None, 2, -1), "name must be one of needles, sink": lambda: stand_in("haystack"), "seed must be a whole": lambda: stand_in("needles", .5),
                          "factor must be above 0, got -1": lambda: with_outliers(s.model, -1), "tokens must all begin": lambda: with_sink(s.model, torch.tensor([[3], [4]])), "device must be": lambda: evaluate(s, device="abacus")}.items():
        with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize("name", ("needles", "sink", "outliers"))
@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_by_brute_force(name, seed):
    "All 2^10 caches of a row of ten tokens: whoever answers both questions keeps the optimum, and the optimum answers."
    s, g = of(name), torch.Generator().manual_seed(seed)
    tokens, labels = needles(g, 1, 8, 2)
    context = tokens[:, :10]
    subsets = (torch.arange(1024).unsqueeze(1) >> torch.arange(10)) % 2 == 1
    tiny = s._replace(sample=lambda generator, n: (context.expand(n, -1), tokens[:, 10:].expand(n, -1), labels[:, 10:].expand(n, -1)))
    right = evaluate(tiny, lambda states: [subsets.unsqueeze(1)] * 2, 1024) == 1
    optimal = s.optimal(context)[0]
    assert right[(subsets == optimal).all(1)].item()
    smaller = right & (subsets.sum(1) < optimal.sum())
    assert smaller.sum() <= 1024 // 100                                               # a guess may be right
    if name == "sink": assert not right[~subsets[:, 0]].any()


@pytest.mark.parametrize("name", TRAINED)
def test_optimal_keeps_and_chance_does_not(name):
    s = of(name)
    context = s.sample(torch.Generator().manual_seed(21), 64)[0]
    optimal = s.optimal(context)
    g = torch.Generator().manual_seed(0)
    some = torch.rand(64, 130, generator=g).argsort(1).argsort(1) < optimal.sum(1, keepdim=True)
    full, best, chance = (evaluate(s, keep, 64, 21).mean() for keep in (None, lambda states: [optimal.unsqueeze(1)] * 2, lambda states: [some.unsqueeze(1)] * 2))
    assert full > .99 and best > .98 and chance < .45
    for drop in ("value", "first"):                                                   # nothing of it can go
        less = optimal.clone()
        if drop == "first": less[:, 0] = False
        else: less[torch.arange(64), is_value(context).int().argmax(1)] = False
        worse = evaluate(s, lambda states: [less.unsqueeze(1)] * 2, 64, 21).mean()
        if drop == "value": assert best - worse > .5 / (16 if name != "heads" else 20)
        elif name in ("sink", "heads"): assert worse < best - .05
    if s.by_head:
        masks = s.by_head(context)
        assert evaluate(s, lambda states: masks, 64, 21).mean() > .98 and sum(int(m.sum()) for m in masks) < 2 * s.model.config["kv_heads"] * int(optimal.sum())
        assert torch.equal(optimal, torch.cat(masks, 1).any(1))


def test_what_each_head_is_for():
    s = of("heads")
    context, _, labels = s.sample(torch.Generator().manual_seed(4), 64)
    def parts(change):
        masks = [m.clone() for m in s.by_head(context)]
        change(masks)
        logits, _ = masked(s, masks, 64, 4)
        right = (logits.argmax(-1) == labels).double()
        return float(right[:, :NOTE].mean()), float(right[:, NOTE:].mean())
    def nothing(masks): pass
    def no_local(masks): masks[0][:, 1] = False; masks[1][:] = False
    def no_retrieving(masks): masks[0][:, 0] &= is_first(context)
    def no_rest(masks): masks[0][:, 0, 0] = False
    def short(masks): masks[0][:, 1, 1:-2] = False; masks[1][:, :, 1:-2] = False
    assert min(parts(nothing)) > .98
    note, needle = parts(no_local); assert note < .3 and needle > .95
    note, needle = parts(no_retrieving); assert note > .95 and needle < .1
    note, needle = parts(no_rest); assert note < .7 and needle > .95
    assert parts(short)[0] < .7


def test_outliers_change_no_score():
    model = random_lm()
    before, tokens = copy.deepcopy(model.state_dict()), torch.randint(13, (3, 17), generator=torch.Generator().manual_seed(0))
    _, plain = model(tokens, return_states=True)
    for factor, pair, i in ((30., -1, 1), (.1, 0, 0), (32, 1, 1)):
        twin = with_outliers(model, factor, pair)
        logits, states = twin(tokens, return_states=True)
        torch.testing.assert_close(logits, model(tokens), atol=1e-12, rtol=0)
        for a, b in zip(plain, states):
            ratio = b.keys / a.keys
            by = torch.ones(4).double(); by[[i, i + 2]] = factor
            torch.testing.assert_close(ratio, by.expand_as(ratio), atol=1e-9, rtol=0)
            torch.testing.assert_close(b.queries * by, a.queries, atol=1e-12, rtol=0); torch.testing.assert_close(a.values, b.values, atol=1e-12, rtol=0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    single = random_lm().float()
    assert torch.equal(with_outliers(single)(tokens), single(tokens))                    # a power of two
    with pytest.raises(IndexError): with_outliers(model, 2, 2)


@pytest.mark.parametrize("config", ({}, {"kv_heads": 1, "depth": 3}, {"heads": 2, "kv_heads": 2, "hidden": 7, "shift": False}), ids=str)
def test_a_sink_can_be_planted_anywhere(config):
    model = random_lm(**config)
    before, g = copy.deepcopy(model.state_dict()), torch.Generator().manual_seed(1)
    rows = torch.randint(12, (32, 20), generator=g); rows[:, 0] = 12
    twin, fresh = with_sink(model, rows, tiny=1e-5), rows[:8]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    logits, states = twin(fresh, return_states=True)
    torch.testing.assert_close(logits, model(fresh), atol=1e-3, rtol=0)
    G = model.config["heads"] // model.config["kv_heads"]
    _, old = model(fresh, return_states=True)
    for s, o in zip(states, old):
        assert s.keys.shape[1] == model.config["kv_heads"] + 1 and s.queries.shape[1] == model.config["heads"] + G
        torch.testing.assert_close(s.keys[:, :-1], o.keys, atol=1e-3, rtol=0)
        scores = (s.queries[:, -G:] @ s.keys[:, -1:].mT / 2).masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), -math.inf)
        assert (scores[..., 0] >= 15 - 1e-4).all() and scores[..., 1:][scores[..., 1:] > -math.inf].abs().max() < 1e-9
        assert (s.attention[:, -G:, 1:, 0] > 1 - 19 * math.exp(-14.9)).all()
        assert s.values[:, -1, 0].abs().max() < 1e-6 and (s.values[:, -1, 1:, 0] > 0).all()
    for stays in (torch.arange(20) > 0, torch.arange(20) == 5):                         # without the first token the last layer's head adds u, whatever is kept
        cache = Cache(); twin(fresh, cache)
        last = len(states) - 1
        for layer in cache.layers:
            k, v, p = cache.layers[layer]
            if layer == last: cache.layers[layer] = k, v, torch.where(stays, p, -1)
        assert (twin(fresh[:, 1:2], cache) - model(torch.cat([fresh, fresh[:, 1:2]], 1))[:, -1:]).abs().max() > 1


def test_rows_of_the_heads():
    for seed, shape in enumerate(({}, {"length": 24, "n_needles": 10}, {"length": 7, "n_needles": 1})):
        context, questions, labels = head_rows(torch.Generator().manual_seed(seed), 40, **shape)
        n, m = shape.get("length", 128), shape.get("n_needles", 16)
        assert context.shape == (40, n + 2) and questions.shape == labels.shape == (40, 4 + m)
        for c, q, l in zip(context.tolist(), questions.tolist(), labels.tolist()):
            assert c[0] == 254 and c[-1] == 255 and RECITE not in c and q[:4] == [RECITE] * 4 and l[:4] == c[-5:-1] and all(128 <= t < 144 for t in l[:4])
            hay = c[1:-5]
            memory = {hay[i]: hay[i + 1] for i in range(0, len(hay) - 1, 2) if hay[i] < 64}
            assert len(memory) == m and [memory[k] for k in q[4:]] == l[4:]
    assert all(torch.equal(a, b) for a, b in zip(head_rows(torch.Generator().manual_seed(5), 3), head_rows(torch.Generator().manual_seed(5), 3)))
    with pytest.raises(ValueError, match="n_needles must be"): head_rows(torch.Generator(), 2, 24, 11)


def test_loss_of_the_heads_by_loops():
    torch.manual_seed(0)
    model = TinyLM(256, dim=16, std=.4).double()
    batch = head_rows(torch.Generator().manual_seed(0), 2, 11, 2)
    tokens, T, window = torch.cat(batch[:2], 1), 13, 3
    logits, states = model(tokens, return_states=True)
    p = logits.log_softmax(-1)
    loss = -sum(p[b, T + i, batch[2][b, i]] for b in range(2) for i in range(6)) / 12
    for layer, head in ((0, 1), (1, 0), (1, 1)):
        a, n = states[layer].attention[:, 2 * head:2 * head + 2], tokens.shape[1]
        loss = loss + sum(a[b, h, t, s] for b in range(2) for h in range(2) for t in range(window, n) for s in range(1, t - window + 1)) / (4 * (n - window))
    loss = loss + sum(1 - states[0].attention[b, h, t, 0] for b in range(2) for h in range(2) for t in range(T, T + 4)) / 16
    got = head_loss(model, batch, window)
    assert abs(float((got - loss).detach())) < 1e-10
    got.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_characters():
    text = load_tinyshakespeare()
    letters, unseen = sorted(set(text)), text[9 * len(text) // 10:]
    x, y, z = character_rows(torch.Generator().manual_seed(0), 20)
    assert x.shape == (20, 256) and y.shape == z.shape == (20, 16)
    for row in torch.cat([x, y, z[:, -1:]], 1).tolist(): assert "".join(letters[i] for i in row) in unseen
    assert torch.equal(y[:, 1:], z[:, :-1]) and character_rows(torch.Generator(), 2, 5, 3)[1].shape == (2, 3)
    state = torch.random.get_rng_state()
    (a, records), (b, _) = (train_characters(1, ((16, 3, 1e-3), (32, 2, 1e-3))) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())) and [r["step"] for r in records] == [3, 2] and not a.training and torch.equal(state, torch.random.get_rng_state())
    assert any((p != q).any() for p, q in zip(a.parameters(), train_characters(2, ((16, 1, 1e-3),))[0].parameters()))
    s = StandIn("characters", a, character_rows, None, {}, "bits")
    masks = [torch.rand(4, 2, 256, generator=torch.Generator().manual_seed(0)) < .3 for _ in range(2)]
    logits, labels = masked(s, masks, 4, 3)
    bits = -logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2).mean(1) / math.log(2)
    torch.testing.assert_close(evaluate(s, lambda states: masks, 4, 3), bits, atol=1e-5, rtol=0)
    assert abs(float(evaluate(s, None, 8).mean()) - math.log2(65)) < 1.5                # knows next to nothing
    rows = torch.cat([x, y], 1)[:2, :9]
    with torch.no_grad(): by_hand = -sum(a(rows[:, :t + 1])[:, -1].log_softmax(-1)[range(2), rows[:, t + 1]].sum() for t in range(8)) / 16
    assert abs(float(character_loss(a, rows).detach() - by_hand)) < 1e-5


def test_unanswered_questions_do_not_count():
    s = of("needles")
    def half(generator, n):
        context, questions, labels = needle_rows(generator, n)
        labels[:, ::2] = -100
        return context, questions, labels
    assert evaluate(s._replace(sample=half), None, 8).mean() == 1
    never = s._replace(sample=lambda generator, n: (*needle_rows(generator, n)[:2], torch.tensor([[5] + 15 * [-100]]).expand(n, -1)))
    assert evaluate(never, None, 8).mean() == 0


def test_habits_by_hand():
    "Two heads of one layer, two queries each; the later one counts."
    a = torch.zeros(1, 2, 40, 40)
    a[0, 0, :, 0] = 1; a[0, 0, 20:, 0], a[0, 0, 20:, 1] = .25, .75                      # far, not the first
    a[0, 1] = torch.eye(40)
    keys = torch.ones(1, 2, 40, 4); keys[0, 1, :, 2] = -7
    h = habits([State(torch.zeros(1, 2, 40, 4), keys, keys, torch.arange(40).expand(1, 2, 40), a)])
    assert h.sink == .25 and h.outlier == 7
    assert abs(h.spread - .75) < 1e-6
    near = a.clone(); near[0, 0, 20:] = 0
    for t in range(20, 40): near[0, 0, t, t - 15], near[0, 0, t, t - 16] = .5, .5       # 16 back is far, 15 is not
    near[0, 0, 20] = 0; near[0, 0, 20, 5], near[0, 0, 20, 4] = .5, .5
    assert abs(habits([State(keys, keys, keys, keys[..., 0].long(), near)]).spread - .5) < 1e-6
    assert {name: list(of(name).premise.values()) for name in TRAINED} == {"needles": [False] * 3, "sink": [True, False, True], "outliers": [False, True, False], "heads": [True, False, True]}
    assert has_habits(of("outliers"), 2) == of("outliers").premise


def test_trained_once(tmp_path, monkeypatch):
    calls, good = [], of("heads").model
    def fake(seed=0, folder=None): calls.append(seed); return copy.deepcopy(good), [{"step": 1}]
    monkeypatch.setattr(standins, "train_heads", fake)
    first, second = stand_in("heads", 5, tmp_path), stand_in("heads", 5, tmp_path)
    assert calls == [5] and all(torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters())) and not second.model.training
    stand_in("heads", 6, tmp_path); assert calls == [5, 6]
    monkeypatch.setattr(standins, "train_heads", lambda seed=0, folder=None: (TinyLM(256).eval(), []))
    with pytest.raises(RuntimeError, match="heads-5 was trained and failed its check"): stand_in("heads", 5, tmp_path)
    monkeypatch.setattr(standins, "train_characters", lambda seed=0: (TinyLM(65).eval(), []))
    with pytest.raises(RuntimeError, match="characters-0 was trained and failed"): stand_in("characters", 0, tmp_path)
    assert STAND_INS == ("needles", "sink", "outliers", "heads", "characters") and all(of(n).name == n for n in TRAINED)


def test_training_of_the_heads_is_repeatable():
    stages = ((16, 2, 2, 1e-3), (24, 3, 1, 1e-3))
    (a, records), (b, _) = (train_heads(0, stages, more=0) for _ in range(2))
    assert [r["step"] for r in train_heads(0, stages, more=2)[1]] == [2, 1, 1, 1]        # far from learned: the last stage again
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())) and [r["step"] for r in records] == [2, 1] and not a.training
    assert any((p != q).any() for p, q in zip(a.parameters(), trained_needle_lm().parameters()))


@pytest.mark.parametrize("losses, right, repeats", (([.01] * 4, [.98, .985, .995], 2), ([.06, .04, .04, .04], [1.], 1), ([.04] * 4, [.5] * 4, 3)), ids=("the oracle's cache", "the loss", "never"))
def test_training_of_the_heads_ends_when_both_are_good(monkeypatch, losses, right, repeats):
    losses, right, rows, good = iter(losses), iter(right), [], of("heads").model
    monkeypatch.setattr(standins, "trained_needle_lm", lambda seed, folder=None: copy.deepcopy(good))
    monkeypatch.setattr(standins, "train", lambda model, *args, **kwargs: SimpleNamespace(records=[{"loss": next(losses)}]))
    monkeypatch.setattr(standins, "_by_head_accuracy", lambda model, seed, n_rows=64: rows.append((seed, n_rows)) or next(right))
    assert len(train_heads(7, ((16, 1, 1, 1e-3),), more=3)[1]) == 1 + repeats
    assert set(rows) == {(2**31 + 7, 128)}                                            # none of the rows that the check and the tests look at


@pytest.mark.slow
def test_recency_is_what_characters_need():
    s, at = stand_in("characters"), torch.arange(256)
    some = torch.rand(64, 1, 256, generator=torch.Generator().manual_seed(0)).argsort(2).argsort(2) < 32
    full, newest, chance = (float(evaluate(s, keep, 64, 1).mean()) for keep in (None, lambda states: [(at >= 224).view(1, 1, -1)] * 2, lambda states: [some] * 2))
    assert full < 2.9 and abs(newest - full) < .03 and chance > full + .05
