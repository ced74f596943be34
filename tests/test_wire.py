"""The ledger against the kernel's counters, on a world and sizes that the notebook does not try, and ledgers that cannot be turned into bytes."""
import shutil
import subprocess

import pytest

from deepclustering.core.distributed import Message, Traffic, ring_bytes
from deepclustering.parallelism.wire import GLOO, in_own_network, ledger_bytes, wire_bytes

MIXED = """
    import time, torch, torch.distributed as dist
    from deepclustering.core.distributed import count_bytes, run
    def work(rank, world):
        x, parts = torch.ones(2**20 + 7), torch.ones(world, 2**19 + 3)     # five ranks divide neither
        counts = []
        for _ in range(3):                                                 # packets that a busy machine sends again only add
            dist.barrier(); time.sleep(0.05); before = on_wire(); dist.barrier()
            with count_bytes() as traffic:
                dist.all_reduce(x)
                dist.all_gather(list(parts.clone()), parts[0].clone())
                dist.broadcast(x, 3)
                dist.scatter(torch.empty(2**19 + 3), list(parts) if rank == 2 else None, 2)
                dist.send(x, 4) if rank == 1 else dist.recv(x, 1) if rank == 4 else None
                dist.barrier()
            dist.barrier(); time.sleep(0.05)
            counts.append(on_wire() - before)
        return min(counts), traffic
    answer = [(n, [list(m) for m in t]) for n, t in run(work, 5)]
"""


def test_a_mixed_ledger_is_what_the_kernel_counts():
    if not shutil.which("unshare") or subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], capture_output=True).returncode: pytest.skip("this system gives nobody a network of its own")
    ranks = in_own_network(MIXED)
    expected = ledger_bytes([Traffic(Message(*m) for m in t) for _, t in ranks])
    x, part = 4 * (2**20 + 7), 4 * (2**19 + 3)
    assert expected == pytest.approx(8 * x + 20 * part + 4 * x + 4 * part + x)  # by hand: all-reduce, all-gather, broadcast, scatter, send
    assert -0.0005 < ranks[0][0] / expected - 1 < 0.01                           # headers are taken off, none is longer


def test_what_is_not_allowed_has_a_name(monkeypatch):
    monkeypatch.setenv("PATH", "")                                         # no `unshare` to be found
    with pytest.raises(PermissionError, match="needs Linux with unshare"): in_own_network("answer = 1")


@pytest.mark.parametrize("world", [1, 2, 5])
def test_rings_are_what_gloo_sends_but_for_one(world):
    for op in ("all_reduce", "reduce_scatter"): assert wire_bytes(op, 60, world) == world * ring_bytes(op, 60, world) * (2 if op == "reduce_scatter" else 1)
    assert wire_bytes("all_gather", 60, world) == world * ring_bytes("all_gather", 60 * world, world)   # its n is the gathered whole
    assert all(wire_bytes(op, 60, 1) == 0 for op in GLOO if op != "send")


def test_bad_ledgers():
    with pytest.raises(ValueError, match="op must be one of all_reduce, .*, got 'reduce'"): ledger_bytes([Traffic([Message("reduce", None, 4, 4)])])
    with pytest.raises(ValueError, match="world must be a whole number at least 1, got 0.5"): wire_bytes("send", 1, 0.5)
