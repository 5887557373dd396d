"""Full attention against a plain softmax."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tessel.blocks import FullAttention


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    heads=st.sampled_from([1, 2, 4]),
    place=st.sampled_from(["", "local", "lepe"]),
)
def test_equals_plain_softmax_attention(height, width, heads, place):
    """With a convolution of the input (local), of the values (lepe), or none."""
    torch.manual_seed(0)
    branch = nn.Conv2d(8, 8, 3, padding=1, groups=8).double()
    mixer = FullAttention(8, num_heads=heads, qkv_bias=False, **({place: branch} if place else {})).double()
    x = torch.randn(2, 8, height, width, dtype=torch.float64)
    tokens = x.flatten(2).mT
    parts = []
    for head in range(heads):
        c = slice(head * 8 // heads, (head + 1) * 8 // heads)
        q, k, v = (tokens @ weight[c].T for weight in mixer.qkv.weight.split(8))
        parts.append((q @ k.mT * (8 // heads) ** -0.5).softmax(-1) @ v)
    expected = torch.cat(parts, -1).mT.unflatten(2, (height, width))
    values = (tokens @ mixer.qkv.weight[16:].T).mT.unflatten(2, (height, width))
    expected = expected + {"": torch.zeros_like(x), "local": branch(x), "lepe": branch(values)}[place]
    expected = mixer.proj(expected.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    mixer = FullAttention(4, num_heads=2).double()
    x = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


def test_constructor_errors():
    with pytest.raises(ValueError, match="dim=8.*num_heads=3"):
        FullAttention(8, num_heads=3)
