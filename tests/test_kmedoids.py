"""`KMedoids`, `CLARA` and their functions: scikit-learn's own checks, the authors' package swap for swap, brute force, bad tables."""
import subprocess
import sys
import warnings
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import pairwise_distances
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclustering.clustering import CLARA, KMedoids, fasterpam, fastpam1, pam
from deepclustering.clustering.kmedoids import MedoidSearch, build_medoids, dissimilarities, eager_swaps, lab_medoids
from deepclustering.core.data import available, load_digits, load_mnist_test

RNG = np.random.default_rng(0)
X = RNG.normal(size=(240, 5)) + 6 * RNG.normal(size=(4, 5))[RNG.integers(0, 4, 240)]
METHODS = ("fasterpam", "fastpam1", "pam")


def table(n, d=3, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, d))
    return pairwise_distances(x)


def loss_of(D, medoids): return D[:, list(medoids)].min(1).sum()


def start(n, k, seed): return np.random.default_rng(seed).choice(n, k, replace=False)


@parametrize_with_checks([KMedoids(device="cpu"), CLARA(device="cpu"), KMedoids(3, metric="manhattan", method="fastpam1", init="random", device="cpu")])
def test_estimator_checks(estimator, check):
    check(estimator)


# --- the authors' package ---------------------------------------------------------------------------------------------------

def same(ours, theirs):
    assert np.array_equal(ours.medoids, theirs.medoids) and np.array_equal(ours.labels, theirs.labels)
    assert (ours.n_iter, ours.n_swap) == (theirs.n_iter, theirs.n_swap)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-12)


@pytest.mark.peers
@pytest.mark.parametrize("n, k", [(5, 2), (30, 1), (50, 3), (200, 7), (500, 20), (300, 150), (40, 40), (1000, 60)])
def test_fasterpam_makes_the_swaps_of_the_package(n, k):
    kmedoids = pytest.importorskip("kmedoids")
    for seed in range(3):
        D, m = table(n, seed=seed), start(n, k, seed)
        same(fasterpam(D, m), kmedoids.fasterpam(D, m.astype(np.uint64), n_cpu=1))


@pytest.mark.peers
@pytest.mark.parametrize("n, k", [(50, 3), (200, 7), (300, 20)])
def test_fastpam1_and_pam_make_the_swaps_of_the_package(n, k):
    kmedoids = pytest.importorskip("kmedoids")
    for seed in range(2):
        D, m = table(n, seed=seed), start(n, k, seed).astype(np.uint64)
        same(fastpam1(D, m.astype(int)), kmedoids.fastpam1(D, m))
        same(pam(D, m.astype(int)), kmedoids.pam(D, m))


@pytest.mark.peers
def test_asymmetric_tables_mean_what_they_mean_in_the_package():
    kmedoids = pytest.importorskip("kmedoids")
    D = RNG.random((120, 120)); np.fill_diagonal(D, 0)
    for k in (2, 9): same(fasterpam(D, start(120, k, k)), kmedoids.fasterpam(D, start(120, k, k).astype(np.uint64), n_cpu=1))


@pytest.mark.peers
@pytest.mark.parametrize("max_iter", [1, 2])
def test_max_iter_ends_where_the_package_ends(max_iter):
    kmedoids = pytest.importorskip("kmedoids")
    D, m = table(300), start(300, 30, 0)
    same(fasterpam(D, m, max_iter), kmedoids.fasterpam(D, m.astype(np.uint64), max_iter, n_cpu=1))


@pytest.mark.peers
@pytest.mark.parametrize("metric", ["euclidean", "manhattan"])
def test_exact_ties_fall_as_in_the_package(metric):
    "A grid with every point twice, up to half as many medoids as points: many swaps are worth nothing, and rounding decides."
    kmedoids = pytest.importorskip("kmedoids")
    grid = np.array([(i, j) for i in range(8) for j in range(8)] * 2) * .1
    D = pairwise_distances(grid, metric=metric)
    for k in (2, 6, 30, 64):
        for seed in range(3):
            m = start(len(D), k, seed)
            ours, theirs = fasterpam(D, m), kmedoids.fasterpam(D, m.astype(np.uint64), n_cpu=1)
            assert np.array_equal(ours.medoids, theirs.medoids) and (ours.n_iter, ours.n_swap) == (theirs.n_iter, theirs.n_swap)
            assert abs(ours.loss - theirs.loss) < 1e-9  # labels may differ where two medoids are equally near


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("k", [10, 100])
def test_ten_thousand_digits_swap_for_swap(k):
    kmedoids = pytest.importorskip("kmedoids")
    if not available("mnist_test"): pytest.skip("no MNIST")
    D = dissimilarities(torch.from_numpy(load_mnist_test().X).double()).numpy()
    m = start(len(D), k, 0)
    same(fasterpam(D, m), kmedoids.fasterpam(D, m.astype(np.uint64), n_cpu=1))


@pytest.mark.peers
@pytest.mark.slow
def test_speed_beside_the_package():
    "10,000 points, one thread: at most 1.5 of the package's time."
    pytest.importorskip("kmedoids")
    out = subprocess.run([sys.executable, "benchmarks/kmedoids.py"], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr


# --- independent of any package ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, k", [(8, 2), (10, 3), (12, 4)])
def test_brute_force(n, k):
    "The best of twenty starts is the optimum, and a local optimum is never below it."
    for seed in range(5):
        D = np.random.default_rng(seed).random((n, n)); np.fill_diagonal(D, 0)
        optimum = min(loss_of(D, m) for m in combinations(range(n), k))
        for f in (fasterpam, fastpam1, pam):
            losses = [f(D, k, init="random", random_state=s).loss for s in range(20)]
            assert min(losses) == pytest.approx(optimum, rel=1e-12) and min(losses) >= optimum - 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 2, 6])
def test_no_swap_is_left(method, k):
    m = KMedoids(k, method=method, random_state=0, metric="precomputed").fit(table(60))
    for slot in range(k):
        for c in range(60):
            assert loss_of(table(60), [*m.medoid_indices_[:slot], c, *m.medoid_indices_[slot + 1:]]) >= m.inertia_ - 1e-9


@pytest.mark.parametrize("first", [1, 3, 64, 1000])
def test_blocks_do_not_change_the_swaps(first):
    D, m = torch.from_numpy(table(300)), torch.from_numpy(start(300, 12, 0))
    runs = []
    for width in (8, first):
        s = MedoidSearch(D, m)
        for _ in eager_swaps(s, width): pass
        runs.append((s.medoids.tolist(), s.n_swap, s.n_iter))
    assert runs[0] == runs[1]


def test_permuted_points_permute_the_result_of_pam():
    D, p, m = table(150), RNG.permutation(150), start(150, 5, 0)
    a, b = fastpam1(D, m), fastpam1(D[np.ix_(p, p)], np.argsort(p)[m])
    assert np.array_equal(p[b.medoids], a.medoids) and np.array_equal(a.labels[p], b.labels)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32, np.int64, np.uint8])
def test_other_dtypes_are_summed_in_float64(dtype):
    D = np.round(table(120) * 10).astype(dtype)
    a, b = fasterpam(D, start(120, 6, 0)), fasterpam(D.astype(np.float64), start(120, 6, 0))
    assert a.loss == b.loss and np.array_equal(a.medoids, b.medoids) and a.n_swap == b.n_swap


def test_a_large_common_part_costs_no_digits():
    "10^4 of everything but 10^-3 of difference: in float32 sums of 400 such numbers would drown it."
    D = (1e4 + np.random.default_rng(0).random((400, 400)) * 1e-1).astype(np.float32); np.fill_diagonal(D, 0)
    assert fasterpam(D, start(400, 5, 0)).medoids.tolist() == fasterpam(D.astype(np.float64), start(400, 5, 0)).medoids.tolist()


def test_duplicates():
    "Every point twice: the medoid and its twin share a cluster, and a medoid belongs to itself."
    D = pairwise_distances(np.repeat(RNG.normal(size=(30, 2)), 2, axis=0))
    r = fasterpam(D, 8, random_state=0)
    assert r.loss == pytest.approx(loss_of(D, r.medoids)) and np.array_equal(r.labels[r.medoids], np.arange(8))
    zero = fasterpam(np.zeros((6, 6)), 3, random_state=0)
    assert zero.loss == 0 and zero.n_swap == 0 and np.array_equal(zero.labels[zero.medoids], np.arange(3))


def test_rounding_on_the_diagonal_is_forgiven():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) + 5
    D = torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist")
    assert D.diagonal().max() > 0
    r = fasterpam(D, 5, random_state=0)
    assert torch.equal(r.labels[r.medoids], torch.arange(5)) and r.loss == pytest.approx(fasterpam(D.fill_diagonal_(0), r.medoids).loss, rel=1e-9)


@pytest.mark.parametrize("bad, said", [
    (np.zeros((3, 4)), "square"), (np.zeros(4), "2 dim"), (np.full((4, 4), np.nan), "NaN"), (np.full((4, 4), np.inf), "finite"), (-table(4), "at least 0"),
    (np.eye(4), "diagonal"), (np.ones((4, 4)), "diagonal"), (np.empty((0, 0)), "0 feature|0 sample|at least"), (np.eye(4).astype(complex), "omplex")])
def test_bad_tables_say_what_came(bad, said):
    for f in (fasterpam, fastpam1, pam):
        with pytest.raises(ValueError, match=said): f(bad, 2)
    with pytest.raises(ValueError, match=said): fasterpam(torch.from_numpy(bad), 2)
    one_nan = table(50); one_nan[20, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"): fasterpam(one_nan, 2)
    with pytest.raises(ValueError, match="NaN"): KMedoids(2, metric="precomputed").fit(one_nan)


@pytest.mark.parametrize("k", [0, 51, -1, 2.5, True, "2", [1, 1], [50, 0], [-1, 2], [0.5, 1.5], [[0, 1]], []])
def test_bad_medoids_say_what_came(k):
    with pytest.raises((ValueError, TypeError), match="medoids|str"): fasterpam(table(50), k)


@pytest.mark.parametrize("bad, argument", [
    (dict(n_clusters=0), "n_clusters"), (dict(n_clusters=241), "n_clusters"), (dict(n_clusters=2.5), "n_clusters"), (dict(max_iter=0), "max_iter"),
    (dict(metric="warped"), "metric"), (dict(init="best"), "init"), (dict(init=[0, 1]), "init"), (dict(n_init=0), "n_init"), (dict(method="clara"), "method"),
    (dict(device="gpu"), "device"), (dict(random_state=-1), "random_state")])
def test_bad_parameters_name_the_argument(bad, argument):
    with pytest.raises(ValueError, match=argument): KMedoids(**{"n_clusters": 4, **bad}).fit(X)


def test_k_equal_to_n_is_every_point():
    for method in (*METHODS, "alternate"):
        for init in ("lab", "random", "build"):
            m = KMedoids(20, method=method, init=init, random_state=0, n_init=1).fit(X[:20])
            assert m.inertia_ == 0 and sorted(m.medoid_indices_) == list(range(20)) and m.n_swaps_ == 0


def test_starts():
    D = torch.from_numpy(table(80))
    assert len(set(build_medoids(D, 80).tolist())) == 80
    assert len(set(lab_medoids(D, 80, torch.Generator().manual_seed(0)).tolist())) == 80
    a, b, c = (KMedoids(6, init="random", n_init=1, random_state=s).fit(X).medoid_indices_.tolist() for s in (0, 0, 1))
    assert a == b and sorted(a) != sorted(c) or KMedoids(6, random_state=0).fit(X).inertia_ > 0


def test_tensors_in_tensors_out_and_input_unchanged():
    x = torch.tensor(X); before = x.clone()
    m = KMedoids(4, random_state=0).fit(x)
    assert all(isinstance(t, torch.Tensor) for t in (m.labels_, m.medoid_indices_, m.cluster_centers_, m.transform(x), m.predict(x)))
    assert torch.equal(m.cluster_centers_, x[m.medoid_indices_]) and torch.equal(m.predict(x), m.labels_) and torch.equal(x, before)
    D = torch.tensor(table(50)); before = D.clone()
    fasterpam(D, 4, init="build"); KMedoids(3, metric="precomputed").fit(D)
    assert torch.equal(D, before)
    assert np.array_equal(KMedoids(4, random_state=0).fit(X).labels_, m.labels_.numpy())


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "manhattan", "cityblock", "cosine", "chebyshev", "canberra"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_metrics_are_scikit_learns(metric, dtype):
    want = pairwise_distances(X, X[:9], metric=metric)
    np.testing.assert_allclose(dissimilarities(torch.from_numpy(X.astype(dtype)), torch.from_numpy(X[:9].astype(dtype)), metric), want, rtol=1e-4, atol=1e-5)
    m = KMedoids(4, metric=metric, random_state=0).fit(X.astype(dtype))
    same = KMedoids(4, metric="precomputed", random_state=0).fit(pairwise_distances(X.astype(dtype), metric=metric))
    assert m.inertia_ == pytest.approx(same.inertia_, rel=1e-5) and np.array_equal(m.labels_, m.predict(X.astype(dtype)))


def test_an_offset_changes_nothing():
    x = X.astype(np.float32)
    a, b = KMedoids(4, init=[0, 1, 2, 3]).fit(x), KMedoids(4, init=[0, 1, 2, 3]).fit(x.astype(np.float64) + 1e6)
    assert np.array_equal(a.medoid_indices_, b.medoid_indices_)


def test_precomputed_predicts_from_rows_of_dissimilarities():
    D = pairwise_distances(X)
    m = KMedoids(4, metric="precomputed", random_state=0).fit(D)
    assert m.cluster_centers_ is None and m.n_features_in_ == 240
    assert np.array_equal(m.predict(D[:7]), m.labels_[:7]) and m.transform(D[:7]).shape == (7, 4)
    with pytest.raises(ValueError, match="features"): m.predict(D[:7, :9])
    assert not hasattr(clone(m), "medoid_indices_")


def test_a_table_passed_as_points_is_noticed():
    with pytest.warns(UserWarning, match="precomputed"): KMedoids(2).fit(table(30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KMedoids(2).fit(X); KMedoids(2, metric="precomputed").fit(table(30))


def test_clara_of_everything_is_kmedoids():
    whole = [CLARA(5, n_sampling=len(X), n_sampling_iter=1, random_state=s).fit(X).inertia_ for s in range(10)]
    direct = [KMedoids(5, random_state=s).fit(X).inertia_ for s in range(10)]
    assert min(whole) == pytest.approx(min(direct), rel=1e-6)


def test_clara_needs_no_table():
    "200,000 points: their table would take 160 GB."
    x = np.random.default_rng(0).normal(size=(200_000, 3)).astype(np.float32)
    m = CLARA(4, random_state=0).fit(x)
    d = np.linalg.norm(x[:, None] - m.cluster_centers_[None], axis=2)
    assert m.inertia_ == pytest.approx(float(d.min(1).sum()), rel=1e-4) and np.array_equal(m.labels_[::97], d.argmin(1)[::97])


def test_digits_end_near_each_other():
    "FasterPAM's local optimum costs at most 2 % more than PAM's, over starts and k."
    D = pairwise_distances(load_digits().X[:600].astype(np.float64))
    for k in (3, 10, 30):
        reference = fastpam1(D, k, init="build").loss
        for s in range(3): assert fasterpam(D, k, random_state=s).loss < 1.02 * reference
