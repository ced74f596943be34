"""Laws that every exported `Method` of deepclustering.kv obeys, or says why it does not: a new method is tested by being exported."""
import inspect
import itertools
from dataclasses import replace
from fractions import Fraction
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch

import deepclustering.kv
from deepclustering.core.tinylm import State, attention_weights, rotate
from deepclustering.kv.eviction import EvictingCache, Looked, Method, keep_best, kept_slots, protect, uniform

B, H, G, T, D = 3, 2, 2, 40, 8


def exported():
    found = {}
    for module in iter_modules(deepclustering.kv.__path__):
        if module.name.startswith("_") or module.name.endswith("_triton"): continue
        for value in vars(import_module(f"deepclustering.kv.{module.name}")).values():
            if isinstance(value, Method): found.setdefault(value.name, value)
    return found


METHODS = exported()


def options(method):
    "What fits forty tokens: a window of four votes, chance is seeded."
    known = inspect.signature(method.score).parameters
    return {name: value for name, value in {"window_size": 4, "random_state": 0}.items() if name in known}


def normal(*shape, seed): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def raw(seed=0, n=T): return normal(B, G * H, n, D, seed=seed), normal(B, H, n, D, seed=seed + 1), normal(B, H, n, D, seed=seed + 2)


def state(q, k, v, at=None):
    "A prompt as an attention layer sees it."
    at = torch.arange(q.shape[2]).expand(len(q), -1) if at is None else at
    q, k = rotate(q, at.unsqueeze(1)), rotate(k, at.unsqueeze(1))
    slots = at.unsqueeze(1).expand(k.shape[:3])
    visible = (slots.unsqueeze(2) <= at.view(len(q), 1, -1, 1)) & (slots >= 0).unsqueeze(2)
    return State(q, k, v, slots, attention_weights(q, k, visible))


def layers(): return [state(*raw(seed)) for seed in (0, 10)]


def row(s, b): return type(s)(*(t[b:b + 1] for t in s))


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def law_budget(m):
    lengths = torch.tensor([40, 33, 21])
    at = torch.where(torch.arange(T) < lengths.view(3, 1), torch.arange(T), -1)
    states = [state(*raw(seed), at) for seed in (0, 10)]
    for given in (dict(budget=12), dict(budget=.3), dict(budget=Fraction(1, 3)), dict(compression_ratio=.7), dict(compression_ratio=.625), dict(budget=1.)):
        share = Fraction(str(given["budget"] if "budget" in given else 1)) if "compression_ratio" not in given else 1 - Fraction(str(given["compression_ratio"]))
        exact = [min(n, int(given["budget"])) if given.get("budget") == 12 else n * share.numerator // share.denominator for n in lengths.tolist()]
        masks = m(states, **given, **options(m))
        if [int(x.sum()) for x in torch.stack(masks).sum((0, 2)).sum(1)] != [2 * H * n for n in exact]: return False
        if m.allocate is uniform and any(mask.sum(2).tolist() != [[n] * H for n in exact] for mask in masks): return False
    return True


def law_batch(m): return all(same([x[b:b + 1] for x in m(layers(), 11, **options(m))], m([row(s, b) for s in layers()], 11, **options(m))) for b in range(B))


def law_padding(m):
    q, k, v = raw(n=T)
    plain = m([state(*(t[:, :, :30] for t in (q, k, v)))], 11, **options(m))[0]
    at = torch.arange(30).expand(B, -1)
    holes = torch.full((B, 10), -1)
    right = m([state(q, k, v, torch.cat([at, holes], 1))], 11, **options(m))[0]
    moved = [torch.cat([t[:, :, 30:], t[:, :, :30]], 2) for t in (q, k, v)]
    left = m([state(*moved, torch.cat([holes, at], 1))], 11, **options(m))[0]
    assert not right[..., 30:].any() and not left[..., :10].any()                     # never kept, by any method
    return same([right[..., :30], left[..., 10:]], [plain, plain])


def law_groups(m):
    q, k, v = raw()
    return same(m([state(q, k, v)], 11, **options(m)), m([state(q.repeat_interleave(2, 1), k, v)], 11, **options(m)))


def law_positions(m):
    s, order = state(*raw()), torch.randperm(T, generator=torch.Generator().manual_seed(5))
    s = Looked(*s, s.positions[:, 0])
    shuffled = s._replace(keys=s.keys[:, :, order], values=s.values[:, :, order], positions=s.positions[..., order], attention=s.attention[..., order])
    return same([m([s], 11, **options(m))[0][..., order]], m([shuffled], 11, **options(m)))


def law_chunks(m):
    s, cache = state(*raw()), EvictingCache(m, 11, **options(m))
    for part in torch.arange(T).split(7): cache.update(0, s.keys[:, :, part], s.values[:, :, part], s.positions[:, :, part], queries=s.queries[:, :, part])
    if m.allocate is uniform: assert cache.stored.tolist() == [[[11] * H] * B]
    else: assert (cache.stored.sum(2) <= 11 * H).all()                                # a head that was cut short cannot fill its share at once
    kept = cache.layers[0].rectangle()[2]
    return torch.equal(kept[kept >= 0], s.positions[m([s], 11, **options(m))[0]])


def law_full(m):
    s = state(*raw())
    if not all(x.all() for x in m([s], 1., **options(m)) + m([s], T + 5, **options(m))): return False
    mask = m([s], 11, **options(m))[0]
    slots = mask.int().argsort(dim=2, descending=True, stable=True)[..., :int(mask.sum(2).max())]   # what stays, in its order, then empty slots
    real = mask.gather(2, slots)
    def pick(t): return t.gather(2, slots.unsqueeze(3).expand(-1, -1, -1, D))
    seen = (s.attention * mask.repeat_interleave(G, 1).unsqueeze(2)).gather(3, slots.repeat_interleave(G, 1).unsqueeze(2).expand(-1, -1, T, -1))
    again = Looked(s.queries, pick(s.keys), pick(s.values), s.positions.gather(2, slots).where(real, -1), seen, s.positions[:, 0])
    return torch.equal(m([again], 11, **options(m))[0], real)


def law_ties(m):
    s, bare = state(*raw()), replace(m, sinks=0, recent=0)
    scores = m.score(s, **options(m))
    scores = torch.where(scores.isinf(), scores, (3 * scores / scores[~scores.isinf()].abs().max()).round())   # at most seven different ones
    counts = torch.full((1, B, H), 17)
    mask, = bare.choose([scores], [s.positions], counts)
    for i, j in itertools.combinations(range(T), 2):
        if ((scores[..., i] == scores[..., j]) & mask[..., j] & ~mask[..., i]).any(): return False
    return same(m([s], 11, **options(m)), m([s], 11, **options(m))) and same([mask], bare.choose([scores], [s.positions], counts))


def law_NaN(m):
    s = state(*raw())
    for name in ("queries", "keys", "values"): getattr(s, name)[1, 0, 20, 2] = torch.nan
    s.attention[1, 0, :, 20] = torch.nan
    try: m([s], 11, **options(m))
    except ValueError as e: return "scores must not be NaN" in str(e)
    return False


LAWS = {name.removeprefix("law_"): law for name, law in dict(globals()).items() if name.startswith("law_")}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", METHODS)
def test_law(name, law):
    method = METHODS[name]
    assert LAWS[law](method) == (law not in method.differs), method.differs.get(law, "it does not say that it differs")


@pytest.mark.parametrize("name", METHODS)
def test_errors(name):
    method, s = METHODS[name], state(*raw())
    assert set(method.differs) <= set(LAWS) and all(isinstance(why, str) and why for why in method.differs.values())
    for bad in (0, 0., -1, 1.5, True, None, float("nan"), "half"):
        with pytest.raises(ValueError, match="budget"): method([s], bad, **options(method))
    with pytest.raises(ValueError, match="compression_ratio"): method([s], compression_ratio=1., **options(method))
    with pytest.raises(ValueError, match="either budget or compression_ratio"): method([s], 4, .5, **options(method))
    protected = int((protect(method.score(s, **options(method)), s.positions, method.sinks) == torch.inf).sum(2).max())
    if protected > 1:
        with pytest.raises(ValueError, match="budget must cover what is protected"): method([s], protected - 1, **options(method))
        assert int(method([s], protected, **options(method))[0].sum()) == protected * B * H


def test_all_of_this_chapter_are_here(): assert {"StreamingLLM", "H2O", "TOVA", "SnapKV", "ExpectedAttention", "KeyDiff", "KeyNorm", "Random"} <= set(METHODS)


def test_the_laws_notice():
    "Each law fails for a method that breaks it."
    first_row = Method("first row", lambda s: -s.keys[:1].norm(dim=3).expand(s.positions.shape))                        # kvpress's chunks: row 0 decides for all
    padded = Method("pads", lambda s: s.values[..., 0] - s.values[..., 0].mean(2, keepdim=True) + s.positions.shape[2] * s.positions)
    repeated = Method("sum over heads", lambda s: s.keys.norm(dim=3) + .1 * s.queries.sum((1, 3)).unsqueeze(1))
    slot = Method("slot", lambda s: torch.arange(s.keys.shape[2]).expand(s.positions.shape).double())
    quiet = Method("quiet", lambda s: s.keys.norm(dim=3).nan_to_num(0))
    greedy = Method("greedy", lambda s: s.keys.norm(dim=3), allocate=lambda scores, counts: counts + 1)
    newest = Method("later first", lambda s: s.keys.norm(dim=3) * 0 + s.positions)
    assert not law_batch(first_row) and not law_groups(repeated) and not law_positions(slot) and not law_NaN(quiet) and not law_budget(greedy)
    assert law_padding(padded) and law_chunks(newest) and law_positions(newest)


def test_budget_against_fractions():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        n, percent = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 5000), (1, 1000)))
        exact = max(1, n * percent // 1000)
        tokens = torch.tensor([[n]])
        assert kept_slots(tokens, percent / 1000).item() == kept_slots(tokens, Fraction(percent, 1000)).item() == exact
        assert kept_slots(tokens, compression_ratio=(1000 - percent) / 1000).item() == exact


def test_best_against_sorting():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(-3, 3, (4, 3, 17), generator=generator).double()
    scores[scores == -3] = -torch.inf
    counts = torch.randint(0, 18, (4, 3), generator=generator)
    mask = keep_best(scores, counts)
    for b, h in itertools.product(range(4), range(3)):
        real = [i for i in range(17) if scores[b, h, i] > -torch.inf]
        assert mask[b, h].nonzero()[:, 0].tolist() == sorted(sorted(real, key=lambda i: (-scores[b, h, i], i))[:counts[b, h]])


def test_every_method_is_a_name_of_the_family():
    "Methods are constants, which the package's index does not hold: `kv/__init__.py` names them."
    for name, method in METHODS.items():
        names = [n for n in dir(deepclustering.kv) if getattr(deepclustering.kv, n) is method]
        assert len(names) == 1, f"{name}: {names}"
