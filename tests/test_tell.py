"""`KMeansLayer` and `TELL`: scikit-learn's own checks, Lloyd and mini-batch k-means step for step, the authors' recipe, files, interruptions."""
import os
import signal
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from deepclustering.clustering import TELL, KMeans, KMeansLayer, MiniBatchKMeans, center_step, clustering_loss, minibatch_update
from deepclustering.core.assign import nearest
from deepclustering.core.lloyd import kmeans
from deepclustering.core.models import MLPAutoencoder

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(240, 5)) + 6 * RNG.normal(size=(4, 5))[RNG.integers(0, 4, 240)]
QUICK = dict(device="cpu", progress=False, max_iter=5)


def points(n, d, seed, scale=1., dtype=torch.float64): return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@parametrize_with_checks([TELL(device="cpu", max_iter=10), TELL(3, normalize=False, rule="sgd", lr=0.3, device="cpu", max_iter=10)])
def test_estimator_checks(estimator, check):
    check(estimator)


# --- k-means, step for step -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, k, d", [(5, 2, 1), (300, 40, 3), (257, 1, 7), (64, 64, 2)])
def test_lloyd(n, k, d):
    for seed in range(3):
        x, start = points(n, d, seed), points(k, d, seed + 50, 2.)
        for steps in (1, 2, 7):
            layer = KMeansLayer(start)
            for _ in range(steps): center_step(layer, x, "lloyd")
            want = kmeans(x, start, max_iter=steps, tol=-1., empty="keep")  # it may stop before, at a fixed point
            assert (layer.centers - want.centers).abs().max() < 1e-12


@pytest.mark.parametrize("size", [1, 7, 64])
def test_macqueen_and_sculley(size):
    for seed in range(3):
        x, c = points(200, 4, seed), points(6, 4, seed + 50)
        layer, counts, N = KMeansLayer(c), torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        for batch in x.split(size):
            c, N = minibatch_update(c, N, batch, nearest(batch, c))
            center_step(layer, batch, "counts", counts=counts)
            assert (layer.centers - c).abs().max() < 1e-12 and torch.equal(counts, N)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_stream_is_mini_batch_k_means(normalize):
    start = X[:6] / np.linalg.norm(X[:6], axis=1, keepdims=True) if normalize else X[:6]
    ours, theirs = TELL(6, normalize=normalize, init=start), MiniBatchKMeans(6, init=start, metric="cosine" if normalize else "euclidean", reassignment_ratio=0)
    for part in np.array_split(X, 11):
        ours.partial_fit(part); theirs.partial_fit(part)
        np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-12)
        np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    assert ours.n_iter_ == 11 and len(ours.history_.records) == 11


def test_one_epoch_of_one_batch_is_lloyd_s_step():
    ours = TELL(5, normalize=False, init=X[:5], batch_size=len(X), **{**QUICK, "max_iter": 1}).fit(X)
    want = kmeans(torch.tensor(X), torch.tensor(X[:5]), max_iter=1, empty="keep")
    np.testing.assert_allclose(ours.cluster_centers_, want.centers, atol=1e-12)
    assert ours.inertia_ == pytest.approx(float(want.inertia), rel=1e-12)


def test_fit_takes_the_steps_of_center_step():
    for rule in ("counts", "sgd", "direction"):
        fitted = TELL(5, rule=rule, init=X[:5], batch_size=len(X), **QUICK).fit(X)   # one batch an epoch: its order changes sums by rounding alone
        x, counts = F.normalize(torch.tensor(X), dim=1), torch.zeros(5, dtype=torch.float64)
        layer = KMeansLayer(F.normalize(torch.tensor(X[:5]), dim=1), tied=rule != "direction")
        seen = [float(center_step(layer, x, rule, 0.1, counts, unit=True)) for _ in range(5)]
        np.testing.assert_allclose(fitted.cluster_centers_, layer.centers.detach(), atol=1e-12)
        np.testing.assert_allclose(fitted.history_.column("distance"), seen, atol=1e-12)


# --- gradients --------------------------------------------------------------------------------------------------------------

def test_gradient_by_hand_and_by_differences():
    x, mu, r = points(60, 4, 0), points(5, 4, 1), torch.rand(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layer, labels = KMeansLayer(mu), nearest(x, mu)
    got, = torch.autograd.grad(clustering_loss(layer, x, rates=r), layer.centers)
    want = torch.stack([2 * r[j] * (mu[j] - x[labels == j]).sum(0) for j in range(5)])
    assert (got - want).abs().max() < 1e-12
    for j, f in ((0, 0), (3, 2)):
        ahead, behind = mu.clone(), mu.clone()
        ahead[j, f] += 1e-6; behind[j, f] -= 1e-6
        slope = (clustering_loss(KMeansLayer(ahead), x, rates=r) - clustering_loss(KMeansLayer(behind), x, rates=r)) / 2e-6
        assert float((slope - want[j, f]).detach().abs()) < 1e-7


def test_untied_is_the_gradient_without_the_bias():
    x, mu = F.normalize(points(60, 4, 0), dim=1), F.normalize(points(5, 4, 1), dim=1)
    tied, untied = KMeansLayer(mu), KMeansLayer(mu, tied=False)
    assert torch.equal(tied(x), untied(x)) and torch.allclose(tied.own_distances(x, tied.labels(x)), untied.own_distances(x, untied.labels(x)), atol=1e-14)
    got, = torch.autograd.grad(clustering_loss(untied, x, rates=torch.ones(5)), untied.centers)
    want = torch.stack([-2 * x[nearest(x, mu) == j].sum(0) for j in range(5)])
    assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("tau", [0.05, 1., 30.])
def test_soft_labels(tau):
    x, mu = points(40, 3, 0), points(4, 3, 1)
    layer = KMeansLayer(mu)
    want = torch.softmax(-torch.cdist(x, mu).square() / tau, 1)
    assert (layer.soft(x, tau) - want).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda c: torch.func.functional_call(layer, {"centers": c}, x).div(tau).softmax(1), mu.clone().requires_grad_())


def test_labels_keep_their_digits_far_from_zero():
    x, mu = points(300, 6, 0, dtype=torch.float32) + 1e4, points(5, 6, 1, dtype=torch.float32) + 1e4
    assert torch.equal(KMeansLayer(mu).labels(x), torch.cdist(x.double(), mu.double()).argmin(1))


# --- the paper's recipe -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_direction_is_the_authors_recipe(seed):
    alpha, x = 0.001, F.normalize(points(1500, 8, seed, dtype=torch.float32) + 1, dim=1)
    W = nn.Parameter(2 * alpha * F.normalize(points(5, 8, seed + 50, dtype=torch.float32), dim=1))
    ours, optimizer = KMeansLayer(W.detach() / (2 * alpha), tied=False), torch.optim.Adadelta([W])
    for batch in x.split(50):
        own = (batch @ W.T).max(1).values
        optimizer.zero_grad(); (-0.01 / alpha * own.sum() / (50 * 5)).backward()
        W.grad = F.normalize(W.grad, dim=1) * 0.2 * alpha
        optimizer.step()
        with torch.no_grad(): W.copy_(F.normalize(W, dim=1) * 2 * alpha)
        center_step(ours, batch, "direction", 0.1, unit=True)
    assert (W / (2 * alpha) - ours.centers).abs().max() < 0.01


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLPAutoencoder(5, (16, 3))


def test_joint_epochs_alternate():
    def after(epochs, weight):
        fitted = TELL(4, encoder=net(), cluster_weight=weight, random_state=0, **{**QUICK, "max_iter": epochs}).fit(X)
        return fitted.cluster_centers_, torch.cat([p.flatten() for p in fitted.encoder_.parameters()])
    centers = [after(t, 1.)[0] for t in (1, 2, 3)]
    assert np.array_equal(centers[0], centers[1]) and not np.array_equal(centers[1], centers[2])
    assert torch.equal(after(1, 0)[1], after(1, 5.)[1]) and not torch.equal(after(2, 0)[1], after(2, 5.)[1])


def test_joint_fit():
    encoder = net()
    before = [p.clone() for p in encoder.parameters()]
    a, b = (TELL(4, encoder=encoder, random_state=3, **QUICK).fit(X) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(encoder.parameters(), before))
    assert np.array_equal(a.cluster_centers_, b.cluster_centers_) and a.history_ == b.history_
    z = a.embed(X)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5); np.testing.assert_allclose(np.linalg.norm(a.cluster_centers_, axis=1), 1, atol=1e-5)
    far = ((z[:, None] - a.cluster_centers_) ** 2).sum(2)
    assert a.inertia_ == pytest.approx(far.min(1).sum(), rel=1e-4) and np.array_equal(a.labels_, a.predict(X))
    np.testing.assert_allclose(a.transform(X), np.sqrt(far), atol=1e-5)
    assert a.prototypes().shape == (4, 5) and a.history_.column("reconstruction")[-1] < a.history_.column("reconstruction")[0]


# --- the contract -----------------------------------------------------------------------------------------------------------

def test_finds_what_k_means_finds():
    for seed in range(3):
        start = X[np.random.default_rng(seed).choice(len(X), 4, replace=False)]
        ours, theirs = TELL(4, init=start, normalize=False, device="cpu", progress=False).fit(X), KMeans(4, init=start).fit(X)
        assert ours.inertia_ < 1.1 * theirs.inertia_


def test_tensors_and_types():
    for dtype in (np.float32, np.float64):
        a, t = TELL(4, random_state=0, **QUICK).fit(X.astype(dtype)), TELL(4, random_state=0, **QUICK).fit(torch.tensor(X.astype(dtype)))
        assert a.cluster_centers_.dtype == dtype and isinstance(t.labels_, torch.Tensor)
        np.testing.assert_array_equal(a.cluster_centers_, t.cluster_centers_.numpy())
    assert isinstance(t.transform(torch.tensor(X)), torch.Tensor)


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(5, 3), nn.Linear(3, 5)

    def encode(self, x): return self.f(x)
    def decode(self, z): return self.g(z)


@pytest.mark.parametrize("encoder", [None, net(), Foreign()])
def test_save_and_load(tmp_path, encoder):
    path = tmp_path / "t.safetensors"
    a = TELL(4, encoder=encoder, init="random", random_state=torch.Generator().manual_seed(0), **QUICK).fit(X)
    a.save(path)
    if isinstance(encoder, Foreign):
        with pytest.raises(ValueError, match="encoder must be given"): TELL.load(path)
        with pytest.raises(ValueError, match="does not fit"): TELL.load(path, net())
        b = TELL.load(path, Foreign())
    else: b = TELL.load(path)
    assert np.array_equal(a.predict(X), b.predict(X)) and np.array_equal(a.embed(X), b.embed(X)) and a.history_ == b.history_ and a.inertia_ == b.inertia_
    assert b.get_params(False)["init"] == "random" and b.labels_.dtype == a.labels_.dtype
    assert clone(b).n_clusters == 4
    if encoder is None: np.testing.assert_array_equal(a.partial_fit(X[:50]).cluster_centers_, b.partial_fit(X[:50]).cluster_centers_)


def test_load_refuses_another_file(tmp_path):
    from deepclustering.core.models import save_model
    save_model(tmp_path / "m.safetensors", net())
    with pytest.raises(ValueError, match="TELL.save"): TELL.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("encoder", [None, net()])
def test_interrupted(encoder, monkeypatch):
    from deepclustering.clustering import tell
    plain, calls = KMeansLayer.labels, []

    def labels(self, x):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, x)
    monkeypatch.setattr(tell.KMeansLayer, "labels", labels)
    model = TELL(4, encoder=encoder, random_state=0, device="cpu", progress=False, max_iter=50)
    with pytest.warns(UserWarning), pytest.raises(KeyboardInterrupt): model.fit(X)
    assert model.n_iter_ == 3 and model.labels_.shape == (240,) and model.history_.stopped == "interrupted"


def test_a_dead_centre_is_reported_and_stays():
    start = np.r_[X[:3], [[-1e3] * 5]]
    with pytest.warns(ConvergenceWarning, match="1 of 4 centres have no point"):
        fitted = TELL(4, init=start, normalize=False, **QUICK).fit(X)
    np.testing.assert_array_equal(fitted.cluster_centers_[3], start[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TELL(4, init=start, normalize=False).partial_fit(X[:20])


@pytest.mark.parametrize("kwargs, message", [
    (dict(n_clusters=0), "n_clusters"), (dict(n_clusters=241), "n_clusters"), (dict(rule="lloyd"), "rule must be"), (dict(rule="direction", normalize=False), "rule='direction'"),
    (dict(lr=0), "lr must be"), (dict(lr=float("nan")), "lr must be"), (dict(lr=True), "lr must be"), (dict(cluster_weight=-1.), "cluster_weight"), (dict(cluster_weight=np.inf), "cluster_weight"),
    (dict(batch_size=0), "batch_size"), (dict(max_iter=0), "max_iter"), (dict(init="best"), "init"), (dict(init=np.zeros((2, 2))), "init must have shape"), (dict(encoder=nn.Linear(5, 2)), "encoder must be a module"),
    (dict(encoder=net(), normalize=False), "encoder needs"), (dict(device="nowhere"), "device")])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message): TELL(**{**QUICK, **kwargs}).fit(X)


def test_bad_rows():
    with pytest.warns(UserWarning, match="row of zeros"): TELL(2, **QUICK).fit(np.eye(5)[:, :4])
    with pytest.raises(ValueError, match="NaN"): TELL(2, **QUICK).fit(np.full((4, 2), np.nan))
    fitted = TELL(2, **QUICK).fit(X)
    with pytest.warns(UserWarning, match="row of zeros"): fitted.predict(np.zeros((1, 5)))
    with pytest.raises(ValueError, match="features"): fitted.predict(X[:, :4])
    with pytest.raises(ValueError, match="encoder must be None"): TELL(2, encoder=net()).partial_fit(X)
    with pytest.raises(ValueError, match="centers"): KMeansLayer(torch.zeros(3))
