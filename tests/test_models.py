"""The small models over random shapes: sizes that come back, starts that keep their variance, files that run no code."""
import copy
import inspect
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from conftest import ROOT
from deepclustering.core.models import (Block, ConvAutoencoder, FeedForward, MLPAutoencoder, Model, SelfAttention, TinyViT, build_model, conv_sizes, load_model, model_spec,
                                        save_model)
from deepclustering.core.tinylm import TinyLM
from deepclustering.core.training import save_tree

MAKE = {"mlp": lambda: MLPAutoencoder(12, (9, 7, 3), noise=(0.1, 0., 0.2)), "conv": lambda: ConvAutoencoder((2, 7, 9), (3, 5), kernel=(3, 4), stride=(2, 1), padding=(1, 0), tanh=True),
        "vit cls": lambda: TinyViT((1, 6, 4), patch=2, dim=8, depth=2, heads=2), "vit mean": lambda: TinyViT((3, 4, 4), 0, patch=4, dim=8, depth=1, heads=4, hidden=5, pool="mean"),
        "lm": lambda: TinyLM(17, dim=8, heads=2, kv_heads=1), "lm plain": lambda: TinyLM(17, dim=8, depth=1, heads=2, kv_heads=2, head_dim=6, gated=False, shift=False)}
each = pytest.mark.parametrize("kind", MAKE)


def example(model, n=4, dtype=torch.float32):
    "Input that fits a model."
    if isinstance(model, TinyLM): return torch.randint(model.vocab, (n, 5))
    shape = model.image_shape if isinstance(model, TinyViT) else model.shape
    return torch.randn(n, *shape, dtype=dtype)


# --- what all have in common -----------------------------------------------------------------------------------------

@each
def test_every_parameter_gets_a_gradient(kind):
    torch.manual_seed(0)
    model = MAKE[kind]()
    model(example(model)).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.abs().sum() > 0]


@each
def test_gradients_are_right(kind):
    torch.manual_seed(0)
    model = MAKE[kind]().double().eval()
    x, names, values = example(model, 2, torch.float64), *zip(*model.named_parameters())
    def forward(*values): return torch.func.functional_call(model, dict(zip(names, values)), (x,))
    assert torch.autograd.gradcheck(forward, tuple(v.detach().requires_grad_() for v in values), fast_mode=True)


@each
def test_rows_are_independent_and_strides_do_not_matter(kind):
    torch.manual_seed(0)
    model = MAKE[kind]().double().eval()
    x = example(model, 6, torch.float64)
    whole = model(x)
    torch.testing.assert_close(model(x[2:3]), whole[2:3], rtol=0, atol=1e-12)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(model(strided), whole, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="n > 0|at least 1"): model(x[:0])


@each
def test_config_names_every_argument(kind):
    model = MAKE[kind]()
    assert model.config.keys() == inspect.signature(type(model)).parameters.keys()
    again = type(model).from_config(json.loads(json.dumps(model.config)))
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [(k, v.shape) for k, v in model.state_dict().items()] and again.config == model.config


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_round_trips_keep_every_bit(kind, dtype, tmp_path):
    torch.manual_seed(0)
    model = MAKE[kind]().to(dtype).eval()
    save_model(tmp_path / "m.safetensors", model)
    x = example(model, dtype=dtype)
    for again in (load_model(tmp_path / "m.safetensors"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert model_spec(again) == model_spec(model) and not again.training
        assert all(torch.equal(a, b) and a.dtype == b.dtype and b.requires_grad == a.requires_grad for a, b in zip(model.parameters(), again.parameters(), strict=True))
        assert torch.equal(again(x), model(x))
    assert next(load_model(tmp_path / "m.safetensors").parameters()).requires_grad


# --- files ---------------------------------------------------------------------------------------------------------------

def test_a_fresh_process_finds_the_class(tmp_path):
    torch.manual_seed(0)
    model = MAKE["lm"]().requires_grad_(False)
    save_model(tmp_path / "m.safetensors", model)
    code = ("import sys; from deepclustering.core.models import load_model; before = 'deepclustering.core.tinylm' in sys.modules;"
            f"m = load_model({str(tmp_path / 'm.safetensors')!r}); print(before, type(m).__name__, float(m.head.weight.double().sum()).hex())")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert out == ["False", "TinyLM", float(model.head.weight.double().sum()).hex()]


def test_the_file_is_plain(tmp_path):
    save_model(tmp_path / "m.safetensors", MAKE["mlp"]())
    with safe_open(tmp_path / "m.safetensors", "pt") as file: assert all(name.startswith("weights/") for name in file.keys()) and "MLPAutoencoder" in file.metadata()["tree"]
    assert b"\x80\x04" not in (tmp_path / "m.safetensors").read_bytes()[:8]


@pytest.mark.parametrize("spec, message", [
    ({"class": "os.system", "config": {"command": "true"}}, "class must be one of"),
    ({"class": "Model", "config": {}}, "class must be one of"),
    ({"class": "Sequential", "config": {}}, "class must be one of"),
    ({"class": ["MLPAutoencoder"], "config": {}}, "spec must be"),
    ({"class": "MLPAutoencoder", "config": {"n_features": 4, "hook": "x"}}, "config does not fit MLPAutoencoder"),
    ({"class": "MLPAutoencoder", "config": {"n_features": "4"}}, "n_features must be a whole number"),
    ({"class": "MLPAutoencoder", "config": {"n_features": 4, "widths": 3}}, "config does not fit|widths"),
    ({"class": "TinyViT", "config": {"pool": "os.system"}}, "pool must be"),
    ({"class": "TinyLM", "config": {"vocab": 4, "feed_forward": "os.system"}}, "feed_forward must be"),
    ({"class": "MLPAutoencoder", "config": None}, "spec must be"), ([], "spec must be"), (None, "spec must be"),
    ({"class": "Autoencoder", "config": {"pairs": [], "shape": [1], "noise": 0}}, "class must be one of")])
def test_a_file_cannot_ask_for_anything_else(spec, message, tmp_path):
    save_tree(tmp_path / "m.safetensors", {"spec": spec, "weights": {}})
    with pytest.raises(ValueError, match=message): load_model(tmp_path / "m.safetensors")


def test_a_class_of_ones_own_is_known_once_it_is_defined(tmp_path):
    class Mine(Model):
        def __init__(self, width): super().__init__(width=width); self.layer = nn.Linear(width, width)
    try:
        save_model(tmp_path / "m.safetensors", Mine(3))
        assert isinstance(load_model(tmp_path / "m.safetensors"), Mine)
    finally: del Model.classes["Mine"]
    with pytest.raises(ValueError, match="a subclass of Model of your own"): load_model(tmp_path / "m.safetensors")


def test_what_is_code_is_refused_before_anything_is_written(tmp_path):
    for model, name in ((TinyViT(depth=1, feed_forward=lambda dim: nn.Identity()), "feed_forward"), (TinyLM(5, attention=[None, lambda dim: nn.Identity()]), "attention"),
                        (TinyViT(depth=1, pool=lambda dim: nn.Flatten()), "pool")):
        with pytest.raises(ValueError, match=f"^{name} of Tiny"): save_model(tmp_path / "m.safetensors", model)
    with pytest.raises(ValueError, match="model must be one of .*TinyLM.*Linear"): save_model(tmp_path / "m.safetensors", nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model(tmp_path):
    save_tree(tmp_path / "m.safetensors", {"spec": model_spec(MAKE["mlp"]()), "weights": MAKE["vit cls"]().state_dict()})
    with pytest.raises(ValueError, match="are not those of its MLPAutoencoder"): load_model(tmp_path / "m.safetensors")
    save_tree(tmp_path / "m.safetensors", {"spec": model_spec(MAKE["mlp"]()), "weights": MLPAutoencoder(12, (9, 7, 4)).state_dict()})
    with pytest.raises(ValueError, match="are not those of its MLPAutoencoder"): load_model(tmp_path / "m.safetensors")


# --- autoencoders ------------------------------------------------------------------------------------------------------

def test_convolutions_come_back_from_every_size():
    generator = torch.Generator().manual_seed(0)
    def draw(low, high): return int(torch.randint(low, high + 1, (), generator=generator))
    built = 0
    for _ in range(150):
        shape, depth = (draw(1, 3), draw(1, 29), draw(1, 29)), draw(1, 3)
        channels, kernel, stride, padding = ([draw(low, high) for _ in range(depth)] for low, high in ((1, 3), (1, 5), (1, 4), (0, 3)))
        padding = [min(p, k - 1) for p, k in zip(padding, kernel)]                     # a wider margin than the kernel makes pixels out of nothing
        try: model = ConvAutoencoder(shape, channels, 2, kernel, stride, padding)
        except ValueError as e: assert str(e).startswith("kernel must be at most"); continue
        built += 1
        up = model.activations(torch.randn(2, *shape))
        assert [h.shape for h in model.reconstructions(up[-1])] == [h.shape for h in up]
    assert built > 80


def test_a_transposed_convolution_is_the_transpose():
    "With the same weights the decoder's layer is the adjoint of the encoder's: <conv(x), y> = <x, deconv(y)>."
    torch.manual_seed(0)
    for side, k, s, p in ((7, 5, 2, 2), (8, 4, 2, 0), (11, 3, 3, 1)):
        (up, down), = ConvAutoencoder((2, side, side), (3,), kernel=k, stride=s, padding=p).double().pairs()[:1]
        with torch.no_grad(): down[0].weight.copy_(up[0].weight)
        x, m = torch.randn(1, 2, side, side).double(), conv_sizes(side, k, s, p)[0]
        y = torch.randn(1, 3, m, m).double()
        torch.testing.assert_close((up[0](x) * y).sum(), (x * down[0](y)).sum())


def test_initial_weights():
    torch.manual_seed(0)
    for model in (MLPAutoencoder(300, (400, 500, 60)), ConvAutoencoder((8, 12, 12), (40, 50), 200), ConvAutoencoder((8, 13, 13), (40, 50), 200, kernel=3, stride=(3, 1), padding=1, slope=0.5)):
        slope, L = model.config.get("slope", 0), len(model.encoder)
        for l, pair in enumerate(model.pairs()):
            for side, ends in ((pair[0], l == L - 1), (pair[1], l == 0)):
                layer = next(m for m in ([side] if isinstance(side, nn.Linear) else side) if hasattr(m, "weight"))
                fan_in = layer.weight.shape[1] if isinstance(layer, nn.Linear) else layer.in_channels * layer.kernel_size[0]**2
                if isinstance(layer, nn.ConvTranspose2d): fan_in /= layer.stride[0]**2
                gain2 = 1 if ends else 2 / (1 + slope**2)
                assert abs(layer.weight.std() * (fan_in / gain2)**0.5 - 1) < 0.03 and (layer.bias == 0).all()
    vit = TinyViT((3, 32, 32), dim=256, depth=1)
    for layer in [m for m in vit.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]:
        assert abs(layer.weight.std() * layer.weight[0].numel()**0.5 - 1) < 0.03 and (layer.bias == 0).all()
    assert abs(vit.positions.std() - 1) < 0.03 and all((m.weight == 1).all() and (m.bias == 0).all() for m in vit.modules() if isinstance(m, nn.LayerNorm))


def test_pairs_hold_every_weight_once():
    for kind in ("mlp", "conv"):
        model = MAKE[kind]()
        held = [id(p) for pair in model.pairs() for layer in pair for p in layer.parameters()]
        assert sorted(held) == sorted(id(p) for p in model.parameters()) and len(set(held)) == len(held)


def test_noise_is_for_training_and_on_request():
    torch.manual_seed(0)
    model = MLPAutoencoder(500, (50, 4), noise=0.5)
    x = torch.randn(3, 500)
    assert not torch.equal(model(x), model(x)) and torch.equal(model.encode(x), model.encode(x)) and torch.equal(model.activations(x)[1], model.eval().activations(x)[1])
    assert torch.equal(model(x), model(x)) and not torch.equal(model.activations(x, noisy=True)[1], model.activations(x)[1])
    clean = MLPAutoencoder(500, (50, 4))
    assert torch.equal(clean(x), clean(x))


def test_depicts_network():
    "Shapes of the released code: 50 maps of 7 x 7, 50 of 4 x 4, 10 numbers, for USPS."
    model = ConvAutoencoder((1, 16, 16), (50, 50), 10, (4, 5), 2, (0, 2), tanh=True)
    assert [tuple(h.shape[1:]) for h in model.activations(torch.zeros(1, 1, 16, 16))] == [(1, 16, 16), (50, 7, 7), (50, 4, 4), (10,)]
    assert isinstance(model.encoder[2][-1], nn.Tanh) and isinstance(model.decoder[0][-1], nn.Tanh) and model.encoder[0][1].negative_slope == 0.01


# --- the vision transformer -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dim, heads, tokens", [(6, 1, 1), (12, 3, 5), (20, 4, 17)])
def test_attention_is_pytorchs(dim, heads, tokens):
    torch.manual_seed(0)
    ours, theirs = SelfAttention(dim, heads).double(), nn.MultiheadAttention(dim, heads, batch_first=True).double()
    for p in ours.parameters(): nn.init.normal_(p)
    theirs.load_state_dict({"in_proj_weight": ours.qkv_proj.weight, "in_proj_bias": ours.qkv_proj.bias, "out_proj.weight": ours.o_proj.weight, "out_proj.bias": ours.o_proj.bias})
    x = torch.randn(3, tokens, dim).double()
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_blocks_do_not_see_order_but_positions_do():
    torch.manual_seed(0)
    block, x, order = Block(8, SelfAttention(8, 2), FeedForward(8, 12)), torch.randn(2, 6, 8), torch.randperm(6)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order])
    vit, image = TinyViT((1, 4, 8), patch=4, dim=8, depth=1, heads=2, pool="mean"), torch.randn(1, 1, 4, 8)
    assert not torch.allclose(vit(image), vit(image.roll(4, 3)), atol=1e-4)


def test_the_class_token_comes_first_and_is_read():
    torch.manual_seed(0)
    vit = TinyViT((1, 4, 4), patch=2, dim=8, depth=1, heads=2)
    logits, tokens = vit(torch.randn(2, 1, 4, 4), return_tokens=True)
    assert tokens.shape == (2, 5, 8)
    torch.testing.assert_close(logits, F.linear(tokens[:, 0], vit.head.weight, vit.head.bias))


def test_context_reaches_the_attention():
    class Told(nn.Module):
        def forward(self, x, told): return told * x
    block = Block(4, Told(), nn.Identity(), norm=lambda dim: nn.Identity())
    assert torch.equal(block(torch.ones(1, 2, 4), told=3.), torch.full((1, 2, 4), 8.))      # x + 3 x, then twice that


def test_build_model_draws_new_weights():
    a, b = (build_model(model_spec(MAKE["mlp"]())) for _ in range(2))
    assert not torch.equal(a.encoder[0][0].weight, b.encoder[0][0].weight)
