"""`SDPKMeans`, `LikelihoodAdjustedSDP` and their programs: scikit-learn's own checks, cvxpy's optima, brute force over partitions, KKT conditions, bad input."""
import json
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from sdp_oracle import problem
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclustering.clustering import (LikelihoodAdjustedSDP, SDPKMeans, dual_bound, equality_matrices, equality_multipliers, equality_totals, gaussian_affinity, kmeans_affinity,
                                       membership_covariances, membership_matrices, partition_certificate, positive_part, round_membership, rounded_steps, sdp_steps, solve_sdp)
from deepclustering.core.metrics import ari

ORACLE = json.loads((Path(__file__).parent / "sdp_oracle.json").read_text())


def points(n, d, seed): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups(n, k, d, delta, seed):
    truth = torch.arange(n) % k
    return points(n, d, seed) + delta * torch.eye(k, d, dtype=torch.float64)[truth], truth


def inertia(x, labels): return sum(float((x[labels == c] - x[labels == c].mean(0)).square().sum()) for c in labels.unique())


def partitions(n, k): return [torch.tensor(l) for l in product(range(k), repeat=n) if l[0] == 0 and len(set(l)) == k]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([SDPKMeans(3, max_iter=25, device="cpu"), LikelihoodAdjustedSDP(2, max_iter=25, max_turns=1, device="cpu")])
def test_estimator_checks(estimator, check):
    check(estimator)


# --- other solvers --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", ORACLE, ids=lambda c: f"{c['program']}-{c['n']}-{c['k']}")
def test_the_optimum_is_that_of_cvxpy(case):
    x, C = problem(*(case[name] for name in "nkd"), case["seed"])
    x, C = torch.tensor(x), torch.tensor(C)
    A, traces = (kmeans_affinity(x), [float(case["k"])]) if case["program"] == "kmeans" else (gaussian_affinity(x, C), [1.0] * case["k"])
    s = solve_sdp(A, traces, tol=1e-6, max_iter=5000)
    assert case["scs"] == pytest.approx(case["clarabel"], rel=1e-6)
    assert s.value == pytest.approx(case["clarabel"], rel=2e-4)
    assert s.bound >= case["clarabel"] * (1 + 1e-7 * np.sign(-case["clarabel"])) - 1e-6 and s.bound == pytest.approx(case["clarabel"], rel=2e-4)


@pytest.mark.parametrize("m, n, traces", [(1, 15, [2.0]), (1, 9, [3.5]), (2, 12, [1.0, 1.0]), (3, 10, [1.0, 2.0, 0.5]), (1, 2, [1.0]), (1, 7, [7.0])])
def test_kkt_conditions(m, n, traces):
    "Any symmetric affinities, any traces: allowed, dual feasible, complementary. Together they are optimality, whoever computed them."
    A = points(m * n, n, 3).view(m, n, n)
    A, t = A + A.mT, torch.tensor(traces).double()
    s = solve_sdp(A, traces, tol=1e-7, max_iter=8000)
    scale = float(A.abs().max()) * n
    rows, trace = equality_totals(s.Z)
    assert (rows - 1).abs().max() < 1e-4 and (trace - t).abs().max() < 1e-4
    assert s.Z.min() > -1e-4 and torch.linalg.eigvalsh(s.Z).min() > -1e-4
    R = A + s.N - (s.y[:, None] + s.y) / 2
    S = torch.linalg.eigvalsh(R)[:, -1, None, None] * torch.eye(n).double() - R
    assert s.N.min() >= 0 and torch.linalg.eigvalsh(S).min() > -1e-9 * scale
    assert abs(float((s.N * s.Z).sum())) < 1e-4 * scale and abs(float((S * s.Z).sum())) < 1e-4 * scale
    assert s.bound - s.value == pytest.approx(0, abs=1e-4 * scale) and torch.equal(s.Z, s.Z) and not s.Z.requires_grad


@pytest.mark.parametrize("n, k", [(6, 2), (7, 3), (8, 2)])
def test_every_partition_is_above_the_bound(n, k):
    for seed in range(3):
        x = points(n, 2, seed)
        every = [inertia(x, l) for l in partitions(n, k)]
        s = solve_sdp(kmeans_affinity(x), [float(k)], tol=1e-6, max_iter=4000)
        assert -s.bound <= min(every) + 1e-9
        m = SDPKMeans(k, random_state=0, tol=1e-6, max_iter=4000).fit(x)
        assert m.lower_bound_ <= min(every) + 1e-9 <= m.inertia_ + 2e-9
        if m.gap_ < 1e-6: assert m.inertia_ == pytest.approx(min(every), rel=1e-6)


def test_the_certificate_never_lies():
    "Over all partitions of random points: a bound equal to the own inertia occurs only at the best partition, and every bound is below it."
    proved = 0
    for seed in range(6):
        x, _ = groups(7, 2, 3, 2.0 + seed, seed)
        A, every = kmeans_affinity(x), partitions(7, 2)
        least = min(inertia(x, l) for l in every)
        for l in every:
            bound = -dual_bound(A, *partition_certificate(A, l), torch.tensor([2.0]).double())
            assert bound <= least + 1e-9
            proved += bound > inertia(x, l) - 1e-9
    assert proved >= 3


@pytest.mark.parametrize("n, k, d", [(30, 2, 2), (60, 3, 5), (90, 6, 6)])
def test_far_clusters_are_found_and_proved(n, k, d):
    for seed in range(2):
        x, truth = groups(n, k, d, 12.0, seed)
        m = SDPKMeans(k, random_state=seed).fit(x)
        assert ari(truth, m.labels_) == 1 and m.gap_ < 1e-4 and m.inertia_ == pytest.approx(inertia(x, truth))
        assert torch.allclose(m.membership_, membership_matrices(truth, k).sum(0))
        assert torch.allclose(m.membership_ @ x, m.cluster_centers_[m.labels_])


# --- properties -----------------------------------------------------------------------------------------------------------

def test_the_linear_system_of_the_equalities_against_a_dense_solver():
    n, m = 5, 3
    columns = [torch.cat(equality_totals(equality_matrices(e[:n], e[n:]))) for e in torch.eye(n + m).double()]
    want = torch.linalg.solve(torch.stack(columns, 1), torch.arange(n + m).double())
    assert torch.allclose(torch.cat(equality_multipliers(*torch.arange(n + m).double().split([n, m]))), want)


def test_positive_part_is_a_projection():
    M = points(12, 6, 0).view(2, 6, 6); M = M + M.mT
    P = positive_part(M)
    assert torch.allclose(positive_part(P), P) and torch.allclose(positive_part(-M), P - M)


def test_moving_turning_and_scaling_the_points():
    x, _ = groups(24, 3, 3, 3.0, 0)
    Q = torch.linalg.qr(points(3, 3, 1))[0]
    a = solve_sdp(kmeans_affinity(x), [3.0], tol=1e-6)
    for y, factor in ((x + 1e4, 1), (x @ Q, 1), (1e3 * x, 1e6), (1e-3 * x, 1e-6)):
        b = solve_sdp(kmeans_affinity(y), [3.0], tol=1e-6)
        assert b.value == pytest.approx(factor * a.value, rel=1e-4) and b.n_iter == pytest.approx(a.n_iter, abs=50)


def test_permuted_points_permute_the_memberships():
    x, _ = groups(24, 3, 3, 6.0, 0)
    p = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    a, b = (SDPKMeans(3, random_state=0).fit(z) for z in (x, x[p]))
    assert torch.allclose(a.membership_[p][:, p], b.membership_, atol=1e-3) and ari(a.labels_[p], b.labels_) == 1


def test_equal_covariances_are_k_means():
    x, _ = groups(18, 3, 3, 2.0, 0)
    a = solve_sdp(kmeans_affinity(x), [3.0], tol=1e-5)
    b = solve_sdp(gaussian_affinity(x, torch.eye(3).expand(3, 3, 3)), [1.0] * 3, tol=1e-5)
    assert b.value == pytest.approx(a.value / 2, rel=1e-3)


@pytest.mark.parametrize("reg", [0.0, 0.2])
def test_affinity_is_the_likelihood_of_scikit_learn(reg):
    x = points(30, 3, 0); labels = torch.arange(30) % 2
    Z = membership_matrices(labels, 2)
    C = membership_covariances(x, Z, reg)
    gm = GaussianMixture(1)
    log_likelihood = 0
    for c in range(2):
        gm.weights_, gm.means_, gm.covariances_ = np.ones(1), x[labels == c].mean(0).numpy()[None], C[c].numpy()[None]
        gm.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(C[c].numpy()))[None]
        log_likelihood += gm.score_samples(x[labels == c].numpy()).sum() - 15 * reg * np.trace(np.linalg.inv(C[c])) / 2
    assert float((gaussian_affinity(x, C, reg) * Z).sum()) - 30 * 3 * np.log(2 * np.pi) / 2 == pytest.approx(log_likelihood)


def test_turns_find_clusters_that_inertia_cannot():
    "Two long thin clusters side by side: k-means cuts them across."
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2)) * [6, .3] + np.repeat([[0, 0], [0, 3]], 30, 0)
    truth = np.repeat([0, 1], 30)
    across = SDPKMeans(2, tol=1e-3, random_state=0).fit_predict(x)
    m = LikelihoodAdjustedSDP(2, random_state=0, init=np.where(rng.uniform(size=60) < .25, 1 - truth, truth)).fit(x)
    assert ari(truth, across) < .5 and ari(truth, m.labels_) == 1
    assert np.diff(m.history_).min(initial=0) > -.3 and m.gap_ < .05
    for c in range(2): np.testing.assert_allclose(m.covariances_[c], np.cov(x[m.labels_ == c].T, bias=True) + 1e-6 * np.eye(2), rtol=1e-6)
    assert np.argmax(m.membership_.sum(2), 0).tolist() == m.labels_.tolist()  # cluster c is matrix c


def test_a_warm_start_saves_steps():
    A = kmeans_affinity(groups(40, 3, 3, 3.0, 0)[0])
    cold = solve_sdp(A, [3.0], tol=1e-4)
    assert solve_sdp(A, [3.0], tol=1e-4, start=cold).n_iter < cold.n_iter


def test_states_are_shown_as_asked():
    A = kmeans_affinity(points(12, 2, 0))
    assert [s.n_iter for s in sdp_steps(A, [2.0], max_iter=23, tol=0.0, every=10)] == [10, 20, 23]


def test_rounding_counts_clusters():
    for k in (1, 2, 5):
        labels = torch.arange(20) % k
        assert ari(labels, round_membership(membership_matrices(labels, k).sum(0), k, 0)) == 1


# --- edges ----------------------------------------------------------------------------------------------------------------

def test_one_cluster_and_one_each():
    x = points(9, 2, 0)
    one, each = SDPKMeans(1).fit(x), SDPKMeans(9).fit(x)
    assert one.inertia_ == pytest.approx(inertia(x, torch.zeros(9))) and one.gap_ == 0 and torch.allclose(one.membership_, torch.full((9, 9), 1 / 9).double())
    assert each.inertia_ == 0 == each.gap_ and sorted(each.labels_.tolist()) == list(range(9))
    assert SDPKMeans(1).fit(x[:1]).labels_.tolist() == [0] == LikelihoodAdjustedSDP(1).fit(x[:1]).labels_.tolist()


def test_equal_points_and_duplicates():
    m = SDPKMeans(3, random_state=0).fit(np.ones((8, 2)))
    assert m.inertia_ == 0 == m.gap_ and np.isfinite(m.membership_).all()
    x = np.repeat([[0.0], [5.0]], 4, 0)
    m = SDPKMeans(2, random_state=0).fit(x)
    assert m.inertia_ == pytest.approx(0, abs=1e-12) and len(set(m.labels_[:4])) == len(set(m.labels_[4:])) == 1 != len(set(m.labels_))


def test_tensors_in_tensors_out_and_input_unchanged():
    x = groups(20, 2, 3, 5.0, 0)[0].float(); before = x.clone()
    for m in (SDPKMeans(2, random_state=0).fit(x), LikelihoodAdjustedSDP(2, random_state=0, reg_covar=1e-3).fit(x)):
        assert all(isinstance(v, torch.Tensor) for v in (m.labels_, m.cluster_centers_, m.membership_)) and m.membership_.dtype == torch.float64
    assert torch.equal(x, before)
    assert SDPKMeans(2, random_state=0).fit(x.numpy()).labels_.tolist() == SDPKMeans(2, random_state=0).fit(x).labels_.tolist()


def test_an_unfinished_solver_says_so_and_its_bound_still_holds():
    x = groups(40, 3, 2, 2.0, 0)[0]
    with pytest.warns(ConvergenceWarning, match="max_iter=10"): m = SDPKMeans(3, max_iter=10, random_state=0).fit(x)
    best = SDPKMeans(3, random_state=0).fit(x)
    assert 0 <= m.lower_bound_ <= best.inertia_ and m.gap_ > best.gap_
    with pytest.warns(ConvergenceWarning, match="max_turns=1"): LikelihoodAdjustedSDP(3, max_turns=1, random_state=0).fit(x)


@pytest.mark.parametrize("when", [1, 2])
def test_an_interruption_leaves_the_best_state(monkeypatch, when):
    import deepclustering.clustering.sdp as module
    def stopped(*args, **kwargs):
        for i, step in enumerate(steps(*args, **kwargs)):
            if i == when: raise KeyboardInterrupt
            yield step
    steps, x = module.rounded_steps, groups(40, 3, 2, 2.0, 0)[0]
    monkeypatch.setattr(module, "rounded_steps", stopped)
    m = SDPKMeans(3, random_state=0)
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): m.fit(x)
    assert m.n_iter_ == 25 * when and m.lower_bound_ <= m.inertia_ and len(m.labels_) == 40


def test_an_interruption_keeps_the_last_turn(monkeypatch):
    import deepclustering.clustering.likelihood_sdp as module
    calls, solve = [], module.solve_sdp
    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return solve(*args, **kwargs)
    monkeypatch.setattr(module, "solve_sdp", stopped)
    m = LikelihoodAdjustedSDP(2, random_state=0, reg_covar=1e-3)
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): m.fit(groups(24, 2, 2, 3.0, 0)[0])
    assert m.n_iter_ == 1 and len(m.labels_) == 24


# --- bad input ------------------------------------------------------------------------------------------------------------

X = groups(24, 3, 3, 4.0, 0)[0].numpy()


@pytest.mark.parametrize("bad, argument", [
    (dict(n_clusters=0), "n_clusters"), (dict(n_clusters=25), "n_samples=24"), (dict(n_clusters=2.5), "n_clusters"), (dict(tol=0), "tol"), (dict(tol=float("nan")), "tol"),
    (dict(max_iter=0), "max_iter"), (dict(max_memory=-1), "max_memory"), (dict(max_memory=1e-6), "GiB"), (dict(device="gpu"), "device"), (dict(random_state=-1), "random_state")])
@pytest.mark.parametrize("estimator", [SDPKMeans, LikelihoodAdjustedSDP])
def test_bad_parameters_name_the_argument(estimator, bad, argument):
    with pytest.raises(ValueError, match=argument): estimator(**{"n_clusters": 3, **bad}).fit(X)


@pytest.mark.parametrize("bad, argument", [(dict(init="best"), "init"), (dict(init=[0, 1]), "init"), (dict(init=np.full(24, 3)), "init"), (dict(init=np.full(24, .5)), "init"),
                                           (dict(reg_covar=-1), "reg_covar"), (dict(reg_covar=0, init=np.r_[np.zeros(22), 1, 2]), "reg_covar"), (dict(max_turns=0), "max_turns")])
def test_bad_parameters_of_the_turns(bad, argument):
    with pytest.raises(ValueError, match=argument): LikelihoodAdjustedSDP(3, **bad).fit(X)


def test_too_many_points_are_refused_before_any_work():
    with pytest.raises(ValueError, match=r"30000 rows.*GiB.*fit at most \d+ rows"): SDPKMeans(8).fit(np.zeros((30_000, 2)))


@pytest.mark.parametrize("A, traces, argument", [
    (torch.ones(3, 3), [1.0], "A"), (torch.ones(1, 3, 4), [1.0], "A"), (torch.ones(1, 1, 1), [1.0], "A"), (torch.full((1, 3, 3), torch.nan), [1.0], "A"),
    (torch.arange(9.0).view(1, 3, 3), [1.0], "A"), (torch.ones(1, 3, 3), [1.0, 1.0], "traces"), (torch.ones(1, 3, 3), [4.0], "traces"), (torch.ones(2, 3, 3), [2.0, 0.0], "traces"), (torch.ones(1, 3, 3), [.5], "traces")])
def test_bad_programs_say_what_came(A, traces, argument):
    with pytest.raises(ValueError, match=argument): solve_sdp(A, traces)
    with pytest.raises(ValueError, match="max_iter"): solve_sdp(torch.ones(1, 3, 3), [1.0], max_iter=0)


def test_bad_partitions():
    A = kmeans_affinity(points(5, 2, 0))
    for labels in (torch.zeros(5).long(), torch.tensor([0, 0, 2, 2, 2])):
        with pytest.raises(ValueError, match="labels"): partition_certificate(A, labels)
    with pytest.raises(ValueError, match="cluster 1"): gaussian_affinity(points(5, 2, 0), torch.stack([torch.eye(2), torch.ones(2, 2)]))


def test_nothing_is_printed_by_default(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(rounded_steps(kmeans_affinity(torch.tensor(X)), 3, random_state=0))
        SDPKMeans(3, random_state=0, tol=1e-2).fit(X)
    assert capsys.readouterr().err.strip() == ""
