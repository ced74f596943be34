"""`nearest` beside faiss and scikit-learn, same data, alternating, in one process: `python benchmarks/nearest.py`.

Prints ratios of CPU seconds (median over the rounds; 1.00 is faiss) and, per library, the share of labels outside the rounding bound.
An offset column repeats the certificate on the same data moved by 10,000."""
import argparse
import os
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--rounds", type=int, default=9)
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before the libraries load their OpenMP

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.metrics import pairwise_distances_argmin  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402

from deepclustering.core.assign import assignment_certificate, nearest  # noqa: E402

SHAPES = [(200_000, 64, 256), (200_000, 64, 16), (50_000, 64, 2048), (20_000, 784, 100), (200_000, 8, 256)]


def faiss_labels(x, c):
    index = faiss.IndexFlatL2(c.shape[1])
    index.add(c.numpy())
    return index.search(x.numpy(), 1)[1][:, 0]


def plain_torch(x, c, rows=2048):
    "The usual chunked formula with addmm and argmin."
    bias, matrix = c.square().sum(1) / 2, c.T.contiguous()
    return torch.cat([torch.addmm(bias, part, matrix, alpha=-1).argmin(1) for part in x.split(rows)])


METHODS = {
    "faiss": faiss_labels,
    "scikit-learn": lambda x, c: pairwise_distances_argmin(x.numpy(), c.numpy()),
    "plain torch": plain_torch,
    "nearest": nearest,
    "+ distances": lambda x, c: nearest(x, c, return_distance=True),
}


def medians(x, c):
    "Median seconds per method, methods alternating within each round."
    seconds = {name: [] for name in METHODS}
    for _ in range(args.rounds + 1):
        for name, method in METHODS.items():
            start = time.perf_counter() if args.threads > 1 else time.process_time()
            method(x, c)
            seconds[name].append((time.perf_counter() if args.threads > 1 else time.process_time()) - start)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}  # the first round warms up


def outside(x, c):
    "Share of labels outside the bound, per method, on at most 20,000 points."
    x = x[:20_000]
    return {name: assignment_certificate(x, c, np.asarray(method(x, c))).outside for name, method in METHODS.items() if name[0] != "+"}


if __name__ == "__main__":
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    print(f"{args.threads} thread(s), median of {args.rounds} alternations; seconds relative to faiss | outside the bound | the same, data moved by 1e4")
    with threadpool_limits(args.threads):
        for n, d, k in SHAPES:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(n, d, generator=generator)
            c = x[torch.randperm(n, generator=generator)[:k]].clone()
            seconds, share, moved = medians(x, c), outside(x, c), outside(x + 1e4, c + 1e4)
            print(f"N={n:,} d={d} k={k}")
            for name, s in seconds.items():
                certificate = f" | {share[name]:7.2%} | {moved[name]:7.2%}" if name in share else ""
                print(f"  {name:14s} {s / seconds['faiss']:6.2f}{certificate}", flush=True)
