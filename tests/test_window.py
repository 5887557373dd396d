"""Window attention against a loop over windows, heads and pixels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.blocks import Window


def by_loops(mixer: Window, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`, as a loop over pixels; pixels beyond the map are zeros and count as keys."""
    dim, height, width = x.shape
    (rows, cols), head_dim = mixer.window, dim // mixer.num_heads
    out = torch.zeros_like(x)
    for top in range(0, height, rows):
        for left in range(0, width, cols):
            pixels = [(i, j) for i in range(top, top + rows) for j in range(left, left + cols)]
            inside = [i < height and j < width for i, j in pixels]
            tokens = [x[:, i, j] if seen else x.new_zeros(dim) for (i, j), seen in zip(pixels, inside, strict=True)]
            q, k, v = torch.stack([mixer.qkv(token) for token in tokens]).split(dim, -1)
            for n, (i, j) in enumerate(pixels):
                if inside[n]:
                    heads = [slice(h * head_dim, (h + 1) * head_dim) for h in range(mixer.num_heads)]
                    weights = [(k[:, c] @ q[n, c] / head_dim**0.5).softmax(0) for c in heads]
                    mixed = torch.cat([w @ v[:, c] for w, c in zip(weights, heads, strict=True)])
                    out[:, i, j] = mixer.proj(mixed)
    return out


def make(dim: int, **options) -> Window:
    return Window(dim, **options).double()


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    heads=st.sampled_from([1, 2, 3]),
    window=st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 5), st.integers(1, 5))),
)
def test_equals_the_loop(height, width, heads, window):
    torch.manual_seed(0)
    mixer = make(4 * heads, num_heads=heads, window=window)
    x = torch.randn(2, 4 * heads, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("size", "side"), [((4, 4), 2), ((3, 5), 2), ((1, 2), 3)])
def test_gradcheck(size, side):
    mixer = make(4, num_heads=2, window=side)
    x = torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
    parameters = tuple(mixer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *parameters), fast_mode=True)


def test_uneven_map_equals_a_map_padded_with_zeros():
    mixer = make(8, num_heads=2, window=(4, 3))
    x = torch.randn(1, 8, 6, 5, dtype=torch.float64)
    filled = torch.zeros(1, 8, 8, 6, dtype=torch.float64)
    filled[..., :6, :5] = x
    torch.testing.assert_close(mixer(x), mixer(filled)[..., :6, :5])


def test_windows_do_not_affect_each_other():
    mixer = make(8, num_heads=2, window=3)
    x = torch.randn(1, 8, 6, 9, dtype=torch.float64, requires_grad=True)
    mixer(x)[..., 3:, 3:6].sum().backward()
    assert x.grad is not None
    touched = x.grad.abs().sum((0, 1)) > 0
    assert touched[3:, 3:6].all() and touched.sum() == 9


def test_memory_format_does_not_change_the_output():
    mixer = make(8, num_heads=2, window=3)
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(mixer(x.contiguous(memory_format=torch.channels_last)), mixer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "dim=16.*num_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 2, "window": 0}, "window=0"),
        ({"num_heads": 2, "window": (4, -1)}, r"window=\(4, -1\)"),
        ({"num_heads": 2, "window": (4, 4, 4)}, r"window=\(4, 4, 4\)"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Window(16, **arguments)
