"""DivClust: likeness and NMI by loops, the bound by hand, the consensus by dense algebra and scikit-learn, files, interruptions, scikit-learn's own checks."""
import os
import signal
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.cluster import SpectralClustering
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import normalized_mutual_info_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclustering.clustering.divclust import Consensus, DivClust, diversity_loss, head_likeness, head_nmi, mean_pair, next_bound
from deepclustering.clustering.heads import SCANHead
from deepclustering.core.metrics import ari, cluster_accuracy
from deepclustering.tool.cluster import find_clusterer, make_clusterer

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X, Y = make_blobs(90, 6, centers=4, cluster_std=1., random_state=0)
QUICK = dict(n_heads=3, n_neighbors=5, nmi_interval=1, max_iter=3, batch_size=50, device="cpu", random_state=0, progress=False)


def memberships(*shape, seed=0): return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(-1)


# --- likeness ---

@pytest.mark.parametrize("H, m, k", [(1, 4, 2), (2, 5, 3), (4, 30, 6)])
def test_likeness_by_loops(H, m, k):
    p = memberships(H, m, k)
    v = p.numpy()
    def cosine(a, b): return a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    wanted = [[np.mean([max(cosine(v[h][:, a], v[g][:, b]) for b in range(k)) for a in range(k)]) for g in range(H)] for h in range(H)]
    np.testing.assert_allclose(head_likeness(p), wanted, rtol=1e-12)
    np.testing.assert_allclose(head_likeness(p.float()), wanted, rtol=1e-5)
    for d in (0., .5, .9):
        assert float(diversity_loss(p, d)) == pytest.approx(sum(max(0, wanted[h][g] - d) for h in range(H) for g in range(H) if h != g) / H, abs=1e-12)


def test_likeness_does_not_care_for_names_and_order():
    p = memberships(3, 20, 5)
    renamed = torch.stack([q[:, torch.randperm(5, generator=torch.Generator().manual_seed(i))] for i, q in enumerate(p)])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head_likeness(renamed), head_likeness(p)); torch.testing.assert_close(head_likeness(p[:, order]), head_likeness(p))
    same = torch.stack([p[0], renamed[0]])
    torch.testing.assert_close(head_likeness(same), torch.ones(2, 2, dtype=torch.float64))
    hard = F.one_hot(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]), 2).double()                    # an empty column is like none
    torch.testing.assert_close(head_likeness(hard), torch.tensor([[1., 2**-.5], [2**-.5 / 2, .5]], dtype=torch.float64))


def test_gradient_of_the_loss():
    z = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: diversity_loss(z.softmax(2), .6), (z,))
    moved = z.detach() - .5 * torch.autograd.grad(diversity_loss(z.softmax(2), .3), z)[0]
    assert float(diversity_loss(moved.softmax(2), .3)) < float(diversity_loss(z.detach().softmax(2), .3))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_nmi_is_scikit_learns(k):
    labels = torch.randint(k, (4, 60), generator=torch.Generator().manual_seed(k))
    wanted = [[normalized_mutual_info_score(a, b) if k > 1 else 1. for b in labels] for a in labels]
    np.testing.assert_allclose(head_nmi(labels, k), wanted, atol=1e-9)
    np.testing.assert_allclose(head_nmi(labels, k + 3), wanted, atol=1e-9)                         # names that nobody has
    assert mean_pair(head_nmi(labels, k)) == pytest.approx(np.mean([wanted[i][j] for i, j in combinations(range(4), 2)]))


def test_the_bound():
    assert next_bound(.5, .9, .8) == pytest.approx(.495) and next_bound(.5, .8, .8) == pytest.approx(.505) and next_bound(.999, 0, .8) == 1 and next_bound(.5, .9, .8, .9) == pytest.approx(.45)


# --- consensus ---

def noisy(seed, H=8, n=200, k=4, wrong=.35):
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % k
    heads = np.stack([rng.permutation(k)[np.where(rng.random(n) < wrong, rng.integers(k, size=n), truth)] for _ in range(H)])
    return truth, torch.tensor(heads)


@pytest.mark.parametrize("seed", range(3))
def test_consensus_of_noisy_copies(seed):
    truth, heads = noisy(seed)
    model = Consensus(heads, 4, random_state=0)
    assert cluster_accuracy(truth, model.labels_) > max(cluster_accuracy(truth, h) for h in heads) + .1
    assert torch.equal(model.predict(heads), model.labels_)
    Z = F.one_hot(heads, 4).double().permute(1, 0, 2).reshape(200, 32).numpy()
    B = Z / np.sqrt(Z.sum(0)) / np.sqrt(8)
    U = np.linalg.svd(B, full_matrices=False)[0][:, :4]
    U /= np.linalg.norm(U, axis=1, keepdims=True)
    np.testing.assert_allclose(model.embed(heads) @ model.embed(heads).T, U @ U.T, atol=1e-8)
    cut = SpectralClustering(4, affinity="precomputed", random_state=0).fit(B @ B.T).labels_             # its rows sum to one: the same vectors, not scaled to length one
    assert ari(cut, model.labels_) > .9


def test_consensus_properties():
    truth, heads = noisy(0)
    model = Consensus(heads, 4, random_state=0)
    renamed = torch.stack([torch.tensor([2, 0, 3, 1])[h] for h in heads])
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert ari(Consensus(renamed, 4, random_state=0).labels_, model.labels_) == 1
    assert ari(Consensus(heads[:, order], 4, random_state=0).labels_, model.labels_[order]) > .95       # other starts of k-means
    assert ari(Consensus(heads.repeat(2, 1), 4, random_state=0).labels_, model.labels_) > .95
    alone = Consensus(heads[:1], 4, random_state=0)
    assert ari(alone.labels_, heads[0]) == 1                                                        # one head is its own consensus
    new = noisy(1)[1]
    assert torch.equal(model.predict(new), torch.stack([model.predict(new[:, i:i + 1])[0] for i in range(200)]))


@pytest.mark.parametrize("labels, k, text", [(torch.zeros(3), 1, "labels must be"), (torch.zeros(2, 3), 1, "labels must be"), (torch.full((2, 3), -1), 1, "labels must be"), (torch.zeros(2, 3).long(), 4, "n_clusters must be"), (torch.zeros(2, 0).long(), 1, "labels must be")])
def test_bad_votes(labels, k, text):
    with pytest.raises(ValueError, match=text): Consensus(labels, k)


# --- the estimator ---

@parametrize_with_checks([DivClust(**{**QUICK, "random_state": None})])
def test_estimator_checks(estimator, check): check(estimator)


def test_without_a_target_it_is_scan():
    many, plain = DivClust(4, **QUICK, nmi_target=1.).fit(X), SCANHead(4, **{k: v for k, v in QUICK.items() if k != "nmi_interval"}).fit(X)
    assert np.array_equal(many.head_labels_, plain.head_labels_) and np.array_equal(many.head_losses_, plain.head_losses_) and many.bound_ == 1
    assert np.array_equal(Consensus(many.head_labels_, 4, random_state=0).labels_, many.labels_)
    single = DivClust(4, **QUICK | {"n_heads": 1}, nmi_target=.5).fit(X)
    assert single.nmi_ == 1 and ari(single.labels_, single.head_labels_[0]) == 1


def test_the_loss_and_the_bank_by_hand():
    "What is added to SCAN's loss in each step, from the memberships that the step saw."
    seen = []

    class Watched(DivClust):
        def _objective(self, run, net, a, b):
            losses, others = super()._objective(run, net, a, b)
            seen.append((net(torch.cat([a, b])).detach(), float(others["diversity"].detach()), others["bound"], others["nmi"], run.bank.clone()))
            return losses, others
    model = Watched(4, **QUICK | {"nmi_interval": 2, "batch_size": 30, "bank_size": 100}, nmi_target=.01, bound_start=.6, bound_rate=.9).fit(X)
    bank, bound = torch.empty(3, 0, dtype=torch.int64), .6
    for step, (logits, pushed, d, measured, kept) in enumerate(seen):
        bank = torch.cat([logits.argmax(2), bank], 1)[:, :100]
        assert torch.equal(bank, kept)
        if step % 2 == 0:
            now = np.mean([normalized_mutual_info_score(bank[i], bank[j]) for i, j in combinations(range(3), 2)])
            bound = bound * .9 if now > .01 else min(1., bound * 1.1)
        assert d == pytest.approx(bound) and measured == pytest.approx(now, abs=1e-9)
        assert pushed == pytest.approx(float(diversity_loss(logits.softmax(2), bound)), abs=1e-6)
    assert len(seen) == 9 and bank.shape == (3, 100)
    assert model.bound_ == pytest.approx(bound) and model.history_[-1]["bound"] != pytest.approx(bound)   # the last, not the last epoch's mean


def test_the_target_is_kept():
    "Overlapping blobs, so that there is something to disagree about; three seeds."
    x = make_blobs(300, 4, centers=5, cluster_std=5., random_state=1)[0]
    for seed in range(3):
        quick = QUICK | {"n_heads": 4, "max_iter": 40, "batch_size": 100, "random_state": seed}
        free = DivClust(5, nmi_target=1., **quick).fit(x)
        asked = free.nmi_ - .1
        held = DivClust(5, nmi_target=asked, bound_start=.9, **quick).fit(x)
        assert held.nmi_ < asked + .05 and held.bound_ < 1 and free.bound_ == 1


def test_missed_targets_are_told():
    with pytest.warns(ConvergenceWarning, match="above nmi_target=0.01"): DivClust(4, nmi_target=.01, **QUICK).fit(X)


def test_clusters_are_found():
    model = DivClust(4, **QUICK | {"max_iter": 30}).fit(X)
    assert ari(Y, model.labels_) > .9 and np.array_equal(model.predict(X), model.labels_)
    again = clone(model).fit(X)
    assert np.array_equal(again.labels_, model.labels_) and again.history_ == model.history_
    tensor = clone(model).fit(torch.tensor(X))
    assert isinstance(tensor.predict(torch.tensor(X)), torch.Tensor) and np.array_equal(tensor.labels_, model.labels_)
    p = model.predict_proba(X)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6); assert (p.argmax(1) == model.labels_).mean() > .95
    assert np.array_equal(model.predict_heads(X), model.head_labels_)
    assert np.array_equal(np.concatenate([model.predict(X[i:i + 7]) for i in range(0, 90, 7)]), model.labels_)


def test_files_and_sklearn(tmp_path):
    model = DivClust(4, **QUICK).fit(X)
    model.save(tmp_path / "m.safetensors")
    back = DivClust.load(tmp_path / "m.safetensors")
    assert np.array_equal(back.predict(X), model.predict(X)) and np.array_equal(back.predict_proba(X), model.predict_proba(X)) and back.history_ == model.history_ and back.nmi_ == model.nmi_ and back.get_params() == model.get_params()
    assert list(model.get_feature_names_out()) == [f"divclust{i}" for i in range(4)]
    assert find_clusterer("divclust") is DivClust and make_clusterer(DivClust, 3).n_clusters == 3


def test_interrupted():
    class Stopped(DivClust):
        def _objective(self, run, net, a, b):
            if len(calls) == 4: os.kill(os.getpid(), signal.SIGINT)
            calls.append(1)
            return super()._objective(run, net, a, b)
    calls = []
    model = Stopped(4, **QUICK | {"max_iter": 40})
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): model.fit(X)
    assert np.array_equal(model.predict(X), model.labels_) and model.n_iter_ < 40


def test_interrupted_before_training():
    "A second fit that ends before its first step leaves no mixture of two fits."
    class Stopped(DivClust):
        def _begin(self, run):
            if hasattr(self, "stop"): raise KeyboardInterrupt
            super()._begin(run)
    model = Stopped(4, **QUICK).fit(X)
    model.stop = True
    with pytest.raises(KeyboardInterrupt): model.fit(100 * X + 7)
    for call in (model.predict, model.predict_proba, model.transform, model.predict_heads):
        with pytest.raises(NotFittedError): call(X)
    del model.stop
    assert np.array_equal(model.fit(X).labels_, DivClust(4, **QUICK).fit(X).labels_)


def test_interrupted_at_the_consensus(monkeypatch):
    "Then the heads are the new fit's and can be asked; the old consensus is gone."
    model = DivClust(4, **QUICK).fit(X)
    def stop(*args, **keywords): raise KeyboardInterrupt
    monkeypatch.setattr("deepclustering.clustering.divclust.Consensus", stop)
    with pytest.raises(KeyboardInterrupt): model.fit(X[::-1].copy())
    for call in (model.predict, model.predict_proba):
        with pytest.raises(NotFittedError): call(X)
    assert np.array_equal(model.predict_heads(X[::-1]), model.head_labels_)


def test_clusters_that_training_never_used():
    "Two heads without an entropy: the highest numbers are nobody's in training, and far rows fall into them."
    model = DivClust(8, n_heads=2, entropy_weight=0., max_iter=5, n_neighbors=5, batch_size=50, random_state=0, device="cpu", progress=False).fit(X)
    new = 100 * np.random.default_rng(0).normal(size=(500, 6))
    assert model.head_labels_.max() < model.predict_heads(new).max() <= 7                         # or the test shows nothing
    assert set(model.predict(new)) <= set(range(8)) and np.allclose(model.predict_proba(new).sum(1), 1)
    assert model.consensus_places_.shape[:2] == (2, 8)


def test_consensus_with_names_that_nobody_has():
    truth, heads = noisy(0)
    wide, tight = Consensus(heads, 4, each=9, random_state=0), Consensus(heads, 4, random_state=0)
    assert wide.places_.shape[:2] == (8, 9) and tight.places_.shape[:2] == (8, 4) and ari(wide.labels_, tight.labels_) == 1
    torch.testing.assert_close(wide.places_[:, 4:], torch.zeros_like(wide.places_[:, 4:]), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="each must be"): Consensus(heads, 4, each=0)


@pytest.mark.parametrize("name, value", [("n_clusters", 91), ("n_heads", 0), ("nmi_target", 0.), ("nmi_target", 1.1), ("nmi_interval", 0), ("bound_rate", 0.), ("bound_rate", 1.5), ("bound_start", 0.), ("bank_size", 0), ("entropy_weight", -1.), ("lr", 0.)])
def test_bad_parameters(name, value):
    with pytest.raises(ValueError, match=name): DivClust(**{"n_clusters": 4, **QUICK, name: value}).fit(X)
