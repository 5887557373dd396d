"""Spectral gating against a circular convolution, pixel by pixel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.blocks import SpectralGating
from tessel.blocks.frequency import by_products


def resized(plane: Tensor, rows: int, columns: int) -> Tensor:
    """`plane: [H, W]` by cubic convolution (a = -0.75), its corners kept, one pixel after the other."""

    def cubic(t: float) -> float:
        t, a = abs(t), -0.75
        return ((a + 2) * t - (a + 3)) * t * t + 1 if t <= 1 else a * (((t - 5) * t + 8) * t - 4) if t < 2 else 0.0

    def weights(size: int, new: int) -> Tensor:
        table = torch.zeros(new, size, dtype=plane.dtype)
        for i in range(new):
            place = i * (size - 1) / (new - 1) if new > 1 else 0.0
            for near in range(math.floor(place) - 1, math.floor(place) + 3):
                table[i, min(max(near, 0), size - 1)] += cubic(place - near)
        return table

    return weights(plane.shape[0], rows) @ plane @ weights(plane.shape[1], columns).T


def by_loops(mixer: SpectralGating, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`: every pixel takes from every other, around the edges."""
    _, height, width = x.shape
    y = torch.zeros_like(x)
    for channel, plane in enumerate(x):
        real, imag = (resized(part[channel], height, width // 2 + 1) for part in mixer.weight)
        for dy in range(height):
            for dx in range(width):
                kernel = 0.0
                for u in range(height):
                    for v in range(width // 2 + 1):
                        # a column without a mirror image counts once
                        count = 1 if v == -v % width else 2
                        angle = 2 * math.pi * (u * dy / height + v * dx / width)
                        kernel += count * (real[u, v] * math.cos(angle) - imag[u, v] * math.sin(angle))
                y[channel] += kernel / (height * width) * plane.roll((dy, dx), (0, 1))
    return y


def make(dim: int, size: int) -> SpectralGating:
    mixer = SpectralGating(dim, trained_size=size).double()
    torch.nn.init.normal_(mixer.weight)
    return mixer


@settings(deadline=None, max_examples=20)
@given(height=st.integers(1, 5), width=st.integers(1, 5), size=st.integers(1, 6))
def test_equals_the_convolution(height, width, size):
    torch.manual_seed(0)
    mixer = make(2, size)
    x = torch.randn(2, 2, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)
        # what an exported graph computes
        torch.testing.assert_close(by_products(x, mixer.gated), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4)], ids=str)
def test_gradcheck(size):
    mixer = make(3, 4)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


def test_a_gate_of_ones_changes_nothing():
    mixer = SpectralGating(4, trained_size=6).double()
    with torch.no_grad():
        mixer.weight.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand_as(mixer.weight))
    for size in ((6, 6), (5, 8)):
        x = torch.randn(1, 4, *size, dtype=torch.float64)
        torch.testing.assert_close(mixer(x), x)


@pytest.mark.parametrize("dim, size", [(0, 4), (4, 0)])
def test_constructor_errors(dim, size):
    with pytest.raises(ValueError, match=f"dim={dim} and trained_size={size}"):
        SpectralGating(dim, trained_size=size)
