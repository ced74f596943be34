"""Every operator on the GPU at hand against the CPU in float64: `make gpu-check`, under nine minutes, one JSON file.

Needs a checkout, Python >= 3.11, torch, NumPy, SciPy and scikit-learn; pure-Python wheels that are missing there (fastcore, tqdm)
are imported from .whl/ if they lie in it. No network, no installation. The file is $OUT/gpu-check.json, else _out/gpu-check.json.

    python tools/gpu_check.py                every check on the GPU
    python tools/gpu_check.py --cpu          the same checks on the CPU with small sizes: is the program itself sound?
    python tools/gpu_check.py segment lloyd  only checks whose name contains one of these

A chapter adds its operators below: `@check(...)` over the call. `make` draws the inputs on the CPU; the same call on float64 copies on the
CPU is the reference, unless `judge` measures the error of what came out in another way. An error above `tolerance` fails.
Bytes and operations are what the operator must at least read, write and compute; shares are of the copy bandwidth and the float32
matrix rate that this very run measured.
"""
import argparse
import json
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


def check(name, make, tolerance, cost, judge=relative, moves=True):
    "Register the decorated call."
    return lambda call: CHECKS.append(Check(name, call, make, tolerance, cost, judge, moves))


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


# --- core.lloyd and clustering ------------------------------------------------------------------------------------------

def blobs(generator, big):
    n, k, d = (1_000_000, 64, 32) if big else (600, 5, 3)
    centers = 10 * torch.randn(k, d, generator=generator)
    which = torch.randint(k, (n,), generator=generator)
    return centers[which] + torch.randn(n, d, generator=generator), centers + torch.randn(k, d, generator=generator)


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


# --- running them -------------------------------------------------------------------------------------------------------

def timed(call, repeats=10, seconds=4.0):
    "Median milliseconds of a call after two to warm up; CUDA events on a GPU."
    call(), call()
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
    "What the machine can do, measured: bytes per second of a copy (read and written), float32 operations per second of a matrix product."
    a = torch.empty(2**28 if big else 2**22, device=DEVICE)
    copy = 2 * size(a) / timed(a.clone) * 1e3
    m = torch.randn(2 * (8192 if big else 512,), device=DEVICE)
    return copy, 2 * len(m)**3 / timed(lambda: m @ m) * 1e3


def equal(a, b): return all(torch.equal(p, q) for p, q in zip(*(o if isinstance(o, tuple) else (o,) for o in (a, b))))


def run(check, big, limit):
    "One check: a row for the report, whatever happens."
    row = {"name": check.name, "ok": False, "tolerance": check.tolerance}
    try:
        inputs = check.make(torch.Generator().manual_seed(0), big)
        moved = [t.to(DEVICE) for t in inputs] if check.moves else inputs
        output = check.call(*moved)
        row["repeatable"] = equal(output, check.call(*moved))  # the same bits a second time
        row["error"] = check.judge(output, inputs, check.call)
        row["ok"] = row["error"] <= check.tolerance
        nbytes, operations = check.cost(*inputs)
        row |= {"shapes": [list(t.shape) for t in inputs], "ms": round(timed(lambda: check.call(*moved)), 4)}
        if nbytes:
            rate, speed = nbytes / row["ms"] * 1e3, operations / row["ms"] * 1e3
            row |= {"gigabytes_per_second": round(rate / 1e9, 2), "gigaflops": round(speed / 1e9, 2),
                    "share_of_copy": round(rate / limit[0], 4), "share_of_matmul": round(speed / limit[1], 4)}
        if not math.isfinite(row["error"]): row["error"] = str(row["error"])  # JSON has no infinity
    except Exception as e:
        row["reason"] = f"{type(e).__name__}: {e}"
        if os.environ.get("TRACEBACK"): traceback.print_exc()
    return row


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
    result = {"device": "CPU" if args.cpu else torch.cuda.get_device_name(), "versions": versions(), "commit": commit, "date": str(date.today()),
              "copy_gigabytes_per_second": round(limit[0] / 1e9, 1), "float32_gigaflops": round(limit[1] / 1e9, 1), "checks": []}
    print(f"{result['device']}, torch {torch.__version__}: copy {result['copy_gigabytes_per_second']:.0f} GB/s, float32 {result['float32_gigaflops']:.0f} GFLOP/s\n")
    print(f"{'check':42s} {'error':>9s} {'allowed':>9s} {'ms':>9s} {'GB/s':>7s} {'of copy':>8s} {'of matmul':>9s} repeatable")
    for c in CHECKS:
        if args.names and not any(n in c.name for n in args.names): continue
        late = time.monotonic() - start > 60 * MINUTES
        row = {"name": c.name, "ok": False, "reason": f"not run: {MINUTES} minutes were over"} if late else run(c, not args.cpu, limit)
        result["checks"].append(row)
        result["seconds"] = round(time.monotonic() - start, 1)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")  # after each: a run that is stopped leaves what it has
        if "reason" in row: print(f"{c.name:42s} FAILED {row['reason'][:150]}", flush=True)
        else:
            print(f"{c.name:42s} {float(row['error']):9.1e} {c.tolerance:9.1e} {row['ms']:9.3f} {row.get('gigabytes_per_second', 0):7.0f} {row.get('share_of_copy', 0):8.1%} "
                  f"{row.get('share_of_matmul', 0):9.1%} {'yes' if row['repeatable'] else 'no':10s}{'' if row['ok'] else ' FAILED'}", flush=True)
    failed = [r["name"] for r in result["checks"] if not r["ok"]]
    print(f"\n{len(result['checks']) - len(failed)} of {len(result['checks'])} checks passed in {result.get('seconds', 0):.0f} s: {out}")
    return 1 if failed or not result["checks"] else 0


if __name__ == "__main__":
    sys.exit(main())
