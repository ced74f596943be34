"""LARS, LAMB and the schedules: against loops in NumPy, torch's own optimisers and schedulers, sharded parameters, checkpoints, odd shapes, bad input."""
import copy
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from deepclustering.core.distributed import run
from deepclustering.core.training import batch_at, train
from deepclustering.parallelism.large_batch import LAMB, LARS, RangeTest, one_cycle, range_test, time_varying, trust_ratio, warmup_then_decay

SHAPES = [(3, 4), (5,), (), (2, 3, 1, 2), (1, 1), (4, 0), (1, 7)]
MAKERS = {"LARS": partial(LARS, lr=.7, trust_coefficient=.05, weight_decay=.1), "LAMB": partial(LAMB, lr=.05, weight_decay=.1)}


def parameters(seed=0, dtype=torch.float64, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]


def feed(ps, seed):
    g = torch.Generator().manual_seed(seed)
    for p in ps: p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


# ---- optimisers against NumPy


def lars_numpy(w, grads, lr, m, beta, tau, ratio):
    v = np.zeros_like(w)
    for g in grads:
        norms = np.sqrt((w ** 2).sum()), np.sqrt((g ** 2).sum()) + beta * np.sqrt((w ** 2).sum())
        lam = tau * norms[0] / norms[1] if ratio and min(norms) > 0 else 1.
        v = m * v + lam * (g + beta * w)
        w = w - lr * v
    return w


def lamb_numpy(w, grads, lr, b1, b2, eps, beta, ratio):
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u = m / (1 - b1 ** t) / (np.sqrt(v / (1 - b2 ** t)) + eps) + beta * w
        norms = np.sqrt((w ** 2).sum()), np.sqrt((u ** 2).sum())
        w = w - lr * (norms[0] / norms[1] if ratio and min(norms) > 0 else 1.) * u
    return w


@pytest.mark.parametrize("rule", [None, True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_five_steps_in_numpy(name, rule):
    ps = parameters()
    opt = (partial(LARS, lr=.7, momentum=.8, weight_decay=.1, trust_coefficient=.05) if name == "LARS" else partial(LAMB, lr=.05, betas=(.7, .9), eps=1e-4, weight_decay=.1))(ps, layerwise=rule)
    start, grads = [p.detach().numpy().copy() for p in ps], []
    for t in range(5):
        feed(ps, t)
        grads.append([p.grad.numpy().copy() for p in ps])
        opt.step()
        for p, g in zip(ps, grads[-1]): assert np.array_equal(p.grad.numpy(), g)  # gradients are the caller's
    for i, p in enumerate(ps):
        layer = start[i].ndim > 1
        beta, ratio = .1 if layer or rule is not None else 0., layer if rule is None else rule
        mine = [g[i] for g in grads]
        wanted = lars_numpy(start[i], mine, .7, .8, beta, .05, ratio) if name == "LARS" else lamb_numpy(start[i], mine, .05, .7, .9, 1e-4, beta, ratio)
        np.testing.assert_allclose(p.detach().numpy(), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_the_ratio_they_are_torchs_own(dtype):
    for mine, theirs, tol in ((partial(LARS, lr=.1, weight_decay=.2, layerwise=False), partial(torch.optim.SGD, lr=.1, momentum=.9, weight_decay=.2), 0),
                              (partial(LAMB, lr=.1, eps=1e-8, weight_decay=.2, layerwise=False), partial(torch.optim.AdamW, lr=.1, weight_decay=.2), 10 * torch.finfo(dtype).eps)):
        a, b = parameters(1, dtype), parameters(1, dtype)
        one, two = mine(a), theirs(b)
        for t in range(6): feed(a, t); feed(b, t); one.step(); two.step()
        for p, q in zip(a, b): torch.testing.assert_close(p, q, rtol=tol, atol=tol)


def test_a_group_sets_its_own_rule_and_decay():
    ps = parameters(2, shapes=[(2, 3), (2, 3), (3,)])
    opt = LARS([{"params": ps[:1], "layerwise": False, "weight_decay": 0.}, {"params": ps[1:], "lr": .5}], lr=.1, momentum=0., trust_coefficient=.01)
    before = [p.detach().clone() for p in ps]
    feed(ps, 0)
    opt.step()
    torch.testing.assert_close(ps[0], before[0] - .1 * ps[0].grad)
    torch.testing.assert_close((ps[1] - before[1]).norm(), .5 * .01 * before[1].norm())
    torch.testing.assert_close(ps[2], before[2] - .5 * ps[2].grad)  # a vector moves with the whole rate


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_layers_do_not_feel_the_scale_of_the_loss(name, scale):
    a, b = parameters(3, shapes=[(3, 4), (2, 2, 2)]), parameters(3, shapes=[(3, 4), (2, 2, 2)])
    make = partial(LARS, lr=.7, trust_coefficient=.05) if name == "LARS" else partial(LAMB, lr=.05, eps=1e-30, weight_decay=.1)
    one, two = make(a), make(b)
    for t in range(4):
        feed(a, t); feed(b, t)
        for p in b: p.grad *= scale
        one.step(); two.step()
    for p, q in zip(a, b): torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_zero_norms_and_missing_gradients(name):
    w, idle = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    opt = MAKERS[name]([w, idle])
    w.grad = torch.ones(2, 2)
    opt.step()
    assert w.isfinite().all() and (w < 0).all() and torch.equal(idle, torch.ones(2, 2)) and idle not in opt.state
    still = nn.Parameter(torch.ones(2, 2))
    opt = (partial(LARS, lr=1.) if name == "LARS" else partial(LAMB, weight_decay=0.))([still])
    still.grad = torch.zeros(2, 2)
    opt.step()
    assert torch.equal(still, torch.ones(2, 2))


@pytest.mark.parametrize("name", MAKERS)
def test_state_goes_on_where_it_was(name):
    a = parameters(4)
    one = MAKERS[name](a)
    for t in range(3): feed(a, t); one.step()
    b = copy.deepcopy(a)
    two = MAKERS[name](b)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for t in range(3, 6): feed(a, t); feed(b, t); one.step(); two.step()
    for p, q in zip(a, b): assert torch.equal(p, q)


@pytest.mark.parametrize("name", MAKERS)
def test_the_training_loop_resumes_from_its_checkpoint(name, tmp_path):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    def fit(steps, path):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        train(net, lambda model, rows: model(rows).square().mean(), x, steps=steps, batch_size=8, optimizer=MAKERS[name], checkpoint=path, device="cpu", progress=False)
        return nn.utils.parameters_to_vector(net.parameters())
    whole = fit(12, tmp_path / "whole.safetensors")
    fit(5, tmp_path / "part.safetensors")
    assert torch.equal(fit(12, tmp_path / "part.safetensors"), whole)


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision_and_strides(name):
    half = nn.Parameter(torch.full((300, 300), 300., dtype=torch.float16))  # the norm, 90,000, is more than float16 holds
    half.grad = torch.full_like(half, 250.)
    MAKERS[name]([half]).step()
    assert half.dtype == torch.float16 and half.isfinite().all() and (half < 300).all()
    base = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = nn.Parameter(base.T), nn.Parameter(base.T.contiguous())
    g = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for p in (a, b): p.grad = g.clone(); MAKERS[name]([p]).step()
    torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_trust_ratio():
    w = torch.tensor([[3., 4.]])
    assert trust_ratio(w, torch.tensor(10.), .5).item() == .25
    assert trust_ratio(0 * w, torch.tensor(10.), .5) == trust_ratio(w, torch.tensor(0.), .5) == 1
    assert trust_ratio(torch.full((1000,), 300., dtype=torch.float16), torch.tensor(1.)).dtype == torch.float32
    assert trust_ratio(w.double(), torch.tensor(2.)).dtype == torch.float64


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")
def test_sharded_by_fsdp2_they_see_the_norm_of_the_layer():
    "DTensor reduces norms over ranks: what a plain shard gets wrong."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    def fit(model, rows, opt):
        for _ in range(3): opt.zero_grad(); model(rows).square().mean().backward(); opt.step()
    for make in MAKERS.values():
        def work(rank, world):
            model = net()
            fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
            fit(model, x.tensor_split(world)[rank], make(model.parameters()))
            return [p.full_tensor().detach() for p in model.parameters()]
        alone = net()
        fit(alone, x, make(alone.parameters()))
        for got in run(work, 2):
            for p, q in zip(got, alone.parameters()): torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)


# ---- schedules against torch's own


@pytest.mark.parametrize("total,warmup,start,power", [(20, 5, .25, 1.), (20, 5, .125, 2.), (7, 1, .5, 1.), (9, 0, .3, 3.), (12, 11, .1, 1.)])
def test_warmup_then_decay_is_linear_then_polynomial(total, warmup, start, power):
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.)
    down = torch.optim.lr_scheduler.PolynomialLR(opt, total - warmup, power)
    if warmup:
        for group in opt.param_groups: group["lr"] = group["initial_lr"]
        up = torch.optim.lr_scheduler.LinearLR(opt, start, 1., warmup)
        down = torch.optim.lr_scheduler.SequentialLR(opt, [up, down], [warmup])
    for t in range(total):
        assert math.isclose(warmup_then_decay(t, total, warmup, start, power), opt.param_groups[0]["lr"], rel_tol=1e-9, abs_tol=1e-12), t
        opt.step(); down.step()


@pytest.mark.parametrize("k", [1, 4, 32])
def test_the_scaling_rule_starts_at_the_small_rate(k):
    lrs = [k * .1 * warmup_then_decay(t, 50, 10, 1 / k, 0) for t in range(50)]
    np.testing.assert_allclose(lrs[:11], np.linspace(.1, k * .1, 11), rtol=1e-12)
    assert lrs[10:] == [k * .1] * 40


@pytest.mark.parametrize("total,share", [(10, .3), (37, .45), (100, .5), (4, .5)])
def test_one_cycle_is_torchs_three_phases(total, share):
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1., momentum=.9)
    peer = torch.optim.lr_scheduler.OneCycleLR(opt, 1., total, pct_start=share, anneal_strategy="linear", three_phase=True, div_factor=10, final_div_factor=20, base_momentum=.8, max_momentum=.9)
    for t in range(total):
        np.testing.assert_allclose(one_cycle(t, total, share, .1, .005, (.9, .8)), (opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]), rtol=1e-9, atol=1e-12)
        opt.step()
        if t < total - 1: peer.step()


def test_time_varying_is_a_sigmoid():
    t = torch.arange(0, 400, dtype=torch.float64)
    for decay, delay, alpha, floor in ((.05, 100, 1., 0.), (.3, 7, .1, .02), (2., 200, 5., 1.)):
        mine = torch.tensor([time_varying(int(s), decay, delay, alpha, floor) for s in t], dtype=torch.float64)
        torch.testing.assert_close(mine, torch.sigmoid(math.log(alpha) - decay * (t - delay)) / alpha + floor, rtol=1e-9, atol=1e-12)
        assert (mine.diff() <= 0).all()
    assert time_varying(10 ** 9, 1., 0) < 1e-300


def test_it_moves_the_trust_coefficient_of_lars():
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    opt = LARS([p], 1., momentum=0., trust_coefficient=.1)
    for t in range(5):
        opt.param_groups[0]["trust_coefficient"] = .1 * time_varying(t, 1., 2)
        before = p.detach().clone()
        p.grad = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        opt.step()
        torch.testing.assert_close((p - before).norm() / before.norm(), torch.tensor(.1 / (1 + math.exp(t - 2)), dtype=torch.float64))


def test_without_curvature_the_scaling_rule_is_exact():
    "A loss that is linear in the weights: k steps and one of k times the rate, momentum aside, are the same."
    g = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    def walk(batches, lr):
        p = nn.Parameter(torch.ones(5, dtype=torch.float64))
        opt = torch.optim.SGD([p], lr)
        for b in batches: opt.zero_grad(); (b @ p).mean().backward(); opt.step()
        return p.detach()
    torch.testing.assert_close(walk(g.split(1), .1), walk([g], .6), rtol=1e-13, atol=0)


# ---- range test


def test_range_test_in_a_loop():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = nn.Linear(3, 1).double()
    before = copy.deepcopy(net)
    loss = lambda model, rows: (model(rows) - 1).square().mean()
    found = range_test(net, loss, x, .01, 1., 7, batch_size=10, seed=3, device="cpu")
    for p, q in zip(net.parameters(), before.parameters()): assert torch.equal(p, q)
    losses, v = [], [torch.zeros_like(p) for p in before.parameters()]
    for t in range(7):
        value = loss(before, batch_at(x, t, 10, 3))
        losses.append(value.item())
        with torch.no_grad():
            for p, b, g in zip(before.parameters(), v, torch.autograd.grad(value, before.parameters())): p -= .01 * 100 ** (t / 6) * b.mul_(.9).add_(g)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-10)
    np.testing.assert_allclose(found.rates, np.geomspace(.01, 1, 7), rtol=1e-12)


def test_range_test_uses_the_optimiser_and_its_groups():
    net = nn.Linear(3, 2)
    seen = []
    def make(ps): seen.extend(ps); return LAMB([{"params": ps[:1], "lr": 9.}, {"params": ps[1:]}])
    range_test(net, lambda m, x: m(x).square().mean(), torch.ones(4, 3), .1, .2, 3, make, device="cpu")
    assert len(seen) == 2 and all(a is not b for a, b in zip(seen, net.parameters()))


def test_peak_by_hand():
    rates = np.array([1., 2, 3, 4])
    assert RangeTest(rates, np.array([3., 2, 1, 9])).peak(0) == 3
    smooth = [3, (2 + .5 * 3) / 1.5, (1 + .5 * 2 + .25 * 3) / 1.75, (9 + .5 + .5 + .375) / 1.875]
    assert RangeTest(rates, np.array([3., 2, 1, 9])).peak(.5) == rates[int(np.argmin(smooth))] == 3
    with pytest.raises(ValueError, match="smooth must lie"): RangeTest(rates, rates).peak(1)


# ---- bad input


@pytest.mark.parametrize("settings,message", [
    (dict(lr=-.1), "lr must be a number, at least 0, got -0.1"), (dict(lr=math.inf), "lr must be"), (dict(lr="x"), "lr must be"), (dict(lr=True), "lr must be"),
    (dict(lr=1., momentum=1.), "momentum must be"), (dict(lr=1., momentum=-.1), "momentum must be"), (dict(lr=1., weight_decay=-1), "weight_decay must be"), (dict(lr=1., weight_decay=math.nan), "weight_decay must be"),
    (dict(lr=1., trust_coefficient=0), "trust_coefficient must be a number above 0, got 0"), (dict(lr=1., layerwise=2), "layerwise must be None, True or False, got 2")])
def test_lars_refuses(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")): LARS(parameters(), **settings)


@pytest.mark.parametrize("settings,message", [(dict(betas=(.9,)), "betas must be"), (dict(betas=(.9, 1.)), "betas must be"), (dict(betas=(-.1, .9)), "betas must be"), (dict(eps=0), "eps must be"), (dict(lr=math.nan), "lr must be")])
def test_lamb_refuses(settings, message):
    with pytest.raises(ValueError, match=message): LAMB(parameters(), **settings)


def test_a_group_is_checked_too_and_zero_is_allowed():
    with pytest.raises(ValueError, match="momentum must be"): LARS([{"params": parameters(), "momentum": 1.}], 1.)
    p = parameters(shapes=[(2, 2)])
    before = p[0].detach().clone()
    feed(p, 0)
    LARS(p, 0, momentum=0, weight_decay=0, layerwise=True).step()
    assert torch.equal(p[0], before)


@pytest.mark.parametrize("call,message", [
    (lambda: warmup_then_decay(-1, 5), "step must be at least 0"), (lambda: warmup_then_decay(0, 5, 5), "warmup must be between 0 and 4"), (lambda: warmup_then_decay(0, 5, start=-.1), "start must lie"),
    (lambda: warmup_then_decay(0, 5, power=math.inf), "power must be"), (lambda: warmup_then_decay(.5, 5), "step must be a whole number"),
    (lambda: one_cycle(10, 10), "step must be between 0 and 9"), (lambda: one_cycle(0, 10, 0.), "share must lie"), (lambda: one_cycle(0, 10, end=-1), "end must lie"), (lambda: one_cycle(0, 10, momenta=(.9,)), "momenta must be"),
    (lambda: time_varying(0, -1., 0), "decay must be above 0"), (lambda: time_varying(0, 1., 0, alpha=math.inf), "alpha must be above 0"), (lambda: time_varying(0, 1., math.nan), "delay must be at least 0"),
    (lambda: range_test(nn.Linear(1, 1), lambda m, x: m(x).mean(), torch.ones(2, 1), 1., .1), "low and high must be"), (lambda: range_test(nn.Linear(1, 1), None, torch.ones(2, 1), device="cpu"), "loss must be a function")])
def test_schedules_refuse(call, message):
    with pytest.raises(ValueError, match=message): call()
