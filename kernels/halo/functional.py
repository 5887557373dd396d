"""The public function of halo attention, its shape checks, and its registration as a torch operator.

Shapes as in reference.py, which defines the operator.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import choose_backend, common_unsupported_reasons
from ..precision import acc_dtype, cast_to_autocast
from ..workload import workload
from .reference import halo_attention_reference
from .relative import reachable_logits

# name -> (B, (H, W), N, D, E, b, h, stride): stages of the published models at their own and at detection sizes
CASES = {
    "50ts-stage2-256": (64, (32, 32), 4, 32, 32, 8, 3, 1),
    "50ts-stage3-256": (64, (16, 16), 8, 32, 32, 8, 3, 1),
    "50ts-stage4-256": (64, (8, 8), 8, 64, 64, 8, 3, 1),
    "h1-stage1-256": (64, (64, 64), 8, 8, 8, 8, 3, 1),
    "h1-stage2-entry-256": (64, (64, 64), 8, 16, 16, 8, 3, 2),
    "h1-stage2-256": (64, (32, 32), 8, 16, 16, 8, 3, 1),
    "h1-stage3-256": (64, (16, 16), 8, 32, 32, 8, 3, 1),
    "h5-stage2-448": (16, (56, 56), 8, 16, 40, 14, 2, 1),
    "50ts-stage2-800x1344": (2, (100, 168), 4, 32, 32, 8, 3, 1),
    "50ts-stage3-800x1344": (2, (50, 84), 8, 32, 32, 8, 3, 1),
}

MAX_WINDOW_KEYS = 4096  # limit of the Triton kernels


def halo_attention(
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    *,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    mask_border: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention of each block of queries to the pixels of its block and `halo_size` pixels around it.

    Args:
        q: `[B, ceil(H / stride), ceil(W / stride), N, D]`, the queries, subsampled by `stride`.
        kv: `[B, H, W, N, D + E]`, for each head its keys, then its values.
        height_rel: `[2K - 1, D]`, relative-position table of vertical distances, shared by the heads.
        width_rel: `[2K - 1, D]`, the same for horizontal distances.
        block_size: b in pixels, a multiple of `stride`. The last blocks of a map may reach beyond it.
        halo_size: h in pixels.
        stride: distance between queries in pixels. Relative positions of queries count subsampled rows and columns.
        mask_border: leave keys outside the map out of the softmax, instead of treating them as zeros.
        backend: `auto`, `triton` or `reference`; None means the environment variable `TESSEL_KERNELS`.

    Returns:
        `[B, ceil(H / stride), ceil(W / stride), N, E]`. On `triton` the backward is deterministic and has no second
        derivative; it keeps the inputs, the output, one float and the relative logits of each query and head.

    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `backend="triton"` where it cannot run.
    """
    _check(q, kv, height_rel, width_rel, block_size, halo_size, stride)
    q, kv = cast_to_autocast(q), cast_to_autocast(kv)
    reasons = halo_attention_unsupported(q, kv, block_size=block_size, halo_size=halo_size)
    work = workload(q, queries=math.prod(q.shape[:4]), keys=(block_size + 2 * halo_size) ** 2)
    if choose_backend("halo_attention", backend, reasons, work) == "triton":
        rel = reachable_logits(q, height_rel, width_rel, block_size // stride)
        out, _ = _forward_op(q, kv, rel, block_size, halo_size, stride, mask_border)
        return out
    return halo_attention_reference(
        q, kv, height_rel, width_rel, block_size=block_size, halo_size=halo_size, stride=stride, mask_border=mask_border
    )


def halo_attention_unsupported(q: Tensor, kv: Tensor, *, block_size: int, halo_size: int) -> list[str]:
    """Return the reasons why the Triton kernels cannot run on these tensors; empty if they can."""
    reasons = common_unsupported_reasons(q, head_dim=q.shape[-1])
    value_dim, keys = kv.shape[-1] - q.shape[-1], (block_size + 2 * halo_size) ** 2
    if value_dim % 8 or value_dim > 128:
        reasons.append(f"value_dim={value_dim} is not a multiple of 8 up to 128")
    if kv.dtype != q.dtype:
        reasons.append(f"kv.dtype={kv.dtype} is not q.dtype={q.dtype}")
    if keys > MAX_WINDOW_KEYS:
        reasons.append(f"the window of block_size + 2 * halo_size squared has {keys} keys, more than {MAX_WINDOW_KEYS}")
    return reasons


def _check(
    q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, block_size: int, halo_size: int, stride: int
) -> None:
    if block_size < 1 or halo_size < 0 or stride < 1 or block_size % stride:
        raise ValueError(
            f"halo_attention: block_size={block_size} must be at least 1 and divisible by stride={stride}, "
            f"halo_size={halo_size} at least 0"
        )
    if q.dim() != 5 or kv.dim() != 5 or kv.shape[-1] <= q.shape[-1]:
        raise ValueError(
            "halo_attention: q must be [B, ceil(H/stride), ceil(W/stride), heads, D] and kv [B, H, W, heads, D + E], "
            f"got shapes {tuple(q.shape)} and {tuple(kv.shape)}"
        )
    batch, height, width, heads, _ = kv.shape
    expected = (batch, (height + stride - 1) // stride, (width + stride - 1) // stride, heads)
    if q.shape[:4] != expected:
        raise ValueError(
            f"halo_attention: q must be {(*expected, 'D')} for kv of shape={tuple(kv.shape)} and stride={stride}, "
            f"got shape={tuple(q.shape)}"
        )
    table = (2 * (block_size + 2 * halo_size) - 1, q.shape[-1])
    if height_rel.shape != table or width_rel.shape != table:
        raise ValueError(
            f"halo_attention: height_rel and width_rel must be {table} for block_size={block_size}, "
            f"halo_size={halo_size}, got shapes {tuple(height_rel.shape)} and {tuple(width_rel.shape)}"
        )


# In the operators, `rel` is what `reachable_logits` returns.


@torch.library.custom_op("tessel::halo_attention", mutates_args=())
def _forward_op(
    q: Tensor, kv: Tensor, rel: Tensor, block_size: int, halo_size: int, stride: int, mask_border: bool
) -> tuple[Tensor, Tensor]:
    """Return out `[B, Hq, Wq, N, E]` and lse `[B, Hq, Wq, N]`."""
    if not q.numel():
        return _empty_outputs(q, kv, rel, block_size, halo_size, stride, mask_border)
    from .triton import forward

    q, kv, rel = (x.contiguous() for x in (q, kv, rel))
    return forward(q, kv, rel, block_size, halo_size, stride, mask_border)


@_forward_op.register_fake
def _empty_outputs(q, kv, rel, block_size, halo_size, stride, mask_border):
    out = q.new_empty(*q.shape[:4], kv.shape[-1] - q.shape[-1])
    return out, q.new_empty(q.shape[:4], dtype=acc_dtype(q))


@torch.library.custom_op("tessel::halo_attention_backward", mutates_args=())
def _backward_op(
    q: Tensor,
    kv: Tensor,
    rel: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    mask_border: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, kv and rel; `do` is the gradient of out."""
    if not q.numel():
        return _empty_gradients(q, kv, rel, out, lse, do, block_size, halo_size, stride, mask_border)
    from .triton import backward

    q, kv, rel, out, lse, do = (x.contiguous() for x in (q, kv, rel, out, lse, do))
    return backward(q, kv, rel, out, lse, do, block_size, halo_size, stride, mask_border)


@_backward_op.register_fake
def _empty_gradients(q, kv, rel, out, lse, do, block_size, halo_size, stride, mask_border):
    return q.new_empty(q.shape), kv.new_empty(kv.shape), rel.new_empty(rel.shape)


def _save_for_backward(ctx, inputs, output):
    q, kv, rel, *ctx.sizes = inputs
    out, lse = output
    ctx.save_for_backward(q, kv, rel, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zero tensor for lse; a gradient that is zero arrives as None


def _backward(ctx, do, _):
    gradients = (None, None, None) if do is None else _backward_op(*ctx.saved_tensors, do, *ctx.sizes)
    return *gradients, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


def _query_key_pairs(q, block_size: int, halo_size: int) -> int:
    """Number of pairs of a query and a key of its window, over all heads and images."""
    return q[0] * q[1] * q[2] * q[3] * (block_size + 2 * halo_size) ** 2


@register_flop_formula(torch.ops.tessel.halo_attention)
def _forward_flops(q, kv, rel, block_size, halo_size, stride, mask_border, *args, out_shape=None, **kwargs) -> int:
    return 2 * _query_key_pairs(q, block_size, halo_size) * kv[-1]


@register_flop_formula(torch.ops.tessel.halo_attention_backward)
def _backward_flops(
    q, kv, rel, out, lse, do, block_size, halo_size, stride, mask_border, *args, out_shape=None, **kwargs
) -> int:
    # three products over the key dim, two over the value dim
    return 2 * _query_key_pairs(q, block_size, halo_size) * (2 * kv[-1] + q[-1])
