"""The engine: what a mesh refuses, norms of gradients cut in every way, checkpoints that are torn, foreign or read on another mesh, and the example's flags."""
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401  here once, or in every rank for seconds
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from deepclustering.core.distributed import RankError, run
from deepclustering.core.tinylm import TinyLM
from deepclustering.parallelism.engine import checkpoints, clip_grad_norm_, load_checkpoint, parallelize_lm, save_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")
SCRIPT = Path(__file__).parents[1] / "examples/train_lm.py"


def lm(**kwargs):
    torch.manual_seed(0)
    return TinyLM(32, **{"dim": 8, "depth": 1, "heads": 4, "kv_heads": 2, **kwargs}).double()


def mesh_of(dp, tp, names=("dp", "tp")): return init_device_mesh("cpu", (dp, tp), mesh_dim_names=names)


def train(model, optimizer, steps=2):
    for step in range(steps):
        optimizer.zero_grad()
        for i, p in enumerate(model.parameters()): p.grad = torch.full_like(p, (-1) ** i * (step + 1))
        optimizer.step()


def full(t): return t.full_tensor() if isinstance(t, DTensor) else t


# ---- a mesh that does not fit


@pytest.mark.parametrize("shape, names, kwargs, message", [
    ((1, 1), ("data", "tensor"), {}, r"mesh must have the names \(\"dp\", \"tp\"\), got \('data', 'tensor'\)"),
    ((1, 2), ("dp", "tp"), {"hidden": 33}, "hidden must be a multiple of the 2 tensor parallel ranks, got 33"),
    ((1, 2), ("dp", "tp"), {"kv_heads": 1}, "kv_heads must be a multiple of the 2 tensor parallel ranks, got 1"),
    ((1, 3), ("dp", "tp"), {}, "heads must be a multiple of the 3 tensor parallel ranks, got 4")])
def test_refused(shape, names, kwargs, message):
    def work(rank, world): parallelize_lm(lm(**kwargs), mesh_of(*shape, names))
    with pytest.raises(RankError, match=rf"^rank \d of \d: ValueError: {message}"): run(work, shape[0] * shape[1])


# ---- the norm


@pytest.mark.parametrize("placements", [(Replicate(), Replicate()), (Shard(0), Replicate()), (Replicate(), Shard(1)), (Shard(0), Shard(1)), (Shard(1), Shard(0))])
def test_norm_counts_everything_once(placements):
    "One gradient of 3 x 5, which two ranks cannot halve evenly, in every cut: the norm is that of the whole, and so is the scale."
    g = torch.arange(15, dtype=torch.float64).view(3, 5)
    def work(rank, world):
        mesh = mesh_of(2, 2)
        p = torch.nn.Parameter(distribute_tensor(torch.zeros(3, 5, dtype=torch.float64), mesh, placements))
        p.grad = distribute_tensor(g, mesh, placements)
        norm = clip_grad_norm_([p, torch.nn.Parameter(torch.zeros(1))], 10, mesh)   # the second has no gradient
        large = full(p.grad).clone()
        clip_grad_norm_([p], 1e9, mesh)                                             # a limit that does not bite
        return norm, large, full(p.grad)
    for norm, large, same in run(work, 4):
        torch.testing.assert_close(norm, g.norm(), rtol=1e-14, atol=0)
        torch.testing.assert_close(large, g * 10 / g.norm(), rtol=1e-14, atol=0)
        assert torch.equal(large, same)


# ---- checkpoints


def saved(folder, dp=2, tp=1, optimizer=torch.optim.AdamW, keep=2, at=(3,)):
    def work(rank, world):
        model = parallelize_lm(lm(), mesh_of(dp, tp))
        opt = optimizer(model.parameters(), lr=0.1)
        for step in at:
            train(model, opt)
            path = save_checkpoint(folder, step, model, opt, keep=keep)
        return path.name, {n: full(p) for n, p in model.state_dict().items()}
    return run(work, dp * tp)[0]


def loaded(folder, dp=2, tp=1, optimizer=torch.optim.AdamW, then=lambda model, opt: None, **kwargs):
    def work(rank, world):
        model = parallelize_lm(lm(**kwargs), mesh_of(dp, tp))
        opt = optimizer(model.parameters(), lr=0.1)
        with torch.no_grad():
            for p in model.parameters(): p.zero_()
        step = load_checkpoint(checkpoints(folder)[-1], model, opt)
        then(model, opt)
        return step, {n: full(p) for n, p in model.state_dict().items()}
    return run(work, dp * tp)[0]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), torch.optim.SGD], ids=["AdamW", "momentum", "no state"])
def test_goes_on_as_if_nothing_had_been(tmp_path, optimizer):
    "Two steps, saved on 2 x 1, read on 1 x 2, two more: equal to four in one process, so moments and counts came along."
    saved(tmp_path, optimizer=optimizer)
    step, got = loaded(tmp_path, 1, 2, optimizer, then=train)
    model = lm()
    opt = optimizer(model.parameters(), lr=0.1)
    train(model, opt); train(model, opt)
    assert step == 3
    for name, w in model.state_dict().items(): torch.testing.assert_close(got[name], w.detach(), rtol=1e-12, atol=1e-12)


def test_only_finished_ones_count_and_old_ones_go(tmp_path):
    assert checkpoints(tmp_path / "nowhere") == []
    name, _ = saved(tmp_path, keep=2, at=(1, 2, 10))
    assert name == "step-00000010" and [p.name for p in checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]   # by number, not by text
    (tmp_path / "step-00000011.writing").mkdir()                                        # killed while writing
    (tmp_path / "step-00000011.writing" / "half").touch()
    assert checkpoints(tmp_path)[-1].name == "step-00000010"
    saved(tmp_path, at=(11,))                                                           # what was left over is in nobody's way
    assert checkpoints(tmp_path)[-1].name == "step-00000011" and not list(tmp_path.glob("*.writing"))
    assert not [f for f in checkpoints(tmp_path)[-1].iterdir() if f.suffix not in (".safetensors", ".json")]   # nothing that runs code when it is read


def test_torn_and_foreign(tmp_path):
    saved(tmp_path)
    with pytest.raises(RankError, match=r"^rank . of 2: ValueError: model and optimizer must be those that were saved, got model\.blocks\.0\S* of shape \("): loaded(tmp_path, dim=16)
    with pytest.raises(RankError, match=r"^rank . of 2: ValueError: model and optimizer must be those that were saved, got state\.\S* of shape None, the file has \("): loaded(tmp_path, optimizer=torch.optim.SGD)
    next(checkpoints(tmp_path)[-1].glob("*.safetensors")).unlink()
    with pytest.raises(RankError, match=r"^rank . of 2: ValueError: path must hold 2 shards, got 1 in step-00000003"): loaded(tmp_path)


@pytest.mark.parametrize("kwargs, message", [({"keep": 0}, "keep must be at least 1, got 0"), ({"at": (-1,)}, "step must be at least 0, got -1")])
def test_bad_arguments(tmp_path, kwargs, message):
    with pytest.raises(RankError, match=f"^rank . of 2: ValueError: {message}"): saved(tmp_path, **kwargs)


# ---- the example


@pytest.mark.parametrize("flags, ranks, message", [(["--dp", "2"], 3, "--dp times --tp must be the number of ranks, got 2 x 1 and 3"), ([], None, "start me with torchrun"),
                                                   (["--dp", "2", "--batch", "3"], 2, "--batch must be a multiple of --dp, got 3 and 2")])
def test_flags_are_checked_before_anything_starts(flags, ranks, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_lm.py", *flags])
    for name, value in {"RANK": "0", "WORLD_SIZE": str(ranks)}.items(): monkeypatch.setenv(name, value) if ranks else monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as stop: runpy.run_path(str(SCRIPT))["arguments"]()
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_on_four_ranks_equals_one(tmp_path):
    "Data x tensor 2 x 2 against one rank: the losses of the first steps agree as float32 allows."
    def losses(dp, tp):
        out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(dp * tp), str(SCRIPT), "--dp", str(dp), "--tp", str(tp), "--steps", "5", "--batch", "4", "--length", "32"],
                             capture_output=True, text=True, check=True, timeout=240).stdout
        return torch.tensor([json.loads(line)["loss"] for line in out.splitlines()])
    torch.testing.assert_close(losses(2, 2), losses(1, 1), rtol=1e-4, atol=0)
