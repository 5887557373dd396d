"""Attentive convolution against a loop over channels and pixels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.blocks import AttentiveConvolution
from tessel.blocks.attentive_convolution import correlate_by_groups, correlate_by_shifts


def make(dim: int, **options) -> AttentiveConvolution:
    mixer = AttentiveConvolution(dim, **options).double()
    torch.nn.init.normal_(mixer.difference_control)
    return mixer


def by_loops(mixer: AttentiveConvolution, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`, in the order of the paper: projection, bands, kernel, correlation."""
    dim, height, width = x.shape
    side, bands, count = mixer.kernel, mixer.kernel**2, height * width
    pixels = x.flatten(1).T  # [N, C], in raster order
    keys, values = mixer.kernel_proj(pixels), mixer.x_proj(pixels)
    y = torch.zeros(height, width, dim, dtype=x.dtype)
    for c in range(dim):
        means = [keys[j * count // bands : math.ceil((j + 1) * count / bands), c].mean() for j in range(bands)]
        kernel = mixer.kernel_gen(torch.nn.functional.gelu(torch.stack(means)))
        kernel = (kernel - mixer.difference_control[c].sigmoid() * kernel.mean()).view(side, side)
        for i in range(height):
            for j in range(width):
                for u in range(side):
                    for v in range(side):
                        row, column = i + u - side // 2, j + v - side // 2
                        if 0 <= row < height and 0 <= column < width:
                            y[i, j, c] += kernel[u, v] * values[row * width + column, c]
    return mixer.proj(y).permute(2, 0, 1)


@settings(max_examples=15)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    dim=st.integers(1, 3),
    kernel=st.sampled_from([1, 3, 5]),
    channels_last=st.booleans(),
)
def test_equals_the_loop(height, width, dim, kernel, channels_last):
    torch.manual_seed(0)
    mixer = make(dim, kernel=kernel)
    x = torch.randn(2, dim, height, width, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=20)
@given(size=st.tuples(st.integers(1, 8), st.integers(1, 8)), batch=st.integers(1, 3), side=st.sampled_from([1, 3, 5]))
def test_shifts_equal_groups(size, batch, side):
    """What a compiled or exported graph computes."""
    x = torch.randn(batch, *size, 4, dtype=torch.float64)
    kernels = torch.randn(batch, 4, side**2, dtype=torch.float64)
    torch.testing.assert_close(correlate_by_shifts(x, kernels, side), correlate_by_groups(x, kernels, side))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4)], ids=str)
def test_gradcheck(size):
    mixer = make(3)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


@pytest.mark.parametrize("kernel", [0, 2, -1])
def test_constructor_errors(kernel):
    with pytest.raises(ValueError, match=f"kernel={kernel}"):
        AttentiveConvolution(8, kernel=kernel)
