"""Conversion between a feature map and its grid of equal regions, and gathering of whole regions.

Suffixes as in reference.py: R regions of r = h * w pixels each, N heads of width D. No tensor has more than 6 axes,
which is the limit of XNNPACK (ExecuTorch).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def split_regions(x_BHWND: Tensor, grid: Sequence[int]) -> Tensor:
    """`[B, H, W, N, D] -> [B, R, N, r, D]`."""
    (rows, cols), (heads, head_dim) = grid, x_BHWND.shape[3:]
    x = x_BHWND.flatten(3).unflatten(2, (cols, -1)).unflatten(1, (rows, -1)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2).unflatten(-1, (heads, head_dim)).transpose(2, 3)  # x: [B, rows, cols, h, w, C]


def merge_regions(x_BRNrD: Tensor, grid: Sequence[int], size: tuple[int, int]) -> Tensor:
    """`[B, R, N, r, D] -> [B, H, W, N, D]`, the inverse of `split_regions`; `size` is (H, W)."""
    (rows, cols), (height, width) = grid, size
    batch, _, heads, _, head_dim = x_BRNrD.shape
    x = x_BRNrD.unflatten(1, (rows, cols)).flatten(0, 1).unflatten(3, (height // rows, width // cols))
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, height, width, heads, head_dim)  # x: [B*rows, cols, N, h, w, D]


def gather_regions(x_BRNrD: Tensor, index: Tensor) -> Tensor:
    """`[B, R, N, r, D]`, index `[B, R', K] -> [B, R', N, K*r, D]`: the pixels of the selected regions, in order."""
    picked = x_BRNrD.flatten(0, 1).index_select(0, _flat_index(index, x_BRNrD.shape[1]))  # [B*R'*K, N, r, D]
    return picked.unflatten(0, index.shape).transpose(2, 3).flatten(3, 4)


def scatter_add_regions(total_BRNrD: Tensor, index: Tensor, x: Tensor) -> None:
    """Add `x` `[B, R', N, K*r, D]` into the selected regions of `total_BRNrD`: the adjoint of `gather_regions`."""
    regions, _, pixels, _ = total_BRNrD.shape[1:]
    x = x.unflatten(3, (index.shape[2], pixels)).transpose(2, 3).flatten(0, 2)
    total_BRNrD.view(-1, *total_BRNrD.shape[2:]).index_add_(0, _flat_index(index, regions), x.to(total_BRNrD.dtype))


def _flat_index(index: Tensor, regions: int) -> Tensor:
    """Index `[B, R', K]` of regions per image -> index `[B*R'*K]` of the regions of all images."""
    first = torch.arange(index.shape[0], device=index.device)[:, None, None] * regions
    return (index + first).flatten()
