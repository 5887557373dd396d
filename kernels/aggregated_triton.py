"""Launches of the Triton kernels of `aggregated` (aggregated_kernels_triton.py): tiles, grids, partial sums."""

import torch
import triton
from torch import Tensor

from ._launch import interpreting
from ._triton import Launch
from .aggregated import Operands
from .aggregated_kernels_triton import (
    forward_kernel,
    key_backward_kernel,
    pair_backward_kernel,
    pooled_backward_kernel,
    query_backward_kernel,
    table_backward_kernel,
)

POINTERS = {
    "local_ptr": "fp32",
    "bias_ptr": "fp32",
    "rows_ptr": "i64",
    "columns_ptr": "i64",
    "lse_ptr": "fp32",
    "delta_ptr": "fp32",
    "dlocal_ptr": "fp32",
    "dk_part_ptr": "fp32",
    "dv_part_ptr": "fp32",
    "pairs_ptr": "fp32",
    "dbias_ptr": "fp32",
}

# memory for the gradients of the bias of single pairs, and how many programs keep a large GPU busy
_PAIR_BYTES = 256 << 20
_PROGRAMS = 1024

# tiles and warps: queries with their windows (nine shifted loads fill the registers), pooled keys, pairs, table
_QUERIES = {"TILE_Q": 32, "TILE_K": 32, "num_warps": 4}
_POOLED = {"TILE_Q": 32, "TILE_K": 64, "num_warps": 4}
_PAIRS = {"TILE_Q": 32, "TILE_K": 64, "num_warps": 4}
_TABLE = {"TILE": 128, "num_warps": 4}


def _key_tiles(head_dim: int) -> dict[str, int]:
    return {"TILE": 32 if head_dim <= 32 else 16, "num_warps": 4}


def _widths(head_dim: int) -> dict[str, int]:
    return {"D": head_dim, "PAD_D": max(16, triton.next_power_of_2(head_dim))}


def _arranged(operands: Operands) -> tuple[Operands, int]:
    """The operands as the kernels read them, and how many maps lie between a pixel's value and the next one's."""
    value = operands.value
    _, height, width, heads, head_dim = value.shape
    step = 3 * heads * head_dim
    if value.stride() == (height * width * step, width * step, step, head_dim, 1):
        return Operands(*(x.contiguous() for x in operands))._replace(value=value), 3
    return Operands(*(x.contiguous() for x in operands)), 1


def _sizes(operands: Operands) -> tuple[int, ...]:
    batch, height, width, heads, _ = operands.query.shape
    keys, (table_height, table_width) = operands.pooled_key.shape[1], operands.table.shape[1:]
    return batch, height, width, heads, keys, len(operands.columns), table_height * table_width, table_width


def forward(operands: Operands) -> tuple[Tensor, Tensor]:
    """-> out `[B, H, W, N, D]`, and max + log2(sum) of each query's scores `[B, H, W, N]`."""
    operands, parts = _arranged(operands)
    batch, height, width, heads, head_dim = operands.query.shape
    out = torch.empty_like(operands.query)
    lse = operands.local_bias.new_empty(batch, height, width, heads)
    tiles = triton.cdiv(height * width, _QUERIES["TILE_Q"])
    with torch.cuda.device_of(out):
        forward_kernel[(batch * tiles * heads,)](
            *operands, out, lse, *_sizes(operands), tiles,
            **_widths(head_dim), V_PARTS=parts, INTERPRET=interpreting(), **_QUERIES,
        )  # fmt: skip
    return out, lse


def backward(operands: Operands, lse: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the operands but for the two indices, from the statistic of `forward` and the gradient of `out`."""
    operands, parts = _arranged(operands)
    grad = grad.contiguous()
    with torch.cuda.device_of(grad):
        dq, dfilters, dlocal, delta = _backward_of_queries(operands, parts, lse, grad)
        dk, dv = _backward_of_keys(operands, parts, lse, grad, delta)
        dpk, dpv = _backward_of_pooled(operands, lse, grad, delta)
        dtable = _backward_of_table(operands, lse, grad, delta)
    return dq, dk, dv, dfilters, dpk, dpv, dlocal, dtable


def _backward_of_queries(operands: Operands, parts: int, lse: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    query, key, value, filters, *rest = operands
    batch, height, width, heads, head_dim = query.shape
    tiles = triton.cdiv(height * width, _QUERIES["TILE_Q"])
    dq, dfilters, delta = torch.empty_like(query), torch.empty_like(filters), torch.empty_like(lse)
    dlocal = lse.new_empty(batch * tiles, heads, 9)
    query_backward_kernel[(batch * tiles * heads,)](
        query, key, value, *rest, grad, lse, dq, dfilters, dlocal, delta, *_sizes(operands), tiles,
        **_widths(head_dim), V_PARTS=parts, INTERPRET=interpreting(), **_QUERIES,
    )  # fmt: skip
    return dq, dfilters, dlocal.sum(0), delta


def _backward_of_keys(operands: Operands, parts: int, lse: Tensor, grad: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
    query, key, value, filters, _, _, local_bias, *_ = operands
    batch, height, width, heads, head_dim = query.shape
    of_keys = _key_tiles(head_dim)
    tiles = triton.cdiv(height * width, of_keys["TILE"])
    dk, dv = torch.empty_like(key), torch.empty_like(key)
    key_backward_kernel[(batch * tiles * heads,)](
        query, key, value, filters, local_bias, grad, lse, delta, dk, dv, batch, height, width, heads, tiles,
        **_widths(head_dim), V_PARTS=parts, **of_keys,
    )  # fmt: skip
    return dk, dv


def _backward_of_pooled(operands: Operands, lse: Tensor, grad: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
    query, _, _, _, pooled_key, pooled_value, _, *bias = operands
    batch, height, width, heads, head_dim = query.shape
    pixels, keys = height * width, pooled_key.shape[1]
    tiles = triton.cdiv(keys, _POOLED["TILE_K"])
    # as many runs of queries as fill the GPU, each of whole tiles
    runs = triton.cdiv(_PROGRAMS, batch * heads * tiles)
    span = triton.cdiv(triton.cdiv(pixels, runs), _POOLED["TILE_Q"]) * _POOLED["TILE_Q"]
    runs = triton.cdiv(pixels, span)
    dk, dv = (lse.new_empty(runs, batch, keys, heads, head_dim) for _ in "kv")
    pooled_backward_kernel[(runs * batch * tiles * heads,)](
        query, pooled_key, pooled_value, *bias, grad, lse, delta, dk, dv, *_sizes(operands), tiles, span,
        **_widths(head_dim), INTERPRET=interpreting(), **_POOLED,
    )  # fmt: skip
    return dk.sum(0).to(query.dtype), dv.sum(0).to(query.dtype)


def _backward_of_table(operands: Operands, lse: Tensor, grad: Tensor, delta: Tensor) -> Tensor:
    query, _, _, _, pooled_key, pooled_value, _, table, rows, columns = operands
    batch, height, width, heads, head_dim = query.shape
    pixels, grid = height * width, (len(rows), len(columns))
    tiles, key_tiles = (triton.cdiv(n, _PAIRS[t]) for n, t in ((pixels, "TILE_Q"), (grid[0] * grid[1], "TILE_K")))
    # runs of images fill the GPU where the pairs of one do not, as far as the buffer goes
    runs = min(batch, triton.cdiv(_PROGRAMS, heads * tiles * key_tiles))
    images = triton.cdiv(batch, runs)
    runs = triton.cdiv(batch, images)
    of_one_row = runs * heads * grid[1] * pixels * lse.element_size()
    step = min(grid[0], max(1, _PAIR_BYTES // of_one_row))
    pairs = lse.new_empty(runs, heads, step * grid[1], pixels)
    dtable = torch.empty_like(table)
    table_tiles = triton.cdiv(table.shape[2], _TABLE["TILE"])
    sizes = _sizes(operands)
    for first in range(0, grid[0], step):
        last = min(first + step, grid[0])
        key_tiles = triton.cdiv((last - first) * grid[1], _PAIRS["TILE_K"])
        pair_backward_kernel[(runs * key_tiles * tiles * heads,)](
            query, pooled_key, pooled_value, table, rows, columns, grad, lse, delta, pairs,
            *sizes, tiles, key_tiles, first * grid[1], last * grid[1], images,
            **_widths(head_dim), INTERPRET=interpreting(), **_PAIRS,
        )  # fmt: skip
        table_backward_kernel[(table.shape[1] * table_tiles * heads,)](
            pairs, rows, columns, dtable, height, width, heads, grid[1], *sizes[6:], table_tiles, first, last, runs,
            **_TABLE,
        )  # fmt: skip
    return dtable


def launches(case: tuple) -> dict[str, Launch]:
    """The kernels of a forward and backward of one of `aggregated.CASES`, in bfloat16."""
    *_, head_dim = case

    def launch(kernel, tiles: dict[str, int], **more) -> Launch:
        tiles = dict(tiles)
        warps = tiles.pop("num_warps")
        return Launch(kernel, {**more, **tiles}, warps)

    widths, product = _widths(head_dim), {"INTERPRET": interpreting()}
    return {
        "forward": launch(forward_kernel, _QUERIES, **widths, **product, V_PARTS=3),
        "backward of q": launch(query_backward_kernel, _QUERIES, **widths, **product, V_PARTS=3),
        "backward of k, v": launch(key_backward_kernel, _key_tiles(head_dim), **widths, V_PARTS=3),
        "backward of pooled k, v": launch(pooled_backward_kernel, _POOLED, **widths, **product),
        "backward of pairs": launch(pair_backward_kernel, _PAIRS, **widths, **product),
        "backward of the table": launch(table_backward_kernel, _TABLE),
    }
