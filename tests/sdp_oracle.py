"""Optimal values of small programs by cvxpy, for tests/test_sdp.py: `python tests/sdp_oracle.py > tests/sdp_oracle.json`, in an environment with cvxpy (SCS, Clarabel).

No test runs this; it was run with cvxpy 1.9.3. The data come from NumPy alone, so that no line of ours has a part in the values.
"""
import json

import numpy as np

CASES = [(8, 2, 2, 0), (12, 3, 2, 1), (20, 4, 3, 2), (40, 3, 2, 3)]  # n, k, d, seed


def problem(n, k, d, seed):
    "Points `(n, d)` in overlapping clusters, and covariances `(k, d, d)`."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) + 2.5 * rng.normal(size=(k, d))[np.arange(n) % k]
    root = rng.normal(size=(k, d, d))
    return x, root @ root.transpose(0, 2, 1) + .3 * np.eye(d)


def half_squared(x, metric):
    "Half the squared distances `(n, n)` in a metric `(d, d)`."
    difference = x[:, None] - x[None]
    return np.einsum("ija,ab,ijb->ij", difference, metric, difference) / 2


def optimum(affinities, traces, solver, **options):
    import cvxpy as cp
    Z = [cp.Variable(A.shape, PSD=True) for A in affinities]
    constraints = [z >= 0 for z in Z] + [cp.trace(z) == t for z, t in zip(Z, traces)] + [cp.sum(sum(Z), axis=1) == 1]
    return cp.Problem(cp.Maximize(sum(cp.sum(cp.multiply(A, z)) for A, z in zip(affinities, Z))), constraints).solve(solver=solver, **options)


if __name__ == "__main__":
    rows = []
    for n, k, d, seed in CASES:
        x, C = problem(n, k, d, seed)
        programs = {"kmeans": ([-half_squared(x, np.eye(d))], [k]), "gaussian": ([-half_squared(x, np.linalg.inv(c)) / 2 - np.linalg.slogdet(c)[1] / 2 for c in C], [1] * k)}
        for name, (A, t) in programs.items():
            rows.append({"program": name, "n": n, "k": k, "d": d, "seed": seed, "clarabel": optimum(A, t, "CLARABEL"), "scs": optimum(A, t, "SCS", eps_abs=1e-7, eps_rel=1e-7, max_iters=50000)})
    print(json.dumps(rows, indent=1))
