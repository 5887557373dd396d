"""Linear global attention against a loop over heads and positions, and its floor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.blocks import LinearGlobal


def by_loops(mixer: LinearGlobal, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`, with the weight of every position for every other."""
    tokens = x.flatten(1).T
    q, k, v = mixer.qkv(tokens).chunk(3, -1)
    mixed = torch.zeros_like(tokens)
    for head, c in enumerate(torch.arange(x.shape[0]).chunk(mixer.num_heads)):
        for i in range(len(tokens)):
            weights = torch.stack([(q[i, c].relu() * k[j, c].relu()).sum() for j in range(len(tokens))])
            weighted = sum(weight * v[j, c] for j, weight in enumerate(weights))
            mixed[i, c] = mixer.temperature[head] * weighted / max(weights.sum().item(), mixer.floor)
    return mixer.proj(mixed).T.unflatten(1, x.shape[1:])


def make(dim: int, **options) -> LinearGlobal:
    """In float64, with temperatures of both signs."""
    mixer = LinearGlobal(dim, **options).double()
    torch.nn.init.normal_(mixer.temperature)
    return mixer


@settings(max_examples=25)
@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    heads=st.sampled_from([1, 2, 3]),
    floor=st.sampled_from([0.01, 1.0, 100.0]),
    channels_last=st.booleans(),
)
def test_equals_the_loop(height, width, heads, floor, channels_last):
    torch.manual_seed(0)
    mixer = make(4 * heads, num_heads=heads, floor=floor)
    x = torch.randn(2, 4 * heads, height, width, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("size", "floor"), [((3, 4), 1e-3), ((3, 4), 1.0), ((1, 1), 100.0)])
def test_gradcheck(size, floor):
    """Above the floor, with some positions above it, and below."""
    mixer = make(4, num_heads=2, floor=floor)
    x = torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


def test_below_the_floor_the_output_grows_with_the_query():
    mixer = make(4, num_heads=1)
    q, k, v = torch.rand(3, 1, 1, 6, 4, dtype=torch.float64).unbind(0)
    small = mixer.attention(q, k, v)
    torch.testing.assert_close(mixer.attention(2 * q, k, v), 2 * small)
    large = mixer.attention(1e3 * q, k, v)
    torch.testing.assert_close(mixer.attention(2e3 * q, k, v), large)


def test_sums_are_taken_in_float32_under_autocast():
    mixer = make(4, num_heads=1, floor=1.0).float()
    q, k, v = torch.rand(3, 1, 1, 5000, 4).bfloat16().unbind(0)
    expected = mixer.attention(q.float(), k.float(), v.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer.attention(q, k, v)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert mixer(torch.randn(1, 4, 3, 3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "dim=16.*num_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 2, "floor": 0.0}, "floor=0.0"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearGlobal(16, **arguments)
