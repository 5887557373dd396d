"""What a token mixer did with a map, as a picture: the one question that `tessel explain` and the report ask a mixer.

A mixer answers by a method `explain(x, query) -> Explanation`. Of a mixer without it the receptive field is shown.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Pixel = tuple[int, int]  # row and column of the query in the map


@dataclass(frozen=True)
class Explanation:
    """values: `[rows, columns]`. `over` says of what; `text` says in a few words what is drawn.

    positions: of the map `[H, W]`, how much the query takes from each; zero where it cannot reach.
    channels: how much each channel (row) takes from each channel (column).
    frequencies: the factor of each frequency, the lowest in the center.
    """

    values: Tensor
    over: Literal["positions", "channels", "frequencies"]
    text: str


def explain(mixer: nn.Module, x: Tensor, query: Pixel) -> Explanation:
    """What `mixer` does at `query` (row, column) with the map `x: [1, C, H, W]` that it receives."""
    own = getattr(mixer, "explain", None)
    # not inference_mode: tensors that a mixer caches in it could not be used in training later
    with torch.no_grad():
        return own(x, query) if own else receptive_field(mixer, x, query)


def receptive_field(module: nn.Module, x: Tensor, query: Pixel) -> Explanation:
    """The share of each position of `x: [1, C, H, W]` in the gradient of the output at `query` (row, column).

    The effective receptive field: the gradient of the sum over channels, its absolute value summed over channels (Luo
    et al., arXiv 1701.04128, sec. 2).
    """
    gradient = gradient_at(lambda leaf: module(leaf).permute(0, 2, 3, 1), x, query)[0].abs().sum(0)
    return Explanation(gradient / gradient.sum().clamp_min(1e-30), "positions", "receptive field")


def gradient_at(function: Callable[[Tensor], Tensor], x: Tensor, query: Pixel) -> Tensor:
    """The gradient, by `x`, of the sum of the output at `query`; `function(x): [1, H, W, ...]`.

    If `function` is attention, and linear in a part of `x`, the gradient by this part is the attention weight.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf)[:, query[0], query[1]].sum(), leaf)
    return gradient


def attention(weights: Tensor) -> Explanation:
    """The explanation of attention weights `[1, H, W, heads, head_dim]`, each head with a copy in its channels."""
    return Explanation(weights[0].mean((-2, -1)), "positions", "attention")


def qkv_attention(attend: Callable[[Tensor], Tensor], qkv: Tensor, query: Pixel) -> Explanation:
    """The weights that `attend` gives the values in `qkv: [1, H, W, 3, heads, head_dim]`."""
    return attention(gradient_at(attend, qkv, query)[:, :, :, 2])


def spread(weights: Tensor, pool: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The weights `[1, h, w, heads, head_dim]` of the cells of a pooled map, on the map `[1, C, H, W]` it was made of.

    `pool` averages, so each position of a cell has an equal part of the weight.
    """
    with torch.enable_grad():
        leaf = x.new_zeros(1, weights[0, 0, 0].numel(), *x.shape[2:]).requires_grad_()
        pooled = pool(leaf).permute(0, 2, 3, 1)
        (gradient,) = torch.autograd.grad((pooled * weights.flatten(3)).sum(), leaf)
    return gradient.permute(0, 2, 3, 1).unflatten(-1, weights.shape[3:])
