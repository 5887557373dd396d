"""The public function of neighborhood attention, its shape checks, and its registration as a torch operator.

Shapes as in reference.py, which defines the operator.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import choose_backend, common_unsupported_reasons
from ..precision import acc_dtype, cast_to_autocast
from ..recording import is_open
from ..workload import workload
from .reference import neighborhood_attention_reference

# name -> (B, (H, W), N, D, K, dilation): stages of the published models at 224, 512 and detection sizes
CASES = {
    "mini-stage1-224": (64, (56, 56), 2, 32, 7, 1),
    "mini-stage1-224-dilated": (64, (56, 56), 2, 32, 7, 8),
    "mini-stage2-224": (64, (28, 28), 4, 32, 7, 1),
    "mini-stage3-224": (64, (14, 14), 8, 32, 7, 1),
    "mini-stage4-224": (64, (7, 7), 16, 32, 7, 1),
    "mini-stage1-512-dilated": (2, (128, 128), 2, 32, 7, 16),
    "mini-stage1-800x1333": (2, (200, 334), 2, 32, 7, 1),
    "mini-stage2-800x1333-dilated": (2, (100, 167), 4, 32, 7, 14),
    "large-stage1-384-11x11": (16, (96, 96), 6, 32, 11, 8),
}


def neighborhood_attention(qkv: Tensor, bias: Tensor, *, dilation: int = 1, backend: str | None = None) -> Tensor:
    """Attention of each pixel to the K x K pixels nearest to it, among every `dilation`-th row and column.

    Args:
        qkv: `[B, H, W, 3, N, D]`, the projection's output; H and W are at least K * dilation.
        bias: `[N, 2K - 1, 2K - 1]` with K odd, the bias by row and by column of the key minus those of the query, in
            steps of `dilation` and counted from -(K - 1).
        dilation: distance between neighboring keys in pixels.
        backend: `auto`, `triton` or `reference`; None means the environment variable `TESSEL_KERNELS`.

    Returns:
        `[B, H, W, N, D]`. On `triton` the backward is deterministic and has no second derivative; it keeps the inputs,
        the output and one float of each query and head.

    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `backend="triton"` where it cannot run.
    """
    _check(qkv, bias, dilation)
    qkv = cast_to_autocast(qkv)
    reasons = neighborhood_attention_unsupported(qkv)
    work = workload(qkv, queries=math.prod(qkv.shape[:3]) * qkv.shape[4], keys=((bias.shape[-1] + 1) // 2) ** 2)
    if choose_backend("neighborhood_attention", backend, reasons, work) == "triton":
        out, _ = _forward_op(qkv, bias.to(acc_dtype(qkv)), dilation)
        return out
    return neighborhood_attention_reference(qkv, bias, dilation=dilation)


def neighborhood_attention_unsupported(qkv: Tensor) -> list[str]:
    """Return the reasons why the Triton kernels cannot run on these tensors; empty if they can."""
    return common_unsupported_reasons(qkv, head_dim=qkv.shape[-1])


def _check(qkv: Tensor, bias: Tensor, dilation: int) -> None:
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(
            f"neighborhood_attention: qkv must be [B, H, W, 3, heads, head_dim], got shape={tuple(qkv.shape)}"
        )
    height, width, _, heads, _ = qkv.shape[1:]
    side = bias.shape[-1]
    if bias.shape != (heads, side, side) or side % 4 != 1:
        raise ValueError(
            f"neighborhood_attention: bias must be [heads={heads}, 2K - 1, 2K - 1] with K odd, got "
            f"shape={tuple(bias.shape)}"
        )
    if dilation < 1:
        raise ValueError(f"neighborhood_attention: dilation={dilation} must be at least 1")
    span = (side + 1) // 2 * dilation
    if not any(is_open(size) for size in (height, width)) and min(height, width) < span:
        raise ValueError(
            f"neighborhood_attention: a map of {height} x {width} pixels is smaller than the window, "
            f"K * dilation = {span}; pad it"
        )


# In the operators, `table` is the bias in at least float32.


@torch.library.custom_op("tessel::neighborhood_attention", mutates_args=())
def _forward_op(qkv: Tensor, table: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, W, N, D]` and lse `[B, H, W, N]`."""
    if not qkv.numel():
        return _empty_outputs(qkv, table, dilation)
    from .triton import forward

    return forward(qkv.contiguous(), table.contiguous(), dilation)


@_forward_op.register_fake
def _empty_outputs(qkv, table, dilation):
    batch, height, width, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, height, width, heads, head_dim)
    return out, qkv.new_empty(batch, height, width, heads, dtype=acc_dtype(qkv))


@torch.library.custom_op("tessel::neighborhood_attention_backward", mutates_args=())
def _backward_op(
    qkv: Tensor, table: Tensor, out: Tensor, lse: Tensor, do: Tensor, dilation: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of qkv and table; `do` is the gradient of out."""
    if not qkv.numel():
        return torch.zeros_like(qkv), torch.zeros_like(table)
    from .triton import backward

    qkv, table, out, lse, do = (x.contiguous() for x in (qkv, table, out, lse, do))
    return backward(qkv, table, out, lse, do, dilation)


@_backward_op.register_fake
def _(qkv, table, out, lse, do, dilation):
    return qkv.new_empty(qkv.shape), table.new_empty(table.shape)


def _save_for_backward(ctx, inputs, output):
    qkv, table, ctx.dilation = inputs
    out, lse = output
    ctx.save_for_backward(qkv, table, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zero tensor for lse; a gradient that is zero arrives as None


def _backward(ctx, do, _):
    gradients = (None, None) if do is None else _backward_op(*ctx.saved_tensors, do, ctx.dilation)
    return *gradients, None


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.tessel.neighborhood_attention)
def _forward_flops(qkv, table, dilation, *args, out_shape=None, **kwargs) -> int:
    batch, height, width, _, heads, head_dim = qkv
    return 4 * batch * height * width * heads * head_dim * ((table[-1] + 1) // 2) ** 2


@register_flop_formula(torch.ops.tessel.neighborhood_attention_backward)
def _backward_flops(qkv, table, out, lse, do, dilation, *args, out_shape=None, **kwargs) -> int:
    # five products of the same size; the forward has two
    return 5 * _forward_flops(qkv, table, dilation) // 2
