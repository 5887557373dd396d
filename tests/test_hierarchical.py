"""Hierarchical attention against a loop over windows, and as the weights nearest to those of full attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.blocks import FullAttention, Hierarchical, explain


def make(dim: int, **options) -> Hierarchical:
    torch.manual_seed(0)
    mixer = Hierarchical(dim, **options).double()
    torch.nn.init.normal_(mixer.qkv.weight, std=0.5)
    return mixer


def windows_of(height: int, width: int, side: int) -> list[list[int]]:
    """The positions of each window, counted row by row."""
    return [
        [i * width + j for i in range(top, min(top + side, height)) for j in range(left, min(left + side, width))]
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def scores_of(mixer: Hierarchical, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`q, k, v: [heads, N, d]` and the scores `[heads, N, N]` of one image `[C, H, W]`."""
    qkv = mixer.qkv(x.flatten(1).transpose(0, 1)).unflatten(-1, (3, mixer.num_heads, -1))
    q, k, v = qkv.permute(1, 2, 0, 3).unbind(0)
    return q, k, v, q @ k.transpose(1, 2) / q.shape[-1] ** 0.5


def weights_of(mixer: Hierarchical, x: Tensor) -> Tensor:
    """The weights `[heads, N, N]` of one image, a loop over pairs of windows."""
    q, k, _, scores = scores_of(mixer, x)
    windows, weights = windows_of(x.shape[1], x.shape[2], mixer.window), torch.zeros_like(scores)
    for head in range(mixer.num_heads):
        for rows in windows:
            inner = scores[head][rows][:, rows]
            own, powers = inner.exp().sum(1).log().mean().exp(), {}
            for n, columns in enumerate(windows):
                if columns is not rows:
                    product = q[head, rows].mean(0) @ k[head, columns].mean(0)
                    powers[n] = (product / q.shape[-1] ** 0.5).exp()
            total = own + sum(len(windows[n]) * power for n, power in powers.items())
            for i, row in enumerate(rows):
                weights[head, row, rows] = own / total * inner[i].softmax(0)
                for n, power in powers.items():
                    weights[head, row, windows[n]] = power / total
    return weights


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 7), width=st.integers(1, 7), heads=st.sampled_from([1, 2, 3]), window=st.integers(1, 4))
def test_equals_the_loop(height, width, heads, window):
    mixer = make(4 * heads, num_heads=heads, window=window)
    x = torch.randn(2, 4 * heads, height, width, dtype=torch.float64)
    with torch.no_grad():
        for image, found in zip(x, mixer(x), strict=True):
            v, weights = scores_of(mixer, image)[2], weights_of(mixer, image)
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
            expected = mixer.proj((weights @ v).transpose(0, 1).flatten(1)).transpose(0, 1)
            torch.testing.assert_close(found.flatten(1), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("size", "window"), [((1, 1), 2), ((3, 5), 2), ((4, 4), 2)], ids=str)
def test_gradcheck(size, window):
    mixer = make(4, num_heads=2, window=window)
    x = torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


@pytest.mark.parametrize("size", [(4, 6), (5, 3)], ids=str)
def test_no_other_weights_that_are_constant_between_windows_are_nearer_to_full_attention(size):
    """By the sum of the divergences of all queries, among weights that are moved at random and those of the mixer."""
    mixer, x = make(4, num_heads=1, window=2), torch.randn(4, *size, dtype=torch.float64)
    with torch.no_grad():
        full, best = scores_of(mixer, x)[3][0].log_softmax(-1), weights_of(mixer, x)[0]
    windows = windows_of(size[0], size[1], 2)

    def divergence(weights: Tensor) -> Tensor:
        return (weights * (weights.log() - full)).sum()

    for trial in range(100):
        moved = torch.zeros_like(best)
        for rows in windows:
            for columns in windows:
                shape = (len(rows), len(columns)) if rows is columns else (1, 1)
                moved[torch.tensor(rows)[:, None], torch.tensor(columns)] = torch.randn(shape, dtype=best.dtype)
        # a window keeps one sum over itself, so that what is left for the others is the same for all of its rows
        other = best * (10.0 ** -(trial % 4) * moved).exp()
        for rows in windows:
            inner = other[rows][:, rows]
            other[torch.tensor(rows)[:, None], torch.tensor(rows)] = (
                inner / inner.sum(1, keepdim=True) * inner.sum(1).mean()
            )
        other = other / other.sum(1, keepdim=True)
        assert divergence(other) > divergence(best)


def test_with_one_window_it_is_full_attention():
    mixer, full = make(8, num_heads=2, window=6), FullAttention(8, num_heads=2).double()
    full.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), full(x), rtol=1e-10, atol=1e-12)


def test_it_explains_its_weights():
    mixer, x = make(8, num_heads=2, window=2), torch.randn(1, 8, 3, 4, dtype=torch.float64)
    expected = weights_of(mixer, x[0]).mean(0)[1 * 4 + 2].detach().unflatten(0, (3, 4))
    torch.testing.assert_close(explain(mixer, x, (1, 2)).values, expected)


@pytest.mark.parametrize(("options", "message"), [({"num_heads": 3}, "num_heads=3"), ({"window": 0}, "window=0")])
def test_constructor_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Hierarchical(8, **{"num_heads": 2, **options})
