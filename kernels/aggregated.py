"""Aggregated attention: each pixel attends to its neighbourhood and to a pooled map under one softmax (TransNeXt).

Shapes: B images, H x W pixels, N heads of width D, windows of K pixels, P pooled keys in a grid of rows x columns.

With ^ division by the length per head, n the number of keys of a query (the pixels of its window inside the map, and
the pooled ones), e the query embedding, t the temperature, r the bias of the window and w, b its learned filter,

    A = softmax(softplus(t) ln(n) (q^ + e) [k^, k'^]^T + [r, bias])
    y = (A_window + q^ w + b) v + A_pooled v'

where k, v are those of the window and k', v' the pooled ones (Shi, arXiv 2311.17132, "aggregated attention").

The Triton kernels take prepared operands: the scaled query, normalised keys, and the filters q^ w + b of each pixel.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._launch import autocast, choose_backend, common_reasons, library
from ._precision import unit, without_autocast
from ._tables import BiasTable, Grid, expand, kept

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

# the rows of queries are worked through in groups with about this many weights of pooled keys in each image (not each
# batch: the number of groups would then depend on the batch size, and a program exported for one could serve no other)
_GROUP = 1 << 20

_WIDEST_HEAD = 64  # in the kernels


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
    """Attention of each pixel to its window and to all pooled keys, without a score in memory on `triton`.

    Args:
        qkv: `[B, H, W, 3, N, D]`, the projection's output as it comes.
        pooled: `[B, rows, columns, 2, N, D]`, keys and values of the pooled map.
        bias: a table `[N, n, m]` of the pooled keys' bias with indices `[rows, H]` and `[columns, W]`, each row of
            which ascends in steps of one size: the bias of pixel (y, x) for key (i, j) is
            `table[:, rows[i, y], columns[j, x]]`.
        temperature: `[N, 1, 1]`.
        query_embedding: `[N, 1, D]`.
        local_bias: `[N, K]`, r; the window's pixels are counted row-major.
        filters: `[N, D, K]`, w.
        filter_bias: `[N, 1, K]`, b.
        backend: `auto`, `triton` or `reference`; None takes `TESSEL_KERNELS`.

    Returns:
        `[B, H, W, N, D]`. On `triton` all gradients are deterministic and can be taken once; only that of the table
        needs memory that grows with H*W*P, a working buffer of bounded size.

    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `backend="triton"` where it cannot run.
    """
    window = _check(qkv, pooled, bias, temperature, query_embedding, local_bias, filters, filter_bias)
    qkv, pooled = autocast(qkv), autocast(pooled)
    reasons = aggregated_attention_unsupported(qkv, pooled, window=window)
    chosen = choose_backend("aggregated_attention", backend, reasons)
    body = _prepared if chosen == "triton" else aggregated_attention_reference
    return body(
        qkv,
        pooled,
        bias,
        temperature=temperature,
        query_embedding=query_embedding,
        local_bias=local_bias,
        filters=filters,
        filter_bias=filter_bias,
    )


def aggregated_attention_reference(
    qkv: Tensor,
    pooled: Tensor,
    bias: BiasTable,
    *,
    temperature: Tensor,
    query_embedding: Tensor,
    local_bias: Tensor,
    filters: Tensor,
    filter_bias: Tensor,
) -> Tensor:
    """The definition of `aggregated_attention`: scores of shifted maps and of pooled keys, then one softmax."""
    height, width = qkv.shape[1:3]
    window = _side(local_bias.shape[1])
    with without_autocast(qkv):
        q, kv = qkv.split((1, 2), 3)
        # pixels last: sums over a head's channels and shifts within the map then run over contiguous rows
        q = unit(q.squeeze(3).permute(0, 3, 4, 1, 2).contiguous(), dim=2)  # [B, N, D, H, W]
        k, v = F.pad(kv.permute(3, 0, 4, 5, 1, 2), (window // 2,) * 4).unbind(0)
        k_pooled, v_pooled = pooled.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)  # [B, N, P, D]

        above, left, length = _borders((height, width), window, k_pooled.shape[2], q.device, q.dtype)
        pixels = q.flatten(3)
        scaled = (pixels + query_embedding.mT) * (F.softplus(temperature) * length)
        border = local_bias.unflatten(1, (window, window))[..., None, None] + above + left
        scores = _window_scores(scaled.view_as(q), unit(k, dim=2), window) + border.flatten(1, 2)
        weights, y = _joint_softmax(scores, scaled.view_as(q), unit(k_pooled, dim=-1), v_pooled, bias)
        weights = weights + (filters.mT.to(q.dtype) @ pixels + filter_bias.mT).view_as(weights)
        y = _add_window_values(y, weights, v, window)
    return y.permute(0, 3, 4, 1, 2).to(qkv.dtype)


def aggregated_attention_unsupported(qkv: Tensor, pooled: Tensor, *, window: int) -> list[str]:
    """Why the Triton kernels cannot serve these tensors; empty where they can."""
    head_dim = qkv.shape[-1]
    reasons = common_reasons(qkv, head_dim=head_dim)
    if _WIDEST_HEAD < head_dim <= 128:
        reasons.append(f"head_dim={head_dim} is above {_WIDEST_HEAD}")
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
    """The side of the window, once every shape is known to fit."""
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
    window = _side(keys)
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


def _side(keys: int) -> int:
    """Side of a window of so many pixels: the smallest odd number whose square reaches them."""
    side = 1
    while side**2 < keys:  # the square root of a size that a tracer keeps symbolic would break its graph
        side += 2
    return side


@kept
def _borders(size: Grid, window: int, pooled: int, device: torch.device, dtype: torch.dtype):
    """Where windows leave the map, and the scale of each query.

    Masks of rows `[window, 1, H, 1]` and of columns `[window, 1, W]`, 0 inside and -inf outside, and
    ln(number of keys) `[H*W]`.
    """
    inside = []
    for side in size:
        position = torch.arange(side, device=device) + torch.arange(window, device=device)[:, None] - window // 2
        inside.append((position >= 0) & (position < side))
    rows, columns = (torch.zeros(i.shape, device=device, dtype=dtype).masked_fill(~i, -torch.inf) for i in inside)
    keys = inside[0].sum(0)[:, None] * inside[1].sum(0) + pooled
    return rows[:, None, :, None], columns[:, None], keys.to(dtype).log().flatten()


def _window_scores(q: Tensor, k: Tensor, window: int) -> Tensor:
    """`[B, N, D, H, W]` and the keys with a border of window // 2 -> `[B, N, K, H, W]`."""
    height, width = q.shape[3:]
    shifted = [k[..., i : i + height, j : j + width] for i in range(window) for j in range(window)]
    return torch.stack([(q * k_o).sum(2) for k_o in shifted], 2)


def _joint_softmax(
    scores: Tensor, q: Tensor, k_pooled: Tensor, v_pooled: Tensor, bias: BiasTable
) -> tuple[Tensor, Tensor]:
    """One softmax over the scores of the window `[B, N, K, H, W]` and of the pooled keys `[B, N, P, D]`.

    Returns the weights of the window `[B, N, K, H, W]` and the weighted sum of the pooled values `[B, N, D, H, W]`.
    """
    table, rows, columns = bias
    size, grid = q.shape[3:], (rows.shape[0], columns.shape[0])
    batch, heads, keys = k_pooled.shape[:3]
    step = max(1, _GROUP // (heads * keys * size[1]))
    near, far = [], []
    for part, q_part, rows_part in zip(scores.split(step, 3), q.split(step, 3), rows.split(step, 1), strict=True):
        pooled = (k_pooled @ q_part.flatten(3)).view(batch, heads, *grid, *part.shape[3:])
        pooled = pooled + expand(table, rows_part, columns).transpose(2, 3)
        weights = torch.cat([part, pooled.flatten(2, 3)], 2).softmax(2)
        part, pooled = weights.split((part.shape[2], keys), 2)
        near.append(part)
        far.append((v_pooled.mT @ pooled.flatten(3).to(v_pooled.dtype)).unflatten(3, part.shape[3:]))
    return (near[0], far[0]) if len(near) == 1 else (torch.cat(near, 3), torch.cat(far, 3))


def _add_window_values(y: Tensor, weights: Tensor, v: Tensor, window: int) -> Tensor:
    """`y + weighted sum of the window's values`, `[B, N, D, H, W]`; `v` has a border of window // 2."""
    height, width = y.shape[3:]
    for o, weight in enumerate(weights.unbind(2)):
        i, j = divmod(o, window)
        y = torch.addcmul(y, weight[:, :, None], v[..., i : i + height, j : j + width])
    return y


class Operands(NamedTuple):
    """What the kernels take. In the type of qkv unless said otherwise; the biases are in at least float32."""

    query: Tensor  # [B, H, W, N, D], normalised, embedded and scaled
    key: Tensor  # [B, H, W, N, D], normalised
    value: Tensor  # [B, H, W, N, D], a part of qkv
    filters: Tensor  # [N, 9, B, H, W], what each pixel adds to the weights of its window
    pooled_key: Tensor  # [B, P, N, D], normalised
    pooled_value: Tensor  # [B, P, N, D]
    local_bias: Tensor  # [N, 9]
    table: Tensor  # [N, n, m]
    rows: Tensor  # [rows, H], int64
    columns: Tensor  # [columns, W], int64


def _prepared(
    qkv: Tensor,
    pooled: Tensor,
    bias: BiasTable,
    *,
    temperature: Tensor,
    query_embedding: Tensor,
    local_bias: Tensor,
    filters: Tensor,
    filter_bias: Tensor,
) -> Tensor:
    """The kernels on operands prepared pixel by pixel in at least float32, which a compiler fuses."""
    batch, height, width, _, heads, head_dim = qkv.shape
    dtype = qkv.dtype
    with without_autocast(qkv):
        q, k, v = qkv.unbind(3)
        pooled_key, pooled_value = pooled.flatten(1, 2).unbind(2)
        q = unit(q, dim=-1)
        *_, length = _borders((height, width), 3, pooled_key.shape[1], q.device, q.dtype)
        scale = F.softplus(temperature).view(heads, 1) * length.view(height, width, 1, 1)
        query = (q + query_embedding.view(heads, head_dim)) * scale
        # filters first, pixels last: a product of the map as it lies, and the kernels read runs of pixels
        pixels = q.to(dtype).flatten(0, 2).permute(1, 2, 0)  # [N, D, B*H*W]
        extra = torch.baddbmm(filter_bias.mT.to(dtype), filters.mT.to(dtype), pixels)
        table, rows, columns = bias
        operands = Operands(
            query.to(dtype),
            unit(k, dim=-1).to(dtype),
            v,
            extra.view(heads, 9, batch, height, width),
            unit(pooled_key, dim=-1).to(dtype),
            pooled_value,
            local_bias.to(q.dtype),
            table.to(q.dtype),
            rows,
            columns,
        )
        return _AggregatedAttention.apply(*operands)


_OPERANDS = ", ".join(f"Tensor {name}" for name in Operands._fields)
library.define(f"aggregated_attention({_OPERANDS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
library.define(
    f"aggregated_attention_backward({_OPERANDS}, Tensor lse, Tensor grad)"
    f" -> ({', '.join(['Tensor'] * (len(Operands._fields) - 2))})",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(*operands):
    if operands[0].numel() == 0:
        return _forward_fake(*operands)
    from .aggregated_triton import forward

    return forward(Operands(*operands))


def _backward(*arguments):
    *operands, lse, grad = arguments
    if grad.numel() == 0:
        return tuple(torch.zeros_like(x) for x in operands[:-2])
    from .aggregated_triton import backward

    return backward(Operands(*operands), lse, grad)


def _forward_fake(*operands):
    query, local_bias = operands[0], operands[6]
    return query.new_empty(query.shape), local_bias.new_empty(query.shape[:4])


def _backward_fake(*arguments):
    return tuple(x.new_empty(x.shape) for x in arguments[:-4])


library.impl("aggregated_attention", _forward, "CompositeExplicitAutograd")
library.impl("aggregated_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("tessel::aggregated_attention", _forward_fake, lib=library)
torch.library.register_fake("tessel::aggregated_attention_backward", _backward_fake, lib=library)


class _AggregatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *operands):
        out, lse = torch.ops.tessel.aggregated_attention(*operands)
        # the result is not needed: it holds the filters' part, which the softmax knows nothing of
        ctx.save_for_backward(*operands, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *torch.ops.tessel.aggregated_attention_backward(*ctx.saved_tensors, grad), None, None


@register_flop_formula(torch.ops.tessel.aggregated_attention)
def _forward_flops(query, key, value, filters, pooled_key, *args, out_shape=None, **kwargs) -> int:
    batch, height, width, heads, head_dim = query
    return 4 * batch * height * width * heads * head_dim * (9 + pooled_key[1])


@register_flop_formula(torch.ops.tessel.aggregated_attention_backward)
def _backward_flops(query, key, value, filters, pooled_key, *args, out_shape=None, **kwargs) -> int:
    # five products of the same size, where the forward has two
    return 5 * _forward_flops(query, key, value, filters, pooled_key) // 2
