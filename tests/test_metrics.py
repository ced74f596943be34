"""Metrics: invariances, brute force over all namings and all partitions, sizes and types that no reader needs to see."""
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from deepclustering.core import metrics as m

TWO_LABELS = (m.contingency, m.cluster_accuracy, m.nmi, m.ari, m.churn)
SCORES = (m.cluster_accuracy, m.nmi, m.ari)


def random_labels(seed, n=60, classes=5, clusters=7):
    rng = np.random.default_rng(seed)
    return rng.integers(classes, size=n), rng.integers(clusters, size=n)


def partitions(n):
    "Every partition of n items once, as labels where a new label is always the next unused one."
    def grow(prefix):
        if len(prefix) == n: yield prefix; return
        for label in range(max(prefix, default=-1) + 2): yield from grow([*prefix, label])
    return list(grow([]))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("seed", range(3))
def test_invariances(score, seed):
    t, p = random_labels(seed)
    order, names = np.random.default_rng(seed).permutation(len(t)), np.random.default_rng(seed).permutation(7)
    value = score(t, p)
    assert score(t[order], p[order]) == pytest.approx(value, abs=1e-14)       # order of the items
    assert score(t * 10 - 3, names[p]) == pytest.approx(value, abs=1e-14)     # names
    assert score(p, t) == pytest.approx(value, abs=1e-14)                     # roles
    if score is not m.ari: assert score(np.repeat(t, 3), np.repeat(p, 3)) == pytest.approx(value, abs=1e-14)
    assert score(torch.tensor(t), torch.tensor(p, dtype=torch.int32)) == score(t.tolist(), p.astype(np.uint8)) == value
    assert score(t, t) == 1


def test_every_pair_of_partitions():
    "15 x 15 pairs of four items: scikit-learn's NMI and ARI, accuracy by brute force; 52 x 52 of five: ARI's lower bound."
    for t, p in itertools.product(partitions(4), repeat=2):
        assert m.nmi(t, p) == pytest.approx(sk.normalized_mutual_info_score(t, p), abs=1e-12)
        assert m.ari(t, p) == pytest.approx(sk.adjusted_rand_score(t, p), abs=1e-12)
        best = max(sum(name[b] == a for a, b in zip(t, p)) for name in itertools.permutations(range(4))) / 4
        assert m.cluster_accuracy(t, p) == best == 1 - m.churn(t, p)
    assert min(m.ari(t, p) for t, p in itertools.product(partitions(5), repeat=2)) >= -0.5


@pytest.mark.parametrize("seed", range(20))
def test_accuracy_with_noise_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    t, p = rng.integers(-1, 3, size=11), rng.integers(-1, 4, size=11)
    best = max(np.mean([b >= 0 and name[b] == a + 1 for a, b in zip(t, p)]) for name in itertools.permutations(range(5)))
    assert m.cluster_accuracy(t, p) == pytest.approx(best, abs=1e-15)


@pytest.mark.parametrize("seed", range(20))
def test_churn_with_noise_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-1, 3, size=11), rng.integers(-1, 4, size=11)
    same = max(np.mean([(i == j == -1) or (i >= 0 and j >= 0 and name[j] == i) for i, j in zip(a, b)]) for name in itertools.permutations(range(4)))
    assert m.churn(a, b) == pytest.approx(1 - same, abs=1e-15) == m.churn(b, a)


@pytest.mark.parametrize("seed", range(30))
def test_split_accuracy_as_a_loop_over_classes(seed):
    "The protocol in its own terms: per class, how many of its items lie in the cluster that the map gives to it."
    from scipy.optimize import linear_sum_assignment
    t, p = random_labels(seed, n=40, classes=6, clusters=6)
    old = t < 3
    counts = np.zeros((6, 6), int)
    for a, b in zip(t, p): counts[b, a] += 1
    clusters, classes = linear_sum_assignment(counts.max() - counts)
    best_total = counts[clusters, classes].sum() / 40
    v1, v2 = (m.split_cluster_accuracy(t, p, old, version=v) for v in ("v1", "v2"))
    assert v2.all == pytest.approx(best_total, abs=1e-15) == m.cluster_accuracy(t, p)
    for v in (v1, v2): assert v.all == pytest.approx(old.mean() * v.old + (1 - old.mean()) * v.new, abs=1e-14)
    best = max(itertools.permutations(range(6)), key=lambda name: sum(counts[j, c] for j, c in enumerate(name)))
    unique = sum(sum(counts[j, c] for j, c in enumerate(name)) == round(best_total * 40) for name in itertools.permutations(range(6))) == 1
    if unique:
        of_class = {c: counts[j, c] for j, c in enumerate(best)}
        assert v2.old == pytest.approx(sum(of_class[c] for c in range(3)) / old.sum(), abs=1e-15)
        assert v2.new == pytest.approx(sum(of_class[c] for c in range(3, 6)) / (~old).sum(), abs=1e-15)
    assert v1.old == m.cluster_accuracy(t[old], p[old]) and v1.new == m.cluster_accuracy(t[~old], p[~old])


def test_many_clusters_stay_small():
    "A dense table of 100,000 singletons would take 80 GB."
    one_each = np.arange(100_000)
    assert m.nmi(one_each % 10, one_each) == pytest.approx(2 / (1 + 5), abs=1e-12)
    assert m.ari(one_each % 10, one_each) == 0
    assert m.nmi(one_each, one_each) == m.ari(one_each, one_each) == 1


@pytest.mark.parametrize("score", TWO_LABELS)
@pytest.mark.parametrize("first, second, words", [
    ([0, 1], [0], "must have one length, got 2 and 1"), ([], [], "at least one label"), ([0.0, 1.0], [0, 1], "whole numbers, got float64"),
    ([0, 1], [0, math.nan], "whole numbers"), ([0, 1], [[0, 1]], "one dimension"), (["a", "b"], [0, 1], "whole numbers"), (3, [0], "one dimension"),
    ([0, 1], torch.tensor([0.5, 1]), "whole numbers, got float32")])
def test_bad_labels(score, first, second, words):
    with pytest.raises(ValueError, match=words) as error: score(first, second)
    assert any(name in str(error.value) for name in (("before", "after") if score is m.churn else ("y_true", "y_pred")))


def test_inputs_are_left_alone():
    t, p = np.array([0, 0, 1, -1]), torch.tensor([1, -1, 0, 0])
    old = np.array([True, True, False, False])
    before = t.copy(), p.clone(), old.copy()
    for score in TWO_LABELS: score(t, p)
    m.split_cluster_accuracy(t, p, old); m.cluster_sizes(p)
    assert (t == before[0]).all() and torch.equal(p, before[1]) and (old == before[2]).all()


@pytest.mark.parametrize("k", [1, 2, 7, 64])
def test_balance_limits(k):
    even, single = m.balance(np.full(k, 2.5)), m.balance([3] + [0] * (k - 1))
    assert even == pytest.approx((k, 1, 0, 1), abs=1e-12)
    assert single == pytest.approx((1, 0 if k > 1 else 1, math.sqrt(k - 1), k), abs=1e-12)
    load = np.random.default_rng(k).random(k)
    assert m.balance(load) == pytest.approx(m.balance(torch.tensor(load) * 1000), abs=1e-12)
    assert m.balance(load).cv ** 2 == pytest.approx(k * ((load / load.sum()) ** 2).sum() - 1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 10, 3000])
def test_collapse_report_in_every_dtype(dtype, k):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, k, generator=generator)
    sharp, flat = (collapse_of(logits * scale, dtype) for scale in (20, 0.01))
    assert flat.collapsed and not sharp.collapsed
    # a softmax over 3,000 slots rounded to bfloat16 sums to 1 only within a few percent
    assert flat.confidence == pytest.approx(1 / k, rel=0.05) and flat.entropy == pytest.approx(1, abs=0.01)
    exact = m.collapse_report((logits * 20).double().softmax(1))
    assert sharp == pytest.approx(exact, abs=0.02)


def collapse_of(logits, dtype): return m.collapse_report(logits.double().softmax(1).to(dtype))


def test_collapse_report_is_the_mutual_information():
    "Drawing labels from the soft assignments: the plug-in mutual information between item and slot."
    p = np.random.default_rng(0).dirichlet(np.ones(4), size=6)
    joint = p / 6
    information = (joint * np.log(joint / (joint.sum(1, keepdims=True) * joint.sum(0)))).sum()
    assert m.collapse_report(p).information == pytest.approx(information / math.log(4), abs=1e-14)


def test_spread():
    values = np.random.default_rng(0).random(9)
    s = m.spread(values)
    assert (s.mean, s.sd, s.low, s.high, s.n) == pytest.approx((values.mean(), values.std(ddof=1), values.min(), values.max(), 9))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_labels_on_the_gpu():
    t, p = random_labels(0)
    for score in SCORES: assert score(torch.tensor(t).cuda(), torch.tensor(p).cuda()) == score(t, p)
    assert m.collapse_report(torch.eye(3).cuda()).information == pytest.approx(1)
