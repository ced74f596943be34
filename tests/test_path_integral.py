"""Path-integral clustering: increments by dense inverses, merges by brute force, the graph by scikit-learn's neighbours, invariances, parts without arrows, bad input."""
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning

from deepclustering.clustering.path_integral import DirectedGraph, directed_graph, path_increments, path_integral_clustering, transitions
from deepclustering.core.data import load_digits
from deepclustering.core.metrics import ari, cluster_accuracy

X = make_blobs(90, 6, centers=4, cluster_std=1., random_state=0)[0]


# --- reference implementations: loops and dense inverses ---


def dense(index, weight):
    return torch.zeros(len(index), len(index), dtype=torch.float64).scatter_(1, index, weight.double()).numpy()


def integral(P, inner, outer, z):
    "1' (I - z P_outer)^-1 1 over the inner points, by a dense inverse, over their number squared."
    inverse = np.linalg.inv(np.eye(len(outer)) - z * P[np.ix_(outer, outer)])
    at = [list(outer).index(i) for i in inner]
    return inverse[np.ix_(at, at)].sum() / len(inner) ** 2


def gain(P, a, b, z): return sum(integral(P, c, [*a, *b], z) - integral(P, c, c, z) for c in (a, b))


def merged(P, near, k, z):
    "Groups of nearest neighbours, then the best of all pairs again and again; a set of frozensets."
    groups = [{i} for i in range(len(P))]
    for i, j in enumerate(near):
        one, two = (next(g for g in groups if v in g) for v in (i, j))
        if one is not two: groups.remove(two); one |= two
    while len(groups) > k:
        a, b = max(((a, b) for i, a in enumerate(groups) for b in groups[:i]), key=lambda pair: gain(P, sorted(pair[0]), sorted(pair[1]), z))
        groups.remove(b); a |= b
    return {frozenset(g) for g in groups}


def partition(labels): return {frozenset(np.flatnonzero(np.asarray(labels) == l).tolist()) for l in np.unique(labels)}


# --- walks ---

@pytest.mark.parametrize("z", [.01, .3, .95])
def test_increments_by_dense_inverses(z):
    x = torch.randn(35, 2, generator=torch.Generator().manual_seed(1))
    index, weight = transitions(directed_graph(x, 4))
    P, labels = dense(index, weight), torch.arange(35) % 7
    pairs = torch.tensor([[0, 1], [6, 2], [3, 5], [1, 0]])
    want = [gain(P, *(np.flatnonzero(labels == g).tolist() for g in pair), z) for pair in pairs.tolist()]
    np.testing.assert_allclose(path_increments(index, weight, labels, pairs, z), want, rtol=1e-8, atol=1e-13)
    np.testing.assert_allclose(path_increments(index, weight.float(), labels, pairs, z), want, rtol=2e-4, atol=1e-13)
    assert len(path_increments(index, weight, labels, pairs[:0], z)) == 0
    assert path_increments(index, weight, labels + 1, torch.tensor([[0, 3]]), z).tolist() == [0]   # nobody is in group 0


def test_increments_find_nothing_without_a_way_back():
    chain = torch.tensor([[1], [2], [2]])
    assert float(path_increments(chain, torch.ones(3, 1, dtype=torch.float64), torch.arange(3), torch.tensor([[0, 1]]), .5)) == 0


@pytest.mark.parametrize("seed, z, k", [(0, .01, 2), (1, .01, 3), (2, .5, 2), (3, .9, 4)])
def test_clustering_by_brute_force(seed, z, k):
    x = torch.randn(24, 2, generator=torch.Generator().manual_seed(seed))
    graph = directed_graph(x, 5)
    want = merged(dense(*transitions(graph)), graph.index[:, 0].tolist(), k, z)
    assert partition(path_integral_clustering(x, k, n_neighbors=5, z=z, progress=False)) == want == partition(path_integral_clustering(graph, k, z=z))


def test_the_graph():
    from sklearn.neighbors import NearestNeighbors
    x = np.random.default_rng(0).normal(size=(300, 5))
    far, near = NearestNeighbors(n_neighbors=9).fit(x).kneighbors()
    graph = directed_graph(x, 9, .5)
    assert np.array_equal(graph.index, near)
    np.testing.assert_allclose(graph.sigma2, (far**2).mean() / 2, rtol=1e-10)
    np.testing.assert_allclose(graph.weight, np.exp(-(far**2) / graph.sigma2), rtol=1e-8)
    moved = directed_graph(torch.tensor(x * 7 + 1000), 9, .5)                                   # neither unit nor place matters
    assert torch.equal(moved.index, graph.index) and torch.allclose(moved.weight, graph.weight, rtol=1e-7)
    twins = directed_graph(np.repeat(x[:5], 3, 0), 2)                                           # the nearest are copies, never the point itself
    assert (twins.index // 3 == torch.arange(15)[:, None] // 3).all() and (twins.index != torch.arange(15)[:, None]).all() and (twins.weight == 1).all()


def test_clustering_in_any_order_and_unit():
    d = load_digits()
    x, y, order = d.X[:400], d.y[:400], np.random.default_rng(0).permutation(400)
    labels = path_integral_clustering(x, 10)
    assert isinstance(labels, np.ndarray) and labels[0] == 0 and set(labels) == set(range(10))
    assert ari(labels[order], path_integral_clustering(x[order], 10)) == 1
    assert ari(labels, path_integral_clustering(torch.tensor(x * 3. + 5), 10)) == 1
    assert np.array_equal(labels, path_integral_clustering(x, 10)) and cluster_accuracy(y, labels) > .7


def test_parts_without_arrows():
    parts = np.concatenate([np.random.default_rng(i).normal(size=(9, 2)) + 1000 * i for i in range(4)])
    with pytest.warns(ConvergenceWarning, match="1 merges joined groups without arrows"): three = path_integral_clustering(parts, 3, n_neighbors=4)
    assert [len(set(three[9 * i:9 * i + 9])) for i in range(4)] == [1] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        four = path_integral_clustering(parts, 4, n_neighbors=4)
    assert four.tolist() == [i // 9 for i in range(36)]


def test_a_way_back_that_only_the_union_has():
    "A and B have arrows both ways, A one to C, C one to B: C gains nothing with either, and with both together."
    index = torch.tensor([[1, 2], [0, 4], [3, 0], [2, 0], [5, 3], [4, 3]])
    graph = DirectedGraph(index, torch.ones(6, 2, dtype=torch.float64), 1.)
    P, z = dense(*transitions(graph)), .3
    assert gain(P, [0, 1], [4, 5], z) == pytest.approx(0, abs=1e-15) == gain(P, [2, 3], [4, 5], z) and gain(P, [0, 1, 2, 3], [4, 5], z) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert path_integral_clustering(graph, 1, z=z).tolist() == [0] * 6


@pytest.mark.parametrize("seed", range(12))
def test_sparse_graphs_by_brute_force(seed):
    "Two neighbours each: many pairs have arrows one way alone, and unions make new pairs."
    graph = directed_graph(torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)), 2)
    P, near = dense(*transitions(graph)), graph.index[:, 0].tolist()
    for k in (6, 4, 3):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            labels = path_integral_clustering(graph, k, z=.2)
        if not said: assert partition(labels) == merged(P, near, k, .2)


@pytest.mark.parametrize("text, call", [
    ("n_clusters must be between 1 and 90", lambda: path_integral_clustering(X, 91)), ("n_clusters must be between", lambda: path_integral_clustering(X, 0)), ("z must be", lambda: path_integral_clustering(X, 3, z=1)),
    ("z must be", lambda: path_integral_clustering(X, 3, z=-.1)), ("n_neighbors must be", lambda: path_integral_clustering(X, 3, n_neighbors=0)), ("scale must be", lambda: directed_graph(X, 3, -1.)),
    ("X must be finite", lambda: directed_graph(np.full((4, 2), np.nan))), ("X must have 2 dimensions", lambda: path_integral_clustering(X[0], 1)),
    ("z must be above 0", lambda: path_increments(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), torch.arange(2), torch.tensor([[0, 1]]), 1.))])
def test_bad_input(text, call):
    with pytest.raises(ValueError, match=text): call()
