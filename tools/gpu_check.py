"""Every operator on the GPU at hand against the CPU in float64: `make gpu-check`, under nine minutes, one JSON file.

Needs a checkout, Python >= 3.11, torch, NumPy, SciPy and scikit-learn; pure-Python wheels that are missing there (fastcore, tqdm)
are imported from .whl/ if they lie in it. No network, no installation. The file is $OUT/gpu-check.json, else _out/gpu-check.json.

    python tools/gpu_check.py                every check on the GPU
    python tools/gpu_check.py --cpu          the same checks on the CPU with small sizes: is the program itself sound?
    python tools/gpu_check.py segment lloyd  only checks whose name contains one of these, in this order; what the file says of the others stays

A chapter adds its operators below: `@check(...)` over the call. `make` draws the inputs on the CPU; the same call on float64 copies on the
CPU is the reference, unless `judge` measures the error of what came out in another way. An error above `tolerance` fails.
The floor is what the operator must at least read, write and compute, at the rates of a copy and of a matrix product that this very run
measured; `kernels` are the GPU's milliseconds without the host's. Where there is a kernel of ours the same call also runs without it, in plain PyTorch.
"""
import argparse
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *map(str, (ROOT / ".whl").glob("*-none-any.whl"))]

import torch  # noqa: E402

MINUTES = 8.5


@dataclass
class Check:
    "One operator with one kind of input."
    name: str
    call: callable        # (*inputs) -> tensor or tuple of tensors
    make: callable        # (generator, big) -> inputs on the CPU
    tolerance: float      # largest error allowed
    cost: callable        # (*inputs) -> (bytes, operations) that no implementation can do without
    judge: callable       # (output, inputs on the CPU, call) -> error
    moves: bool = True    # do the inputs go to the device, or does the operator fetch them?
    plain: bool = False   # may it be answered without a kernel, as in float64?


CHECKS = []


def relative(output, inputs, call):
    "Largest difference from the reference over the reference's largest magnitude, over all outputs."
    expected = call(*(t.double() if t.is_floating_point() else t for t in inputs))
    pairs = zip(*(o if isinstance(o, tuple) else (o,) for o in (output, expected)), strict=True)
    worst = 0.
    for got, want in pairs:
        if got.shape != want.shape: return math.inf
        got, want = got.cpu().double(), want.double()
        same = (got == want) | (got.isnan() & want.isnan())
        error = (got - want).abs()[~same] / want[want.isfinite()].abs().max().clamp_min(1e-300) if want.isfinite().any() else torch.full((int((~same).sum()),), math.inf)
        if error.numel(): worst = max(worst, float(error.nan_to_num(math.inf).max()))
    return worst


def check(name, make, tolerance, cost, judge=relative, **more):
    "Register the decorated call."
    return lambda call: CHECKS.append(Check(name, call, make, tolerance, cost, judge, **more))


def size(t): return t.numel() * t.element_size()


# --- core.assign --------------------------------------------------------------------------------------------------------

def points_and_centers(dtype=torch.float32, batch=()):
    def make(generator, big):
        n, k, d = (2_000_000 // math.prod(batch or (1,)), 256, 64) if big else (999, 37, 17)
        return tuple(torch.randn(*batch, rows, d, generator=generator).add_(3).to(dtype) for rows in (n, k))
    return make


def nearest_cost(x, c): return size(x) + size(c) + 8 * x.shape[:-1].numel(), 2 * x.numel() * c.shape[-2]


def share_outside(exact):
    "The share of points whose centre is farther than rounding excuses; over the first 20,000 points of each problem."
    def judge(output, inputs, call):
        from deepclustering.core.assign import assignment_certificate
        x, c = inputs
        labels, (n, d), k = output.cpu(), x.shape[-2:], c.shape[-2]
        return max(assignment_certificate(p[:20_000].float(), q.float(), l[:20_000], exact=exact).outside
                   for p, q, l in zip(x.reshape(-1, n, d), c.reshape(-1, k, d), labels.reshape(-1, n)))
    return judge


def nearest(x, c, **kwargs):
    from deepclustering.core.assign import nearest
    return nearest(x, c, **kwargs)


check("assign.nearest", points_and_centers(), 0, nearest_cost, share_outside(False))(nearest)
check("assign.nearest bfloat16", points_and_centers(torch.bfloat16), 0, nearest_cost, share_outside(False))(nearest)
check("assign.nearest float16", points_and_centers(torch.float16), 0, nearest_cost, share_outside(False))(nearest)
check("assign.nearest batch of 16", points_and_centers(batch=(16,)), 0, nearest_cost, share_outside(False))(nearest)
check("assign.nearest exact", points_and_centers(), 0, nearest_cost, share_outside(True))(lambda x, c: nearest(x, c, exact=True))


@check("assign.nearest from host memory", points_and_centers(), 0, nearest_cost, share_outside(False), moves=False)
def _(x, c): return nearest(x, c.to(DEVICE))


# --- core.aggregate -----------------------------------------------------------------------------------------------------

def rows_and_slots(slots, ordered=False):
    def make(generator, big):
        n, d, k = (1_000_000, 64, slots) if big else (1003, 5, min(slots, 29))
        index = torch.randint(k - 1, (n,), generator=generator)  # the last slot stays empty
        return torch.randn(n, d, generator=generator), index.sort().values if ordered else index, torch.tensor(k)
    return make


def into_slots(x, index, k): return size(x) + size(index) + int(k) * x.element_size() * x.shape[1], x.numel()


def into_rows(x, index, k): return 2 * size(x) + size(index), 4 * x.numel()


def segment(name):
    def call(x, index, k):
        return getattr(import_module("deepclustering.core.aggregate"), f"segment_{name}")(x, index, int(k))
    return call


for _name, _cost in [("sum", into_slots), ("mean", into_slots), ("max", into_slots), ("logsumexp", into_slots), ("softmax", into_rows)]:
    for _slots in (1_000, 100_000):
        check(f"aggregate.segment_{_name} {_slots:,} slots", rows_and_slots(_slots), 2e-5, _cost)(segment(_name))
    check(f"aggregate.segment_{_name} sorted", rows_and_slots(1_000, ordered=True), 2e-5, _cost)(segment(_name))


def rows_in(n, d, slots, dtype=torch.float32, arrays=1):
    "One array, or two, of n rows in random slots."
    def make(generator, big):
        rows, k = (n, slots) if big else (1003, min(slots, 29))
        values = (torch.randn(rows, d, generator=generator).to(dtype) for _ in range(arrays))
        return *values, torch.randint(k, (rows,), generator=generator), torch.tensor(k)
    return make


def softmax_without_a_check(x, index, k):
    from deepclustering.core.aggregate import segment_softmax
    return segment_softmax(x, index, int(k), check=False)


def softmax_and_gradient(x, g, index, k):
    leaf = x.detach().requires_grad_()
    p = softmax_without_a_check(leaf, index, k)
    return p.detach(), torch.autograd.grad(p, leaf, g)[0]


def into_rows_and_back(x, g, index, k): return 5 * size(x) + size(index), 8 * x.numel()  # reads x, p, g, writes p, dx


# A weight is at most 1 and rounded once: half an epsilon. The gradient p (g - G) begins with the rounded p, also in G, and is rounded again: two epsilons of the largest
# p |g|, and that is less than twice the largest |p (g - G)|. In float32 the sums and the exponential 2^(x log2 e) are rounded.
_epsilon = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
for _name, _n, _d, _slots, _dtype in [("one slot", 1_000_000, 64, 1, torch.float32), ("one slot bf16", 1_000_000, 64, 1, torch.bfloat16), ("one column", 4_000_000, 1, 1_000, torch.float32),
                                      ("100k slots bf16", 1_000_000, 64, 100_000, torch.bfloat16), ("wide bf16", 64_000, 1_000, 100, torch.bfloat16)]:
    check(f"aggregate.segment_softmax {_name}", rows_in(_n, _d, _slots, _dtype), _epsilon[_dtype], into_rows)(softmax_without_a_check)
for _name, _dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
    check(f"aggregate.segment_softmax gradient {_name}", rows_in(1_000_000, 64, 1_000, _dtype, 2), 4 * _epsilon[_dtype], into_rows_and_back)(softmax_and_gradient)


def summed_with_weights(x, w, index, k):
    from deepclustering.core.aggregate import segment_sum
    return segment_sum(x, index, int(k), weights=w, check=False)


def rows_and_weights(generator, big):
    x, index, k = rows_in(1_000_000, 64, 1_000)(generator, big)
    return x, torch.rand(len(x), generator=generator), index, k


# A float32 sum in tiles of at least four rows and pieces of a window: its error stays below 2e-5 of the largest sum also in one slot of a million. A half-precision result is rounded once more:
# half an epsilon of the dtype. The maximum is exact.
for _name, _n, _d, _slots, _dtype in [("sum bf16", 1_000_000, 64, 1_000, torch.bfloat16), ("sum one slot", 1_000_000, 64, 1, torch.float32), ("sum million slots", 1_000_000, 64, 1_000_000, torch.float32),
                                      ("sum one column", 4_000_000, 1, 1_000, torch.float32), ("sum wide bf16", 64_000, 1_000, 100, torch.bfloat16), ("max bf16", 1_000_000, 64, 1_000, torch.bfloat16),
                                      ("max one slot", 1_000_000, 64, 1, torch.float32), ("max million slots", 1_000_000, 64, 1_000_000, torch.float32), ("max one column", 4_000_000, 1, 1_000, torch.float32),
                                      ("logsumexp bf16", 1_000_000, 64, 1_000, torch.bfloat16), ("logsumexp one slot", 1_000_000, 64, 1, torch.float32), ("logsumexp one column", 4_000_000, 1, 1_000, torch.float32)]:
    check(f"aggregate.segment_{_name}", rows_in(_n, _d, _slots, _dtype), 2e-5 if _dtype == torch.float32 else _epsilon[_dtype], into_slots)(segment(_name.split()[0]))
check("aggregate.segment_sum weighted", rows_and_weights, 2e-5, lambda x, w, index, k: (into_slots(x, index, k)[0] + size(w), 2 * x.numel()))(summed_with_weights)


# --- core.lloyd and clustering ------------------------------------------------------------------------------------------

def blobs(generator, big):
    n, k, d = (1_000_000, 64, 32) if big else (600, 5, 3)
    centers = 10 * torch.randn(k, d, generator=generator)
    which = torch.randint(k, (n,), generator=generator)
    return centers[which] + torch.randn(n, d, generator=generator), centers + torch.randn(k, d, generator=generator)


def one_pass(x, c, *weight): return size(x) + size(c) + sum(map(size, weight)) + 8 * x.shape[:-1].numel() + 8 * c.numel(), 2 * x.numel() * c.shape[-2] + x.numel()


def labels_and_sums(output, inputs, call):
    """Infinite if a label is outside its certificate (float32's, over the first 5,000 points of each problem); else the error of sums and masses from float64 sums
    by those labels, relative to the sums of magnitudes."""
    from deepclustering.core.assign import assignment_certificate
    labels, S, W = (t.cpu() for t in output)
    x, c, weight = inputs[0].double(), inputs[1], (inputs[2].double() if len(inputs) > 2 else torch.ones(inputs[0].shape[:-1], dtype=torch.float64))
    (B, n, d), k = x.shape, c.shape[1]
    if any(assignment_certificate(inputs[0][b, :5_000].float(), c[b], labels[b, :5_000]).outside for b in range(B)): return math.inf
    slot = (labels + k * torch.arange(B)[:, None]).flatten()
    add = lambda rows: torch.zeros(B * k, rows.shape[-1], dtype=torch.float64).index_add_(0, slot, rows.flatten(0, 1)).view(B, k, -1)
    mean = c.to(DEVICE).mean(1, keepdim=True).cpu().double()  # to the last bit the caller's: another would move every point, and a slot of few points near it would show that
    moved = (x - mean) * weight[..., None]
    error = lambda got, want, scale: float(((got - want).abs() / scale.clamp_min(1e-300)).max())
    return max(error(S, add(moved), add(moved.abs())), error(W[..., None], add(weight[..., None]), add(weight[..., None])))


def problems(B, n, k, d, dtype=torch.float32, weighted=False, offset=3.):
    def make(generator, big):
        size = (B, n, k, d) if big else (2, 301, min(k, 37), min(d, 19))
        x, c = (torch.randn(size[0], rows, size[3], generator=generator).add_(offset).to(dtype) for rows in size[1:3])
        return (x, c.float(), torch.rand(*size[:2], generator=generator)) if weighted else (x, c.float())
    return make


def pass_over(split=None):
    def call(x, c, weight=None):
        if split is not None and x.is_cuda:
            from deepclustering.core.lloyd_triton import launch_label_and_sum
            return launch_label_and_sum(x, c, weight, True, split)
        from deepclustering.core.lloyd import label_and_sum
        return label_and_sum(x, c, weight, True)
    return call


# float32 sums of at most 2**14 terms a program: sqrt(2**14) * 2**-24 = 8e-6 where roundings are independent
for _name, _problem in [("16 centres", problems(1, 1_000_000, 16, 64)), ("64 centres", problems(1, 1_000_000, 64, 64)), ("64 centres of 128", problems(1, 250_000, 64, 128)),
                        ("64 bfloat16", problems(1, 250_000, 64, 64, torch.bfloat16)), ("64 float16 far away", problems(1, 250_000, 64, 64, torch.float16, offset=300.)),
                        ("64 weighted", problems(1, 250_000, 64, 64, weighted=True)), ("16 problems", problems(16, 16_384, 64, 64)),
                        ("256 centres", problems(1, 1_000_000, 256, 64)), ("256 bfloat16", problems(1, 250_000, 256, 64, torch.bfloat16)),
                        ("1,000 weighted", problems(1, 100_000, 1_000, 128, weighted=True)), ("10 centres of 784", problems(1, 50_000, 10, 784))]:
    check(f"lloyd.label_and_sum {_name}", _problem, 2e-5, one_pass, labels_and_sums)(pass_over())
for _name, _problem in [("64 centres", problems(1, 1_000_000, 64, 64)), ("256 centres", problems(1, 1_000_000, 256, 64)), ("16 centres of 4", problems(1, 250_000, 16, 4))]:
    check(f"lloyd.label_and_sum {_name}, no tensor cores", _problem, 2e-5, one_pass, labels_and_sums)(pass_over(split=False))


def ten_passes(x, c): return 10 * (size(x) + 8 * len(x)), 10 * 2 * x.numel() * len(c)


@check("lloyd.kmeans ten iterations", blobs, 1e-4, ten_passes)
def _(x, c):
    from deepclustering.core.lloyd import kmeans
    return kmeans(x, c, max_iter=10).centers


@check("clustering.KMeans", blobs, 0.02, lambda x, c: (0, 0), judge=lambda output, inputs, call: inertia_excess(output, inputs))
def _(x, c):
    from deepclustering.clustering.kmeans import KMeans
    return KMeans(n_clusters=len(c), init=c, max_iter=10).fit(x).cluster_centers_


def inertia_excess(centers, inputs):
    "How much larger, relatively, the inertia is than that of the reference; on 20,000 points."
    from deepclustering.core.lloyd import kmeans
    x, c = (t.double() for t in inputs)
    inertia = lambda c: float(torch.cdist(x[:20_000], c).min(1).values.square().sum())
    return inertia(centers.cpu().double()) / inertia(kmeans(x, c, max_iter=10).centers) - 1


def dissimilarity_table(dtype):
    def make(generator, big):
        n, k = (6_000, 50) if big else (300, 7)
        x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").to(dtype), torch.randperm(n, generator=generator)[:k]
    return make


def one_table(D, medoids): return size(D), 6 * D.numel()


for _dtype in (torch.float32, torch.float64):
    @check(f"clustering.fasterpam {str(_dtype)[6:]}", dissimilarity_table(_dtype), 1e-9, one_table)
    def _(D, medoids):
        "Loss, medoids in their slots and swaps: the swaps of the CPU, or they differ by whole numbers."
        from deepclustering.clustering.kmedoids import fasterpam
        r = fasterpam(D, medoids)
        return torch.tensor([r.loss], dtype=torch.float64), r.medoids.double(), torch.tensor([r.n_iter, r.n_swap], dtype=torch.float64)


@check("clustering.pam_build", dissimilarity_table(torch.float64), 1e-9, lambda D, medoids: (len(medoids) * size(D), 2 * len(medoids) * D.numel()))
def _(D, medoids):
    from deepclustering.clustering.kmedoids import build_medoids
    return build_medoids(D, len(medoids)).double()


@check("clustering.CLARA", blobs, 1e-4, lambda x, c: (0, 0), plain=True)
def _(x, c):
    from deepclustering.clustering.kmedoids import CLARA
    m = CLARA(len(c), random_state=0).fit(x.double())  # in float32 a near tie may lead to another optimum
    return torch.tensor([m.inertia_], dtype=torch.float64)


def tree_of_labels(generator, big):
    n, ks = (4_000_000, (100_000, 5_000, 100)) if big else (900, (70, 20, 6))
    return tuple(torch.randint(k, (m,), generator=generator) for m, k in zip((n, *ks), ks))


def whole_read(*tensors): return sum(map(size, tensors)), sum(t.numel() for t in tensors)


@check("clustering.hierarchical_sample", tree_of_labels, 0., whole_read)
def _(*tree):
    "The same rows as on the CPU: whole numbers, and chance is drawn on the CPU."
    from deepclustering.clustering.hierarchical_kmeans import hierarchical_sample
    return hierarchical_sample(tree, len(tree[0]) // 10, random_state=0).double()


def budgets(generator, big):
    p, c = (10_000, 2_000_000) if big else (9, 200)
    return torch.randint(5_000, (p,), generator=generator), torch.randint(50, (c,), generator=generator), torch.randint(p, (c,), generator=generator)


@check("clustering.share_budget", budgets, 0., whole_read)
def _(budget, sizes, parent):
    from deepclustering.clustering.hierarchical_kmeans import share_budget
    return share_budget(budget, sizes, parent, torch.Generator().manual_seed(0)).double()


@check("clustering.HierarchicalKMeans", blobs, 0.02, lambda x, c: (0, 0))
def _(x, c):
    "Inertia of the first level, without resampling: a row more or less among the closest would start another k-means."
    from deepclustering.clustering.hierarchical_kmeans import HierarchicalKMeans
    return HierarchicalKMeans([len(c), 2], n_resampling=0, random_state=0).fit(x).distances_.double().square().sum()[None]


def sdp_points(generator, big):
    n = 400 if big else 40
    return (torch.randn(n, 5, generator=generator, dtype=torch.float64) + 8 * torch.eye(4, 5, dtype=torch.float64)[torch.arange(n) % 4],)


@check("clustering.SDPKMeans", sdp_points, 1e-6, lambda x: (0, 0), plain=True)
def _(x):
    from deepclustering.clustering.sdp import SDPKMeans
    return torch.tensor([SDPKMeans(4, random_state=0, verbose=False).fit(x).inertia_], dtype=torch.float64)


@check("clustering.solve_sdp, two memberships", sdp_points, 1e-2, lambda x: (0, 0))
def _(x):
    from deepclustering.clustering.likelihood_sdp import gaussian_affinity
    from deepclustering.clustering.sdp import solve_sdp
    C = torch.stack([torch.eye(5), 2 * torch.eye(5)]).to(x)
    return torch.tensor([solve_sdp(gaussian_affinity(x, C), [1., 1.], max_iter=100, tol=1e-3).value], dtype=torch.float64)


# --- clustering.contrastive_spectral ---------------------------------------------------------------------------------------

def two_views(generator, big):
    n, d = (4096, 128) if big else (99, 17)
    first = torch.randn(n, d, generator=generator)
    return first, first + .3 * torch.randn(n, d, generator=generator)


def info_nce_cost(a, b): return 2 * (size(a) + size(b)) + 4 * (2 * len(a)) ** 2, 2 * (2 * len(a)) ** 2 * a.shape[1]  # the table of kernels is written once


def contrastive(name, *args, **kwargs):
    def call(a, b):
        from deepclustering.clustering import contrastive_spectral
        return getattr(contrastive_spectral, name)(a, b, *args, **kwargs).reshape(1)
    return call


check("contrastive_spectral.info_nce", two_views, 1e-5, info_nce_cost)(contrastive("info_nce"))
check("contrastive_spectral.kernel_info_nce sum", two_views, 1e-4, info_nce_cost)(contrastive("kernel_info_nce", (2., 1.), (.5, .5)))
check("contrastive_spectral.clip_loss", two_views, 1e-5, info_nce_cost)(contrastive("clip_loss"))


# --- clustering.mixtures ------------------------------------------------------------------------------------------------

def points_and_means(generator, big):
    n, k, d = (200_000, 32, 64) if big else (999, 5, 17)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, x[:k].clone()


def em_step_cost(x, means): return 2 * len(means) * size(x), 4 * x.numel() * means.numel()  # full: two products (n, d) x (d, d) a component


def em_step(kind):
    def call(x, means):
        from deepclustering.clustering.mixtures import Mixture, em_steps, precision_factors
        k, d = means.shape
        shape = {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}[kind]
        eye = torch.eye(d, dtype=x.dtype, device=x.device).expand(shape) if kind in ("full", "tied") else x.new_ones(shape)
        _, mixture = next(em_steps(x, Mixture(x.new_full((k,), 1 / k), means, eye, precision_factors(eye, kind)), kind))
        return mixture.weights, mixture.means, mixture.covariances
    return call


for _kind in ("full", "tied", "diag", "spherical"): check(f"mixtures.em_step {_kind}", points_and_means, 1e-9, em_step_cost)(em_step(_kind))


def learn_stream(form):
    def call(x, means):
        from deepclustering.clustering.mixtures import learn_point, nobody
        c, scale = nobody(x.shape[1], x.device), 2 * x.new_ones(x.shape[1])
        for p in x[:300]: c = learn_point(c, p, float("inf"), scale, form)
        return c.means, torch.linalg.inv(c.matrices) if form == "precision" else c.matrices, c.log_dets
    return call


for _form in ("precision", "covariance"): check(f"mixtures.learn_point {_form}", points_and_means, 1e-8, lambda x, means: (0, 0))(learn_stream(_form))


def unit_points_and_centers(generator, big):
    n, k, d = (1_000_000, 64, 64) if big else (999, 7, 17)
    return tuple(torch.nn.functional.normalize(torch.randn(rows, d, generator=generator), dim=1) for rows in (n, k))


def tell_step_cost(x, c): return 3 * size(x) + size(c), 2 * x.numel() * c.shape[0]  # labels, distances and gradient each read the points


def tell_step(rule, lr=0.1):
    def call(x, c):
        from deepclustering.clustering.tell import KMeansLayer, center_step
        layer, counts = KMeansLayer(c, tied=rule != "direction"), torch.full((len(c),), 100., dtype=torch.float64, device=c.device)
        center_step(layer, x, rule, lr, counts, unit=rule == "direction")
        return layer.centers.detach()
    return call


# labels of near ties may differ between float32 and the float64 reference; a centre of thousands of points hardly notices
check("tell.center_step lloyd", unit_points_and_centers, 1e-3, tell_step_cost)(tell_step("lloyd"))
check("tell.center_step counts", unit_points_and_centers, 1e-3, tell_step_cost)(tell_step("counts"))
check("tell.center_step direction", unit_points_and_centers, 1e-3, tell_step_cost)(tell_step("direction"))


# --- core.transport -----------------------------------------------------------------------------------------------------

def scores_of_items(shape=(16_384, 1_000)):
    def make(generator, big):
        return (torch.rand(*(shape if big else (130, 17)), generator=generator),)
    return make


def passes(count):
    "Each iteration reads the scores twice; two operations an entry and reading."
    return lambda s: (2 * count * size(s), 4 * count * s.numel())


def sinkhorn(**policy):
    def call(s):
        from deepclustering.core.transport import sinkhorn
        return sinkhorn(s, eps=0.1, n_iters=20, tol=0, **policy) * s.numel()
    return call


for _name, _policy in [("balanced", {}), ("unbalanced", {"rho_a": 0.5, "rho_b": 0.5}), ("partial", {"mass": 0.5})]:
    check(f"transport.sinkhorn {_name}", scores_of_items(), 1e-4, passes(20))(sinkhorn(**_policy))


@check("transport.sinkhorn implicit gradient", scores_of_items((4_096, 256)), 1e-3, passes(200))
def _(s):
    from deepclustering.core.transport import sinkhorn
    leaf = s.detach().requires_grad_()
    return torch.autograd.grad((sinkhorn(leaf, eps=0.5, n_iters=200, tol=1e-6) * s).sum(), leaf)[0]


def unit_features(n, k, p, dtype=torch.float32, values=0):
    "Unit vectors of items and slots, their scores between -1 and 1; perhaps values of the slots."
    def make(generator, big):
        rows = (n, k) if big else (131, 37)
        x, y = (torch.nn.functional.normalize(torch.randn(r, p if big else min(p, 17), generator=generator), dim=1).to(dtype) for r in rows)
        return (x, y, torch.randn(rows[1], values, generator=generator)) if values else (x, y)
    return make


def half_step(x, y, *rest): return size(x) + size(y) + sum(map(size, rest)) + 4 * (len(x) + len(y)), 2 * len(y) * x.numel()


def with_values(x, y, v): return half_step(x, y, v)[0] + 4 * len(x) * v.shape[1], 2 * len(x) * len(y) * (x.shape[1] + v.shape[1])


def half_steps(count, more=0):
    "Two an iteration and `more`: each reads the factors and makes the products."
    return lambda x, y: tuple((2 * count + more) * c for c in half_step(x, y))


def logsumexp_product(x, y):
    from deepclustering.core.transport import logsumexp_product
    return logsumexp_product(x, y, scale=20.)


def sumexp_product(x, y, v):
    "With the normaliser that is known here: of scores up to 20 none overflows when 20 is taken off."
    from deepclustering.core.transport import sumexp_product
    u = torch.full(x.shape[:1], -20., dtype=v.dtype, device=x.device)
    return sumexp_product(x, y, u, None, v, 20.)


def logsumexp_product_gradient(x, y):
    from deepclustering.core.transport import logsumexp_product
    leaves = [t.detach().requires_grad_() for t in (x, y)]
    return torch.autograd.grad(logsumexp_product(*leaves, scale=5.).square().sum(), leaves)


def sinkhorn_factored(**settings):
    def call(x, y):
        from deepclustering.core.transport import sinkhorn_factored
        free = sinkhorn_factored(x, y, **{"eps": 0.1, "n_iters": 5, "tol": 0} | settings)
        return free.f, free.g, free.to_slots(x)
    return call


# The reference gets the same 16-bit numbers, and their products are exact in float32: what is left are float32 sums, exponents of 20 with an error of 20 * 2^-24, whatever
# the dtype. Gradients come out in the dtype of the features: half an epsilon, and one for the sum of the two parts of it.
for _name, _dtype, _epsilon_x in (("fp32", torch.float32, 5e-5), ("fp16", torch.float16, 1e-3), ("bf16", torch.bfloat16, 8e-3)):
    check(f"transport.logsumexp_product {_name}", unit_features(16_384, 1_000, 64, _dtype), 2e-6, half_step)(logsumexp_product)
    check(f"transport.logsumexp_product few rows {_name}", unit_features(300, 100_000, 64, _dtype), 2e-6, half_step)(logsumexp_product)
    check(f"transport.sumexp_product {_name}", unit_features(16_384, 1_000, 64, _dtype, values=64), 5e-5, with_values)(sumexp_product)
    check(f"transport.logsumexp_product gradient {_name}", unit_features(16_384, 1_000, 64, _dtype), _epsilon_x, lambda x, y: (2 * (size(x) + size(y)), 10 * len(y) * x.numel()))(logsumexp_product_gradient)
    for _policy, _settings in (("balanced", {}), ("unbalanced", {"rho_a": 0.5, "rho_b": 0.5}), ("partial", {"mass": 0.5})):
        check(f"transport.sinkhorn_factored {_policy} {_name}", unit_features(16_384, 1_000, 64, _dtype), 1e-4, half_steps(5, 1))(sinkhorn_factored(**_settings))
check("transport.sinkhorn_factored SwAV bf16", unit_features(4_096, 3_000, 128, torch.bfloat16), 1e-4, half_steps(3, 1))(sinkhorn_factored(eps=0.05, n_iters=3, check=False))
check("transport.logsumexp_product wide bf16", unit_features(8_192, 1_000, 1_000, torch.bfloat16), 2e-6, half_step)(logsumexp_product)
check("transport.logsumexp_product odd width bf16", unit_features(16_384, 1_001, 67, torch.bfloat16), 2e-6, half_step)(logsumexp_product)


# --- core.kernels -------------------------------------------------------------------------------------------------------

@check("kernels.row_logsumexp", lambda generator, big: (torch.randn(*((200_000, 1_000) if big else (99, 300)), generator=generator),), 2e-6, lambda x: (size(x) + 4 * len(x), 4 * x.numel()))
def _(x):
    if not x.is_cuda: return x.logsumexp(1)
    from deepclustering.core.kernels import row_logsumexp
    return row_logsumexp(x)


# --- moe.layer ------------------------------------------------------------------------------------------------------------

def tokens_and_experts(dtype=torch.float32):
    def make(generator, big):
        T, D, width, E, K = (4096, 1024, 256, 64, 8) if big else (37, 24, 16, 5, 2)
        x, up, down = (torch.randn(*s, generator=generator).div_(s[-1] ** .5).to(dtype) for s in ((T, D), (E, 2 * width, D), (E, D, width)))
        weights, experts = torch.rand(T, E, generator=generator).topk(K)  # the last expert loses most of its tokens
        return x, up, down, experts.masked_fill(experts == E - 1, -1), weights.masked_fill(experts == E - 1, 0)
    return make


def experts_cost(x, up, down, experts, weights): return 2 * size(x) + size(up) + size(down), 6 * experts.numel() * down[0].numel()


def run_experts(name, priority="token", capacity=None):
    def call(x, up, down, experts, weights):
        from deepclustering.moe.layer import EXPERTS, combine, dispatch
        from deepclustering.moe.routing import Routing
        d = Routing(experts, weights, num_experts=len(up)).to_dispatch(capacity, priority)
        return combine(EXPERTS[name](dispatch(x, d), d.counts, up, down), d)
    return call


def experts_gradients(name):
    def call(x, up, down, experts, weights):
        leaves = [t.detach().clone().requires_grad_() for t in (x, up, down, weights)]
        return torch.autograd.grad(run_experts(name)(*leaves[:3], experts, leaves[3].masked_fill(experts < 0, 0)).square().sum(), leaves)
    return call


for _name in ("loop", "padded", "grouped"):
    check(f"moe.{_name}_experts", tokens_and_experts(), 2e-5, experts_cost)(run_experts(_name))
    check(f"moe.{_name}_experts bfloat16", tokens_and_experts(torch.bfloat16), 2e-2, experts_cost)(run_experts(_name))
    check(f"moe.{_name}_experts gradients", tokens_and_experts(), 5e-5, lambda *a: tuple(3 * c for c in experts_cost(*a)))(experts_gradients(_name))
check("moe.grouped_experts bfloat16 gradients", tokens_and_experts(torch.bfloat16), 5e-2, lambda *a: tuple(3 * c for c in experts_cost(*a)))(experts_gradients("grouped"))
check("moe.grouped_experts capacity by weight", tokens_and_experts(), 2e-5, experts_cost)(run_experts("grouped", "weight", 7))


# --- moe.scatter and moe.blocksparse ----------------------------------------------------------------------------------------
# After the section moe.layer: uses tokens_and_experts, experts_cost, size, check, DEVICE, relative.

def run_bank(name, look=True):
    "A bank by name, with its ways there and back. Without `look` the host asks the GPU nothing on the way (loop, padded and blocksparse ask for the lengths)."
    def call(x, up, down, experts, weights):
        from deepclustering.moe.layer import EXPERTS, FUSED, _find, combine, dispatch
        from deepclustering.moe.routing import Routing
        d = Routing(experts, weights, num_experts=len(up)).to_dispatch(check=look)
        return _find(FUSED[name])(x, d, up, down) if name in FUSED else combine(EXPERTS[name](dispatch(x, d), d.counts, up, down), d)
    return call


def with_gradients(bank, look=True):
    def call(x, up, down, experts, weights):
        leaves = [t.detach().clone().requires_grad_() for t in (x, up, down, weights)]
        y = bank(*leaves[:3], experts, leaves[3].masked_fill(experts < 0, 0) if look else leaves[3])
        return y.detach(), *torch.autograd.grad(y, leaves, x.detach())           # what arrives: the tokens themselves
    return call


def backward_cost(*inputs): return tuple(3 * c for c in experts_cost(*inputs))


for _name in ("scatter", "blocksparse"):
    check(f"moe.{_name}_experts", tokens_and_experts(), 2e-5, experts_cost)(run_bank(_name))
    check(f"moe.{_name}_experts bfloat16", tokens_and_experts(torch.bfloat16), 2e-2, experts_cost)(run_bank(_name))
    check(f"moe.{_name}_experts float16", tokens_and_experts(torch.float16), 4e-3, experts_cost)(run_bank(_name))
    check(f"moe.{_name}_experts gradients", tokens_and_experts(), 5e-5, backward_cost)(with_gradients(run_bank(_name)))
    check(f"moe.{_name}_experts bfloat16 gradients", tokens_and_experts(torch.bfloat16), 5e-2, backward_cost)(with_gradients(run_bank(_name)))


def large_layer(generator, big):
    "16,384 tokens, 64 experts of width 1024, top 8, nobody dropped, in bfloat16."
    T, D, width, E, K = (16_384, 1024, 1024, 64, 8) if big else (37, 24, 16, 9, 8)
    x, up, down = (torch.randn(*s, generator=generator).div_(s[-1] ** .5).bfloat16() for s in ((T, D), (E, 2 * width, D), (E, D, width)))
    weights, experts = torch.rand(T, E, generator=generator).topk(K)
    return x, up, down, experts, weights


def odd_layer(generator, big):
    "Sizes that no tile divides, and queues of very different lengths: expert 0 is never chosen, expert 1 by everybody."
    T, D, width, E, K = (3001, 1000, 328, 37, 3) if big else (31, 17, 9, 7, 3)
    x, up, down = (torch.randn(*s, generator=generator).div_(s[-1] ** .5).bfloat16() for s in ((T, D), (E, 2 * width, D), (E, D, width)))
    scores = torch.rand(T, E, generator=generator).pow(torch.linspace(.2, 5, E))
    scores[:, 0], scores[:, 1] = -1, 2
    weights, experts = scores.topk(K)
    return x, up, down, experts, weights.contiguous()


def dense_layer(x, up, down, experts, weights):
    "A gated feed-forward layer with as many operations: K experts that everybody visits."
    K = experts.shape[1]
    gate, more = up[:K].chunk(2, 1)
    h = torch.nn.functional.silu(x @ gate.flatten(0, 1).mT) * (x @ more.flatten(0, 1).mT)
    return h @ down[:K].transpose(0, 1).flatten(1).mT


def against_float32_here(reference):
    "The largest error relative to the reference in float32 on the same device; a float64 product of this size takes a CPU too long."
    def judge(output, inputs, call):
        expected = reference(*(t.to(DEVICE).float() if t.is_floating_point() else t.to(DEVICE) for t in inputs))
        pairs = zip(*(o if isinstance(o, tuple) else (o,) for o in (output, expected)), strict=True)
        return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs)
    return judge


for _name in ("scatter", "blocksparse", "grouped"):
    check(f"moe.{_name}_experts 16,384 tokens", large_layer, 2e-2, experts_cost, against_float32_here(run_bank("loop")))(run_bank(_name, look=False))
    check(f"moe.{_name}_experts 16,384 tokens gradients", large_layer, 5e-2, backward_cost, against_float32_here(with_gradients(run_bank("loop"), False)))(with_gradients(run_bank(_name, look=False), False))
    check(f"moe.{_name}_experts odd sizes gradients", odd_layer, 5e-2, backward_cost, against_float32_here(with_gradients(run_bank("loop"), False)), plain=_name == "blocksparse")(with_gradients(run_bank(_name, look=False), False))  # blocks of 8 are no tile
check("moe.dense layer of as many operations", large_layer, 2e-2, experts_cost, against_float32_here(dense_layer))(dense_layer)
check("moe.dense layer gradients", large_layer, 5e-2, backward_cost, against_float32_here(lambda *a: dense_and_gradients(*a)))(lambda *a: dense_and_gradients(*a))


def dense_and_gradients(x, up, down, experts, weights):
    leaves = [t.detach().clone().requires_grad_() for t in (x, up, down)]
    y = dense_layer(*leaves, experts, weights)
    return y.detach(), *torch.autograd.grad(y, leaves, x.detach())


# --- deep clustering ----------------------------------------------------------------------------------------------------

def unit_pixels(generator, big): return (torch.rand(20_000 if big else 300, 64, generator=generator),)


@check("autoencoder.pretrain_layers codes", unit_pixels, 1e-3, lambda x: (0, 0))
def _(x):
    from deepclustering.clustering.autoencoder import encode_all, pretrain_layers
    from deepclustering.core.models import MLPAutoencoder
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        net = MLPAutoencoder(64, (32, 16, 4)).to(x)
    pretrain_layers(net, x, 0., 2, batch_size=1024, seed=0, device=x.device, progress=False)
    return encode_all(net, x)


@check("clustering.AutoencoderKMeans predict", unit_pixels, 1e-3, lambda x: (0, 0))
def _(x):
    from deepclustering.clustering.autoencoder import AutoencoderKMeans
    model = AutoencoderKMeans(5, widths=(32, 16, 4), pretrain_epochs=6, batch_size=2048, n_init=3, random_state=0, progress=False).fit(x)
    return (model.predict(x) == model.labels_).double().mean()[None]


def codes_and_centers(generator, big):
    n, k, d = (200_000, 64, 16) if big else (300, 5, 4)
    return 3 * torch.randn(n, d, generator=generator), 3 * torch.randn(k, d, generator=generator)


@check("dec.target_distribution and gradients", codes_and_centers, 1e-3, lambda z, c: (0, 0))
def _(z, c):
    from deepclustering.clustering.dec import divergence, target_distribution
    from deepclustering.core.assign import student_t
    z, c = z.clone().requires_grad_(), c.clone().requires_grad_()
    q = student_t(z, c)
    p = target_distribution(q)
    return p, *torch.autograd.grad(len(z) * divergence(p, q), (z, c))


def one_step(kind):
    def call(x):
        import deepclustering.clustering.dec as dec
        from deepclustering.core.models import MLPAutoencoder
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(0)
            net = MLPAutoencoder(64, (32, 16, 4))
        model = getattr(dec, kind)(5, encoder=net, pretrain="none", batch_size=1 << 20, update_interval=1, max_iter=1, n_init=3, random_state=0, progress=False).fit(x)
        return torch.as_tensor((model.predict(x) == model.labels_).double().mean())[None], torch.tensor([float(model.report_.active)])
    return call


for kind in ("DEC", "IDEC", "DCN"): check(f"clustering.{kind} predict", unit_pixels, 1e-3, lambda x: (0, 0))(one_step(kind))


def some_memberships(generator, big): return (torch.randn(*((200_000, 64) if big else (300, 5)), generator=generator).softmax(1),)


@check("depict.balanced_targets", some_memberships, 1e-3, lambda p: (0, 0))
def _(p):
    from deepclustering.clustering.depict import balanced_targets
    return balanced_targets(p), balanced_targets(p, "squared")


def a_cloud(generator, big): return (torch.randn(20_000 if big else 300, 5, generator=generator),)


@check("path_integral.path_increments", a_cloud, 1e-3, lambda x: (0, 0))
def _(x):
    from deepclustering.clustering.path_integral import directed_graph, path_increments, transitions
    graph = directed_graph(x)
    index, weight = transitions(graph)
    labels = (10 * x[:, 0]).round().long().clamp(-10, 10) + 10
    pairs = torch.tensor([[i, i + 1] for i in range(20)], device=x.device)
    return graph.weight.float(), (1e4 * path_increments(index, weight, labels, pairs)).float()


@check("clustering.DEPICT predict", unit_pixels, 1e-3, lambda x: (0, 0))
def _(x):
    from deepclustering.clustering.depict import DEPICT
    from deepclustering.core.models import ConvAutoencoder
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        net = ConvAutoencoder((1, 8, 8), (8, 8), 5, kernel=(4, 5), padding=(0, 2), tanh=True)   # no noise: no draws that differ by device
    model = DEPICT(5, encoder=net, pretrain_epochs=1, start_epochs=1, update_interval=1, max_iter=1, n_init=3, batch_size=1 << 20, random_state=0, progress=False).fit(x)
    return torch.as_tensor((model.predict(x) == model.labels_).double().mean())[None], torch.tensor([float(model.report_.active)])


def codes_and_mixture(generator, big):
    n, k, d = (200_000, 32, 16) if big else (300, 5, 4)
    return tuple(torch.randn(*s, generator=generator) for s in ((n, d), (n, d), (k,), (k, d), (k, d)))


@check("vade.kl_terms and gradients", codes_and_mixture, 1e-3, lambda *t: (0, 0))
def _(mu, log_var, logits, means, log_vars):
    from deepclustering.clustering.vade import MixturePrior, kl_terms, log_joint
    mu, means = mu.clone().requires_grad_(), means.clone().requires_grad_()
    prior = MixturePrior(logits.log_softmax(0), means, log_vars)
    place, cluster = kl_terms(log_joint(mu, prior).log_softmax(1), mu, log_var, prior)
    return place.detach(), cluster.detach(), *torch.autograd.grad((place + cluster).sum(), (mu, means))


@check("clustering.VaDE predict", unit_pixels, 1e-3, lambda x: (0, 0))
def _(x):
    from deepclustering.clustering.vade import VaDE
    model = VaDE(5, widths=(32, 4), pretrain="end-to-end", pretrain_epochs=1, epochs=1, n_init=3, batch_size=1 << 20, random_state=0, progress=False).fit(x)
    return torch.as_tensor((model.predict(x) == model.labels_).double().mean())[None], torch.isfinite(model.log_evidence(x[:50], 4)).double().mean()[None]


def some_codes(generator, big): return (torch.randn(*((600, 160) if big else (40, 5)), generator=generator),)


@check("jule.triplet_loss and gradient", some_codes, 1e-3, lambda z: (0, 0))
def _(z):
    from deepclustering.clustering.jule import triplet_loss
    z = z.clone().requires_grad_()
    labels = torch.arange(len(z), device=z.device) // 8
    loss = triplet_loss(z, labels, margin=.5, gamma=1.5, n_negatives=len(z))     # all rows: nothing that is drawn matters
    return loss.detach()[None], len(z) * torch.autograd.grad(loss, z)[0]


@check("clustering.JULE and agglomerate", unit_pixels, 1e-3, lambda x: (0, 0))
def _(x):
    from deepclustering.clustering.jule import JULE, agglomerate
    from deepclustering.clustering.path_integral import directed_graph
    x = x[:3000]
    first = agglomerate(directed_graph(x), None, 20, points=x)
    model = JULE(5, image_shape=(8, 8), channels=(8,), epochs=1, random_state=0, progress=False).fit(x)
    return torch.bincount(first).sort().values.float(), torch.tensor([float(model.report_.active), float(len(model.period_labels_)), float(torch.as_tensor(model.embedding_).norm(dim=1).mean())])


@check("pseudo_labels.swav_codes", a_cloud, 1e-3, lambda x: (0, 0))
def _(x):
    from deepclustering.clustering.pseudo_labels import swav_codes
    z = torch.nn.functional.normalize(x, dim=1)
    S = z @ z[:4].T
    return swav_codes(S, S[::2]), swav_codes(S, n_iters=100)


@check("pseudo_labels.multi_crop", unit_pixels, 1e-3, lambda x: (0, 0))
def _(x):
    from deepclustering.clustering.pseudo_labels import multi_crop
    return tuple(multi_crop(x.reshape(-1, 1, 8, 8), counts=(1, 1), generator=torch.Generator().manual_seed(0)))


@check("partial_transport.semantic_labels", a_cloud, 1e-3, lambda x: (0, 0))
def _(x):
    from deepclustering.clustering.partial_transport import semantic_graph, semantic_labels
    from deepclustering.clustering.path_integral import directed_graph
    log_p = (4 * x[:, :4].double()).log_softmax(1)
    return (len(x) * semantic_labels(log_p, semantic_graph(directed_graph(x)), .5, max_iter=5, tol=1e-8)).float()


@check("clustering.SP2OT predict", unit_pixels, 1e-3, lambda x: (0, 0))
def _(x):
    from deepclustering.clustering.partial_transport import SP2OT
    from deepclustering.core.models import MLPAutoencoder
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        net = MLPAutoencoder(64, (32, 5))
    model = SP2OT(5, encoder=net, pretrain="none", view_noise=0., update_interval=1, max_iter=1, n_init=3, batch_size=1 << 20, random_state=0, progress=False).fit(x)
    return torch.as_tensor((model.predict(x) == model.labels_).double().mean())[None], torch.tensor([float(model.report_.active)])


def some_head_logits(generator, big): return tuple(torch.randn(4, 65_536 if big else 200, 20, generator=generator) for _ in range(2))


@check("heads.losses", some_head_logits, 1e-3, lambda a, b: (0, 0))
def _(a, b):
    from deepclustering.clustering.heads import scan_loss, self_label_loss, temi_loss
    return scan_loss(a, b), temi_loss(a, b, torch.full((4, 20), .05, device=a.device)), self_label_loss(3 * a, b, .5)


@check("divclust.likeness", some_head_logits, 1e-3, lambda a, b: (0, 0))
def _(a, b):
    from deepclustering.clustering.divclust import head_likeness, head_nmi
    return head_likeness(a.softmax(2)), head_nmi(a.argmax(2), 20).float()


def head_fit(kind):
    def call(x):
        import deepclustering.clustering as clustering
        model = getattr(clustering, kind)(5, n_heads=2, max_iter=3, batch_size=1 << 20, random_state=0, progress=False).fit(x)
        return torch.as_tensor((model.predict(x) == model.labels_).double().mean())[None]
    return call


for kind in ("SCANHead", "TEMIHead", "DivClust"): check(f"clustering.{kind} predict", unit_pixels, 1e-3, lambda x: (0, 0))(head_fit(kind))


# --- pooling.windows ----------------------------------------------------------------------------------------------------

def a_map(shape, dtype=torch.float32, last=False, window=2, gradient=False, mean=0.):
    "A map, small without `big`, and, for the gradient, what arrives at its windows of this size and stride."
    def make(generator, big):
        size = shape if big else (2, 3, *(2 * window + 1 + i for i in range(len(shape) - 2)))
        x = torch.randn(*size, generator=generator).add_(mean).to(dtype)
        g = torch.randn(*size[:2], *(n // window for n in size[2:]), generator=generator).to(dtype)
        if last: x = x.to(memory_format=torch.channels_last)
        return (x, g) if gradient else (x,)
    return make


def soft_pool(**window):
    def call(x):
        from deepclustering.pooling.windows import _soft_pool
        return _soft_pool(x, x.dim() - 2, **(dict(kernel_size=2, stride=None, padding=0, dilation=1, ceil_mode=False) | window))
    return call


def soft_pool_and_gradient(x, g):
    leaf = x.detach().requires_grad_()
    y = soft_pool()(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


def halved(x): return size(x) + size(x) // 2 ** (x.dim() - 2), 8 * x.numel()  # reads x, writes y


def halved_and_back(x, g): return 3 * size(x) + 2 * size(g), 16 * x.numel()     # reads x, writes y; reads x and g, writes dx


# y is a mean of what it pools and is rounded once: half an epsilon of the largest. The gradient is rounded once, from float32 numbers that depend on x - L: an epsilon of |x| there.
_round = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
for _name, _dtype, _last in (("fp32", torch.float32, False), ("fp16", torch.float16, False), ("bf16", torch.bfloat16, False), ("bf16 channels last", torch.bfloat16, True)):
    check(f"pooling.soft_pool2d {_name}", a_map((20, 32, 128, 128), _dtype, _last), _round[_dtype], halved)(soft_pool())
    check(f"pooling.soft_pool2d gradient {_name}", a_map((20, 32, 128, 128), _dtype, _last, gradient=True), 2 * _round[_dtype], halved_and_back)(soft_pool_and_gradient)
check("pooling.soft_pool2d 3x3 stride 2", a_map((32, 64, 112, 112)), _round[torch.float32], halved)(soft_pool(kernel_size=3, stride=2, padding=1))
check("pooling.soft_pool1d", a_map((32, 64, 16_384)), _round[torch.float32], halved)(soft_pool())
check("pooling.soft_pool3d", a_map((4, 32, 16, 56, 56)), _round[torch.float32], halved)(soft_pool())


# --- pooling.adapool, pooling.mixed -------------------------------------------------------------------------------------

def ada_pool(**options):
    def call(x):
        from deepclustering.pooling.adapool import ada_pool2d
        return ada_pool2d(x, 2, **options)
    return call


def ada_pool_and_gradient(x, g):
    leaf = x.detach().requires_grad_()
    y = ada_pool()(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


def tree_pool(x):
    from deepclustering.pooling.mixed import tree_weights
    from deepclustering.pooling.windows import pool_windows
    v = torch.linspace(-1, 1, 16, dtype=x.dtype, device=x.device).view(4, 4)
    return pool_windows(x, tree_weights(v, v[:3].flip(1)), (2, 2))


for _name, _dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
    check(f"pooling.ada_pool2d {_name}", a_map((20, 32, 128, 128), _dtype), _round[_dtype], halved)(ada_pool())
    # eDSCW has a kink where the mean of a window is 0, which sums of 16-bit numbers hit exactly: the map is kept away from it
    check(f"pooling.ada_pool2d gradient {_name}", a_map((20, 32, 128, 128), _dtype, gradient=True, mean=3.), 2 * _round[_dtype], halved_and_back)(ada_pool_and_gradient)
check("pooling.ada_pool2d vectors", a_map((20, 32, 128, 128)), _round[torch.float32], halved)(ada_pool(vectors=True))
check("pooling.tree_weights 3 levels", a_map((20, 32, 128, 128)), 2e-5, halved)(tree_pool)


# --- pooling.maxout, pooling.all_convolutional --------------------------------------------------------------------------

@check("pooling.channel_max_pool", a_map((20, 32, 128, 128)), 1e-7, lambda x: (size(x) + size(x) // 4, x.numel()))
def _(x):
    from deepclustering.pooling.maxout import channel_max_pool
    return channel_max_pool(x, 4 if x.shape[1] % 4 == 0 else 3)


def sent_back(rule):
    def call(x):
        from deepclustering.pooling.all_convolutional import AverageHead, guided_backpropagation
        head = AverageHead(x.shape[1], 10).to(x)
        torch.nn.init.zeros_(head.conv.bias)
        with torch.no_grad(): head.conv.weight.copy_(torch.arange(head.conv.weight.numel(), device=x.device, dtype=torch.float64).cos().view_as(head.conv.weight))
        return guided_backpropagation(torch.nn.Sequential(torch.nn.ReLU(), head), x, 3, rule)
    return call


for _rule in ("backpropagation", "deconvnet", "guided"):
    check(f"pooling.guided_backpropagation {_rule}", a_map((20, 32, 128, 128)), 1e-6, lambda x: (3 * size(x), 2 * 10 * x.numel()))(sent_back(_rule))


# --- pooling.shift ------------------------------------------------------------------------------------------------------

def pooled(name, **options):
    "A layer of `deepclustering.pooling`, fresh."
    def call(x):
        return getattr(import_module("deepclustering.pooling"), name)(**options).to(x.device)(x)
    return call


check("pooling.BlurPool2d", a_map((32, 64, 112, 112)), 2e-6, halved)(pooled("BlurPool2d"))
check("pooling.BlurPool2d bf16", a_map((32, 64, 112, 112), torch.bfloat16), _round[torch.bfloat16], halved)(pooled("BlurPool2d"))
check("pooling.MaxBlurPool2d", a_map((32, 64, 112, 112)), 2e-6, halved)(pooled("MaxBlurPool2d"))
check("pooling.MaxBlurPool2d circular", a_map((32, 64, 112, 112)), 2e-6, halved)(pooled("MaxBlurPool2d", pad_mode="circular"))
check("pooling.SpectralPool2d", a_map((32, 64, 112, 112)), 4e-6, halved)(pooled("SpectralPool2d"))
check("pooling.LSEPool2d", a_map((32, 64, 112, 112)), 2e-6, halved)(pooled("LSEPool2d", kernel_size=2, learn=False))
check("pooling.LSEPool2d bf16", a_map((32, 64, 112, 112), torch.bfloat16), _round[torch.bfloat16], halved)(pooled("LSEPool2d", kernel_size=2, learn=False))


# --- pooling.means ------------------------------------------------------------------------------------------------------

def items_and_exponent(dtype=torch.float32):
    def make(generator, big):
        n, k = (1_000_000, 1000) if big else (60, 5)
        return torch.rand(n, 64, generator=generator).add(.05).to(dtype), torch.randint(0, k, (n,), generator=generator), torch.rand(k, 64, generator=generator).to(dtype)
    return make


def power_mean_and_gradients(x, index, g):
    from deepclustering.pooling.means import power_mean_aggregation
    leaf, p = x.detach().requires_grad_(), torch.tensor(3., device=x.device, requires_grad=True)
    y = power_mean_aggregation(leaf, index, p, len(g), check=False)
    dx, dp = torch.autograd.grad(y, (leaf, p), g)
    return y.detach(), dx, dp / len(x)


for _name, _dtype, _tolerance in (("fp32", torch.float32, 2e-5), ("fp16", torch.float16, 2e-3)):
    check(f"pooling.power_mean_aggregation {_name}", items_and_exponent(_dtype), _tolerance, lambda x, index, g: (3 * size(x) + 2 * size(g), 20 * x.numel()))(power_mean_and_gradients)


# --- clustering.category_discovery --------------------------------------------------------------------------------------

def grouped_points(generator, big):
    n, k, d = (200_000, 32, 16) if big else (499, 5, 4)
    return torch.randn(n, d, generator=generator, dtype=torch.float64), torch.nn.functional.one_hot(torch.arange(n) % k, k).double()


def group_weight_cost(x, shares): return 3 * size(x) + size(shares), 2 * x.shape[0] * shares.shape[1] * x.shape[1] ** 2


@check("category_discovery.log_weight", grouped_points, 1e-8, group_weight_cost)
def _(x, shares):
    from deepclustering.clustering.category_discovery import Prior, log_weight, moments
    d = x.shape[1]
    return log_weight(Prior(x.new_zeros(d), x.new_tensor(.01), x.new_tensor(d + 2.), torch.eye(d).to(x)), moments(x, shares))


# --- moe.routers, moe.balance -------------------------------------------------------------------------------------------

def router_scores(generator, big):
    T, E = (4096, 64) if big else (37, 6)
    return tuple(torch.randn(T, E, generator=generator) for _ in range(2)) + (torch.rand(T, E, generator=generator) + .1,)


def router_scores_cost(logits, noise, std): return 4 * size(logits), 40 * logits.numel()


@check("moe.prob_in_topk", router_scores, 2e-5, router_scores_cost)
def _(logits, noise, std):
    from deepclustering.moe.routers import prob_in_topk
    return prob_in_topk(logits, logits + noise * std, std, 2)


@check("moe.balance_loss gradient", router_scores, 2e-5, router_scores_cost)
def _(logits, noise, std):
    from deepclustering.moe.routers import balance_loss, prototype_topk, z_loss
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(balance_loss(prototype_topk(leaf, 2), n_group=2) + z_loss(leaf), leaf)


@check("moe.balance_as", router_scores, 2e-5, router_scores_cost)
def _(logits, noise, std):
    from deepclustering.moe.balance import CONVENTIONS, balance_as
    return torch.stack([balance_as(name, torch.stack([logits, noise])[:, None], 2) for name in CONVENTIONS])


# --- moe.balanced -------------------------------------------------------------------------------------------------------

def balanced_cost(logits, noise, std): return 8 * size(logits), 400 * logits.numel()   # Sinkhorn reads the matrix for up to 100 iterations


@check("moe.expert_choice", router_scores, 2e-5, router_scores_cost)
def _(logits, noise, std):
    from deepclustering.moe.balanced import expert_choice
    return expert_choice(logits).to_map()


@check("moe.sinkhorn_topk loads", router_scores, 2e-2, balanced_cost)
def _(logits, noise, std):   # a near tie may fall otherwise: compare the mean of the chosen logits, not the choices
    from deepclustering.moe.balanced import sinkhorn_topk
    return logits.gather(1, sinkhorn_topk(logits, 2).experts).mean()


@check("moe.base_assignment", router_scores, 2e-5, balanced_cost)
def _(logits, noise, std):
    from deepclustering.moe.balanced import base_assignment
    return base_assignment(logits[:1024]).to_map()


@check("moe.soft_slots gradients", router_scores, 5e-5, router_scores_cost)
def _(logits, noise, std):
    from deepclustering.moe.balanced import soft_slots, through_slots
    h = logits[:, :6, None].expand(-1, -1, 2).detach().clone().requires_grad_()
    y = through_slots(noise, soft_slots(h), lambda e, rows: (e + 1) * rows)
    return y.detach(), torch.autograd.grad(y.sin().mean(), h)[0]


# --- moe.vision, moe.quantile -------------------------------------------------------------------------------------------

@check("moe.prob_above_kth gradient", router_scores, 5e-5, router_scores_cost)
def _(logits, noise, std):
    from deepclustering.moe.routers import cv_squared
    from deepclustering.moe.vision import prob_above_kth
    leaf = logits.detach().clone().requires_grad_()
    p = prob_above_kth(leaf, leaf + noise / logits.shape[1], 1 / logits.shape[1], 2)
    return p.detach(), torch.autograd.grad(cv_squared(p.sum(0)), leaf)[0]


@check("moe.batch_priority", router_scores, 2e-5, router_scores_cost)
def _(logits, noise, std):   # the buffers as dense weights: who got a place, and what it weighs
    from deepclustering.moe.routing import softmax_topk
    from deepclustering.moe.vision import batch_priority
    r = softmax_topk(logits, 2)
    return r.to_dispatch(max(1, len(logits) // logits.shape[1]), batch_priority(r)).routing.to_map()


@check("moe.quantile_prices", router_scores, 2e-5, router_scores_cost)
def _(logits, noise, std):
    from deepclustering.moe.quantile import quantile_prices
    return quantile_prices(logits, 2, steps=3)


# --- kv.ragged ------------------------------------------------------------------------------------------------------------

def heads_of(lengths, dtype, G=4, D=128):
    "Queries (R, G, D), the slab's keys and values, where each of R heads begins, how long it is, and an empty tensor with as many rows as the longest."
    def make(generator, big):
        length = torch.tensor(lengths if big else [1 + n // 500 for n in lengths])
        ends, d = length.cumsum(0), D if big else 16
        some = torch.randn(2**18 if big else 4096, d, generator=generator).to(dtype)                  # the slab repeats it: 2.6 million rows of chance take a while
        keys = some.repeat(-(-int(ends[-1]) // len(some)) + 1, 1)
        return torch.randn(len(lengths), G, d, generator=generator).to(dtype), keys[:ends[-1]].clone(), keys[-int(ends[-1]):].flip(1).contiguous(), ends - length, length, torch.empty(int(length.max()), 0)
    return make


def as_rectangle(make, masked):
    "The same heads as a padded rectangle, `(8, R / 8, longest, D)`, and which of its slots are filled."
    def padded(generator, big):
        q, keys, values, start, length, longest = make(generator, big)
        n = len(longest)
        at = torch.arange(n)
        inside = at < length[:, None]
        slot = (start[:, None] + at).masked_fill_(~inside, 0)
        q, keys, values, inside = (t.unflatten(0, (8, -1)) for t in (q, keys[slot], values[slot], inside))
        return (q, keys, values, inside[:, :, None]) if masked else (q, keys, values)
    return padded


def slab_cost(q, keys, values, *tables): return size(keys) + size(values) + 2 * size(q), 4 * keys.numel() * q.shape[1]


def rectangle_cost(q, keys, values, inside=None):
    share = 1 if inside is None else float(inside.double().mean())                                    # of the slots that hold something
    return share * (size(keys) + size(values)) + 2 * size(q), 4 * share * keys.numel() * q.shape[-2]


def some_heads(output, inputs, call):
    "The largest error of four heads against attention in float64, relative to the largest number there."
    q, keys, values, start, length, _ = inputs
    worst = scale = 0.
    for r in {0, len(q) // 3, 2 * len(q) // 3, len(q) - 1}:
        slots = slice(int(start[r]), int(start[r] + length[r]))
        exact = (q[r].double() @ keys[slots].double().T / q.shape[2] ** .5).softmax(1) @ values[slots].double()
        worst, scale = max(worst, float((output[r].cpu().double() - exact).abs().max())), max(scale, float(exact.abs().max()))
    return worst / scale if worst == worst else math.inf


def some_rectangles(output, inputs, call):
    q, keys, values, *inside = (t.flatten(0, 1) for t in inputs)
    length = inside[0].sum((1, 2)) if inside else torch.full((len(q),), keys.shape[1])
    return some_heads(output.flatten(0, 1), (q, keys.flatten(0, 1), values.flatten(0, 1), torch.arange(len(q)) * keys.shape[1], length, None), call)


def decode(q, keys, values, start, length, longest):
    from deepclustering.kv.ragged import _decode
    return _decode(q, keys, values, start, length, len(longest), False)[0]


def varlen(q, keys, values, start, length, longest):
    "PyTorch's own attention over sequences of different lengths: each head a sequence with one key head, its G queries as tokens. Only on CUDA."
    if not q.is_cuda: return decode(q, keys, values, start, length, longest)
    from torch.nn.attention.varlen import varlen_attn
    R, G = q.shape[:2]
    ends = torch.nn.functional.pad(length.cumsum(0), (1, 0)).int()
    return varlen_attn(q.flatten(0, 1)[:, None], keys[:, None], values[:, None], torch.arange(0, R * G + 1, G, device=q.device, dtype=torch.int32), ends, G, len(longest)).view_as(q)


def rectangle(q, keys, values, inside=None): return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=inside)


_lengths = [round(64_000 * 2 ** (-2 * i / 63)) for i in range(64)]                                     # 64k to 16k: 8 rows of 8 key-value heads, 32 query heads
_spread = [round(64_000 * 2 ** (-4 * i / 63)) for i in range(64)]                                      # 64k to 4k
_equal = [sum(_lengths) // 64] * 64
for _name, _heads in (("4:1", _lengths), ("16:1", _spread), ("equal", _equal)): check(f"kv.decode bf16 {_name}", heads_of(_heads, torch.bfloat16), 2e-2, slab_cost, some_heads)(decode)
check("kv.decode fp16 16:1", heads_of(_spread, torch.float16), 4e-3, slab_cost, some_heads)(decode)
check("kv.decode fp32 16:1", heads_of([n // 2 for n in _spread], torch.float32), 2e-5, slab_cost, some_heads)(decode)
check("kv.decode bf16 short", heads_of([n // 32 for n in _spread], torch.bfloat16), 2e-2, slab_cost, some_heads)(decode)
check("kv.decode bf16 D=64, G=8", heads_of(_spread, torch.bfloat16, G=8, D=64), 2e-2, slab_cost, some_heads)(decode)
check("kv.decode bf16 D=80, G=1", heads_of(_spread, torch.bfloat16, G=1, D=80), 2e-2, slab_cost, some_heads)(decode)
check("kv beside: varlen_attn bf16 4:1", heads_of(_lengths, torch.bfloat16), 2e-2, slab_cost, some_heads)(varlen)
check("kv beside: varlen_attn bf16 equal", heads_of(_equal, torch.bfloat16), 2e-2, slab_cost, some_heads)(varlen)
check("kv beside: rectangle SDPA bf16 4:1", as_rectangle(heads_of(_lengths, torch.bfloat16), True), 2e-2, rectangle_cost, some_rectangles)(rectangle)
check("kv beside: rectangle SDPA bf16 equal", as_rectangle(heads_of(_equal, torch.bfloat16), False), 2e-2, rectangle_cost, some_rectangles)(rectangle)


def tokens_and_queries(generator, big):
    B, H, G, T, D = (4, 8, 4, 4000, 128) if big else (2, 3, 2, 40, 16)
    return torch.randn(2, B, H, T, D, generator=generator), torch.randn(B, G * H, 5, D, generator=generator), torch.rand(B, H, T - 30, generator=generator) < torch.logspace(-3, 0, H, 2)[:, None]


@check("kv.RaggedCache", tokens_and_queries, 2e-5, lambda kv, q, stays: (size(kv), 0))
def _(kv, q, stays):
    "Read, forget head by head, read 26 tokens at once and then four one by one; reorder; attend with one query and with several."
    from deepclustering.kv.ragged import RaggedCache
    n = stays.shape[2]
    cache = RaggedCache().append(*kv[:, :, :, :n]).keep(stays).append(*kv[:, :, :, n:n + 26])
    several = cache.attend(q)
    for t in range(n + 26, n + 30): cache.append(*kv[:, :, :, t:t + 1])
    one, lse = cache.attend(q[:, :, :1], return_lse=True)
    turned = cache.batch_select_indices(torch.arange(len(q) - 1, -1, -1, device=q.device)).attend(q[:, :, :1])
    return several, one, lse, turned, cache.crop(-3).attend(q[:, :, :1])


def packed(nbits, dtype, H=8, G=4, D=128):
    "A step's query, the pages of keys and of values, the window."
    def make(generator, big):
        from deepclustering.kv.quantised import QuantisedCache
        c = QuantisedCache(nbits).append(*torch.randn(2, 1, H, 131_072 if big else 512, D, generator=generator).to(dtype))
        return torch.randn(1, G * H, 1, D, generator=generator).to(dtype), *(t[:, :c.pages].clone() for store in c.stores for t in store), *(r[:, :c.window].clone() for r in c.recent)
    return make


def look_packed(nbits):
    def call(q, *held):
        from deepclustering.kv.quantised import QuantisedCache
        c, k = QuantisedCache(nbits), len(held) // 2 - 1
        c.batch, c.pages, c.window, c.stores, c.recent = 1, held[0].shape[1], held[-1].shape[1], [list(held[:k]), list(held[k:2 * k])], list(held[2 * k:])
        return c.attend(q)
    return call


def packed_cost(q, *held): return sum(map(size, (q, *held))), 4 * q.shape[1] * q.shape[3] * (held[0].shape[1] * 64 + held[-1].shape[1])


for _nbits in (2, 3, 4):
    for _dtype, _tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)): check(f"kv.quantised {_nbits} bits {str(_dtype)[6:]}", packed(_nbits, _dtype), _tolerance, packed_cost)(look_packed(_nbits))


def cached_tokens(generator, big):
    B, H, G, T, D = (4, 8, 4, 1024, 64) if big else (2, 2, 2, 48, 8)
    return torch.randn(B, G * H, T, D, generator=generator), torch.randn(2, B, H, T, D, generator=generator)


@check("kv.eviction scores", cached_tokens, 2e-5, lambda q, kv: (size(q) + size(kv), 0))
def _(q, kv):
    from deepclustering.core.tinylm import State, attention_weights
    from deepclustering.kv.eviction import H2O, TOVA, EvictingCache, ExpectedAttention, KeyDiff, SnapKV
    at = torch.arange(q.shape[2], device=q.device)
    slots = at.expand(kv.shape[1], kv.shape[2], -1)
    state = State(q, *kv, slots, attention_weights(q, kv[0], (at <= at[:, None])[None, None]))
    scores = [m.score(state).nan_to_num(posinf=1e3) for m in (H2O, TOVA, SnapKV, ExpectedAttention, KeyDiff)]
    cache = EvictingCache(KeyDiff, 12)
    for part in at.split(-(-len(at) // 4)): cache.update(0, kv[0][:, :, part], kv[1][:, :, part], slots[:, :, part], queries=q[:, :, part])
    return *scores, cache.stored.float()                     # masks may differ where scores nearly tie: scores are compared


@check("kv.standins evaluate", lambda generator, big: (torch.zeros(1),), 1e-3, lambda x: (0, 0))
def _(x):
    from deepclustering.core.tinylm import TinyLM, needles
    from deepclustering.kv.standins import StandIn, evaluate, is_first, is_value, needle_rows, with_outliers, with_sink
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        model = TinyLM(256).eval()
    out, rows = [], needles(torch.Generator().manual_seed(0), 8)[0]
    for variant in (model, with_outliers(model), with_sink(model, rows)):
        s = StandIn("untrained", variant, needle_rows, is_value, {}, "bits")
        context = needle_rows(torch.Generator().manual_seed(1), 16)[0].to(x.device)
        stays = (is_value(context) | is_first(context)).unsqueeze(1)
        out += [evaluate(s, keep, 16, 1, device=x.device) for keep in (None, lambda states: [stays] * 2)]
    return torch.stack(out)


def slot_scores(generator, big):
    L, B, H, T = (6, 4, 8, 1024) if big else (6, 2, 2, 48)
    return torch.rand(L, B, H, T, generator=generator) ** (1 + 3 * torch.rand(L, B, H, 1, generator=generator)), torch.rand(L, B, generator=generator)


@check("kv.budgets", slot_scores, 0, lambda scores, similarity: (size(scores), 0), plain=True)  # `squeeze` clusters in float64
def _(scores, similarity):
    from functools import partial
    from deepclustering.kv.budgets import adakv, by_entropy, pyramid, squeeze
    counts = torch.full(scores.shape[:3], scores.shape[3] // 4, device=scores.device)
    return torch.stack([allocate(list(scores), counts) for allocate in (adakv, pyramid, by_entropy, partial(squeeze, similarity=similarity))]).float()


@check("kv.grain", slot_scores, 0, lambda scores, similarity: (size(scores), 0), plain=True)  # means in float64
def _(scores, similarity):
    from deepclustering.kv.budgets import AdaSnapKV
    from deepclustering.kv.eviction import H2O
    from deepclustering.kv.grain import by_chunk, pages_held
    coarse, counts = (10 * scores).round(), torch.full(scores.shape[:3], scores.shape[3] // 4, device=scores.device)   # whole numbers: ties fall to the same slot everywhere
    at = torch.arange(scores.shape[3], device=scores.device).expand(scores.shape[1:])
    masks = torch.stack([torch.stack(by_chunk(method, c, heads).choose(list(coarse), [at] * len(coarse), counts)) for method, c, heads in ((H2O, 8, True), (AdaSnapKV, 5, False), (H2O, 1, False))])
    return masks.float(), torch.stack([pages_held(m, at) for m in masks.flatten(0, 1)]).float()


@check("kv.stages", cached_tokens, 2e-5, lambda q, kv: (size(q) + size(kv), 0))
def _(q, kv):
    from deepclustering.core.tinylm import State, TinyLM, attention_weights
    from deepclustering.kv.stages import ScopeCache, dynamic_budgets, pivotal_score, pyramid_prefill
    at = torch.arange(q.shape[2], device=q.device)
    slots = at.expand(kv.shape[1], kv.shape[2], -1)
    votes = pivotal_score(State(q, *kv, slots, attention_weights(q, kv[0], (at <= at[:, None])[None, None]))).nan_to_num(posinf=1e3)
    coarse = [(10 * part).round() for part in kv[..., 0]]    # whole numbers: ties fall to the same slot everywhere
    budgets, peak = dynamic_budgets(coarse, torch.full((2, *slots.shape[:2]), 9, device=q.device), every=1, return_peak=True)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        model = TinyLM(13, dim=16, depth=3, std=.3).double().to(q.device).eval()
    words, cache = (100 * kv[0, :, 0, :40, 0]).abs().long() % 13, ScopeCache(3, 3, "discontinuous", 2)
    logits, lengths = pyramid_prefill(model, words[:, :30], [1, .6, .3], cache)
    with torch.no_grad(): last = torch.cat([model(word, cache) for word in words[:, 30:].split(1, 1)], 1)
    return votes, budgets.float(), peak.float(), logits, last, lengths.float(), cache.stored.float()


@check("kv.merge", cached_tokens, 2e-5, lambda q, kv: (size(q) + size(kv), 0))
def _(q, kv):
    from deepclustering.core.tinylm import State, attention_weights
    from deepclustering.kv.eviction import H2O
    from deepclustering.kv.merge import WEIGHTS, MergingCache, attention_variance, ema_threshold, merge_pairs, nearest_kept
    at = torch.arange(q.shape[2], device=q.device)
    slots = at.expand(kv.shape[1], kv.shape[2], -1)
    state = State(q, *kv, slots, attention_weights(q, kv[0], (at <= at[:, None])[None, None]))
    pairs = nearest_kept(kv[0].double(), slots % 3 == 0, slots)                    # in float64, and a given choice: near ties fall elsewhere on another device
    pairs = pairs._replace(similarity=pairs.similarity.to(q.dtype))
    merged = [t for rule in WEIGHTS for t in merge_pairs(*kv, pairs, -1., rule)[:2]]
    cache = MergingCache(H2O, 12, threshold=-1., weights="count", count=True)
    for part in at[:24].split(6): out = cache.update(0, kv[0][:, :, part], kv[1][:, :, part], slots[:, :, part], queries=q[:, :, part])
    return pairs.similarity, ema_threshold(pairs.similarity), attention_variance([state, state], False).float(), *merged, cache.stored.float(), cache.counts[0].sum(2).float()


@check("kv.share", lambda generator, big: (torch.randint(13, (8, 40), generator=generator),), 2e-5, lambda words: (0, 0))
def _(words):
    from deepclustering.core.tinylm import TinyLM
    from deepclustering.kv.ragged import RaggedCaches
    from deepclustering.kv.share import share_kv
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        model = share_kv(TinyLM(13, dim=16, depth=6, kv_heads=4, std=.3).double().to(words.device), 2, 1)
    cache = RaggedCaches()
    with torch.no_grad(): return model(words), torch.cat([model(part, cache) for part in words.split(8, 1)], 1)


# --- parallelism --------------------------------------------------------------------------------------------------------

def mlp(generator, big):
    d = 2048 if big else 24
    return tuple(torch.randn(*s, generator=generator) / s[0] ** 0.5 for s in ((256 if big else 9, d), (d, d), (d, d), (d, d)))


def on_one_rank(x, weights):
    "A network of these weights, and a process group of one rank: NCCL on a GPU, gloo on the CPU."
    import tempfile
    import torch.distributed as dist
    from torch import nn
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
    model = nn.Sequential(*(nn.Linear(len(w), len(w), bias=False) for w in weights)).to(x)
    with torch.no_grad():
        for layer, w in zip(model, weights): layer.weight.copy_(w)
    return model


def step_cost(x, *weights): return 6 * sum(map(size, weights)), 6 * len(x) * sum(w.numel() for w in weights)


@check("parallelism.GradientBuckets", mlp, 1e-5, step_cost)
def _(x, *weights):
    from deepclustering.parallelism.data import GradientBuckets
    model = on_one_rank(x, weights)
    buckets = GradientBuckets(model.parameters(), 1 << 20)
    with buckets.averaging(len(x)): model(x).square().sum().backward()
    return tuple(p.grad for p in model.parameters())


def zero_step(stage):
    def call(x, *weights):
        from deepclustering.parallelism.sharded import ZeRO
        model = on_one_rank(x, weights)
        engine = ZeRO(model, lambda p: torch.optim.SGD(p, 0.1), stage)
        for part in x.tensor_split(2): model(part).square().sum().backward()
        norm = engine.step(len(x), 1.)
        with engine.gathered(): return norm.to(x), *(p.detach().clone() for p in model.parameters())
    return call


for stage in (1, 2, 3): check(f"parallelism.ZeRO stage {stage}", mlp, 1e-5, step_cost)(zero_step(stage))


def layerwise_steps(name, **settings):
    def call(x, *weights):
        from deepclustering.parallelism import large_batch
        model = on_one_rank(x, weights)
        optimizer = getattr(large_batch, name)(model.parameters(), **settings)
        for part in x.tensor_split(3):
            optimizer.zero_grad()
            model(part).square().mean().backward()
            optimizer.step()
        return tuple(p.detach() for p in model.parameters())
    return call


check("parallelism.LARS three steps", mlp, 1e-5, step_cost)(layerwise_steps("LARS", lr=1., weight_decay=1e-3, trust_coefficient=0.01))
check("parallelism.LAMB three steps", mlp, 1e-4, step_cost)(layerwise_steps("LAMB", lr=0.01, eps=1e-3))  # a small eps turns rounding of tiny gradients into signs


@check("parallelism.Compression", mlp, 1e-4, step_cost)
def _(x, *weights):
    from deepclustering.parallelism.compress import QSGD, Cast, Compression, PowerSGD, TopK, pack_bits, unpack_bits
    on_one_rank(x, weights)
    out, keys = [], list(range(len(weights)))
    odd = [w.float().sign() * (2 * torch.randperm(w.numel(), generator=torch.Generator().manual_seed(i)) + 1).view_as(w).to(x.device) / w.numel() for i, w in enumerate(weights)]
    for c in (TopK(0.1), PowerSGD(2), Cast()):                                   # of equal numbers devices keep different ones: odd ones are all different, and from twice themselves
        state = Compression(c)
        for scatter in (False, True): out += state.mean(keys, odd if isinstance(c, TopK) else [w.float() for w in weights], scatter)
    numbers = torch.arange(1000, device=x.device) % 32
    out.append(unpack_bits(pack_bits(numbers, 5), 5, 1000))
    out += [c.error(weights[0]) for c in (TopK(0.1), QSGD(4), PowerSGD(2), Cast())]
    w = weights[0].float()
    back = QSGD(12).decode(QSGD(12).encode(w, torch.Generator(w.device).manual_seed(0)), w)
    out.append(((back - w).abs().max() < w.abs().max() * 0.02).float())   # other noise on another device: a bound instead
    return tuple(out)


@check("parallelism.LocalSGD", mlp, 1e-4, step_cost)
def _(x, *weights):
    from deepclustering.parallelism.local import LocalSGD, Outer
    model = on_one_rank(x, weights)
    optimizer, local = torch.optim.SGD(model.parameters(), lr=0.01), LocalSGD(model, 2, Outer(1., 0.5, penalty="gap", clip=0.05), delay=1)
    for t in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step(); local.step()
        if t == 2: local.load_state_dict(local.state_dict())
    local.finish()
    return tuple(p.detach() for p in model.parameters())


def cut_layers(sequence):
    def call(x, *weights):
        from deepclustering.parallelism.tensor import ColumnParallel, RowParallel, copy_to, gather_from, reduce_from, scatter_to, vocab_parallel_cross_entropy
        up, down, head = on_one_rank(x, weights)
        enter, leave = (lambda t: gather_from(t, dim=0), lambda t, group: scatter_to(t, group, 0)) if sequence else (copy_to, reduce_from)
        layers = ColumnParallel(up), RowParallel(down, leave=leave), ColumnParallel(head)
        x = x.clone().requires_grad_()
        h = layers[1](layers[0](enter(x)).tanh())
        loss = vocab_parallel_cross_entropy(layers[2](enter(h)), torch.arange(len(x), device=x.device) % len(weights[2]))
        loss.backward()
        return loss.detach(), x.grad, *(m.weight.grad for m in layers)
    return call


for form in (False, True): check(f"parallelism.tensor layers and loss{', cut by tokens' if form else ''}", mlp, 1e-5, step_cost)(cut_layers(form))


@check("parallelism.box", mlp, 0, step_cost)
def _(x, *weights):
    from deepclustering.parallelism.signatures import all_signatures, box
    on_one_rank(x, weights)
    return tuple(box(x, s, t) for s in all_signatures(2) for t in all_signatures(2))


def contrastive_loss(x, y):
    from deepclustering.parallelism.contrastive import contrastive_losses
    wide = torch.promote_types(x.dtype, torch.float32)
    leaves = [*(t.detach().requires_grad_() for t in (x, y)), torch.tensor(20., dtype=wide, device=x.device, requires_grad=True)]
    losses = contrastive_losses(*leaves)
    return losses.detach(), *torch.autograd.grad(losses.sum(), leaves)


def on_the_device(output, inputs, call):
    "As `relative`, the reference in float64 blocks on the same device: 65,536 pairs would take the CPU minutes."
    worst = 0.
    with Plain(): expected = call(*(t.to(output[0].device).double() for t in inputs))
    for got, want in zip(output, expected):
        error = (got.double() - want).abs().max() / want.abs().max()
        worst = max(worst, float(error.nan_to_num(math.inf)))
    return worst


def contrastive_cost(x, y): return 3 * (size(x) + size(y)), 8 * len(x) * len(y) * x.shape[1]


def pairs_of(n, d, dtype):
    make = unit_features(n, n, d, dtype)
    def both(generator, big):
        x, y = make(generator, big)
        return x[:len(y)], y
    return both


for _name, _dtype, _eps in (("fp32", torch.float32, 5e-5), ("fp16", torch.float16, 2e-3), ("bf16", torch.bfloat16, 1e-2)):
    check(f"contrastive.losses {_name}", pairs_of(8_192, 512, _dtype), _eps, contrastive_cost)(contrastive_loss)
check("contrastive.losses 65,536 pairs bf16", pairs_of(65_536, 512, torch.bfloat16), 1e-2, contrastive_cost, on_the_device)(contrastive_loss)


# --- running them -------------------------------------------------------------------------------------------------------

def timed(call, repeats=10, seconds=4.0):
    "Median milliseconds of a call that ran before; CUDA events on a GPU."
    times, start = [], time.perf_counter()
    while len(times) < repeats and (not times or time.perf_counter() - start < seconds):
        if DEVICE.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def limits(big):
    "What the machine can do, measured: bytes per second of a copy (read and written), operations per second of a matrix product by dtype."
    a = torch.ones(2**28 if big else 2**22, device=DEVICE)
    for _ in range(2): a.clone()
    rates = {"copy": 2 * size(a) / timed(a.clone) * 1e3}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        m = torch.randn(2 * (8192 if big else 256,), device=DEVICE).to(dtype)
        for _ in range(2): m @ m
        rates[dtype] = 2 * len(m)**3 / timed(lambda: m @ m) * 1e3
    return rates | {torch.float16: rates[torch.bfloat16]}


def floor(cost, inputs, limit):
    "Milliseconds that no implementation can go below: its bytes at the rate of a copy, or its operations at that of a matrix product in the dtype of the first floating-point input."
    nbytes, operations = cost(*inputs)
    dtype = next((t.dtype for t in inputs if t.is_floating_point()), torch.float32)
    return 1e3 * max(nbytes / limit["copy"], operations / limit[dtype])


def kernel_milliseconds(call, repeats):
    "Of all kernels and copies of a call together, without what the host adds: PyTorch's profiler."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        for _ in range(repeats): call()
        torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in seen.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA) / 1e3 / repeats


def times(call):
    "Milliseconds of a call that ran before, and, on a GPU, of its kernels alone."
    ms = timed(call)
    return {"ms": round(ms, 4)} | ({} if DEVICE.type == "cpu" else {"kernel_ms": round(kernel_milliseconds(call, 3 if ms < 100 else 1), 4)})


def equal(a, b): return all(torch.equal(p, q) for p, q in zip(*(o if isinstance(o, tuple) else (o,) for o in (a, b))))


class Fallbacks(logging.Handler):
    "What an operator says when it answers without its kernel: on a GPU that fails the check."
    def __enter__(self):
        from deepclustering.core import operators
        operators._said.clear()  # a line is said once, here once a check
        self.lines, self.log = [], logging.getLogger(operators.__name__)
        self.log.addHandler(self)
        return self.lines
    def emit(self, record): self.lines.append(record.getMessage())
    def __exit__(self, *error): self.log.removeHandler(self)


class Plain:
    "The same call without kernels: plain PyTorch with its own gradients. `used` says whether there was a kernel to leave out."
    def __enter__(self):
        from deepclustering.core.operators import Operator
        self.operator, self.call, self.used = Operator, Operator.__call__, False
        def reference(operator, *args):
            self.used = True
            return operator.reference(*args)
        Operator.__call__ = reference
        return self
    def __exit__(self, *error): self.operator.__call__ = self.call


def with_memory(call):
    "What the call returns and, on a GPU, the most megabytes it holds at a time beyond its inputs."
    if DEVICE.type == "cpu": return call(), {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return call(), {"megabytes": round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)}


def plain_twin(call):
    "Milliseconds and megabytes of the call without kernels; nothing where it has none. It may need more memory than there is."
    with Plain() as plain:
        try:
            call()
            return {f"plain_{name}": value for name, value in (times(call) | with_memory(call)[1]).items()} if plain.used else {}
        except torch.OutOfMemoryError: return {"plain_ms": "no memory"}


def run(check, big, limit):
    "One check: a row for the report, whatever happens."
    row = {"name": check.name, "ok": False, "tolerance": check.tolerance}
    try:
        with Fallbacks() as lines: measure(check, big, limit, row)
        if lines and not check.plain: row |= {"ok": False, "reason": "; ".join(lines)}
    except Exception as e:
        row["reason"] = f"{type(e).__name__}: {e}"
        if os.environ.get("TRACEBACK"): traceback.print_exc()
    return row


def measure(check, big, limit, row):
    "Fill the row."
    inputs = check.make(torch.Generator().manual_seed(0), big)
    moved = [t.to(DEVICE) for t in inputs] if check.moves else inputs
    call = lambda: check.call(*moved)
    output = call()
    again, held = with_memory(call)
    row |= {"repeatable": equal(output, again)} | held  # the same bits a second time
    row["error"] = check.judge(output, inputs, check.call)
    row["ok"] = row["error"] <= check.tolerance
    least = floor(check.cost, inputs, limit)
    row |= {"shapes": [list(t.shape) for t in inputs]} | times(call)
    if least: row |= {"floor_ms": round(least, 4), "share_of_floor": round(least / row.get("kernel_ms", row["ms"]), 4)}
    if DEVICE.type == "cuda": row |= plain_twin(call)
    if not math.isfinite(row["error"]): row["error"] = str(row["error"])  # JSON has no infinity
    return row


def over_plain(row):
    "How many times faster the kernels are than those of the same call in plain PyTorch."
    plain = row.get("plain_kernel_ms", row.get("plain_ms", ""))
    return plain if isinstance(plain, str) else f"{plain / row['kernel_ms']:.1f}x"


def versions():
    from importlib.metadata import PackageNotFoundError, version
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "triton"):
        try: found[name] = version(name)
        except PackageNotFoundError: pass
    return found


def main(arguments=None):
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names")
    parser.add_argument("--cpu", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--out", type=Path, help="where the JSON file goes")
    args = parser.parse_args(arguments)
    if not args.cpu and not torch.cuda.is_available():
        print("No CUDA device here. `python tools/gpu_check.py --cpu` runs the same checks small, on the CPU.")
        return 2
    DEVICE = torch.device("cpu" if args.cpu else "cuda")
    out = args.out or Path(os.environ.get("OUT") or ROOT / "_out") / "gpu-check.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    limit = limits(not args.cpu)
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    device = "CPU" if args.cpu else torch.cuda.get_device_name()
    chosen = [c for n in args.names or [""] for c in CHECKS if n in c.name]
    chosen = list({c.name: c for c in chosen}.values())  # each once, in the order of the names
    kept = json.loads(out.read_text(encoding="utf-8")) if args.names and out.exists() else {"device": device, "checks": []}
    if kept["device"] != device: raise SystemExit(f"{out} holds checks of another device, {kept['device']}: give another --out")
    rows = {r["name"]: r for r in kept["checks"] if r["name"] not in {c.name for c in chosen}}
    result = {"device": device, "versions": versions(), "copy_gigabytes_per_second": round(limit["copy"] / 1e9, 1),
              **{f"{str(d)[6:]}_gigaflops": round(limit[d] / 1e9, 1) for d in (torch.float32, torch.float64, torch.bfloat16)}}
    print(f"{result['device']}, torch {torch.__version__}: copy {limit['copy'] / 1e9:.0f} GB/s, products in TFLOP/s: " + ", ".join(f"{str(d)[6:]} {limit[d] / 1e12:.1f}" for d in (torch.float32, torch.float64, torch.bfloat16)))
    print(f"\n{'check':46s} {'error':>8s} {'allowed':>8s} {'call ms':>9s} {'kernels':>9s} {'floor':>9s} {'of floor':>8s} {'over plain':>10s} {'MB':>8s} repeatable")
    for c in chosen:
        begin = time.monotonic()
        late = begin - start > 60 * MINUTES
        row = {"name": c.name, "ok": False, "reason": f"not run: {MINUTES} minutes were over"} if late else run(c, not args.cpu, limit)
        rows[c.name] = row | {"seconds": round(time.monotonic() - begin, 1), "commit": commit, "date": str(date.today())}
        result["checks"] = [rows[d.name] for d in CHECKS if d.name in rows]
        lines = ",\n".join("  " + json.dumps(r) for r in result["checks"])
        out.write_text(json.dumps(result | {"checks": []})[:-2] + f"\n{lines}\n]}}\n", encoding="utf-8")  # after each: a run that is stopped leaves what it has
        if "reason" in row: print(f"{c.name:46s} FAILED {row['reason'][:150]}", flush=True)
        else:
            print(f"{c.name:46s} {float(row['error']):8.1e} {c.tolerance:8.1e} {row['ms']:9.3f} {row.get('kernel_ms', math.nan):9.3f} {row.get('floor_ms', math.nan):9.3f} {row.get('share_of_floor', math.nan):8.1%} "
                  f"{over_plain(row):>10s} {row.get('megabytes', math.nan):8.1f} {'yes' if row['repeatable'] else 'no'}{'' if row['ok'] else ' FAILED'}", flush=True)
    if torch.distributed.is_available() and torch.distributed.is_initialized(): torch.distributed.destroy_process_group()  # of the parallel checks
    failed = [c.name for c in chosen if not rows[c.name]["ok"]]
    print(f"\n{len(chosen) - len(failed)} of {len(chosen)} checks passed in {time.monotonic() - start:.0f} s: {out}")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
