"""Deformable merging against a loop over pixels and taps, and against torchvision's operator."""

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import deform_conv2d

from tessel.blocks import DeformableConv, deformable_merge


def shifted(in_chs: int, out_chs: int, spread: float) -> DeformableConv:
    """A layer in float64 with random offsets of about `spread` pixels."""
    conv = DeformableConv(in_chs, out_chs).double()
    with torch.no_grad():
        conv.offset.weight.normal_(std=spread / (4 * in_chs) ** 0.5)
        conv.offset.bias.normal_(std=spread)
    return conv


def by_torchvision(conv: DeformableConv, x: Tensor) -> Tensor:
    return deform_conv2d(x, conv.offset(x), conv.weight.permute(0, 3, 1, 2), conv.bias, stride=(2, 2))


def by_loops(conv: DeformableConv, x: Tensor) -> Tensor:
    """The layer for one image `[C, H, W]`, as a loop over pixels, taps and the neighbors to interpolate."""
    _, height, width = x.shape
    shift = conv.offset(x[None])[0]
    out = conv.bias[:, None, None].expand(-1, height // 2, width // 2).clone()
    for i, j in torch.cartesian_prod(torch.arange(height // 2), torch.arange(width // 2)).tolist():
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            channel = 2 * (2 * a + b)
            row, col = 2 * i + a + shift[channel, i, j].item(), 2 * j + b + shift[channel + 1, i, j].item()
            for r in (math.floor(row), math.floor(row) + 1):
                for c in (math.floor(col), math.floor(col) + 1):
                    if 0 <= r < height and 0 <= c < width:
                        closeness = (1 - abs(row - r)) * (1 - abs(col - c))
                        out[:, i, j] += closeness * conv.weight[:, a, b] @ x[:, r, c]
    return out


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (5, 7)], ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.7, 4.0])
def test_equals_the_loop(size, spread):
    conv = shifted(3, 5, spread)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_loops(conv, image) for image in x])
        torch.testing.assert_close(conv(x), expected, rtol=1e-11, atol=1e-11)


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(2, 11),
    width=st.integers(2, 11),
    batch=st.integers(1, 3),
    chs=st.integers(1, 5),
    spread=st.sampled_from([0.0, 0.5, 3.0, 100.0]),
    channels_last=st.booleans(),
)
def test_equals_torchvision_with_every_gradient(height, width, batch, chs, spread, channels_last):
    torch.manual_seed(0)
    conv = shifted(chs, 4, spread)
    x = torch.randn(batch, chs, height, width, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = (x.requires_grad_(), *conv.parameters())
    y, expected = conv(x), by_torchvision(conv, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, inputs, grad) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 3)], ids=str)
def test_gradcheck(size):
    conv = shifted(2, 3, 0.8)
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: conv(x), (x, *conv.parameters()), fast_mode=True)


def test_initial_layer_equals_a_plain_convolution():
    conv = DeformableConv(3, 4).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    ordinary = torch.nn.functional.conv2d(x, conv.weight.permute(0, 3, 1, 2), conv.bias, stride=2)
    torch.testing.assert_close(conv(x), ordinary, rtol=1e-12, atol=1e-12)
    bound = (3 * 4) ** -0.5
    assert conv.weight.abs().max() <= bound and conv.bias.abs().max() <= bound


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1)], ids=str)
def test_a_side_of_one_pixel_is_padded_to_two(size):
    conv = shifted(3, 4, 0.5)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    padded = torch.zeros(2, 3, *(max(2, side) for side in size), dtype=torch.float64)
    padded[..., : size[0], : size[1]] = x
    torch.testing.assert_close(conv(x), by_torchvision(conv, padded), rtol=1e-11, atol=1e-11)


def test_half_precision_inputs_are_computed_in_float32():
    conv = DeformableConv(8, 4)
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    assert torch.equal(y, conv(x)), "with zero offsets, autocast must change nothing"
    half = conv.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), conv.float()(x.bfloat16().float()), rtol=2**-8, atol=1e-3)


def test_gradients_of_an_image_do_not_depend_on_its_batch():
    """Batch norm on the CPU returns wrong gradients if the memory formats of a single image are mixed."""
    merge = deformable_merge(4, 8).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        # tokens reshaped to a map, so that the gradient has another memory format
        return (merge(x).flatten(2).mT.cumsum(1).mT.unflatten(2, (3, 3)) ** 2).sum()

    (batch_grad,) = torch.autograd.grad(loss(x), x)
    for i in range(2):
        single = x[i : i + 1].detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(single), single)
        torch.testing.assert_close(grad, batch_grad[i : i + 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("image", "maps"),
    [
        ((208, 240), [(52, 60), (26, 30), (13, 15), (6, 7)]),
        ((201, 233), [(51, 59), (25, 29), (12, 14), (6, 7)]),
        ((250, 331), [(63, 83), (31, 41), (15, 20), (7, 10)]),
    ],
)
def test_feature_map_sizes_of_the_published_backbones(image, maps):
    model = timm.create_model("litv2_atto", features_only=True).eval()
    with torch.inference_mode():
        assert [tuple(m.shape[2:]) for m in model(torch.randn(1, 3, *image))] == maps


def test_constructor_errors():
    with pytest.raises(ValueError, match="out_chs=0"):
        DeformableConv(3, 0)
