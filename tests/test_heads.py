"""Heads on frozen features: losses by loops and by other libraries, whole fits by hand, collapses, files, interruptions, scikit-learn's own checks."""
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclustering.clustering.heads import METRICS, ClusterHeads, HeadReport, SCANHead, TEMIHead, agreement, feature_neighbors, scan_loss, self_label_loss, temi_loss
from deepclustering.core.metrics import ari, churn, collapse_report
from deepclustering.tool.cluster import find_clusterer, make_clusterer

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X, Y = make_blobs(90, 6, centers=4, cluster_std=1., random_state=0)
QUICK = dict(n_heads=2, n_neighbors=5, max_iter=3, batch_size=50, device="cpu", random_state=0, progress=False)
KINDS = (SCANHead, TEMIHead)


def logits(*shape, seed=0): return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- neighbours ---

@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n, m", [(2, 1), (7, 3), (60, 12)])
def test_neighbours_are_scikit_learns(metric, n, m):
    x = np.random.default_rng(n).normal(size=(n, 4))
    wanted = NearestNeighbors(n_neighbors=m, metric=metric, algorithm="brute").fit(x).kneighbors(return_distance=False)
    assert np.array_equal(feature_neighbors(x, m, metric), wanted)
    assert np.array_equal(feature_neighbors(torch.tensor(x).T.contiguous().T, m, metric), wanted)           # another layout


def test_neighbours_far_from_the_origin_and_doubled():
    x = np.random.default_rng(0).normal(size=(40, 3))
    assert np.array_equal(feature_neighbors(x + 1e4, 5, "euclidean"), feature_neighbors(x, 5, "euclidean"))
    twice = feature_neighbors(np.repeat(x, 2, 0), 1)[:, 0]
    assert np.array_equal(twice, np.arange(80).reshape(-1, 2)[:, ::-1].ravel())                                # its copy, never itself
    assert feature_neighbors(np.zeros((4, 2)), 9).shape == (4, 3)


def test_a_row_of_zeros_has_cosine_zero():
    "Cosines by hand: row 0 has .4, 0, -.995; row 1 .4, 0, -.308; row 3 -.995, -.308, 0; row 2 a tie."
    x = torch.tensor([[1, 0], [.4, .9165], [0, 0], [-1, .1]])
    assert feature_neighbors(x, 1)[[0, 1, 3], 0].tolist() == [1, 0, 2]
    many = np.random.default_rng(0).normal(size=(50, 4)); many[::7] = 0
    rows = np.flatnonzero(many.any(1))                                                           # the others have ties alone
    length = np.linalg.norm(many, axis=1, keepdims=True)
    cosines = (many @ many.T) / np.where(length, length, 1) / np.where(length, length, 1).T
    np.fill_diagonal(cosines, -2)
    found = feature_neighbors(many, 20).numpy()
    np.testing.assert_allclose(np.take_along_axis(cosines, found, 1)[rows], -np.sort(-cosines, 1)[rows, :20], atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_neighbours_at_the_ends_of_float32(metric, scale):
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    wanted = NearestNeighbors(n_neighbors=3, metric=metric, algorithm="brute").fit(x.double().numpy()).kneighbors(return_distance=False)
    assert np.array_equal(feature_neighbors(x * scale, 3, metric), wanted)
    lengths = torch.logspace(-30, 30, 40)[:, None]                                               # each row with its own
    if metric == "cosine": assert np.array_equal(feature_neighbors(x * lengths, 3), wanted)


# --- losses ---

def test_agreement_is_the_probability_of_a_common_draw():
    a, b = logits(1, 3), logits(1, 3, seed=1)
    draw = [torch.distributions.Categorical(logits=v[0]).sample((200_000,)) for v in (a, b)]
    assert abs(float((draw[0] == draw[1]).double().mean()) - float(agreement(a, b).exp())) < .01
    assert float(agreement(torch.tensor([[300., 0.]]), torch.tensor([[0., 300.]]))) == pytest.approx(-300 + np.log(2), abs=1e-3)      # no clipping


def test_scan_by_loops():
    a, b = logits(3, 8, 5), logits(3, 8, 5, seed=1)
    for weight in (0., 1., 5.):
        for h in range(3):
            p, q = a[h].softmax(1).numpy(), b[h].softmax(1).numpy()
            mean = p.mean(0)
            wanted = -np.mean([np.log(p[i] @ q[i]) for i in range(8)]) + weight * (mean * np.log(mean)).sum()
            assert float(scan_loss(a, b, weight)[h]) == pytest.approx(wanted, rel=1e-12)


def test_temi_is_mutual_information():
    "With beta = 1 the loss is minus the mean pointwise mutual information of a joint distribution that is made by hand."
    sizes = np.array([.5, .3, .2])
    rng = np.random.default_rng(0)
    given = rng.dirichlet(np.ones(40), 3)                                                         # p(i | c)
    item = sizes @ given                                                                          # p(i)
    post = (sizes[:, None] * given / item).T                                                      # p(c | i)
    joint = np.einsum("c,ci,cj->ij", sizes, given, given)
    i, j = rng.integers(40, size=(2, 30))
    wanted = -np.mean(np.log(joint[i, j] / item[i] / item[j]))
    got = temi_loss(torch.tensor(np.log(post[i])), torch.tensor(np.log(post[j])), torch.tensor(sizes), beta=1.)
    assert float(got) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_losses_do_not_care_for_names_and_order(dtype, tolerance):
    a, b = logits(2, 9, 4).to(dtype), logits(2, 9, 4, seed=1).to(dtype)
    sizes, names, order = logits(2, 4, seed=2).softmax(1).to(dtype), [2, 0, 3, 1], torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for f, g in ((lambda a, b: scan_loss(a, b), lambda a, b: scan_loss(a[..., names], b[..., names])), (lambda a, b: temi_loss(a, b, sizes), lambda a, b: temi_loss(a[..., names], b[..., names], sizes[:, names]))):
        torch.testing.assert_close(f(a, b), g(a, b), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(f(a, b), f(a[:, order], b[:, order]), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(f(a + 7, b - 3), f(a, b), rtol=tolerance * 10, atol=tolerance * 10)   # logits are free by a constant


def test_self_labels_by_loops():
    clean, spoiled = 2 * logits(2, 30, 3), logits(2, 30, 3, seed=1)
    for h in range(2):
        p, log_q = clean[h].softmax(1), spoiled[h].log_softmax(1)
        means = [float(-log_q[own, k].mean()) for k in range(3) if (own := (p.argmax(1) == k) & (p.amax(1) > .8)).any()]
        assert float(self_label_loss(clean, spoiled, .8)[h]) == pytest.approx(np.mean(means), rel=1e-12)
    leaf = spoiled.clone().requires_grad_()
    self_label_loss(clean, leaf, 1 - 1e-15).sum().backward()
    assert float(leaf.grad.abs().max()) == 0


# --- the estimators ---

@parametrize_with_checks([SCANHead(**{**QUICK, "random_state": None}), TEMIHead(**{**QUICK, "random_state": None})])
def test_estimator_checks(estimator, check): check(estimator)


def start(model):
    "Scaled rows, neighbours, heads and the seed of a fit, by what its docstring says."
    x = torch.tensor((X - X.mean(0)) / np.sqrt(((X - X.mean(0))**2).mean())).float()
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(0)))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = ClusterHeads(6, 4, 2, temperature=model.temperature)
    return x, feature_neighbors(X, model.n_neighbors, model.metric), net


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_by_hand(kind):
    "Two steps on all rows: Adam by PyTorch, the losses by their formulas, the teacher and the sizes by theirs."
    seen = []

    class Watched(kind):
        def _objective(self, run, net, a, b): seen.append((a.clone(), b.clone())); return super()._objective(run, net, a, b)
    extra = {"init": "random", "momentum": .9, "beta": .7} if kind is TEMIHead else {"entropy_weight": 3.}
    model = Watched(4, **{**QUICK, "max_iter": 2, "batch_size": 90, **extra}).fit(X)
    x, near, net = start(model)
    for a, b in seen:                                                                             # rows of the data, each with one of its neighbours
        rows = torch.cdist(a, x).argmin(1); others = torch.cdist(b, x).argmin(1)
        assert torch.equal(x[rows], a) and sorted(rows.tolist()) == list(range(90)) and all(int(j) in near[i] for i, j in zip(rows, others))
    adam = (torch.optim.AdamW if kind is TEMIHead else torch.optim.Adam)(net.parameters(), lr=model.lr, weight_decay=1e-4)
    slow, sizes, last = {k: v.clone() for k, v in net.state_dict().items()}, torch.full((2, 4), .25), None

    def teacher(x): return slow["bias"] / .1 * (F.normalize(x, dim=1) @ F.normalize(slow["weight"], dim=1))
    for a, b in seen:
        pa, pb = net(a), net(b)
        if kind is SCANHead:
            p, q = pa.softmax(2), pb.softmax(2)
            mean = p.mean(1)
            last = -(p * q).sum(2).log().mean(1) + 3 * (mean * mean.log()).sum(1)
        else:
            ta, tb = teacher(a).softmax(2), teacher(b).softmax(2)
            sizes = .9 * sizes + .1 * (ta.mean(1) + tb.mean(1)) / 2
            w = (ta * tb).sum(2).mean(0)
            def one(p, t): return ((p.softmax(2) * t)**.7 / sizes[:, None]).sum(2).log()
            last = -(w * (one(pa, tb) + one(pb, ta)) / 2).mean(1)
        adam.zero_grad(); last.mean().backward(); adam.step()
        for k, v in net.state_dict().items(): slow[k] = .9 * slow[k] + .1 * v
    final = net.state_dict() if kind is SCANHead else slow
    for k, v in model.encoder_.state_dict().items(): torch.testing.assert_close(v, final[k], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.head_losses_, last.detach(), rtol=1e-4)
    assert model.n_iter_ == 2 and model.best_head_ == int(last.argmin())


@pytest.mark.parametrize("kind, extra", [(SCANHead, {}), (SCANHead, {"hidden": 8, "lr": .01}), (TEMIHead, {}), (TEMIHead, {"metric": "euclidean", "n_heads": 1})])
def test_clusters_are_found(kind, extra):
    model = kind(4, **{**QUICK, "n_heads": 4, "max_iter": 30, **extra}).fit(X)
    assert ari(Y, model.labels_) > .9 and model.report_.active == 4 and model.report_.disagreement < .1 and not model.report_.collapsed
    again, other = clone(model).fit(X), clone(model).set_params(random_state=1).fit(X)
    assert np.array_equal(again.head_losses_, model.head_losses_) and not np.array_equal(other.head_losses_, model.head_losses_)
    tensor = clone(model).fit(torch.tensor(X))
    assert isinstance(tensor.predict(torch.tensor(X)), torch.Tensor) and np.array_equal(tensor.labels_, model.labels_)
    new = make_blobs(90, 6, centers=4, cluster_std=1., random_state=0)[0] + .01
    assert ari(Y, model.predict(new)) > .9


@pytest.mark.parametrize("kind", KINDS)
def test_scale_and_place_do_not_matter(kind):
    "Moved and stretched features give the same fit; cosine neighbours do depend on the origin."
    a, b = (kind(4, **QUICK, metric="euclidean").fit(x) for x in (X, 1000 * X - 5e4))
    np.testing.assert_allclose(a.head_losses_, b.head_losses_, rtol=1e-3)
    assert np.array_equal(a.labels_, b.labels_)


def test_diagnostics_are_of_all_rows():
    class Kept(SCANHead):
        def _objective(self, run, net, a, b): self.run = run; return super()._objective(run, net, a, b)
    model = Kept(4, **QUICK).fit(X)
    p = model.predict_proba(X)
    near = feature_neighbors(X, 1)[:, 0].numpy()
    assert isinstance(model.report_, HeadReport) and model.report_.active == len(set(model.labels_))
    assert model.report_.disagreement == pytest.approx(-np.log((p * p[near]).sum(1)).mean() / np.log(4), rel=1e-6)
    np.testing.assert_allclose(model.report_.memberships, collapse_report(p), rtol=1e-5)
    before = Kept(4, **{**QUICK, "max_iter": 2}).fit(X)
    assert model.history_[-1]["churn"] == pytest.approx(churn(before.head_labels_[model.best_head_], model.labels_)) == model.report_.churn
    assert [r["step"] for r in model.history_] == [2, 4, 6]


def test_collapses_are_told():
    with pytest.warns(ConvergenceWarning, match="the head has collapsed.*near 1 means undecided"): model = TEMIHead(4, **{**QUICK, "init": "random", "temperature": 50.}).fit(X)
    assert model.report_.disagreement > .99 and float(model.head_losses_.mean()) == pytest.approx(-.8 * np.log(4) / 4, abs=1e-3)   # @eq-temi, undecided
    with pytest.warns(ConvergenceWarning, match="clusters are empty|has collapsed"): model = SCANHead(8, **{**QUICK, "entropy_weight": 0., "max_iter": 60, "hidden": 16, "lr": .05}).fit(X)
    assert model.report_.active < 8


def test_self_labelling_goes_on():
    plain, more = SCANHead(4, **QUICK).fit(X), SCANHead(4, **QUICK, self_label_iter=2, confidence=.5).fit(X)
    assert [r["phase"] for r in more.history_] == ["heads"] * 3 + ["self-labels"] * 2 and more.n_iter_ == 5
    assert np.array_equal(plain.head_losses_, more.head_losses_) and not torch.equal(plain.encoder_.weight, more.encoder_.weight)
    assert 0 < more.history_[-1]["sure"] <= 1


def test_one_cluster_and_few_rows():
    model = SCANHead(1, **QUICK).fit(X)
    assert not model.labels_.any() and model.report_.disagreement == pytest.approx(0, abs=1e-9)
    assert SCANHead(2, **QUICK).fit(X[:2]).labels_.shape == (2,)


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_sklearn(kind, tmp_path):
    model = kind(4, **QUICK).fit(X)
    model.save(tmp_path / "m.safetensors")
    back = kind.load(tmp_path / "m.safetensors")
    assert np.array_equal(back.predict_proba(X), model.predict_proba(X)) and back.history_ == model.history_ and back.report_ == model.report_ and back.get_params() == model.get_params()
    np.testing.assert_allclose(model.transform(X).sum(1), 1, atol=1e-6)
    assert list(model.get_feature_names_out()) == [f"{kind.__name__.lower()}{i}" for i in range(4)]
    assert find_clusterer(kind.__name__) is kind and make_clusterer(kind, 3).n_clusters == 3
    other = next(k for k in KINDS if k is not kind)
    with pytest.raises(ValueError, match=f"{other.__name__}.save wrote"): other.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [1, 4])
def test_interrupted(kind, call):
    class Stopped(kind):
        def _objective(self, run, net, a, b):
            if len(calls) == call: os.kill(os.getpid(), signal.SIGINT)
            calls.append(1)
            return super()._objective(run, net, a, b)
    calls = []
    model = Stopped(4, **{**QUICK, "max_iter": 40})
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): model.fit(X)
    assert np.array_equal(model.predict(X), model.labels_) and model.n_iter_ < 40


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_before_training(kind, tmp_path):
    "A second fit that ends before its first step leaves no mixture of two fits."
    class Stopped(kind):
        def _begin(self, run):
            if hasattr(self, "stop"): raise KeyboardInterrupt
            super()._begin(run)
    model = Stopped(4, **QUICK).fit(X)
    model.stop = True
    with pytest.raises(ValueError, match="n_clusters"): model.set_params(n_clusters=91).fit(X)
    assert np.array_equal(model.predict(X), model.labels_)                                       # refused arguments leave the old fit
    with pytest.raises(KeyboardInterrupt): model.set_params(n_clusters=4).fit(100 * X + 7)
    for call in (model.predict, model.predict_proba, model.transform):
        with pytest.raises(NotFittedError): call(X)
    with pytest.raises(NotFittedError): model.save(tmp_path / "m.safetensors")
    assert not hasattr(model, "labels_") and not hasattr(model, "head_labels_")
    del model.stop
    assert np.array_equal(model.fit(X).labels_, kind(4, **QUICK).fit(X).labels_)


@pytest.mark.parametrize("kind, name, value", [*((k, n, v) for k in KINDS for n, v in (("n_clusters", 91), ("n_clusters", 0), ("n_heads", 0), ("n_neighbors", 0), ("metric", "l1"), ("hidden", -1), ("max_iter", 0), ("lr", 0.), ("batch_size", 2.5))),
                                               *((SCANHead, n, v) for n, v in (("entropy_weight", -1.), ("self_label_iter", -1), ("confidence", 1.), ("dropout", -.1))),
                                               *((TEMIHead, n, v) for n, v in (("beta", 0.), ("momentum", 1.), ("temperature", 0.), ("init", "zero"), ("hidden", 3)))])
def test_bad_parameters(kind, name, value):
    with pytest.raises(ValueError, match=name): kind(**{"n_clusters": 4, **QUICK, name: value}).fit(X)


def test_bad_data():
    with pytest.raises(ValueError, match="all 9 rows of X are equal"): SCANHead(2, **QUICK).fit(np.ones((9, 3)))
