"""`nearest` on data that is hard in float32, against float64, scikit-learn and faiss; the walk over blocks; the maps' properties."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import pairwise_distances_argmin

from deepclustering.core.assign import (assignment_certificate, budget, full_float32, nearest, soft_assign, student_t,
                                        threshold, top_k)

@pytest.fixture(autouse=True)
def one_thread():
    "Small tensors: two threads on a busy machine only wait for each other."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KINDS = ("plain", "norm", "offset", "columns", "duplicates", "one point", "strided", "blobs", "far centre")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GRID = [(n, d, k) for n in (1, 60) for d in (1, 2, 17, 64, 129) for k in (1, 2, 7, 257)] + [(60, 3, 1025), (1, 2049, 7), (40, 2049, 257)]
half_range = lambda t, dtype: t.clamp(-6e4, 6e4).to(dtype)  # float16 ends at 65,504


def make(kind, n, d, k, dtype, seed=0):
    "Points `(n, d)` and centres `(k, d)`, some centres close to points and some to each other."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    c = x[torch.randint(n, (k,), generator=g)] + 0.3 * torch.randn(k, d, generator=g)
    if kind == "norm": x, c = 1e5 * F.normalize(x), 1e5 * F.normalize(c)
    if kind == "offset": x, c = x + 1e4, c + 1e4
    if kind == "columns": x, c = x * torch.logspace(-3, 3, d), c * torch.logspace(-3, 3, d)
    if kind == "duplicates": c = x[torch.randint(min(n, 3), (k,), generator=g)]
    if kind == "one point": x, c = x[:1].expand(n, d), x[:1].expand(k, d)  # strides of 0
    if kind == "blobs":
        x = x + 1e5 * (torch.arange(n) % 2 * 2 - 1)[:, None]
        c = x[torch.randint(n, (k,), generator=g)] + 0.3 * torch.randn(k, d, generator=g)
    if kind == "far centre": c = torch.cat([c[:-1], c[-1:] + 1e5])
    x, c = half_range(x, dtype), half_range(c, dtype)
    if kind == "strided": x, c = torch.stack([x, -x], 2).transpose(0, 1).contiguous().transpose(0, 1)[..., 0], c.T.contiguous().T
    return x, c


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_certificate_over_the_adversarial_grid(kind, dtype):
    for n, d, k in GRID:
        x, c = make(kind, n, d, k, dtype)
        for exact in (False, True):
            labels = nearest(x, c, exact=exact)
            assert labels.dtype == torch.int64 and labels.shape == (n,)
            found = assignment_certificate(x, c, labels, exact=exact)
            assert found.outside == 0, (kind, dtype, d, k, n, exact, found)


@pytest.mark.parametrize("kind", ("plain", "offset", "norm"))
def test_the_certificate_rejects_the_plain_formula_and_random_labels(kind):
    x, c = make(kind, 300, 16, 40, torch.float32)
    plain = (x.square().sum(1, keepdim=True) - 2 * x @ c.T + c.square().sum(1)).argmin(1)
    assert (assignment_certificate(x, c, plain).outside > 0) == (kind == "offset")
    assert assignment_certificate(x, c, torch.randint(40, (300,), generator=torch.Generator().manual_seed(1))).outside > 0.5


@pytest.mark.parametrize("exact", (False, True))
@pytest.mark.parametrize("k", (3, 64, 255, 256, 257, 300, 1023, 1024, 1500))
def test_labels_are_scikit_learns(k, exact):
    g = torch.Generator().manual_seed(k)
    x, c = torch.randn(500, 11, generator=g), torch.randn(k, 11, generator=g)
    assert np.array_equal(nearest(x, c, exact=exact), pairwise_distances_argmin(x.double(), c.double()))


@pytest.mark.parametrize("k", (2, 7, 256, 300, 1100))
def test_ties_go_to_the_lowest_index(k):
    "On a lattice the arithmetic is exact, so equal distances are equal scores."
    g = torch.Generator().manual_seed(k)
    x, c = torch.randint(-4, 5, (400, 3), generator=g).float(), 2 * torch.randint(-2, 3, (k, 3), generator=g).float()
    c = c - c.mean(0).round() if k != 7 else c
    squared = (x[:, None] - c).square().sum(-1)
    assert (squared == squared.amin(1, keepdim=True)).sum(1).max() > 1
    assert torch.equal(nearest(x, c, exact=True), squared.argmin(1))
    c = torch.cat([c, -c]) * 4  # mean 0: the scores are exact too
    squared = (x[:, None] - c).square().sum(-1)
    assert torch.equal(nearest(x, c), squared.argmin(1))


def test_identical_centres_with_exact_differences():
    g = torch.Generator().manual_seed(0)
    for k, d in itertools.product((2, 7, 31, 300), (1, 16, 17, 129)):
        c = torch.randn(k, d, generator=g)[torch.randint(k, (k,), generator=g)]
        labels = nearest(torch.randn(300, d, generator=g), c, exact=True)
        first = (c[:, None] == c).all(-1).int().argmax(1)  # lowest index of each centre's copies
        assert torch.equal(first[labels], labels)


def test_properties_of_the_answer():
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(700, 9, generator=g), torch.randn(40, 9, generator=g)
    labels, distance = nearest(x, c, return_distance=True)
    order, slots = torch.randperm(700, generator=g), torch.randperm(40, generator=g)
    assert torch.equal(nearest(x[order], c), labels[order])
    assert torch.equal(slots[nearest(x, c[slots])], labels)
    assert torch.equal(nearest(-x, -c), labels)
    assert torch.equal(nearest(x * 2.0**-90, c * 2.0**-90), labels)
    assert torch.equal(nearest(x.flip(1), c.flip(1)), labels)
    assert torch.equal(nearest(x.double(), c.double()), labels)
    assert torch.equal(nearest(c, c), torch.arange(40))
    assert torch.equal(distance, (x - c[labels]).square().sum(1))
    before = x.clone(), c.clone()
    nearest(x, c, exact=True, return_distance=True)
    assert torch.equal(x, before[0]) and torch.equal(c, before[1])
    assert not nearest(x.requires_grad_(), c, return_distance=True)[1].requires_grad


def test_a_memory_map_is_read_in_blocks(tmp_path):
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(3000, 5, generator=g), torch.randn(20, 5, generator=g)
    x.numpy().tofile(tmp_path / "x.bin")
    mapped = torch.from_numpy(np.memmap(tmp_path / "x.bin", dtype=np.float32, mode="r+", shape=(3000, 5)))
    assert torch.equal(nearest(mapped, c, block=256), nearest(x, c))


@pytest.mark.parametrize("shape_x, shape_c", [((4, 3, 50, 6), (4, 3, 7, 6)), ((50, 6), (4, 7, 6)), ((4, 50, 6), (7, 6)),
                                              ((4, 1, 50, 6), (1, 3, 7, 6)), ((3000, 5, 2), (3000, 4, 2)), ((2, 0, 6), (2, 7, 6))])
def test_leading_dimensions_broadcast(shape_x, shape_c):
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(shape_x, generator=g), torch.randn(shape_c, generator=g)
    squared = (x.double().unsqueeze(-2) - c.double().unsqueeze(-3)).square().sum(-1)
    for exact in (False, True):
        labels, distance = nearest(x, c, exact=exact, return_distance=True)
        assert torch.equal(labels, squared.argmin(-1))
        torch.testing.assert_close(distance, squared.amin(-1).float())


def test_two_threads_and_odd_blocks_give_labels_within_the_bound():
    x, c = make("offset", 3000, 33, 300, torch.float32)
    for count, block in itertools.product((1, 2), (None, 1000, 2999)):
        torch.set_num_threads(count)
        labels = nearest(x, c, block=block)
        torch.set_num_threads(1)
        assert assignment_certificate(x, c, labels).outside == 0


def test_integers_and_mixed_types():
    x, c = torch.tensor([[0], [1], [4], [6], [9]]), torch.tensor([[1.0], [8.0]]).half()
    assert nearest(x, c).tolist() == [0, 0, 0, 1, 1]
    assert assignment_certificate(x.numpy(), c.numpy(), np.array([0, 0, 0, 1, 1], dtype=np.int32)) == (0, 0)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("exact", (False, True))
def test_one_bad_entry_anywhere_is_refused(value, exact):
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(500, 3, generator=g), torch.randn(5, 3, generator=g)
    for row in (0, 250, 499):
        bad = x.clone(); bad[row, 1] = value
        with pytest.raises(ValueError, match="x must be finite"): nearest(bad, c, exact=exact, block=100)
    c[4, 2] = value
    with pytest.raises(ValueError, match="centers must be finite"): nearest(x, c, exact=exact)


def test_overflow_is_an_error_and_never_label_zero():
    with pytest.raises(ValueError, match="entries too large"): nearest(torch.full((2, 3), 3e38), torch.randn(4, 3))
    with pytest.raises(ValueError, match="entries too large"): nearest(torch.full((2, 3), 1e25), torch.randn(4, 3), exact=True)


def test_the_guard_restores_after_an_error():
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(KeyError):
            with full_float32(): raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally: torch.set_float32_matmul_precision("highest")


def test_maps_agree_where_their_constraints_do():
    g = torch.Generator().manual_seed(0)
    S = torch.randn(6, 30, 12, generator=g)
    assert torch.equal(top_k(S, 1)[1][..., 0], S.argmax(-1))
    assert torch.equal(budget(S, 360), torch.ones_like(S, dtype=torch.bool))
    assert budget(S, 17).sum((1, 2)).tolist() == [17] * 6
    for total in (1, 30, 100):
        kept = budget(S, total)
        assert (S.masked_fill(~kept, math.inf).amin((1, 2)) >= S.masked_fill(kept, -math.inf).amax((1, 2))).all()
    score_of = lambda A: (S * A).sum((1, 2))
    per_row = torch.zeros_like(S, dtype=torch.bool).scatter_(-1, top_k(S, 3)[1], True)
    assert (score_of(budget(S, 90)) >= score_of(per_row)).all()
    assert torch.equal(threshold(S, -math.inf), torch.ones_like(S, dtype=torch.bool))
    torch.testing.assert_close(soft_assign(S, 0.3).sum(-1), torch.ones(6, 30))
    assert torch.equal(soft_assign(S, 1e-4).argmax(-1), S.argmax(-1))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_soft_maps_in_half_precision(dtype):
    g = torch.Generator().manual_seed(0)
    S = torch.randn(50, 8, generator=g).to(dtype)
    A = soft_assign(S * 1000, 0.05)
    assert A.dtype == dtype and A.isfinite().all() and torch.equal(A.argmax(-1), S.argmax(-1))
    q = student_t(torch.randn(10, 4, generator=g).to(dtype), torch.randn(3, 4, generator=g).to(dtype))
    assert q.isfinite().all()
    torch.testing.assert_close(q.float().sum(-1), torch.ones(10), atol=2e-2, rtol=0)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ("plain", "offset"))
def test_beside_faiss(kind):
    faiss = pytest.importorskip("faiss")
    x, c = make(kind, 2000, 24, 300, torch.float32)
    index = faiss.IndexFlatL2(24); index.add(c.numpy())
    theirs = index.search(x.numpy(), 1)[1][:, 0]
    ours = assignment_certificate(x, c, nearest(x, c))
    assert ours.outside == 0
    if kind == "plain": assert np.array_equal(nearest(x, c), theirs)
    assert ours.worst <= assignment_certificate(x, c, theirs).worst
