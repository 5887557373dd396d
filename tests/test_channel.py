"""Channel attention against a loop over heads, channels and pixels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.blocks import Channel


def by_loops(mixer: Channel, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`, as a loop over channels."""
    dim, height, width = x.shape
    head_dim = dim // mixer.num_heads
    q, k, v = torch.stack([mixer.qkv(pixel) for pixel in x.flatten(1).T]).T.split(dim)  # each [C, N]
    mixed = torch.zeros_like(q)
    for channel in range(dim):
        first = channel // head_dim * head_dim
        logits = torch.stack([(k[channel] * v[other]).sum() for other in range(first, first + head_dim)])
        weights = (logits / head_dim**0.5).softmax(0)
        for n, weight in enumerate(weights):
            mixed[channel] += weight * q[first + n]
    return torch.stack([mixer.proj(pixel) for pixel in mixed.T]).T.unflatten(1, (height, width))


def make(dim: int, *, num_heads: int) -> Channel:
    return Channel(dim, num_heads=num_heads).double()


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 7), width=st.integers(1, 7), heads=st.sampled_from([1, 2, 3]), head_dim=st.integers(1, 5))
def test_equals_the_loop(height, width, heads, head_dim):
    torch.manual_seed(0)
    mixer = make(head_dim * heads, num_heads=heads)
    x = torch.randn(2, head_dim * heads, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (9, 5)], ids=str)
def test_direct_and_merged_computation_agree(size):
    mixer = make(8, num_heads=2)
    tokens = torch.randn(3, size[0] * size[1], 8, dtype=torch.float64)
    found = []
    for way in (mixer.direct, mixer.merged):
        mixer.zero_grad()
        x = tokens.clone().requires_grad_()
        y = way(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in mixer.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(1, 2), (2, 5)], ids=["direct", "merged"])
def test_gradcheck(size):
    mixer = make(4, num_heads=2)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    parameters = tuple(mixer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_large_maps_are_not_rounded(dtype):
    """Logits are sums over all pixels: in bfloat16 they would be off by whole units, in float16 they would overflow."""
    mixer = make(32, num_heads=2)
    kv = 5 * torch.randn(1, 20_000, 64, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(mixer.attention(kv).double(), mixer.attention(kv.double()), rtol=1e-2, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixer.attention(kv).double(), mixer.attention(kv.double()), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("size", [(3, 3), (12, 12)], ids=["direct", "merged"])
@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_half_precision(size, way):
    mixer = Channel(32, num_heads=4)
    x = torch.randn(2, 32, *size)
    exact = mixer(x)
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = mixer(x)
    else:
        y = mixer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("size", [(3, 2), (5, 7)], ids=["direct", "merged"])
def test_memory_format_does_not_change_the_output(size):
    mixer = make(8, num_heads=2)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    torch.testing.assert_close(mixer(x.contiguous(memory_format=torch.channels_last)), mixer(x))


@pytest.mark.parametrize("num_heads", [3, 0])
def test_constructor_errors(num_heads):
    with pytest.raises(ValueError, match=f"dim=16.*num_heads={num_heads}"):
        Channel(16, num_heads=num_heads)
