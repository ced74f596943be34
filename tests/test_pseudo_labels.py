"""SwAV: codes by POT and by the program's own loop, the loss by loops, crops by hand, a queue against a list, steps by hand, both collapses."""
import math

import numpy as np
import ot
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclustering.clustering.pseudo_labels import FeatureQueue, SwAV, multi_crop, swav_codes, swav_loss, train_swav
from deepclustering.core.metrics import collapse_report


def seeded(seed=0): return torch.Generator().manual_seed(seed)
def cosines(n, k, seed=0, dtype=torch.float64): return F.normalize(torch.randn(n, 8, generator=seeded(seed), dtype=dtype), dim=1) @ F.normalize(torch.randn(k, 8, generator=seeded(seed + 1), dtype=dtype), dim=1).T


def small_net(k=6, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return SwAV(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()), 32, k, hidden=16, dim=8)


IMAGES = torch.rand(96, 1, 8, 8, generator=seeded()) * torch.linspace(.2, 1, 96)[:, None, None, None]
QUICK = dict(steps=3, batch_size=32, counts=(2, 1), seed=0, device="cpu", progress=False)


# --- codes ---

def program(scores, eps, n_iters):
    "In the order of facebookresearch/swav: prototypes in rows, one sum of all first, rows, columns, and columns once more."
    Q = np.exp(np.asarray(scores, np.float64) / eps).T
    Q /= Q.sum()
    for _ in range(n_iters):
        Q *= (1 / Q.shape[0] / Q.sum(1))[:, None]
        Q *= (1 / Q.shape[1] / Q.sum(0))[None]
    return (Q / Q.sum(0, keepdims=True)).T


@pytest.mark.parametrize("n, k, n_iters, eps", [(20, 6, 1, .05), (20, 6, 3, .05), (5, 9, 3, .1), (1, 4, 3, .05), (64, 30, 3, .03), (33, 2, 10, .5)])
def test_codes_are_the_programs(n, k, n_iters, eps):
    np.testing.assert_allclose(swav_codes(cosines(n, k), eps=eps, n_iters=n_iters), program(cosines(n, k), eps, n_iters), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("r", [1, 17, 100])
def test_queue_shares_the_prototypes(r):
    S, old = cosines(12, 5), cosines(r, 5, 7)
    np.testing.assert_allclose(swav_codes(S, old), program(torch.cat([old, S]), .05, 3)[-12:], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n, k", [(10, 4), (4, 9)])
def test_at_the_end_codes_are_pots_plan(n, k):
    S = cosines(n, k)
    expected = n * ot.sinkhorn(np.full(n, 1 / n), np.full(k, 1 / k), -S.numpy(), .2, stopThr=1e-14, numItermax=100_000)
    np.testing.assert_allclose(swav_codes(S, eps=.2, n_iters=5000), expected, atol=1e-8)


def test_dtypes_extremes_and_gradient():
    S = cosines(8, 3)
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        q = swav_codes(S.to(dtype).requires_grad_())
        assert q.dtype == expected and not q.requires_grad
        torch.testing.assert_close(q, swav_codes(S.to(dtype).double()).to(expected), atol=1e-4, rtol=0)
    wild = swav_codes(1000 * S.float())
    assert torch.isfinite(wild).all() and torch.isinf((1000 * S.float() / .05).exp()).any()
    torch.testing.assert_close(wild.sum(1), torch.ones(8), atol=20_000 * 2**-23, rtol=0)                  # scores over eps are up to 20,000: so much is their rounding
    torch.testing.assert_close(swav_codes(S.T.contiguous().T), swav_codes(S))
    torch.testing.assert_close(swav_codes(S, n_iters=0), (S / .05).softmax(1))
    before = S.clone(); swav_codes(S, S); assert torch.equal(before, S)


# --- the loss ---

@pytest.mark.parametrize("V, L", [(2, 2), (2, 1), (5, 2), (3, 3)])
def test_loss_by_loops(V, L):
    scores = [cosines(6, 4, 2 * v) for v in range(V)]
    codes = [torch.rand(6, 4, generator=seeded(v), dtype=torch.float64).softmax(1) for v in range(L)]
    total = 0.
    for c in range(L):
        part = 0.
        for v in range(V):
            if v == c: continue
            for i in range(6):
                e = np.exp(scores[v][i].numpy() / .3)
                part -= sum(float(codes[c][i, j]) * math.log(e[j] / e.sum()) for j in range(4)) / 6
        total += part / (V - 1) / L
    assert abs(float(swav_loss(scores, codes, .3)) - total) < 1e-10


def test_gradient_by_hand_and_by_differences():
    S = [cosines(5, 3, 2 * v).requires_grad_() for v in range(3)]
    codes = [swav_codes(s) for s in S[:2]]
    swav_loss(S, codes).backward()
    p = [(s.detach() / .1).softmax(1) for s in S]
    for v, wanted in ((0, [1]), (1, [0]), (2, [0, 1])):
        torch.testing.assert_close(S[v].grad, sum((p[v] - codes[c]) / (.1 * 5 * 2 * 2) for c in wanted))
    assert torch.autograd.gradcheck(lambda a, b: swav_loss([a, b], codes), [s.detach().requires_grad_() for s in S[:2]])


def test_the_two_bad_losses():
    flat, sure = torch.zeros(16, 30), 2 * F.one_hot(torch.zeros(16, dtype=torch.long), 30).float()
    assert abs(float(swav_loss([flat] * 2, [swav_codes(flat)] * 2)) - math.log(30)) < 1e-5
    assert abs(float(swav_loss([sure] * 2, [swav_codes(sure)] * 2)) - math.log(30)) > 1       # equal rows have even codes, and being sure is punished
    assert float(swav_loss([sure] * 2, [swav_codes(sure, n_iters=0)] * 2)) < 1e-6


# --- crops ---

def test_whole_image_and_its_half():
    x = torch.rand(3, 2, 8, 8, generator=seeded())
    torch.testing.assert_close(multi_crop(x, (8,), (1,), ((1., 1.),), (1., 1.))[0], x, atol=1e-5, rtol=0)
    torch.testing.assert_close(multi_crop(x, (4,), (1,), ((1., 1.),), (1., 1.))[0], F.avg_pool2d(x, 2), atol=1e-5, rtol=0)     # bilinear, half-way between four pixels


@pytest.mark.parametrize("scale, ratio", [((.3, .5), (1., 1.)), ((.2, .3), (3/4, 4/3)), ((.9, 1.), (1/2, 2.))])
def test_where_crops_lie(scale, ratio):
    "Pixels that hold their own place tell the rectangle."
    n = 32
    at = torch.linspace(-1 + 1 / n, 1 - 1 / n, n, dtype=torch.float64)
    place = torch.stack([at.expand(n, n), at[:, None].expand(n, n)]).expand(400, 2, n, n).contiguous()
    crop, = multi_crop(place, (6,), (1,), (scale,), ratio, seeded())
    edge = crop[:, 0, :, [0, -1]].amax((1, 2)), crop[:, 1, [0, -1], :].amax((1, 2))
    wide, tall = (crop[:, 0, 0, 3] - crop[:, 0, 0, 2]) * 3, (crop[:, 1, 3, 0] - crop[:, 1, 2, 0]) * 3                       # six steps over a rectangle of 2 w
    cut = (wide > 1 - 1e-6) | (tall > 1 - 1e-6)
    assert ((wide * tall)[~cut] > scale[0] - 1e-6).all() and ((wide * tall) < scale[1] + 1e-6).all()
    assert ((wide / tall)[~cut] > ratio[0] - 1e-6).all() and ((wide / tall)[~cut] < ratio[1] + 1e-6).all()
    centre = crop[:, 0].mean((1, 2))
    for axis, half in ((0, wide), (1, tall)): assert (crop[:, axis].mean((1, 2)).abs() + half <= 1 + 1e-6).all() and abs(float(crop[:, axis].mean())) < .1      # within the image, and in its middle on average
    assert max(float(e.max()) for e in edge) <= 1
    if scale[1] < .6: assert float((wide * tall).max() - (wide * tall).min()) > .8 * (scale[1] - scale[0]) and float(centre.std()) > .1


def test_kinds_counts_and_seeds():
    crops = multi_crop(IMAGES, generator=seeded())
    assert [tuple(c.shape) for c in crops] == [(96, 1, 8, 8)] * 2 + [(96, 1, 5, 5)] * 4
    assert all(torch.equal(a, b) for a, b in zip(crops, multi_crop(IMAGES, generator=seeded()))) and not torch.equal(crops[0], crops[1])
    assert len(multi_crop(IMAGES, counts=(2, 0))) == 2


# --- queue, network, training ---

@pytest.mark.parametrize("length, batches", [(4, [2, 2, 2]), (5, [2, 2, 2, 2]), (3, [5, 1]), (0, [2, 2])])
def test_queue_is_a_list(length, batches):
    queue, kept, at, C = FeatureQueue(length), [], 0, torch.eye(1)
    for b in batches:
        rows = torch.arange(at, at + b, dtype=torch.float32)[:, None]; at += b
        queue.push(0, rows.requires_grad_())
        kept = (rows[:, 0].tolist() + kept)[:length]
        s = queue.scores(0, C)
        assert (s is None) == (len(kept) < length or length == 0) and (s is None or s[:, 0].tolist() == kept and not s.requires_grad)
    assert queue.scores(1, C) is None


def test_views_are_the_networks():
    net = small_net().eval()
    crops = [torch.rand(4, 1, s, s, generator=seeded(s + i)) for i, s in enumerate((8, 5, 8, 6))]
    for z, x in zip(net.views(crops), crops): torch.testing.assert_close(z, net(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net(crops[0]).norm(dim=1), torch.ones(4))


def test_first_step_by_hand():
    "The recorded loss of one step is @eq-swapped of the same draws; the prototypes move by Adam's first step, against the sign of their gradient."
    from deepclustering.core.training import train
    def by_hand(net, x):
        z = net.views([c + .05 * torch.randn_like(c) for c in multi_crop(x, counts=(2, 1))])
        scores = [v @ net.prototypes.T for v in z]
        codes = [torch.tensor(program(s.detach(), .05, 3), dtype=torch.float32) for s in scores[:2]]
        pairs = ((0, 1), (0, 2), (1, 0), (1, 2))
        loss = sum(-(codes[c] * (scores[v] / .1).log_softmax(1)).sum(1).mean() for c, v in pairs) / 4
        return loss, {"used": len({int(j) for q in codes for j in q.argmax(1)})}
    a, b = small_net(), small_net()
    record, = train_swav(a, IMAGES, **{**QUICK, "steps": 1})
    draw = lambda g: IMAGES[torch.randperm(96, generator=g)[:32]]
    expected = train(b, by_hand, draw, steps=1, every=1, optimizer=lambda w: torch.optim.Adam(w, lr=2e-3), seed=0, device="cpu", progress=False).records[0]
    assert abs(record["loss"] - expected["loss"]) < 1e-4 and record["used"] == expected["used"]
    big = b.prototypes.grad.abs() > 1e-4
    torch.testing.assert_close(a.prototypes[big], b.prototypes[big], atol=1e-4, rtol=0)
    torch.testing.assert_close(a.prototypes[big], (small_net().prototypes - 2e-3 * b.prototypes.grad.sign())[big], atol=1e-4, rtol=0)


def test_frozen_repeatable_and_queued():
    net, start = small_net(), small_net().prototypes
    records = train_swav(net, IMAGES, freeze=3, **QUICK)
    torch.testing.assert_close(net.prototypes, start)
    assert train_swav(small_net(), IMAGES, freeze=3, **QUICK) == records
    train_swav(net, IMAGES, freeze=1, **QUICK); assert not torch.allclose(net.prototypes, start)
    plain = train_swav(small_net(), IMAGES, **{**QUICK, "steps": 2})
    late = train_swav(small_net(), IMAGES, queue_length=32, queue_start=1, **{**QUICK, "steps": 2})       # full after the second step: not used yet
    early = train_swav(small_net(), IMAGES, queue_length=32, **{**QUICK, "steps": 2})
    assert late == plain and early != plain


def test_few_prototypes_without_equal_shares():
    "Noise whose brightness varies ends in two of eight prototypes, bright and dark; with equal shares all are used."
    for seed in (0, 1):
        seen = {}
        for n_iters in (0, 3):
            net = small_net(8, seed)
            records = train_swav(net, IMAGES, **{**QUICK, "steps": 120, "counts": (2, 0), "lr": 5e-3}, n_iters=n_iters)
            with torch.no_grad(): seen[n_iters] = collapse_report((net.eval()(IMAGES) @ F.normalize(net.prototypes, dim=1).T / .1).softmax(1)), records[-1]
        (few, few_log), (even, even_log) = seen[0], seen[3]
        assert few.balance < .5 and few_log["used"] == 2 and few_log["loss"] < .2
        assert even.balance > .9 and even_log["used"] > 7 and even_log["loss"] > .5 and even.information > few.information


@pytest.mark.parametrize("call, message", [
    (lambda: swav_codes(torch.rand(3)), "scores must be a floating point matrix"), (lambda: swav_codes(torch.ones(2, 2, dtype=torch.long)), "scores must be a floating"), (lambda: swav_codes(torch.rand(0, 3)), "scores must be a"),
    (lambda: swav_codes(torch.rand(3, 2), torch.rand(4, 3)), "queue must be"), (lambda: swav_codes(torch.rand(3, 2), eps=0), "eps must be"), (lambda: swav_codes(torch.rand(3, 2), n_iters=-1), "n_iters must be"),
    (lambda: swav_loss([torch.rand(2, 2)], []), "codes must be those"), (lambda: swav_loss([torch.rand(2, 2)] * 2, [torch.rand(2, 3)]), "one shape"), (lambda: swav_loss([torch.rand(2, 2)] * 2, [torch.rand(2, 2)], 0), "temperature must be"),
    (lambda: multi_crop(IMAGES[0]), "images must be"), (lambda: multi_crop(IMAGES, sizes=(8,)), "one entry for each kind"), (lambda: multi_crop(IMAGES, scales=((.1, .2), (.5, .3))), "scales must be pairs"),
    (lambda: FeatureQueue(-1), "length must be"), (lambda: train_swav(small_net(), IMAGES, **{**QUICK, "batch_size": 97}), "batch_size must be"), (lambda: train_swav(small_net(), IMAGES, freeze=-1, **QUICK), "freeze must be"),
    (lambda: train_swav(small_net(), IMAGES, n_codes=4, **QUICK), "n_codes must be")])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message): call()
