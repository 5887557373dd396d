"""The operands of the Triton kernels: the scaled query, normalized keys, and the filters q^ w + b of each pixel."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import l2_normalize
from ..tables import BiasTable
from .geometry import border_mask


class Operands(NamedTuple):
    """Inputs of the operator. All have the dtype of qkv, except the biases, which have at least float32."""

    query: Tensor  # [B, H, W, N, D], normalized, embedded and scaled
    key: Tensor  # [B, H, W, N, D], normalized
    value: Tensor  # [B, H, W, N, D], a part of qkv
    filters: Tensor  # [N, 9, B, H, W], what each pixel adds to the weights of its window after the softmax
    pooled_key: Tensor  # [B, P, N, D], normalized
    pooled_value: Tensor  # [B, P, N, D]
    local_bias: Tensor  # [N, 9]
    table: Tensor  # [N, n, m]
    rows: Tensor  # [rows, H], int64
    columns: Tensor  # [columns, W], int64


# gradients of the operands, in their order, without rows and columns
OperandGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def prepare_operands(
    qkv: Tensor,
    pooled: Tensor,
    bias: BiasTable,
    *,
    temperature: Tensor,
    query_embedding: Tensor,
    local_bias: Tensor,
    filters: Tensor,
    filter_bias: Tensor,
) -> Operands:
    """Compute the operands in at least float32, pixel by pixel, so that a compiler can fuse it; call without autocast.

    The arguments are those of `aggregated_attention`, with a window of 3 x 3.
    """
    batch, height, width, _, heads, head_dim = qkv.shape
    dtype = qkv.dtype
    q, k, v = qkv.unbind(3)
    pooled_key, pooled_value = pooled.flatten(1, 2).unbind(2)
    q = l2_normalize(q, dim=-1)
    _, log_keys = border_mask((height, width), 3, pooled_key.shape[1], q.device, q.dtype)
    scale = F.softplus(temperature).view(heads, 1) * log_keys.view(height, width, 1, 1)
    query = (q + query_embedding.view(heads, head_dim)) * scale
    # filters first, pixels last: the product needs no copy of the map, and the kernels read runs of pixels
    pixels = q.to(dtype).flatten(0, 2).permute(1, 2, 0)  # [N, D, B*H*W]
    pixel_filters = torch.baddbmm(filter_bias.mT.to(dtype), filters.mT.to(dtype), pixels)
    table, rows, columns = bias
    return Operands(
        query.to(dtype),
        l2_normalize(k, dim=-1).to(dtype),
        v,
        pixel_filters.view(heads, 9, batch, height, width),
        l2_normalize(pooled_key, dim=-1).to(dtype),
        pooled_value,
        local_bias.to(q.dtype),
        table.to(q.dtype),
        rows,
        columns,
    )
