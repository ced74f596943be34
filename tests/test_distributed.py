"""Distributed runs: no rank survives, every deadlock is named, no slow program is accused, every byte is counted."""
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from deepclustering.core import distributed
from deepclustering.core.distributed import DeadlockError, Message, RankError, Traffic, check_parity, count_bytes, exhibit, ring_bytes, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")
QUICK = 0.5  # patience of the tests that need not wait for the default


@pytest.fixture(autouse=True)
def no_orphan():
    "Whatever a test does: afterwards no process of it is left, not even a zombie."
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not left, left


def spread(rank, world): return rank, world, torch.get_num_threads()


# ---- starting and returning


@pytest.mark.parametrize("world", [1, 4, 16])
def test_results_by_rank(world):
    assert run(spread, world) == [(r, world, 1) for r in range(world)]


def test_four_ranks_start_in_well_under_a_second():
    def seconds():
        start = time.perf_counter()
        run(spread, 4)
        return time.perf_counter() - start
    assert min(seconds() for _ in range(3)) < 1


def test_sixteen_ranks_communicate():
    def total(rank, world):
        x = torch.tensor([float(rank)])
        dist.all_reduce(x)
        return x.item()
    assert run(total, 16) == [120.0] * 16


@pytest.mark.parametrize("world", [0, 17, -1, 2.0, True, "2"])
def test_world_out_of_range(world):
    with pytest.raises(ValueError, match="world must be"): run(spread, world)


def test_closures_and_arguments():
    secret = [3]
    def outer(offset):
        def inner(rank, world, factor): return secret[0] * factor + rank + offset
        return inner
    assert run(outer(100), 2, 10) == [130, 131]


def test_large_results_leave_nothing_in_shared_memory():
    before = set(os.listdir("/dev/shm"))
    def big(rank, world): return {"x": torch.full((2**22,), float(rank)), "view": torch.arange(10)[2:4]}
    results = run(big, 2)
    assert [r["x"].sum().item() for r in results] == [0, 2**22]
    assert results[1]["view"].tolist() == [2, 3] and not results[0]["x"].is_shared()
    assert set(os.listdir("/dev/shm")) - before == set()


def test_results_with_a_graph_numpy_and_odd_types():
    def mixed(rank, world):
        w = torch.ones(2, requires_grad=True)
        return (w * 2, w, torch.tensor([]), torch.ones(2, dtype=torch.bfloat16), w.detach().numpy(), Traffic([Message("send", 1, 2, 3)]))
    y, w, empty, half, array, traffic = run(mixed, 1)[0]
    assert y.tolist() == [2, 2] and w.requires_grad and empty.numel() == 0 and half.dtype == torch.bfloat16
    assert array.tolist() == [1, 1] and traffic.sent("send") == 2


@pytest.mark.parametrize("value", [lambda: 1, threading.Lock(), (x for x in "ab")], ids=["lambda", "lock", "generator"])
def test_what_cannot_be_returned_is_named(value):
    with pytest.raises(RankError, match=r"^rank . of 2: TypeError: a rank can return tensors.*cannot leave its process"): run(lambda r, w: value, 2)


def test_output_in_the_order_of_ranks(capsys):
    def talk(rank, world):
        time.sleep(0.05 * (world - rank))
        print("one\ntwo")
        os.system("echo three")
    run(talk, 2)
    assert capsys.readouterr().out.splitlines() == [f"rank {r}: {word}" for r in range(2) for word in ("one", "two", "three")]


def test_ranks_start_with_the_parents_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
    assert run(lambda r, w: torch.rand(1).item(), 2) == [expected] * 2


def test_fork_after_openmp_and_backward_in_the_parent():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        a = torch.rand(300, 300, requires_grad=True)
        (a @ a).relu().sum().backward()
        def work(rank, world):
            b = torch.rand(300, 300, requires_grad=True)
            (b @ b).relu().sum().backward()
            return float(b.grad.norm()) > 0
        assert run(work, 2, timeout=20) == [True, True]
    finally: torch.set_num_threads(threads)


def test_run_from_a_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(run(spread, 2)))
    thread.start()
    thread.join()
    assert results == [[(0, 2, 1), (1, 2, 1)]]


def test_refused_where_forking_cannot_work(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(RuntimeError, match="CUDA does not survive a fork.*torchrun"): run(spread, 2)
    with monkeypatch.context() as m:
        m.setattr(sys, "platform", "darwin")
        with pytest.raises(RuntimeError, match="Linux only, got darwin.*torchrun"): run(spread, 2)
    with pytest.raises(RankError, match=r"^rank . of 2: RuntimeError: run starts a process group of its own, and this process is already in one"): run(lambda r, w: run(spread, 2), 2)


# ---- failures


def test_traceback_of_the_failing_rank_while_others_wait():
    def work(rank, world):
        if rank == 1: raise KeyError("no such shard")
        dist.barrier()
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 3: KeyError: 'no such shard'") as caught: run(work, 3)
    assert time.monotonic() - start < 2 and caught.value.rank == 1
    assert 'raise KeyError("no such shard")' in str(caught.value) and "test_distributed.py" in str(caught.value)
    assert "/site-packages/" not in str(caught.value)


def test_causes_are_in_the_traceback():
    def work(rank, world):
        try: {}["a"]
        except KeyError as error: raise ValueError("bad key") from error
    with pytest.raises(RankError, match="(?s)KeyError: 'a'.*direct cause.*ValueError: bad key"): run(work, 1)


def test_the_first_failure_is_reported_and_not_its_consequence():
    def work(rank, world):
        if rank == 2: raise ValueError("first")
        dist.recv(torch.empty(1), 2)
    for _ in range(3):
        with pytest.raises(RankError, match="rank 2 of 3: ValueError: first"): run(work, 3)


@pytest.mark.parametrize("end, words", [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"), (lambda: os._exit(3), "exit code 3"),
    (lambda: os.abort(), "killed by SIGABRT.*last words.*Fatal Python error: Aborted"), (lambda: sys.exit(4), "SystemExit: 4")], ids=["kill", "exit", "abort", "sys.exit"])
def test_a_rank_that_dies(end, words):
    def work(rank, world):
        print("last words")
        if rank == 1: end()
        dist.barrier()
    with pytest.raises(RankError, match=f"(?s)rank 1 of 3.*{words}"): run(work, 3)


def test_a_size_mismatch_names_the_rank_and_shows_what_gloo_said():
    def work(rank, world): dist.all_reduce(torch.ones(4 + rank))
    with pytest.raises((RankError, DeadlockError), match="mismatch|all_reduce"): run(work, 2)


def test_timeout_says_who_runs():
    def work(rank, world):
        if rank == 0: time.sleep(60)
        dist.barrier()
    with pytest.raises(TimeoutError, match="(?s)not finished after 1 s.*rank 0 runs.*rank 1 waits .* s in barrier"): run(work, 2, timeout=1)


def test_grandchildren_die_too():
    def work(rank, world):
        subprocess.Popen(["sleep", "1000"])
        if rank == 0: raise ValueError("stop")
        time.sleep(60)
    with pytest.raises(RankError): run(work, 2)  # no_orphan looks at grandchildren: they would be re-parented, so look at all processes too
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1000"]]


def test_interrupt_leaves_no_rank():
    timer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt): run(lambda r, w: time.sleep(60), 4)
    timer.join()
    assert run(spread, 2) == [(0, 2, 1), (1, 2, 1)]


def test_a_killed_parent_takes_its_ranks_along(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # it cannot tidy up any more
    read, write = os.pipe()
    parent = multiprocessing.get_context("fork").Process(
        target=lambda: run(lambda r, w: (os.write(write, f"{os.getpid()} ".encode()), time.sleep(60)), 3))
    parent.start()
    os.close(write)
    pids = b""
    while pids.count(b" ") < 3: pids += os.read(read, 100)
    parent.kill()
    parent.join()
    end = time.monotonic() + 5
    while (alive := [p for p in map(int, pids.split()) if psutil.pid_exists(p)]) and time.monotonic() < end: time.sleep(0.05)
    os.close(read)
    assert not alive


# ---- deadlocks: all named; the four of the contract with the default patience and a clock


def stamp(path):
    "The moment from which on a rank waits."
    Path(path).write_text(str(time.time()))


def recv_without_send(rank, world):
    dist.recv(torch.empty(3), (rank + 1) % world, tag=7) if rank == 0 else dist.barrier()

def one_rank_returns_early(rank, world):
    for _ in range(2 if rank else 3): dist.all_reduce(torch.ones(2))

def cyclic_recv(rank, world):
    x = torch.empty(1)
    dist.recv(x, (rank - 1) % world)
    dist.send(x, (rank + 1) % world)

def different_collectives(rank, world):
    group = dist.new_group([0, 1])
    if rank == 0: dist.all_reduce(torch.ones(2)); dist.all_reduce(torch.ones(2), group=group)
    elif rank == 1: dist.all_reduce(torch.ones(2), group=group); dist.all_reduce(torch.ones(2))
    else: dist.all_reduce(torch.ones(2))

@pytest.mark.parametrize("program, words", [
    (recv_without_send, ["rank 0 waits .* in recv\\(src=1, tag=7\\), called by recv_without_send", "rank 1 waits .* in barrier"]),
    (one_rank_returns_early, ["rank 0 waits .* in all_reduce\\(\\)", "rank 1 has finished", "rank 2 has finished"]),
    (cyclic_recv, [f"rank {r} waits .* in recv\\(src={(r - 1) % 3}, tag=0\\)" for r in range(3)]),
    (different_collectives, ["rank 0 waits .* in all_reduce\\(\\)", "rank 1 waits .* in all_reduce\\(group=\\[0, 1\\]\\)", "rank 2 waits"]),
], ids=lambda p: getattr(p, "__name__", ""))
def test_deadlock_is_named_within_five_seconds(program, words, tmp_path):
    def work(rank, world):
        stamp(tmp_path / str(rank))
        program(rank, world)
    with pytest.raises(DeadlockError) as caught: run(work, 3)
    told = time.time()
    since = max(float(Path(tmp_path / str(r)).read_text()) for r in range(3))
    for word in words: assert re.search(word, str(caught.value)), str(caught.value)
    assert told - since < 5


def irecv_wait(rank, world):
    work = dist.irecv(torch.empty(1), 1 - rank)
    work.wait()

def wrong_tag(rank, world):
    x = torch.ones(1)
    if rank == 0: dist.send(x, 1, tag=1)
    else: dist.recv(x, 0, tag=2)

def batched(rank, world):
    for w in dist.batch_isend_irecv([dist.P2POp(dist.irecv, torch.empty(1), 1 - rank)]): w.wait()

def objects(rank, world):
    if rank == 0: dist.all_gather_object([None] * world, {"a": 1})
    else: dist.recv(torch.empty(1), 0)

def any_source(rank, world): dist.recv(torch.empty(1))

def future(rank, world):
    if rank == 0: dist.all_reduce(torch.ones(1), async_op=True).get_future().wait()

def all_to_all(rank, world):
    if rank == 0: dist.all_to_all_single(torch.empty(2), torch.ones(2))

def one_sided_group(rank, world):
    if rank == 0: dist.new_group([0, 1])

def data_parallel(rank, world):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    for _ in range(2 if rank == 0 else 1): model(torch.ones(1, 2)).sum().backward()

def functional(rank, world):
    from torch.distributed._functional_collectives import all_reduce
    if rank == 0: all_reduce(torch.ones(2), "sum", dist.group.WORLD) + 1

@pytest.mark.parametrize("program, words", [
    (irecv_wait, r"rank 0 waits .* in wait\(\) of irecv\(src=1, tag=0\), called by irecv_wait \(.*line \d+: work = .*\), called by irecv_wait \(.*work.wait"),
    (wrong_tag, r"(?s)send\(dst=1, tag=1\).*recv\(src=0, tag=2\)"), (batched, r"irecv|batch_isend_irecv"),
    (objects, r"(?s)rank 0 waits .* in all_gather_object\(\).*rank 1 waits .* in recv\(src=0"), (any_source, r"recv\(tag=0\)"),
    (future, r"rank 0 waits .* in wait\(\)"), (all_to_all, r"all_to_all_single"), (one_sided_group, r"new_group"),
    (data_parallel, r"rank 0 waits .* in backward|rank 0 waits .* in _engine_run_backward|rank 0 waits"), (functional, r"rank 0 waits .* in (all_reduce|wait_tensor)"),
], ids=lambda p: getattr(p, "__name__", ""))
def test_deadlocks_of_all_kinds(program, words):
    import torch._dynamo  # noqa: F401 the ranks would each import it
    with pytest.raises(DeadlockError, match=words): run(program, 2, patience=QUICK, timeout=20)


# ---- no false alarm


def test_a_rank_that_sleeps_computes_or_holds_the_gil_is_no_deadlock():
    def work(rank, world):
        for slow in range(3):
            if rank == slow == 0: time.sleep(3 * QUICK)
            if rank == slow == 1: sum(range(4 * 10**7))  # in C, without ever letting the observer run
            if rank == slow == 2:
                x, end = torch.rand(200, 200), time.monotonic() + 3 * QUICK
                while time.monotonic() < end: x = (x @ x).clamp(0, 1)
            dist.barrier()
        return True
    assert run(work, 4, patience=QUICK) == [True] * 4


def test_large_messages_are_no_deadlock():
    def work(rank, world):
        x = torch.ones(2**24)  # 64 MB
        for _ in range(3): dist.all_reduce(x)
        dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
        return x[-1].item()
    assert run(work, 2, patience=0.2) == [8.0] * 2


def test_a_long_backward_on_every_rank_is_no_deadlock():
    def work(rank, world):
        x = torch.rand(300, 300, requires_grad=True)
        y = x
        for _ in range(600): y = (y @ x).clamp(0, 1)
        start = time.monotonic()
        y.sum().backward()
        return time.monotonic() - start
    assert max(run(work, 2, patience=0.2)) > 0.4  # long enough to be mistaken


def test_waits_that_end_by_themselves_are_no_deadlock():
    from datetime import timedelta
    def work(rank, world):
        request = dist.irecv(torch.empty(1), 1 - rank)
        try: request.wait(timedelta(seconds=1.5))
        except RuntimeError: return "timed out"
    assert run(work, 2, patience=QUICK) == ["timed out"] * 2


def test_patience_can_be_switched_off():
    with pytest.raises(TimeoutError): run(cyclic_recv, 2, patience=float("inf"), timeout=1.5)


# ---- the ledger


def count(fn, world=2):
    def work(rank, world):
        with count_bytes() as traffic: fn(rank, world)
        return traffic
    return run(work, world)


def test_every_collective_has_its_payload():
    n = 6  # numbers of 4 bytes
    def work(rank, world):
        x = torch.ones(n)
        dist.all_reduce(x)
        dist.reduce(x, 1)
        dist.broadcast(x, 1)
        dist.all_gather(list(torch.empty(world, n)), x)
        dist.reduce_scatter(torch.empty(n), list(torch.ones(world, n)))
        dist.gather(x, list(torch.empty(world, n)) if rank == 0 else None, 0)
        dist.scatter(x, list(torch.ones(world, n)) if rank == 0 else None, 0)
        dist.all_to_all_single(torch.empty(n), x)
        dist.all_to_all(list(torch.empty(2, 3)), list(torch.ones(2, 3)))
        dist.barrier()
    N = 4 * n
    names = ["all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "gather", "scatter", "all_to_all", "all_to_all", "barrier"]
    first, second = count(work)
    assert [m.op for m in first] == names == [m.op for m in second]
    assert [(m.sent, m.received) for m in first] == [(N, N), (N, 0), (0, N), (N, 2 * N), (2 * N, N), (N, 2 * N), (2 * N, N), (N, N), (N, N), (0, 0)]
    assert [(m.sent, m.received) for m in second] == [(N, N), (N, N), (N, 0), (N, 2 * N), (2 * N, N), (N, 0), (0, N), (N, N), (N, N), (0, 0)]


def test_messages_name_global_peers_in_a_subgroup_and_uneven_splits():
    def work(rank, world):
        group = dist.new_group([1, 2])
        if rank == 1: dist.send(torch.ones(3, dtype=torch.float64), 2, group=group)
        if rank == 2: dist.recv(torch.empty(3, dtype=torch.float64), group=group)
        splits = [[1, 2, 0], [0, 1, 1], [3, 0, 0]]
        dist.all_to_all_single(torch.empty(sum(s[rank] for s in splits)), torch.ones(sum(splits[rank])), [s[rank] for s in splits], splits[rank])
    ledgers = count(work, 3)
    assert ledgers[1][0] == Message("send", 2, 24, 0) and ledgers[2][0] == Message("recv", None, 0, 24)
    assert [(t[-1].sent, t[-1].received) for t in ledgers] == [(12, 16), (8, 12), (12, 4)]


def test_batched_and_asynchronous_messages():
    def work(rank, world):
        ops = [dist.P2POp(dist.isend, torch.ones(2), 1 - rank), dist.P2POp(dist.irecv, torch.empty(2), 1 - rank)]
        for w in dist.batch_isend_irecv(ops): w.wait()
        dist.all_reduce(torch.ones(3), async_op=True).wait()
    for rank, traffic in enumerate(count(work)):
        assert traffic == [Message("send", 1 - rank, 8, 0), Message("recv", 1 - rank, 0, 8), Message("all_reduce", None, 12, 12)]
        assert (traffic.calls(), traffic.calls("send"), traffic.sent(), traffic.received("recv")) == (3, 1, 20, 8)


@pytest.mark.parametrize("world", (1, 2, 4))
def test_a_ledger_on_a_ring(world):
    "What `Traffic.ring` says of the engine's collectives, against messages to the right neighbour (gather, sum) and straight to each rank (all-to-all) that are sent and counted one by one; and by hand."
    def work(rank, world):
        whole, piece, right, left = torch.ones(4 * world), torch.ones(4), (rank + 1) % world, (rank - 1) % world
        with count_bytes() as engine:
            dist.all_gather(list(torch.empty(world, 4)), piece)
            dist.reduce_scatter(torch.empty(4), list(whole.chunk(world)))
            dist.all_to_all_single(torch.empty_like(whole), whole)
        with count_bytes() as by_hand:
            for _ in range(2 * (world - 1)):                                        # a gather, and a sum in pieces
                sending = dist.isend(piece, right)
                dist.recv(torch.empty(4), left)
                sending.wait()
            for step in range(1, world):
                sending = dist.isend(piece, (rank + step) % world)
                dist.recv(torch.empty(4), (rank - step) % world)
                sending.wait()
        dist.barrier()
        return engine, by_hand
    for engine, by_hand in run(work, world):
        assert engine.ring(world) == by_hand.sent() == by_hand.ring(world) == 3 * 16 * (world - 1)
        assert engine.ring(world, without=("all_gather", "all_to_all")) == ring_bytes("reduce_scatter", 16 * world, world)
    assert Traffic([Message("all_reduce", None, 12, 12), Message("barrier", None, 0, 0)]).ring(3, ("barrier",)) == 16
    with pytest.raises(ValueError, match="op must be one of all_reduce, all_gather, reduce_scatter, all_to_all, got 'reduce'"): Traffic([Message("reduce", None, 1, 1)]).ring(2)


def test_counts_equal_comm_debug_mode_for_tensor_parallel_layers():
    import torch._dynamo  # noqa: F401
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    def work(rank, world):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        parallelize_module(model, init_device_mesh("cpu", (world,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
        x = torch.randn(5, 8, requires_grad=True)
        with CommDebugMode() as peer: model(x).sum().backward()
        with count_bytes() as traffic: model(x).sum().backward()
        return {str(op).split(".")[-1]: n for op, n in peer.get_comm_counts().items()}, traffic
    for world in (2, 4):
        for peer, traffic in run(work, world):
            assert traffic.calls() == sum(peer.values()) > 0 and traffic.calls("all_reduce") == peer["all_reduce"]
            assert traffic.sent() == 4 * (5 * 4 + 5 * 8)  # the output forward, the input's gradient backward


def test_fully_sharded_data_parallel_costs_what_the_formula_says():
    import torch._dynamo  # noqa: F401
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    def work(rank, world):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 12, bias=False), torch.nn.Linear(12, 8, bias=False))
        mesh = init_device_mesh("cpu", (world,))
        for layer in model: fully_shard(layer, mesh=mesh)
        with count_bytes() as traffic: fully_shard(model, mesh=mesh)(torch.ones(3, 8)).sum().backward()
        return traffic
    N = 4 * (8 * 12 + 12 * 8)
    for traffic in run(work, 4):
        gathered, reduced = traffic.received("all_gather"), traffic.sent("reduce_scatter")
        assert reduced == N and gathered in (2 * N, 2 * N - 4 * 96)  # the last layer may stay gathered between forward and backward
        assert ring_bytes("all_gather", gathered, 4) + ring_bytes("reduce_scatter", reduced, 4) <= 3 * N * 3 / 4


def test_data_parallel_reduces_each_gradient_once():
    import torch._dynamo  # noqa: F401
    def work(rank, world):
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(7, 3))
        with count_bytes() as traffic: model(torch.ones(2, 7)).sum().backward()
        return traffic
    for traffic in run(work, 2): assert traffic.sent("all_reduce") == 4 * (7 * 3 + 3) and traffic.calls() == traffic.calls("all_reduce")


def test_nothing_is_counted_outside_and_nesting_counts_twice():
    def work(rank, world):
        dist.all_reduce(torch.ones(1))
        with count_bytes() as outer:
            torch.rand(3) @ torch.rand(3)
            with count_bytes() as inner: dist.all_reduce(torch.ones(1))
        dist.all_reduce(torch.ones(1))
        return outer, inner
    for outer, inner in run(work, 2): assert outer == inner == [Message("all_reduce", None, 4, 4)]


# ---- parity


def test_parity_takes_its_tolerance_from_the_dtype():
    for dtype, tolerance in distributed.TOLERANCE.items():
        off = lambda factor: lambda r, p: (torch.zeros(3, dtype=torch.float64) + factor * tolerance).to(dtype)
        zero = lambda: torch.zeros(3, dtype=dtype)
        check_parity(off(0.9), zero, worlds=(1,))
        with pytest.raises(AssertionError, match="world 1, rank 0, result: error"): check_parity(off(1.2), zero, worlds=(1,))
    check_parity(lambda r, p: torch.tensor([1, 2]), lambda: torch.tensor([1, 2]), worlds=(1,))
    with pytest.raises(AssertionError, match="allowed is 0e"): check_parity(lambda r, p: torch.tensor([1, 3]), lambda: torch.tensor([1, 2]), worlds=(1,))
    check_parity(lambda r, p: 1.001, lambda: 1.0, worlds=(1,), tolerance=1e-2)


def test_parity_sees_shapes_replicas_and_random_state():
    with pytest.raises(AssertionError, match=r"\(1, 3\), the reference has .* \(3,\)"): check_parity(lambda r, p: torch.ones(1, 3), lambda: torch.ones(3), worlds=(1,))
    with pytest.raises(AssertionError, match="world 2, rank 1, a.0: error"):
        check_parity(lambda r, p: {"a": [torch.ones(2) + r]}, lambda: {"a": [torch.ones(2)]}, worlds=(2,))
    before = torch.get_rng_state()
    table = check_parity(lambda r, p: torch.rand(4), lambda: torch.rand(4), worlds=(1, 3))
    assert [row["ranks"] for row in table] == [1, 3] and torch.equal(before, torch.get_rng_state())
    check_parity(lambda r, p: {"e": torch.empty(0)}, lambda: {"e": torch.empty(0)}, worlds=(1,))


def test_parity_of_the_engines_data_parallelism():
    import torch._dynamo  # noqa: F401
    X, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)
    def model(): torch.manual_seed(0); return torch.nn.Linear(3, 1).double()
    def reference():
        net = model()
        ((net(X) - y) ** 2).mean().backward()
        return {n: p.grad for n, p in net.named_parameters()}
    def parallel(rank, world):
        net = torch.nn.parallel.DistributedDataParallel(model())
        ((net(X.tensor_split(world)[rank]) - y.tensor_split(world)[rank]) ** 2).mean().backward()
        return {n.removeprefix("module."): p.grad for n, p in net.named_parameters()}
    assert max(row["max error"] for row in check_parity(parallel, reference)) < 1e-14


def test_exhibit_demands_both():
    good, bad = (lambda r, w: torch.ones(1)), (lambda r, w: torch.zeros(1))
    assert exhibit("x", bad, good, lambda: torch.ones(1))["bug"] == "x"
    with pytest.raises(AssertionError, match="world 2"): exhibit("x", bad, bad, lambda: torch.ones(1))
    with pytest.raises(AssertionError, match="did not flag"): exhibit("x", good, good, lambda: torch.ones(1))
