"""Zero padding of feature maps."""

from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.recording import is_open


def pad_to_multiple(x: Tensor, rows: int, cols: int) -> Tensor:
    """Zero-pad `x: [B, H, W, C]` at the bottom and right to multiples of (rows, cols), as `pad_to` does."""
    height, width = x.shape[1:3]
    return pad_to(x, (height + rows - 1) // rows * rows, (width + cols - 1) // cols * cols)


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad `x: [B, H, W, C]` at the bottom and right to (height, width); `x` itself if it has that size.

    While compiling or exporting the padding is always applied, also if it is empty, so that one graph serves all sizes.
    """
    bottom, right = height - x.shape[1], width - x.shape[2]
    if torch.compiler.is_compiling() or bottom or right:
        return F.pad(x, (0, 0, 0, right, 0, bottom))
    return x


def pad_to_size(x: Tensor, rows: int, cols: int) -> Tensor:
    """Zero-pad `x: [B, H, W, C]` at the bottom and right to at least rows x cols; `x` itself if it is large enough."""
    bottom, right = _missing(x.shape[1], rows), _missing(x.shape[2], cols)
    if is_open(bottom) or is_open(right) or bottom or right:
        return F.pad(x, (0, 0, 0, right, 0, bottom))
    return x


def _missing(size: int, least: int) -> int:
    # `max` would compare an open size, which narrows the graph
    return cast(int, torch.sym_max(least - size, 0)) if is_open(size) else max(least - size, 0)


@register_notrace_module
class PadToMultiple(nn.Module):
    """Zero-pad `[B, C, H, W]` at the bottom and right to multiples of `step`."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return pad_to_multiple(x.permute(0, 2, 3, 1), self.step, self.step).permute(0, 3, 1, 2)


@register_notrace_module
class PadToSize(nn.Module):
    """Zero-pad `[B, C, H, W]` at the bottom and right to at least `side` x `side`."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height < self.side or width < self.side:
            x = F.pad(x, (0, max(0, self.side - width), 0, max(0, self.side - height)))
        return x
