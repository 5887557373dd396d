"""Neighborhood attention in plain PyTorch: the definition that the Triton kernels are tested against.

Shapes: B images, H x W pixels, N heads of width D, windows of K x K keys, dilation d.

Pixels whose rows, or columns, differ by a multiple of d form a class; a query sees the K rows and K columns of its
class that are nearest to it. At a border the window is shifted into the map, so that every query has K * K keys. With
dy and dx the distances of key minus query in steps of d,

    logit = D**-0.5 q . k + bias[dy + K - 1, dx + K - 1]

then softmax over the K * K keys, times v (Hassani et al., arXiv 2204.07143, sec. 3.1; dilation: Hassani and Shi, arXiv
2209.15001, sec. 3.1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recording import compact, exporting
from ..sdpa import fused_attention
from .geometry import AxisTiles, axis_tiles

# Rows of tiles are computed in chunks whose biases take about this many bytes: memory does not grow with the height.
CHUNK_BYTES = 8 << 20
# on the CPU they stay in the cache
CPU_CHUNK_BYTES = 1 << 20


def neighborhood_attention_reference(qkv: Tensor, bias: Tensor, *, dilation: int = 1) -> Tensor:
    """Attention of tiles of K x K queries to all keys that one of them sees; arguments as in `neighborhood_attention`.

    The at most (2K - 1)**2 keys of a tile have the bias -inf for the queries that do not see them.
    """
    kernel = (bias.shape[-1] + 1) // 2
    rows, columns = (axis_tiles(size, kernel, dilation, qkv.device) for size in qkv.shape[1:3])
    # one more row and column, for keys that a query does not see
    table = F.pad(bias.to(qkv.dtype), (0, 1, 0, 1), value=-torch.inf).index_select(2, columns.bias.flatten())
    qkv = qkv.permute(3, 0, 4, 1, 2, 5)  # [3, B, N, H, W, D]
    y = torch.cat([_attend(qkv, table, chunk, columns) for chunk in _chunks(rows, table)], 2)
    y = y.index_select(2, rows.places).index_select(3, columns.places)
    return y.permute(0, 2, 3, 1, 4)


def _chunks(rows: AxisTiles, table: Tensor) -> list[AxisTiles]:
    """Split the rows of tiles; a recorded graph has one chunk."""
    if torch.compiler.is_compiling() or exporting():
        return [rows]
    limit = CPU_CHUNK_BYTES if table.device.type == "cpu" else CHUNK_BYTES
    step = max(1, limit // (table[:, 0].nbytes * rows.bias[0].numel()))
    parts = zip(rows.queries.split(step), rows.keys.split(step), rows.bias.split(step), strict=True)
    return [AxisTiles(*part, rows.places) for part in parts]


def _attend(qkv: Tensor, table: Tensor, rows: AxisTiles, columns: AxisTiles) -> Tensor:
    """The output of some rows of tiles, `[B, N, rows, columns, D]`, in the order of the tiles' queries."""
    q, k, v = qkv.unbind(0)
    heads, tiles = q.shape[1], rows.queries.shape[0]
    y = fused_attention(
        _tiles(q, rows.queries, columns.queries),
        _tiles(k, rows.keys, columns.keys),
        _tiles(v, rows.keys, columns.keys),
        _tile_bias(table, rows.bias, columns.bias),
    )
    y = y.unflatten(2, (rows.queries.shape[1], -1)).unflatten(1, (heads * tiles, -1)).flatten(0, 1)
    y = compact(y.transpose(1, 2)).flatten(2, 3)  # [B*N*rows of tiles, t, columns, D]
    return y.flatten(0, 1).unflatten(0, (-1, heads, tiles * rows.queries.shape[1]))


def _tiles(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels of each tile: `x: [B, N, H, W, D] -> [B, N * T * T', t * t', D]` for index tensors of T tiles each."""
    batch = x.shape[0]
    x = x.index_select(2, rows.flatten()).index_select(3, columns.flatten())
    x = x.flatten(0, 2).unflatten(0, (-1, rows.shape[1])).unflatten(2, columns.shape)
    return compact(x.transpose(1, 2)).flatten(2, 3).flatten(0, 1).unflatten(0, (batch, -1))


def _tile_bias(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bias of each tile, `[1, N * T * T', t * t', w * w']`, from the table `[N, 2K, columns.numel()]`."""
    bias = table.index_select(1, rows.flatten()).unflatten(2, columns.shape)
    bias = bias.flatten(0, 1).unflatten(0, (-1, *rows.shape[1:]))  # [N * T, t, w, T', t', w']
    return compact(bias.permute(0, 3, 1, 4, 2, 5)).flatten(4).flatten(2, 3).flatten(0, 1)[None]
