"""DEPICT: targets by their objective and by loops, a whole fit by hand, files, interruptions, scikit-learn's own checks."""
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclustering.clustering.depict import DEPICT, TARGETS, balanced_targets, layer_loss
from deepclustering.core.data import load_digits
from deepclustering.core.metrics import ari
from deepclustering.core.models import ConvAutoencoder, MLPAutoencoder
from deepclustering.core.transport import sinkhorn
from deepclustering.tool.cluster import find_clusterer, make_clusterer

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X, Y = make_blobs(90, 6, centers=4, cluster_std=1., random_state=0)
QUICK = dict(widths=(8, 3), noise=(.1,), pretrain_epochs=2, start_epochs=2, max_iter=4, update_interval=2, n_init=2, batch_size=50, lr=1e-2, device="cpu", random_state=0, progress=False)
FLOAT32 = {"check_methods_subset_invariance": "the network computes in float32, whose sums depend on the size of the batch"}


# --- targets ---

def predictions(n, k, seed): return np.random.default_rng(seed).dirichlet(np.linspace(.3, 2, k), n)


@pytest.mark.parametrize("n, k", [(1, 1), (1, 4), (7, 2), (50, 6)])
def test_targets_by_loops(n, k):
    p = predictions(n, k, n)
    for form, f in (("paper", lambda v, s: v / np.sqrt(s)), ("squared", lambda v, s: v**2 / s)):
        q = np.array([[f(p[i, c], p[:, c].sum()) for c in range(k)] for i in range(n)])
        q /= q.sum(1, keepdims=True)
        np.testing.assert_allclose(balanced_targets(torch.tensor(p), form), q, rtol=1e-12)
        np.testing.assert_allclose(balanced_targets(torch.tensor(p, dtype=torch.float32), form), q, rtol=3e-5, atol=1e-9)


def test_targets_and_their_objective():
    "SciPy minimises KL(Q||P) + KL(f||u) over the rows' logits; its best obeys q ~ p / f, and the closed form lies between it and P."
    p = predictions(12, 3, 0)

    def rows(free): q = np.exp(free.reshape(12, 3)); return q / q.sum(1, keepdims=True)
    def value(q): f = q.mean(0); return (q * np.log(q / p)).sum() / 12 + (f * np.log(3 * f)).sum()
    best = rows(minimize(lambda free: value(rows(free)), np.log(p).ravel(), method="L-BFGS-B", options=dict(maxiter=2000, maxfun=10**6, ftol=1e-15, gtol=1e-9)).x)
    shape = p / best.mean(0)
    np.testing.assert_allclose(best, shape / shape.sum(1, keepdims=True), atol=2e-4)
    assert value(best) < value(np.asarray(balanced_targets(torch.tensor(p)))) < value(p)


def test_paper_target_is_half_a_sinkhorn_step():
    "Again and again it ends where Sinkhorn ends: rows of 1, columns of n / k, from log p as scores."
    p = torch.tensor(predictions(20, 4, 1))
    q = p
    for _ in range(300): q = balanced_targets(q)
    torch.testing.assert_close(q, 20 * sinkhorn(p.log(), eps=1., tol=0, n_iters=500), rtol=1e-6, atol=1e-9)


def test_properties_of_the_targets():
    p = torch.tensor(predictions(40, 5, 2))
    order, names = torch.randperm(40, generator=torch.Generator().manual_seed(0)), [3, 0, 4, 1, 2]
    for form in TARGETS:
        q = balanced_targets(p, form)
        torch.testing.assert_close(q.sum(1), torch.ones(40, dtype=torch.float64))
        torch.testing.assert_close(balanced_targets(p[order], form), q[order])
        torch.testing.assert_close(balanced_targets(p[:, names], form), q[:, names])
        torch.testing.assert_close(balanced_targets(p.repeat(3, 1), form), q.repeat(3, 1))     # the sums' scale cancels
        torch.testing.assert_close(balanced_targets(p.T.contiguous().T, form), q)                 # another layout
    assert balanced_targets(p).mean(0)[p.mean(0).argmin()] > p.mean(0).min()                    # the smallest cluster gains


# --- layers ---

@pytest.mark.parametrize("noise", [0., .4])
def test_layer_loss_by_hand(noise):
    torch.manual_seed(0)
    net, x = MLPAutoencoder(7, (6, 5, 2), noise=noise).double(), torch.randn(11, 7, dtype=torch.float64)
    torch.manual_seed(5)
    loss, z = layer_loss(net, x, .25)
    mine = torch.autograd.grad(loss, list(net.parameters()))
    torch.manual_seed(5)
    h, clean = x, [x]
    for e in net.encoder: clean.append(e(clean[-1]))
    for e in net.encoder: h = e(F.dropout(h, noise))
    torch.testing.assert_close(z, h)
    total, weights = 0., [1., .25, .25]
    for d, target, w in reversed(list(zip(net.decoder, clean, weights))):
        h = d(h)
        total = total + w * ((h - target) ** 2).sum() / target.numel()
    torch.testing.assert_close(loss, total)
    wanted = torch.autograd.grad(total, list(net.parameters()))                              # also through the clean layers
    for got, want in zip(mine, wanted, strict=True): torch.testing.assert_close(got, want)


@pytest.mark.parametrize("text, call", [("form must be one of", lambda: balanced_targets(torch.ones(2, 2) / 2, "sharp")), ("p must be", lambda: balanced_targets(torch.tensor([[np.nan, 1.]])))])
def test_bad_input(text, call):
    with pytest.raises(ValueError, match=text): call()


# --- the estimator ---

@parametrize_with_checks([DEPICT(widths=(4, 2), noise=(.1,), pretrain_epochs=1, start_epochs=1, max_iter=2, n_init=1, device="cpu")], expected_failed_checks=lambda estimator: FLOAT32)
def test_estimator_checks(estimator, check):
    check(estimator)


def network(seed=0):
    "In float64, without noise: whole batches make a fit a matter of arithmetic."
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return MLPAutoencoder(6, (5, 4)).double()


def onwards(targets="paper", **keywords):
    return DEPICT(4, **{**QUICK, "encoder": network(), "pretrain_epochs": 0, "init": Y, "start_epochs": 1, "max_iter": 5, "tol": 0, "batch_size": 1000, "targets": targets, **keywords}).fit(X)


@pytest.mark.parametrize("targets", TARGETS)
def test_a_fit_by_hand(targets):
    "One step for the first labels on nine tenths of the rows, then Adam on all rows, targets before steps 1, 3 and 5."
    model, net = onwards(targets, cluster_weight=2., layer_weight=.5), network()
    x = torch.tensor((X - (X.min() + X.max()) / 2) * 2 / (X.max() - X.min()))
    z = net.encode(x).detach()
    theta = torch.stack([F.normalize(z[Y == k].mean(0), dim=0) for k in range(4)]).requires_grad_()
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    weights = [*net.parameters(), theta, bias]

    def loss(rows, q):
        up = net.activations(rows); down = net.reconstructions(up[-1])
        log_p = (up[-1] @ theta.T + bias).log_softmax(1)
        return F.mse_loss(down[0], rows) + .5 * F.mse_loss(down[1], up[1]) - 2. * (q * log_p).sum(1).mean()

    def step(adam, rows, q):
        adam.zero_grad(); loss(rows, q).backward(); torch.nn.utils.clip_grad_norm_(weights, 1e9); adam.step()
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(0)))
    rest = torch.randperm(90, generator=torch.Generator().manual_seed(seed))[9:]
    step(torch.optim.Adam(weights, lr=1e-2), x[rest], F.one_hot(torch.tensor(Y), 4)[rest].double())
    adam = torch.optim.Adam(weights, lr=1e-2)
    for s in range(5):
        if s % 2 == 0: q = balanced_targets((net.encode(x) @ theta.T + bias).softmax(1).detach(), targets)
        step(adam, x, q)
    p = (net.encode(x) @ theta.T + bias).softmax(1).detach()
    np.testing.assert_allclose(model.predict_proba(X), p, atol=1e-9)
    np.testing.assert_allclose(model.weights_, theta.detach(), atol=1e-9)
    assert model.n_iter_ == 5 and np.array_equal(model.labels_, p.argmax(1)) and abs(model.confidence_ - float(p.amax(1).mean())) < 1e-9
    for k in range(4):
        if (model.labels_ == k).any(): np.testing.assert_allclose(model.cluster_centers_[k], net.encode(x).detach()[model.labels_ == k].mean(0), atol=1e-9)


def test_targets_are_of_all_rows_and_clean():
    seen = []

    class Watched(DEPICT):
        def _target(self, p): seen.append(p); return super()._target(p)
    model = Watched(4, **{**QUICK, "noise": (.5,), "max_iter": 3, "update_interval": 2, "tol": 0}).fit(X)
    assert [len(p) for p in seen] == [90, 90]
    clean = Watched(4, **{**QUICK, "noise": (.5,), "max_iter": 2, "update_interval": 2, "tol": 0}).fit(X).predict_proba(X)
    np.testing.assert_allclose(seen[1], clean, atol=1e-5)                                      # before the third step: the clean predictions after two
    assert [r["step"] for r in model.history_ if r["phase"] == "clusters"] == [0, 2, 3]


def test_an_epoch_between_targets_and_tol():
    def looks(**keywords): return [r["step"] for r in DEPICT(4, **{**QUICK, **keywords}).fit(X).history_ if r["phase"] == "clusters"]
    assert looks(update_interval=None, batch_size=20, max_iter=12, tol=0) == [0, 5, 10, 12]     # ceil(90 / 20)
    assert looks(max_iter=200, tol=1.) == [0, 2]                                               # tol is read: fewer than all moved
    assert looks(max_iter=6, tol=0) == [0, 2, 4, 6]


@pytest.mark.parametrize("init", ["k-means", "path-integral"])
def test_clusters_are_found(init):
    model = DEPICT(4, init=init, targets="squared", **{**QUICK, "widths": (16, 5), "pretrain_epochs": 60, "start_epochs": 60, "patience": 60, "max_iter": 40}).fit(X)
    assert ari(Y, model.first_labels_) > .9 and ari(Y, model.labels_) > .9 and model.report_.active == 4
    again, other = (DEPICT(4, init=init, **{**QUICK, "random_state": s}).fit(X) for s in (0, 1))
    same = clone(again).fit(X)
    assert np.array_equal(again.embedding_, same.embedding_) and not np.array_equal(again.embedding_, other.embedding_)
    tensor = clone(again).fit(torch.tensor(X))
    assert isinstance(tensor.predict(torch.tensor(X)), torch.Tensor) and np.array_equal(tensor.labels_, again.labels_)


def test_images_in_every_form():
    d = load_digits()
    x, few = d.images[:80], dict(QUICK, channels=(3, 4), noise=(.1, .1, 0.), lr=1e-3)
    models = [DEPICT(5, **few).fit(x), DEPICT(5, **few).fit(x[:, None]), DEPICT(5, image_shape=(8, 8), **few).fit(d.X[:80]), DEPICT(5, image_shape=(1, 8, 8), **few).fit(torch.tensor(x))]
    for m in models:
        assert m.encoder_.config["image_shape"] == [1, 8, 8] and m.encoder_.config["code"] == 5 and m.encoder_.noise == [.1, .1, 0.] and m.n_features_in_ == 64
        assert np.array_equal(m.labels_, models[0].labels_) and np.array_equal(np.asarray(m.predict(torch.tensor(x))), models[0].labels_)
    colour = DEPICT(2, **few).fit(np.random.default_rng(0).random((20, 3, 8, 9)))
    assert colour.encoder_.shape == (3, 8, 9)
    given = ConvAutoencoder((1, 8, 8), (3,), 4)
    before = {k: v.clone() for k, v in given.state_dict().items()}
    DEPICT(5, encoder=given, **few).fit(x)
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items())                 # a copy was trained


def test_a_row_does_not_depend_on_its_batch():
    "What scikit-learn's check cannot ask of float32."
    model = onwards()
    p = model.predict_proba(X)
    np.testing.assert_allclose(np.concatenate([model.predict_proba(X[i:i + 7]) for i in range(0, 90, 7)]), p, rtol=1e-12)
    order = np.random.default_rng(0).permutation(90)
    np.testing.assert_allclose(model.predict_proba(X[order]), p[order], rtol=1e-12)


def test_files_and_sklearn(tmp_path):
    model = DEPICT(4, init=Y, **QUICK).fit(X)
    model.save(tmp_path / "m.safetensors")
    back = DEPICT.load(tmp_path / "m.safetensors")
    assert np.array_equal(back.predict_proba(X), model.predict_proba(X)) and back.history_ == model.history_ and back.report_ == model.report_ and np.array_equal(back.init, Y)
    assert back.shift_ == model.shift_ and back.scale_ == model.scale_ and back.confidence_ == model.confidence_
    np.testing.assert_allclose(model.transform(X).sum(1), 1, atol=1e-6)
    assert list(model.get_feature_names_out()) == [f"depict{i}" for i in range(4)]
    assert find_clusterer("depict") is DEPICT and make_clusterer(DEPICT, 3).n_clusters == 3
    with pytest.raises(ValueError, match="X has 5 features"): model.predict(X[:, :5])


@pytest.mark.parametrize("call", [1, 4, 6])
def test_interrupted(call):
    "In the first stage, while first labels are learnt, and in the alternation."
    class Stopped(DEPICT):
        def _loss(self, module, batch):
            if len(calls) == call: os.kill(os.getpid(), signal.SIGINT)
            calls.append(1)
            return super()._loss(module, batch)
    calls = []
    model = Stopped(4, **{**QUICK, "max_iter": 40, "tol": 0})
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): model.fit(X)
    assert np.array_equal(model.predict(X), model.labels_) and model.n_iter_ < 40


def test_interrupted_before_the_start(monkeypatch):
    import deepclustering.clustering.depict as depict
    calls, real = [], depict.layer_loss

    def layers(*args):
        calls.append(1)
        if len(calls) == 2: os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(depict, "layer_loss", layers)
    model = DEPICT(4, **QUICK)
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): model.fit(X)
    assert model.n_iter_ == 0 and {r["phase"] for r in model.history_} <= {"layers"} and np.array_equal(model.predict(X), model.labels_)


def test_a_collapse_is_told():
    with pytest.warns(ConvergenceWarning, match="memberships tell next to nothing"): dull = onwards(encoder=None, lr=1e-9)   # nothing is learnt: unit thetas on small codes
    assert .25 <= dull.confidence_ < .3 and dull.report_.active == 4


@pytest.mark.parametrize("name, value", [("n_clusters", 91), ("n_clusters", 0), ("targets", "q"), ("init", "random"), ("init", [0, 1]), ("init", np.full(90, 4)), ("encoder", torch.nn.Linear(6, 2)), ("image_shape", (2, 4)), ("layer_weight", -1.),
                                         ("cluster_weight", np.nan), ("lr", 0.), ("tol", -1), ("max_iter", 0), ("batch_size", 2.5), ("update_interval", 0), ("patience", 0), ("start_epochs", 0), ("pretrain_epochs", -1), ("n_init", 0)])
def test_bad_parameters(name, value):
    with pytest.raises(ValueError, match=name): DEPICT(**{"n_clusters": 4, **QUICK, name: value}).fit(X)


def test_bad_data():
    with pytest.raises(ValueError, match="all 9 rows of X are equal"): DEPICT(2, **QUICK).fit(np.ones((9, 3)))
    with pytest.raises(ValueError, match="NaN"): DEPICT(2, **QUICK).fit(np.full((9, 3), np.nan))
    for noise in ((1.,), ()):
        with pytest.raises(ValueError, match="^noise must be"): DEPICT(2, **{**QUICK, "noise": noise}).fit(X)
    images = np.random.default_rng(0).random((20, 8, 8))
    with pytest.raises(ValueError, match=r"^channels must be two.*got \(50,\)"): DEPICT(2, **QUICK, channels=(50,)).fit(images)
    with pytest.raises(ValueError, match="^noise must be"): DEPICT(2, **{**QUICK, "noise": (.1, .1)}, channels=(3, 4)).fit(images)
    one, three = (DEPICT(2, **{**QUICK, "noise": noise}, channels=(3, 4)).fit(images) for noise in (.1, (.1, .1, .1)))
    assert np.array_equal(one.embedding_, three.embedding_)
