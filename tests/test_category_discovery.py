"""Category discovery: SciPy's densities and the list of all partitions behind every ratio, numeric integrals, scikit-learn's checks, labels that must hold, bad input, interruptions."""
import functools
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import multigammaln
from scipy.stats import invgamma, invwishart, multivariate_normal, norm
from sklearn.base import clone
from sklearn.cluster import KMeans as Reference
from sklearn.datasets import make_blobs
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclustering.clustering import category_discovery as module
from deepclustering.clustering.category_discovery import (Prior, SemiSupervisedGaussianMixture, clamped_shares, concentrations, discovery_rounds, find_prototypes, learn_categories, log_marginal, log_split_ratio,
                                                          log_weight, map_mixture, moments, niw_prior, pooled, posterior, prototype_contrast, semi_supervised_kmeans, split_and_merge, sub_clusters, supervised_contrast)
from deepclustering.clustering.mixtures import GaussianMixture
from deepclustering.core.metrics import ari, cluster_accuracy

RNG = np.random.default_rng(0)
def f64(v): return torch.as_tensor(np.asarray(v, dtype=np.float64))
def prior_of(d, kappa=.7, nu=None, seed=0):
    A = np.random.default_rng(seed).normal(size=(d, d))
    return Prior(f64(np.linspace(-1, 1, d)), f64(kappa), f64(d + 1.3 if nu is None else nu), f64(A @ A.T + .5 * np.eye(d)))
def one(x): return moments(x, torch.ones(len(x), 1, dtype=torch.float64))


@parametrize_with_checks([SemiSupervisedGaussianMixture(device="cpu", random_state=0), SemiSupervisedGaussianMixture(labelled_moves=False, covariance_prior=.1, device="cpu", random_state=0)])
def test_estimator_checks(estimator, check):
    check(estimator)


# --- the marginal likelihood ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_marginal_by_bayes(d, n):
    "log f = log p(x | mu, Sigma) + log prior - log posterior, at any mu and Sigma."
    x, p = f64(RNG.normal(size=(n, d)) + 1), prior_of(d)
    q = posterior(p, one(x))
    for seed in range(3):
        r = np.random.default_rng(seed)
        mu, A = r.normal(size=d), r.normal(size=(d, d))
        cov = A @ A.T + np.eye(d)
        def niw(m, kappa, nu, scale): return multivariate_normal.logpdf(mu, m, cov / kappa) + invwishart.logpdf(cov, nu, scale)
        want = multivariate_normal.logpdf(x.numpy(), mu, cov).sum() + niw(p.mean.numpy(), float(p.kappa), float(p.nu), p.scale.numpy()) - niw(q.mean[0].numpy(), float(q.kappa), float(q.nu), q.scale[0].numpy())
        np.testing.assert_allclose(float(log_marginal(p, one(x))), want, rtol=1e-9)


def test_marginal_is_the_integral():
    x, p = np.array([.3, 1.1, -.4]), Prior(f64([.2]), f64(.7), f64(3.), f64([[1.5]]))
    mu, v = np.linspace(-15, 15, 1501)[:, None], np.exp(np.linspace(-6, 9, 1501))
    log_p = norm.logpdf(mu, .2, (v / .7)**.5) + invgamma.logpdf(v, 1.5, scale=.75) + np.log(v) + sum(norm.logpdf(a, mu, v**.5) for a in x)   # over log v
    value = np.exp(log_p).sum() * (30 / 1500) * (15 / 1500)
    np.testing.assert_allclose(math.exp(float(log_marginal(p, one(f64(x[:, None]))))), value, rtol=1e-3)


def test_marginal_of_nobody_and_of_many():
    p = prior_of(4)
    assert float(log_marginal(p, one(f64(np.zeros((0, 4)))))) == pytest.approx(0, abs=1e-12) and float(log_weight(p, one(f64(np.zeros((0, 4)))), 3.)) == 0
    x = f64(RNG.normal(size=(5000, 4)))
    per_point = float(log_marginal(p, one(x))) / 5000
    assert per_point == pytest.approx(multivariate_normal.logpdf(x, np.zeros(4), np.eye(4)).mean(), abs=.03) and np.isfinite(per_point)
    np.testing.assert_allclose(float(torch.mvlgamma(f64(9.3), 5)), multigammaln(9.3, 5))


def test_moments_pool_as_their_points():
    x, labels = f64(RNG.normal(size=(300, 3)) * 5 + 1e4), torch.as_tensor(RNG.integers(0, 4, 300))
    m = moments(x, F.one_hot(labels, 4).double())
    for j in range(4):
        own = x[labels == j].numpy()
        np.testing.assert_allclose(m.means[j], own.mean(0), rtol=1e-12); np.testing.assert_allclose(m.scatters[j], np.cov(own.T, ddof=0) * len(own), rtol=1e-6, atol=1e-3)
    together = pooled(m.at([0, 1]), m.at([2, 3]))
    for j, (a, b) in enumerate(((0, 2), (1, 3))):
        for got, want in zip(together.at([j]), one(x[(labels == a) | (labels == b)])): np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-3)


def all_partitions(n):
    seen = {}
    for z in itertools.product(range(n), repeat=n):
        names = {}
        seen[tuple(names.setdefault(v, len(names)) for v in z)] = None
    return list(seen)


@pytest.mark.parametrize("alpha", [.2, 3.])
def test_every_split_of_every_partition(alpha):
    "The posterior of all 52 partitions of five points in the plane, by SciPy, against the ratios."
    x, p = f64(RNG.normal(size=(5, 2)) * 2), prior_of(2)
    @functools.cache
    def f(rows):
        own = x[list(rows)]; q = posterior(p, one(own))
        mu, cov = np.zeros(2), np.eye(2)
        def niw(m, kappa, nu, scale): return multivariate_normal.logpdf(mu, m, cov / kappa) + invwishart.logpdf(cov, nu, scale)
        return np.sum(multivariate_normal.logpdf(own.numpy(), mu, cov)) + niw(p.mean.numpy(), .7, float(p.nu), p.scale.numpy()) - niw(q.mean[0].numpy(), float(q.kappa), float(q.nu), q.scale[0].numpy())
    blocks = {z: [tuple(i for i in range(5) if z[i] == j) for j in range(max(z) + 1)] for z in all_partitions(5)}
    assert len(blocks) == 52
    crp = {z: math.log(alpha) * len(b) + sum(math.lgamma(len(v)) for v in b) + math.lgamma(alpha) - math.lgamma(alpha + 5) for z, b in blocks.items()}
    assert sum(map(math.exp, crp.values())) == pytest.approx(1, abs=1e-12)
    post = {frozenset(b): crp[z] + sum(map(f, b)) for z, b in blocks.items()}
    @functools.cache
    def ratio(a, b): return float(log_split_ratio(p, one(x[list(a)]), one(x[list(b)]), alpha))
    tried = 0
    for coarse in post:
        for block in coarse:
            for size in range(1, len(block)):
                for a in itertools.combinations(block, size):
                    b = tuple(i for i in block if i not in a)
                    fine = (coarse - {block}) | {a, b}
                    assert ratio(a, b) == pytest.approx(post[fine] - post[coarse], abs=1e-8); tried += 1
    assert tried > 200


# --- EM with labels ---------------------------------------------------------------------------------------------------------

def test_the_map_beats_its_neighbours():
    x, p = f64(RNG.normal(size=(15, 3)) + 2), prior_of(3)
    q, m = posterior(p, one(x)), map_mixture(p, one(x))
    def log_density(mu, cov): return multivariate_normal.logpdf(mu, q.mean[0], cov / float(q.kappa)) + invwishart.logpdf(cov, float(q.nu), q.scale[0].numpy())
    best = log_density(m.means[0].numpy(), m.covariances[0].numpy())
    for seed in range(20):
        r = np.random.default_rng(seed); A = r.normal(size=(3, 3)) * .05
        assert log_density(m.means[0].numpy() + .05 * r.normal(size=3), (np.eye(3) + A) @ m.covariances[0].numpy() @ (np.eye(3) + A).T) < best


def test_without_a_prior_it_is_em():
    "A vanishing prior leaves the M step of the mixture, up to the divisor of the mode."
    x, shares = f64(RNG.normal(size=(200, 2))), torch.softmax(f64(RNG.normal(size=(200, 3))), 1)
    from deepclustering.clustering.mixtures import m_step
    nothing = Prior(f64([0, 0]), f64(1e-9), f64(1.0001), f64(np.eye(2) * 1e-9))
    ours, want = map_mixture(nothing, moments(x, shares), 1e-9), m_step(x, shares, reg_covar=0)
    np.testing.assert_allclose(ours.weights, want.weights, rtol=1e-6); np.testing.assert_allclose(ours.means, want.means, rtol=1e-6, atol=1e-8)
    mass = shares.sum(0)[:, None, None]
    np.testing.assert_allclose(ours.covariances, want.covariances * mass / (mass + 1.0001 + 4), rtol=1e-5, atol=1e-8)


def test_clamped_shares():
    x, y = f64(RNG.normal(size=(30, 2))), torch.tensor([0] * 5 + [1] * 5 + [-1] * 20)
    mix = map_mixture(prior_of(2), moments(x, torch.softmax(f64(RNG.normal(size=(30, 3))), 1)))
    r = clamped_shares(x, mix, y)
    assert (r[:5, 0] == 1).all() and (r[5:10, 1] == 1).all()
    dens = np.stack([float(w) * multivariate_normal.pdf(x[10:], m, C) for w, m, C in zip(mix.weights, mix.means, mix.covariances)], 1)
    np.testing.assert_allclose(r[10:], dens / dens.sum(1, keepdims=True), rtol=1e-9)


# --- semi-supervised k-means ------------------------------------------------------------------------------------------------

def test_kmeans_without_labels_is_kmeans():
    X, _ = make_blobs(200, centers=4, random_state=1, cluster_std=.5)
    ours = semi_supervised_kmeans(f64(X), np.full(200, -1), 4, random_state=0)
    ref = Reference(4, n_init=10, random_state=0).fit(X)
    assert ours.inertia == pytest.approx(ref.inertia_, rel=1e-9) and ari(ref.labels_, ours.labels) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kmeans_holds_names(dtype):
    X, t = make_blobs(150, centers=5, random_state=2)
    y = np.where((t < 2) & (np.arange(150) % 2 == 0), t * 10 + 3, -1)
    x = torch.tensor(X, dtype=dtype)
    found = semi_supervised_kmeans(x, y, 5, random_state=0)
    assert (found.labels.numpy()[y == 3] == 0).all() and (found.labels.numpy()[y == 13] == 1).all() and found.centers.dtype == dtype
    for j in range(5): np.testing.assert_allclose(found.centers[j], x[found.labels == j].mean(0), rtol=1e-4)
    free = torch.as_tensor(y < 0)
    assert (torch.cdist(x[free], found.centers).argmin(1) == found.labels[free]).all()
    many = [semi_supervised_kmeans(x, y, 5, n_init=k, random_state=1).inertia for k in (1, 20)]
    assert many[1] <= many[0] and torch.equal(semi_supervised_kmeans(x, y, 5, random_state=7).labels, semi_supervised_kmeans(x, y, 5, random_state=7).labels)


@pytest.mark.parametrize("y, k, text", [([0, 1, -1, -1], 1, "n_clusters must be between 2 and 4"), ([0, 1, -1, -1], 5, "n_clusters"), ([0, 1, -1], 2, r"y must have shape \(4,\)"),
                                        ([0, -2, 1, 1], 2, "y must be at least -1"), ([.5, 0, 1, 1], 2, "y must hold whole numbers"), (["a", "b", "a", "b"], 2, "y must hold whole numbers")])
def test_kmeans_bad_input(y, k, text):
    with pytest.raises(ValueError, match=text): semi_supervised_kmeans(torch.randn(4, 2), y, k)


# --- proposals --------------------------------------------------------------------------------------------------------------

def test_halves_are_a_fixed_point_of_2_means():
    X, t = make_blobs(240, centers=6, random_state=3)
    labels, y = torch.as_tensor(t // 2), torch.where(torch.as_tensor((t == 0) & (np.arange(240) % 3 == 0)), 0, -1)
    sub = sub_clusters(f64(X), y, labels, 0)
    assert (sub[y == 0] == 0).all()
    for j in range(3):
        own = labels == j
        means = torch.stack([f64(X)[own & (sub == s)].mean(0) for s in (0, 1)])
        assert ((torch.cdist(f64(X)[own], means).argmin(1) == sub[own]) | (y[own] == 0)).all()
    same = torch.zeros(10, 2, dtype=torch.float64)
    assert (sub_clusters(same, torch.full((10,), -1), torch.zeros(10, dtype=torch.int64), 0) == 0).all()


def test_starts_of_the_halves_follow_the_weights():
    "The second centre is drawn by squared distance: a point at 3 is nine times as likely as a point at 1."
    x, y, labels = f64([[0.], [1.], [3.]]), torch.tensor([0, -1, -1]), torch.zeros(3, dtype=torch.int64)
    got = [sub_clusters(x, y, labels, s, max_iter=1).tolist() for s in range(300)]
    assert set(map(tuple, got)) == {(0, 1, 1), (0, 0, 1)} and .02 < np.mean([g == [0, 1, 1] for g in got]) < .18


@pytest.mark.parametrize("moves", [True, False])
def test_split_and_merge_obeys(moves):
    X, t = make_blobs(200, centers=5, random_state=4, cluster_std=.6)
    y = torch.as_tensor(np.where((t < 2) & (np.arange(200) % 3 == 0), t, -1))
    labels, p = torch.where(y >= 0, y, torch.as_tensor(RNG.integers(0, 4, 200))), niw_prior(f64(X), y)
    for seed in range(8):
        got, splits, merges = split_and_merge(f64(X), y, labels, p, labelled_moves=moves, random_state=seed)
        assert int(got.max()) + 1 == 4 + splits - merges and (got.bincount() > 0).all() and (got[y >= 0] == y[y >= 0]).all()
        if not moves:
            for j in range(2): assert torch.equal(got == j, labels == j)


def test_acceptance_is_min_1_H():
    "One possible split of ratio H < 1: its frequency is H."
    x, y, labels = f64([[-1.], [-1.], [1.], [1.]]), torch.full((4,), -1), torch.zeros(4, dtype=torch.int64)
    p = Prior(f64([0]), f64(1), f64(2), f64([[2]]))
    H = 81 * 54 * 5**.5 / 3072 / 6
    rate = np.mean([split_and_merge(x, y, labels, p, random_state=s)[1] for s in range(400)])
    assert abs(rate - H) < 4 * (H * (1 - H) / 400)**.5
    two = torch.tensor([0, 0, 1, 1])
    assert all(split_and_merge(x, y, two, p, random_state=s)[2] == 1 for s in range(20) if not split_and_merge(x, y, two, p, random_state=s)[1])
    many = f64([[-5.]] * 20 + [[5.]] * 20) + .1 * f64(RNG.normal(size=(40, 1)))
    assert not any(split_and_merge(many, torch.full((40,), -1), torch.arange(40) // 20, p, random_state=s)[2] for s in range(20))


def test_rounds():
    X, t = make_blobs(150, centers=3, random_state=5)
    y = torch.as_tensor(np.where((t == 0) & (np.arange(150) % 2 == 0), 0, -1))
    p = niw_prior(f64(X), y)
    for now in itertools.islice(discovery_rounds(f64(X), y, torch.zeros(150, dtype=torch.int64), p, random_state=0), 12):
        m = moments(f64(X), F.one_hot(now.labels, now.n_components).double())
        assert (m.mass > 0).all() and now.log_posterior == pytest.approx(float(log_weight(p, m).sum()))
        assert (now.labels[y == 0] == 0).all()


# --- the estimator ----------------------------------------------------------------------------------------------------------

def data(seed=0, n=240, k=5, d=3):
    X, t = make_blobs(n, centers=k, n_features=d, random_state=seed, cluster_std=.7, center_box=(-12, 12))
    return X, t, np.where((t < 2) & (np.random.default_rng(seed).random(n) < .4), t + 7, -1)


def test_finds_the_classes_and_keeps_the_names():
    counts, right = [], []
    for seed in range(5):
        X, t, y = data(seed)
        m = SemiSupervisedGaussianMixture(random_state=seed).fit(X, y)
        assert m.classes_.tolist() == [7, 8] and (m.labels_[y == 7] == 0).all() and (m.labels_[y == 8] == 1).all()
        assert m.n_components_ == len(m.weights_) == len(m.means_) and m.weights_.sum() == pytest.approx(1) and m.n_iter_ == len(m.history_)
        np.testing.assert_array_equal(m.predict(X)[y < 0], m.labels_[y < 0]); np.testing.assert_allclose(m.predict_proba(X).sum(1), 1)
        counts.append(m.n_components_); right.append(cluster_accuracy(t, m.labels_))
    assert np.median(counts) == 5 and np.mean(right) > .95


def test_same_answer_for_arrays_tensors_dtypes_and_seeds():
    X, t, y = data(1)
    base = SemiSupervisedGaussianMixture(random_state=3).fit(X, y)
    tensor = SemiSupervisedGaussianMixture(random_state=3).fit(torch.tensor(X), torch.tensor(y))
    assert isinstance(tensor.means_, torch.Tensor) and isinstance(base.means_, np.ndarray)
    np.testing.assert_array_equal(tensor.labels_, base.labels_); np.testing.assert_allclose(tensor.means_, base.means_)
    np.testing.assert_array_equal(SemiSupervisedGaussianMixture(random_state=3).fit(X.astype(np.float32), y.astype(float)).labels_, base.labels_)
    again = pickle.loads(pickle.dumps(base)); np.testing.assert_array_equal(again.predict(X), base.predict(X))
    np.testing.assert_array_equal(clone(base).fit_predict(X, y), base.labels_)


def test_shift_and_scale_change_nothing():
    X, _, y = data(2)
    labels = [SemiSupervisedGaussianMixture(random_state=0, covariance_prior=c).fit(s * X + b, y).labels_ for s, b in ((1, 0), (8., 100.)) for c in ("labelled", .05)]
    np.testing.assert_array_equal(labels[0], labels[2]); np.testing.assert_array_equal(labels[1], labels[3])


def test_limits_of_labels():
    X, t, y = data(3)
    full = SemiSupervisedGaussianMixture(random_state=0).fit(X, t)
    np.testing.assert_array_equal(full.labels_, t)
    none = SemiSupervisedGaussianMixture(20, random_state=0, covariance_prior=.02).fit(X)
    assert len(none.classes_) == 0 and ari(t, none.labels_) > .9
    np.testing.assert_array_equal(SemiSupervisedGaussianMixture(20, random_state=0, covariance_prior=.02).fit(X, np.full(len(X), -1)).labels_, none.labels_)
    assert isinstance(none, GaussianMixture) and none.sample(5)[0].shape == (5, 3) and np.isfinite(none.score(X))


def test_the_prior_decides_the_number():
    X, _, y = data(4)
    K = [SemiSupervisedGaussianMixture(10, covariance_prior=c, random_state=0).fit(X, y).n_components_ for c in (.02, 30.)]
    assert K[0] >= 5 > K[1]
    exact = np.cov(X[y == 7].T)
    m = SemiSupervisedGaussianMixture(covariance_prior=exact, degrees_of_freedom_prior=9., random_state=0).fit(X, y)
    assert m.n_components_ >= 4
    np.testing.assert_allclose(niw_prior(f64(X), torch.full((240,), -1), f64(exact), nu=9.).scale, 5 * (exact + 1e-6 * X.var(0).mean() * np.eye(3)), rtol=1e-9)


@pytest.mark.parametrize("settings, text", [
    (dict(n_components_init=1), "n_components_init must be between 2"), (dict(n_components_init=2.5), "n_components_init"), (dict(max_iter=0), "max_iter"), (dict(patience=0), "patience"), (dict(em_steps=0), "em_steps"),
    (dict(concentration=0), "concentration must be positive"), (dict(mean_precision_prior=math.inf), "mean_precision_prior"), (dict(degrees_of_freedom_prior=2), "degrees_of_freedom_prior must be above 2"),
    (dict(covariance_prior="full"), "covariance_prior must be 'labelled'"), (dict(covariance_prior=0.), "covariance_prior must be positive"), (dict(covariance_prior=np.eye(2)), "covariance_prior must be symmetric"),
    (dict(covariance_prior=-np.eye(3)), "covariance_prior must be symmetric"), (dict(random_state=-1), "random_state")])
def test_bad_settings(settings, text):
    X, _, y = data()
    with pytest.raises(ValueError, match=text): SemiSupervisedGaussianMixture(**settings).fit(X, y)


def test_bad_data():
    X, _, y = data()
    with pytest.raises(ValueError, match="y must have shape"): SemiSupervisedGaussianMixture().fit(X, y[:-1])
    with pytest.raises(ValueError, match="at least -1"): SemiSupervisedGaussianMixture().fit(X, y - 1)
    with pytest.raises(ValueError, match="NaN|finite"): SemiSupervisedGaussianMixture().fit(np.where(X > 0, np.nan, X), y)
    assert SemiSupervisedGaussianMixture(random_state=0).fit(np.ones((30, 2)), [0] * 5 + [-1] * 25).n_components_ >= 1


def test_interruption_keeps_the_best(monkeypatch):
    X, _, y = data()
    rounds = module.discovery_rounds
    def stopped(*a):
        for t, now in enumerate(rounds(*a)):
            if t == 3: raise KeyboardInterrupt
            yield now
    monkeypatch.setattr(module, "discovery_rounds", stopped)
    m = SemiSupervisedGaussianMixture(random_state=0)
    with warnings.catch_warnings(record=True) as seen, pytest.raises(KeyboardInterrupt): m.fit(X, y)
    assert "interrupted" in str(seen[-1].message) and m.n_iter_ == 3 and m.log_posterior_ == max(h.log_posterior for h in m.history_) and len(m.predict(X)) == len(X)


# --- prototypes -------------------------------------------------------------------------------------------------------------

def test_losses_have_gradients():
    z1, z2 = (torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    assert torch.autograd.gradcheck(lambda a, b: supervised_contrast(a, b, labels, .5), (z1, z2))
    c, phi = F.normalize(torch.randn(3, 3, dtype=torch.float64), dim=1), torch.tensor([.2, .3, .4], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: prototype_contrast(F.normalize(a, dim=1), c, phi, labels), (z1,))
    want = -np.mean([float(torch.log_softmax(F.normalize(z1.detach(), dim=1)[i] @ c.T / phi, 0)[labels[i]]) for i in range(6)])
    assert float(prototype_contrast(F.normalize(z1, dim=1), c, phi, labels)) == pytest.approx(want)
    assert float(supervised_contrast(z1, z2, labels, .5)) == pytest.approx(float(supervised_contrast(3 * z1, .1 * z2, labels + 5, .5)))


def test_concentrations_order():
    "Wide components get a larger temperature than tight ones of the same size, large ones a smaller than small ones of the same width."
    c = F.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    labels = torch.tensor([0] * 50 + [1] * 50 + [2] * 50 + [3] * 5)
    noise = torch.tensor([.1] * 50 + [.3] * 50 + [.2] * 50 + [.2] * 5, dtype=torch.float64)[:, None]
    step = F.normalize(torch.randn(155, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=1)
    phi = concentrations(c[labels] + noise * step, c, labels, .5)
    assert phi[0] < phi[2] < phi[1] and phi[2] < phi[3] and float(phi.mean()) == pytest.approx(.5)


def test_prototypes_lie_in_the_projection():
    g = torch.Generator().manual_seed(0)
    middle = torch.randn(3, 20, generator=g) * 4
    t = torch.arange(90) % 3
    features = middle[t] + .3 * torch.randn(90, 20, generator=g)
    y = np.where((t.numpy() == 0) & (np.arange(90) < 45), 0, -1)
    found = find_prototypes(features, y, 2, random_state=0)
    q = found.project(features)
    assert cluster_accuracy(t.numpy(), found.labels.numpy()) > .95 and found.basis.shape == (20, 2) and q.shape == (90, 2)
    for j in range(len(found.centers)): assert float((q[found.labels == j].mean(0) / q[found.labels == j].mean(0).norm() - found.centers[j]).norm()) < .1
    with pytest.raises(ValueError, match="n_components"): find_prototypes(features, y, 21)


def test_learning_separates_what_is_named():
    torch.manual_seed(0)
    t = torch.arange(120) % 4
    x = torch.cat([F.one_hot(t, 4).float(), 3 * torch.randn(120, 12)], 1)                     # the class is hidden behind noise
    y = np.where((t.numpy() < 3) & (np.arange(120) < 90), t.numpy(), -1)
    net = torch.nn.Linear(16, 8)
    def gap(net):
        z = F.normalize(net(x), dim=1).detach(); same = t[:, None] == t
        return float((z @ z.T)[same].mean() - (z @ z.T)[~same].mean())
    before, weights = gap(net), net.weight.detach().clone()
    state = torch.get_rng_state()
    found = learn_categories(net, x, y, lambda v: torch.cat([v[:, :4], torch.randn_like(v[:, 4:]) * 3], 1), warmup=15, rounds=1, epochs=5, n_components=4, lr=.02, batch_size=30, device="cpu", progress=False)
    assert torch.equal(state, torch.get_rng_state()) and len(found) == 2 and gap(net) > before + .2 and not torch.equal(weights, net.weight)
    assert (found[-1].labels[torch.as_tensor(y) == 1] == 1).all()


@pytest.mark.parametrize("settings, text", [(dict(epochs=0), "epochs"), (dict(rounds=-1), "rounds"), (dict(supervised_weight=1.5), "supervised_weight must be at least 0 and at most 1"),
                                            (dict(prototype_weight=math.inf), "prototype_weight"), (dict(augment=3), "augment"), (dict(y=[0]), "y must have shape")])
def test_learning_bad_input(settings, text):
    given = dict(y=[-1] * 20, augment=torch.clone) | settings
    with pytest.raises(ValueError, match=text): learn_categories(torch.nn.Linear(4, 4), torch.randn(20, 4), warmup=0, device="cpu", progress=False, **given)
