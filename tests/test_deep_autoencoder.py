"""Pretraining and the base of the deep clusterers: principal components, the closed form of a linear denoiser, DEC on the base, files, interruptions, scikit-learn's own checks."""
import os
import signal
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import subspace_angles
from sklearn.base import clone
from sklearn.cluster import KMeans as SkKMeans
from sklearn.datasets import make_blobs
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import check_methods_subset_invariance, parametrize_with_checks
from torch import nn

from deepclustering.clustering.autoencoder import (PRETRAIN, AutoencoderKMeans, ImageClusterer, code_of, code_report, corruption, encode_all, noisy_code,
                                                   pair_loss, pretrain_layers, refine, train_autoencoder, unit_scale)
from deepclustering.clustering.dec import DEC
from deepclustering.core.estimators import evaluating
from deepclustering.core.metrics import ari
from deepclustering.core.models import ConvAutoencoder, MLPAutoencoder

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X, Y = make_blobs(200, 6, centers=4, random_state=0)
QUICK = dict(widths=(12, 4), pretrain_epochs=3, batch_size=64, n_init=2, device="cpu", random_state=0, progress=False)
FLOAT32 = {"check_methods_subset_invariance": "the network computes in float32, whose sums depend on the size of the batch"}


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*widths, n=6, seed=0, dtype=torch.float64):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return MLPAutoencoder(n, widths).to(dtype)


@parametrize_with_checks([AutoencoderKMeans(widths=(8, 3), pretrain_epochs=2, n_init=1, device="cpu")], expected_failed_checks=lambda estimator: FLOAT32)
def test_estimator_checks(estimator, check):
    check(estimator)


def test_batches_change_nothing_but_float32s_last_digits():
    "scikit-learn's own check, which the estimator is let off in float32, passes with a network in float64; in float32 row by row and all at once differ by some units in the last place of the codes."
    torch.manual_seed(0)
    check_methods_subset_invariance("AutoencoderKMeans", AutoencoderKMeans(3, encoder=MLPAutoencoder(3, (8, 3)).double(), pretrain_epochs=2, n_init=1, device="cpu"))
    for seed in range(3):
        model = AutoencoderKMeans(4, **{**QUICK, "random_state": seed}).fit(X)
        size = 2 * (12 + 1) * np.finfo(np.float32).eps * np.abs(model.embedding_).max()                   # two layers, in each a sum of at most 12 products and a bias
        for method in (model.embed, model.transform):
            alone, together = np.concatenate([method(X[i:i + 1]) for i in range(60)]), method(X)[:60]
            assert np.abs(alone - together).max() < size
        first, second = np.sort(model.transform(X), 1)[:, :2].T
        assert (second - first > 2 * size).all()                                                          # no row is so near a tie that this could turn its label
        assert (np.concatenate([model.predict(X[i:i + 1]) for i in range(60)]) == model.predict(X)[:60]).all()


# --- pretraining ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_linear_pair_ends_at_the_principal_components(width):
    x = draw(150, 6) @ torch.diag(torch.tensor([4., 3., 2., 1.4, .7, .3], dtype=torch.float64)) @ torch.linalg.qr(draw(6, 6, seed=1))[0] + 1
    net = network(width)
    pretrain_layers(net, x, 0., 600, batch_size=150, optimizer=lambda w: torch.optim.Adam(w, lr=.1), schedule=lambda step: 1 - step / 600, progress=False)
    pca = PCA(width).fit(x.numpy())
    assert np.abs(subspace_angles(net.decoder[0].weight.detach().numpy(), pca.components_.T)).max() < 2e-2
    np.testing.assert_allclose(float(F.mse_loss(net.eval()(x), x).detach()), np.square(x.numpy() - pca.inverse_transform(pca.transform(x.numpy()))).mean(), rtol=1e-3)


@pytest.mark.parametrize("p_in, p_code", [(.3, 0.), (0., .3), (.5, .2)])
def test_the_mean_of_the_noise(p_in, p_code):
    "By @eq-penalty twice: noise on the code has the price of the code's second moment, which noise on the input raises."
    x, E, D = draw(4), draw(3, 4, seed=1), draw(4, 3, seed=2)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        got = 4 * float(pair_loss((lambda h: h @ E.T, lambda c: c @ D.T), x.repeat(200_000, 1), p_in, p_code))
    a, b = p_in / (1 - p_in), p_code / (1 - p_code)
    second = torch.outer(E @ x, E @ x) + a * E @ torch.diag(x.square()) @ E.T                       # E c c' of the code c
    want = float((x - D @ E @ x).square().sum() + a * (x.square() * (D @ E).square().sum(0)).sum() + b * (second.diagonal() * D.square().sum(0)).sum())
    assert got == pytest.approx(want, rel=.02)


def test_a_linear_denoiser_ends_at_the_closed_form():
    x, p = draw(300, 5) @ torch.tensor(np.random.default_rng(0).normal(size=(5, 5))), .4
    x = x - x.mean(0)
    net = network(5, n=5)
    pretrain_layers(net, x, [p, 0.], 300, batch_size=300, optimizer=lambda w: torch.optim.Adam(w, lr=.05), schedule=lambda step: 1 - step / 300, progress=False)
    S = x.T @ x
    want = S @ torch.linalg.inv(S + p / (1 - p) * torch.diag(S.diagonal()))
    got = (net.decoder[0].weight @ net.encoder[0].weight).detach()
    assert float((got - want).norm() / want.norm()) < .1 < float((torch.eye(5) - want).norm() / want.norm())


def test_every_layer_learns_alone_and_sees_clean_activations(monkeypatch):
    calls, net, x = [], network(5, 4, 3), draw(30, 6)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    def spy(model, loss, data, **keywords):
        calls.append((model, data.clone(), {k: v.clone() for k, v in net.state_dict().items()}))
        with torch.no_grad(): [p.add_(.1) for p in model.parameters()]
        class history: records = [{"step": 1}]
        return history
    monkeypatch.setattr("deepclustering.clustering.autoencoder.train", spy)
    records = pretrain_layers(net, x, .3, 1)
    assert [r["phase"] for r in records] == ["layer 1", "layer 2", "layer 3"]
    for l, (model, data, state) in enumerate(calls):
        assert [m is n for m, n in zip(model, net.pairs()[l])] == [True, True]
        assert torch.allclose(data, net.activations(x)[l])                                              # of the layers below in their final state
        assert all(torch.equal(v, before[k]) for k, v in state.items() if int(k.split(".")[1]) >= l)    # nobody touched this one before


def test_noise_is_where_it_should_be():
    net, x = network(60, 60, 60), draw(1000, 6).abs() + 1
    def zeros(noise):
        seen = []
        hooks = [layer.register_forward_hook(lambda m, i, o: seen.append(float((i[0] == 0).double().mean()))) for layer in (net.encoder[0], net.encoder[1][0])]
        with torch.random.fork_rng([]):
            torch.manual_seed(0); code = noisy_code(net, x, noise)
        for h in hooks: h.remove()
        return seen, float((code == 0).double().mean())
    clean, noisy = zeros([0., 0., 0., 0.]), zeros([.3, .5, 0., .25])
    assert clean[0][0] == 0 and clean[1] == 0 and noisy[0][0] == pytest.approx(.3, abs=.02) and noisy[1] == pytest.approx(.25, abs=.02)
    assert noisy[0][1] > .5 + .4 * clean[0][1]
    assert corruption(0.2, 4) == [0, .2, .2, .2, 0] and corruption((.1, .2), 1) == [.1, .2] and corruption(.2, 1) == [0, 0]


@pytest.mark.parametrize("noise", [1., -.1, 1.5, [.1], [.1, .2, .3, 1.]])
def test_bad_noise(noise):
    with pytest.raises(ValueError, match="noise must be one probability below 1, or 4 of them"): corruption(noise, 3)


def test_four_ways_cost_the_same():
    x, layers = draw(100, 6).float(), 2
    for way in PRETRAIN:
        records = train_autoencoder(network(5, 3, dtype=torch.float32), x, way, 9, batch_size=50, progress=False)
        per_layer, whole = sum(r["phase"] == "layer 1" for r in records), sum(not r["phase"].startswith("layer") for r in records)
        assert per_layer + whole == (0 if way == "none" else 9) and len(records) == whole + layers * per_layer
        assert per_layer == (3 if way == "layerwise" else 0)
    with pytest.raises(ValueError, match="pretrain must be one of"): train_autoencoder(network(3), x, "dec")


# --- codes ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, d", [(40, 5), (7, 1), (3, 8)])
def test_code_report_by_numpy(n, d):
    z, labels = draw(n, d).numpy() + 2, np.arange(n) % 3
    values = np.linalg.svd(z - z.mean(0), compute_uv=False)**2 / n
    report = code_report(z, labels, 5)
    assert report.active == min(n, 3) and report.largest == pytest.approx(np.bincount(labels).max() / n)
    assert report.spread == pytest.approx(values.sum() / np.square(z).sum(1).mean()) and report.dimensions == pytest.approx(values.sum()**2 / np.square(values).sum())
    assert not report.collapsed and code_report(z, np.zeros(n, int), 5).collapsed and code_report(np.ones((n, d)), labels, 5).collapsed


def test_encode_all_takes_blocks_in_evaluation_mode():
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(.5), nn.BatchNorm1d(4)).double()
    net[2].eval()
    x = draw(9001, 6)
    z = encode_all(net, x)
    assert net.training and net[1].training and not net[2].training and not z.requires_grad
    with evaluating(net): assert torch.allclose(z, net(x).detach(), atol=1e-12)
    with pytest.raises(RuntimeError), evaluating(net): raise RuntimeError
    assert net.training
    ae = ConvAutoencoder((1, 4, 4), (2,), 3, kernel=3, padding=1)
    assert torch.equal(code_of(ae, torch.ones(2, 16)), ae.encode(torch.ones(2, 16)))


# --- the base, by DEC --------------------------------------------------------------------------------------------------------

LOOP = dict(widths=(12, 4), pretrain="end-to-end", pretrain_epochs=20, lr=1e-2, update_interval=5, tol=1e-3, max_iter=100, cluster_lr=1e-2, batch_size=64, n_init=5, device="cpu", random_state=0, progress=False)


def test_dec_sharpens_and_stops():
    seen = []
    class Watched(DEC):
        def _target(self, q): seen.append(q.clone()); return super()._target(q)
    model = Watched(4, **LOOP).fit(X)
    turns = [r for r in model.history_ if r["phase"] == "clusters"]
    assert all(len(q) == len(X) for q in seen)                                                          # targets from all rows
    assert turns[-1]["moved"] < 1e-3 and all(t["moved"] >= 1e-3 for t in turns[:-1]) and model.n_iter_ == turns[-1]["step"] == 5 * len(seen)
    assert ari(Y, model.labels_) > .95
    long = Watched(4, **{**LOOP, "tol": 0., "max_iter": 203}).fit(X)
    sharp = [float(q.max(1).values.mean()) for q in seen[len(turns) - 1:]]
    assert long.n_iter_ == 203 and sharp[-1] > sharp[0]
    start = AutoencoderKMeans(4, widths=(12, 4), pretrain="end-to-end", pretrain_epochs=20, lr=1e-2, batch_size=64, n_init=5, device="cpu", random_state=0, progress=False).fit(X)
    assert torch.equal(seen[0].argmax(1), torch.tensor(start.labels_))                                  # it begins where AutoencoderKMeans ends
    first = 1 / (1 + torch.cdist(torch.tensor(start.embedding_), torch.tensor(start.cluster_centers_)).square())
    torch.testing.assert_close(seen[0], first / first.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_rows_keep_their_targets():
    x, seen = torch.arange(50.)[:, None], []
    class Center(nn.Module):
        def __init__(self): super().__init__(); self.at = nn.Parameter(torch.zeros(1))
    def loss(module, batch):
        seen.append(batch)
        return (module.at * batch[0].mean()).sum()
    refine(module := Center(), x, lambda m, rows: torch.cat([rows - 20, 20 - rows], 1), lambda q: x[:, 0] * 2, loss, optimizer=torch.optim.SGD(module.parameters(), lr=.0), update_interval=3, tol=.5,
           max_iter=6, batch_size=8, progress=False)
    assert len(seen) == 3 and all(torch.equal(rows[:, 0] * 2, target) for rows, target in seen)         # stopped by tol at the second look
    assert len({tuple(rows.flatten().tolist()) for rows, _ in seen}) == 3


# --- the estimator ------------------------------------------------------------------------------------------------------------

def test_kmeans_of_the_embedding_by_scikit_learn():
    model = AutoencoderKMeans(4, **{**QUICK, "pretrain_epochs": 20, "n_init": 10}).fit(X)
    theirs = SkKMeans(4, n_init=10, random_state=0).fit(model.embedding_)
    assert ari(model.labels_, theirs.labels_) == 1 and model.inertia_ == pytest.approx(theirs.inertia_, rel=1e-4)
    np.testing.assert_allclose(np.sort(model.transform(X).min(1)), np.sort(theirs.transform(model.embedding_).min(1)), atol=1e-3)


def test_scaling_the_rows_changes_nothing():
    one, ten = (AutoencoderKMeans(4, **QUICK).fit(c * X.astype(np.float32)) for c in (1, 8))
    np.testing.assert_allclose(one.embedding_, ten.embedding_, rtol=1e-4, atol=1e-5)
    assert ten.scale_ == pytest.approx(one.scale_ / 8, rel=1e-5) and np.square(X * one.scale_).mean() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("pretrain", PRETRAIN)
def test_same_seed_same_bits_and_global_generators_stay(pretrain):
    state, before = torch.get_rng_state(), np.random.get_state()[1].copy()
    a, b = (AutoencoderKMeans(4, **QUICK, pretrain=pretrain).fit(X) for _ in range(2))
    assert np.array_equal(a.embedding_, b.embedding_) and torch.equal(state, torch.get_rng_state()) and (before == np.random.get_state()[1]).all()
    assert not np.array_equal(a.embedding_, AutoencoderKMeans(4, **{**QUICK, "random_state": 1}, pretrain=pretrain).fit(X).embedding_)


def test_tensors_in_tensors_out_and_clone():
    model = clone(AutoencoderKMeans(4, **QUICK, encoder=network(5, 2, dtype=torch.float32))).fit(torch.tensor(X))
    assert all(isinstance(t, torch.Tensor) for t in (model.labels_, model.cluster_centers_, model.embedding_, model.predict(torch.tensor(X[:3])), model.embed(torch.tensor(X[:1]))))
    assert isinstance(model.predict(X[:3]), np.ndarray) and model.transform(X[:1]).shape == (1, 4)
    double = AutoencoderKMeans(4, **QUICK, encoder=network(5, 2)).fit(X.astype(np.float32)[:, :])
    assert double.embedding_.dtype == np.float64
    np.testing.assert_allclose(double.embed(X[5:6])[0], double.embedding_[5], rtol=1e-5)


def test_files(tmp_path):
    model = AutoencoderKMeans(4, **{**QUICK, "random_state": np.random.RandomState(0)}).fit(X)
    model.feature_names_in_ = np.array(list("abcdef"), dtype=object)                                    # as a data frame sets them
    model.save(tmp_path / "m.safetensors")
    back = AutoencoderKMeans.load(tmp_path / "m.safetensors")
    assert back.feature_names_in_.tolist() == list("abcdef") and back.feature_names_in_.dtype == object and np.array_equal(back.embedding_, model.embedding_) and back.widths == (12, 4) and back.random_state is None and back.encoder is None
    assert not back.encoder_.training and back.report_ == model.report_ and back.history_ == model.history_
    fine = DEC(4, **{**LOOP, "max_iter": 5}).fit(X)
    fine.save(tmp_path / "d.safetensors")
    assert (DEC.load(tmp_path / "d.safetensors").predict(X) == fine.labels_).all()
    with pytest.raises(ValueError, match="path must name a file that AutoencoderKMeans.save wrote, .*holds DEC"): AutoencoderKMeans.load(tmp_path / "d.safetensors")


@pytest.mark.parametrize("keywords, message", [
    (dict(n_clusters=201), "n_clusters must be between 1 and 200"), (dict(pretrain="x"), "pretrain must be one of layerwise, denoising, end-to-end, none"),
    (dict(lr=-1), "lr must be a positive number"), (dict(lr="x"), "lr must be a positive number"), (dict(batch_size=0), "batch_size must be"), (dict(pretrain_epochs=2.5), "pretrain_epochs must be"),
    (dict(widths=()), "widths must name at least"), (dict(widths=(3, 0)), "widths must be at least 1"), (dict(encoder="mlp"), "encoder must be a module or None, got str"),
    (dict(encoder=nn.Linear(6, 2)), "pretrain='layerwise' needs pairs of layers"), (dict(encoder=nn.Linear(6, 2), pretrain="end-to-end"), "encoder must have encode and decode"),
    (dict(noise=2), "noise must be"), (dict(device="nowhere"), "device must be")])
def test_bad_arguments_are_named_before_any_work(keywords, message, monkeypatch):
    monkeypatch.setattr("deepclustering.clustering.autoencoder.train", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message): AutoencoderKMeans(**{"n_clusters": 4, **QUICK, **keywords}).fit(X)


@pytest.mark.parametrize("keywords, message", [(dict(tol=-1.), "tol must be"), (dict(cluster_lr=0), "cluster_lr must be"), (dict(max_iter=0), "max_iter must be"), (dict(update_interval=0), "update_interval must be")])
def test_bad_arguments_of_the_loop(keywords, message):
    with pytest.raises(ValueError, match=message): DEC(4, **{**LOOP, **keywords}).fit(X)


def test_a_collapse_is_told():
    class Point(nn.Module):
        def __init__(self, far): super().__init__(); self.w = nn.Parameter(torch.tensor(far))
        def forward(self, x): return x[:, :2] * self.w + 1
    with pytest.raises(ValueError, match="encoder maps all 200 rows to one code"): AutoencoderKMeans(4, **{**QUICK, "pretrain": "none"}, encoder=Point(0.)).fit(X)
    with pytest.warns(ConvergenceWarning, match="the codes have collapsed"): AutoencoderKMeans(4, **{**QUICK, "pretrain": "none"}, encoder=Point(1e-5)).fit(X)


@pytest.mark.parametrize("kind, phase", [(AutoencoderKMeans, "layer 1"), (AutoencoderKMeans, "fine-tuning"), (DEC, "clusters")])
def test_interrupt(kind, phase, monkeypatch):
    import deepclustering.clustering.autoencoder as module
    real, calls = module.train, []
    def stop_in(model, loss, data, **keywords):
        calls.append(1)
        now = {"layer 1": 1, "fine-tuning": 3, "clusters": 3}[phase]
        def pressed(model, batch):
            if len(calls) == now: os.kill(os.getpid(), signal.SIGINT)
            return loss(model, batch)
        return real(model, pressed, data, **keywords)
    monkeypatch.setattr(module, "train", stop_in)
    model = kind(4, **QUICK) if kind is AutoencoderKMeans else kind(4, **{**LOOP, "tol": 0.})
    with warnings.catch_warnings(record=True) as said, pytest.raises(KeyboardInterrupt):
        warnings.simplefilter("always")
        model.fit(X)
    assert any(f"{kind.__name__} was interrupted" in str(w.message) for w in said)
    assert model.labels_.shape == (200,) and (model.predict(X) == model.labels_).all() and len(calls) == {"layer 1": 1, "fine-tuning": 3, "clusters": 3}[phase]
    assert [r["phase"] for r in model.history_] == {"layer 1": [], "fine-tuning": ["layer 1", "layer 2"], "clusters": ["end-to-end"] * 20 + ["clusters"] * 2}[phase]  # what was begun is not told
    assert model.n_iter_ == (5 if phase == "clusters" else model.n_iter_) and model.report_.active >= 1


@pytest.mark.parametrize("pretrain", ["none", "end-to-end"])
def test_interrupt_before_the_first_target(pretrain):
    "Ctrl-C while the first memberships are computed: no step of the clustering loss was taken, whatever `history_` holds of the time before."
    class Stopped(DEC):
        def _assign(self, module, x): raise KeyboardInterrupt
    model = Stopped(4, **{**LOOP, "pretrain": pretrain})
    with pytest.warns(UserWarning, match="Stopped was interrupted"), pytest.raises(KeyboardInterrupt): model.fit(X)
    assert model.n_iter_ == 0 and model.labels_.shape == (200,) and {r["phase"] for r in model.history_} == ({"end-to-end"} if pretrain == "end-to-end" else set())


@pytest.mark.parametrize("shape, told", [((5, 2, 3), None), ((5, 1, 2, 3), None), ((5, 6), (2, 3)), ((5, 6), (1, 2, 3)), ((5, 6), None)])
def test_images_and_rows(shape, told):
    class Pictures(ImageClusterer):
        def __init__(self, image_shape=None, device="cpu"): self.image_shape, self.device = image_shape, device
    rows, device, found = Pictures(told)._check(draw(*shape).numpy())
    assert np.array_equal(rows, draw(5, 6)) and str(device) == "cpu" and found == (None if shape == (5, 6) and told is None else (1, 2, 3))


@pytest.mark.parametrize("power", [-565, -120, 120, 565])
def test_the_unit_of_the_rows_does_not_matter(power):
    "Powers of two change no digit; 2**565 is 1e170, whose square no float64 holds."
    usual = AutoencoderKMeans(4, **QUICK).fit(X)
    other = AutoencoderKMeans(4, **QUICK).fit(X * 2.**power)
    assert other.scale_ * 2.**power == usual.scale_ == unit_scale(torch.tensor(X)) and np.array_equal(other.labels_, usual.labels_) and np.array_equal(other.embedding_, usual.embedding_)
    assert np.array_equal(other.predict(X * 2.**power), usual.labels_)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_unit_scale_at_the_ends_of_a_dtype(dtype):
    "By NumPy in long double; the smallest numbers of a dtype stay finite."
    info = torch.finfo(dtype)
    for unit in (info.max / 4, 1., info.tiny):
        x = draw(20, 3).clamp(-3, 3).mul(unit).to(dtype)
        wide = x.numpy().astype(np.longdouble)
        assert abs(float(unit_scale(x) * np.sqrt((wide**2).mean())) - 1) < 1e-12
    smallest = torch.tensor([[info.smallest_normal * info.eps]], dtype=torch.float64).to(dtype)
    assert smallest.item() > 0 and torch.isfinite(smallest.to(torch.promote_types(dtype, torch.float32)) * unit_scale(smallest)).all()
    assert unit_scale(torch.zeros(3, 2, dtype=dtype)) == 1. and unit_scale(torch.full((3, 2), -4., dtype=dtype)) == .25


def test_what_is_trained_stays_where_the_rows_are(monkeypatch):
    "On a machine that says it has CUDA, rows on the CPU are learned from on the CPU, layer by layer too."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    x = torch.tensor(X)
    for way in PRETRAIN: train_autoencoder(network(5, 2), x, way, 3, batch_size=64, progress=False)
    pretrain_layers(network(5, 2), x, epochs=1, batch_size=64, progress=False)
    net = network(5, 2)
    steps = refine(net, x, lambda net, rows: net.encode(rows), lambda q: q, lambda net, batch: (net.encode(batch[0]) - batch[1]).square().mean(), optimizer=torch.optim.Adam(net.parameters()), update_interval=1, tol=0, max_iter=2, batch_size=64, progress=False)
    assert steps == 2
