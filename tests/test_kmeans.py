"""`KMeans` and `MiniBatchKMeans`: scikit-learn's own checks, the property list of its k-means tests, memory, interrupts."""
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans as SkKMeans
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclustering.clustering import KMeans, MiniBatchKMeans
from deepclustering.core import kmeans

RNG = np.random.default_rng(0)
X = RNG.normal(size=(240, 5)) + 6 * RNG.normal(size=(4, 5))[RNG.integers(0, 4, 240)]


RANDOM_START = {"check_sample_weight_equivalence_on_dense_data": "a start drawn among repeated rows differs from one drawn by weight; "
                "scikit-learn exempts its own k-means too, and test_weights_are_repetitions proves it from a given start"}


@parametrize_with_checks([KMeans(device="cpu"), MiniBatchKMeans(device="cpu")], expected_failed_checks=lambda estimator: RANDOM_START)
def test_estimator_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("cls", [KMeans, MiniBatchKMeans])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_labels_belong_to_the_returned_centres(cls, metric, dtype):
    m = cls(4, metric=metric, random_state=0, max_iter=2).fit(X.astype(dtype))
    assert np.array_equal(m.labels_, m.predict(X.astype(dtype)))
    assert np.array_equal(m.labels_, m.transform(X.astype(dtype)).argmin(1))
    assert m.cluster_centers_.dtype == (np.float64 if dtype == np.float64 else np.float32)


@pytest.mark.parametrize("t", [1, 3, 7])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-4), (np.float64, 1e-6)])
def test_same_centres_as_scikit_learn_after_t_steps(t, dtype, tolerance):
    x = X.astype(dtype)
    ours = KMeans(6, init=x[:6], max_iter=t, tol=0).fit(x)
    theirs = SkKMeans(6, init=x[:6], n_init=1, max_iter=t, tol=0).fit(x)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=tolerance)
    assert np.array_equal(ours.labels_, theirs.labels_) and ours.n_iter_ == theirs.n_iter_


def test_float32_finds_what_float64_finds():
    a, b = (KMeans(4, random_state=0).fit(X.astype(t)) for t in (np.float32, np.float64))
    assert np.array_equal(a.labels_, b.labels_)
    np.testing.assert_allclose(a.cluster_centers_, b.cluster_centers_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_an_offset_changes_nothing(offset):
    x = X.astype(np.float32)
    far = x.astype(np.float64) + offset
    a, b = KMeans(4, init=x[:4], tol=0).fit(x), KMeans(4, init=far[:4], tol=0).fit(far)
    assert np.array_equal(a.labels_, b.labels_)
    np.testing.assert_allclose(a.cluster_centers_, b.cluster_centers_ - offset, atol=1e-4)


def test_means_of_many_float32_points_at_an_offset_are_accurate():
    x = torch.randn(300_000, 2, generator=torch.Generator().manual_seed(0)) + 10_000
    center = kmeans(x, x[:1], max_iter=1).centers
    assert (center - x.double().mean(0)).abs().max() < 1e-3  # float32 steps are 0.001 wide there


@pytest.mark.parametrize("cls", [KMeans, MiniBatchKMeans])
def test_same_seed_same_bits(cls):
    a, b, c = (cls(4, random_state=s, init="random", n_init=1).fit(X) for s in (0, 0, 1))
    assert a.cluster_centers_.tobytes() == b.cluster_centers_.tobytes()
    assert a.cluster_centers_.tobytes() != c.cluster_centers_.tobytes()


def test_permuted_rows_permute_the_labels():
    p = RNG.permutation(len(X))
    a, b = KMeans(4, init=X[:4], tol=0).fit(X), KMeans(4, init=X[:4], tol=0).fit(X[p])
    assert np.array_equal(a.labels_[p], b.labels_)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_weights_are_repetitions(metric):
    w = RNG.integers(0, 4, len(X))
    a = KMeans(4, init=X[:4], tol=0, metric=metric).fit(X, sample_weight=w)
    b = KMeans(4, init=X[:4], tol=0, metric=metric).fit(np.repeat(X, w, axis=0))
    np.testing.assert_allclose(a.cluster_centers_, b.cluster_centers_, atol=1e-10)
    assert a.inertia_ == pytest.approx(b.inertia_, rel=1e-10)


def test_zero_weight_points_are_never_a_start():
    w = np.zeros(len(X)); w[[3, 70, 200]] = 1
    for init in ("k-means++", "random"):
        m = KMeans(3, init=init, random_state=0).fit(X, sample_weight=w)
        assert m.inertia_ == pytest.approx(0, abs=1e-12)


def test_non_contiguous_negative_stride_and_lists():
    want = KMeans(3, init=X[::-1][:3].copy(), tol=0).fit(X[::-1].copy()).labels_
    assert np.array_equal(KMeans(3, init=X[::-1][:3], tol=0).fit(X[::-1]).labels_, want)
    assert np.array_equal(KMeans(3, init=X[::-1][:3], tol=0).fit(X[::-1].tolist()).labels_, want)
    assert np.array_equal(KMeans(3, init=X[::-1][:3], tol=0).fit(np.asfortranarray(X[::-1])).labels_, want)


def test_input_is_not_changed():
    x = torch.tensor(X); before = x.clone()
    KMeans(4, random_state=0, metric="cosine").fit(x); MiniBatchKMeans(4, random_state=0).fit(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bad, argument", [
    (dict(n_clusters=0), "n_clusters"), (dict(n_clusters=241), "n_clusters"), (dict(n_clusters=2.5), "n_clusters"),
    (dict(max_iter=0), "max_iter"), (dict(tol=-1), "tol"), (dict(metric="l1"), "metric"), (dict(init="best"), "init"),
    (dict(init=X[:3]), "init"), (dict(empty="split"), "empty"), (dict(n_init=0), "n_init"), (dict(device="gpu"), "device"),
    (dict(random_state=-1), "random_state")])
def test_bad_parameters_name_the_argument(bad, argument):
    with pytest.raises(ValueError, match=argument): KMeans(**{"n_clusters": 4, **bad}).fit(X)


@pytest.mark.parametrize("x, message", [
    (np.full((4, 2), np.nan), "NaN"), (np.full((4, 2), np.inf), "inf"), (np.empty((0, 2)), "0 sample"), (np.empty((4, 0)), "0 feature"),
    (np.arange(4.), "2D|2 dim"), (np.ones((4, 2)), "n_clusters=2, but all 4 rows"), (np.array([[1, "a"]] * 4, dtype=object), "a")])
def test_bad_data_name_what_came(x, message):
    for cls in (KMeans, MiniBatchKMeans):
        with pytest.raises(ValueError, match=message): cls(2).fit(x)
        if x.dtype != object:
            with pytest.raises(ValueError): cls(2).fit(torch.tensor(x))


def test_bad_weights():
    for w in (-np.ones(240), np.zeros(240), np.ones(3), np.full(240, np.nan)):
        with pytest.raises(ValueError, match="(?i)weight"): KMeans(2).fit(X, sample_weight=w)
        with pytest.raises(ValueError, match="(?i)weight"): KMeans(2).fit(torch.tensor(X), sample_weight=torch.tensor(w))


def test_one_column_and_one_point_are_fine():
    assert KMeans(2, random_state=0).fit(X[:, :1]).cluster_centers_.shape == (2, 1)
    assert KMeans(1).fit(X[:1]).inertia_ == 0


def test_interrupt_keeps_the_best_state(monkeypatch):
    import deepclustering.clustering.kmeans as module
    real = module.lloyd_steps

    def interrupted(*args, **kwargs):
        for step in real(*args, **kwargs):
            yield step
            if step.n_iter == 2: raise KeyboardInterrupt
    monkeypatch.setattr(module, "lloyd_steps", interrupted)
    m = KMeans(6, init=X[:6], tol=0)
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): m.fit(X)
    monkeypatch.undo()
    np.testing.assert_allclose(m.cluster_centers_, KMeans(6, init=X[:6], tol=0, max_iter=2).fit(X).cluster_centers_)
    assert np.array_equal(m.labels_, m.predict(X))


def test_interrupted_batches_leave_what_they_found(monkeypatch):
    whole, done = MiniBatchKMeans._step, []

    def step(self, *args):
        if len(done) == 3: raise KeyboardInterrupt
        done.append(1)
        return whole(self, *args)
    monkeypatch.setattr(MiniBatchKMeans, "_step", step)
    m = MiniBatchKMeans(6, batch_size=64, random_state=0)
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): m.fit(X)
    monkeypatch.undo()
    assert m.n_steps_ == 3 and m.counts_.sum() == 3 * 64 and np.array_equal(m.labels_, m.predict(X))
    assert m.inertia_ == pytest.approx(-m.score(X))


def test_the_bar_counts_first_centres_iterations_and_batches(monkeypatch):
    import deepclustering.core.checks as module
    bars = []

    class Bar(module.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append((self, self.disable))
    monkeypatch.setattr(module, "tqdm", Bar)
    m, batches = KMeans(5, n_init=2, max_iter=3, tol=0, random_state=0, verbose=True).fit(X), MiniBatchKMeans(5, batch_size=32, random_state=0, verbose=True).fit(X)
    assert [(bar.n, off) for bar, off in bars] == [(2 * (5 + 3), False), (batches.n_steps_, False)] and m.n_iter_ == 3
    KMeans(5, verbose=False).fit(X)
    assert bars[-1][1]


def test_refit_and_partial_fit_after_clone():
    m = MiniBatchKMeans(3, random_state=0).partial_fit(X[:100]).partial_fit(X[100:])
    assert m.counts_.sum() == 240 and m.n_steps_ == 2
    assert not hasattr(clone(m), "_counts")
    with pytest.raises(ValueError, match="n_clusters"): MiniBatchKMeans(30).partial_fit(X[:20])


def test_memory_map_is_never_in_memory(tmp_path):
    """A fit on a 205 MB file adds less than 128 MB to the process's own memory (mapped pages belong to the file).

    What is held for every point are its label, weight and distances to the candidates of k-means++: about 60 bytes, not its 256."""
    code = textwrap.dedent(f"""
        import numpy as np, threading, time, torch
        from deepclustering.clustering import KMeans, MiniBatchKMeans
        path = {str(tmp_path / 'x.npy')!r}
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(800_000, 64))
        rng = np.random.default_rng(0)
        part = (rng.normal(size=(50_000, 64)) + rng.integers(0, 5, (50_000, 1))).astype(np.float32)
        for i in range(0, len(out), len(part)): out[i:i + len(part)] = part + i / len(out)  # sixteen times the same draw, moved
        out.flush(); del out
        def anonymous(): return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
        KMeans(3).fit(rng.normal(size=(5000, 64)).astype(np.float32))  # warm up the allocators
        x = np.load(path, mmap_mode="r")
        peak, base, done = [0], anonymous(), threading.Event()
        def watch():
            while not done.wait(.005): peak[0] = max(peak[0], anonymous())
        watcher = threading.Thread(target=watch); watcher.start()
        KMeans(5, max_iter=3, random_state=0).fit(x); MiniBatchKMeans(5, max_iter=1, random_state=0).fit(x)
        done.set(); watcher.join()
        print(peak[0] - base)
    """)
    if not sys.platform.startswith("linux"): pytest.skip("reads /proc")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 128, f"{out.stdout} MB"


@pytest.mark.peers
def test_same_centres_as_faiss():
    faiss = pytest.importorskip("faiss")
    x = X.astype(np.float32)
    km = faiss.Kmeans(5, 4, niter=10, min_points_per_centroid=1, max_points_per_centroid=10**9)
    km.train(x, init_centroids=x[:4])
    np.testing.assert_allclose(KMeans(4, init=x[:4], max_iter=10, tol=0).fit(x).cluster_centers_, km.centroids, atol=1e-5)


@pytest.mark.peers
@pytest.mark.slow
def test_speed_beside_faiss_and_scikit_learn():
    "N=200k, d=64, k=256, one thread, median of 9 alternations: at most 1.4 of the faster peer."
    pytest.importorskip("faiss")
    out = subprocess.run([sys.executable, "benchmarks/kmeans.py"], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.parametrize("cls", [KMeans, MiniBatchKMeans])
def test_a_fitted_model_labels_fewer_points_than_it_has_clusters(cls):
    m = cls(4, random_state=0).fit(X)
    assert np.array_equal(m.predict(X[:1]), m.labels_[:1]) and m.score(X[:2]) <= 0


@pytest.mark.parametrize("cls", [KMeans, MiniBatchKMeans])
def test_under_the_cosine_metric_the_length_of_a_start_does_not_count(cls):
    start = X[:4] * np.array([[1.], [5.], [.1], [30.]])
    a, b = (cls(4, init=s, metric="cosine", random_state=0, max_iter=1).fit(X) for s in (start, start / np.linalg.norm(start, axis=1, keepdims=True)))
    assert np.array_equal(a.labels_, b.labels_)
    np.testing.assert_allclose(a.cluster_centers_, b.cluster_centers_, atol=1e-12)
