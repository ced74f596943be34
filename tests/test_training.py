"""Training that is stopped anywhere goes on to the same bytes, whatever the optimiser, the precision and the data; what cannot work is refused."""
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from deepclustering.core.training import batch_at, load_tree, save_tree, seed_of, train

@pytest.fixture(autouse=True)
def ctrl_c():
    "As in a terminal: a shell lets programs in the background ignore it."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


N, STEPS = 50, 23  # batches of at most 16: four an epoch, so that every stop below lies inside one
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Net(nn.Module):
    "Dropout, batch norm with its buffers, two layers that share a weight, and a layer that is frozen."
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.first, self.norm, self.second, self.out = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop, self.second.weight = nn.Dropout(0.3), self.first.weight
        self.out.bias.requires_grad_(False)
    def forward(self, x): return self.out(self.drop(self.second(self.norm(self.first(x)).relu()).relu()))


def loss(model, batch):
    value = F.cross_entropy(model(batch[0]), batch[1])
    return value, {"double": 2 * value}


def validate(model): return F.cross_entropy(model(X[:20]), Y[:20]), {"noise": torch.rand(())}


def generated(generator):
    x = torch.randn(16, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def job(path, model=None, loss=loss, data=(X, Y), **changes):
    settings = dict(steps=STEPS, batch_size=16, every=3, validate=validate, patience=100, schedule=lambda t: 1 / (1 + t), clip_norm=1., checkpoint=path, checkpoint_every=5, seed=7, progress=False)
    model = model or Net()
    return model, train(model, loss, data, **settings | changes)


class Dies:
    "A loss that does something in its n-th call."
    def __init__(self, n, act): self.n, self.act = n, act
    def __call__(self, model, batch):
        self.n -= 1
        if self.n == 0: self.act()
        return loss(model, batch)


def fall(): raise OSError("power failure")


def same_bits(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def compare(whole, killed, tmp_path):
    (a, history), (b, again) = whole, killed
    assert same_bits(a, b) and history == again
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "killed.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.part"))


OPTIMIZERS = {
    "AdamW": None, "SGD": lambda p: torch.optim.SGD(p, lr=0.1), "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01), "AMSGrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True), "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "two groups": lambda p: torch.optim.Adam([{"params": p[:2], "lr": 0.1}, {"params": p[2:]}], lr=0.01), "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01), "Adagrad": torch.optim.Adagrad}


# --- going on -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data", [(X, Y), generated], ids=["tensors", "generated"])
@pytest.mark.parametrize("optimizer, precision", [(o, "float32") for o in OPTIMIZERS] + [(o, p) for o in ("AdamW", "momentum") for p in ("bfloat16", "float16")])
def test_killed_and_resumed_is_the_same(tmp_path, optimizer, precision, data):
    settings = dict(optimizer=OPTIMIZERS[optimizer], precision=precision, data=data)
    whole = job(tmp_path / "whole.safetensors", **settings)
    for seed, n in ((0, 8), (1, 14)):  # killed twice: 7 done, 5 saved; then, from 5 on, 18 done, 15 saved
        with pytest.raises(OSError): job(tmp_path / "killed.safetensors", Net(seed), Dies(n, fall), **settings)
    assert load_tree(tmp_path / "killed.safetensors")["state"]["step"] == 15
    compare(whole, job(tmp_path / "killed.safetensors", Net(2), **settings), tmp_path)


def test_every_step_is_a_good_one_to_die_in(tmp_path):
    whole = job(tmp_path / "whole.safetensors", checkpoint_every=1)
    for n in range(2, STEPS + 1, 4):
        (tmp_path / "killed.safetensors").unlink(missing_ok=True)
        with pytest.raises(OSError): job(tmp_path / "killed.safetensors", loss=Dies(n, fall), checkpoint_every=1)
        compare(whole, job(tmp_path / "killed.safetensors", Net(n), checkpoint_every=1), tmp_path)


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_early_stopping_across_a_kill(tmp_path, patience):
    values = [5, 3, 4, 3, 2, 2.5, 2.2, 1, 1, 1, 1, 1, 1]
    def scripted(model): return values[int(model.norm.num_batches_tracked) - 1]  # a buffer that counts the steps
    settings = dict(validate=scripted, every=1, patience=patience, checkpoint_every=1)
    whole = job(tmp_path / "whole.safetensors", **settings)
    stop, best = {1: (3, 2), 2: (4, 2), 4: (12, 8)}[patience]
    assert whole[1][1:] == (stop, best, "patience") and whole[0].norm.num_batches_tracked == best
    with pytest.raises(OSError): job(tmp_path / "killed.safetensors", loss=Dies(3, fall), **settings)
    compare(whole, job(tmp_path / "killed.safetensors", Net(3), **settings), tmp_path)
    with pytest.warns(UserWarning, match="nothing to train: .* of a finished run of"): compare(whole, job(tmp_path / "killed.safetensors", Net(4), steps=STEPS + 9, **settings), tmp_path)


@pytest.mark.parametrize("first", [1, 4, 9])
def test_more_steps_later_is_as_if_asked_for_at_once(tmp_path, first):
    whole = job(tmp_path / "whole.safetensors")
    model, history = job(tmp_path / "killed.safetensors", steps=first)
    assert history.records[-1]["step"] == first and history.stopped == "steps"
    compare(whole, job(tmp_path / "killed.safetensors", Net(1)), tmp_path)
    with pytest.warns(UserWarning, match="nothing to train"): compare(whole, job(tmp_path / "killed.safetensors", Net(2)), tmp_path)
    compare(whole, job(tmp_path / "killed.safetensors", resume=False), tmp_path)


CHILD = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import test_training as t
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    if {where!r} == "step": t.job({path!r}, loss=t.Dies(14, die))
    real, count = os.replace, []
    def replace(*args):
        count.append(1)
        if len(count) == 3:
            with open(args[0], "r+b") as part: part.truncate(1000)  # not even written to its end
            die()
        real(*args)
    os.replace = replace
    t.job({path!r})
""")


@pytest.mark.parametrize("where", ["step", "saving"])
def test_sigkill(tmp_path, where):
    whole = job(tmp_path / "whole.safetensors")
    child = subprocess.run([sys.executable, "-c", CHILD.format(tests=str(ROOT / "tests"), where=where, path=str(tmp_path / "killed.safetensors"))], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert load_tree(tmp_path / "killed.safetensors")["state"]["step"] == 10 and (tmp_path / "killed.safetensors.part").exists() == (where == "saving")
    compare(whole, job(tmp_path / "killed.safetensors", Net(1)), tmp_path)


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("milliseconds", [1, 4, 10])
def test_an_interrupt_at_any_moment(tmp_path, milliseconds):
    whole, model = job(tmp_path / "whole.safetensors", steps=120), Net()
    timer = threading.Timer(milliseconds / 1000, os.kill, (os.getpid(), signal.SIGINT))  # counted from the first step on
    with pytest.warns(UserWarning, match="interrupted.*goes on from step") as caught, pytest.raises(KeyboardInterrupt) as raised:
        job(tmp_path / "killed.safetensors", model, Dies(1, timer.start), steps=120, checkpoint_every=120)
    saved = load_tree(tmp_path / "killed.safetensors")["state"]
    assert raised.value.history.steps == saved["step"] < 120 and raised.value.history.stopped == "interrupted" and len(caught) == 1
    if saved["best_weights"]: assert all(torch.equal(v, saved["best_weights"][k]) for k, v in model.state_dict().items())
    compare(whole, job(tmp_path / "killed.safetensors", Net(1), steps=120), tmp_path)


def test_interrupt_without_patience_or_checkpoint_keeps_the_current_weights():
    model, three = Net(), Net()
    with pytest.warns(UserWarning, match="the model has the weights of step 3$"), pytest.raises(KeyboardInterrupt):
        job(None, model, Dies(3, lambda: signal.raise_signal(signal.SIGINT)), checkpoint_every=None, patience=None)
    job(None, three, steps=3, checkpoint_every=None, patience=None)
    assert same_bits(model, three) and model.training


def test_a_second_interrupt_does_not_wait_and_tears_no_checkpoint(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it waited")
    whole = job(tmp_path / "whole.safetensors")
    with pytest.warns(UserWarning, match="goes on from step 5"), pytest.raises(KeyboardInterrupt): job(tmp_path / "killed.safetensors", loss=Dies(8, twice))
    compare(whole, job(tmp_path / "killed.safetensors", Net(1)), tmp_path)


def test_an_interrupt_that_the_loss_raises(tmp_path):
    def interrupt(): raise KeyboardInterrupt
    whole = job(tmp_path / "whole.safetensors")
    with pytest.warns(UserWarning, match="goes on from step 5"), pytest.raises(KeyboardInterrupt): job(tmp_path / "killed.safetensors", loss=Dies(8, interrupt))
    compare(whole, job(tmp_path / "killed.safetensors", Net(1)), tmp_path)


def test_other_handlers_and_other_threads_are_left_alone():
    heard, results = [], []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try: results.append(job(None, loss=Dies(3, lambda: signal.raise_signal(signal.SIGINT)), checkpoint_every=None))
    finally: signal.signal(signal.SIGINT, before)
    thread = threading.Thread(target=lambda: results.append(job(None, checkpoint_every=None)))
    thread.start()
    thread.join()
    assert heard == [1] and results[0][1] == results[1][1] and results[0][1].steps == STEPS


# --- what a run leaves alone, and what it computes ------------------------------------------------------------------------

def test_the_callers_generator_modes_and_learning_rate():
    model = Net().eval()
    model.drop.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    state, x = torch.get_rng_state(), X.clone()
    job(None, model, optimizer=optimizer, checkpoint_every=None)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(X, x)
    assert [m.training for m in model.modules()] == [False, False, False, False, False, True] and optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(model.out.bias, Net().out.bias) and torch.get_autocast_dtype("cpu") == torch.bfloat16 and not torch.is_autocast_enabled("cpu")


def test_modes_are_restored_when_a_loss_raises():
    model = Net().eval()
    with pytest.raises(OSError): job(None, model, Dies(2, fall), checkpoint_every=None)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["AdamW", "momentum"])
def test_the_plain_loop(precision, optimizer):
    model, plain = Net(), Net()
    train(model, loss, (X, Y), epochs=3, batch_size=16, optimizer=OPTIMIZERS[optimizer], precision=precision, clip_norm=0.3, seed=4, progress=False)
    trained = [p for p in plain.parameters() if p.requires_grad]
    opt = (OPTIMIZERS[optimizer] or (lambda p: torch.optim.AdamW(p, lr=1e-3)))(trained)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16")
    for step in range(12):
        batch = batch_at((X, Y), step, 16, 4)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_of(4, "model", step))
            with torch.autocast("cpu", getattr(torch, precision), enabled=precision != "float32"): value = F.cross_entropy(plain(batch[0]), batch[1])
        opt.zero_grad()
        scaler.scale(value).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(trained, 0.3)
        scaler.step(opt)
        scaler.update()
    assert same_bits(model, plain)


@pytest.mark.parametrize("n, batch_size", [(1, 1), (1, 9), (7, 3), (8, 4), (50, 16), (129, 128), (13, 1)])
def test_an_epoch_holds_every_sample_once_in_even_batches(n, batch_size):
    m = -(-n // batch_size)
    epochs = [[batch_at(torch.arange(n), step, batch_size, 3) for step in range(e * m, (e + 1) * m)] for e in range(2)]
    for batches in epochs:
        sizes = [len(b) for b in batches]
        assert sorted(torch.cat(batches).tolist()) == list(range(n)) and max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    if n > 7: assert not torch.equal(*(torch.cat(b) for b in epochs))


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize("shape", [lambda x, y: {"x": x, "more": [y, "text"]}, Pair, lambda x, y: x], ids=["dict", "NamedTuple", "tensor"])
def test_batches_keep_their_shape(shape):
    seen = []
    def look(model, batch):
        seen.append(batch)
        return model.out.weight.sum()
    train(Net(), look, lambda g: shape(*generated(g)), steps=1, progress=False)
    expected = shape(*generated(torch.Generator().manual_seed(seed_of(0, "data", 0))))
    assert type(seen[0]) is type(expected)
    assert str(seen[0]) == str(expected)


def test_records():
    losses = []
    def noting(model, batch):
        value = model.out.weight.square().sum()
        losses.append(value.item())
        return value, {"twice": 2 * value}
    history = train(Net(), noting, generated, steps=7, every=3, progress=False)
    assert history.column("step") == [3, 6, 7] and history.column("twice") == pytest.approx([2 * v for v in history.column("loss")])
    assert history.column("loss") == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]])
    assert set(history.records[0]) == {"step", "loss", "twice", "norm"}
    with pytest.raises(ValueError, match="name must be one of step, loss, twice, norm, got 'lss'"): history.column("lss")
    assert train(Net(), loss, (X, Y), epochs=2, batch_size=16, progress=False).column("step") == [4, 8]
    assert train(Net(), loss, generated, steps=201, progress=False).column("step") == [100, 200, 201]


def test_nan_in_a_validation_is_no_improvement():
    values = iter([float("nan"), 2., float("nan"), 1.5, 1.6, float("nan")])
    history = job(None, validate=lambda model: next(values), every=1, patience=2, checkpoint_every=None)[1]
    assert (history.steps, history.best_step) == (6, 4)


def test_float64_and_progress(capsys):
    model = nn.Linear(6, 3).double()
    seen = []
    def noted(m, b):
        seen.append(F.cross_entropy(m(b[0]), b[1]))
        return seen[-1]
    train(model, noted, (X.double(), Y), steps=3, progress=True)
    assert model.weight.dtype == torch.float64 and f"loss {float(seen[-1].detach()):.4g}]" in capsys.readouterr().err
    train(nn.Linear(6, 3), loss, (X, Y), steps=3, progress=None)  # not a terminal
    assert capsys.readouterr().err == ""


def test_a_loss_that_is_not_finite_touches_no_weight(tmp_path):
    for spoil in (float("nan"), float("inf")):
        model, calls = Net(), []
        def spoilt(model, batch):
            calls.append(1)
            return loss(model, batch)[0] * (spoil if len(calls) == 7 else 1)
        with pytest.raises(FloatingPointError, match=rf"the loss is {spoil} in step 7; the last finite loss was \d"): job(tmp_path / f"{spoil}.safetensors", model, spoilt, validate=None, patience=None)
        assert load_tree(tmp_path / f"{spoil}.safetensors")["state"]["step"] == 5
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), job(None, Net(), steps=6, validate=None, patience=None, checkpoint_every=None)[0].parameters()))


def test_float16_gives_up_when_its_scale_cannot_fall():
    with pytest.raises(FloatingPointError, match="the gradient of w is not finite in step 17; the last finite loss was 0.0"):
        one = nn.Module()
        one.w = nn.Parameter(torch.zeros(1))
        train(one, lambda m, b: m.w.abs().sqrt().sum(), X, steps=50, precision="float16", progress=False)


# --- trees ----------------------------------------------------------------------------------------------------------------

def test_trees_come_back(tmp_path):
    shared = torch.arange(12.)
    tree = {"views": [shared[2:], shared.view(3, 4).T, shared[::2]], "types": {t: torch.ones(2, 2).to(getattr(torch, t)) for t in ("bool", "uint8", "int64", "float16", "bfloat16", "float64")},
            "none": None, "empty": [{}, [], (), torch.zeros(0, 3)], 3: {0: (1, 2.5, "ü/\n"), "a/b": True}, "float": 0.1 + 0.2}
    save_tree(tmp_path / "t.safetensors", tree)
    back = load_tree(tmp_path / "t.safetensors")
    def equal(a, b):
        if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict): return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
        return type(a) is type(b) and a == b
    assert equal(tree, back)
    before = Path(tmp_path / "t.safetensors").read_bytes()
    back["views"][0].add_(1)
    assert Path(tmp_path / "t.safetensors").read_bytes() == before  # what was read is no view of the file
    with pytest.raises(ValueError, match="x must be a tensor, number, text, None, dict, list or tuple, got object"): save_tree(tmp_path / "t.safetensors", {"x": object()})
    assert Path(tmp_path / "t.safetensors").read_bytes() == before


# --- what is refused ------------------------------------------------------------------------------------------------------

BAD = {
    "model must be an nn.Module, got function": dict(model=lambda x: x),
    "model must have a parameter that requires a gradient, got none": dict(model=nn.ReLU()),
    "loss must be a function of model and batch, got None": dict(loss=None),
    "data must be a tensor, a tuple of tensors with a first dimension, or a function of a generator, got list": dict(data=[1, 2]),
    "data must be a tensor, a tuple .*, got tuple": dict(data=()),
    "data must be a tensor, .* got Tensor": dict(data=torch.tensor(1.)),
    r"data must hold tensors of one length, at least 1, got \[50, 49\]": dict(data=(X, Y[1:])),
    r"data must hold tensors of one length, at least 1, got \[0, 0\]": dict(data=(X[:0], Y[:0])),
    "batch_size must be at least 1, got 0": dict(batch_size=0),
    "steps must be at least 1, got 0": dict(steps=0),
    "steps must be a whole number at least 1, got 2.5": dict(steps=2.5),
    "either steps or epochs must be given, got steps=None and epochs=None": dict(steps=None),
    "either steps or epochs must be given, got steps=23 and epochs=2": dict(epochs=2),
    "epochs needs tensors": dict(data=generated, steps=None, epochs=2),
    "every must be at least 1, got 0": dict(every=0),
    "patience must be at least 1, got 0": dict(patience=0),
    "patience=3 needs validate": dict(patience=3, validate=None),
    "validate must be a function or None, got 3": dict(validate=3),
    "schedule must be a function or None, got 'cosine'": dict(schedule="cosine"),
    "lr must be a positive number, got -1": dict(lr=-1),
    "lr must be a positive number, got nan": dict(lr=float("nan")),
    "clip_norm must be a positive number, got 0": dict(clip_norm=0),
    "clip_norm must be a positive number, got 'x'": dict(clip_norm="x"),
    "lr belongs to the default optimizer": dict(lr=1e-3, optimizer=torch.optim.SGD),
    "optimizer must be an optimizer or a function that makes one of a list of parameters, got str": dict(optimizer="adam"),
    "optimizer must be an optimizer or a function that makes one .*, got list": dict(optimizer=list),
    "optimizer must hold parameters of the model": dict(optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters())),
    "precision must be 'float32', 'bfloat16' or 'float16', got 'half'": dict(precision="half"),
    "seed must be between 0 and 4294967295, got -1": dict(seed=-1),
    "device must be 'auto' or a torch device, got 'gpu'": dict(device="gpu"),
    "checkpoint_every=5 needs checkpoint": dict(checkpoint=None),
    "checkpoint must be a file in a folder that exists, got nowhere/x": dict(checkpoint="nowhere/x"),
}


@pytest.mark.parametrize("message", BAD)
def test_refused_before_anything_is_touched(tmp_path, message):
    called = []
    arguments = dict(model=Net().eval(), loss=lambda m, b: called.append(1), data=(X, Y)) | BAD[message]
    path = arguments.pop("checkpoint", tmp_path / "x.safetensors")
    model = arguments["model"]
    with pytest.raises(ValueError, match=message): job(path, **arguments)
    assert not called and not list(tmp_path.iterdir())
    if isinstance(model, Net): assert same_bits(model, Net()) and not model.training


@pytest.mark.parametrize("message, loss", {
    r"loss must return a tensor of shape \(\) with a gradient, got tensor\(\[": lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"),
    r"loss must return a tensor of shape \(\) with a gradient, got 1": lambda m, b: 1,
    r"loss must return a tensor of shape \(\) with a gradient, got tensor\(1.": lambda m, b: torch.ones(()),
    "loss must return a number, or .* with names other than loss, norm, skipped, step, validation, got {'loss'": lambda m, b: (m.out.weight.sum(), {"loss": 1}),
    "loss must return a number, or .*, got tensor": lambda m, b: (m.out.weight.sum(), m.out.weight.sum()),
    "loss's bad must be a number, got tensor": lambda m, b: (m.out.weight.sum(), {"bad": torch.ones(2)}),
}.items())
def test_a_loss_that_returns_something_else(message, loss):
    model = Net()
    with pytest.raises(ValueError, match=message): train(model, loss, (X, Y), steps=2, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Net().parameters()))


@pytest.mark.parametrize("message, validate", {
    "the result of validate must be a number, got 'x'": lambda m: "x",
    "the result of validate must be a number, got tensor": lambda m: torch.ones(2),
    "validate must return a number, or .*with names other than double, loss, norm, step, validation, got {'double'": lambda m: (1., {"double": 1}),
}.items())
def test_a_validation_that_returns_something_else(message, validate):
    with pytest.raises(ValueError, match=message): job(None, validate=validate, checkpoint_every=None)


@pytest.mark.parametrize("difference, change", {
    "seed was 7, is 8": dict(seed=8), "batch_size was 16, is 8": dict(batch_size=8), "every was 3, is 4": dict(every=4), "patience was 100, is 9": dict(patience=9),
    "clip_norm was 1.0, is None": dict(clip_norm=None), "precision was float32, is bfloat16": dict(precision="bfloat16"), "schedule was a function, is None": dict(schedule=None),
    "optimizer was AdamW, is SGD": dict(optimizer=torch.optim.SGD), "optimizer 0 lr was 0.001, is 0.002": dict(lr=0.002), "data was .*, is a function": dict(data=generated),
    r"data was \['torch.float32 \(50, 6\) ": dict(data=(X + 1, Y)), "model extra was None, is torch.float32": dict(model=Net()),
    "23 steps were done, 22 are asked for": dict(steps=22)}.items())
def test_a_checkpoint_of_another_run_is_refused(tmp_path, difference, change):
    path = tmp_path / "a.safetensors"
    job(path)
    before = path.read_bytes()
    if "model" in change: change["model"].register_buffer("extra", torch.zeros(2))
    with pytest.raises(ValueError, match=f"a.safetensors is of another run; with resume=False it is overwritten.*{difference}"): job(path, **change)
    assert path.read_bytes() == before


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tree(path, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="was not written by train"): job(path)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="is not a whole safetensors file"): job(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job(path, resume=False)  # overwrites it
