"""Adaptive average pooling that exports with open sizes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.recording import is_open
from ..kernels.tables import Grid


def adaptive_pool(x: Tensor, grid: Grid) -> Tensor:
    """Adaptive average pooling `[B, C, H, W] -> [B, C, *grid]`; also where the graph being exported has open sizes."""
    if not any(is_open(side) for side in (*x.shape[2:], *grid)):
        return F.adaptive_avg_pool2d(x, grid)
    rows, columns = (bin_weights(side, bins, x) for side, bins in zip(x.shape[2:], grid, strict=True))
    return rows @ x @ columns.transpose(0, 1)


def bin_weights(side: int, bins: int, like: Tensor) -> Tensor:
    """The weights of adaptive average pooling along one side, `[bins, side]`."""
    i, position = torch.arange(bins, device=like.device)[:, None], torch.arange(side, device=like.device)
    start, stop = i * side // bins, ((i + 1) * side + bins - 1) // bins
    inside = ((position >= start) & (position < stop)).to(like.dtype)
    return inside / (stop - start).to(like.dtype)
