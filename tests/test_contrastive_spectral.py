"""Contrastive losses and spectral embeddings: loops over every term, whole random graphs, scikit-learn, SciPy, the authors' formula, scikit-learn's own checks."""
import itertools
import math
import os
import signal
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import subspace_angles
from scipy.sparse.csgraph import laplacian as scipy_laplacian
from sklearn import cluster, manifold
from sklearn.datasets import make_blobs
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclustering.clustering import (SpectralClustering, clip_loss, contrastive_embedding, contrastive_spectral, contrastive_steps, contrastive_terms, info_nce,
                                       kernel_info_nce, laplacian, log_kernel, neighbor_graph, out_edges, principal_angles, spectral_embedding)
from deepclustering.core.metrics import ari

X, Y = make_blobs(120, 3, centers=3, random_state=0)


def draw(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
def weights(n, seed=0): return torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@parametrize_with_checks([SpectralClustering(device="cpu", n_init=2), SpectralClustering(3, embedding="contrastive", device="cpu", n_init=1, max_iter=10)])
def test_estimator_checks(estimator, check):
    check(estimator)


# --- kernel and losses, term by term ------------------------------------------------------------------------------------

def kernel_of(a, b, gamma, tau): return math.exp(-float((a - b).square().sum()) ** (gamma / 2) / tau)


@pytest.mark.parametrize("gamma", [2., 1., .5, 3.])
def test_kernel(gamma):
    x, y = draw(5, 4), draw(7, 4, seed=1) + 2
    want = [[kernel_of(a, b, gamma, .7) for b in y] for a in x]
    np.testing.assert_allclose(log_kernel(x, y, gamma, .7).exp(), want, rtol=1e-10)


@pytest.mark.parametrize("concat", [False, True])
def test_mixtures(concat):
    x, y = draw(5, 6), draw(4, 6, seed=1)
    gammas, taus = (2., 1., .5), (3., 1., 2.)
    part = lambda t, i: t[2 * i:2 * i + 2] if concat else t
    want = [[sum(kernel_of(part(a, i), part(b, i), *p) for i, p in enumerate(zip(gammas, taus))) for b in y] for a in x]
    np.testing.assert_allclose(log_kernel(x, y, gammas, taus, concat).exp(), want, rtol=1e-10)
    np.testing.assert_allclose(log_kernel(x, y, gammas, 1.5), log_kernel(x, y, gammas, (1.5,) * 3), rtol=1e-14)
    np.testing.assert_allclose(log_kernel(x, y, (2., 2.)), log_kernel(x, y) + math.log(2), rtol=1e-12)


def authors_loss(z1, z2, gamma, tau):
    "As the authors' program defines it, written as sums over pairs."
    z, n = torch.cat([z1, z2]), len(z1)
    each = []
    for i in range(2 * n):
        row = [kernel_of(z[i], z[j], gamma, tau) for j in range(2 * n) if j != i]
        each.append(-math.log(kernel_of(z[i], z[(i + n) % (2 * n)], gamma, tau) / sum(row)))
    return sum(each) / len(each)


@pytest.mark.parametrize("gamma, tau", [(2., .5), (1., .3), (.5, 1.)])
def test_kernel_info_nce(gamma, tau):
    z1, z2 = F.normalize(draw(5, 3), dim=1), F.normalize(draw(5, 3, seed=1), dim=1)
    assert float(kernel_info_nce(z1, z2, gamma, tau)) == pytest.approx(authors_loss(z1, z2, gamma, tau), rel=1e-10)
    assert float(kernel_info_nce(3 * z1, 7 * z2, gamma, tau)) == pytest.approx(float(kernel_info_nce(z1, z2, gamma, tau)), rel=1e-12)
    assert float(kernel_info_nce(3 * z1, 7 * z2, gamma, tau, normalize=False)) == pytest.approx(authors_loss(3 * z1, 7 * z2, gamma, tau), rel=1e-10)


def test_info_nce_and_clip_are_cosine_softmaxes():
    z1, z2 = draw(6, 4), draw(6, 4, seed=1)
    cosine = lambda a, b: float(a @ b / a.norm() / b.norm())
    z, total = torch.cat([z1, z2]), 0.
    for i in range(12):
        rest = [math.exp(cosine(z[i], z[j]) / .2) for j in range(12) if j != i]
        total -= cosine(z[i], z[(i + 6) % 12]) / .2 - math.log(sum(rest))
    assert float(info_nce(z1, z2, .2)) == pytest.approx(total / 12, rel=1e-10)
    S = torch.tensor([[cosine(a, b) for b in z2] for a in z1], dtype=torch.float64) / .2
    want = (-S.log_softmax(1).diagonal().mean() - S.log_softmax(0).diagonal().mean()) / 2
    assert float(clip_loss(z1, z2, temperature=.4)) == pytest.approx(float(want), rel=1e-10)
    assert float(clip_loss(z1, z2, temperature=.4)) == pytest.approx(float(clip_loss(z2, z1, temperature=.4)), rel=1e-12)


def test_symmetries():
    z1, z2, order, turn = draw(8, 4), draw(8, 4, seed=1), torch.randperm(8, generator=torch.Generator().manual_seed(2)), torch.linalg.qr(draw(4, 4, seed=3))[0]
    for loss in (info_nce, clip_loss, lambda a, b: kernel_info_nce(a, b, (2., 1.), (.5, .3))):
        same = float(loss(z1, z2))
        assert [float(loss(z2, z1)), float(loss(z1[order], z2[order])), float(loss(z1 @ turn, z2 @ turn))] == pytest.approx([same] * 3, rel=1e-12)
        assert float(loss(z1, z2[order])) != pytest.approx(same, rel=1e-6)


@pytest.mark.parametrize("loss", [info_nce, clip_loss, lambda a, b: kernel_info_nce(a, b, 1., .5), lambda a, b: kernel_info_nce(a, b, (2., .5), .5, concat=True)])
def test_gradcheck(loss):
    assert torch.autograd.gradcheck(loss, (draw(4, 4).requires_grad_(), draw(4, 4, seed=1).requires_grad_()))


def test_types_and_far_from_zero():
    z1, z2 = draw(16, 8), draw(16, 8, seed=1)
    exact = float(kernel_info_nce(z1, z2, 1., .5))
    assert float(kernel_info_nce(z1.float(), z2.float(), 1., .5)) == pytest.approx(exact, rel=1e-5)
    half = kernel_info_nce(z1.bfloat16(), z2.bfloat16(), 1., .5)
    assert half.dtype == torch.float32 and float(half) == pytest.approx(float(kernel_info_nce(z1.bfloat16().double(), z2.bfloat16().double(), 1., .5)), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16): assert float(kernel_info_nce(z1.float(), z2.float(), 1., .5)) == pytest.approx(exact, rel=1e-5)
    x, y = z1.float() + 1000, z2.float() + 1000
    np.testing.assert_allclose(log_kernel(x, y), log_kernel(x.double(), y.double()), rtol=1e-4)
    cold = kernel_info_nce(z1, z2, temperature=1e-6)
    assert math.isfinite(float(cold)) and float(cold) > 1e4
    assert torch.equal(z1, draw(16, 8))                                                    # nothing was changed in place


def test_no_nan_where_points_coincide():
    for gamma in (2., 1., .5):
        z1, z2 = torch.zeros(3, 2, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
        loss = kernel_info_nce(z1, z2, gamma, .5)
        loss.backward()
        assert float(loss) == pytest.approx(math.log(5), rel=1e-2 if gamma < 1 else 1e-3) and z1.grad.isfinite().all() and z2.grad.isfinite().all()


# --- two graphs ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bipartite", [False, True])
def test_cross_entropy_of_whole_graphs(seed, bipartite):
    n, z, graph = 4, draw(4, 2, seed=seed), weights(4, seed)
    allowed = ~torch.eye(n, dtype=torch.bool)
    if bipartite: allowed = (torch.arange(n) < 2)[:, None] != (torch.arange(n) < 2)
    def field(K):
        w = {to: math.prod(float(K[i, j]) for i, j in enumerate(to)) for to in itertools.product(range(n), repeat=n) if all(allowed[i, j] for i, j in enumerate(to))}
        return w, sum(w.values())
    (p, P), (q, R) = field(graph), field(log_kernel(z, z, 1., .6).exp())
    want = -sum(p[to] / P * math.log(q[to] / R) for to in p)
    terms = contrastive_terms(z, out_edges(graph, allowed), 1., .6, allowed=allowed)
    assert n * float(terms.loss) == pytest.approx(want, rel=1e-10)
    assert n * float(terms.repulsion) == pytest.approx(math.log(R), rel=1e-10)


def test_laplacian_is_scipys_and_the_attraction():
    for n in (2, 5, 30):
        graph, z = weights(n, n), draw(n, 3, seed=n)
        S = ((graph + graph.T) / 2).numpy()
        np.testing.assert_allclose(laplacian(graph), scipy_laplacian(S), atol=1e-12)
        P = out_edges(graph)
        want = sum(float(P[i, j]) * float((z[i] - z[j]).square().sum()) for i in range(n) for j in range(n)) / (n * .4)
        assert float(contrastive_terms(z, P, temperature=.4).attraction) == pytest.approx(want, rel=1e-10)
        assert 2 / (n * .4) * float((z.T @ laplacian(P) @ z).trace()) == pytest.approx(want, rel=1e-10)


def test_least_cross_entropy_is_the_entropy():
    "Where the kernel graph equals the similarity graph, and nowhere below (Gibbs)."
    z = draw(6, 3)
    P = out_edges(log_kernel(z, z).exp())
    entropy = -float((P * P.where(P > 0, 1).log()).sum(1).mean())
    assert float(contrastive_terms(z, P).loss) == pytest.approx(entropy, rel=1e-10)
    for seed in range(20): assert float(contrastive_terms(z + .3 * draw(6, 3, seed=seed), P).loss) > entropy
    found = contrastive_embedding(P, 3, normalize=False, random_state=1, max_iter=150)
    assert found.loss == pytest.approx(entropy, abs=1e-5)
    np.testing.assert_allclose(torch.cdist(found.z, found.z), torch.cdist(z, z), atol=.05)    # found again, up to a rotation


def test_out_edges():
    P = out_edges(torch.tensor([[9, 1, 3], [2, 9, 0], [5, 5, 9]]))
    np.testing.assert_allclose(P, [[0, .25, .75], [1, 0, 0], [.5, .5, 0]])


# --- eigenvectors -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm_laplacian", [True, False])
@pytest.mark.parametrize("drop_first", [True, False])
def test_spectral_embedding_is_scikit_learns(norm_laplacian, drop_first):
    for n, c in ((3, 2), (12, 4), (80, 5)):
        graph = weights(n, n).square(); graph = graph + graph.T
        theirs = manifold.spectral_embedding(graph.numpy(), n_components=c, norm_laplacian=norm_laplacian, drop_first=drop_first, eigen_solver="arpack", random_state=0) if n > 12 else None
        values, vectors = np.linalg.eigh(scipy_laplacian(graph.numpy(), normed=norm_laplacian))
        ours = spectral_embedding(graph, c, norm_laplacian, drop_first)
        root = graph.fill_diagonal_(0).sum(1).sqrt() if norm_laplacian else torch.ones(n)
        back = ours * root[:, None]
        np.testing.assert_allclose(np.abs(back), np.abs(vectors[:, drop_first:][:, :c]), atol=1e-8)
        if theirs is not None: np.testing.assert_allclose(ours, theirs, atol=1e-6)
        assert (ours.gather(0, ours.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_graph_in_pieces():
    graph = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4), torch.ones(2, 2))
    indicators = torch.block_diag(torch.ones(3, 1), torch.ones(4, 1), torch.ones(2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert principal_angles(spectral_embedding(graph, 3, drop_first=False), indicators).max() < 1e-5
    with pytest.warns(UserWarning, match="several pieces"): spectral_embedding(graph, 2)
    assert ari(np.repeat([0, 1, 2], [3, 4, 2]), SpectralClustering(3, affinity="precomputed", random_state=0).fit(graph.numpy()).labels_) == 1


@pytest.mark.parametrize("angle", [0., 1e-9, 1e-3, 1., np.pi / 2 - 1e-9, np.pi / 2])
def test_principal_angles_of_a_plane(angle):
    e = np.eye(4)
    tilted = np.stack([e[0], np.cos(angle) * e[1] + np.sin(angle) * e[2]], 1) @ [[2., 1.], [0., 3.]]
    np.testing.assert_allclose(principal_angles(e[:, :2], tilted), [np.degrees(angle), 0], rtol=1e-6, atol=1e-12)


def test_principal_angles_are_scipys():
    for seed, (n, c) in enumerate(((5, 1), (20, 4), (9, 9))):
        A, B = draw(n, c, seed=seed), draw(n, c, seed=seed + 9)
        np.testing.assert_allclose(principal_angles(A, B), np.degrees(subspace_angles(A.numpy(), B.numpy())), atol=1e-5)


def test_neighbor_graph():
    for n, k in ((2, 2), (30, 2), (120, 10)):
        x = draw(n, 3, seed=n)
        d = torch.cdist(x, x).fill_diagonal_(math.inf)
        near = [set(row.argsort()[:k - 1].tolist()) for row in d]
        want = [[((j in near[i]) + (i in near[j])) / 2 for j in range(n)] for i in range(n)]
        np.testing.assert_array_equal(neighbor_graph(x, k), want)
    same = neighbor_graph(torch.zeros(5, 2), 3)                                             # duplicates: never itself
    assert same.diagonal().sum() == 0 and same.sum() == 10


# --- the minimiser ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("normalize", [True, False])
def test_steps_fall_and_end_at_a_stationary_point(normalize):
    graph = neighbor_graph(torch.tensor(X[:60]), 8)
    seen = list(contrastive_steps(graph, 3, normalize=normalize, random_state=0, max_iter=200, tol=1e-4))
    losses = [s.loss for s in seen]
    assert all(b <= a + 1e-12 for a, b in zip(losses, losses[1:])) and seen[-1].n_iter == min(200, 10 * len(seen))
    z, P = seen[-1].z.clone().requires_grad_(), out_edges(graph)
    loss = contrastive_terms(F.normalize(z, dim=1) if normalize else z, P).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(losses[-1], rel=1e-12)
    if normalize: np.testing.assert_allclose(z.detach().norm(dim=1), 1, atol=1e-12)
    if normalize: assert float(z.grad.abs().max()) < 1e-5
    assert all(torch.equal(a.z, b.z) for a, b in zip(seen, contrastive_steps(graph, 3, normalize=normalize, random_state=0, max_iter=200, tol=1e-4)))


# --- the estimator ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("embedding", ["eigenvectors", "contrastive"])
def test_clusters(embedding):
    for seed in range(2):
        x, y = make_blobs(60, 4, centers=3, cluster_std=1.5, random_state=seed)
        model = SpectralClustering(3, embedding=embedding, random_state=seed, device="cpu", max_iter=50).fit(x)
        assert ari(y, model.labels_) > .9 and model.embedding_.shape == (60, 3)
        np.testing.assert_array_equal(model.labels_, SpectralClustering(3, embedding=embedding, affinity="precomputed", random_state=seed, device="cpu", max_iter=50).fit(model.affinity_matrix_).labels_)


def test_clusters_are_scikit_learns():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        angle, side = rng.uniform(0, 2 * np.pi, 200), np.repeat([1., 2.], 100)               # two rings: k-means alone would cut them
        rings = np.c_[side * np.cos(angle), side * np.sin(angle)] + .03 * rng.normal(size=(200, 2))
        ours = SpectralClustering(2, n_neighbors=12, random_state=seed, device="cpu").fit(rings)
        theirs = cluster.SpectralClustering(2, affinity="nearest_neighbors", n_neighbors=12, random_state=seed).fit(rings)
        theirs_graph = theirs.affinity_matrix_.toarray(); np.fill_diagonal(theirs_graph, 0)
        np.testing.assert_array_equal(ours.affinity_matrix_, theirs_graph)
        assert ari(theirs.labels_, ours.labels_) == 1 and ari(side.astype(int), ours.labels_) == 1


def test_tensors_in_tensors_out():
    a, b = SpectralClustering(3, random_state=0).fit(X), SpectralClustering(3, random_state=0).fit(torch.tensor(X))
    assert all(isinstance(getattr(b, name), torch.Tensor) for name in ("labels_", "affinity_matrix_", "embedding_"))
    np.testing.assert_array_equal(a.labels_, b.labels_)


def test_a_directed_graph_is_made_symmetric():
    graph = weights(20).numpy()
    model = SpectralClustering(2, affinity="precomputed", random_state=0).fit(graph)
    np.testing.assert_allclose(model.affinity_matrix_, (graph + graph.T) / 2)


def test_interrupted(monkeypatch):
    plain, calls = contrastive_terms, []

    def terms(*args, **kwargs):
        calls.append(1)
        if len(calls) == 40: os.kill(os.getpid(), signal.SIGINT)
        return plain(*args, **kwargs)
    monkeypatch.setattr(contrastive_spectral, "contrastive_terms", terms)
    model = SpectralClustering(3, embedding="contrastive", random_state=0, device="cpu", max_iter=1000, temperature=.05)
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): model.fit(X)
    assert model.labels_.shape == (120,) and 10 <= model.n_iter_ < 40


# --- bad input ----------------------------------------------------------------------------------------------------------

Z = draw(4, 2)


@pytest.mark.parametrize("call, message", [
    (lambda: log_kernel([[0.]], Z), "x must be a tensor"), (lambda: log_kernel(Z, Z[0]), "y must be a tensor"), (lambda: log_kernel(Z.long(), Z), "x must be a tensor"), (lambda: log_kernel(Z, Z[:, :1]), "width of x"),
    (lambda: log_kernel(draw(4, 3), draw(4, 3), (2., 1.), concat=True), "multiple of 2"), (lambda: log_kernel(Z, Z, 0.), "gamma must be a positive"), (lambda: log_kernel(Z, Z, True), "gamma must be a positive"), (lambda: log_kernel(Z, Z, 2., -1), "temperature must be a positive"),
    (lambda: log_kernel(Z, Z, 2., math.inf), "temperature must be a positive"), (lambda: log_kernel(Z, Z, 2., math.nan), "temperature must be a positive"), (lambda: log_kernel(Z, Z, (2., 1.), (1.,)), "of one length"), (lambda: log_kernel(Z, Z, ()), "of one length"),
    (lambda: kernel_info_nce(Z, Z[:2]), "z1 and z2 must have one shape"), (lambda: info_nce(Z[:1], Z[:1]), "n of at least 2"), (lambda: clip_loss(Z[:1], Z[:1]), "n of at least 2"), (lambda: info_nce(Z, Z, 0), "temperature must be"),
    (lambda: out_edges(torch.ones(2, 3)), "graph must be"), (lambda: out_edges(-torch.ones(2, 2)), "graph must be"), (lambda: out_edges(torch.full((2, 2), math.nan)), "graph must be finite"), (lambda: out_edges(torch.eye(3)), "node 0 has none"),
    (lambda: out_edges(torch.ones(3, 3), torch.ones(3, 3)), "allowed must be booleans"), (lambda: contrastive_terms(Z, torch.ones(3, 3)), "P must be"), (lambda: spectral_embedding(weights(4), 4), "dim must be"), (lambda: spectral_embedding(weights(4), 0), "dim must be"),
    (lambda: principal_angles(Z, Z[:, :1]), "one shape"), (lambda: neighbor_graph(Z, 1), "n_neighbors must be"), (lambda: neighbor_graph(Z, 5), "n_neighbors must be"), (lambda: contrastive_embedding(weights(4), 0), "dim must be"), (lambda: contrastive_embedding(weights(4), 2, max_iter=0), "max_iter must be")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize("kwargs, message", [
    (dict(n_clusters=0), "n_clusters"), (dict(n_clusters=121), "n_clusters"), (dict(affinity="rbf"), "affinity must be"), (dict(embedding="umap"), "embedding must be"), (dict(n_neighbors=1), "n_neighbors"), (dict(n_components=0), "n_components"),
    (dict(n_init=0), "n_init"), (dict(affinity="precomputed"), "X must be"), (dict(embedding="contrastive", temperature=0), "temperature"), (dict(embedding="contrastive", max_iter=0), "max_iter"), (dict(device="nowhere"), "device")])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message): SpectralClustering(**kwargs).fit(X)
