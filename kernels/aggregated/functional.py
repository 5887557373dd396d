"""The public function of aggregated attention, its shape checks, and its registration as a torch operator.

Shapes as in reference.py, which defines the operator.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import choose_backend, common_unsupported_reasons
from ..precision import cast_to_autocast, without_autocast
from ..tables import BiasTable
from ..workload import workload
from .geometry import window_side
from .operands import OperandGradients, Operands, prepare_operands
from .reference import aggregated_attention_reference

# name -> (B, (H, W), (rows, columns), N, D): stages of the published models at 224, 512 and detection sizes
CASES = {
    "tiny-stage1-224": (64, (56, 56), (7, 7), 3, 24),
    "tiny-stage2-224": (64, (28, 28), (7, 7), 6, 24),
    "tiny-stage3-224": (64, (14, 14), (7, 7), 12, 24),
    "tiny-stage1-512": (2, (128, 128), (16, 16), 3, 24),
    "tiny-stage2-512": (2, (64, 64), (16, 16), 6, 24),
    "tiny-stage3-512": (2, (32, 32), (16, 16), 12, 24),
    "tiny-stage1-800x1333": (2, (200, 334), (25, 41), 3, 24),
    "tiny-stage2-800x1333": (2, (100, 167), (25, 41), 6, 24),
    "tiny-stage3-800x1333": (2, (50, 84), (25, 42), 12, 24),
}

MAX_HEAD_DIM = 64  # limit of the Triton kernels


def aggregated_attention(
    qkv: Tensor,
    pooled: Tensor,
    bias: BiasTable,
    *,
    temperature: Tensor,
    query_embedding: Tensor,
    local_bias: Tensor,
    filters: Tensor,
    filter_bias: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Attention of each pixel to its window and to all pooled keys. On `triton` no score is written to memory.

    Args:
        qkv: `[B, H, W, 3, N, D]`, the projection's output.
        pooled: `[B, rows, columns, 2, N, D]`, keys and values of the pooled map.
        bias: (table `[N, n, m]`, rows `[rows, H]`, columns `[columns, W]`), the position bias of the pooled keys: that
            of pixel (y, x) for key (i, j) is `table[:, rows[i, y], columns[j, x]]`. Every row of an index array must
            ascend with one common step.
        temperature: `[N, 1, 1]`.
        query_embedding: `[N, 1, D]`.
        local_bias: `[N, K]`, r; the pixels of the window are numbered row by row.
        filters: `[N, D, K]`, w.
        filter_bias: `[N, 1, K]`, b.
        backend: `auto`, `triton` or `reference`; None means the environment variable `TESSEL_KERNELS`.

    Returns:
        `[B, H, W, N, D]`. On `triton` the backward is deterministic and has no second derivative. Only the gradient of
        the table needs memory for pairs of queries and keys: a buffer of bounded size.

    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `backend="triton"` where it cannot run.
    """
    window = _check(qkv, pooled, bias, temperature, query_embedding, local_bias, filters, filter_bias)
    qkv, pooled = cast_to_autocast(qkv), cast_to_autocast(pooled)
    parameters = {
        "temperature": temperature,
        "query_embedding": query_embedding,
        "local_bias": local_bias,
        "filters": filters,
        "filter_bias": filter_bias,
    }
    reasons = aggregated_attention_unsupported(qkv, pooled, window=window)
    batch, height, width, _, heads, _ = qkv.shape
    work = workload(qkv, queries=batch * height * width * heads, keys=window**2 + math.prod(pooled.shape[1:3]))
    if choose_backend("aggregated_attention", backend, reasons, work) == "triton":
        with without_autocast(qkv):
            out, _ = _forward_op(*prepare_operands(qkv, pooled, bias, **parameters))
            return out
    return aggregated_attention_reference(qkv, pooled, bias, **parameters)


def aggregated_attention_unsupported(qkv: Tensor, pooled: Tensor, *, window: int) -> list[str]:
    """Return the reasons why the Triton kernels cannot run on these tensors; empty if they can."""
    head_dim = qkv.shape[-1]
    reasons = common_unsupported_reasons(qkv, head_dim=head_dim)
    if MAX_HEAD_DIM < head_dim <= 128:
        reasons.append(f"head_dim={head_dim} is above {MAX_HEAD_DIM}")
    if window != 3:
        reasons.append(f"window={window} is not 3")
    if pooled.dtype != qkv.dtype:
        reasons.append(f"pooled.dtype={pooled.dtype} is not qkv.dtype={qkv.dtype}")
    return reasons


def _check(
    qkv: Tensor,
    pooled: Tensor,
    bias: BiasTable,
    temperature: Tensor,
    query_embedding: Tensor,
    local_bias: Tensor,
    filters: Tensor,
    filter_bias: Tensor,
) -> int:
    """Check every shape; return the side of the window."""
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(
            f"aggregated_attention: qkv must be [B, H, W, 3, heads, head_dim], got shape={tuple(qkv.shape)}"
        )
    batch, height, width, _, heads, head_dim = qkv.shape
    if pooled.dim() != 6 or (pooled.shape[0], *pooled.shape[3:]) != (batch, 2, heads, head_dim):
        raise ValueError(
            f"aggregated_attention: pooled must be [B={batch}, rows, columns, 2, heads={heads}, head_dim={head_dim}], "
            f"got shape={tuple(pooled.shape)}"
        )
    keys = local_bias.shape[-1]
    window = window_side(keys)
    if window**2 != keys:
        raise ValueError(f"aggregated_attention: local_bias has K={keys} pixels, K must be the square of an odd number")
    table, rows, columns = bias
    for name, tensor, shape in (
        ("rows of the bias", rows, (pooled.shape[1], height)),
        ("columns of the bias", columns, (pooled.shape[2], width)),
        ("temperature", temperature, (heads, 1, 1)),
        ("query_embedding", query_embedding, (heads, 1, head_dim)),
        ("local_bias", local_bias, (heads, keys)),
        ("filters", filters, (heads, head_dim, keys)),
        ("filter_bias", filter_bias, (heads, 1, keys)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"aggregated_attention: {name} must be {shape}, got shape={tuple(tensor.shape)}")
    if table.dim() != 3 or table.shape[0] != heads:
        raise ValueError(
            f"aggregated_attention: the table of the bias must be [heads={heads}, n, m], got shape={tuple(table.shape)}"
        )
    return window


# The operators take the fields of `Operands`.


@torch.library.custom_op("tessel::aggregated_attention", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    filters: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    local_bias: Tensor,
    table: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, W, N, D]` and lse `[B, H, W, N]`."""
    operands = Operands(query, key, value, filters, pooled_key, pooled_value, local_bias, table, rows, columns)
    if not query.numel():
        return _empty_outputs(*operands)
    from .triton import forward

    return forward(operands)


@_forward_op.register_fake
def _empty_outputs(query, key, value, filters, pooled_key, pooled_value, local_bias, table, rows, columns):
    return query.new_empty(query.shape), local_bias.new_empty(query.shape[:4])


@torch.library.custom_op("tessel::aggregated_attention_backward", mutates_args=())
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    filters: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    local_bias: Tensor,
    table: Tensor,
    rows: Tensor,
    columns: Tensor,
    lse: Tensor,
    do: Tensor,
) -> OperandGradients:
    """Return the gradients of all operands but rows and columns; `do` is the gradient of out."""
    operands = Operands(query, key, value, filters, pooled_key, pooled_value, local_bias, table, rows, columns)
    if not query.numel():
        dq, dk, dv, dfilters, dpk, dpv, dlocal, dtable = (torch.zeros_like(x) for x in operands[:-2])
        return dq, dk, dv, dfilters, dpk, dpv, dlocal, dtable
    from .triton import backward

    return backward(operands, lse, do)


@_backward_op.register_fake
def _(query, key, value, filters, pooled_key, pooled_value, local_bias, table, rows, columns, lse, do):
    floating = (query, key, value, filters, pooled_key, pooled_value, local_bias, table)
    return tuple(x.new_empty(x.shape) for x in floating)


def _save_for_backward(ctx, inputs, output):
    _, lse = output
    # not the output: it contains the filters' part, which does not belong to the softmax
    ctx.save_for_backward(*inputs, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zero tensor for lse; a gradient that is zero arrives as None


def _backward(ctx, do, _):
    gradients = (None,) * 8 if do is None else _backward_op(*ctx.saved_tensors, do)
    return *gradients, None, None


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.tessel.aggregated_attention)
def _forward_flops(query, key, value, filters, pooled_key, *args, out_shape=None, **kwargs) -> int:
    batch, height, width, heads, head_dim = query
    return 4 * batch * height * width * heads * head_dim * (9 + pooled_key[1])


@register_flop_formula(torch.ops.tessel.aggregated_attention_backward)
def _backward_flops(query, key, value, filters, pooled_key, *args, out_shape=None, **kwargs) -> int:
    # five products of the same size; the forward has two
    return 5 * _forward_flops(query, key, value, filters, pooled_key) // 2
