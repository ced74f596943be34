"""Three axes: the bubble against a simulated pipeline, parameters against a counted transformer, bytes against the ledger, a mesh of two by three, and what is refused."""
import sys

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from deepclustering.core.distributed import Traffic, check_parity, count_bytes, ring_bytes, run
from deepclustering.core.tinylm import TinyLM
from deepclustering.parallelism.axes import bubble, gpt_parameters, mesh_traffic, training_days
from deepclustering.parallelism.data import average_gradients
from deepclustering.parallelism.tensor import clip_gradients, gather_state, tensor_parallel, vocab_parallel_cross_entropy


def simulated(p, m, v):
    "Idle over busy time of forward passes through p stages of v pieces, one piece a tick; micro-batches go in groups of p, as the interleaved schedule has it."
    order = [(j, c) for start in range(0, m, p) for c in range(v) for j in range(start, min(start + p, m))]
    done, free = {}, [0] * p
    for _ in range(p * v * m):  # until nothing changes: small enough
        for stage in range(p):
            at = 0
            for j, c in order:
                before = done.get((j, c, stage - 1)) if stage else (done.get((j, c - 1, p - 1)) if c else 0)
                if before is None: break
                at = max(at, before) + 1
                done[j, c, stage] = at
        if len(done) == p * v * m: break
    return (max(done.values()) - v * m) / (v * m)


@pytest.mark.parametrize("p, m, v", [(1, 4, 1), (2, 2, 1), (4, 8, 1), (3, 7, 1), (4, 8, 2), (2, 6, 3), (8, 16, 2)])
def test_bubble_of_a_simulated_pipeline(p, m, v): assert simulated(p, m, v) == pytest.approx(bubble(p, m, v))


@pytest.mark.parametrize("layers, width, vocab, tokens", [(1, 4, 10, 6), (3, 8, 20, 16)])
def test_parameters_of_a_counted_transformer(layers, width, vocab, tokens):
    with torch.device("meta"):
        model = nn.ModuleList([nn.Embedding(vocab, width), nn.Embedding(tokens, width), *(nn.TransformerEncoderLayer(width, 2, 4 * width) for _ in range(layers))])
    assert gpt_parameters(layers, width, vocab, tokens) == pytest.approx(sum(p.numel() for p in model.parameters()))


def test_days():
    "One device, one operation a second, one parameter and token: eight seconds."
    assert training_days(1, 1, 1, 1) * 86400 == pytest.approx(8) and training_days(3, 5, 2, 4) == pytest.approx(15 / 8 * training_days(1, 1, 1, 1))


# ---- traffic

BASE = dict(layers=8, width=16, tokens=4, batch=48)


def test_traffic_scales_as_its_formula_says():
    one = mesh_traffic(2, 2, 2, **BASE)
    twice = mesh_traffic(2, 2, 2, **{**BASE, "batch": 96})
    assert [twice[k] / one[k] for k in one] == [2, 2, 1]
    assert mesh_traffic(2, 2, 2, **BASE, micro_batch=4) == one  # fewer and larger messages
    assert [v / one[k] for k, v in mesh_traffic(2, 2, 2, **BASE, itemsize=4).items()] == [2, 2, 2]
    assert mesh_traffic(4, 2, 2, **BASE)["pipeline"] == one["pipeline"] / 2 and mesh_traffic(2, 2, 2, **BASE, chunks=2)["pipeline"] == 2 * one["pipeline"]
    assert mesh_traffic(2, 2, 1, **BASE)["data"] == mesh_traffic(2, 1, 2, **BASE)["pipeline"] == mesh_traffic(1, 2, 2, **BASE)["tensor"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")
def test_traffic_and_numbers_on_two_by_three():
    def lm(): torch.manual_seed(0); return TinyLM(18, dim=12, depth=2, heads=6, kv_heads=3, head_dim=4, hidden=24, shift=False).double()
    tokens = torch.randint(18, (4, 7), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    def whole():
        model = lm()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        torch.optim.SGD(model.parameters(), lr=1.).step()
        return {"norm": norm, "state": model.state_dict()}
    def work(rank, world):
        mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("dp", "tp"))
        tp, dp, mine = mesh["tp"].get_group(), mesh["dp"].get_group(), torch.arange(4).tensor_split((1,))[mesh.get_local_rank("dp")]
        model = tensor_parallel(lm(), tp, True)
        with count_bytes() as passes: vocab_parallel_cross_entropy(model(x[mine]), y[mine], tp, reduction="sum").backward()
        with count_bytes() as averaging: average_gradients(model.parameters(), y[mine].numel(), dp)
        held = sum(p.numel() for p in model.parameters())
        stream = Traffic(m for m in passes if max(m.sent, m.received) == mine.numel() * 6 * 12 * 8).ring(3)
        wanted = mesh_traffic(3, 1, 2, layers=2, width=12, tokens=6, batch=2 * len(mine), micro_batch=len(mine), parameters=3 * held, itemsize=8)
        assert stream * 8 / 10 == pytest.approx(wanted["tensor"])  # of ten all-reduces, two are for the ends
        assert averaging.ring(2) == pytest.approx(wanted["data"] + ring_bytes("all_reduce", 8, 2))
        norm = clip_gradients(model, 0.1, tp)
        torch.optim.SGD(model.parameters(), lr=1.).step()
        return {"norm": norm, "state": gather_state(model, tp)}
    check_parity(work, whole, (6,))


@pytest.mark.parametrize("call, message", [
    (lambda: bubble(2.5, 1), "stages must be a whole number"), (lambda: bubble(2, 0), "micro_batches must be at least 1"), (lambda: mesh_traffic(1, 1, 0, **BASE), "data must be at least 1"),
    (lambda: mesh_traffic(1, 1, 5, **BASE), "batch must be divisible by data \\* micro_batch = 5, got 48"), (lambda: mesh_traffic(1, 3, 1, **BASE), "layers must be divisible by pipeline \\* chunks = 3, got 8"),
    (lambda: training_days(1, 1, 1, -1), "devices and flops must be positive")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()
