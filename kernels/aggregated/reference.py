"""Aggregated attention in plain PyTorch: the definition that the Triton kernels are tested against.

Shapes: B images, H x W pixels, N heads of width D, windows of K pixels, P pooled keys in a grid of rows x columns.

With L2norm over the channels of a head, n the number of keys of a query (the pixels of its window inside the map, and
the pooled ones), e the query embedding, t the temperature, r the bias of the window, and w, b its learned filter,

    q^ = L2norm(q),  k^ = L2norm(k)
    A = softmax(softplus(t) ln(n) (q^ + e) [k^_window, k^_pooled]^T + [r, bias])
    y = (A_window + q^ w + b) v_window + A_pooled v_pooled

(Shi, arXiv 2311.17132, "aggregated attention").
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import l2_normalize, without_autocast
from ..recomputing import recomputed
from ..recording import exporting, is_open
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
    with without_autocast(qkv):
        # pixels last: sums over a head's channels and shifts within the map then run over contiguous rows
        qk, v = qkv.permute(3, 0, 4, 5, 1, 2).split((2, 1))
        q, k = l2_normalize(qk.contiguous(), dim=3).unbind(0)  # [B, N, D, H, W]
        k, v = (F.pad(x, (window // 2,) * 4) for x in (k, v.squeeze(0)))
        k_pooled, v_pooled = pooled.flatten(1, 2).permute(2, 0, 3, 1, 4).contiguous().unbind(0)  # [B, N, P, D]

        mask, log_keys = border_mask((height, width), window, k_pooled.shape[2], q.device, q.dtype)
        pixels = q.flatten(3)
        scaled = (pixels + query_embedding.transpose(1, 2)) * (F.softplus(temperature) * log_keys)
        scores = _window_scores(scaled.view_as(q), k, window) + (local_bias[..., None, None] + mask)
        weights, y = _joint_softmax(scores, scaled.view_as(q), l2_normalize(k_pooled, dim=-1), v_pooled, bias)
        weights = _add_filtered(weights, pixels, filters, filter_bias)
        y = _add_window_values(y, weights, v, window)
    return y.permute(0, 3, 4, 1, 2).to(qkv.dtype)


def _shifts_at_once(q: Tensor, window: int) -> bool:
    """Whether the products of all shifts of the map are computed by one operation.

    On a GPU that saves launches. On the CPU single shifts stay in the cache, and a compiler fuses them.
    """
    if torch.compiler.is_compiling() or exporting():
        return False
    return window**2 * q.nbytes <= working_bytes(q.device, cpu=0)


def _shifted(x: Tensor, height: int, width: int) -> Tensor:
    """All shifts of maps with a border `[B, N, D, ...]` as a view, `[B, N, D, window, window, height, width]`."""
    return x.unfold(3, height, 1).unfold(4, width, 1)


def _window_scores(q: Tensor, k: Tensor, window: int) -> Tensor:
    """q `[B, N, D, H, W]` and keys with a border of window // 2 -> scores `[B, N, K, H, W]`."""
    height, width = q.shape[3:]
    if _shifts_at_once(q, window):
        return (q[:, :, :, None, None] * _shifted(k, height, width)).sum(2).flatten(2, 3)
    shifted = [k[..., i : i + height, j : j + width] for i in range(window) for j in range(window)]
    return torch.stack([(q * k_shifted).sum(2) for k_shifted in shifted], 2)


def _joint_softmax(
    scores: Tensor, q: Tensor, k_pooled: Tensor, v_pooled: Tensor, bias: BiasTable
) -> tuple[Tensor, Tensor]:
    """One softmax over the scores of the window `[B, N, K, H, W]` and of the pooled keys `[B, N, P, D]`.

    Returns the weights of the window `[B, N, K, H, W]` and the weighted sum of the pooled values `[B, N, D, H, W]`.
    Works through the rows of the map in chunks, see CHUNK_WEIGHTS; in a graph of open size there is one chunk.
    """
    table, rows, columns = bias
    heads, keys = k_pooled.shape[1:3]
    height, width = q.shape[3:]
    if is_open(keys) or is_open(height) or is_open(width) or heads * keys * height * width <= CHUNK_WEIGHTS:
        return _joint_softmax_of_rows(scores, q, k_pooled, v_pooled, bias)
    step = _rows_at_once(q, keys)
    chunks = []
    for scores_c, q_c, rows_c in zip(scores.split(step, 3), q.split(step, 3), rows.split(step, 1), strict=True):
        weights, y = recomputed(_joint_softmax_of_rows, scores_c, q_c, k_pooled, v_pooled, (table, rows_c, columns))
        chunks.append((weights.contiguous(), y))  # a copy, so that the weights of the pooled keys can be freed
    weights, y = zip(*chunks, strict=True)
    return torch.cat(weights, 3), torch.cat(y, 3)


def _rows_at_once(q: Tensor, keys: int) -> int:
    batch, heads, _, _, width = q.shape
    weights = heads * keys * width  # of one row of an image
    if q.device.type == "cpu" or torch.compiler.is_compiling() or exporting():
        return max(1, CHUNK_WEIGHTS // weights)
    return max(1, working_bytes(q.device, cpu=0) // (batch * weights * q.element_size()))


def _joint_softmax_of_rows(
    scores: Tensor, q: Tensor, k_pooled: Tensor, v_pooled: Tensor, bias: BiasTable
) -> tuple[Tensor, Tensor]:
    """`_joint_softmax` of one chunk of query rows; the bias's row index is that of the chunk."""
    _, rows, columns = bias
    size, grid = q.shape[3:], (rows.shape[0], columns.shape[0])
    pooled_scores = (k_pooled @ q.flatten(3)).unflatten(3, size).unflatten(2, grid)
    pooled_scores = pooled_scores + expand_bias(*bias).transpose(2, 3)  # [B, N, rows, columns, H, W]
    weights = torch.cat([scores, pooled_scores.flatten(2, 3)], 2).softmax(2)
    window_weights, pooled_weights = weights.split((scores.shape[2], k_pooled.shape[2]), 2)
    y = v_pooled.transpose(2, 3) @ pooled_weights.flatten(3).to(v_pooled.dtype)
    return window_weights, y.unflatten(3, size)


def _add_filtered(weights: Tensor, pixels: Tensor, filters: Tensor, filter_bias: Tensor) -> Tensor:
    """`weights + q^ w + b`, `[B, N, K, H, W]`, for the normalized queries `pixels` `[B, N, D, H * W]`."""
    w = filters.transpose(1, 2).to(pixels.dtype).expand(pixels.shape[0], -1, -1, -1)
    start = (weights + filter_bias[..., None].transpose(1, 2)).flatten(3)
    y = torch.baddbmm(start.flatten(0, 1), w.flatten(0, 1), pixels.flatten(0, 1))
    return y.view_as(weights)


def _add_window_values(y: Tensor, weights: Tensor, v: Tensor, window: int) -> Tensor:
    """`y + weighted sum of the window's values`, `[B, N, D, H, W]`; `v` has a border of window // 2."""
    height, width = y.shape[3:]
    if _shifts_at_once(y, window):
        weights = weights.unflatten(2, (window, window))[:, :, None]
        return y + (weights * _shifted(v, height, width)).sum((3, 4))
    for o, weight in enumerate(weights.unbind(2)):
        i, j = divmod(o, window)
        y = torch.addcmul(y, weight[:, :, None], v[..., i : i + height, j : j + width])
    return y
