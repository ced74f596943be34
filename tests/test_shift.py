"""Blur and shift: SciPy's filters over a lattice, exact equivariance, gradients, dtypes, layouts, space to depth as a convolution, the league's measure by drawing, bad input."""
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage, signal
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from deepclustering.pooling import (BlurPool1d, BlurPool2d, BlurPool3d, MaxBlurPool2d, SpectralPool2d, SPDConv2d, blur_pool1d, blur_pool2d, blur_pool3d, blur_weights, replace_pooling, shift_consistency,
                                    small_cnn, space_to_depth, spectral_pool2d)
from deepclustering.pooling.shift import PAD_MODES

POOLS = {1: blur_pool1d, 2: blur_pool2d, 3: blur_pool3d}
SCIPY = {"reflect": "mirror", "replicate": "nearest", "circular": "wrap", "constant": "constant"}


def normal(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- the filter ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("K", range(1, 9))
def test_binomial_filter_is_repeated_averaging(K):
    w = np.ones(1)
    for _ in range(K - 1): w = np.convolve(w, [.5, .5])
    np.testing.assert_allclose(blur_weights(K), w, atol=1e-16)
    f, H = signal.freqz(w, worN=64)
    np.testing.assert_allclose(abs(H), np.cos(f / 2) ** (K - 1), atol=1e-12)


@pytest.mark.parametrize("dims, mode", [*product((1, 2, 3), PAD_MODES)])
def test_blur_is_scipys(dims, mode):
    x = normal(2, 3, *(7, 6, 5)[:dims])
    for K, stride in product(range(1, 8), (1, 2, 3)):
        want = x.numpy()
        for axis in range(2, 2 + dims):  # an even filter sees one place more on the far side: scipy's origin -1
            want = ndimage.correlate1d(want, blur_weights(K).numpy(), axis, mode=SCIPY[mode], origin=0 if K % 2 else -1)
        got = POOLS[dims](x, K, stride, mode)
        np.testing.assert_allclose(got, want[(..., *[slice(None, None, stride)] * dims)], atol=1e-13)
        assert got.shape[2:] == tuple(-(-n // stride) for n in x.shape[2:])


@pytest.mark.parametrize("size", ((1, 1), (1, 4), (2, 2), (2, 3)))
@pytest.mark.parametrize("mode", PAD_MODES)
def test_maps_smaller_than_the_filter(size, mode):
    x = normal(1, 2, *size)
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (3, 3), (3, 3)], mode={"circular": "wrap", "replicate": "edge"}.get(mode, mode))
    w = torch.outer(blur_weights(7), blur_weights(7)).expand(2, 1, 7, 7)
    torch.testing.assert_close(blur_pool2d(x, 7, 2, mode), F.conv2d(torch.from_numpy(padded), w, stride=2, groups=2))


def test_constant_maps_stay_constant_where_the_border_is_made_of_the_map():
    for K, mode in product(range(1, 8), PAD_MODES[:3]): torch.testing.assert_close(blur_pool2d(torch.full((1, 1, 5, 6), 3., dtype=torch.float64), K, 2, mode), torch.full((1, 1, 3, 3), 3., dtype=torch.float64))


@pytest.mark.parametrize("layer", (BlurPool2d(3, pad_mode="circular"), BlurPool2d(4, pad_mode="circular"), MaxBlurPool2d(pad_mode="circular"), MaxBlurPool2d(3, filt_size=5, pad_mode="circular"), SpectralPool2d()))
def test_a_move_by_the_stride_moves_the_result_by_one(layer):
    x = normal(2, 2, 8, 12)
    torch.testing.assert_close(layer(x.roll((2, -4), (2, 3))), layer(x).roll((1, -2), (2, 3)))


def test_longer_filters_change_less_under_a_move_by_one():
    x = normal(50, 1, 16, 16)
    change = [float((blur_pool2d(x.roll(1, -1), K, 2, "circular") - blur_pool2d(x, K, 2, "circular")).norm() / blur_pool2d(x, K, 2, "circular").norm()) for K in (1, 2, 3, 5, 7)]
    assert change == sorted(change, reverse=True) and change[0] > 1.3 and change[-1] < .7 * change[1]


# --- maximum and blur --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel, K, mode", [*product((1, 2, 3), (1, 2, 3, 5), PAD_MODES)])
def test_max_blur_by_the_definition(kernel, K, mode):
    x, padding = normal(1, 2, 7, 8), 0 if mode == "circular" else kernel // 2
    edges, how = (((kernel - 1) // 2, kernel // 2), dict(mode="wrap")) if mode == "circular" else ((padding, padding), dict(constant_values=-np.inf))
    dense = np.lib.stride_tricks.sliding_window_view(np.pad(x.numpy(), [(0, 0), (0, 0), edges, edges], **how), (kernel, kernel), (2, 3)).max((-1, -2))
    torch.testing.assert_close(MaxBlurPool2d(kernel, 2, padding, K, mode)(x), blur_pool2d(torch.from_numpy(dense), K, 2, mode))
    if K == 1 and mode != "circular": torch.testing.assert_close(MaxBlurPool2d(kernel, 2, padding, K, mode)(x), F.max_pool2d(x, kernel, 2, padding))


def test_replaces_a_pooling_layer():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(3, 2, 1))
    new = replace_pooling(net, nn.MaxPool2d, MaxBlurPool2d)
    assert (new[1].kernel_size, new[1].stride, new[1].padding) == (3, 2, 1) and new(normal(1, 1, 10, 10, dtype=torch.float32)).shape == (1, 3, 4, 4)
    for layer, named in ((nn.MaxPool2d(2, ceil_mode=True), "ceil_mode"), (nn.MaxPool2d(2, dilation=(1, 2)), "dilation")):
        with pytest.raises(ValueError, match=f"new must know {named}"): replace_pooling(layer, nn.MaxPool2d, MaxBlurPool2d)


# --- gradients, dtypes, layouts ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("f", (lambda x: blur_pool2d(x, 3, 2, "reflect"), lambda x: blur_pool2d(x, 4, 3, "constant"), lambda x: blur_pool2d(x, 5, 2, "circular"), MaxBlurPool2d(), spectral_pool2d, space_to_depth))
def test_gradients(f):
    x = normal(1, 2, 4, 6).requires_grad_()
    assert gradcheck(f, x) and gradgradcheck(f, x)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_adds_up_in_float32(dtype):
    x = normal(2, 3, 16, 16, dtype=dtype)
    for f in (lambda x: blur_pool2d(x, 7), spectral_pool2d): assert f(x).dtype == dtype; torch.testing.assert_close(f(x), f(x.double()).to(dtype))


def test_layers_are_their_functions_and_take_any_layout():
    x = normal(2, 4, 6, 8)
    for layer, f, size in ((BlurPool1d, blur_pool1d, (6,)), (BlurPool2d, blur_pool2d, (6, 8)), (BlurPool3d, blur_pool3d, (6, 8, 4))):
        y = normal(2, 3, *size)
        torch.testing.assert_close(layer(4, 3, "replicate")(y), f(y, 4, 3, "replicate")); torch.testing.assert_close(f(y[0]), f(y)[0])
    for odd in (x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1), normal(2, 4, 12, 8)[:, :, ::2]):
        torch.testing.assert_close(blur_pool2d(odd), blur_pool2d(odd.contiguous())); torch.testing.assert_close(MaxBlurPool2d()(odd), MaxBlurPool2d()(odd.contiguous()))
    assert blur_pool2d(x[:0]).shape == (0, 4, 3, 4)


def test_nan_stays_within_reach_of_the_filter():
    x = torch.zeros(1, 1, 16, 16); x[0, 0, 8, 8] = float("nan")
    assert blur_pool2d(x, 3).isnan().sum() == 1 and blur_pool2d(x, 5).isnan().sum() == 9


# --- spectral pooling ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, stride", ((12, 2), (12, 3), (9, 2), (15, 4), (7, 1), (8, 8)))
def test_spectral_pooling_keeps_exactly_the_waves_that_fit(n, stride):
    m, t = -(-n // stride), np.arange(n) / n
    for wave in range(n // 2 + 1):
        for phase in (0, .7):
            x = torch.from_numpy(np.cos(2 * np.pi * wave * t + phase)).expand(1, 1, n, n)
            want = np.cos(2 * np.pi * wave * np.arange(m) / m + phase) if wave < m / 2 else np.zeros(m)
            np.testing.assert_allclose(spectral_pool2d(x, stride)[0, 0], np.broadcast_to(want, (m, m)), atol=1e-12)


# --- space to depth --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale, k", [*product((1, 2, 3), (1, 3))])
def test_space_to_depth_and_a_convolution_is_a_strided_convolution(scale, k):
    C, out = 2, 3
    layer, x = SPDConv2d(C, out, k, scale).double(), normal(2, C, 2 * scale * 3, scale * 4)
    large = torch.zeros(out, C, scale * k, scale * k, dtype=torch.float64)
    for o, c, ky, kx, i, j in product(range(out), range(C), range(k), range(k), range(scale), range(scale)):
        large[o, c, ky * scale + i, kx * scale + j] = layer.conv.weight[o, (j * scale + i) * C + c, ky, kx].detach()
    torch.testing.assert_close(layer(x), F.conv2d(x, large, layer.conv.bias, stride=scale, padding=scale * (k // 2)))


def test_space_to_depth_order_by_hand():
    x = torch.arange(8.).view(1, 2, 2, 2)  # channel 0: 0 1 / 2 3, channel 1: 4 5 / 6 7
    assert space_to_depth(x).flatten().tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


# --- consistency -------------------------------------------------------------------------------------------------------------------

def test_consistency_is_what_drawing_pairs_gives():
    x = normal(40, 1, 8, 8, dtype=torch.float32)
    net = small_cnn(lambda width: nn.MaxPool2d(2), 8, 1, head="average", padding_mode="circular").eval()
    with torch.no_grad(): net[-1].bias -= net(x).mean(0)  # more than one answer
    g, agree = np.random.default_rng(0), []
    with torch.no_grad():
        for _ in range(1500):
            a, b = (net(x.roll(tuple(g.integers(0, 8, 2)), (2, 3))).argmax(1) for _ in range(2))
            agree.append((a == b).float().mean())
    want = shift_consistency(net, x, 4)
    assert .2 < want < .95 and abs(np.mean(agree) - want) < 5 * np.std(agree) / 1500 ** .5
    assert shift_consistency(net, x, 1) == 1


# --- bad input -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, named", (
    (lambda: blur_pool2d(torch.zeros(1, 1, 4, 4, dtype=torch.long)), "x must be floating point"), (lambda: blur_pool2d(torch.zeros(4, 4)), "x must be"), (lambda: blur_pool2d(torch.zeros(1, 1, 0, 4)), "at least one place"),
    (lambda: blur_pool2d(torch.zeros(1, 1, 4, 4), pad_mode="zeros"), "pad_mode must be"), (lambda: blur_pool2d(torch.zeros(1, 1, 4, 4), 0), "filt_size"), (lambda: blur_pool1d(torch.zeros(1, 4), stride=0), "stride"),
    (lambda: MaxBlurPool2d(0), "kernel_size"), (lambda: MaxBlurPool2d(2, padding=2), "padding must be at most"), (lambda: MaxBlurPool2d(2, padding=1, pad_mode="circular"), "padding must be 0"), (lambda: MaxBlurPool2d(3)(torch.zeros(1, 2, 5)), "must fit"), (lambda: MaxBlurPool2d()(torch.zeros(4, 4)), "x must be"), (lambda: spectral_pool2d(torch.zeros(4)), "x must be"), (lambda: spectral_pool2d(torch.zeros(4, 4), 0), "stride"),
    (lambda: space_to_depth(torch.zeros(1, 1, 5, 4)), "multiples of scale=2"), (lambda: SPDConv2d(1, 1, 2), "kernel_size must be odd"), (lambda: SPDConv2d(1, 1, 3, 0), "scale"), (lambda: shift_consistency(None, torch.zeros(1, 1, 4, 4), 0), "period"),
    (lambda: blur_weights(0), "filt_size")))
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named): call()
