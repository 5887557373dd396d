"""The adaptive frequency filter against a loop over frequencies."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.blocks import AdaptiveFrequencyFilter
from tessel.blocks.frequency import by_products, symmetric
from tessel.blocks.frequency import waves as tables


def waves(size: int) -> Tensor:
    """`exp(-2 pi i k n / size) / sqrt(size)`: the orthonormal Fourier matrix."""
    n = torch.arange(size, dtype=torch.float64)
    angle = -2 * math.pi * torch.outer(n, n) / size
    return torch.complex(angle.cos(), angle.sin()) / size**0.5


def silu(z: Tensor) -> Tensor:
    return torch.complex(z.real / (1 + (-z.real).exp()), z.imag / (1 + (-z.imag).exp()))


def shrink(z: Tensor, by: float) -> Tensor:
    def one(a: Tensor) -> Tensor:
        return a.sign() * (a.abs() - by).clamp_min(0)

    return torch.complex(one(z.real), one(z.imag))


def by_loops(mixer: AdaptiveFrequencyFilter, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`, as a loop over frequencies."""
    dim, height, width = x.shape
    rows, columns = waves(height), waves(width)
    w1, w2, b1, b2 = (torch.complex(p[0], p[1]) for p in (mixer.w1, mixer.w2, mixer.b1, mixer.b2))
    z = rows @ x.to(rows.dtype) @ columns
    filtered = torch.zeros_like(z)
    size = dim // mixer.num_groups
    for group in range(mixer.num_groups):
        own = slice(group * size, (group + 1) * size)
        for u in range(height):
            for v in range(width // 2 + 1):
                hidden = silu(z[own, u, v] @ w1[group] + b1[group])
                filtered[own, u, v] = shrink(hidden @ w2[group] + b2[group], mixer.shrinkage) * z[own, u, v]
    # the other half is the mirror image of this one; columns that mirror themselves are averaged with their image
    whole = torch.zeros_like(filtered)
    for u in range(height):
        for v in range(width):
            mirror = filtered[:, -u % height, -v % width].conj()
            if v == -v % width:
                whole[:, u, v] = (filtered[:, u, v] + mirror) / 2
            else:
                whole[:, u, v] = filtered[:, u, v] if v <= width // 2 else mirror
    y = rows.conj() @ whole @ columns.conj()
    assert y.imag.abs().max() < 1e-12
    return y.real


def make(dim: int, **options) -> AdaptiveFrequencyFilter:
    mixer = AdaptiveFrequencyFilter(dim, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.normal_(std=0.5)
    return mixer


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    groups=st.sampled_from([1, 2, 3]),
    size=st.integers(1, 4),
    shrinkage=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_equals_the_loop(height, width, groups, size, shrinkage):
    torch.manual_seed(0)
    mixer = make(groups * size, num_groups=groups, shrinkage=shrinkage)
    x = torch.randn(2, groups * size, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (4, 4), (5, 6)], ids=str)
def test_symmetric_spectrum_gives_the_same_inverse_transform(size):
    height, width = size
    spectrum = torch.randn(3, height, width // 2 + 1, dtype=torch.complex128)
    expected = torch.fft.irfft2(spectrum, s=size)
    repaired = symmetric(spectrum.clone(), width)
    torch.testing.assert_close(torch.fft.irfft2(repaired, s=size), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.fft.rfft2(expected), repaired, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 4)], ids=str)
def test_gradcheck(size):
    mixer = make(4, num_groups=2)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


@settings(deadline=None, max_examples=30)
@given(height=st.integers(1, 9), width=st.integers(1, 9), batch=st.integers(1, 2))
def test_real_products_equal_the_transforms(height, width, batch):
    """What an exported graph computes."""
    torch.manual_seed(0)
    mixer = make(6, num_groups=2)
    x = torch.randn(batch, 6, height, width, dtype=torch.float64)
    torch.testing.assert_close(by_products(x, mixer.filtered), mixer(x), rtol=1e-12, atol=1e-12)


def test_constant_mask_scales_the_input():
    mixer = make(8, num_groups=2)
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64)
    before = mixer(x)
    # a mask that is 2 at every frequency doubles the image, apart from the shrinkage
    with torch.no_grad():
        mixer.w2.zero_()
        mixer.b2[0].fill_(2.0)
        mixer.b2[1].zero_()
    torch.testing.assert_close(mixer(x), (2.0 - mixer.shrinkage) * x)
    assert not torch.allclose(before, 2 * x, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_computed_in_float32(dtype):
    mixer = AdaptiveFrequencyFilter(16).requires_grad_(False)
    x = torch.randn(2, 16, 7, 9).to(dtype)
    exact = mixer(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
        torch.testing.assert_close(mixer(x.float()), exact, rtol=0, atol=0)
    assert y.dtype == dtype
    torch.testing.assert_close(y, exact.to(dtype), rtol=0, atol=0)
    y = mixer.to(dtype)(x)
    assert y.dtype == dtype and (y.float() - exact).norm() < 0.02 * exact.norm()


def test_memory_format_does_not_change_the_output():
    mixer = make(8)
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x.contiguous(memory_format=torch.channels_last)), mixer(x))


@pytest.mark.parametrize("dim, groups", [(12, 8), (16, 0), (0, 8)])
def test_constructor_errors(dim, groups):
    with pytest.raises(ValueError, match=f"dim={dim}.*num_groups={groups}"):
        AdaptiveFrequencyFilter(dim, num_groups=groups)


def test_negative_shrinkage_is_an_error():
    with pytest.raises(ValueError, match="shrinkage=-0.1"):
        AdaptiveFrequencyFilter(16, shrinkage=-0.1)


@pytest.mark.slow
def test_compiled_tables_are_right():
    """In integers the compiler got them wrong for 12 rows; see docs/upstream.md."""
    like = torch.zeros(1)
    for compiled, table in zip(torch.compile(tables)(12, 12, like), tables(12, 12, like), strict=True):
        torch.testing.assert_close(compiled, table)
