"""Aggregated attention in plain PyTorch: the definition that the Triton kernels are tested against.

Shapes: B images, H x W pixels, N heads of width D, windows of K pixels, P pooled keys in a grid of rows x columns,
L = H * (W + window - 1) queries with the places at the end of each row, whose results are dropped.

With L2norm over the channels of a head, n the number of keys of a query (the pixels of its window inside the map, and
the pooled ones), e the query embedding, t the temperature, r the bias of the window, and w, b its learned filter,

    q^ = L2norm(q),  k^ = L2norm(k)
    A = softmax(softplus(t) ln(n) (q^ + e) [k^_window, k^_pooled]^T + [r, bias])
    y = (A_window + q^ w + b) v_window + A_pooled v_pooled

(Shi, arXiv 2311.17132, "aggregated attention").
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import l2_normalize, without_autocast
from ..recomputing import derivative, recomputed
from ..recording import exporting, is_open, transformed
from ..tables import BiasTable, expand_bias
from ..working_size import working_bytes
from .geometry import border_mask, window_side

# On the CPU the softmax runs over chunks of query rows with about this many weights of pooled keys per image; a number
# per batch would let an exported graph serve only one batch size. Where an image has more weights, the backward
# computes them again, on any device.
CHUNK_WEIGHTS = 1 << 20


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
    """Scores of shifted maps and of pooled keys, then one softmax; arguments as in `aggregated_attention`."""
    height, width = qkv.shape[1:3]
    window = window_side(local_bias.shape[1])
    border = window // 2
    with without_autocast(qkv):
        # pixels last, in one axis: sums over a head's channels and shifts of the map then run over long contiguous
        # rows. Columns of zeros at both sides keep the neighbors of a pixel at fixed distances in that axis; the row
        # that is one more than the border lets the longest shift end within it.
        maps = F.pad(qkv.permute(3, 0, 4, 5, 1, 2), (border, border, border, border + 1)).flatten(4)
        qk, v = maps.split((2, 1))
        q, k = l2_normalize(qk, dim=3).unbind(0)  # [B, N, D, all pixels and the border]
        full = width + 2 * border
        pixels = q.narrow(3, border * full + border, height * full)  # [B, N, D, L]: each row ends with 2 * border zeros
        k_pooled, v_pooled = pooled.flatten(1, 2).permute(2, 0, 3, 1, 4).contiguous().unbind(0)  # [B, N, P, D]

        mask, log_keys = border_mask((height, width), window, k_pooled.shape[2], 2 * border, q.device, q.dtype)
        scaled = (pixels + query_embedding.transpose(1, 2)) * (F.softplus(temperature) * log_keys)
        scores = _window_scores(scaled, k, full, window) + (local_bias[..., None] + mask)
        table, rows, columns = bias
        bias = (table, rows, F.pad(columns, (0, 2 * border)))
        weights, y = _joint_softmax(scores, scaled, l2_normalize(k_pooled, dim=-1), v_pooled, bias)
        weights = _add_filtered(weights, pixels, filters, filter_bias)
        y = _add_window_values(y, weights, v.squeeze(0), full, window)
    return y.unflatten(3, (height, full))[..., :width].permute(0, 3, 4, 1, 2).to(qkv.dtype)


def _images_at_once(q: Tensor, window: int) -> int:
    """Of how many images the products of all shifts are computed by one operation, which saves launches on a GPU."""
    if torch.compiler.is_compiling() or exporting():
        return 0  # a compiler fuses single shifts
    return working_bytes(q.device, cpu=0) // max(1, window**2 * q[:1].nbytes)


def _in_place(q: Tensor) -> bool:
    """Whether single shifts are computed in place, with a backward of their own: on the CPU they stay in the cache."""
    return q.device.type == "cpu" and not (torch.compiler.is_compiling() or exporting() or transformed(q))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _all_shifts(x: Tensor, like: Tensor, full: int, window: int) -> Tensor:
    """All shifts of maps with a border as a view, `[B, N, D, window, window, L]`, with L of `like: [..., L]`."""
    length = like.shape[-1]
    return x.unfold(3, length + window - 1, full).unfold(4, length, 1)[:, :, :, :window]


def _shifts(x: Tensor, length: int, full: int, window: int) -> list[Tensor]:
    """All shifts of maps with a border, each `[B, N, D, length]`, row by row of the window."""
    return [x.narrow(3, i * full + j, length) for i in range(window) for j in range(window)]


def _window_scores(q: Tensor, k: Tensor, full: int, window: int) -> Tensor:
    """q `[B, N, D, L]` and keys with a border, in rows of `full` pixels -> scores `[B, N, K, L]`."""
    if images := _images_at_once(q, window):
        parts = zip(q.split(images), k.split(images), strict=True)
        return _joined([(q[:, :, :, None, None] * _all_shifts(k, q, full, window)).sum(2) for q, k in parts]).flatten(
            2, 3
        )
    if _in_place(q):
        return _WindowScores.apply(q, k, full, window)
    return _scores_by_shift(q, k, full, window)


def _scores_by_shift(q: Tensor, k: Tensor, full: int, window: int) -> Tensor:
    """`_window_scores`, one shift after the other."""
    return torch.stack([(q * k_shifted).sum(2) for k_shifted in _shifts(k, q.shape[3], full, window)], 2)


def _add_window_values(y: Tensor, weights: Tensor, v: Tensor, full: int, window: int) -> Tensor:
    """`y + weighted sum of the window's values`, `[B, N, D, L]`, for values with a border in rows of `full` pixels."""
    if images := _images_at_once(y, window):
        weights = weights.unflatten(2, (window, window))[:, :, None]
        parts = zip(weights.split(images), v.split(images), strict=True)
        return y + _joined([(weight * _all_shifts(v, weight, full, window)).sum((3, 4)) for weight, v in parts])
    if _in_place(y):
        return _AddWindowValues.apply(y, weights, v, full, window)
    return _add_values_by_shift(y, weights, v, full, window)


def _add_values_by_shift(y: Tensor, weights: Tensor, v: Tensor, full: int, window: int) -> Tensor:
    """`_add_window_values`, one shift after the other."""
    for weight, v_shifted in zip(weights.unbind(2), _shifts(v, y.shape[3], full, window), strict=True):
        y = torch.addcmul(y, weight[:, :, None], v_shifted)
    return y


def _products_in_place(q: Tensor, k: Tensor, full: int, window: int) -> Tensor:
    """`_scores_by_shift` without gradients."""
    scores = q.new_empty(*q.shape[:2], window**2, q.shape[3])
    product = torch.empty_like(q)
    for score, k_shifted in zip(scores.unbind(2), _shifts(k, q.shape[3], full, window), strict=True):
        torch.sum(torch.mul(q, k_shifted, out=product), 2, out=score)
    return scores


def _gather_(y: Tensor, weights: Tensor, v: Tensor, full: int, window: int) -> Tensor:
    """`_add_values_by_shift` in place, without gradients."""
    for weight, v_shifted in zip(weights.unbind(2), _shifts(v, y.shape[3], full, window), strict=True):
        y.addcmul_(weight[:, :, None], v_shifted)
    return y


def _scattered(weights: Tensor, x: Tensor, like: Tensor, full: int, window: int) -> Tensor:
    """What `_gather_` does to the gradient x of y: each pixel times its weights, added to the values of its window."""
    out = torch.zeros_like(like, dtype=weights.dtype, memory_format=torch.contiguous_format)
    for weight, shifted in zip(weights.unbind(2), _shifts(out, x.shape[3], full, window), strict=True):
        shifted.addcmul_(weight[:, :, None], x)
    return out


class _WindowScores(torch.autograd.Function):
    """`_scores_by_shift` with a backward that adds up the gradients of all shifts in place."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, full: int, window: int) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.sizes = full, window
        return _products_in_place(q, k, full, window)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            return *derivative(_scores_by_shift, (q, k), ctx.sizes, gradients[0]), None, None
        dq = _gather_(torch.zeros_like(q, memory_format=torch.contiguous_format), gradients[0], k, *ctx.sizes)
        return dq, _scattered(gradients[0], q, k, *ctx.sizes), None, None


class _AddWindowValues(torch.autograd.Function):
    """`_add_values_by_shift` with a backward that adds up the gradients of all shifts in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, v: Tensor, full: int, window: int) -> Tensor:
        ctx.save_for_backward(y, weights, v)
        ctx.sizes = full, window
        # the sum has the type of the weights, at least float32
        return _gather_(y.to(weights.dtype, copy=True), weights, v, full, window)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, weights, v = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *derivative(_add_values_by_shift, (y, weights, v), ctx.sizes, gradients[0]), None, None
        g = gradients[0].contiguous()
        return g, _products_in_place(g, v, *ctx.sizes), _scattered(weights, g, v, *ctx.sizes), None, None


def _joint_softmax(
    scores: Tensor, q: Tensor, k_pooled: Tensor, v_pooled: Tensor, bias: BiasTable
) -> tuple[Tensor, Tensor]:
    """One softmax over the scores of the window `[B, N, K, L]` and of the pooled keys `[B, N, P, D]`.

    Returns the weights of the window `[B, N, K, L]` and the weighted sum of the pooled values `[B, N, D, L]`.
    Works through the rows of the map in chunks, see CHUNK_WEIGHTS; in a graph of open size there is one chunk.
    """
    table, rows, columns = bias
    heads, keys = k_pooled.shape[1:3]
    height, full = rows.shape[1], columns.shape[1]
    if is_open(keys) or is_open(height) or is_open(full) or heads * keys * height * full <= CHUNK_WEIGHTS:
        return _joint_softmax_of_rows(scores, q, k_pooled, v_pooled, bias)
    step = _rows_at_once(q, keys, full)
    parts = (x.split(step * full, 3) for x in (scores, q))
    chunks = []
    for scores_c, q_c, rows_c in zip(*parts, rows.split(step, 1), strict=True):
        weights, y = recomputed(_joint_softmax_of_rows, scores_c, q_c, k_pooled, v_pooled, (table, rows_c, columns))
        chunks.append((weights.contiguous(), y))  # a copy, so that the weights of the pooled keys can be freed
    weights, y = zip(*chunks, strict=True)
    return torch.cat(weights, 3), torch.cat(y, 3)


def _rows_at_once(q: Tensor, keys: int, full: int) -> int:
    weights = q.shape[1] * keys * full  # of one row of an image
    if q.device.type == "cpu" or torch.compiler.is_compiling() or exporting():
        return max(1, CHUNK_WEIGHTS // weights)
    return max(1, working_bytes(q.device, cpu=0) // (q.shape[0] * weights * q.element_size()))


def _joint_softmax_of_rows(
    scores: Tensor, q: Tensor, k_pooled: Tensor, v_pooled: Tensor, bias: BiasTable
) -> tuple[Tensor, Tensor]:
    """`_joint_softmax` of one chunk of query rows; the bias's row index is that of the chunk."""
    pooled_bias = expand_bias(*bias).transpose(2, 3).flatten(3).flatten(1, 2)  # [N, P, L]
    weights = torch.cat([scores, k_pooled @ q + pooled_bias], 2).softmax(2)
    window_weights, pooled_weights = weights.split((scores.shape[2], k_pooled.shape[2]), 2)
    return window_weights, v_pooled.transpose(2, 3) @ pooled_weights.to(v_pooled.dtype)


def _add_filtered(weights: Tensor, pixels: Tensor, filters: Tensor, filter_bias: Tensor) -> Tensor:
    """`weights + q^ w + b`, `[B, N, K, L]`, for the normalized queries `pixels` `[B, N, D, L]`."""
    w = filters.transpose(1, 2).to(pixels.dtype).expand(pixels.shape[0], -1, -1, -1)
    start = weights + filter_bias.transpose(1, 2)
    y = torch.baddbmm(start.flatten(0, 1), w.flatten(0, 1), pixels.flatten(0, 1))
    return y.view_as(weights)
