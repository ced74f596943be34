"""Softmax by segment beside PyTorch Geometric, same data, alternating, in one process: `python benchmarks/segment_softmax.py`.

Two tasks on 1,000,000 x 64 float32: the *weights* (`segment_softmax` and `torch_geometric.utils.softmax`) and the *aggregation*, softmax-weighted sums
(`segment_softmax_sum` and `torch_geometric.nn.SoftmaxAggregation`). Prints ratios, peer / ours, of CPU seconds (median over the rounds; above 1 ours is
faster). `exp` is `torch.exp(x)` into a new array: the least that any function that returns the weights has to do, so its ratio bounds that column."""
import argparse
import os
import statistics
import time

PEER = {"segment_softmax": "PyG softmax", "exp": "PyG softmax", "segment_softmax_sum": "PyG SoftmaxAggregation"}


def contestants(x, index, k):
    "Name -> function without arguments."
    from torch_geometric.nn import SoftmaxAggregation
    from torch_geometric.utils import softmax

    from deepclustering.core.aggregate import segment_softmax, segment_softmax_sum
    aggregation = SoftmaxAggregation(t=1.0)
    return {
        "segment_softmax": lambda: segment_softmax(x, index, k),
        "exp": lambda: x.exp(),
        "PyG softmax": lambda: softmax(x, index, num_nodes=k),
        "segment_softmax_sum": lambda: segment_softmax_sum(x, x, index, k),
        "PyG SoftmaxAggregation": lambda: aggregation(x, index, dim_size=k),
    }


def ratios(n=1_000_000, d=64, k=1000, ordered=False, rounds=5, threads=1):
    "Ours -> seconds of the peer / seconds of ours, after the results were compared."
    import torch
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    x, index = torch.randn(n, d, generator=generator), torch.randint(k, (n,), generator=generator)
    if ordered: index = index.sort().values
    runs = contestants(x, index, k)
    for ours, peer in PEER.items():  # the warm-up, and the check that both do the same work
        if ours != "exp": torch.testing.assert_close(runs[ours](), runs[peer](), atol=1e-5, rtol=1e-4)
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    return {ours: medians[peer] / medians[ours] for ours, peer in PEER.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch loads its OpenMP
    print(f"{args.rows:,} x 64 float32, {args.threads} thread(s), median of {args.rounds} alternations; seconds of PyTorch Geometric / seconds of ours")
    print(f"{'segments':>9} {'index':>9} " + " ".join(f"{name:>20}" for name in PEER))
    for k in (1000, 100_000):
        for ordered in (False, True):
            found = ratios(args.rows, 64, k, ordered, args.rounds, args.threads)
            print(f"{k:>9,} {'sorted' if ordered else 'random':>9} " + " ".join(f"{r:>20.2f}" for r in found.values()), flush=True)
