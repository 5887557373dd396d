"""UniFormer's local relation aggregator against a loop over pixels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.blocks import LocalMhra


def by_loops(mixer: LocalMhra, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`: pixels beyond the map have no value."""
    (_, height, width), kernel = x.shape, mixer.affinity.kernel_size[0]
    value = torch.einsum("oc,chw->ohw", mixer.value.weight[:, :, 0, 0], x) + mixer.value.bias[:, None, None]
    mixed = torch.empty_like(value)
    for i in range(height):
        for j in range(width):
            mixed[:, i, j] = mixer.affinity.bias
            for row in range(kernel):
                for column in range(kernel):
                    y, z = i + row - kernel // 2, j + column - kernel // 2
                    if 0 <= y < height and 0 <= z < width:
                        mixed[:, i, j] += mixer.affinity.weight[:, 0, row, column] * value[:, y, z]
    return torch.einsum("oc,chw->ohw", mixer.proj.weight[:, :, 0, 0], mixed) + mixer.proj.bias[:, None, None]


@settings(max_examples=10)
@given(height=st.integers(1, 5), width=st.integers(1, 5), kernel=st.sampled_from([1, 3, 5]))
def test_equals_the_loop(height, width, kernel):
    torch.manual_seed(0)
    mixer = LocalMhra(4, kernel=kernel).double()
    x = torch.randn(2, 4, height, width, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), torch.stack([by_loops(mixer, image) for image in x]))


def test_gradcheck():
    mixer = LocalMhra(3).double()
    x = torch.randn(1, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


@pytest.mark.parametrize("kernel", [0, 4])
def test_constructor_errors(kernel):
    with pytest.raises(ValueError, match=f"kernel={kernel} must be odd"):
        LocalMhra(4, kernel=kernel)
