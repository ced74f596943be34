"""`HierarchicalKMeans` and its functions: scikit-learn's checks and its k-means at every level, brute force for caps, the laws of chance, bad trees."""
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, hypergeom
from sklearn.base import clone
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclustering.clustering import HierarchicalKMeans, first_of_each, hierarchical_kmeans_steps, hierarchical_sample, resampled_kmeans_steps, share_budget
from deepclustering.core.lloyd import kmeans, kmeans_plusplus

RNG = np.random.default_rng(0)
X = RNG.normal(size=(400, 5)) + 6 * RNG.normal(size=(6, 5))[RNG.choice(6, 400, p=[.6, .2, .1, .05, .03, .02])]
QUICK = dict(n_resampling=2, device="cpu", random_state=0)


def gen(seed): return torch.Generator().manual_seed(seed)


def levels_of(x, ks, *args, **kwargs):
    for levels in hierarchical_kmeans_steps(x, ks, *args, **kwargs): pass
    return levels


def random_tree(seed, n=500, ks=(60, 20, 6)):
    "Labels of points and clusters; some clusters are empty."
    g = gen(seed)
    return [torch.randint(k - 1, (m,), generator=g) for m, k in zip((n, *ks), ks)]


@parametrize_with_checks([HierarchicalKMeans(device="cpu"), HierarchicalKMeans([4, 3, 2], n_resampling=1, resample_how="random", device="cpu"), HierarchicalKMeans(3, n_resampling=0, device="cpu")])
def test_estimator_checks(estimator, check):
    check(estimator)


# --- levels -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["closest", "random", "farthest"])
def test_every_run_is_scikit_learn_s_k_means(how):
    "Levels and resamplings by hand: the same starts, scikit-learn's iterations, a loop over clusters."
    ks, m, seed = (40, 12), 2, 3
    ours, g, below = levels_of(torch.tensor(X), ks, m, None, how, 300, seed), gen(seed), X
    def fit(part, k):
        start = part[kmeans_plusplus(torch.tensor(part), k, random_state=g, n_local_trials=1).numpy()]
        return SklearnKMeans(k, init=start, n_init=1, tol=0, max_iter=300).fit(part).cluster_centers_
    for k, level in zip(ks, ours):
        centers, r = fit(below, k), -(-len(below) // (2 * k))
        for _ in range(m):
            far = np.linalg.norm(below[:, None] - centers, axis=2)
            own = far.argmin(1)
            key = torch.rand(len(below), generator=g, dtype=torch.float64).numpy() if how == "random" else far.min(1) * (1 if how == "closest" else -1)
            members = [np.flatnonzero(own == j) for j in range(k)]
            centers = fit(below[np.sort(np.concatenate([rows[key[rows].argsort(kind="stable")][:r] for rows in members]))], k)
        np.testing.assert_allclose(level.centers, centers, atol=1e-9)
        np.testing.assert_array_equal(level.labels, np.linalg.norm(below[:, None] - centers, axis=2).argmin(1))
        below = centers


def test_one_level_without_resampling_is_k_means():
    x = torch.tensor(X)
    found = HierarchicalKMeans(9, n_resampling=0, device="cpu", random_state=4).fit(X)
    want = kmeans(x, x[kmeans_plusplus(x, 9, random_state=4, n_local_trials=1)], max_iter=50)
    np.testing.assert_array_equal(found.labels_, want.labels); np.testing.assert_array_equal(found.cluster_centers_, want.centers)
    assert len(found.tree_) == 1 and found.n_iter_ == want.n_iter and found.tree_[0] is not None


def test_sizes_and_steps():
    x = torch.tensor(X)
    assert [len(levels) for levels in hierarchical_kmeans_steps(x, [50, 10], 3, [1, 4])] == [1, 2, 2, 2, 2]     # r = 1: nothing is resampled
    assert len(list(resampled_kmeans_steps(x, 50, 0))) == 1
    # the clusters of one point each, r = 2: as few points as clusters are kept, and no more
    for level in resampled_kmeans_steps(x[:20], 20, 2, size=2, generator=gen(0)): assert len(level.labels.unique()) == 20


def test_more_levels_are_more_even():
    "Points of a disc, thousand times denser within a tenth of its radius: the share of centres there falls from step to step."
    share = []
    for seed in range(2):
        g = gen(seed)
        r, a = torch.rand(2500, generator=g).sqrt() * torch.where(torch.rand(2500, generator=g) < .9, .1, 1.), 2 * torch.pi * torch.rand(2500, generator=g)
        x = torch.stack([r * a.cos(), r * a.sin()], 1)
        runs = levels_of(x, [60], 0, random_state=seed), levels_of(x, [240, 60], 0, random_state=seed), levels_of(x, [240, 60], 3, random_state=seed, how="random")
        share.append([float((run[-1].centers.norm(dim=1) < .1).double().mean()) for run in runs])
    plain, two, resampled = np.mean(share, 0)
    assert .9 > plain > two > resampled > .01 / 2


def test_fewer_distinct_points_than_clusters():
    x = torch.tensor(X)[:4].repeat(10, 1)
    levels = levels_of(x, [12, 6], 3, random_state=0)
    assert all(level.labels.max() < k and level.centers.isfinite().all() for level, k in zip(levels, (12, 6)))
    sample = HierarchicalKMeans([12, 6], **QUICK).fit(x).sample(15)
    assert len(sample.unique()) == 15
    assert len(hierarchical_sample(HierarchicalKMeans(3, **QUICK).fit(np.ones((5, 2))).tree_, 4)) == 4


# --- the first of each slot ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, k", [(0, 3), (1, 1), (57, 5), (1000, 400)])
def test_first_of_each(n, k):
    g = gen(n)
    key, slot, size = torch.randint(9, (n,), generator=g).double(), torch.randint(k, (n,), generator=g), torch.randint(5, (k,), generator=g)
    want = [i for j in range(k) for i in sorted((slot == j).nonzero()[:, 0].tolist(), key=lambda i: (float(key[i]), i))[:int(size[j])]]
    assert first_of_each(key, slot, size).tolist() == want        # ties in the order of arrival


# --- budgets ------------------------------------------------------------------------------------------------------------------

def test_caps_by_brute_force():
    "Many nodes at once, some without children, some children empty; the cap found by trying all."
    for seed in range(30):
        g = gen(seed)
        parents, children = int(torch.randint(1, 9, (1,), generator=g)), int(torch.randint(1, 40, (1,), generator=g))
        parent, sizes = torch.randint(parents, (children,), generator=g), torch.randint(12, (children,), generator=g)
        budget = torch.randint(60, (parents,), generator=g)
        given = share_budget(budget, sizes, parent, g)
        for p in range(parents):
            s, got, b = sizes[parent == p], given[parent == p], int(budget[p])
            caps = [t for t in range(13) if int(s.clamp(max=t).sum()) <= b]
            least = s.clamp(max=max(caps))
            assert int(got.sum()) == min(b, int(s.sum())) and bool((got >= least).all()) and bool((got <= least + (s > least)).all())


def test_budgets_beyond_32_bits():
    sizes = torch.tensor([2**40, 3, 2**41, 0])
    assert share_budget(torch.tensor([2**41]), sizes, torch.zeros(4, dtype=torch.int64), gen(0)).sum() == 2**41
    assert share_budget(torch.tensor([2**43]), sizes, torch.zeros(4, dtype=torch.int64)).tolist() == sizes.tolist()


def test_who_gets_one_more_is_drawn_fairly():
    g, sizes, parent = gen(0), torch.tensor([1, 9, 9, 9, 9, 9]), torch.zeros(6, dtype=torch.int64)
    got = torch.stack([share_budget(torch.tensor([13]), sizes, parent, g) for _ in range(600)])    # 1 + 5 * 2, two are left
    assert got[:, 0].eq(1).all() and chisquare((got[:, 1:] - 2).sum(0)).pvalue > 1e-3


# --- samples ------------------------------------------------------------------------------------------------------------------

def recursive(tree, n, how_many):
    "Budgets of the leaves by recursion, node by node; one more goes to whoever `how_many` says."
    below = [torch.ones(len(tree[0]), dtype=torch.int64)]
    ks = [len(labels) for labels in tree[1:]] + [int(tree[-1].max()) + 1]
    for labels, k in zip(tree, ks): below.append(torch.stack([below[-1][labels == j].sum() for j in range(k)]))
    leaf = {}
    def visit(level, nodes, budget):
        for node, b in zip(nodes, how_many(below[level][nodes].tolist(), budget)):
            if level == 1: leaf[node] = b
            else: visit(level - 1, (tree[level - 1] == node).nonzero()[:, 0].tolist(), b)
    visit(len(tree), list(range(ks[-1])), n)
    return [leaf[j] for j in range(ks[0])]


def by_turns(sizes, budget):
    "Give one at a time to the child that has got least and has more: what a cap does, but for the last round."
    got = [0] * len(sizes)
    for _ in range(min(budget, sum(sizes))): got[min((i for i in range(len(sizes)) if got[i] < sizes[i]), key=lambda i: got[i])] += 1
    return got


def test_every_node_shares_its_own_count_as_by_turns():
    "On every level a node's children get what giving by turns gives them, up to who got the last ones."
    for seed in range(6):
        tree = random_tree(seed, 200, (30, 9, 4))
        above = [*tree[1:], torch.zeros(int(tree[-1].max()) + 1, dtype=torch.int64)]              # parent of each cluster of a level
        for n in (1, 17, 60, 133, 199):
            took = torch.zeros(200, dtype=torch.int64)
            took[hierarchical_sample(tree, n, random_state=seed)] = 1
            assert int(took.sum()) == n
            has = torch.ones(200, dtype=torch.int64)
            for labels, parent in zip(tree, above):
                took, has = (torch.zeros(len(parent), dtype=torch.int64).index_add_(0, labels, v) for v in (took, has))
                for p in parent.unique():
                    got, size = took[parent == p].tolist(), has[parent == p].tolist()
                    want = by_turns(size, sum(got))
                    assert sorted(got) == sorted(want) and all(abs(x - y) <= 1 for x, y in zip(got, want))


def test_no_chance_no_difference():
    "Sizes and budgets that divide: the recursion and the vectorised form agree leaf by leaf."
    tree = [torch.arange(16).repeat_interleave(8), torch.arange(4).repeat_interleave(4), torch.tensor([0, 0, 1, 1])]
    for n in (0, 16, 32, 64, 128):
        assert tree[0][hierarchical_sample(tree, n, random_state=n)].bincount(minlength=16).tolist() == recursive(tree, n, by_turns)
    lopsided = [torch.tensor([0] * 50 + [1] * 2 + [2] * 5 + [3] * 9 + [4]), torch.tensor([0, 0, 1, 1, 1])]
    for n in (0, 14, 26, 30, 40, 67):                                           # 14: 7 and 7; 7 of {50, 2} are 5 and 2, of {5, 9, 1} 3, 3 and 1
        assert lopsided[0][hierarchical_sample(lopsided, n)].bincount(minlength=5).tolist() == recursive(lopsided, n, by_turns)


@pytest.mark.parametrize("seed", range(4))
def test_never_more_never_twice_and_all_if_wanted(seed):
    tree = random_tree(seed)
    for n in (0, 1, 7, 250, 499, 500, 501, 10**6):
        sample = hierarchical_sample(tree, n, random_state=seed)
        assert len(sample) == min(n, 500) == len(sample.unique()) and bool((sample.diff() > 0).all())
    assert sample.tolist() == list(range(500))


def test_a_leaf_s_points_are_drawn_without_replacement():
    "One cluster, 10 of 30 points: how many of the first 12 are among them is hypergeometric, and every point is as likely."
    tree, g = [torch.zeros(30, dtype=torch.int64)], gen(0)
    samples = torch.stack([hierarchical_sample(tree, 10, random_state=g) for _ in range(1000)])
    assert chisquare(samples.flatten().bincount(minlength=30)).pvalue > 1e-3
    seen = (samples < 12).sum(1).bincount(minlength=11)[1:8].double()
    want = hypergeom(30, 12, 10).pmf(np.arange(1, 8))
    assert chisquare(seen, want / want.sum() * float(seen.sum())).pvalue > 1e-3


def test_closest_and_farthest():
    m = HierarchicalKMeans([30, 6], **QUICK).fit(X)
    for how, sign in (("closest", 1), ("farthest", -1)):
        sample = m.sample(90, how, random_state=1)
        for leaf in range(30):
            rows, took = np.flatnonzero(m.tree_[0] == leaf), [i for i in sample if m.tree_[0][i] == leaf]
            assert sorted(took) == sorted(rows[(sign * m.distances_[rows]).argsort(kind="stable")][:len(took)])
    same = [m.tree_[0][m.sample(90, how, random_state=1)] for how in ("closest", "random", "farthest")]     # how chooses points, not how many
    assert all((np.bincount(s, minlength=30) == np.bincount(same[0], minlength=30)).all() for s in same)


def test_flat_and_deep_trees_agree_where_every_node_has_one_child():
    labels, chain = random_tree(0)[0], torch.arange(60)
    flat, deep = (hierarchical_sample(tree, 100, random_state=5) for tree in ([labels], [labels, chain, chain]))
    counts = [labels[s].bincount(minlength=60) for s in (flat, deep)]
    assert (counts[0] - counts[1]).abs().max() <= 1 and len(flat) == len(deep) == 100


# --- the contract -------------------------------------------------------------------------------------------------------------

def test_attributes_hang_together():
    m = HierarchicalKMeans((50, 12, 4), **QUICK).fit(X)
    assert [c.shape for c in m.level_centers_] == [(50, 5), (12, 5), (4, 5)] and [t.shape for t in m.tree_] == [(400,), (50,), (12,)]
    up = m.tree_[0]
    for t in range(3):
        np.testing.assert_array_equal(m.level_labels_[t], up)
        np.testing.assert_array_equal(m.predict(X, t), up)
        if t < 2: up = m.tree_[t + 1][up]
    np.testing.assert_array_equal(m.labels_, m.level_labels_[2]); np.testing.assert_array_equal(m.cluster_centers_, m.level_centers_[2])
    np.testing.assert_allclose(m.distances_, np.linalg.norm(X - m.level_centers_[0][m.tree_[0]], axis=1), atol=1e-9)
    new = RNG.normal(size=(70, 5))
    near = np.linalg.norm(new[:, None] - m.level_centers_[0], axis=2).argmin(1)
    np.testing.assert_array_equal(m.predict(new), m.tree_[2][m.tree_[1][near]]); np.testing.assert_array_equal(m.predict(new, -3), near)
    assert clone(m).get_params() == m.get_params()


def test_tensors_types_and_seeds():
    for dtype in (np.float32, np.float64):
        a, t = (HierarchicalKMeans([20, 5], **QUICK).fit(x) for x in (X.astype(dtype), torch.tensor(X.astype(dtype))))
        assert a.cluster_centers_.dtype == dtype and isinstance(t.labels_, torch.Tensor) and isinstance(t.sample(9), torch.Tensor) and isinstance(a.sample(9), np.ndarray)
        np.testing.assert_array_equal(a.cluster_centers_, t.cluster_centers_.numpy())
        np.testing.assert_array_equal(a.sample(30, random_state=2), t.sample(30, random_state=2).numpy())
    assert HierarchicalKMeans(5, **QUICK).fit(torch.tensor(X).half()).cluster_centers_.dtype == torch.float32
    before, strided = X.copy(), np.asfortranarray(X)
    np.testing.assert_array_equal(HierarchicalKMeans([20, 5], **QUICK).fit(strided).labels_, HierarchicalKMeans([20, 5], **QUICK).fit(X).labels_)
    np.testing.assert_array_equal(before, X)
    assert not np.array_equal(a.sample(30, random_state=2), a.sample(30, random_state=3))


@pytest.mark.parametrize("after", [1, 3, 4])
def test_interrupted(after, monkeypatch):
    from deepclustering.clustering import hierarchical_kmeans as module
    plain, calls = module.kmeans, []
    def run(*args, **kwargs):
        calls.append(1)
        if len(calls) == after + 1: os.kill(os.getpid(), signal.SIGINT)
        return plain(*args, **kwargs)
    monkeypatch.setattr(module, "kmeans", run)
    m = HierarchicalKMeans([20, 5], **QUICK)
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): m.fit(X)
    assert len(m.tree_) == (1 if after <= 3 else 2) and len(m.sample(10)) == 10
    calls.clear(); after = 0
    monkeypatch.setattr(module, "kmeans", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    empty = HierarchicalKMeans([20, 5], **QUICK)
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("error"); empty.fit(X)
    assert not hasattr(empty, "labels_")


def test_progress(capsys):
    HierarchicalKMeans([20, 5], **{**QUICK, "verbose": True}).fit(X)
    shown = capsys.readouterr().err
    assert "hierarchical k-means" in shown and "6run" in shown
    for verbose in (None, False): HierarchicalKMeans([20, 5], verbose=verbose, **QUICK).fit(X)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("kwargs, message", [
    (dict(n_clusters=0), "n_clusters must be between 1 and 400"), (dict(n_clusters=401), "n_clusters"), (dict(n_clusters=[]), "n_clusters must name at least one level"),
    (dict(n_clusters=[5, 6]), "n_clusters must be between 1 and 5"), (dict(n_clusters=[5, 0]), "n_clusters"), (dict(n_clusters=[5.5]), "n_clusters"), (dict(n_clusters=True), "n_clusters"),
    (dict(n_resampling=-1), "n_resampling"), (dict(resample_size=[3]), "sizes must hold a number for each of the 2 levels"), (dict(resample_size=[3, 0]), "sizes must be at least 1"),
    (dict(resample_how="nearest"), "how must be one of"), (dict(max_iter=0), "max_iter"), (dict(device="nowhere"), "device"), (dict(random_state=-1), "random_state")])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message): HierarchicalKMeans(**{"n_clusters": [8, 2], **QUICK, **kwargs}).fit(X)


@pytest.mark.parametrize("call, message", [
    (lambda t: hierarchical_sample([], 3), "at least one level"), (lambda t: hierarchical_sample([t[0].float()], 3), "whole numbers"), (lambda t: hierarchical_sample([t[0][:0]], 3), "whole numbers"),
    (lambda t: hierarchical_sample([t[0][:, None]], 3), "vectors"), (lambda t: hierarchical_sample([t[0] - 1], 3), "got -1"), (lambda t: hierarchical_sample([t[0], t[1][:9]], 3), "below the number of entries"),
    (lambda t: hierarchical_sample(t, -1), "n_samples"), (lambda t: hierarchical_sample(t, 2.5), "n_samples"), (lambda t: hierarchical_sample(t, 3, "first"), "how must be"),
    (lambda t: hierarchical_sample(t, 3, "farthest"), "distances must be given"), (lambda t: hierarchical_sample(t, 3, "closest", torch.ones(4)), "distances must have one entry a point, 500"),
    (lambda t: hierarchical_sample(t, 3, "closest", torch.full((500,), torch.nan)), "distances must be finite")])
def test_bad_trees(call, message):
    with pytest.raises(ValueError, match=message): call(random_tree(0))


def test_bad_data():
    with pytest.raises(ValueError, match="NaN"): HierarchicalKMeans(2).fit(np.full((4, 2), np.nan))
    m = HierarchicalKMeans([20, 5], **QUICK).fit(X)
    with pytest.raises(ValueError, match="features"): m.predict(X[:, :4])
    with pytest.raises(ValueError, match="level must be between -2 and 1"): m.predict(X, 2)
    with pytest.raises(ValueError, match="n_samples"): m.sample(-1)
