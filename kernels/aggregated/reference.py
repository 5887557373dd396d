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
from ..recording import is_open
from ..tables import BiasTable, expand_bias
from .geometry import border_masks, window_side

# The softmax runs over chunks of query rows with about this many weights of pooled keys per image. Per image, not per
# batch: the number of chunks would otherwise depend on the batch size, and an exported graph would serve only one.
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
        q, kv = qkv.split((1, 2), 3)
        # pixels last: sums over a head's channels and shifts within the map then run over contiguous rows
        q = l2_normalize(q.squeeze(3).permute(0, 3, 4, 1, 2).contiguous(), dim=2)  # [B, N, D, H, W]
        k, v = F.pad(kv.permute(3, 0, 4, 5, 1, 2), (window // 2,) * 4).unbind(0)
        k_pooled, v_pooled = pooled.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)  # [B, N, P, D]

        row_mask, column_mask, log_keys = border_masks((height, width), window, k_pooled.shape[2], q.device, q.dtype)
        pixels = q.flatten(3)
        scaled = (pixels + query_embedding.transpose(1, 2)) * (F.softplus(temperature) * log_keys)
        offsets = local_bias.unflatten(1, (window, window))[..., None, None] + row_mask + column_mask
        scores = _window_scores(scaled.view_as(q), l2_normalize(k, dim=2), window) + offsets.flatten(1, 2)
        weights, y = _joint_softmax(scores, scaled.view_as(q), l2_normalize(k_pooled, dim=-1), v_pooled, bias)
        filtered = filters.transpose(1, 2).to(q.dtype) @ pixels + filter_bias.transpose(1, 2)
        weights = weights + filtered.view_as(weights)
        y = _add_window_values(y, weights, v, window)
    return y.permute(0, 3, 4, 1, 2).to(qkv.dtype)


def _window_scores(q: Tensor, k: Tensor, window: int) -> Tensor:
    """q `[B, N, D, H, W]` and keys with a border of window // 2 -> scores `[B, N, K, H, W]`."""
    height, width = q.shape[3:]
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
    if is_open(keys) or is_open(height) or is_open(width):
        return _joint_softmax_of_rows(scores, q, k_pooled, v_pooled, bias)
    step = max(1, CHUNK_WEIGHTS // (heads * keys * width))
    chunks = [
        _joint_softmax_of_rows(scores_c, q_c, k_pooled, v_pooled, (table, rows_c, columns))
        for scores_c, q_c, rows_c in zip(scores.split(step, 3), q.split(step, 3), rows.split(step, 1), strict=True)
    ]
    if len(chunks) == 1:
        return chunks[0]
    weights, y = zip(*chunks, strict=True)
    return torch.cat(weights, 3), torch.cat(y, 3)


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


def _add_window_values(y: Tensor, weights: Tensor, v: Tensor, window: int) -> Tensor:
    """`y + weighted sum of the window's values`, `[B, N, D, H, W]`; `v` has a border of window // 2."""
    height, width = y.shape[3:]
    for o, weight in enumerate(weights.unbind(2)):
        i, j = divmod(o, window)
        y = torch.addcmul(y, weight[:, :, None], v[..., i : i + height, j : j + width])
    return y
