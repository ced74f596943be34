"""The comparison of poolings: what a seed fixes, what a joint may change, bad input."""
import numpy as np
import pytest
import torch
from torch import nn

from deepclustering.pooling import SPDConv2d, accuracy, compare, fit, he, image_set, predict, small_cnn, split


@pytest.fixture(scope="module")
def digits(): return image_set("digits")


def test_splits_do_not_overlap_and_keep_classes(digits):
    X, y = torch.arange(100.).view(100, 1, 1, 1), torch.arange(100)
    for seed in range(3):
        (a, ya), (b, yb) = split(X, y, 60, seed, n_test=30)
        assert len(a) == 60 and len(b) == 30 and not set(ya.tolist()) & set(yb.tolist())
        assert torch.equal(a.flatten().long(), ya) and torch.equal(b.flatten().long(), yb)


def test_joints_with_weights_leave_the_rest_as_it_is():
    def heavy(width):
        torch.randn(1000)  # draws of its own
        return nn.Conv2d(width, width, 2, 2)
    for kwargs in ({}, dict(last=12), dict(head="average", widths=(4, 5, 6))):
        plain, other = small_cnn(lambda width: nn.AvgPool2d(2), 16, 7, **kwargs), small_cnn(heavy, 16, 7, **kwargs)
        convs = lambda net: [m.weight for m in net if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.shape[-1] != 2]
        assert len(convs(plain)) >= 3 and all(torch.equal(a, b) for a, b in zip(convs(plain), convs(other)))
    assert not torch.equal(small_cnn(lambda width: nn.AvgPool2d(2), 16, 8)[0].weight, plain[0].weight)


@pytest.mark.parametrize("make", (lambda: nn.Conv2d(3, 8, 3), lambda: nn.Conv2d(6, 12, (1, 5), groups=3), lambda: nn.Conv2d(4, 4, 1, bias=False)))
def test_he_is_pytorchs_kaiming_normal(make):
    conv, other = make(), make()
    torch.manual_seed(2); assert he(conv) is conv
    torch.manual_seed(2); nn.init.kaiming_normal_(other.weight, nonlinearity="relu")
    assert torch.allclose(conv.weight, other.weight, rtol=1e-6) and (conv.bias is None or (conv.bias == 0).all())


def test_he_reaches_convolutions_inside_and_nothing_else():
    net = nn.Sequential(SPDConv2d(2, 50, 1), nn.BatchNorm2d(50), nn.Linear(5, 5), nn.Conv1d(2, 2, 1))
    before = [p.clone() for m in net[1:] for p in m.parameters()]
    he(net)
    assert all(torch.equal(a, b) for a, b in zip(before, [p for m in net[1:] for p in m.parameters()]))
    assert (net[0].conv.bias == 0).all() and abs(float(net[0].conv.weight.detach().var()) * 8 / 2 - 1) < .3  # 8 inputs: 4 of each channel


def test_a_network_starts_with_its_maps_as_large_as_the_picture():
    x = torch.randn(400, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    means = []
    for seed in range(10):
        net = small_cnn(lambda width: nn.Identity(), 16, seed, widths=(32, 32, 32), padding_mode="circular")
        means.append([float(net[:k](x).square().mean().detach()) for k in (2, 5, 8)])
    assert ((.6 < np.mean(means, 0)) & (np.mean(means, 0) < 1.6)).all()  # by PyTorch's own start a sixth each time


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(1); a = torch.rand(3)
    torch.manual_seed(1); small_cnn(lambda width: nn.Conv2d(width, width, 2, 2), 8, 0); b = torch.rand(3)
    assert torch.equal(a, b)


def test_sides_that_do_not_halve_evenly():
    for side in (4, 5, 7, 11):
        for last in (0, 3): assert small_cnn(lambda width: nn.MaxPool2d(2), side, 0, last=last)(torch.zeros(2, 1, side, side)).shape == (2, 10)


def test_compare_gives_every_joint_the_same_seed(digits):
    X, y = digits
    joints = {"a": lambda width: nn.MaxPool2d(2), "b": lambda width: nn.AvgPool2d(2), "c": lambda width: nn.MaxPool2d(2)}
    found = compare(joints, (X[:300], y[:300]), 200, 1, [3, 4], {"accuracy": accuracy, "n": lambda net, test: len(test[0])})
    assert np.array_equal(found["a"]["accuracy"], found["c"]["accuracy"]) and (found["b"]["n"] == 100).all() and found["b"]["accuracy"].shape == (2,)
    net = fit(small_cnn(joints["b"], 8, 4), split(X[:300], y[:300], 200, 4)[0], 1, 4)
    assert not net.training and accuracy(net, split(X[:300], y[:300], 200, 4)[1]) == found["b"]["accuracy"][1]


def test_compare_builds_whole_networks(digits):
    data, seen = (digits[0][:300], digits[1][:300]), []

    def build(width, side, seed, bias=True):
        seen.append((width, side, seed, torch.initial_seed()))
        return nn.Sequential(nn.Flatten(), nn.Linear(side ** 2, width), nn.ReLU(), nn.Linear(width, 10, bias=bias))
    torch.manual_seed(9); state = torch.get_rng_state()
    found = compare({"a": 12, "b": 12, "c": 3}, data, 200, 1, [3, 8], {"accuracy": accuracy, "shape": lambda net, test: torch.tensor([len(test[0]), sum(p.numel() for p in net.parameters())]).numpy()},
                    {"of learned": lambda net, train: (len(train[0]), accuracy(net, train))}, build=build, bias=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [(w, 8, seed, seed) for seed in (3, 8) for w in (12, 12, 3)]
    assert found["c"]["shape"].tolist() == [[100, 64 * 3 + 3 + 30]] * 2 and found["a"]["of learned"].shape == (2, 2)
    assert all(np.array_equal(found["a"][k], found["b"][k]) for k in found["a"]) and (found["a"]["of learned"][:, 0] == 200).all()
    torch.manual_seed(8); net = build(12, 8, 8, bias=False)
    train_set, test_set = split(*data, 200, 8)
    assert accuracy(fit(net, train_set, 1, 8), train_set) == found["a"]["of learned"][1, 1] and accuracy(net, test_set) == found["a"]["accuracy"][1]


def test_predictions_do_not_depend_on_the_batch(digits):
    net = small_cnn(lambda width: nn.MaxPool2d(2), 8, 0).eval()
    assert torch.equal(predict(net, digits[0][:50], 7), predict(net, digits[0][:50]))


@pytest.mark.parametrize("call, named", ((lambda: small_cnn(lambda width: nn.MaxPool2d(2), 8, 0, head="max"), "head must be"), (lambda: split(torch.zeros(5, 1), torch.zeros(5), 5, 0), "n_train must be below"),
                                         (lambda: split(torch.zeros(5, 1), torch.zeros(5), 0, 0), "n_train"), (lambda: compare({}, "digits", 10, 1, [0], train_scores={"accuracy": accuracy}), "train_scores must have names")))
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named): call()
