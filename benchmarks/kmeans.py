"""Ten iterations of k-means from the same start: ours beside faiss and scikit-learn, alternated in one process.

`python benchmarks/kmeans.py [--threads 1] [--rounds 9]` prints the median seconds of a whole fit and the ratio to the faster peer.
Absolute times are this machine's; only the ratios mean anything.
"""
import argparse
import os
import statistics
import sys
import time


def contestants(x, centers, max_iter):
    "Name -> function that fits and returns the centres."
    import faiss
    from sklearn.cluster import KMeans as SkKMeans

    from deepclustering.clustering import KMeans
    k, d = centers.shape

    def ours(): return KMeans(k, init=centers, max_iter=max_iter, tol=0, device="cpu").fit(x).cluster_centers_
    def sklearn(): return SkKMeans(k, init=centers, n_init=1, max_iter=max_iter, tol=0, algorithm="lloyd").fit(x).cluster_centers_
    def faiss_kmeans():
        km = faiss.Kmeans(d, k, niter=max_iter, min_points_per_centroid=1, max_points_per_centroid=10**9)
        km.train(x, init_centroids=centers)
        return km.centroids
    return {"deepclustering": ours, "scikit-learn": sklearn, "faiss": faiss_kmeans}


def measure(n=200_000, d=64, k=256, max_iter=10, rounds=9, threads=1):
    "Median seconds of a fit by contestant, over `rounds` alternations; the centres must agree."
    import faiss
    import numpy as np
    import torch
    from threadpoolctl import threadpool_limits

    from deepclustering.core import assign_all
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(n, d)) + 2 * rng.normal(size=(k, d))[rng.integers(0, k, n)]).astype(np.float32)
    centers = x[rng.choice(n, k, replace=False)]
    seconds = {}
    with threadpool_limits(threads):
        runs = contestants(x, centers, max_iter)
        found = {name: run() for name, run in runs.items()}  # warm-up, and the check that all do the same work
        # a point halfway between two centres goes either way with the last bit, so the inertias must agree, not every centre
        inertias = {name: float(assign_all(torch.from_numpy(x), torch.as_tensor(c))[1]) for name, c in found.items()}
        assert max(inertias.values()) < 1.0001 * min(inertias.values()), inertias
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    medians = measure(rounds=args.rounds, threads=args.threads)
    best = min(v for k, v in medians.items() if k != "deepclustering")
    for name, s in medians.items(): print(f"{name:16s} {s:7.2f} s   {s / best:.2f} of the faster peer")
    sys.exit(medians["deepclustering"] > 1.4 * best)
