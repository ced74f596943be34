"""FasterPAM from the same random start on a table of 10,000 points: ours beside the package `kmedoids`, alternated in one process.

`python benchmarks/kmedoids.py [--threads 1] [--rounds 3]` prints the median CPU seconds of both and their ratio, for 10 and 100 medoids.
The table is MNIST's test set where there is a copy, else random points; making it is not timed. Only the ratio means anything.
"""
import argparse
import os
import statistics
import sys
import time
from pathlib import Path

LIMIT = 1.5


def points(n):
    "`(n, d)` float64: digits, or three-dimensional noise with structure where there are none."
    import torch

    from deepclustering.core.data import available, load_mnist_test
    if available("mnist_test"): return torch.from_numpy(load_mnist_test().X[:n]).double()
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=g, dtype=torch.float64) + 4 * torch.randn(50, 3, generator=g, dtype=torch.float64)[torch.randint(50, (n,), generator=g)]


def measure(n=10_000, rounds=3, threads=1, ks=(10, 100)):
    "By number of medoids the median CPU seconds of ours and of the package's; medoids, swaps and loss must agree."
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # there `kmedoids` is this file
    import kmedoids
    import numpy as np
    import torch

    from deepclustering.clustering import fasterpam
    from deepclustering.clustering.kmedoids import dissimilarities
    torch.set_num_threads(threads)
    D = dissimilarities(points(n)).numpy()
    found = {}
    for k in ks:
        start = np.random.default_rng(0).choice(n, k, replace=False)
        runs = {"deepclustering": lambda: fasterpam(D, start), "kmedoids": lambda: kmedoids.fasterpam(D, start.astype(np.uint64), n_cpu=threads)}
        seconds, results = {name: [] for name in runs}, {}
        for _ in range(rounds):
            for name, run in runs.items():
                begin = time.process_time()
                results[name] = run()
                seconds[name].append(time.process_time() - begin)
        ours, theirs = results.values()
        if threads == 1: assert np.array_equal(ours.medoids, theirs.medoids) and ours.n_swap == theirs.n_swap and abs(ours.loss / theirs.loss - 1) < 1e-12
        found[k] = {name: statistics.median(s) for name, s in seconds.items()} | {"swaps": ours.n_swap, "loss": ours.loss}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    found = measure(rounds=args.rounds, threads=args.threads)
    ratios = {k: f["deepclustering"] / f["kmedoids"] for k, f in found.items()}
    for k, f in found.items(): print(f"k = {k:3d}: {f['deepclustering']:6.2f} s   kmedoids {f['kmedoids']:6.2f} s   ratio {ratios[k]:.2f}   {f['swaps']} swaps, loss {f['loss']:,.3f}")
    sys.exit(max(ratios.values()) > LIMIT)
