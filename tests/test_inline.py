"""InLine attention against its definition by the N x N weights."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tessel.blocks import InLine
from tessel.blocks.inline import injective_attention


def by_definition(mixer: InLine, tokens: Tensor, size: tuple[int, int], source: Tensor) -> Tensor:
    """The mixer for one image: tokens `[(1 +) H*W, C]`, and the tokens `[M, C]` that the filter is generated from."""
    count, dim = tokens.shape
    first = count - size[0] * size[1]
    q, k, v = mixer.qkv(tokens).chunk(3, -1)
    y = torch.zeros_like(tokens)
    mean, taps = source.mean(0), torch.zeros(dim, 9, dtype=tokens.dtype)
    first_layer, last_layer = mixer.filter[0], mixer.filter[2]
    for c in torch.arange(dim).chunk(mixer.num_heads):
        logits = q[:, c] @ k[:, c].T / len(c) ** 0.5
        weights = (logits - logits.mean(1, keepdim=True)) / count + 1 / count
        torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[0]))
        y[:, c] = weights @ v[:, c]
        hidden = F.gelu(first_layer.weight[c, :, 0, 0] @ mean[c] + first_layer.bias[c])
        for channel in c:
            rows = slice(9 * int(channel), 9 * int(channel) + 9)
            taps[channel] = last_layer.weight[rows, :, 0, 0] @ hidden + last_layer.bias[rows]
    values = v[first:].unflatten(0, size)
    padded = F.pad(values, (0, 0, 1, 1, 1, 1))
    for i in range(size[0]):
        for j in range(size[1]):
            patch = padded[i : i + 3, j : j + 3].flatten(0, 1)  # [9, C]
            y[first + i * size[1] + j] += (patch * taps.T).sum(0)
    if mixer.local is not None:
        y[first:] += mixer.local(values.permute(2, 0, 1)[None])[0].permute(1, 2, 0).flatten(0, 1)
    return mixer.proj(y)


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    heads=st.sampled_from([1, 2, 3]),
    kind=st.sampled_from(["plain", "class token", "other source"]),
    local=st.booleans(),
)
def test_equals_the_definition(size, heads, kind, local):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6) if local else None
    mixer = InLine(6, num_heads=heads, local=conv).double()
    x = torch.randn(2, (kind == "class token") + size[0] * size[1], 6, dtype=torch.float64)
    source = torch.randn(2, 4, 6, dtype=torch.float64) if kind == "other source" else x
    with torch.no_grad():
        expected = torch.stack([by_definition(mixer, *image) for image in zip(x, (size,) * 2, source, strict=True)])
        if kind == "class token":
            got = mixer(x[:, None].permute(0, 3, 1, 2), size)
        else:
            other = None if source is x else source[:, None].permute(0, 3, 1, 2)
            got = mixer(x.unflatten(1, size).permute(0, 3, 1, 2), source=other)
    torch.testing.assert_close(got.permute(0, 2, 3, 1).flatten(1, 2), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(3, 4), (1, 1)])
def test_gradcheck(size):
    mixer = InLine(4, num_heads=2).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


def test_sums_are_exact_in_half_precision():
    q, k, v = 4 * torch.randn(3, 1, 2, 4096, 8, dtype=torch.float64)
    k, v = (t.bfloat16() for t in (k + 30, v + 30))
    expected = injective_attention(q, k.double(), v.double())
    torch.testing.assert_close(injective_attention(q.bfloat16(), k, v).double(), expected, rtol=0.01, atol=0)


def test_constructor_errors():
    with pytest.raises(ValueError, match="dim=6.*num_heads=4"):
        InLine(6, num_heads=4)
