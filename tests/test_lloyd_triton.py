"""`label_and_sum` by its kernels in Triton's interpreter: hard data, odd sizes, ties, strides, repeatability, large offsets, the operator around them; and compiled ahead."""
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import logging
import subprocess
import sys

import pytest
import torch

from deepclustering.core import assign, lloyd, lloyd_triton
from deepclustering.core.assign import _by_score, assignment_certificate
from deepclustering.core.data import load
from deepclustering.core.kernels import compile_ahead
from deepclustering.core.lloyd_triton import _label_tile, _labels, _one_read, _score_form, _share, _tile, _two_reads, launch_label_and_sum

REFERENCE = lloyd.label_and_sum.reference
dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
weighting = pytest.mark.parametrize("weighted", (False, True))
HARD = {"plain": lambda z: z, "norm 1e5": lambda z: 1e5 / z.shape[-1]**.5 * z, "offset 1e4": lambda z: z + 1e4, "offset 1e4 and tiny": lambda z: z / 100 + 1e4}


def problem(B, n, k, d, dtype=torch.float32, change=HARD["plain"], weighted=False, seed=0):
    "Points, centres with duplicates among them, weights with zeros among them."
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(B, n, d, generator=g)
    c = z[:, torch.randint(max(1, n // 2), (k,), generator=g)] + 0.1 * torch.randn(B, 1, d, generator=g)
    w = (torch.rand(B, n, generator=g) - 0.2).clamp_min(0) if weighted else None
    return change(z).to(dtype), change(c).to(dtype).float(), w


def check(x, c, w, result, moved, tolerance=2e-6):
    "Labels by the certificate; sums and masses against float64, relative to the sums of magnitudes."
    labels, S, W = result
    assert labels.dtype == torch.int64 and S.dtype == W.dtype == torch.float64
    assert max(assignment_certificate(p.float(), q, l).outside for p, q, l in zip(x, c, labels)) == 0
    m = c.mean(1, keepdim=True).double()
    A = torch.nn.functional.one_hot(labels, c.shape[1]).double() * (1 if w is None else w.double()[..., None])
    expected, size, mass = A.mT @ (x.double() - m), A.mT @ (x.double() - m).abs(), A.sum(1)
    if not moved: expected, size = expected + mass[..., None] * m, size + mass[..., None] * m.abs()
    assert ((S - expected).abs() <= tolerance * size).all() and ((W - mass).abs() <= tolerance * mass).all()
    if w is None: assert torch.equal(W, mass)


# --- the adversarial suite ------------------------------------------------------------------------------------------------

@dtypes
@pytest.mark.parametrize("d", (1, 2, 3, 15, 16, 17, 64, 65))
def test_labels_and_sums_of_hard_data(dtype, d):
    for i, (name, change) in enumerate(HARD.items()):
        if name == "norm 1e5" and dtype == torch.float16: continue  # beyond 65,504
        for j, (B, n, k) in enumerate(((2, 1, 1), (2, 130, 7), (1, 33, 64), (1, 70, 67))):
            x, c, w = problem(B, n, k, d, dtype, change, weighted=(i + j) % 2)
            check(x, c, w, launch_label_and_sum(x, c, w, j % 2), j % 2)


@pytest.mark.parametrize("k, d", ((3, 2049), (300, 33), (64, 129), (17, 256), (1, 257)))
def test_sizes_at_the_edges_of_a_tile(k, d):
    x, c, w = problem(1, 70, k, d, torch.bfloat16, weighted=True)
    check(x, c, w, launch_label_and_sum(x, c, w, True), True)


@dtypes
def test_equal_to_the_plain_version(dtype):
    for k, d in ((1, 1), (10, 5), (64, 64), (80, 3), (9, 300)):
        for name, change in HARD.items():
            if dtype == torch.float16 and name == "norm 1e5": continue
            x, c, w = problem(1, 50, k, d, dtype, change, weighted=True)
            labels, S, W = launch_label_and_sum(x, c, w, True)
            by_hand = lloyd.sum_by_label(x.float() - c.mean(1, keepdim=True), labels, k, w)  # near ties may go either way, so: the same labels, added up as the plain version does
            torch.testing.assert_close(S, by_hand[0], rtol=1e-5, atol=1e-6 * float(x.float().abs().max()))
            torch.testing.assert_close(W, by_hand[1], rtol=1e-6, atol=0)
    x, c, w = (torch.randn(2, size, 7, generator=torch.Generator().manual_seed(size)).to(dtype) for size in (300, 20, 1))  # without duplicates
    assert torch.equal(launch_label_and_sum(x, c.float(), None, False)[0], REFERENCE(x, c.float(), None, False)[0])


def test_both_paths_find_the_same():
    x, c, w = problem(2, 150, 20, 30, weighted=True)
    form = _score_form(c)
    a, b = _one_read(x, form, w, _tile(20, 30, False), False), _two_reads(x, form, w, False, True)
    assert torch.equal(a[0], b[0])
    for p, q in zip(a[1:], b[1:]): torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-5)


def test_form_is_that_of_the_plain_version():
    x, c, _ = problem(2, 50, 9, 5, change=HARD["offset 1e4"])
    mean, matrix, bias = _score_form(c)
    scores = bias[:, None] - (x - mean[:, None]) @ matrix.mT
    assert torch.equal(scores.argmin(-1), _by_score(c)(x)[0])
    _, matrix, bias = _score_form(torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)) * 1e25)
    assert matrix.abs().max() < 2 and bias.isfinite().all()


def test_the_unit_of_the_data_does_not_matter():
    x, c, _ = problem(1, 100, 8, 6)
    for unit in (2.0**-99, 2.0**99):
        for k in (8, 70): check(x * unit, (c * unit).repeat(1, 9, 1)[:, :k], None, launch_label_and_sum(x * unit, (c * unit).repeat(1, 9, 1)[:, :k], None, True), True)


# --- ties, layouts, repeatability -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("copies", (1, 2, 7))
def test_equal_scores_go_to_the_lowest_index(copies):
    grid = torch.cartesian_prod(*[torch.arange(3.)] * 3)[None]  # whole numbers and a mean of whole numbers: every score is exact
    centers = grid.repeat(1, copies, 1)                         # 27, 54 and 189 centres: one tile, and several
    points = torch.cat([grid, grid + 0.5, grid - 0.5], 1)
    expected = torch.cdist(points.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    assert torch.equal(launch_label_and_sum(points, centers, None, True)[0], expected)
    assert torch.equal(_labels(points, _score_form(centers), False)[0], expected)


def test_identical_centres():
    x = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0))
    for k in (2, 64, 200):
        labels, S, W = launch_label_and_sum(x, torch.full((1, k, 4), 0.3), None, False)
        assert not labels.any() and W[0, 0] == 50 and not W[0, 1:].any() and not S[0, 1:].any()


def test_strides():
    g = torch.Generator().manual_seed(0)
    c, w = torch.randn(2, 5, 6, generator=g), torch.rand(2, 40, generator=g)
    wide = torch.randn(40, 2, 12, generator=g)
    weights = {"columns first": w.T.contiguous().T, "one for both": w[:1].expand(2, 40), "float64": w.double(), "half": w.half()}
    views = {"points first": wide[..., :6].transpose(0, 1), "every other column": wide[..., ::2].transpose(0, 1), "columns first": torch.randn(2, 6, 40, generator=g).mT,
             "one problem twice": torch.randn(1, 40, 6, generator=g).expand(2, 40, 6), "one point": torch.randn(2, 1, 6, generator=g).expand(2, 40, 6)}
    for k in (5, 70):
        c = torch.randn(2, k, 6, generator=g)
        for name, x in views.items():
            assert name == "points first" or not x.is_contiguous()
            for got, expected in zip(launch_label_and_sum(x, c, w, False), launch_label_and_sum(x.contiguous(), c, w, False)): assert torch.equal(got, expected), name
        for name, weight in weights.items():
            for got, expected in zip(launch_label_and_sum(x, c, weight, False), launch_label_and_sum(x, c, weight.float().contiguous(), False)): assert torch.equal(got, expected), name
    for got, expected in zip(launch_label_and_sum(x, c.mT.contiguous().mT, None, False), launch_label_and_sum(x, c, None, False)): assert torch.equal(got, expected)


@pytest.mark.parametrize("k, d", ((3, 5), (20, 17), (70, 5), (3, 300)))
def test_what_lies_beyond_is_not_read(k, d):
    "Points, centres and weights are windows into tensors of NaN; rows and columns fill no tile."
    x, c, w = problem(2, 70, k, d, weighted=True)
    frame, outer, edge = torch.full((4, 90, d + 20), torch.nan), torch.full((3, k + 5, d + 3), torch.nan), torch.full((3, 99), torch.nan)
    frame[1:3, 5:75, 7:7 + d], outer[1:, 2:2 + k, 1:1 + d], edge[:2, 9:79] = x, c, w
    windows = frame[1:3, 5:75, 7:7 + d], outer[1:, 2:2 + k, 1:1 + d], edge[:2, 9:79]
    for got, expected in zip(launch_label_and_sum(*windows, True), launch_label_and_sum(x, c, w, True)): assert torch.equal(got, expected)


@pytest.mark.parametrize("k", (5, 70))
def test_float32_is_split_where_that_was_timed(monkeypatch, k):
    asked, real = [], lloyd_triton.launch
    monkeypatch.setattr(lloyd_triton, "launch", lambda *args, **kwargs: asked.append(kwargs["SPLIT"]) or real(*args, **kwargs))
    x, c, _ = problem(1, 20, k, 4)
    for arguments in ((), (False,), (True,)): launch_label_and_sum(x, c, None, True, *arguments)
    monkeypatch.setattr(lloyd_triton, "splits_float32", lambda x: False)  # an A100
    launch_label_and_sum(x, c, None, True)
    assert asked == [True, False, True, False]


@weighting
@pytest.mark.parametrize("k", (9, 90))
def test_same_input_same_bits(weighted, k):
    x, c, w = problem(2, 400, k, 20, weighted=weighted)
    first = launch_label_and_sum(x, c, w, True)
    assert all(torch.equal(p, q) for p, q in zip(first, launch_label_and_sum(x.clone(), c.clone(), w, True)))


def test_rows_beyond_two_to_the_31():
    "Offsets beyond 2**31 in a storage that nobody touches but for a few rows: an int32 would read elsewhere."
    for k, d in ((3, 5), (3, 300)):
        x = torch.empty(4 * 2**30, dtype=torch.bfloat16).as_strided((1, 4, d), (0, 2**30, 1))
        x.copy_(torch.randn(1, 4, d, generator=torch.Generator().manual_seed(0)))
        c = x[:, [3, 0, 1]].float()
        assert launch_label_and_sum(x, c, None, True)[0].tolist()[0][:2] == [1, 2] and launch_label_and_sum(x, c, None, True)[0][0, 3] == 0
        check(x.clone(memory_format=torch.contiguous_format), c, None, launch_label_and_sum(x, c, None, True), True)


def test_long_sums_stay_accurate(monkeypatch):
    "Two programs with the longest share there is, and points far from the origin."
    assert _share(2**40, 1, 2, 128) == 2**14
    monkeypatch.setattr(lloyd_triton, "_share", lambda *sizes: 2**14)
    x = torch.rand(1, 20_000, 1, generator=torch.Generator().manual_seed(0)) + 1000
    labels, S, W = launch_label_and_sum(x, torch.tensor([[[999.], [1003.]]]), None, False)
    assert W.tolist() == [[20_000, 0]] and abs(float(S[0, 0, 0] / 20_000 - x.double().mean())) < 1e-5


def test_tiles_are_powers_of_two_within_limits():
    for k in (1, 2, 15, 16, 17, 63, 64, 65, 1000):
        for d in (1, 16, 17, 127, 128, 129, 255, 256, 257, 5000):
            for split in (False, True):
                fit = _tile(k, d, split)
                assert (fit is None) == (k > 64 or d > (128 if k > 32 else 256))
                for sizes in ((fit or ())[:3], _label_tile(k, split)[:3]): assert all(s >= 16 and s & (s - 1) == 0 for s in sizes)
                if fit: assert fit[1] >= k and fit[2] >= d and _share(10**7, 3, k, fit[0]) % fit[0] == 0


# --- in the iteration -----------------------------------------------------------------------------------------------------

@pytest.fixture
def by_kernel(monkeypatch):
    "A function that runs another with the kernels in place of the plain version."
    def run(f, *args, **kwargs):
        with monkeypatch.context() as m:
            m.setattr(lloyd, "label_and_sum", launch_label_and_sum)
            return f(*args, **kwargs)
    return run


def test_k_means_of_the_digits(by_kernel):
    x = torch.tensor(load("digits").X)  # 1,797
    start = x[lloyd.kmeans_plusplus(x, 10, random_state=0)]
    a, b = lloyd.kmeans(x, start), by_kernel(lloyd.kmeans, x, start)
    assert float(b.inertia) == pytest.approx(float(a.inertia), rel=1e-6)
    assert torch.equal(a.labels, b.labels) or float((a.labels != b.labels).float().mean()) < 0.01


@pytest.mark.parametrize("spherical", (False, True))
def test_a_pass_in_blocks(by_kernel, spherical):
    x, c, w = problem(2, 100, 6, 5, torch.float16, HARD["offset 1e4"] if not spherical else HARD["plain"], weighted=True)
    if spherical: c = torch.nn.functional.normalize(c, dim=-1)
    whole, parts, plain = (by_kernel(lloyd.assign_and_sum, x, c, w, rows, spherical) for rows in (None, 7)), None, lloyd.assign_and_sum(x, c, w, spherical=spherical)
    whole, parts = whole
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[0], plain[0])
    for p, q, r in zip(whole[1:], parts[1:], plain[1:]):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(p, r, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("k, d", ((5, 3), (70, 3), (5, 300)))
@pytest.mark.parametrize("evil", (float("nan"), -float("inf")))
def test_what_is_not_finite_is_refused(by_kernel, k, d, evil):
    for dtype, row in ((torch.float32, 0), (torch.bfloat16, 69)):
        x, c, _ = problem(2, 70, k, d, dtype)
        x[1, row, d - 1] = evil
        labels, _, W = launch_label_and_sum(x, c, None, True)
        assert 0 <= int(labels.min()) and int(labels.max()) < k and W[0].isfinite().all() and W[1].isnan().any()
        for call in (by_kernel, lambda f, *args: f(*args)):
            with pytest.raises(ValueError, match="x must be finite and well inside the range of torch.float32"): call(lloyd.assign_and_sum, x, c)
    with pytest.raises(ValueError, match="centers must be finite"): by_kernel(lloyd.assign_and_sum, x[:1].float(), c[:1] * evil)
    with pytest.raises(ValueError, match="centers must be finite"): lloyd.assign_and_sum(x[:1].float(), c[:1] * evil)


def test_an_empty_cluster_and_points_without_weight(by_kernel):
    x, c = torch.tensor([[[0.], [1.], [2.], [8.], [100.]]]), torch.tensor([[[-1.], [-2.]]])
    for moved, _ in ((x, None), (x, torch.tensor([[1., 1, 1, 1, 0]]))):
        for w in (None, torch.tensor([[1., 1, 1, 1, 0]])):
            got, expected = by_kernel(lloyd.lloyd_step, moved, c, w), lloyd.lloyd_step(moved, c, w)
            assert torch.equal(got[1], expected[1])
            torch.testing.assert_close(got[0], expected[0])


# --- the operator ---------------------------------------------------------------------------------------------------------

def inputs(double=True, grad=True):
    g = torch.Generator().manual_seed(4)
    tensors = torch.randn(2, 9, 3, generator=g) + 5, torch.randn(2, 4, 3, generator=g) + 5, torch.rand(2, 9, generator=g)
    return tuple((t.double() if double else t).requires_grad_(grad) for t in tensors)


def test_opcheck():
    op, (x, c, w) = lloyd.label_and_sum.op, inputs(grad=False)
    for weight, moved in ((None, False), (w, True)): assert set(torch.library.opcheck(op, (x, c, weight, moved)).values()) == {"SUCCESS"}
    leaves = inputs()  # its AOT part adds up all outputs in the dtype of the first, whole numbers: see the next test for that
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(op, (*leaves, True), test_utils=tests).values()) == {"SUCCESS"}


def test_compiled():
    def loss(f, x, c, w):
        _, S, W = f(x, c, w, True)
        return (S ** 2).sum() + (S.sin() * W[..., None] ** 3).sum()
    leaves = inputs()
    expected = torch.autograd.grad(loss(lloyd.label_and_sum, *leaves), leaves)
    compiled = torch.compile(lambda *a: loss(lloyd.label_and_sum.op, *a), backend="aot_eager", fullgraph=True)
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), expected): torch.testing.assert_close(got, want)


@pytest.mark.parametrize("call", (REFERENCE, lloyd.label_and_sum.op), ids=("plain", "operator"))
@pytest.mark.parametrize("moved", (False, True))
def test_gradients(call, moved):
    x, c, w = inputs()
    def both(x, c, w): return call(x, c, w, moved)[1:]
    assert torch.autograd.gradcheck(both, (x, c, w)) and torch.autograd.gradgradcheck(both, (x, c, w))
    assert torch.autograd.gradcheck(lambda x, c: call(x, c, None, moved)[1:], (x, c.detach()))


def test_the_operator_calls_the_kernel_or_says_why_not(caplog):
    op = lloyd.label_and_sum
    x, c, w = inputs(double=False, grad=False)
    for got, expected in zip(op._launch(x, c, w, True), launch_label_and_sum(x, c, w, True)): assert torch.equal(got, expected)
    memory = {t.untyped_storage().data_ptr() for t in op._launch(x, c, w, False)}
    assert len(memory) == 3
    with caplog.at_level(logging.WARNING):
        for got, expected in zip(op._launch(x.double(), c.double(), w.double(), True), REFERENCE(x.double(), c.double(), w.double(), True)): assert torch.equal(got, expected)
    assert "no kernel (points in floating point and centres in float32, not torch.float64 and torch.float64)" in caplog.text
    whole = torch.randint(9, (1, 20, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(op._launch(whole, c[:1], None, True)[0], REFERENCE(whole, c[:1], None, True)[0])
    fake = torch._subclasses.FakeTensorMode()
    for real, shape in zip(op._launch(x, c, w, True), op.op(*(fake.from_tensor(t) for t in (x, c, w)), True)): assert (real.shape, real.dtype, real.stride()) == (shape.shape, shape.dtype, shape.stride())


def test_tensor_cores_only_where_asked_for():
    code = """if 1:
        from deepclustering.core import lloyd_triton as module
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        for kernel, arguments, options in (module._ahead("*fp32", k, 16, split) for k in (10, 256) for split in (False, True)):
            types = {name: arguments[name] if isinstance(arguments[name], str) else "constexpr" for name in kernel.arg_names}
            options.pop("since")
            built = triton.compile(ASTSource(kernel, types, {n: v for n, v in arguments.items() if not isinstance(v, str)}), target=GPUTarget("cuda", 90, 32), options=options)
            print("mma" in built.asm["ptx"], "fma.rn.f32" in built.asm["ptx"])"""
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=True)
    assert run.stdout.split() == 2 * ["False", "True", "True", "False"]


def test_kernels_compile_ahead():
    rows = compile_ahead("deepclustering.core.lloyd_triton")
    assert {(r["kernel"], r["sm"]) for r in rows} == {(name, sm) for name in ("_label", "_label_and_sum") for sm in (75, 80, 90)}
    assert {r["types"].split()[0] for r in rows} == {"*fp32", "*fp16", "*bf16"}
    assert all(r["fits"] and r["spills"] <= (2048 if r["constants"]["SPLIT"] else 64) for r in rows), rows  # tiles with split factors spill and were the fastest on an H200 all the same


# --- nearest --------------------------------------------------------------------------------------------------------------

@dtypes
def test_nearest_on_a_gpu(dtype, monkeypatch):
    "Every tensor says it was on CUDA, the operator launches its kernel: labels within the certificate, from views, batches and blocks, with and without distances."
    monkeypatch.setattr(assign._label, "op", assign._label._launch)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(lloyd_triton, "splits_float32", lambda x: True)
    for name, change in HARD.items():
        if name == "norm 1e5" and dtype == torch.float16: continue
        for k, d in ((1, 1), (5, 17), (70, 33)):
            x, c, _ = problem(3, 60, k, d, dtype, change)
            labels = assign.nearest(x, c)
            assert max(assignment_certificate(p.float(), q, l).outside for p, q, l in zip(x, c, labels)) == 0
            assert torch.equal(assign.nearest(x[0], c), torch.stack([assign.nearest(x[0], q) for q in c]))
            found, distances = assign.nearest(x, c, return_distance=True, block=7)
            assert torch.equal(found, labels)
            own = c.gather(1, labels[..., None].expand(-1, -1, d)).double()
            torch.testing.assert_close(distances.double(), (x.double() - own).square().sum(-1), rtol=1e-5, atol=1e-30)


def test_nearest_refuses_what_is_not_finite(monkeypatch):
    monkeypatch.setattr(assign._label, "op", assign._label._launch)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(lloyd_triton, "splits_float32", lambda x: True)
    x, c, _ = problem(2, 60, 5, 3)
    x[1, 59, 2] = torch.nan
    with pytest.raises(ValueError, match="x must be finite"): assign.nearest(x, c)
    assert assign.nearest(x[:, :0], c).shape == (2, 0)


def test_only_float32_asks_for_the_kernel(monkeypatch, caplog):
    "float64, and `exact`, are plain by design: no warning."
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(assign._label, "op", lambda *args: 1 / 0)
    x, c, _ = problem(1, 30, 5, 3)
    with caplog.at_level(logging.WARNING):
        assert assign.nearest(x.double(), c.double()).shape == assign.nearest(x, c, exact=True).shape == assign.nearest(x.double(), c).shape == (1, 30)
        with pytest.raises(ZeroDivisionError): assign.nearest(x, c)
    assert not caplog.text


def test_nearest_passes_opcheck():
    x, c, _ = problem(2, 30, 5, 3)
    assert set(torch.library.opcheck(assign._label.op, (x, c)).values()) == {"SUCCESS"}
