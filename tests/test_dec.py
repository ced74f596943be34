"""DEC, IDEC and DCN: whole fits against loops written by hand, the stopping rule, limit cases, files, interruptions, scikit-learn's own checks."""
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.utils.estimator_checks import check_methods_subset_invariance, parametrize_with_checks
from torch import nn

from deepclustering.clustering.autoencoder import AutoencoderKMeans
from deepclustering.clustering.dec import DCN, DEC, IDEC, divergence, target_distribution
from deepclustering.core.metrics import ari
from deepclustering.core.models import ConvAutoencoder, MLPAutoencoder
from deepclustering.tool.cluster import find_clusterer, make_clusterer

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X, Y = make_blobs(150, 6, centers=4, cluster_std=2., random_state=0)
KINDS = [DEC, IDEC, DCN]
QUICK = dict(widths=(8, 3), pretrain_epochs=3, batch_size=64, n_init=2, update_interval=3, max_iter=9, device="cpu", random_state=0, progress=False)
FLOAT32 = {"check_methods_subset_invariance": "the network computes in float32, whose sums depend on the size of the batch"}


def network(seed=0):
    "In float64, which the estimators keep."
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return MLPAutoencoder(6, (5, 2)).double()


def onwards(kind, steps=6, **keywords):
    "Fitted from `network()` with whole batches: the order of the rows cannot matter."
    return kind(4, **{**QUICK, "encoder": network(), "pretrain": "none", "batch_size": 1000, "max_iter": steps, "tol": 0, "cluster_lr": 1e-2, **keywords}).fit(X)


def the_start():
    "Scaled rows, a fresh network, and the centres that k-means finds for its codes."
    start = AutoencoderKMeans(4, encoder=network(), pretrain="none", n_init=2, device="cpu", random_state=0, progress=False).fit(X)
    return torch.tensor(X) / torch.tensor(X).square().mean().sqrt(), network(), torch.tensor(start.cluster_centers_)


@parametrize_with_checks([kind(widths=(4, 2), pretrain="end-to-end", pretrain_epochs=1, max_iter=2, n_init=1, device="cpu") for kind in KINDS], expected_failed_checks=lambda estimator: FLOAT32)
def test_estimator_checks(estimator, check):
    check(estimator)


# --- the target -------------------------------------------------------------------------------------------------------------

def memberships(n, k, seed): return np.random.default_rng(seed).dirichlet(np.full(k, .5), n)


@pytest.mark.parametrize("n, k", [(1, 1), (1, 4), (30, 2), (200, 7)])
def test_target_by_numpy(n, k):
    for seed in range(3):
        q = memberships(n, k, seed)
        p = np.empty_like(q)
        for i in range(n):
            top = [q[i, j] ** 2 / q[:, j].sum() for j in range(k)]
            p[i] = np.array(top) / sum(top)
        got = target_distribution(torch.tensor(q))
        np.testing.assert_allclose(got, p, rtol=1e-12, atol=1e-300)
        np.testing.assert_allclose(float(divergence(got, torch.tensor(q))), (p * np.log(p / q)).sum() / n, rtol=1e-10, atol=1e-15)
        np.testing.assert_allclose(target_distribution(torch.tensor(q, dtype=torch.float32)), p, rtol=2e-5, atol=1e-12)


def test_properties_of_the_target():
    q = torch.tensor(memberships(60, 5, 0))
    p, order = target_distribution(q), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(target_distribution(q[order]), p[order])                                # rows in any order
    torch.testing.assert_close(target_distribution(q[:, [2, 0, 1, 4, 3]]), p[:, [2, 0, 1, 4, 3]])      # clusters in any order
    torch.testing.assert_close(target_distribution(q.repeat(3, 1)), p.repeat(3, 1))                    # rows repeated
    assert float(divergence(p, q)) > 0 and float(divergence(q, q)) == 0
    balanced = torch.cat([q.roll(s, 1) for s in range(5)])                                            # all clusters alike: every lead widens
    assert (target_distribution(balanced).amax(1) >= balanced.amax(1)).all()
    few = torch.tensor([[.6, .4], [.4, .6], [.2, .8]], dtype=torch.float64)
    assert target_distribution(few)[0, 0] - .6 > target_distribution(few)[1, 1] - .6                   # the smaller cluster is favoured


@pytest.mark.parametrize("q, message", [([[.5, -.5]], "q must be memberships"), ([[0., 0.], [1., 0.]], "q must be memberships"), ([[float("nan"), 1.]], "q must be finite"), ([.5, .5], "q must have 2 dimensions")])
def test_bad_memberships(q, message):
    with pytest.raises(ValueError, match=message): target_distribution(torch.tensor(q))


# --- whole fits against loops -----------------------------------------------------------------------------------------------

class Adam:
    "Kingma and Ba, 2015, algorithm 1."
    def __init__(self, lr): self.lr, self.m, self.v, self.t = lr, {}, {}, 0

    def step(self, tensors, gradients):
        self.t += 1
        for i, (w, g) in enumerate(zip(tensors, gradients)):
            self.m[i] = .9 * self.m.get(i, 0) + .1 * g
            self.v[i] = .999 * self.v.get(i, 0) + .001 * g**2
            w -= self.lr * (self.m[i] / (1 - .9**self.t)) / ((self.v[i] / (1 - .999**self.t)).sqrt() + 1e-8)


def soft(z, c, alpha):
    kernel = (1 + ((z[:, None] - c)**2).sum(2) / alpha) ** (-(alpha + 1) / 2)
    return kernel / kernel.sum(1, keepdim=True)


@pytest.mark.parametrize("alpha, gamma", [(1., None), (3., None), (1., .1), (.5, 2.)])
def test_dec_and_idec_step_for_step(alpha, gamma):
    "The clustering gradient by the closed form of the paper, handed on to the weights as the derivative of the codes."
    fitted = onwards(DEC, alpha=alpha) if gamma is None else onwards(IDEC, alpha=alpha, gamma=gamma)
    x, net, c = the_start()
    weights, adam, n = list(net.encoder.parameters()) + ([] if gamma is None else list(net.decoder.parameters())), Adam(1e-2), len(X)
    for step in range(6):
        z = net.encode(x)
        q = soft(z.detach(), c, alpha)
        if step % 3 == 0:
            p = q**2 / q.sum(0)
            p = p / p.sum(1, keepdim=True)
        diff = z.detach()[:, None] - c
        pull = (alpha + 1) / alpha * ((p - q) / (1 + (diff**2).sum(2) / alpha))[..., None] * diff / n * (1 if gamma is None else gamma)
        for w in weights: w.grad = None
        z.backward(pull.sum(1), retain_graph=True)
        if gamma is not None: ((net.decode(z) - x)**2).mean().backward()
        with torch.no_grad(): adam.step([*weights, c], [*(w.grad for w in weights), -pull.sum(0)])
    np.testing.assert_allclose(fitted.cluster_centers_, c, atol=1e-8)
    np.testing.assert_allclose(fitted.embedding_, net.encode(x).detach(), atol=1e-8)
    np.testing.assert_allclose(fitted.predict_proba(X), soft(net.encode(x).detach(), c, alpha), atol=1e-8)
    if gamma is None:                                                                               # nobody needs the decoder
        assert all(torch.equal(a, b) for a, b in zip(fitted.encoder_.decoder.parameters(), network().decoder.parameters()))


@pytest.mark.parametrize("lam", [0., 2., 50.])
def test_dcn_step_for_step(lam):
    "Centres by one code after the other."
    fitted = onwards(DCN, lam=lam)
    x, net, c = the_start()
    c, counts, optimizer = c.numpy().copy(), np.full(4, 100), torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(6):
        z = net.encode(x)
        a = ((z.detach().numpy()[:, None] - c)**2).sum(2).argmin(1)
        loss = (((net.decode(z) - x)**2).sum(1) + lam / 2 * ((z - torch.tensor(c[a]))**2).sum(1)).mean()
        optimizer.zero_grad(); loss.backward()
        for code, j in zip(z.detach().numpy(), a):
            counts[j] += 1
            c[j] -= (c[j] - code) / counts[j]
        optimizer.step()
    np.testing.assert_allclose(fitted.cluster_centers_, c, atol=1e-8)
    np.testing.assert_allclose(fitted.embedding_, net.encode(x).detach(), atol=1e-8)


def test_gamma_zero_is_the_autoencoder():
    fitted = onwards(IDEC, gamma=0)
    x, net, c = the_start()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(6):
        optimizer.zero_grad(); ((net(x) - x)**2).mean().backward(); optimizer.step()
    np.testing.assert_allclose(fitted.embedding_, net.encode(x).detach(), atol=1e-9)
    np.testing.assert_array_equal(fitted.cluster_centers_, c)


def test_without_a_network_dec_moves_the_centres():
    "An encoder without weights: codes are the rows."
    fitted = DEC(4, **{**QUICK, "encoder": nn.Identity(), "pretrain": "none", "batch_size": 1000, "max_iter": 200, "cluster_lr": .05, "tol": 0}).fit(X)
    np.testing.assert_allclose(fitted.embedding_, X * fitted.scale_, rtol=1e-5)
    z, c = torch.tensor(fitted.embedding_), torch.tensor(fitted.cluster_centers_)
    q = soft(z, c, 1.)
    pull = ((target_distribution(q) - q) / (1 + torch.cdist(z, c)**2))[..., None] * (z[:, None] - c)
    assert pull.sum(0).norm(dim=1).max() < .05 * pull.norm(dim=2).sum(0).min()                          # at rest: pulls cancel
    assert ari(Y, fitted.labels_) > .9


@pytest.mark.parametrize("kind", KINDS)
def test_stopping(kind):
    "By `tol` at the first look where fewer than that share moved, else by `max_iter`, however it divides."
    model = kind(4, **{**QUICK, "tol": .02, "max_iter": 400, "cluster_lr": 3e-3}).fit(X)
    turns = [r for r in model.history_ if r["phase"] == "clusters"]
    assert turns[-1]["moved"] < .02 and all(r["moved"] >= .02 for r in turns[:-1]) and model.n_iter_ == turns[-1]["step"] < 400
    assert kind(4, **{**QUICK, "tol": 0, "max_iter": 10}).fit(X).n_iter_ == 10


@pytest.mark.parametrize("kind", KINDS)
def test_finds_blobs_and_starts_where_k_means_ends(kind):
    blobs, labels = make_blobs(200, 6, centers=4, cluster_std=.5, random_state=1)
    start = AutoencoderKMeans(4, **{k: v for k, v in QUICK.items() if k not in ("update_interval", "max_iter")}).fit(blobs)
    still = kind(4, **{**QUICK, "cluster_lr": 1e-12, "max_iter": 3}).fit(blobs)
    np.testing.assert_array_equal(still.labels_, start.labels_)
    np.testing.assert_allclose(still.cluster_centers_, start.cluster_centers_, atol=1e-2 if kind is DCN else 1e-4)   # DCN's follow the counts of the batches
    assert ari(labels, kind(4, **{**QUICK, "pretrain_epochs": 30, "n_init": 10}).fit(blobs).labels_) > .95


class Still(nn.Module):
    "Codes are the rows."
    def encode(self, x): return x
    def decode(self, z): return z


@pytest.mark.parametrize("kind", KINDS)
def test_batches_change_nothing_in_float64(kind):
    "scikit-learn's own check, which the estimators are let off in float32."
    torch.manual_seed(0)
    check_methods_subset_invariance(kind.__name__, kind(3, encoder=MLPAutoencoder(3, (4, 2)).double(), pretrain="end-to-end", pretrain_epochs=1, max_iter=2, n_init=1, device="cpu"))


# --- the contract -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_bits(kind):
    state = torch.get_rng_state()
    a, b, other = kind(4, **QUICK).fit(X), clone(kind(4, **QUICK)).fit(X), kind(4, **{**QUICK, "random_state": 1}).fit(X)
    assert np.array_equal(a.embedding_, b.embedding_) and np.array_equal(a.cluster_centers_, b.cluster_centers_) and not np.array_equal(a.embedding_, other.embedding_)
    assert torch.equal(state, torch.get_rng_state()) and np.array_equal(a.labels_, a.predict(X)) and a.report_.active >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_types(kind, tmp_path):
    for data in (X.astype(np.float32), torch.tensor(X)):
        model = kind(4, **QUICK, **({"gamma": .3} if kind is IDEC else {"lam": .7} if kind is DCN else {"alpha": 2.})).fit(data)
        model.save(tmp_path / "m.safetensors")
        back = kind.load(tmp_path / "m.safetensors")
        assert back.get_params() == model.get_params() and isinstance(back.labels_, type(model.labels_)) and bool((back.predict(data) == model.predict(data)).all())
        if kind is DCN: assert not hasattr(model, "predict_proba"); continue
        q = back.predict_proba(data)
        assert type(q) is type(data) and q.dtype == data.dtype and q.shape == (len(X), 4) and bool((q == model.predict_proba(data)).all())
        np.testing.assert_array_equal(np.asarray(q).argmax(1), np.asarray(model.labels_))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures(kind):
    images = np.random.default_rng(0).random((40, 64), dtype=np.float32)
    model = kind(3, **QUICK, encoder=ConvAutoencoder((1, 8, 8), (4, 8), 3)).fit(images)
    assert model.embedding_.shape == (40, 3) and model.history_[-1]["phase"] == "clusters"


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_command_line(kind):
    assert find_clusterer(kind.__name__.lower()) is kind and make_clusterer(kind, 5, device="cpu").get_params()["n_clusters"] == 5


@pytest.mark.parametrize("kind", KINDS)
def test_interrupt(kind):
    class Stopped(kind):
        calls = 0

        def _loss(self, module, batch):
            Stopped.calls += 1
            if Stopped.calls == 5: os.kill(os.getpid(), signal.SIGINT)
            return super()._loss(module, batch)
    model = Stopped(4, **{**QUICK, "tol": 0.})
    with warnings.catch_warnings(record=True) as said, pytest.raises(KeyboardInterrupt):
        warnings.simplefilter("always")
        model.fit(X)
    assert any("Stopped was interrupted" in str(w.message) for w in said) and model.n_iter_ == 3 and np.array_equal(model.predict(X), model.labels_)


@pytest.mark.parametrize("kind, keywords, message", [
    (DEC, dict(alpha=0), "alpha must be a positive number, got 0"), (IDEC, dict(alpha=float("nan")), "alpha must be"), (DEC, dict(alpha="1"), "alpha must be"),
    (IDEC, dict(gamma=-.1), "gamma must be zero or a positive number, got -0.1"), (IDEC, dict(gamma=True), "gamma must be"), (DCN, dict(lam=float("inf")), "lam must be zero or a positive number, got inf"),
    (IDEC, dict(encoder=nn.Linear(6, 2), pretrain="none"), "encoder must have encode and decode, IDEC reconstructs; got Linear"), (DCN, dict(encoder=nn.Linear(6, 2)), "encoder must have encode and decode"),
    (DCN, dict(encoder="mlp"), "encoder must be a module or None"), (DCN, dict(encoder=Still(), pretrain="none"), "encoder must have weights to train, DCN's loss moves nothing else; got Still"), (DEC, dict(n_clusters=151), "n_clusters must be between 1 and 150"), (DCN, dict(tol=-1), "tol must be"), (IDEC, dict(update_interval=0), "update_interval must be")])
def test_bad_arguments_are_named_before_any_work(kind, keywords, message, monkeypatch):
    monkeypatch.setattr("deepclustering.clustering.autoencoder.train", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message): kind(**{"n_clusters": 4, **QUICK, **keywords}).fit(X)
