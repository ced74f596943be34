"""VaDE: the bound against torch's distributions and exact densities, whole fits against loops written by hand, the start, draws, files, interruptions, scikit-learn's own checks."""
import math
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.utils.estimator_checks import check_methods_subset_invariance, parametrize_with_checks
from torch import nn
from torch.distributions import Categorical, MultivariateNormal, Normal, kl_divergence

from deepclustering.clustering.vade import MixturePrior, VaDE, bounded, first_mixture, gaussian_kl, kl_terms, log_joint, log_likelihood, weighted_evidence
from deepclustering.core.metrics import ari
from deepclustering.core.models import ConvAutoencoder, MLPAutoencoder
from deepclustering.core.training import batch_at, seed_of
from deepclustering.tool.cluster import find_clusterer, make_clusterer

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X, Y = make_blobs(120, 6, centers=4, cluster_std=2., random_state=0)
QUICK = dict(widths=(8, 3), pretrain_epochs=3, epochs=3, batch_size=64, n_init=2, device="cpu", random_state=0, progress=False)


def network(widths=(5, 2), seed=0):
    "In float64, which the estimators keep."
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return MLPAutoencoder(6, widths).double()


def onwards(k=4, x=X, **keywords):
    "Fitted from `network()` with whole batches."
    return VaDE(k, **{**QUICK, "encoder": network(), "pretrain": "none", "batch_size": 1000, "cluster_lr": 1e-2, **keywords}).fit(x)


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_prior(k, d, seed=0): return MixturePrior(normal(k, seed=seed).log_softmax(0), normal(k, d, seed=seed + 1), normal(k, d, seed=seed + 2))


@parametrize_with_checks([VaDE(widths=(4, 2), pretrain="end-to-end", pretrain_epochs=1, epochs=2, n_init=1, device="cpu"), VaDE(likelihood="gaussian", init="random", widths=(4, 2), pretrain_epochs=1, epochs=1, n_init=1, device="cpu")])
def test_estimator_checks(estimator, check):
    check(estimator)


def test_batches_change_nothing_in_float64():
    "scikit-learn's own check, for a network in float64: in float32 sums depend on the size of the batch, which above does not show at a width of four."
    torch.manual_seed(0)
    check_methods_subset_invariance("VaDE", VaDE(3, encoder=MLPAutoencoder(3, (4, 2)).double(), pretrain="end-to-end", pretrain_epochs=1, epochs=2, n_init=1, device="cpu"))


# --- the terms ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, k, d", [(1, 1, 1), (1, 3, 2), (7, 1, 4), (50, 6, 5)])
def test_terms_by_torchs_distributions(n, k, d):
    prior, mu, log_var, z = a_prior(k, d), normal(n, d, seed=5), normal(n, d, seed=6), normal(n, d, seed=7)
    clusters, codes = Normal(prior.means, (prior.log_vars / 2).exp()), Normal(mu[:, None], (log_var[:, None] / 2).exp())
    torch.testing.assert_close(log_joint(z, prior), prior.log_weights + clusters.log_prob(z[:, None]).sum(2))
    torch.testing.assert_close(gaussian_kl(mu, log_var, prior.means, prior.log_vars), kl_divergence(codes, clusters))
    log_gamma = log_joint(z, prior).log_softmax(1)
    place, cluster = kl_terms(log_gamma, mu, log_var, prior)
    torch.testing.assert_close(place, (log_gamma.exp() * kl_divergence(codes, clusters).sum(2)).sum(1))
    torch.testing.assert_close(cluster, kl_divergence(Categorical(logits=log_gamma), Categorical(logits=prior.log_weights)))
    gm = GaussianMixture(k, covariance_type="diag")
    gm.weights_, gm.means_, gm.covariances_, gm.precisions_cholesky_ = prior.log_weights.exp().numpy(), prior.means.numpy(), prior.log_vars.exp().numpy(), (-prior.log_vars / 2).exp().numpy()
    np.testing.assert_allclose(log_gamma.exp(), gm.predict_proba(z.numpy()), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(log_joint(z, prior).logsumexp(1), gm.score_samples(z.numpy()), rtol=1e-9)


def test_nothing_underflows_in_float32():
    prior = MixturePrior(torch.tensor([0., -200.]).log_softmax(0), torch.tensor([[0.] * 20, [1e3] * 20]), torch.tensor([[-10.] * 20, [10.] * 20]))
    mu = torch.tensor([[0.] * 20, [1e3] * 20, [-1e4] * 20]).requires_grad_()
    log_gamma = log_joint(mu, prior).log_softmax(1)
    terms = kl_terms(log_gamma, mu, torch.zeros(3, 20), prior)
    assert all(torch.isfinite(t).all() for t in (log_gamma, *terms)) and torch.isfinite(torch.autograd.grad(sum(t.sum() for t in terms), mu)[0]).all()
    assert bool((terms[0] >= 0).all() and (terms[1] >= -1e-6).all())
    assert float(bounded(torch.tensor(-1e30))) == -10 and float(bounded(torch.tensor(1e-3))) == pytest.approx(1e-3)


def test_finite_differences():
    eps, A, x = normal(4, 3, seed=3), normal(3, 5, seed=4), (normal(4, 5, seed=5) > 0).double()

    def loss(mu, log_var, weights, means, log_vars, likelihood):
        z, prior = mu + (log_var / 2).exp() * eps, MixturePrior(weights.log_softmax(0), means, bounded(log_vars))
        return (sum(kl_terms(log_joint(z, prior).log_softmax(1), mu, log_var, prior)) - log_likelihood(x, z @ A, likelihood, .7)).mean()
    inputs = [t.requires_grad_() for t in (normal(4, 3, seed=6), normal(4, 3, seed=7), normal(2, seed=8), normal(2, 3, seed=9), normal(2, 3, seed=10))]
    for likelihood in ("bernoulli", "gaussian"): assert torch.autograd.gradcheck(lambda *t: loss(*t, likelihood), inputs)


def linear_gaussian(seed):
    "A linear decoder, so that p(x) is a mixture of Gaussians: A, b, v, the prior, rows, their exact log p(x), and some encoder's answer."
    A, b, v, prior = normal(2, 5, seed=seed), normal(5, seed=seed + 1), .4, a_prior(3, 2, seed + 2)
    x = normal(8, 5, seed=seed + 6) * 2
    exact = torch.stack([w + MultivariateNormal(m @ A + b, A.T @ s.exp().diag() @ A + v * torch.eye(5).double()).log_prob(x) for w, m, s in zip(*prior)], 1).logsumexp(1)
    code = MultivariateNormal(torch.zeros(2).double(), torch.linalg.inv(A @ A.T / v + torch.eye(2).double()))
    mu, log_var = (x - b) @ A.T / v @ code.covariance_matrix, code.covariance_matrix.diagonal().log().expand(8, 2) + .3
    return A, b, v, prior, x, exact, mu, log_var


@pytest.mark.parametrize("seed", range(5))
def test_a_bound_it_is_and_weights_close_it(seed):
    A, b, v, prior, x, exact, mu, log_var = linear_gaussian(100 * seed)
    eps = normal(4000, 8, 2, seed=seed)
    z = mu + (log_var / 2).exp() * eps
    flat = z.flatten(0, 1)
    picture = log_likelihood(x.repeat(4000, 1), flat @ A + b, "gaussian", v)
    place, cluster = kl_terms(log_joint(flat, prior).log_softmax(1), mu.repeat(4000, 1), log_var.repeat(4000, 1), prior)
    bounds = (picture - place - cluster).reshape(4000, 8)
    assert (bounds.mean(0) <= exact + 4 * bounds.std(0) / 4000**.5).all()                           # an estimate from below, in the mean
    got = weighted_evidence(lambda z: log_likelihood(x.repeat(len(z), 1), z.flatten(0, 1) @ A + b, "gaussian", v).reshape(len(z), 8), mu, log_var, prior, eps)
    assert (got > bounds.mean(0)).all() and (got - exact).abs().max() < .15


# --- whole fits against loops ------------------------------------------------------------------------------------------------------

class Adam:
    "Kingma and Ba, 2015, algorithm 1, with the program's epsilon."
    def __init__(self): self.m, self.v, self.t = {}, {}, 0

    def step(self, tensors, lr):
        self.t += 1
        for i, w in enumerate(tensors):
            g = w.grad
            self.m[i], self.v[i] = .9 * self.m.get(i, 0) + .1 * g, .999 * self.v.get(i, 0) + .001 * g**2
            with torch.no_grad(): w -= lr * (self.m[i] / (1 - .9**self.t)) / ((self.v[i] / (1 - .999**self.t)).sqrt() + 1e-4)
            w.grad = None


@pytest.mark.parametrize("likelihood, k, batch, share", [("bernoulli", 4, 1000, .1), ("bernoulli", 1, 1000, None), ("gaussian", 3, 50, None)])
def test_step_for_step(likelihood, k, batch, share):
    "The bound as its five expectations, by torch's distributions; the learning rate falls every second epoch to a floor."
    few = dict(likelihood=likelihood, variance=.3, first_variance=share, batch_size=batch, decay=.5, decay_epochs=2, floor=.2)
    fitted, start = onwards(k, epochs=7, **few), onwards(k, epochs=1, cluster_lr=1e-13, **few)
    net, seed = network(), int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(0)))
    x = torch.tensor(X) / torch.tensor(X).square().mean().sqrt()
    goal = (x - x.min()) / (x.max() - x.min())
    W, b, c, s = (torch.tensor(t) for t in (start.head_weights_, start.head_biases_, start.cluster_centers_, start.variances_))
    logits, v = torch.zeros(k).double(), 10 * (s.log() / 10).atanh()
    prior = [t.requires_grad_() for t in (W, b, logits, c, v)]
    weights, adam, per_epoch = [*net.parameters(), *prior], Adam(), math.ceil(120 / batch)
    for step in range(7 * per_epoch):
        rows, wanted = batch_at((x, goal), step, batch, seed)
        h = net.encoder[0](rows)
        q = Normal(net.encoder[1](h), (10 * torch.tanh((h @ W.T + b) / 10) / 2).exp())
        torch.manual_seed(seed_of(seed, "model", step))
        z = q.loc + q.scale * torch.randn(len(rows), 2, dtype=torch.float64)
        clusters, pi = Normal(c, (10 * torch.tanh(v / 10) / 2).exp()), Categorical(logits=logits)
        log_gamma = (pi.logits + clusters.log_prob(z[:, None]).sum(2)).log_softmax(1)
        gamma = log_gamma.exp()
        out = net.decode(z)
        picture = wanted * out - nn.functional.softplus(out) if likelihood == "bernoulli" else Normal(out, .3**.5).log_prob(rows)
        expected = -Normal(0, 1).entropy() - clusters.scale.log() + .5 - ((q.scale[:, None]**2 + (q.loc[:, None] - c)**2) / clusters.scale**2) / 2      # E_q log N(z; c, s), (m, k, d)
        bound = picture.sum(1) + (gamma * expected.sum(2)).sum(1) + (gamma * pi.logits).sum(1) + q.entropy().sum(1) - (gamma * log_gamma).sum(1)
        (-bound.mean()).backward()
        for w in weights: w.grad = torch.zeros_like(w) if w.grad is None else w.grad
        adam.step(weights, 1e-2 * max(.5 ** (step // per_epoch // 2), .2))
    assert fitted.n_iter_ == 7 * per_epoch
    np.testing.assert_allclose(fitted.cluster_centers_, c.detach(), atol=1e-8)
    np.testing.assert_allclose(fitted.variances_, (10 * torch.tanh(v / 10)).exp().detach(), rtol=1e-7)
    np.testing.assert_allclose(fitted.weights_, logits.softmax(0).detach(), atol=1e-9)
    np.testing.assert_allclose(fitted.head_weights_, W.detach(), atol=1e-8)
    np.testing.assert_allclose(fitted.embedding_, net.encode(x).detach(), atol=1e-8)


def test_pretraining_is_a_plain_autoencoder_with_pixels():
    fitted = onwards(pretrain="end-to-end", pretrain_epochs=4, lr=1e-2, epochs=1, cluster_lr=1e-13)
    net, x = network(), torch.tensor(X) / torch.tensor(X).square().mean().sqrt()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad(); ((x.min() + (x.max() - x.min()) / (1 + (-net.decode(net.encode(x))).exp()) - x)**2).mean().backward(); optimizer.step()
    np.testing.assert_allclose(fitted.embedding_, net.encode(x).detach(), atol=1e-8)
    plain = onwards(likelihood="gaussian", pretrain="end-to-end", pretrain_epochs=1, lr=1e-2, epochs=1, cluster_lr=1e-13)
    assert abs(plain.history_[0]["loss"] - float(((network().decode(network().encode(x)) - x)**2).mean().detach())) < 1e-9
    assert {r["phase"] for r in VaDE(4, **QUICK).fit(X).history_} == {"layer 1", "layer 2", "fine-tuning", "bound"}


def test_equal_clusters_stay_equal():
    "Zeros and ones everywhere, as the program has before its mixture: no gradient tells clusters apart."
    prior = MixturePrior(*(t.requires_grad_() for t in (torch.full((3,), 1 / 3).double().log(), torch.zeros(3, 2).double(), torch.zeros(3, 2).double())))
    z, mu = normal(40, 2), normal(40, 2, seed=1)
    log_gamma = log_joint(z, prior).log_softmax(1)
    for grad in torch.autograd.grad(sum(t.sum() for t in kl_terms(log_gamma, mu, torch.zeros(40, 2).double(), prior)), prior[1:]): torch.testing.assert_close(grad, grad[:1].expand(3, 2))
    torch.testing.assert_close(log_gamma.exp(), torch.full((40, 3), 1 / 3).double())


@pytest.mark.parametrize("k", [1, 4])
def test_the_start(k):
    z = torch.tensor(X)
    ours = first_mixture(z, k, n_init=5, tol=1e-10, max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = GaussianMixture(k, covariance_type="diag", tol=0, max_iter=500, reg_covar=1e-3 * X.var(0).mean(), means_init=ours.means.numpy(), random_state=0).fit(X)
    np.testing.assert_allclose(ours.means, theirs.means_, atol=1e-3)
    np.testing.assert_allclose(ours.covariances, theirs.covariances_, rtol=1e-3)
    np.testing.assert_allclose(ours.weights, theirs.weights_, atol=1e-4)
    drawn = first_mixture(z, k, "random", seed=3)
    assert all((z == m).all(1).any() for m in drawn.means) and len(drawn.means.unique(dim=0)) == k
    np.testing.assert_allclose(drawn.covariances, np.tile(X.var(0), (k, 1)), rtol=1e-9)


def test_the_first_variances():
    "A share of the clusters' mean variances for every row, in any unit of the codes; or at random around 1, as in the program."
    for share in (.1, 2.):
        model = onwards(first_variance=share, epochs=1, cluster_lr=1e-13)
        np.testing.assert_allclose(10 * np.tanh(model.head_biases_ / 10), np.log(share * model.variances_.mean(0)), atol=1e-8)
        np.testing.assert_allclose(model.head_weights_, 0, atol=1e-9)
    model = onwards(first_variance=None, epochs=1, cluster_lr=1e-13)
    np.testing.assert_allclose(model.head_biases_, 0, atol=1e-9)
    assert .05 < np.abs(model.head_weights_).max() <= (6 / 7)**.5 + 1e-9                                # Glorot and Bengio, 5 in and 2 out


# --- the model ----------------------------------------------------------------------------------------------------------------------

def test_evidence_and_draws_of_a_linear_decoder():
    "One linear layer each way: rows are a mixture of Gaussians with known mean, covariance and density, in the units of X."
    model = VaDE(3, likelihood="gaussian", variance=.2, encoder=network((2,)), pretrain="end-to-end", pretrain_epochs=60, epochs=60, batch_size=40, lr=1e-2, cluster_lr=1e-2, n_init=2, device="cpu", random_state=0, progress=False).fit(X)
    layer, = model.encoder_.decoder
    W, b = (t.detach().numpy() for t in (layer.weight, layer.bias))
    mean, cov = model.cluster_centers_ @ W.T + b, [W @ np.diag(s) @ W.T for s in model.variances_]
    exact = np.logaddexp.reduce([np.log(w) + MultivariateNormal(torch.tensor(m), torch.tensor(c + .2 * np.eye(6))).log_prob(torch.tensor(X * model.scale_)).numpy() for w, m, c in zip(model.weights_, mean, cov)]) + 6 * math.log(model.scale_)
    got = model.log_evidence(X, draws=3000)
    assert np.abs(got - exact).mean() < .1 and (got - exact).max() < 1 and np.array_equal(model.log_evidence(X[:5], 7), model.log_evidence(X[:5], 7))
    assert model.log_evidence(X, draws=1).mean() < model.log_evidence(X, draws=50).mean() < exact.mean() + .05
    rows, labels = model.sample(40_000)
    for c in range(3):
        part = rows[labels == c] * model.scale_
        assert abs((labels == c).mean() - model.weights_[c]) < .015
        if len(part) > 1000: np.testing.assert_allclose(part.mean(0), mean[c], atol=5 * np.sqrt(np.diag(cov[c]).max() / len(part))); np.testing.assert_allclose(np.cov(part.T), cov[c], atol=.1 * np.abs(cov[c]).max())
    assert (model.sample(7, cluster=2)[1] == 2).all() and np.array_equal(model.sample(7)[0], model.sample(7)[0])
    responsibilities = np.stack([w * np.exp(MultivariateNormal(torch.tensor(m), torch.tensor(np.diag(s))).log_prob(torch.tensor(model.embedding_)).numpy()) for w, m, s in zip(model.weights_, model.cluster_centers_, model.variances_)], 1)
    np.testing.assert_allclose(model.predict_proba(X), responsibilities / responsibilities.sum(1, keepdims=True), atol=1e-8)


def test_nats_of_the_dimensions():
    model = onwards(epochs=5)
    h = model.encoder_.encoder[0](torch.tensor(X * model.scale_)).detach()
    log_var = 10 * torch.tanh((h @ torch.tensor(model.head_weights_).T + torch.tensor(model.head_biases_)) / 10)
    each = kl_divergence(Normal(torch.tensor(model.embedding_)[:, None], (log_var[:, None] / 2).exp()), Normal(torch.tensor(model.cluster_centers_), torch.tensor(model.variances_).sqrt()))
    np.testing.assert_allclose(model.kl_, (torch.tensor(model.predict_proba(X))[..., None] * each).sum(1).mean(0), rtol=1e-8)
    assert model.range_ == [X.min(), X.max()]


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_clusters_are_found(likelihood):
    blobs, labels = make_blobs(200, 6, centers=4, cluster_std=.5, random_state=1)
    model = VaDE(4, likelihood=likelihood, **{**QUICK, "widths": (32, 4), "pretrain_epochs": 45, "epochs": 20, "n_init": 10}).fit(blobs)
    assert ari(labels, model.labels_) > .95 and ari(labels, model.predict(blobs)) > .95 and model.report_.active == 4
    bound = [r for r in model.history_ if r["phase"] == "bound"]
    assert bound[-1]["loss"] < bound[0]["loss"] and all(abs(r["picture"] + r["place"] + r["cluster"] - r["loss"]) < 1e-3 * abs(r["loss"]) + 1e-3 and 0 < r["lightest"] <= .25 + 1e-6 for r in bound)


# --- the contract ---------------------------------------------------------------------------------------------------------------------

def test_same_seed_same_bits():
    state = torch.get_rng_state()
    a, b, other = VaDE(4, **QUICK).fit(X), clone(VaDE(4, **QUICK)).fit(X), VaDE(4, **{**QUICK, "random_state": 1}).fit(X)
    a.sample(3), a.log_evidence(X[:3])
    assert np.array_equal(a.embedding_, b.embedding_) and np.array_equal(a.cluster_centers_, b.cluster_centers_) and not np.array_equal(a.embedding_, other.embedding_)
    assert torch.equal(state, torch.get_rng_state()) and np.array_equal(a.labels_, a.predict(X)) and a.first_labels_.shape == (120,)


@pytest.mark.parametrize("keywords", [{}, {"likelihood": "gaussian", "variance": .1, "init": "k-means"}])
def test_files_and_types(keywords, tmp_path):
    for data in (X.astype(np.float32), torch.tensor(X)):
        model = VaDE(4, **QUICK, **keywords).fit(data)
        model.save(tmp_path / "m.safetensors")
        back = VaDE.load(tmp_path / "m.safetensors")
        assert back.get_params() == model.get_params() and isinstance(back.labels_, type(model.labels_)) and back.history_ == model.history_ and back.report_ == model.report_
        for a, b in ((back.predict(data), model.predict(data)), (back.predict_proba(data), model.predict_proba(data)), (back.log_evidence(data, 4), model.log_evidence(data, 4)), (back.sample(5)[0], model.sample(5)[0]), (back.transform(data), model.transform(data))):
            assert type(a) is type(data) is type(b) and bool((a == b).all())
    assert list(model.get_feature_names_out()) == [f"vade{i}" for i in range(4)]


def test_networks_of_yours():
    images = np.random.default_rng(0).random((40, 64), dtype=np.float32)
    model = VaDE(3, **QUICK, encoder=ConvAutoencoder((1, 8, 8), (4, 8), 3)).fit(images)
    assert model.embedding_.shape == (40, 3) and model.head_weights_.shape == (3, 32) and model.sample(2)[0].shape == (2, 64)

    class Own(nn.Module):
        def __init__(self): super().__init__(); self.up, self.down = nn.Linear(6, 2), nn.Linear(2, 6)
        def encode(self, x): return self.up(x)
        def decode(self, z): return self.down(z)
    given = Own()
    before = {name: v.clone() for name, v in given.state_dict().items()}
    model = VaDE(3, **{**QUICK, "encoder": given, "pretrain": "end-to-end"}).fit(X)
    assert model.head_weights_.shape == (2, 2) and all(torch.equal(v, before[name]) for name, v in given.state_dict().items())     # a copy was trained


def test_from_the_command_line():
    assert find_clusterer("vade") is VaDE and make_clusterer(VaDE, 5, device="cpu").get_params()["n_clusters"] == 5


@pytest.mark.filterwarnings("ignore:training was interrupted")
@pytest.mark.parametrize("call", [1, 4])
def test_interrupted(call):
    class Stopped(VaDE):
        def _loss(self, module, x):
            calls.append(1)
            if len(calls) == call: os.kill(os.getpid(), signal.SIGINT)
            return super()._loss(module, x)
    calls = []
    model = Stopped(4, **{**QUICK, "epochs": 40})
    with pytest.warns(UserWarning, match="Stopped was interrupted"), pytest.raises(KeyboardInterrupt): model.fit(X)
    assert np.array_equal(model.predict(X), model.labels_) and len(calls) == call and np.isfinite(model.log_evidence(X)).all()


def test_interrupted_before_the_start(monkeypatch):
    import deepclustering.clustering.vade as vade
    calls, real = [], vade._Pixels.forward

    def forward(self, out):
        calls.append(1)
        if len(calls) == 2: os.kill(os.getpid(), signal.SIGINT)
        return real(self, out)
    monkeypatch.setattr(vade._Pixels, "forward", forward)
    model = VaDE(4, **QUICK)
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): model.fit(X)
    assert model.n_iter_ == 0 and np.array_equal(model.predict(X), model.labels_) and "bound" not in {r["phase"] for r in model.history_}


def test_a_collapse_is_told():
    with pytest.warns(ConvergenceWarning, match="the posterior has collapsed"):                        # rows that weigh nothing: the codes stop telling them
        model = onwards(1, likelihood="gaussian", variance=1e6, epochs=300, cluster_lr=3e-2, decay=1., batch_size=1000)
    assert model.kl_.max() < .01
    net = network()
    with torch.no_grad(): net.encoder[1].weight.mul_(1e-9), net.encoder[1].bias.fill_(1.)
    with pytest.warns(ConvergenceWarning, match="the codes have collapsed or clusters are empty"): onwards(encoder=net, epochs=1, cluster_lr=1e-12)
    with pytest.raises(ValueError, match="maps all 120 rows to one code"):
        with torch.no_grad(): net.encoder[1].weight.zero_()
        onwards(encoder=net)


@pytest.mark.parametrize("name, value", [("n_clusters", 121), ("n_clusters", 0), ("likelihood", "normal"), ("init", "kmeans"), ("encoder", nn.Linear(6, 2)), ("encoder", 3), ("variance", 0.), ("first_variance", 0), ("epochs", 0), ("decay", 0), ("decay", 1.5), ("decay_epochs", 1.5),
                                         ("floor", -.1), ("floor", 2), ("lr", 0.), ("cluster_lr", math.nan), ("batch_size", 0), ("pretrain", "yes"), ("pretrain_epochs", 0), ("n_init", 0), ("widths", ())])
def test_bad_parameters(name, value):
    with pytest.raises(ValueError, match=name): VaDE(**{"n_clusters": 4, **QUICK, "pretrain": "end-to-end", name: value}).fit(X)


def test_bad_data():
    with pytest.raises(ValueError, match="all 9 rows of X are equal"): VaDE(2, **QUICK).fit(np.ones((9, 3)))
    with pytest.raises(ValueError, match="NaN"): VaDE(2, **QUICK).fit(np.full((9, 3), np.nan))
    assert VaDE(1, **QUICK).fit(np.ones((9, 3))).labels_.tolist() == [0] * 9
    model = VaDE(2, **QUICK).fit(X)
    for call in (lambda: model.sample(0), lambda: model.sample(1, cluster=2), lambda: model.log_evidence(X, 0), lambda: model.predict(X[:, :5])):
        with pytest.raises(ValueError, match="n_samples|cluster|draws|features"): call()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("power", [-565, 565])
def test_the_unit_of_the_rows_does_not_matter(likelihood, power):
    "Powers of two change no digit; 2**565 is 1e170, whose square no float64 holds."
    usual, other = (VaDE(4, likelihood=likelihood, **QUICK).fit(X * unit) for unit in (1., 2.**power))
    assert other.scale_ * 2.**power == usual.scale_ and np.array_equal(other.labels_, usual.labels_) and np.array_equal(other.embedding_, usual.embedding_)
    shift = 6 * power * math.log(2) if likelihood == "gaussian" else 0                                   # density of rows as they are: six entries in another unit
    np.testing.assert_allclose(other.log_evidence(X[:9] * 2.**power, 4) + shift, usual.log_evidence(X[:9], 4), atol=2e-3)


def test_a_network_with_batch_norm_is_only_asked_in_evaluation():
    "Two rows are enough to look at the widths, and no running mean moves before training."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Linear(3, 6)
        def encode(self, x): return self.norm(self.up(x))
        def decode(self, z): return self.down(z)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = Net()
    rows = np.random.default_rng(0).random((60, 6))
    model = VaDE(3, encoder=net, pretrain="none", epochs=1, n_init=1, batch_size=20, device="cpu", random_state=0, progress=False).fit(rows)
    before = model.encoder_.norm.running_mean.clone()
    assert np.isfinite(model.log_evidence(rows[:1], 4)).all() and np.isfinite(model.log_evidence(rows[:3], 4)).all()
    assert torch.equal(model.encoder_.norm.running_mean, before)
