"""Partial transport: labels by POT and by a general solver, steps that fall, a long tail by counting, a fit, files, interruptions, scikit-learn's own checks."""
import math
import os
import signal

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclustering.clustering.autoencoder import AutoencoderKMeans
from deepclustering.clustering.partial_transport import SP2OT, _labeller, _spoiled, long_tailed, macro_accuracy, partial_labels, ramp, semantic_graph, semantic_labels, semantic_value
from deepclustering.clustering.path_integral import directed_graph
from deepclustering.core.models import MLPAutoencoder
from deepclustering.core.transport import sinkhorn
from deepclustering.tool.cluster import find_clusterer, make_clusterer

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X, Y = make_blobs([80, 40, 10], 6, cluster_std=.7, random_state=3)
QUICK = dict(widths=(16, 3), pretrain_epochs=10, max_iter=40, update_interval=10, n_init=3, batch_size=64, device="cpu", random_state=0, progress=False)
TINY = {**QUICK, "widths": (8, 3), "pretrain_epochs": 2, "max_iter": 4, "update_interval": 2}


def log_memberships(n, k, seed, dtype=torch.float64):
    return (2 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=dtype)).log_softmax(1)


# --- labels ---

@pytest.mark.parametrize("n, k, rho", [(1, 1, .5), (5, 2, .3), (20, 4, .8), (3, 7, .9)])
def test_hard_columns_are_pots_dummy_column(n, k, rho):
    L = log_memberships(n, k, n)
    expected = ot.sinkhorn(np.full(n, 1 / n), [rho / k] * k + [1 - rho], np.pad(-L.numpy(), ((0, 0), (0, 1))), .2, stopThr=1e-14, numItermax=100_000)[:, :k]
    np.testing.assert_allclose(partial_labels(L, rho, column_weight=math.inf, eps=.2, tol=0, n_iters=5000), expected, atol=1e-10)


@pytest.mark.parametrize("weight", [.05, 1., 30.])
def test_all_mass_is_pots_unbalanced(weight):
    L = log_memberships(12, 3, 1)
    expected = ot.unbalanced.sinkhorn_unbalanced(np.full(12, 1 / 12), np.full(3, 1 / 3), -L.numpy(), .1, (math.inf, weight), stopThr=1e-15, numItermax=200_000)
    np.testing.assert_allclose(partial_labels(L, 1., column_weight=weight, tol=0, n_iters=20_000), expected, atol=1e-8)


def value(Q, L, rho, weight, eps):
    full = np.concatenate([Q, 1 / len(Q) - Q.sum(1, keepdims=True)], 1).clip(1e-300)
    sizes, wanted = Q.sum(0), rho / Q.shape[1]
    return -(Q * L).sum() + weight * (sizes * np.log(sizes / wanted) - sizes + wanted).sum() + eps * (full * np.log(full)).sum()


@pytest.mark.parametrize("rho, weight, eps", [(.3, .2, .3), (.7, 1., .5), (.7, 3., 1.)])
def test_against_a_solver_that_sees_the_value_alone(rho, weight, eps):
    L = log_memberships(5, 3, 2).numpy()
    limits = [{"type": "ineq", "fun": lambda q: .2 - q.reshape(5, 3).sum(1) - 1e-9}, {"type": "eq", "fun": lambda q: q.sum() - rho}]
    best = minimize(lambda q: value(q.reshape(5, 3), L, rho, weight, eps), np.full(15, rho / 15), bounds=[(1e-9, 1)] * 15, constraints=limits, options=dict(maxiter=3000, ftol=1e-15)).x.reshape(5, 3)
    ours = partial_labels(torch.tensor(L), rho, column_weight=weight, eps=eps, tol=0, n_iters=5000).numpy()
    np.testing.assert_allclose(ours, best, atol=5e-4)
    assert value(ours, L, rho, weight, eps) <= value(best, L, rho, weight, eps) + 1e-8


def test_limits():
    L = log_memberships(30, 4, 3)
    torch.testing.assert_close(partial_labels(L, 1., column_weight=math.inf, tol=0), sinkhorn(L, eps=.1, tol=0))                       # SeLa's
    torch.testing.assert_close(partial_labels(L, 1., column_weight=0.), (L / .1).softmax(1) / 30)                                      # argmax, softly
    for rho in (.1, .5, 1.):
        Q = partial_labels(L, rho, tol=0, n_iters=3000)
        assert abs(float(Q.sum()) - rho) < 1e-9 and float(Q.sum(1).max()) <= 1 / 30 + 1e-12 and float(Q.min()) >= 0
    few = partial_labels(L, .1, eps=.005, column_weight=0., tol=0, n_iters=3000).sum(1)                                                 # the surest three of 30 come first
    assert set(few.argsort(descending=True)[:3].tolist()) == set(L.amax(1).argsort(descending=True)[:3].tolist())


def test_dtypes_and_errors():
    L = log_memberships(6, 3, 0)
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        Q = partial_labels(L.to(dtype), .5)
        assert Q.dtype == expected and not Q.requires_grad
        torch.testing.assert_close(Q.double(), partial_labels(L, .5), atol=5e-3, rtol=0)
    assert torch.isfinite(partial_labels(torch.tensor([[-1e4, 0.], [0., -1e4]]), .3)).all()
    for message, call in {"log_p must be a floating point matrix": lambda: partial_labels(L[0]), "log_p must be finite or -inf": lambda: partial_labels(L * math.nan), "rho must be above 0": lambda: partial_labels(L, 1.1),
                          "column_weight must not": lambda: partial_labels(L, column_weight=-1), "eps must be positive": lambda: partial_labels(L, eps=0.), "W must be of shape": lambda: semantic_labels(L, torch.eye(2)),
                          "semantic_weight must be zero or": lambda: semantic_labels(L, torch.eye(6), semantic_weight=-1), "start must be above": lambda: ramp(0, 3, 2.)}.items():
        with pytest.raises(ValueError, match=message): call()


def test_ramp_by_hand():
    assert [round(ramp(t, 4), 6) for t in (0, 2, 4, 9)] == [round(.1 + .9 * math.exp(v), 6) for v in (-5, -1.25, 0, 0)]


# --- neighbours ---

def graph(n, seed, K=6):
    points = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return directed_graph(points, K)


def test_graph_by_loops():
    g = graph(15, 0, 3)
    W = np.zeros((15, 15))
    for i in range(15):
        for j, w in zip(g.index[i].tolist(), g.weight[i].tolist()): W[i, j] += w; W[j, i] += w
    np.testing.assert_allclose(semantic_graph(g).to_dense(), W * 15 / W.sum(), rtol=1e-12)


def test_value_by_loops():
    L, W = log_memberships(10, 3, 0), semantic_graph(graph(10, 0, 3))
    Q, dense = partial_labels(L, .4), W.to_dense()
    reward = sum(float(dense[i, j] * Q[i] @ Q[j]) for i in range(10) for j in range(10))
    assert abs(float(semantic_value(Q, L, W, .4, 3., .7, .2)) - (value(Q.numpy(), L.numpy(), .4, .7, .2) - 3 * 10 / 2 * reward)) < 1e-10


def walk(L, W, **keywords):
    values = []
    semantic_labels(L, W, values=values, max_iter=10, tol=1e-9, n_iters=5000, **keywords)
    return np.diff(values)


@pytest.mark.parametrize("rho, weight, column_weight", [(.3, 4., 1.), (1., 10., 1.), (.6, 2., math.inf)])
def test_steps_fall(rho, weight, column_weight):
    "The paper's where W has no negative eigenvalue, the damped ones for any W, from equal entries and from elsewhere."
    L, W = log_memberships(30, 3, 1), semantic_graph(graph(30, 1))
    factor = torch.rand(30, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gram = factor @ factor.T * 30 / (factor @ factor.T).sum()
    assert torch.linalg.eigvalsh(W.to_dense())[0] < -.1
    keywords = dict(rho=rho, semantic_weight=weight, column_weight=column_weight)
    assert walk(L, gram, damped=False, **keywords).max() <= 1e-7
    start = partial_labels(log_memberships(30, 3, 9), rho, column_weight=column_weight, tol=0, n_iters=5000)
    for M in (W, gram):
        assert walk(L, M, **keywords).max() <= 1e-7 and walk(L, M, start=start, **keywords).max() <= 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_a_strong_pull_that_no_step_can_follow_leaves_the_labels(seed):
    "Where even the most damped step would rise, the last labels stay, with all their mass."
    L, W = log_memberships(60, 5, seed), semantic_graph(graph(60, seed))
    values = []
    Q = semantic_labels(L, W, .5, semantic_weight=20., column_weight=math.inf, values=values)
    assert np.diff(values).max() <= 1e-4 and abs(float(Q.sum()) - .5) < .005


def test_bad_starts():
    L, W = log_memberships(6, 3, 0), semantic_graph(graph(6, 0))
    for text, call in {"start must be of shape .6, 3. with a positive sum": lambda: semantic_labels(L, W, start=torch.zeros(6, 3)), "start must be of shape": lambda: semantic_labels(L, W, start=torch.ones(6, 2)), "log_p must be a matrix": lambda: semantic_labels(L[0], W)}.items():
        with pytest.raises(ValueError, match=text): call()


def test_the_papers_steps_can_rise():
    "Two items that are each other's only neighbours change places for ever; damped, they do not."
    L, W = torch.tensor([[.9, .1], [.1, .9]], dtype=torch.float64).log(), torch.tensor([[0., 1.], [1., 0.]], dtype=torch.float64)
    keywords = dict(semantic_weight=4., column_weight=0., start=L.exp() / 2)
    rising = walk(L, W, damped=False, **keywords)
    assert rising[0] > 2 and rising[1] < -2 and rising[2] > 2
    assert walk(L, W, **keywords).max() <= 1e-8


def test_fixed_point_is_stationary():
    "At the end the labels solve the transport with their own tangent."
    L, W = log_memberships(30, 3, 4), semantic_graph(graph(30, 4))
    Q = semantic_labels(L, W, .5, semantic_weight=1., max_iter=400, tol=1e-11, n_iters=5000)
    torch.testing.assert_close(partial_labels(L + 30 * (W @ Q), .5, tol=0, n_iters=5000), Q, atol=1e-4, rtol=0)


def test_start_that_is_not_allowed():
    "When rho has grown, old labels are scaled; the first step may rise from there, and its start has no value."
    L, W, values = log_memberships(20, 3, 5), semantic_graph(graph(20, 5)), []
    Q = semantic_labels(L, W, 1., start=partial_labels(L, .2), values=values)
    assert values[0] == math.inf and abs(float(Q.sum()) - 1) < 1e-4


# --- a long tail ---

@pytest.mark.parametrize("ratio", [1, 10, 100.])
def test_long_tail_by_counting(ratio):
    y = np.repeat([4, 7, 9], [300, 200, 250])
    kept, order = long_tailed(y, ratio, 0)
    counts = [int((y[kept] == c).sum()) for c in order.tolist()]
    assert counts == [round(200 * ratio**(-i / 2)) for i in range(3)] and (np.diff(kept) > 0).all()
    assert torch.equal(kept, long_tailed(y, ratio, 0)[0]) and not (ratio > 1 and torch.equal(kept, long_tailed(y, ratio, 1)[0]))


def test_macro_accuracy_by_hand():
    assert macro_accuracy([0] * 90 + [1] * 10, [3] * 100) == .5                      # one cluster: the large class is right, the small one not
    assert macro_accuracy([0] * 9 + [1], [0] * 9 + [1]) == 1
    assert abs(macro_accuracy([0, 0, 0, 0, 1, 1], [5, 5, 5, 2, 2, 2]) - (.75 + 1) / 2) < 1e-12
    assert abs(macro_accuracy([0, 0, 1, 1, 2], [0, 1, 2, 3, 4]) - (.5 + .5 + 1) / 3) < 1e-12   # more clusters than classes


# --- the estimator ---

@parametrize_with_checks([SP2OT(2, **TINY)])
def test_sklearn(estimator, check): check(estimator)


@pytest.mark.parametrize("kind", [dict(), dict(semantic_weight=0.), dict(semantic_weight=0., rho_start=1.), dict(semantic_weight=0., rho_start=1., column_weight=math.inf)])
def test_finds_uneven_blobs(kind):
    m = SP2OT(3, **{**QUICK, **kind}).fit(X)
    start = SP2OT(3, **{**QUICK, **kind, "cluster_lr": 1e-30}).fit(X)
    found, first = macro_accuracy(Y, m.labels_), macro_accuracy(Y, start.labels_)
    if kind.get("column_weight") == math.inf: assert found < .8 < first              # equal shares cut the large one: worse than where they began
    else: assert found > (first if not kind or kind == dict(semantic_weight=0.) else .9)
    assert np.array_equal(m.predict(X), m.labels_) and np.allclose(m.predict_proba(X).sum(1), 1, atol=1e-5) and np.array_equal(m.transform(X).argmax(1), m.labels_)
    assert np.allclose(np.linalg.norm(m.cluster_centers_, axis=1), 1, atol=1e-5) and m.n_iter_ == 40
    assert [r["rho"] for r in m.history_ if "rho" in r] == [ramp(t, 40, kind.get("rho_start", .1)) for t in (0, 10, 20, 30)]


def test_labels_that_a_fit_learns():
    m = SP2OT(3, **QUICK).fit(X)
    m.history_ = [{"step": 20}]
    rho, logits, W = ramp(20, 40), torch.tensor(m.predict_proba(X)).log(), semantic_graph(directed_graph(torch.tensor(m.embedding_)))
    torch.testing.assert_close(_labeller(m, None)(logits), 130 * partial_labels(logits, rho, tol=1e-3))
    expected = 130 * semantic_labels(logits, W, rho, semantic_weight=4 * (1 - rho), tol=1e-3, max_iter=5)
    torch.testing.assert_close(_labeller(m, W)(logits).double(), expected, atol=1e-4, rtol=1e-4)


def test_step_by_hand():
    "One step of plain labels: the gradient of the weighted cross-entropy, Adam's first move."
    net = MLPAutoencoder(6, (16, 3))
    keywords = dict(QUICK, encoder=net, pretrain="none", max_iter=1, update_interval=1, batch_size=130, semantic_weight=0., view_noise=0., cluster_lr=1e-2)
    m = SP2OT(3, **keywords).fit(X)
    start = SP2OT(3, **{**keywords, "cluster_lr": 1e-30}).fit(X)
    C = torch.tensor(start.cluster_centers_).requires_grad_()
    z = torch.nn.functional.normalize(torch.tensor(start.embedding_))
    logits = z @ torch.nn.functional.normalize(C).T / .1
    Q = 130 * partial_labels(logits.log_softmax(1), ramp(0, 1), tol=1e-3)
    (-(Q * logits.log_softmax(1)).sum(1).mean()).backward()
    moved = C.detach() - 1e-2 * C.grad.sign()
    expected = torch.nn.functional.normalize(moved)
    big = C.grad.abs() > 1e-5
    torch.testing.assert_close(torch.tensor(m.cluster_centers_)[big], expected[big], atol=1e-3, rtol=0)


@pytest.mark.parametrize("power", [-565, 565])
def test_the_unit_of_the_rows_does_not_matter(power):
    "Powers of two change no digit; 2**565 is 1e170, whose square no float64 holds."
    usual, other = (SP2OT(3, **TINY).fit(X * unit) for unit in (1., 2.**power))
    assert other.scale_ * 2.**power == usual.scale_ and np.array_equal(other.labels_, usual.labels_) and np.array_equal(other.cluster_centers_, usual.cluster_centers_)


def test_moved_pictures():
    image = torch.arange(12.).reshape(1, 12)
    moved = {tuple(_spoiled(image, (3, 4), 1, 0.)[0].tolist()) for _ in range(200)}
    assert moved == {tuple(np.pad(image.reshape(3, 4).numpy(), 1, mode="edge")[a:a + 3, b:b + 4].ravel().tolist()) for a in range(3) for b in range(3)}
    assert torch.equal(_spoiled(image, None, 1, 0.), image)


def test_tensors_seeds_and_files(tmp_path):
    m = SP2OT(3, **TINY).fit(torch.tensor(X))
    assert isinstance(m.labels_, torch.Tensor) and isinstance(m.predict(torch.tensor(X)), torch.Tensor)
    again = clone(m).fit(X)
    assert np.array_equal(again.labels_, m.labels_.numpy()) and np.array_equal(again.cluster_centers_, m.cluster_centers_.numpy())
    m.save(tmp_path / "m.safetensors")
    loaded = SP2OT.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded.predict(torch.tensor(X)), m.labels_) and loaded.history_ == m.history_ and loaded.get_params()["semantic_weight"] == 4.
    assert find_clusterer("sp2ot") is SP2OT and make_clusterer(SP2OT, 4).n_clusters == 4


@pytest.mark.parametrize("more, message", [(dict(rho_start=2), "rho_start must be above 0"), (dict(view_noise=1.), "view_noise must be below 1"), (dict(column_weight=-1.), "column_weight must not be negative"), (dict(image_shape=(2, 2)), "image_shape must be"),
                                           (dict(temperature=0), "temperature must be"), (dict(n_neighbors=0), "n_neighbors must be"), (dict(n_clusters=500), "n_clusters must be"), (dict(semantic_steps=0), "semantic_steps must be"), (dict(shift=-1), "shift must be"), (dict(eps=-1), "eps must be"), (dict(update_interval=0), "update_interval must be")])
def test_errors_name_the_argument(more, message):
    with pytest.raises(ValueError, match=message): SP2OT(**{"n_clusters": 3, **TINY, **more}).fit(X)


def test_collapse_has_a_name():
    "A head as warm as this says next to nothing."
    with pytest.warns(ConvergenceWarning, match="tell next to nothing"): SP2OT(3, **{**TINY, "temperature": 1e3}).fit(X)
    with pytest.raises(ValueError, match="all 5 rows of X are equal"): SP2OT(2, **TINY).fit(np.ones((5, 4)))


def test_interrupted(monkeypatch):
    calls, own = [], SP2OT._loss
    def loss(self, module, batch):
        calls.append(1)
        if len(calls) == 3: os.kill(os.getpid(), signal.SIGINT)
        return own(self, module, batch)
    monkeypatch.setattr(SP2OT, "_loss", loss)
    m = SP2OT(3, **QUICK)
    with pytest.warns(UserWarning), pytest.raises(KeyboardInterrupt): m.fit(X)
    assert len(m.labels_) == 130 and m.n_iter_ == 0
