"""Launches of the Triton kernels of aggregated attention (triton_kernels.py): tiles, grids, partial sums."""

import torch
import triton
from torch import Tensor

from ..dispatch import interpreting
from ..triton_common import KernelSpec, padded_dim
from .operands import OperandGradients, Operands
from .triton_kernels import (
    forward_kernel,
    key_backward_kernel,
    pair_backward_kernel,
    pooled_backward_kernel,
    query_backward_kernel,
    table_backward_kernel,
)

POINTER_TYPES = {
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

# Size of the buffer for the bias gradients of single pairs, and the number of programs that keep a large GPU busy
PAIR_BYTES = 256 << 20
PROGRAMS = 1024


def _kernel_specs(head_dim: int, value_step: int) -> dict[str, KernelSpec]:
    """Return the kernels for heads of this width, for maps of any size; `value_step` as in `_kernel_layout`."""
    dims = {"D": head_dim, "PAD_D": padded_dim(head_dim)}
    matmul = {**dims, "INTERPRET": interpreting()}
    # short tiles of queries, because nine shifted loads fill the registers
    window = {"BLOCK_M": 32, "BLOCK_N": 32, "V_STEP": value_step, **matmul}
    pooled = {"BLOCK_M": 32, "BLOCK_N": 64, **matmul}
    keys = {"BLOCK_N": 32 if head_dim <= 32 else 16, "V_STEP": value_step, **dims}
    return {
        "forward": KernelSpec(forward_kernel, window, 4),
        "backward of q": KernelSpec(query_backward_kernel, window, 4),
        "backward of k, v": KernelSpec(key_backward_kernel, keys, 4),
        "backward of pooled k, v": KernelSpec(pooled_backward_kernel, pooled, 4),
        "backward of pairs": KernelSpec(pair_backward_kernel, pooled, 4),
        "backward of the table": KernelSpec(table_backward_kernel, {"BLOCK": 128}, 4),
    }


def _specs_of(operands: Operands, value_step: int) -> dict[str, KernelSpec]:
    return _kernel_specs(operands.query.shape[-1], value_step)


def _launch(spec: KernelSpec, programs: int, *arguments: Tensor | int) -> None:
    spec.kernel[(programs,)](*arguments, **spec.constants, num_warps=spec.num_warps, num_stages=spec.num_stages)


def _kernel_layout(operands: Operands) -> tuple[Operands, int]:
    """Make the operands contiguous; a value that is a part of a packed qkv may stay where it is.

    Also returns the distance of a pixel's value from that of the next pixel, in multiples of N * D: 3 or 1.
    """
    value = operands.value
    _, height, width, heads, head_dim = value.shape
    packed = 3 * heads * head_dim
    in_place = value.stride() == (height * width * packed, width * packed, packed, head_dim, 1)
    contiguous = Operands(*(x if in_place and x is value else x.contiguous() for x in operands))
    return contiguous, 3 if in_place else 1


def _sizes(operands: Operands) -> tuple[int, ...]:
    """Return the runtime sizes that most kernels take, in their order."""
    batch, height, width, heads, _ = operands.query.shape
    keys, (table_height, table_width) = operands.pooled_key.shape[1], operands.table.shape[1:]
    return batch, height, width, heads, keys, len(operands.columns), table_height * table_width, table_width


def forward(operands: Operands) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, W, N, D]` and lse `[B, H, W, N]`."""
    operands, value_step = _kernel_layout(operands)
    batch, height, width, heads, _ = operands.query.shape
    spec = _specs_of(operands, value_step)["forward"]
    out = torch.empty_like(operands.query)
    lse = operands.local_bias.new_empty(batch, height, width, heads)
    blocks = triton.cdiv(height * width, spec.constants["BLOCK_M"])
    with torch.cuda.device_of(out):
        _launch(spec, batch * blocks * heads, *operands, out, lse, *_sizes(operands), blocks)
    return out, lse


def backward(operands: Operands, lse: Tensor, do: Tensor) -> OperandGradients:
    """Return the gradients of all operands but the two indices, from the lse of `forward` and the gradient of out."""
    operands, value_step = _kernel_layout(operands)
    specs = _specs_of(operands, value_step)
    do = do.contiguous()
    with torch.cuda.device_of(do):
        dq, dfilters, dlocal, delta = _backward_of_queries(specs["backward of q"], operands, lse, do)
        dk, dv = _backward_of_keys(specs["backward of k, v"], operands, lse, do, delta)
        dpk, dpv = _backward_of_pooled(specs["backward of pooled k, v"], operands, lse, do, delta)
        dtable = _backward_of_table(
            specs["backward of pairs"], specs["backward of the table"], operands, lse, do, delta
        )
    return dq, dk, dv, dfilters, dpk, dpv, dlocal, dtable


def _backward_of_queries(
    spec: KernelSpec, operands: Operands, lse: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, filters and local bias, and delta, which the other kernels read."""
    query, key, value, filters, *rest = operands
    batch, height, width, heads, _ = query.shape
    blocks = triton.cdiv(height * width, spec.constants["BLOCK_M"])
    dq, dfilters, delta = torch.empty_like(query), torch.empty_like(filters), torch.empty_like(lse)
    dlocal = lse.new_empty(batch * blocks, heads, 9)  # summed over the programs below
    _launch(
        spec, batch * blocks * heads,
        query, key, value, *rest, do, lse, dq, dfilters, dlocal, delta, *_sizes(operands), blocks,
    )  # fmt: skip
    return dq, dfilters, dlocal.sum(0), delta


def _backward_of_keys(
    spec: KernelSpec, operands: Operands, lse: Tensor, do: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    query, key, value, filters, _, _, local_bias, *_ = operands
    batch, height, width, heads, _ = query.shape
    blocks = triton.cdiv(height * width, spec.constants["BLOCK_N"])
    dk, dv = torch.empty_like(key), torch.empty_like(key)
    _launch(
        spec, batch * blocks * heads,
        query, key, value, filters, local_bias, do, lse, delta, dk, dv, batch, height, width, heads, blocks,
    )  # fmt: skip
    return dk, dv


def _backward_of_pooled(
    spec: KernelSpec, operands: Operands, lse: Tensor, do: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of pooled keys and values: the queries are split into `splits` runs, whose partial sums are added."""
    query, _, _, _, pooled_key, pooled_value, _, *bias = operands
    batch, height, width, heads, head_dim = query.shape
    pixels, keys = height * width, pooled_key.shape[1]
    block_m, blocks = spec.constants["BLOCK_M"], triton.cdiv(keys, spec.constants["BLOCK_N"])
    # as many splits as fill the GPU, each of whole tiles of queries
    splits = triton.cdiv(PROGRAMS, batch * heads * blocks)
    split_pixels = triton.cdiv(triton.cdiv(pixels, splits), block_m) * block_m
    splits = triton.cdiv(pixels, split_pixels)
    dk, dv = (lse.new_empty(splits, batch, keys, heads, head_dim) for _ in "kv")
    _launch(
        spec, splits * batch * blocks * heads,
        query, pooled_key, pooled_value, *bias, do, lse, delta, dk, dv, *_sizes(operands), blocks, split_pixels,
    )  # fmt: skip
    return dk.sum(0).to(query.dtype), dv.sum(0).to(query.dtype)


def _backward_of_table(
    pair_spec: KernelSpec, table_spec: KernelSpec, operands: Operands, lse: Tensor, do: Tensor, delta: Tensor
) -> Tensor:
    """Gradient of the bias table.

    A first kernel writes the bias gradient of each pair of query and pooled key, summed over the images of a split,
    into a buffer `[splits, N, keys, H * W]`. A second one adds the pairs to the table entries they use. Both run on
    some rows of pooled keys at a time, so that the buffer takes at most PAIR_BYTES (but at least one row of keys).
    """
    query, _, _, _, pooled_key, pooled_value, _, table, rows, columns = operands
    batch, height, width, heads, _ = query.shape
    pixels, key_rows, key_columns = height * width, len(rows), len(columns)
    splits, split_images, step = _table_splits(pair_spec, batch, heads, pixels, key_rows, key_columns, lse)
    pairs = lse.new_empty(splits, heads, step * key_columns, pixels)
    dtable = torch.empty_like(table)
    query_blocks = triton.cdiv(pixels, pair_spec.constants["BLOCK_M"])
    table_blocks = triton.cdiv(table.shape[2], table_spec.constants["BLOCK"])
    sizes = _sizes(operands)
    for first_row in range(0, key_rows, step):
        last_row = min(first_row + step, key_rows)
        first_key, last_key = first_row * key_columns, last_row * key_columns
        key_blocks = triton.cdiv(last_key - first_key, pair_spec.constants["BLOCK_N"])
        _launch(
            pair_spec, splits * key_blocks * query_blocks * heads,
            query, pooled_key, pooled_value, table, rows, columns, do, lse, delta, pairs,
            *sizes, query_blocks, key_blocks, first_key, last_key, split_images,
        )  # fmt: skip
        _launch(
            table_spec, table.shape[1] * table_blocks * heads,
            pairs, rows, columns, dtable,
            height, width, heads, key_columns, *sizes[6:], table_blocks, first_row, last_row, splits,
        )  # fmt: skip
    return dtable


def _table_splits(
    spec: KernelSpec, batch: int, heads: int, pixels: int, key_rows: int, key_columns: int, lse: Tensor
) -> tuple[int, int, int]:
    """Return the number of splits of the batch, the images of a split, and the rows of keys that the buffer holds.

    The batch is split where the pairs of all images together do not make enough programs to fill the GPU.
    """
    query_blocks = triton.cdiv(pixels, spec.constants["BLOCK_M"])
    key_blocks = triton.cdiv(key_rows * key_columns, spec.constants["BLOCK_N"])
    splits = min(batch, triton.cdiv(PROGRAMS, heads * query_blocks * key_blocks))
    split_images = triton.cdiv(batch, splits)
    splits = triton.cdiv(batch, split_images)
    row_bytes = splits * heads * key_columns * pixels * lse.element_size()
    return splits, split_images, min(key_rows, max(1, PAIR_BYTES // row_bytes))


def aot_specs(case: tuple) -> dict[str, KernelSpec]:
    """Return the kernels of a forward and backward of one of `aggregated.CASES`, for ahead-of-time compilation."""
    *_, head_dim = case
    return _kernel_specs(head_dim, value_step=3)
