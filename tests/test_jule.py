"""JULE: affinities by dense blocks, merges by brute force on sparse graphs and graphs full of ties, the loss by loops, a whole fit by hand, files, interruptions, scikit-learn's own checks."""
import os
import signal
import warnings
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclustering.clustering.jule import JULE, ClusterGraph, JULENet, agglomerate, graph_affinity, triplet_loss, unroll_schedule
from deepclustering.clustering.path_integral import DirectedGraph, directed_graph
from deepclustering.core.data import load_digits
from deepclustering.core.metrics import ari, cluster_accuracy
from deepclustering.core.training import epoch_order
from deepclustering.tool.cluster import find_clusterer, make_clusterer

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X, Y = make_blobs(90, 6, centers=4, cluster_std=1., random_state=0)
QUICK = dict(widths=(8,), code=4, n_neighbors=8, epochs=2, batch_size=30, device="cpu", random_state=0, progress=False)
FLOAT32 = {"check_methods_subset_invariance": "the network computes in float32, whose sums depend on the size of the batch"}


# --- reference: exact fractions, all affinities anew for each merge ---

def random_graph(n, K, seed, levels=(1,)):
    "K arrows from each point to others that are drawn, with weights from a few levels: asymmetric, and full of ties."
    rng = np.random.default_rng(seed)
    index = np.stack([rng.permutation(np.delete(np.arange(n), i))[:K] for i in range(n)])
    return DirectedGraph(torch.as_tensor(index), torch.as_tensor(rng.choice(levels, (n, K)).astype(float)), 1.)


def fractions(graph):
    return {(i, j): Fraction(w) for i, (row, weights) in enumerate(zip(graph.index.tolist(), graph.weight.tolist())) for j, w in zip(row, weights)}


def affinity(W, C, D):
    "1' W_CD W_DC 1 / |C|^2 + 1' W_DC W_CD 1 / |D|^2, by its definition."
    def ways(a, b): return sum(W[i, j] * W[j, k] for i in a for j in b if (i, j) in W for k in a if (j, k) in W)
    return ways(C, D) / len(C) ** 2 + ways(D, C) / len(D) ** 2


def rate(row, n_nearest, local_weight):
    "The rating of a group from its affinities with all others."
    top = sorted(row, reverse=True)[:n_nearest]
    return top[0] + (Fraction(local_weight) * sum(top[0] - a for a in top[1:]) / (len(top) - 1) if len(top) > 1 else 0)


@pytest.mark.parametrize("K, levels, n_nearest, local_weight", [(1, (1,), 5, 1), (2, (1,), 5, 1), (2, (1, .5), 3, 0), (3, (1, .5, .25), 5, 1), (3, (1,), 1, 1), (5, (.5, .25, .125), 4, 2), (2, (1, 0), 30, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_every_merge_by_fractions(seed, K, levels, n_nearest, local_weight):
    "Weights are powers of two, so that sums are exact in floats too; ratings may differ in their last digits, so the pair must be one of those with the best rating."
    graph = random_graph(18, K, seed, levels)
    W, kept, groups = fractions(graph), ClusterGraph(graph, np.arange(18), n_nearest, local_weight), {i: [i] for i in range(18)}
    while len(groups) > 1:
        A = {c: {d: affinity(W, groups[c], groups[d]) for d in groups if d != c} for c in groups}
        for c in groups:
            assert {d: v for d, v in kept.near[c].items() if v} == pytest.approx({d: float(v) for d, v in A[c].items() if v}, rel=1e-12)
            assert kept.rating[c] == pytest.approx(float(rate(A[c].values(), n_nearest, local_weight)), rel=1e-12)
        best = max(rate(A[c].values(), n_nearest, local_weight) for c in groups)
        pair = kept.best_pair()
        if pair is None:
            assert not any(v for row in A.values() for v in row.values())
            pair = tuple(sorted(groups)[:2])                                                     # go on, with parts joined
        else:
            ends = [c for c, d in (pair, pair[::-1]) if A[c][d] == max(A[c].values()) and rate(A[c].values(), n_nearest, local_weight) == best]
            assert ends and pair[0] < pair[1]
        kept.merge(*pair)
        groups[pair[0]] += groups.pop(pair[1])
        assert [kept.sizes[c] for c in groups] == [len(g) for g in groups.values()] and kept.left == len(groups)
        assert [kept.group[i] for i in range(18)] == [next(c for c, g in groups.items() if i in g) for i in range(18)]


@pytest.mark.parametrize("seed, K", [(0, 2), (1, 2), (2, 3), (3, 4), (4, 8), (5, 29)])
def test_clustering_by_brute_force(seed, K):
    "Random points: no ties, every merge is determined."
    graph = directed_graph(torch.randn(30, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), K)
    W = np.zeros((30, 30)); np.put_along_axis(W, graph.index.numpy(), graph.weight.numpy(), 1)
    for n_nearest, local_weight in ((5, 1.), (2, 0.), (4, 3.)):
        groups, k = [], 3
        for i, j in enumerate(graph.index[:, 0].tolist()):                                       # every point with its nearest neighbour
            mine = [g for g in groups if i in g or j in g]
            groups = [g for g in groups if g not in mine] + [sorted({i, j}.union(*mine))]
        groups.sort()
        def A(C, D): a, b = W[np.ix_(C, D)], W[np.ix_(D, C)]; return (a @ b).sum() / len(C) ** 2 + (b @ a).sum() / len(D) ** 2
        while len(groups) > k:
            table = np.array([[A(c, d) if c is not d else -1 for d in groups] for c in groups])
            if table.max() <= 0: break
            top = -np.sort(-table, 1)[:, :min(n_nearest, len(groups) - 1)]
            r = top[:, 0] + (local_weight * (top[:, :1] - top[:, 1:]).mean(1) if top.shape[1] > 1 else 0)
            c, d = groups[(i := int(r.argmax()))], groups[int(table[i].argmax())]
            groups = sorted([g for g in groups if g is not c and g is not d] + [sorted(c + d)])
        if len(groups) > k: continue
        labels = agglomerate(graph, None, k, n_nearest=n_nearest, local_weight=local_weight)
        assert [np.flatnonzero(labels == c).tolist() for c in range(k)] == groups


def test_a_way_back_that_only_the_union_has():
    "A and B have arrows both ways, A one to C, C one to B: C gains nothing with either, and with both together. The program's shortcut has 0 here."
    graph = DirectedGraph(torch.tensor([[1, 2], [0, 4], [3, 0], [2, 0], [5, 3], [4, 3]]), torch.ones(6, 2, dtype=torch.float64), 1.)
    assert graph_affinity(graph, [0, 0, 1, 1, 2, 2])[2].tolist() == [0, 0, 0] and float(graph_affinity(graph, [0, 0, 0, 0, 1, 1])[0, 1]) == 1 / 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agglomerate(graph, None, 1).tolist() == [0] * 6


def test_affinities_in_any_order_and_copies():
    graph = directed_graph(torch.as_tensor(X), 7)
    labels = np.random.default_rng(0).integers(0, 6, 90)
    A = graph_affinity(graph, labels)
    assert torch.equal(A, A.T) and (A.diagonal() == 0).all() and (A >= 0).all()
    names = np.array([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(graph_affinity(graph, names[labels])[names][:, names], A)
    order = np.random.default_rng(1).permutation(90)
    again = directed_graph(torch.as_tensor(X[order]), 7)
    torch.testing.assert_close(graph_affinity(again, labels[order]), A)
    found = agglomerate(graph, None, 4)
    assert ari(found[order], agglomerate(again, None, 4)) == 1 and ari(found, agglomerate(directed_graph(torch.as_tensor(X * 3 + 9), 7), None, 4)) == 1
    assert found[0] == 0 and found.unique().tolist() == [0, 1, 2, 3] and ari(found, Y) > .9
    torch.testing.assert_close(graph_affinity(graph._replace(weight=graph.weight.float()), labels), A, rtol=1e-5, atol=1e-9)


def test_digits():
    d = load_digits()
    labels = agglomerate(directed_graph(torch.as_tensor(d.X)), None, 10)
    assert cluster_accuracy(d.y, labels) > .85


def test_lonely_groups_are_adopted():
    "A pair that nobody links back to ends alone, or with the group whose mean is nearest."
    rng = np.random.default_rng(0)
    points = torch.as_tensor(np.concatenate([rng.normal(size=(40, 2)), rng.normal(size=(40, 2)) + 9, [[2.5, 40.], [2.6, 40.]]]))
    graph = directed_graph(points, 5)
    assert np.bincount(agglomerate(graph, None, 3)).tolist() == [40, 40, 2]
    labels = agglomerate(graph, None, 2, points=points)
    assert labels.tolist() == [0] * 40 + [1] * 42
    apart = torch.cat([points[:40] + 1000 * i for i in range(3)])
    with pytest.warns(ConvergenceWarning, match="1 merges joined groups without ways"): agglomerate(directed_graph(apart, 5), None, 2)


@pytest.mark.parametrize("groups, k, eta, want", [(100, 10, .9, [10]), (1000, 10, .9, [100, 10]), (20, 17, .1, [18, 17]), (5, 5, .9, []), (3, 5, .9, []), (7, 1, 1., [1]), (10, 1, .2, [8, 6, 4, 3, 2, 1])])
def test_the_schedule(groups, k, eta, want):
    assert unroll_schedule(groups, k, eta) == want


# --- the loss ---

@pytest.mark.parametrize("gamma, margin, near", [(1., .2, None), (2., .9, None), (1.5, .4, 1), (1., .5, 2)])
def test_the_loss_by_loops(gamma, margin, near):
    rng = np.random.default_rng(0)
    z, y = torch.as_tensor(rng.normal(size=(20, 3))), torch.as_tensor(np.sort(rng.integers(0, 6, 20)))
    u = z / z.norm(dim=1, keepdim=True)
    def d2(i, j): return float(((u[i] - u[j]) ** 2).sum())
    costs = []
    for i, j in combinations(range(20), 2):
        if y[i] != y[j]: continue
        mine = (y == y[i]).nonzero()[:, 0].tolist()
        gaps = {int(c): np.mean([d2(a, b) for a in mine for b in (y == c).nonzero()[:, 0].tolist()]) for c in y.unique() if c != y[i]}
        allowed = sorted(gaps, key=gaps.get)[:near]
        costs.append([max(0., gamma * d2(i, j) - d2(i, l) + margin) for l in range(20) if int(y[l]) in allowed])
    assert float(triplet_loss(5 * z, y, margin, gamma, n_negatives=99, n_near=near)) == pytest.approx(np.mean(sum(costs, [])), rel=1e-10)
    torch.manual_seed(0)
    few = [float(triplet_loss(z, y, margin, gamma, n_negatives=1, n_near=near)) for _ in range(200)]
    assert abs(np.mean(few) - np.mean([np.mean(c) for c in costs])) < 6 * np.std(few) / 200 ** .5 + 1e-9             # one row for each pair


# --- the estimator ---

@parametrize_with_checks([JULE(widths=(4,), code=3, epochs=1, device="cpu")], expected_failed_checks=lambda estimator: FLOAT32)
def test_estimator_checks(estimator, check):
    check(estimator)


def network():
    "In float64, without normalisation over the batch."
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()


@pytest.mark.parametrize("rerun", [True, False])
def test_a_fit_by_hand(rerun):
    "Whole batches and all negatives: a fit is a matter of arithmetic. SGD with momentum is written out."
    settings = dict(encoder=network(), n_neighbors=6, unroll=.6, epochs=3, batch_size=1000, n_negatives=1000, lr=.3, momentum=.5, weight_decay=.01, margin=.4, gamma=1.5, n_nearest=3, local_weight=2., random_state=3, progress=False, device="cpu")
    model, net, step = JULE(4, rerun=rerun, **settings).fit(X), network(), 0
    x = torch.as_tensor((X - X.min()) / (X.max() - X.min()))
    graph = directed_graph(x, 6)
    labels = agglomerate(graph, None, int(graph_affinity(graph, model.period_labels_[0]).shape[0]))                # no merge: the first groups
    assert np.array_equal(labels, model.period_labels_[0]) and all(labels[i] == labels[int(graph.index[i, 0])] for i in range(90))
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(3)))
    speed, periods = [None] * 4, unroll_schedule(int(labels.max()) + 1, 4, .6)
    assert len(periods) > 1
    for p, left in enumerate(periods, 1):
        for epoch in range(3):
            order = epoch_order(90, seed + p, epoch)                                                              # of a pair the row that comes first in the batch is compared with rows of other groups
            of, z = labels[order], net(x[order]); z = z / z.norm(dim=1, keepdim=True)
            D = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square()
            loss = torch.cat([(1.5 * D[i, j] - D[i, of != of[i]] + .4).clamp_min(0) for i, j in combinations(range(90), 2) if of[i] == of[j]]).mean()
            for s, (w, g) in enumerate(zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())))):
                g = g + .01 * w.detach()
                speed[s] = g if speed[s] is None else .5 * speed[s] + g
                with torch.no_grad(): w -= .3 * (1 + step / 10_000) ** -.75 * speed[s]
            step += 1
        z = F.normalize(net(x).detach())
        labels = agglomerate(directed_graph(z, 6), labels, left, n_nearest=3, local_weight=2.)
        assert np.array_equal(labels, model.period_labels_[p])
    if rerun: labels = agglomerate(directed_graph(z, 6), None, 4, n_nearest=3, local_weight=2.)
    np.testing.assert_allclose(model.embedding_, z, atol=1e-9)
    assert np.array_equal(model.labels_, labels) and model.n_iter_ == step == 3 * len(periods) and len(model.period_labels_) == len(periods) + 1
    np.testing.assert_allclose(model.cluster_centers_, [z[labels == c].mean(0).numpy() for c in range(4)], atol=1e-9)
    assert np.array_equal(model.predict(X), np.linalg.norm(model.embedding_[:, None] - model.cluster_centers_, axis=2).argmin(1))
    assert [r["groups"] for r in model.history_ if r["phase"] == "groups"] == [int(model.period_labels_[0].max()) + 1, *periods]
    assert [r["step"] for r in model.history_ if r["phase"] == "groups"] == [3 * p for p in range(len(periods) + 1)] and {r["phase"] for r in model.history_} == {"groups", *(f"period {p + 1}" for p in range(len(periods)))}


def test_clusters_are_found():
    model = JULE(4, **{**QUICK, "widths": (32,), "code": 8, "epochs": 10}).fit(X)
    assert ari(Y, model.labels_) > .9 and ari(Y, model.predict(X)) > .9 and model.report_.active == 4
    same, other = clone(model).fit(X), JULE(4, **{**QUICK, "random_state": 1}).fit(X)
    assert np.array_equal(same.embedding_, model.embedding_) and not np.array_equal(other.embedding_, JULE(4, **QUICK).fit(X).embedding_)
    tensor = clone(model).fit(torch.tensor(X))
    assert all(isinstance(t, torch.Tensor) for t in (tensor.predict(torch.tensor(X)), tensor.labels_, tensor.period_labels_)) and np.array_equal(tensor.labels_, model.labels_)
    new = make_blobs(400, 6, centers=4, cluster_std=1., random_state=0)
    assert ari(new[1], model.predict(new[0])) > .85


def test_images_in_every_form():
    d = load_digits()
    x, few = d.images[:120], dict(QUICK, channels=(3,), epochs=1)
    models = [JULE(5, **few).fit(x), JULE(5, **few).fit(x[:, None]), JULE(5, image_shape=(8, 8), **few).fit(d.X[:120]), JULE(5, image_shape=(1, 8, 8), **few).fit(torch.tensor(x))]
    for m in models:
        assert m.encoder_.config["shape"] == [1, 8, 8] and m.n_features_in_ == 64 and np.array_equal(m.labels_, models[0].labels_) and np.array_equal(np.asarray(m.predict(torch.tensor(x))), np.asarray(models[0].predict(x)))
    first = directed_graph(F.normalize(torch.tensor(d.X[:120])), 8).index[:, 0]
    assert (models[0].period_labels_[0] == models[0].period_labels_[0][first]).all()                             # of pixels of length one
    colour = JULE(2, **few).fit(np.random.default_rng(0).random((20, 3, 8, 9)))
    assert colour.encoder_.shape == (3, 8, 9)
    given = JULENet((1, 8, 8), (2,), code=3)
    before = {k: v.clone() for k, v in given.state_dict().items()}
    JULE(5, encoder=given, **few).fit(x)
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items())                                 # a copy was trained


def test_files_and_sklearn(tmp_path):
    model = JULE(4, **QUICK).fit(X)
    model.save(tmp_path / "m.safetensors")
    back = JULE.load(tmp_path / "m.safetensors")
    assert np.array_equal(back.transform(X), model.transform(X)) and back.history_ == model.history_ and back.report_ == model.report_ and np.array_equal(back.period_labels_, model.period_labels_) and back.get_params() == model.get_params()
    own = JULE(4, encoder=torch.nn.Linear(6, 3), **QUICK).fit(X)
    own.save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="encoder must be given"): JULE.load(tmp_path / "own.safetensors")
    assert np.array_equal(JULE.load(tmp_path / "own.safetensors", encoder=torch.nn.Linear(6, 3)).predict(X), own.predict(X))
    assert list(model.get_feature_names_out()) == [f"jule{i}" for i in range(4)]
    assert find_clusterer("jule") is JULE and make_clusterer(JULE, 3).n_clusters == 3
    with pytest.raises(ValueError, match="X has 5 features"): model.predict(X[:, :5])


@pytest.mark.parametrize("rerun, call", [(True, 1), (True, 9), (False, 2)])
def test_interrupted(rerun, call):
    "While the network learns, in the first period and later."
    class Stopped(JULE):
        def _loss(self, net, batch):
            if len(calls) == call: os.kill(os.getpid(), signal.SIGINT)
            calls.append(1)
            return super()._loss(net, batch)
    calls = []
    model = Stopped(4, rerun=rerun, **{**QUICK, "unroll": .5})
    with pytest.warns(UserWarning, match="Stopped was interrupted"), pytest.raises(KeyboardInterrupt): model.fit(X)
    assert model.n_iter_ == call + 1 == len(calls) and len(np.unique(model.labels_)) == 4 and model.embedding_.shape == (90, 4)
    np.testing.assert_allclose(model.embed(X), model.embedding_, atol=1e-6)
    assert model.predict(X).shape == (90,) and model.period_labels_.shape[1] == 90


def test_interrupted_between(monkeypatch):
    "While groups are merged: the labels before that period stand; and before there are any."
    import deepclustering.clustering.jule as jule
    for name, at, kept in (("agglomerate", 1, 2), ("_first_groups", 0, 0)):
        real, calls = getattr(jule, name), []

        def stopping(*args, **keywords):
            calls.append(1)
            if len(calls) == at + 1: raise KeyboardInterrupt
            return real(*args, **keywords)
        with monkeypatch.context() as patch:
            patch.setattr(jule, name, stopping)
            model = JULE(4, **{**QUICK, "unroll": .5})
            with pytest.warns(UserWarning, match="JULE was interrupted"), pytest.raises(KeyboardInterrupt): model.fit(X)
        assert len(model.period_labels_) == kept and len(np.unique(model.labels_)) == 4 and model.n_iter_ == (12 if kept else 0)


def test_a_collapse_is_told():
    net = torch.nn.Linear(6, 3)
    with torch.no_grad(): net.weight.mul_(1e-9); net.bias.fill_(1.)
    with pytest.warns(ConvergenceWarning, match="codes have collapsed"): model = JULE(4, encoder=net, **{**QUICK, "lr": 1e-12}).fit(X)
    assert model.report_.collapsed


@pytest.mark.parametrize("name, value", [("n_clusters", 91), ("n_clusters", 0), ("encoder", "cnn"), ("encoder", torch.nn.Tanh()), ("image_shape", (2, 4)), ("n_neighbors", 0), ("scale", 0.), ("n_nearest", 0), ("local_weight", -1.), ("unroll", 0.), ("unroll", 1.01), ("epochs", -1), ("epochs", 1.5),
                                         ("margin", np.nan), ("gamma", 0.), ("n_negatives", 0), ("n_near", 0), ("lr", 0.), ("momentum", 1.), ("momentum", -.1), ("weight_decay", -1.), ("batch_size", 2), ("widths", (0,)), ("code", 0)])
def test_bad_parameters(name, value):
    with pytest.raises(ValueError, match=name): JULE(**{"n_clusters": 4, **QUICK, name: value}).fit(X)


def test_bad_data():
    with pytest.raises(ValueError, match="all 9 rows of X are equal"): JULE(2, **QUICK).fit(np.ones((9, 3)))
    with pytest.raises(ValueError, match="NaN"): JULE(2, **QUICK).fit(np.full((9, 3), np.nan))
    with pytest.raises(ValueError, match="channels: convolution 1 needs sides"): JULE(2, **QUICK).fit(np.random.default_rng(0).random((9, 4, 4)))
    assert JULE(1, **QUICK).fit(np.ones((1, 3))).labels_.tolist() == [0] and JULE(4, **QUICK).fit(np.eye(4)).labels_.tolist() == [0, 1, 2, 3]
    for n in (2, 3, 4, 31): assert len(np.unique(JULE(2, **QUICK).fit(np.random.default_rng(n).normal(size=(n, 3))).labels_)) == 2
