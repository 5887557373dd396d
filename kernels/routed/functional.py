"""The public function of routed attention, its shape checks, and its registration as a torch operator.

Shapes as in reference.py, which defines the operator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import choose_backend, common_unsupported_reasons
from ..precision import acc_dtype, cast_to_autocast
from ..recording import exporting, transformed
from ..workload import workload
from . import grouped
from .reference import routed_attention_reference

# name -> (B, (H, W), (n_rows, n_cols), N, D, K): stages of the published models at 224, 512 and detection sizes
CASES = {
    "tiny-stage1-224": (64, (56, 56), (7, 7), 2, 32, 1),
    "tiny-stage2-224": (64, (28, 28), (7, 7), 4, 32, 4),
    "tiny-stage3-224": (64, (14, 14), (7, 7), 8, 32, 16),
    "base-stage1-512": (2, (128, 128), (8, 8), 3, 32, 1),
    "base-stage2-512": (2, (64, 64), (8, 8), 6, 32, 4),
    "base-stage3-512": (2, (32, 32), (8, 8), 12, 32, 16),
    "base-stage1-800x1344": (2, (208, 336), (16, 16), 3, 32, 1),
    "base-stage3-800x1344": (2, (64, 96), (16, 16), 12, 32, 16),
}


def routed_attention(
    qkv: Tensor, index: Tensor, *, grid: tuple[int, int], scale: float, backend: str | None = None
) -> Tensor:
    """Attention of each region to its routed regions, without a copy of keys and values for every region.

    Args:
        qkv: `[B, H, W, 3, N, D]`, the projection's output; H and W divisible by the grid.
        index: `[B, R, K]` integers in [0, R): the regions that each query region attends to, each once, in any order.
            Regions are numbered row by row.
        grid: (n_rows, n_cols), regions per column and per row of the map; R is their product.
        scale: factor of the logits.
        backend: `auto`, `triton` or `reference`; None means the environment variable `TESSEL_KERNELS`.

    Returns:
        `[B, H, W, N, D]`. Except on `reference`, the backward is deterministic and has no second derivative; it keeps
        `qkv` and, on `triton` and on the CPU, the output and one float per query and head.

    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `backend="triton"` where it cannot run.
    """
    _check(qkv, index, grid)
    qkv = cast_to_autocast(qkv)
    reasons = routed_attention_unsupported(qkv, index, grid=grid)
    batch, height, width, _, heads, _ = qkv.shape
    keys = index.shape[2] * (height * width // (grid[0] * grid[1]))
    work = workload(qkv, queries=batch * height * width * heads, keys=keys)
    chosen = choose_backend("routed_attention", backend, reasons, work)
    # An exported graph should run without this package, so it must not contain our operator. torch.func cannot
    # differentiate it.
    if chosen == "reference" or (chosen == "auto" and (exporting() or transformed(qkv))):
        return routed_attention_reference(qkv, index, grid=grid, scale=scale)
    out, _ = _forward_op(qkv, index, grid, scale, chosen == "triton")
    return out


def routed_attention_unsupported(qkv: Tensor, index: Tensor, *, grid: tuple[int, int]) -> list[str]:
    """Return the reasons why the Triton kernels cannot run on these tensors; empty if they can."""
    return common_unsupported_reasons(qkv, head_dim=qkv.shape[-1])


def _check(qkv: Tensor, index: Tensor, grid: tuple[int, int]) -> None:
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"routed_attention: qkv must be [B, H, W, 3, heads, head_dim], got shape={tuple(qkv.shape)}")
    (height, width), (rows, cols) = qkv.shape[1:3], grid
    if height % rows or width % cols:
        raise ValueError(
            f"routed_attention: H={height}, W={width} must be divisible by grid={rows}x{cols}; pad the map first"
        )
    if index.dim() != 3 or index.shape[0] != qkv.shape[0] or index.shape[1] != rows * cols:
        raise ValueError(
            f"routed_attention: index must be [B={qkv.shape[0]}, R={rows * cols}, K], got shape={tuple(index.shape)}"
        )


# The operators run the Triton kernels if `triton` is true, else the plain PyTorch of grouped.py.


@torch.library.custom_op("tessel::routed_attention", mutates_args=())
def _forward_op(qkv: Tensor, index: Tensor, grid: Sequence[int], scale: float, triton: bool) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, W, N, D]` and what the backward reads of the softmax: lse `[B, H, W, N]`, or empty."""
    if not qkv.numel():
        return _empty_outputs(qkv, index, grid, scale, triton)
    qkv, index = qkv.contiguous(), index.contiguous()
    if triton:
        from .triton import forward

        return forward(qkv, index, grid, scale)
    return grouped.forward(qkv, index, grid, scale)


@_forward_op.register_fake
def _empty_outputs(qkv, index, grid, scale, triton):
    out = qkv.new_empty(qkv.shape[:3] + qkv.shape[4:])
    return out, out.new_empty(out.shape[:4] if _keeps_lse(qkv, triton) else (0,), dtype=acc_dtype(qkv))


def _keeps_lse(qkv: Tensor, triton: bool) -> bool:
    return triton or grouped.keeps_statistics(qkv)


@torch.library.custom_op("tessel::routed_attention_backward", mutates_args=())
def _backward_op(
    qkv: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    grid: Sequence[int],
    scale: float,
    triton: bool,
) -> Tensor:
    """Return the gradient of qkv; `do` is the gradient of out."""
    if not qkv.numel():
        return torch.zeros_like(qkv)
    qkv, index, out, do = qkv.contiguous(), index.contiguous(), out.contiguous(), do.contiguous()
    if triton:
        from .triton import backward

        return backward(qkv, index, out, lse, do, grid, scale)
    return grouped.backward(qkv, index, out, lse, do, grid, scale)


@_backward_op.register_fake
def _(qkv, index, out, lse, do, grid, scale, triton):
    return qkv.new_empty(qkv.shape)


def _save_for_backward(ctx, inputs, output):
    qkv, index, ctx.grid, ctx.scale, ctx.triton = inputs
    out, lse = output
    ctx.save_for_backward(qkv, index, out if _keeps_lse(qkv, ctx.triton) else lse, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zero tensor for lse; a gradient that is zero arrives as None


def _backward(ctx, do, _):
    dqkv = None if do is None else _backward_op(*ctx.saved_tensors, do, ctx.grid, ctx.scale, ctx.triton)
    return dqkv, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.tessel.routed_attention)
def _forward_flops(qkv, index, grid, scale, triton, *args, out_shape=None, **kwargs) -> int:
    batch, height, width, _, heads, head_dim = qkv
    keys = index[-1] * (height // grid[0]) * (width // grid[1])
    return 4 * batch * height * width * heads * head_dim * keys


@register_flop_formula(torch.ops.tessel.routed_attention_backward)
def _backward_flops(qkv, index, out, lse, do, grid, scale, triton, *args, out_shape=None, **kwargs) -> int:
    # five products of the same size; the forward has two
    return 5 * _forward_flops(qkv, index, grid, scale, triton) // 2
