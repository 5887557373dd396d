"""Conversion between a feature map and its grid of equal regions, and gathering of whole regions.

Suffixes as in reference.py: R regions of r = h * w pixels each, N heads of width D. No tensor has more than 6 axes,
which is the limit of XNNPACK (ExecuTorch).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..recording import as_matrix


def split_regions(x_BHWND: Tensor, grid: Sequence[int]) -> Tensor:
    """`[B, H, W, N, D] -> [B, R, N, r, D]`."""
    (batch, height, width, heads, head_dim), (rows, cols) = x_BHWND.shape, grid
    h, w, dim = height // rows, width // cols, heads * head_dim
    x = as_matrix(x_BHWND, batch * rows, h * width * dim).reshape(batch * rows, h, cols, w * dim).transpose(1, 2)
    x = as_matrix(x, batch * rows * cols, h * w * dim)
    return x.reshape(batch, rows * cols, h * w, heads, head_dim).transpose(2, 3)


def merge_regions(x_BRNrD: Tensor, grid: Sequence[int], size: tuple[int, int]) -> Tensor:
    """`[B, R, N, r, D] -> [B, H, W, N, D]`, the inverse of `split_regions`; `size` is (H, W)."""
    (rows, cols), (height, width) = grid, size
    batch, _, heads, _, head_dim = x_BRNrD.shape
    h, w, dim = height // rows, width // cols, heads * head_dim
    x = as_matrix(x_BRNrD.transpose(2, 3), batch * rows, cols * h * w * dim)
    x = x.reshape(batch * rows, cols, h, w * dim).transpose(1, 2)
    return as_matrix(x, batch * height, width * dim).reshape(batch, height, width, heads, head_dim)


def gather_regions(x_BRNrD: Tensor, index: Tensor) -> Tensor:
    """`[B, R, N, r, D]`, index `[B, R', K] -> [B, R', N, K*r, D]`: the pixels of the selected regions, in order."""
    (batch, regions, heads, pixels, head_dim), (_, queries, chosen) = x_BRNrD.shape, index.shape
    flat = as_matrix(x_BRNrD, batch * regions, heads * pixels * head_dim)
    picked = flat.index_select(0, _flat_index(index, regions))
    picked = picked.reshape(batch, queries, chosen, heads, pixels * head_dim).transpose(2, 3)
    picked = as_matrix(picked, batch * queries * heads, chosen * pixels * head_dim)
    return picked.reshape(batch, queries, heads, chosen * pixels, head_dim)


def _flat_index(index: Tensor, regions: int) -> Tensor:
    """Index `[B, R', K]` of regions per image -> index `[B*R'*K]` of the regions of all images."""
    first = torch.arange(index.shape[0], device=index.device)[:, None, None] * regions
    return (index + first).flatten()
