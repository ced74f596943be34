"""Sinkhorn beside POT, same data, alternating, in one process: `python benchmarks/sinkhorn.py`.

100 iterations without early stopping on 4,096 x 1,000 float32 scores, uniform in 0 to 1. POT is `ot.sinkhorn(..., method="sinkhorn_log")` on torch tensors
and on NumPy arrays. Prints ratios, POT / ours, of CPU seconds (median over the rounds; above 1 ours is faster). A smaller eps sends more
chunks of ten iterations back from the kernel to the log domain."""
import argparse
import os
import statistics
import time


def ratio(n=4096, k=1000, n_iters=100, eps=0.05, rounds=3, threads=1, arrays=False):
    "Seconds of POT / seconds of ours, after the plans were compared."
    import ot
    import torch

    from deepclustering.core.transport import sinkhorn
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    scores = torch.rand(n, k, generator=torch.Generator().manual_seed(0))
    a, b = torch.full((n,), 1 / n), torch.full((k,), 1 / k)
    peer_inputs = [t.numpy() if arrays else t for t in (a, b, -scores)]
    ours = lambda: sinkhorn(scores, a, b, eps=eps, n_iters=n_iters, tol=0)
    peer = lambda: ot.sinkhorn(*peer_inputs, eps, method="sinkhorn_log", numItermax=n_iters, stopThr=0, warn=False)
    torch.testing.assert_close(n * k * ours(), n * k * torch.as_tensor(peer()), atol=1e-3 / eps, rtol=1e-3 / eps)  # warm-up; float32 exponents of 1 / eps
    seconds = {ours: [], peer: []}
    for _ in range(rounds):
        for run, spent in seconds.items():
            start = clock()
            run()
            spent.append(clock() - start)
    return statistics.median(seconds[peer]) / statistics.median(seconds[ours])


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
