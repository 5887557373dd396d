"""Which pixels form a tile of queries, which keys it needs, and the bias between the two, along one axis of the map.

Dilation d splits an axis of L pixels into d classes: class c holds the pixels c, c + d, c + 2d, ..., which are its
positions 0, 1, 2, ... Attention stays within a class. With K keys, the query at position p of a class of n pixels sees
the positions s ... s + K - 1 with

    s = clamp(p - K // 2, 0, n - K).

Each class is split into tiles of K queries; the keys of a tile are the at most 2K - 1 positions that its queries see.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..recording import compact, is_open
from ..tables import cache_tensors


class AxisTiles(NamedTuple):
    """Index tensors of one axis, T tiles over all classes, t queries and w keys in a tile."""

    queries: Tensor  # [T, t], the pixel of each query of a tile
    keys: Tensor  # [T, w], the pixel of each key of a tile
    bias: Tensor  # [T, t, w], the row of the bias table for query and key; 2K - 1 where the query does not see the key
    places: Tensor  # [L], the place of each pixel among all T * t queries


def axis_tiles(length: int, kernel: int, dilation: int, device: torch.device) -> AxisTiles:
    """The tiles of an axis of `length` pixels, which must be at least `kernel * dilation`."""
    return AxisTiles(*_axis_tiles(length, kernel, dilation, device))


@cache_tensors
def _axis_tiles(length: int, kernel: int, dilation: int, device: torch.device) -> tuple[Tensor, ...]:
    longest = (length + dilation - 1) // dilation  # positions in class 0
    tiles = (longest + kernel - 1) // kernel  # of each class
    # comparing an open size would narrow the graph
    width = 2 * kernel - 1 if is_open(longest) else min(2 * kernel - 1, longest)
    # not by division of a number of the tile: ONNX has no remainder by an open size
    residue = compact(torch.arange(dilation, device=device)[:, None].expand(-1, tiles)).flatten()[:, None]
    first = compact((torch.arange(tiles, device=device) * kernel).expand(dilation, -1)).flatten()[:, None]
    # classes differ by one position at most; places that only a longer class has repeat the last position
    size = (length - residue + dilation - 1) // dilation
    query = torch.minimum(first + torch.arange(kernel, device=device), size - 1)
    key = _first_key(first, size, kernel) + torch.arange(width, device=device)
    seen = key[:, None] - _first_key(query, size, kernel)[:, :, None]
    offset = key[:, None] - query[:, :, None] + kernel - 1
    bias = torch.where((seen >= 0) & (seen < kernel), offset, 2 * kernel - 1)
    pixel = torch.arange(length, device=device)
    return (
        query * dilation + residue,
        torch.minimum(key, size - 1) * dilation + residue,
        bias,
        pixel % dilation * (tiles * kernel) + pixel // dilation,
    )


def _first_key(position: Tensor, size: Tensor, kernel: int) -> Tensor:
    """The first position that the query at `position` of a class of `size` pixels sees."""
    return torch.minimum((position - kernel // 2).clamp_min(0), size - kernel)
