"""Affine-scaled attention against a loop over pixels, and its running mean."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessel.blocks import AffineScaled, FullAttention, explain


def make(dim: int, heads: int) -> AffineScaled:
    """A mixer whose factors differ between positions and from their running mean."""
    torch.manual_seed(0)
    mixer = AffineScaled(dim, num_heads=heads).double().eval()
    nn.init.normal_(mixer.scale.weight)
    nn.init.normal_(mixer.scale.bias)
    mixer.running_mean.uniform_(0.2, 0.8)
    return mixer


def weights_of(mixer: AffineScaled, x: Tensor) -> Tensor:
    """The weights of all positions for all, `[heads, N, N]`, of one image `[C, H, W]`, one query after the other."""
    tokens, width = x.flatten(1).transpose(0, 1), len(x) // mixer.num_heads
    q, k, _ = mixer.qkv(tokens).split(len(x), -1)
    weights = x.new_empty(mixer.num_heads, len(tokens), len(tokens))
    for head in range(mixer.num_heads):
        part = slice(head * width, (head + 1) * width)
        for i, token in enumerate(tokens):
            a = 1 / (1 + (-(mixer.scale.weight[head] @ token + mixer.scale.bias[head])).exp())
            p = (k[:, part] @ q[i, part] / width**0.5).softmax(0)
            weights[head, i] = a * p + (mixer.running_mean[head] - a) / len(tokens)
    return weights


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 6), width=st.integers(1, 6), heads=st.sampled_from([1, 2, 3]))
def test_equals_the_loop(height, width, heads):
    mixer = make(4 * heads, heads)
    x = torch.randn(2, 4 * heads, height, width, dtype=torch.float64)
    with torch.no_grad():
        y = mixer(x)
        for image, found in zip(x, y, strict=True):
            weights = weights_of(mixer, image)
            v = mixer.qkv(image.flatten(1).transpose(0, 1))[:, 8 * heads :].unflatten(-1, (heads, -1))
            expected = mixer.proj(torch.einsum("hij,jhd->ihd", weights, v).flatten(1)).transpose(0, 1)
            torch.testing.assert_close(found.flatten(1), expected, rtol=1e-10, atol=1e-12)
            shares = mixer.running_mean[:, None].expand(heads, height * width)
            torch.testing.assert_close(weights.sum(-1), shares, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 3)], ids=str)
def test_gradcheck(size):
    mixer = make(4, 2)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


def test_it_explains_its_weights_also_negative_ones():
    mixer, x = make(8, 2), torch.randn(1, 8, 3, 4, dtype=torch.float64)
    mixer.running_mean.fill_(0.01)
    with torch.no_grad():
        mixer.qkv.weight[:16] *= 8
    expected = weights_of(mixer, x[0]).mean(0)[1 * 4 + 2].detach().unflatten(0, (3, 4))
    values = explain(mixer, x, (1, 2)).values
    torch.testing.assert_close(values, expected)
    assert (values < 0).any()


def test_the_running_mean_follows_the_factors_once_per_update():
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    for run in (lambda mixer, x: mixer(x), lambda mixer, x: checkpoint(mixer, x, use_reentrant=False)):
        mixer = make(8, 2)
        before, factors = mixer.running_mean.clone(), mixer.factors(x).detach()
        run(mixer, x).sum().backward()
        assert torch.equal(mixer.running_mean, before)  # in evaluation
        mixer.train()
        y = run(mixer, x)
        assert torch.equal(y, copy.deepcopy(mixer).eval()(x))
        y.sum().backward()
        torch.testing.assert_close(mixer.running_mean, 0.9 * before + 0.1 * factors.mean((0, 1, 2)))


def test_a_new_mixer_halves_the_output_of_plain_attention():
    mixer, plain = AffineScaled(8, num_heads=2), FullAttention(8, num_heads=2)
    plain.load_state_dict({key: mixer.state_dict()[key] for key in plain.state_dict()})
    nn.init.zeros_(mixer.proj.bias)
    nn.init.zeros_(plain.proj.bias)
    x = torch.randn(1, 8, 3, 4)
    torch.testing.assert_close(mixer(x), plain(x) / 2)


def test_constructor_errors():
    with pytest.raises(ValueError, match=r"dim=8.*num_heads=3"):
        AffineScaled(8, num_heads=3)
