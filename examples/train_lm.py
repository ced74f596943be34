"""Train a small language model on the bytes of a text, data and tensor parallel, with checkpoints that survive a kill.

    torchrun --nproc-per-node 4 examples/train_lm.py --dp 2 --tp 2 --checkpoints runs/lm

Run the same line again and it goes on from the newest checkpoint, to the same weights, bit for bit (same mesh, same machine). gloo without a GPU,
NCCL with one. On several machines add torchrun's --nnodes, --rdzv-backend c10d and --rdzv-endpoint, and put the checkpoints where all can write.
The parts are explained in the chapter "The engine", nbs/parallelism/06_engine.ipynb."""
import argparse
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

from deepclustering.core.data import load_tinyshakespeare
from deepclustering.core.tinylm import TinyLM
from deepclustering.core.training import batch_at
from deepclustering.parallelism.engine import checkpoints, clip_grad_norm_, load_checkpoint, parallelize_lm, save_checkpoint


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    def flag(name, default, text): parser.add_argument(f"--{name}", type=type(default), default=default, metavar=type(default).__name__.upper(), help=f"{text} ({default})")
    flag("dp", 1, "data parallel ranks"); flag("tp", 1, "tensor parallel ranks")
    flag("steps", 200, "steps in all"); flag("batch", 16, "rows of a step, over all ranks"); flag("length", 128, "bytes of a row")
    flag("lr", 3e-3, "largest learning rate"); flag("warmup", 20, "steps to reach it"); flag("clip", 1.0, "largest norm of the gradient"); flag("seed", 0, "of weights and batches")
    flag("dim", 64, "width"); flag("depth", 2, "blocks"); flag("heads", 4, "of the queries"); flag("kv-heads", 2, "of keys and values")
    flag("every", 50, "steps between checkpoints")
    parser.add_argument("--checkpoints", type=Path, help="folder to save in and to go on from; without it nothing is saved")
    parser.add_argument("--text", type=Path, help="file to learn; Tiny Shakespeare if not given")
    a = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ: parser.error("start me with torchrun, for example: torchrun --nproc-per-node 2 examples/train_lm.py --dp 2")
    if a.dp * a.tp != world: parser.error(f"--dp times --tp must be the number of ranks, got {a.dp} x {a.tp} and {world}")
    if a.batch % a.dp: parser.error(f"--batch must be a multiple of --dp, got {a.batch} and {a.dp}")
    for name in ("steps", "batch", "length", "every", "warmup"):
        if getattr(a, name) < 1: parser.error(f"--{name} must be at least 1, got {getattr(a, name)}")
    return a


def main():
    a = arguments()
    gpu = torch.cuda.is_available()
    if gpu: torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    dist.init_process_group("nccl" if gpu else "gloo")
    mesh = init_device_mesh(device.type, (a.dp, a.tp), mesh_dim_names=("dp", "tp"))

    text = torch.frombuffer(bytearray(a.text.read_bytes() if a.text else load_tinyshakespeare().encode()), dtype=torch.uint8)
    if len(text) <= a.length: raise SystemExit(f"--text must have more than --length = {a.length} bytes, got {len(text)}")
    def rows(generator): # (batch, length + 1): the same on every rank, because it comes from seed and step alone
        start = torch.randint(len(text) - a.length, (a.batch, 1), generator=generator)
        return text[start + torch.arange(a.length + 1)].long()

    torch.manual_seed(a.seed)
    model = parallelize_lm(TinyLM(256, a.dim, a.depth, a.heads, a.kv_heads).to(device), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.95))
    done = 0
    if a.checkpoints and checkpoints(a.checkpoints): done = load_checkpoint(checkpoints(a.checkpoints)[-1], model, optimizer)

    for step in range(done, a.steps):
        tokens = batch_at(rows, step, a.batch, a.seed).tensor_split(a.dp)[mesh["dp"].get_local_rank()].to(device)
        for group in optimizer.param_groups: group["lr"] = a.lr * min((step + 1) / a.warmup, 1)
        optimizer.zero_grad()
        logits = model(tokens[:, :-1]).flatten(0, 1)
        with loss_parallel() if isinstance(logits, DTensor) else nullcontext():
            loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
            loss.backward()
        norm = clip_grad_norm_(model.parameters(), a.clip, mesh)
        optimizer.step()
        mean = (loss.full_tensor() if isinstance(loss, DTensor) else loss).detach()
        dist.all_reduce(mean, group=mesh["dp"].get_group())
        if dist.get_rank() == 0: print(json.dumps({"step": step + 1, "loss": mean.item() / a.dp, "norm": norm.item()}), flush=True)
        if a.checkpoints and ((step + 1) % a.every == 0 or step + 1 == a.steps): save_checkpoint(a.checkpoints, step + 1, model, optimizer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # without taking the interpreter apart: a thread of gloo that still holds the last all-reduce's tensors would want it (PyTorch 2.13: "terminate called")
