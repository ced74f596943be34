"""`GaussianMixture` and `IncrementalGaussianMixture`: scikit-learn's checks and its EM step for step, SciPy's densities, NumPy's inverses, bad input, interruptions."""
import pickle
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import chi2, multivariate_normal
from sklearn import mixture as theirs
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclustering.clustering import GaussianMixture, IncrementalGaussianMixture, conditional_mean, learn_point, m_step, rank_one
from deepclustering.clustering.kmeans import KMeans
from deepclustering.clustering.mixtures import KINDS, Components, drop_spurious, log_gaussian, mahalanobis, newborn, nobody, precision_factors
from deepclustering.core.aggregate import segment_mean

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(240, 5)) @ RNG.normal(size=(5, 5)) + 4 * RNG.normal(size=(4, 5))[RNG.integers(0, 4, 240)]
STREAM = dict(delta=1., beta=.05, device="cpu")


@parametrize_with_checks([GaussianMixture(3, device="cpu"), GaussianMixture(3, covariance_type="diag", init_params="k-means++", device="cpu"),
                          IncrementalGaussianMixture(0.3, device="cpu"), IncrementalGaussianMixture(0.3, form="covariance", device="cpu")])
def test_estimator_checks(estimator, check):
    check(estimator)


def precisions(covariances, kind): return np.linalg.inv(covariances) if kind in ("full", "tied") else 1 / covariances


def start(kind, k, seed):
    pick, C = np.random.default_rng(seed).choice(len(X), k, replace=False), np.cov(X.T)
    cov = {"full": np.stack([C] * k), "tied": C, "diag": np.stack([np.diag(C)] * k), "spherical": np.full(k, C.trace() / 5)}[kind]
    return dict(weights_init=np.full(k, 1 / k), means_init=X[pick], precisions_init=precisions(cov, kind))


# --- EM ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_steps_are_scikit_learn_s(kind, k):
    for seed, steps in ((0, 1), (1, 3), (2, 40)):
        given = dict(covariance_type=kind, max_iter=steps, tol=1e-4 if steps == 40 else 0, reg_covar=1e-3, **start(kind, k, seed))
        ours, ref = GaussianMixture(k, **given).fit(X), theirs.GaussianMixture(k, **given).fit(X)
        assert (ours.n_iter_, ours.converged_) == (ref.n_iter_, ref.converged_)
        for name in ("weights_", "means_", "covariances_", "precisions_cholesky_", "lower_bound_"): np.testing.assert_allclose(getattr(ours, name), getattr(ref, name), rtol=1e-6, atol=1e-9)
        for call in ("predict", "predict_proba", "score_samples", "score", "bic", "aic"): np.testing.assert_allclose(getattr(ours, call)(X[:50]), getattr(ref, call)(X[:50]), rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(ours.labels_, ref.predict(X))


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_never_falls(kind):
    for init in ("kmeans", "k-means++", "random", "random_from_data"):
        m = GaussianMixture(4, covariance_type=kind, reg_covar=0, tol=0, max_iter=30, init_params=init, random_state=1).fit(X)
        assert np.diff(m.lower_bounds_).min() > -1e-10 and len(m.lower_bounds_) == m.n_iter_ == 30 and not m.converged_
        assert m.score(X) >= m.lower_bound_ - 1e-10


def test_starts():
    one, many = (GaussianMixture(5, n_init=n, init_params="random", random_state=3).fit(X) for n in (1, 6))
    assert many.lower_bound_ >= one.lower_bound_
    hard = GaussianMixture(4, max_iter=1, random_state=0).fit(X)  # the start is k-means' clusters
    labels = KMeans(4, random_state=torch.Generator().manual_seed(0)).fit(torch.tensor(X)).labels_
    first = m_step(torch.tensor(X), torch.nn.functional.one_hot(labels.long(), 4).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ref = theirs.GaussianMixture(4, max_iter=1, weights_init=first.weights, means_init=first.means, precisions_init=np.linalg.inv(first.covariances)).fit(X)
    np.testing.assert_allclose(hard.means_, ref.means_, atol=1e-8)
    np.testing.assert_allclose(first.means, segment_mean(torch.tensor(X), labels.long(), 4), atol=1e-12)


def test_arrays_tensors_dtypes_and_order():
    given = dict(n_components=3, max_iter=5, **start("full", 3, 0))
    a, t = GaussianMixture(**given).fit(X), GaussianMixture(**given).fit(torch.tensor(X))
    assert isinstance(t.means_, torch.Tensor) and isinstance(a.labels_, np.ndarray)
    np.testing.assert_allclose(a.means_, t.means_, atol=1e-12)
    order = RNG.permutation(len(X))
    np.testing.assert_allclose(GaussianMixture(**given).fit(X[order]).covariances_, a.covariances_, atol=1e-9)
    np.testing.assert_allclose(GaussianMixture(**given).fit(X.astype(np.float32)).means_, a.means_, atol=1e-4)
    twice = GaussianMixture(**given).fit(np.r_[X, X])  # every point twice is the same mixture
    np.testing.assert_allclose(twice.covariances_, a.covariances_, atol=1e-9)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(a)).predict(X), a.labels_)


@pytest.mark.parametrize("kind", KINDS)
def test_sample(kind):
    m = GaussianMixture(3, covariance_type=kind, random_state=0).fit(X)
    S, of = m.sample(20_000)
    np.testing.assert_allclose(np.bincount(of, minlength=3) / 20_000, m.weights_, atol=.02)
    for j in range(3): np.testing.assert_allclose(S[of == j].mean(0), m.means_[j], atol=.25)
    full = {"full": lambda: m.covariances_[0], "tied": lambda: m.covariances_, "diag": lambda: np.diag(m.covariances_[0]), "spherical": lambda: m.covariances_[0] * np.eye(5)}[kind]()
    np.testing.assert_allclose(np.cov(S[of == 0].T), full, atol=.1 * np.abs(full).max())


def test_components_that_get_nothing_and_points_that_are_equal():
    x = torch.tensor([[-1.], [0.], [1.]], dtype=torch.float64)
    for kind in KINDS:
        P = {"full": torch.ones(2, 1, 1), "tied": torch.ones(1, 1), "diag": torch.ones(2, 1), "spherical": torch.ones(2)}[kind]
        m = GaussianMixture(2, covariance_type=kind, weights_init=[.5, .5], means_init=[[0.], [1e9]], precisions_init=P).fit(x)
        assert m.weights_.tolist() == [1, 0] and float(m.means_[1]) == 1e9 and abs(float(m.means_[0])) < 1e-12 and bool(torch.isfinite(m.score_samples(x)).all())
    same = np.r_[np.zeros((5, 2)), np.ones((5, 2))]
    m = GaussianMixture(2, random_state=0).fit(same)
    np.testing.assert_allclose(m.covariances_, np.stack([1e-6 * np.eye(2)] * 2), atol=1e-12)
    with pytest.raises(ValueError, match="singular.*reg_covar"): GaussianMixture(2, reg_covar=0, random_state=0).fit(same)
    with pytest.raises(ValueError, match="received no share"): m_step(x, torch.tensor([[1., 0]] * 3).double())


@pytest.mark.parametrize("bad, words", [
    (dict(n_components=0), "n_components"), (dict(n_components=241), "n_components"), (dict(max_iter=0), "max_iter"), (dict(n_init=0), "n_init"), (dict(tol=-1), "tol"),
    (dict(reg_covar=-1e-9), "reg_covar"), (dict(reg_covar=float("nan")), "reg_covar"), (dict(covariance_type="round"), "covariance_type"), (dict(init_params="best"), "init_params"),
    (dict(weights_init=[1., 1, 1]), "weights_init"), (dict(weights_init=[1.5, -.5, 0]), "weights_init"), (dict(means_init=np.zeros((3, 4))), "means_init"),
    (dict(precisions_init=np.ones((3, 5))), "precisions_init"), (dict(precisions_init=np.zeros((3, 5, 5))), "precisions_init"), (dict(device="nowhere"), "device")])
def test_bad_mixtures(bad, words):
    with pytest.raises(ValueError, match=words): GaussianMixture(**({"n_components": 3} | bad)).fit(X)


def test_bad_data():
    for estimator in (GaussianMixture(2), IncrementalGaussianMixture()):
        for hole in (np.nan, np.inf):
            with pytest.raises(ValueError, match="NaN|infin"): clone(estimator).fit(np.r_[X, [[0, 1, hole, 0, 0]]])
        fitted = clone(estimator).fit(X)
        with pytest.raises(ValueError, match="features"): fitted.predict(X[:, :3])


def test_interrupted(monkeypatch):
    import deepclustering.clustering.mixtures as module
    steps, learn, calls = module.em_steps, module.learn_point, []

    def tired(*a):
        for i, step in enumerate(steps(*a)):
            if i == 3: raise KeyboardInterrupt
            yield step
    monkeypatch.setattr(module, "em_steps", tired)
    m = GaussianMixture(3, tol=0, random_state=0)
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): m.fit(X)
    assert m.n_iter_ == 3 and m.predict(X).shape == (240,)

    def at_once(*a): raise KeyboardInterrupt
    monkeypatch.setattr(module, "_start", at_once)
    with pytest.raises(KeyboardInterrupt): GaussianMixture(3).fit(X)

    def tired_learner(*a):
        calls.append(1)
        if len(calls) > 100: raise KeyboardInterrupt
        return learn(*a)
    monkeypatch.setattr(module, "learn_point", tired_learner)
    s = IncrementalGaussianMixture(**STREAM)
    with pytest.warns(UserWarning, match="first 100 rows"), pytest.raises(KeyboardInterrupt): s.fit(X)
    monkeypatch.setattr(module, "learn_point", learn)
    np.testing.assert_allclose(s.means_, IncrementalGaussianMixture(scale=X.std(0), **STREAM).fit(X[:100]).means_, atol=1e-12)


# --- one pass ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("d", [1, 2, 9])
def test_rank_one_is_the_inverse(d):
    A = np.stack([np.cov(RNG.normal(size=(d, 4 * d + 2))).reshape(d, d) + np.eye(d) for _ in range(3)])
    u, c = RNG.normal(size=(3, d)), np.array([2., .3, -.05])
    P, L = rank_one(torch.tensor(np.linalg.inv(A)), torch.tensor(np.linalg.slogdet(A)[1]), torch.tensor(u), torch.tensor(c))
    want = A + c[:, None, None] * u[:, :, None] * u[:, None]
    np.testing.assert_allclose(P, np.linalg.inv(want), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(L, np.linalg.slogdet(want)[1], atol=1e-10)
    with pytest.raises(ValueError, match="component 1"): rank_one(torch.eye(2).expand(2, 2, 2), torch.zeros(2), torch.tensor([[0., 0], [1, 1]]), torch.tensor([1., -.5]))


@cache
def by_the_book(n, delta, beta):
    "The incremental mixture of the first n points with NumPy's inverse and SciPy's density, a component and a point at a time."
    s2, gate, parts = (delta * X[:n].std(0))**2, chi2.ppf(1 - beta, X.shape[1]), []
    for x in X[:n]:
        far = [(x - c["m"]) @ np.linalg.inv(c["C"]) @ (x - c["m"]) for c in parts]
        if not any(f < gate for f in far): parts.append({"s": 1., "m": x, "C": np.diag(s2)}); continue
        p = np.array([c["s"] * multivariate_normal.pdf(x, c["m"], c["C"]) for c in parts])
        for c, share in zip(parts, p / p.sum()):
            c["s"] += share; w = share / c["s"]; e = x - c["m"]
            c["m"] = c["m"] + w * e; c["C"] = (1 - w) * c["C"] + w * (1 - w) * np.outer(e, e)
    return parts


@pytest.mark.parametrize("form", ["precision", "covariance"])
@pytest.mark.parametrize("delta, beta", [(1., .05), (.6, .2), (2., 0)])
def test_one_pass_by_the_book(form, delta, beta):
    want = by_the_book(150, delta, beta)
    m = IncrementalGaussianMixture(delta, beta, form=form, device="cpu").fit(X[:150])
    assert m.n_components_ == len(want) and (beta > 0) == (len(want) > 1) and m.n_seen_ == 150
    np.testing.assert_allclose(m.masses_, [c["s"] for c in want], rtol=1e-8)
    np.testing.assert_allclose(m.means_, [c["m"] for c in want], atol=1e-8)
    np.testing.assert_allclose(m.covariances_, [c["C"] for c in want], atol=1e-8)
    np.testing.assert_allclose(m.log_dets_, [np.linalg.slogdet(c["C"])[1] for c in want], atol=1e-8)
    total = sum(c["s"] for c in want)
    joint = np.stack([c["s"] / total * multivariate_normal.pdf(X, c["m"], c["C"]) for c in want], 1)
    np.testing.assert_allclose(m.score_samples(X), np.log(joint.sum(1)), atol=1e-8)
    np.testing.assert_allclose(m.predict_proba(X), joint / joint.sum(1, keepdims=True), atol=1e-8)
    np.testing.assert_array_equal(m.labels_, m.predict(X[:150]))


def test_a_long_stream_drifts_little():
    x = np.random.default_rng(1).normal(size=(1500, 6)) @ np.diag([1, 3, .1, 10, 1, .5])
    m = IncrementalGaussianMixture(beta=0, device="cpu").fit(x)
    want = np.cov(x.T, ddof=0) + np.diag(x.var(0)) / 1500
    np.testing.assert_allclose(m.precisions_[0] @ want, np.eye(6), atol=1e-9)
    assert m.ages_.tolist() == [1500] and m.masses_.tolist() == [1500]


def test_the_published_update():
    one = dict(e=torch.tensor([[1.5]]).double(), omega=torch.tensor([.5]).double())
    from deepclustering.clustering import covariance_update, precision_update
    assert float(covariance_update(torch.ones(1, 1, 1).double(), update="published", **one)) == pytest.approx(.5 - .125 * 2.25)
    P, L = precision_update(torch.ones(1, 1, 1).double(), torch.zeros(1).double(), update="published", **one)
    assert float(P) == pytest.approx(1 / (.5 - .125 * 2.25)) and float(L) == pytest.approx(np.log(.5 - .125 * 2.25))
    far = dict(one, e=torch.tensor([[2.5]]).double())
    with pytest.raises(ValueError, match="positive definite"): precision_update(torch.ones(1, 1, 1).double(), torch.zeros(1).double(), update="published", **far)
    lone = learn_point(nobody(2), torch.tensor([1., 2.]).double(), 1., torch.ones(2).double(), "precision", "published")  # learns its own point: mass 2, half the variance
    assert lone.mass.tolist() == [2] and lone.means.tolist() == [[1, 2]] and torch.allclose(lone.matrices[0], 2 * torch.eye(2).double()) and float(lone.log_dets) == pytest.approx(-2 * np.log(2))
    kept = learn_point(nobody(2), torch.tensor([1., 2.]).double(), 1., torch.ones(2).double())
    assert kept.mass.tolist() == [1] and torch.allclose(kept.matrices[0], torch.eye(2).double())


def test_partial_fit_scale_and_restart():
    whole, parts = (IncrementalGaussianMixture(scale=X.std(0), **STREAM) for _ in range(2))
    whole.fit(X)
    for part in np.array_split(X, 7): parts.partial_fit(part)
    np.testing.assert_allclose(parts.precisions_, whole.precisions_, atol=1e-10)
    np.testing.assert_allclose(parts.fit(X).means_, whole.means_, atol=1e-12)
    assert IncrementalGaussianMixture().fit(np.zeros((3, 2))).n_components_ == 1 and IncrementalGaussianMixture().fit(X[:1]).n_components_ == 1
    constant = np.c_[X, np.ones(len(X))]
    assert np.isfinite(IncrementalGaussianMixture(**STREAM).fit(constant).score_samples(constant)).all()


def test_dropping():
    c = Components(*(torch.tensor(v, dtype=torch.float64) for v in ([9., 1, 2], [50., 50, 3], [[0.], [1], [2]], [[[1.]], [[1]], [[1]]], [0., 0, 0])))
    assert drop_spurious(c, 10, 3).means.flatten().tolist() == [0, 2] and drop_spurious(c, 60, 3) is c
    assert drop_spurious(c, 1, 100).mass.tolist() == [9]
    assert IncrementalGaussianMixture(min_age=10, min_mass=3, **STREAM).fit(X).n_components_ < IncrementalGaussianMixture(**STREAM).fit(X).n_components_


def test_distances_and_densities():
    C = np.stack([np.cov(X[i:i + 60].T) for i in (0, 60, 120)])
    m, x = torch.tensor(X[:3]), torch.tensor(X)
    state = [Components(torch.ones(3), torch.ones(3), m, torch.tensor(M), torch.zeros(3)) for M in (np.linalg.inv(C), C)]
    want = np.stack([[(p - a) @ np.linalg.solve(S, p - a) for a, S in zip(X[:3], C)] for p in X])
    for s, form in zip(state, ("precision", "covariance")): np.testing.assert_allclose(mahalanobis(x, s, form), want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_gaussian(x, m, precision_factors(torch.tensor(C))), np.stack([multivariate_normal.logpdf(X, a, S) for a, S in zip(X[:3], C)], 1), atol=1e-9)
    b = newborn(torch.zeros(2).double(), torch.tensor([2., 4]).double(), "covariance")
    assert b.matrices[0].tolist() == [[4, 0], [0, 16]] and float(b.log_dets) == pytest.approx(np.log(64))


def test_one_component_completes_as_linear_regression_does():
    m = IncrementalGaussianMixture(delta=1e-4, beta=0, device="cpu").fit(X)
    for known in ([0, 1, 2, 3], [4, 0], [2]):
        other = [i for i in range(5) if i not in known]
        np.testing.assert_allclose(m.complete(X[:20][:, known], known), LinearRegression().fit(X[:, known], X[:, other]).predict(X[:20][:, known]).reshape(20, -1), atol=1e-5)


def test_completing_a_mixture_is_bayes_rule():
    m = GaussianMixture(3, random_state=0).fit(X)
    got = conditional_mean(torch.tensor(X[:9, 1:]), torch.arange(1, 5), *(torch.tensor(v) for v in (m.weights_, m.means_, np.linalg.inv(m.covariances_), np.linalg.slogdet(m.covariances_)[1])))
    grid = np.linspace(-40, 40, 8001)  # the mean over x_0 by summing the joint density
    for p, out in zip(X[:9], got):
        density = np.exp(m.score_samples(np.c_[grid, np.tile(p[1:], (len(grid), 1))]))
        assert float(out) == pytest.approx((grid * density).sum() / density.sum(), abs=1e-6)


@pytest.mark.parametrize("bad, words", [
    (dict(delta=0), "delta"), (dict(delta=float("inf")), "delta"), (dict(beta=1), "beta"), (dict(beta=-.1), "beta"), (dict(min_age=5), "min_mass"), (dict(min_mass=5), "min_age"),
    (dict(scale=[1., 1, 1, 1]), "scale"), (dict(scale=[1., 1, 1, 1, 0]), "scale"), (dict(form="inverse"), "form"), (dict(update="new"), "update"), (dict(device="nowhere"), "device")])
def test_bad_streams(bad, words):
    with pytest.raises(ValueError, match=words): IncrementalGaussianMixture(**bad).fit(X)


@pytest.fixture(scope="module")
def streamed(): return IncrementalGaussianMixture(**STREAM).fit(X)


@pytest.mark.parametrize("known", [[], [0, 0], [5], [-1], [0, 1, 2, 3, 4], [[0]], [.5], [True]])
def test_bad_places(known, streamed):
    with pytest.raises(ValueError, match="known"): streamed.complete(X[:2, :1], known)
    with pytest.raises(ValueError, match="columns"): streamed.complete(X[:2], [0, 1])
