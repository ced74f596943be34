"""The comparison of poolings: what a seed fixes, what a joint may change, bad input."""
import numpy as np
import pytest
import torch
from torch import nn

from deepclustering.pooling import accuracy, compare, fit, image_set, predict, small_cnn, split


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


def test_predictions_do_not_depend_on_the_batch(digits):
    net = small_cnn(lambda width: nn.MaxPool2d(2), 8, 0).eval()
    assert torch.equal(predict(net, digits[0][:50], 7), predict(net, digits[0][:50]))


@pytest.mark.parametrize("call, named", ((lambda: small_cnn(lambda width: nn.MaxPool2d(2), 8, 0, head="max"), "head must be"), (lambda: split(torch.zeros(5, 1), torch.zeros(5), 5, 0), "n_train must be below"),
                                         (lambda: split(torch.zeros(5, 1), torch.zeros(5), 0, 0), "n_train")))
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named): call()
