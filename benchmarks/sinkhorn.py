"""Sinkhorn beside POT, and without its matrix: `python benchmarks/sinkhorn.py`, ratios within one run.

First POT: 100 iterations without early stopping on 4,096 x 1,000 float32 scores, uniform in 0 to 1. POT is `ot.sinkhorn(..., method="sinkhorn_log")` on torch tensors
and on NumPy arrays. Prints ratios, POT / ours, of CPU seconds (median over the rounds; above 1 ours is faster). A smaller eps sends more
chunks of ten iterations back from the kernel to the log domain.

Then `sinkhorn_factored` beside `sinkhorn` on the product: 20 iterations, 20,000 items and 1,000 slots with 64 unit features, float32. Prints the ratio of CPU
seconds, factored / matrix (above 1 the matrix is faster), and the growth of each process's peak memory over that with the features alone (Linux only)."""
import argparse
import os
import statistics
import subprocess
import sys
import time


def ratio(n=4096, k=1000, n_iters=100, eps=0.05, rounds=3, threads=1, arrays=False):
    "Seconds of POT / seconds of ours, after the plans were compared."
    import ot
    import torch

    from deepclustering.core.transport import sinkhorn
    torch.set_num_threads(threads)
    scores = torch.rand(n, k, generator=torch.Generator().manual_seed(0))
    a, b = torch.full((n,), 1 / n), torch.full((k,), 1 / k)
    peer_inputs = [t.numpy() if arrays else t for t in (a, b, -scores)]
    ours = lambda: sinkhorn(scores, a, b, eps=eps, n_iters=n_iters, tol=0)
    peer = lambda: ot.sinkhorn(*peer_inputs, eps, method="sinkhorn_log", numItermax=n_iters, stopThr=0, warn=False)
    torch.testing.assert_close(n * k * ours(), n * k * torch.as_tensor(peer()), atol=1e-3 / eps, rtol=1e-3 / eps)  # warm-up; float32 exponents of 1 / eps
    return alternate(peer, ours, rounds, threads)


def alternate(first, second, rounds, threads):
    "Median seconds of the first / of the second, called in turn."
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds = {first: [], second: []}
    for _ in range(rounds):
        for run, spent in seconds.items():
            start = clock()
            run()
            spent.append(clock() - start)
    return statistics.median(seconds[first]) / statistics.median(seconds[second])


def features(n, k, p):
    "Unit vectors of items and slots."
    import torch
    g = torch.Generator().manual_seed(0)
    return [torch.nn.functional.normalize(torch.randn(rows, p, generator=g), dim=1) for rows in (n, k)]


def solvers(x, y, eps, n_iters):
    "The two ways from features to what the slots receive of them, `(k, p)`."
    from deepclustering.core.transport import sinkhorn, sinkhorn_factored
    return {"matrix": lambda: sinkhorn(x @ y.T, eps=eps, n_iters=n_iters, tol=0).T @ x,
            "factored": lambda: sinkhorn_factored(x, y, eps=eps, n_iters=n_iters, tol=0).to_slots(x)}


def factored_ratio(n=20_000, k=1000, p=64, n_iters=20, eps=0.05, rounds=3, threads=1):
    "Seconds without the matrix / with it, after the results were compared."
    import torch
    torch.set_num_threads(threads)
    run = solvers(*features(n, k, p), eps, n_iters)
    torch.testing.assert_close(k * run["factored"](), k * run["matrix"](), atol=1e-3, rtol=0)
    return alternate(run["factored"], run["matrix"], rounds, threads)


def peak(kind, n=20_000, k=1000, p=64, n_iters=20, eps=0.05):
    "MB that a process of its own needs above its features and libraries."
    code = f"import runpy; runpy.run_path({os.path.abspath(__file__)!r})['_peak']({kind!r}, {n}, {k}, {p}, {n_iters}, {eps})"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def _peak(kind, n, k, p, n_iters, eps):
    import torch
    torch.set_num_threads(1)
    solvers(*features(100, 10, p), eps, 2)[kind]()  # whatever is loaded at the first call
    run = solvers(*features(n, k, p), eps, n_iters)[kind]
    status = lambda name: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) / 1024
    with open("/proc/self/clear_refs", "w") as f: f.write("5")  # the peak counts from here
    before = status("VmRSS")
    run()
    print(status("VmHWM") - before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch loads its OpenMP
    print(f"4,096 x 1,000 float32, 100 iterations, {args.threads} thread(s), median of {args.rounds} alternations; seconds of POT sinkhorn_log / seconds of ours")
    print(f"{'eps':>6} {'torch tensors':>14} {'NumPy arrays':>14}")
    for eps in (0.05, 0.005):
        print(f"{eps:>6} " + " ".join(f"{ratio(eps=eps, rounds=args.rounds, threads=args.threads, arrays=arrays):>14.1f}" for arrays in (False, True)), flush=True)
    print("\n20,000 x 1,000 from 64 features, float32, 20 iterations; seconds without the matrix / seconds with it, and MB above the features")
    print(f"{'eps':>6} {'seconds':>14} {'MB factored':>14} {'MB matrix':>14}")
    print(f"{0.05:>6} {factored_ratio(rounds=args.rounds, threads=args.threads):>14.1f} {peak('factored'):>14.0f} {peak('matrix'):>14.0f}")
