"""Networks of convolutions: perceptrons on patches, heads of averages, the four variants; the three rules by a hand-written backward pass and by finite differences; what the model is left as; bad input."""
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclustering.pooling import AverageHead, MLPConv2d, all_cnn, guided_backpropagation
from deepclustering.pooling.all_convolutional import RULES, VARIANTS


def normal(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- Network in Network --------------------------------------------------------------------------------------------------------

def test_mlpconv_is_one_perceptron_at_every_place():
    layer, x = MLPConv2d(2, (5, 4), 3, stride=2, padding=1).double(), normal(2, 2, 7, 6)
    first, second = layer.layers[0], layer.layers[2]
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)])
    for n in range(2):
        for i in range(4):
            for j in range(3):
                patch = padded[n, :, 2 * i:2 * i + 3, 2 * j:2 * j + 3].ravel()
                h = np.maximum(first.weight.detach().flatten(1).numpy() @ patch + first.bias.detach().numpy(), 0)
                h = np.maximum(second.weight.detach().flatten(1).numpy() @ h + second.bias.detach().numpy(), 0)
                np.testing.assert_allclose(layer(x)[n, :, i, j].detach(), h, atol=1e-13)
    assert layer(x).shape == (2, 4, 4, 3) and len(MLPConv2d(1, (3,)).layers) == 2


def test_mlpconv_does_not_mix_places_after_its_first_layer():
    layer, x = MLPConv2d(2, (5, 4, 3), 1).double(), normal(1, 2, 4, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    def moved(t): return t.flatten(2)[..., order].view_as(t)
    torch.testing.assert_close(layer(moved(x)), moved(layer(x)))


@pytest.mark.parametrize("bias", (True, False))
def test_head_is_a_linear_layer_on_the_means(bias):
    linear, x = nn.Linear(6, 4, bias).double(), normal(3, 6, 5, 7)
    head = AverageHead.of(linear)
    torch.testing.assert_close(head(x), linear(x.mean((2, 3))))
    torch.testing.assert_close(head.maps(x), linear(x.movedim(1, -1)).movedim(-1, 1))
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(x.flatten(2)[..., order].view_as(x)), head(x))
    assert head.maps(x).shape == (3, 4, 5, 7) and torch.equal(AverageHead.of(linear).conv.weight.flatten(1), linear.weight)
    with torch.no_grad(): head.conv.weight.zero_()
    assert linear.weight.abs().min() > 0, "a copy"


# --- the all-convolutional net -------------------------------------------------------------------------------------------------

def test_parameters_of_the_papers_model():
    count = {variant: sum(p.numel() for p in all_cnn(variant).parameters()) for variant in VARIANTS}
    assert count == {"base": 954_730, "strided": 954_730, "convpool": 1_369_738, "all": 1_369_738}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", ((8, 8), (9, 13), (1, 1)))
def test_shapes_and_the_absence_of_pooling(variant, size):
    net = all_cnn(variant, 2, 5, (3, 4, 6), seed=0)
    assert net(normal(3, 2, *size, dtype=torch.float32)).shape == (3, 5)
    assert any(isinstance(m, nn.MaxPool2d) for m in net.modules()) == (variant in ("base", "convpool"))
    assert sum(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in net.modules()) == (3 if variant in ("strided", "all") else 0)


def test_variants_share_their_weights():
    nets = {variant: [m.weight for m in all_cnn(variant, 1, widths=(3, 4), seed=7).modules() if isinstance(m, nn.Conv2d)] for variant in VARIANTS}
    assert all(torch.equal(a, b) for a, b in zip(nets["base"], nets["strided"])) and all(torch.equal(a, b) for a, b in zip(nets["convpool"], nets["all"]))
    stages = [nets["all"][i] for i in (0, 1, 3, 4, 6, 7, 8)]  # without the two convolutions that are added
    assert all(torch.equal(a, b) for a, b in zip(stages, nets["base"]))
    state = torch.get_rng_state(); all_cnn("all", 1, widths=(3,), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    all_cnn("all", 1, widths=(3,)); assert not torch.equal(torch.get_rng_state(), state)


def test_a_stride_reads_every_second_place_of_the_layer_without_it():
    strided, x = all_cnn("strided", 1, widths=(4,), seed=0).double(), normal(2, 1, 9, 10)
    dense = deepcopy(strided); dense[2].stride = (1, 1)
    torch.testing.assert_close(strided[:4](x), dense[:4](x)[..., ::2, ::2])


# --- what the rules send back --------------------------------------------------------------------------------------------------

def by_hand(layers, x, target, rule):
    "Forward and backward through linear layers and ReLUs, in NumPy."
    kept, h = [], x
    for W, b in layers[:-1]: kept.append(W @ h + b); h = np.maximum(kept[-1], 0)
    R = layers[-1][0][target]
    for (W, b), f in zip(layers[-2::-1], kept[::-1]):
        if rule != "deconvnet": R = R * (f > 0)
        if rule != "backpropagation": R = np.maximum(R, 0)
        R = R @ W
    return R


@pytest.mark.parametrize("rule", RULES)
def test_a_perceptron_by_hand(rule):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in net[::2]]
    x, target = normal(9, 6), torch.arange(9) % 3
    want = np.array([by_hand(layers, row, t, rule) for row, t in zip(x.numpy(), target.tolist())])
    np.testing.assert_allclose(guided_backpropagation(net, x, target, rule), want, atol=1e-13)
    np.testing.assert_allclose(guided_backpropagation(net, x, 1, rule), [by_hand(layers, row, 1, rule) for row in x.numpy()], atol=1e-13)
    best = net(x).argmax(1)
    assert torch.equal(guided_backpropagation(net, x, rule=rule), guided_backpropagation(net, x, best, rule))


@pytest.mark.parametrize("variant", VARIANTS)
def test_backpropagation_is_the_gradient(variant):
    net, x = all_cnn(variant, 1, widths=(3, 4), seed=0).double(), normal(2, 1, 8, 8).requires_grad_()
    want, = torch.autograd.grad(net(x)[:, 4].sum(), x)
    torch.testing.assert_close(guided_backpropagation(net, x, 4, "backpropagation"), want)
    assert x.grad is None


class Calls(nn.Module):
    "A ReLU in each of the ways in which it can be called."
    def __init__(self, relu): super().__init__(); torch.manual_seed(3); self.a, self.b, self.relu = nn.Linear(4, 6), nn.Linear(6, 3), relu
    def forward(self, x): return self.b(self.relu(self.a(x)))
def forgets(x): F.relu_(x); return x  # what is changed in place is used afterwards, the result is not
WAYS = (nn.ReLU(), nn.ReLU(inplace=True), F.relu, lambda x: F.relu(x, True), lambda x: F.relu(x, inplace=True), lambda x: F.relu(input=x), F.relu_, torch.relu, torch.relu_, lambda x: x.relu(), lambda x: x.relu_(), forgets)


@pytest.mark.parametrize("rule", RULES)
def test_every_way_to_call_a_relu(rule):
    x = normal(5, 4, dtype=torch.float32)
    want = guided_backpropagation(Calls(nn.ReLU()), x, 1, rule)
    assert want.abs().sum() > 0
    for relu in WAYS: assert torch.equal(guided_backpropagation(Calls(relu), x, 1, rule), want)


def test_rules_differ_and_guided_keeps_less():
    net, x = all_cnn("all", 1, widths=(4, 6), seed=2).double(), normal(3, 1, 8, 8)
    maps = {rule: guided_backpropagation(net, x, 0, rule) for rule in RULES}
    assert all(not torch.allclose(maps[a], maps[b]) for a, b in (RULES[:2], RULES[1:], RULES[::2]))
    silent = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad(): silent[2].weight.copy_(-silent[2].weight.abs())
    assert guided_backpropagation(silent, normal(3, 4, dtype=torch.float32), 0).abs().max() == 0 and guided_backpropagation(silent, normal(3, 4, dtype=torch.float32), 0, "backpropagation").abs().max() > 0


def test_each_picture_is_on_its_own_and_the_model_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(.5), AverageHead(3, 4))
    net[1].eval(); x = normal(4, 1, 6, 6, dtype=torch.float32)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad(): whole = guided_backpropagation(net, x, torch.tensor([0, 1, 2, 3]))
    for i in range(4): torch.testing.assert_close(guided_backpropagation(net, x[i:i + 1], i), whole[i:i + 1])
    assert [m.training for m in net] == [True, False, True, True, True] and all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())
    assert not net[2]._forward_hooks and not net[2]._backward_hooks
    torch.testing.assert_close(torch.autograd.grad(F.relu(y := torch.tensor([-1., 2], requires_grad=True)).sum(), y)[0], torch.tensor([0., 1]))  # outside, ReLU is ReLU


def test_the_model_is_put_back_after_an_error():
    class Breaks(nn.Module):
        def forward(self, x): F.relu(x); raise RuntimeError("no")
    bad = Breaks()
    with pytest.raises(RuntimeError): guided_backpropagation(bad, torch.zeros(1, 2))
    assert bad.training


def test_one_picture_none_and_half_precision():
    net = all_cnn("all", 1, widths=(8, 16), seed=0)
    assert guided_backpropagation(net, torch.zeros(0, 1, 8, 8), 0).shape == (0, 1, 8, 8)
    x = normal(2, 1, 8, 8, dtype=torch.bfloat16)
    half = guided_backpropagation(deepcopy(net).bfloat16(), x, 0)
    assert half.dtype == torch.bfloat16 and (half.float() - guided_backpropagation(net, x.float(), 0)).norm() < .1 * half.float().norm() and half.float().norm() > 0


# --- bad input -----------------------------------------------------------------------------------------------------------------

relu = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
@pytest.mark.parametrize("call, named", (
    (lambda: MLPConv2d(2, ()), "widths must hold"), (lambda: MLPConv2d(0, (3,)), "in_channels or widths"), (lambda: MLPConv2d(1, (3, 2.)), "in_channels or widths"), (lambda: AverageHead(0, 2), "in_channels"), (lambda: AverageHead(2, 0), "n_classes"),
    (lambda: AverageHead.of(nn.Conv2d(1, 1, 1)), "linear must be"), (lambda: all_cnn("none"), "variant must be"), (lambda: all_cnn(widths=()), "widths must hold"), (lambda: all_cnn(in_channels=-1), "in_channels or widths"), (lambda: all_cnn(n_classes=0), "n_classes"), (lambda: all_cnn(seed=-1), "seed"),
    (lambda: guided_backpropagation(relu, torch.zeros(1, 2), 0, "gradient"), "rule must be"), (lambda: guided_backpropagation(relu, torch.zeros(1, 2, dtype=torch.long)), "x must be floating point"), (lambda: guided_backpropagation(relu[0], torch.zeros(1, 2)), "model must call a ReLU"),
    (lambda: guided_backpropagation(relu, torch.zeros(1, 2), 3), "target must hold"), (lambda: guided_backpropagation(relu, torch.zeros(1, 2), -1), "target must hold"), (lambda: guided_backpropagation(relu, torch.zeros(1, 2), .5), "target must hold"), (lambda: guided_backpropagation(relu, torch.zeros(1, 4, 2), 0), "model must return scores"),
    (lambda: guided_backpropagation(relu, torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)), "target must")))
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named): call()
