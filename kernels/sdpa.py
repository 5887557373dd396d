"""`F.scaled_dot_product_attention` for batches that are larger than one launch on a GPU allows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .recording import exporting

# CUDA limits a grid axis to 65,535 blocks, and the fused kernels put the batch on such an axis
MAX_BATCH = 65535


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """`softmax(scale * q k^T + bias) v`, split along the batch where it exceeds `MAX_BATCH`.

    The batch is large when windows or regions are the batch entries.

    Args:
        q: `[U, N, L, D]`.
        k: `[U, N, M, D]`.
        v: `[U, N, M, E]`.
        bias: `[U, N, L, M]` or `[1, N, L, M]`.
        scale: factor of the logits; None means `D**-0.5`.

    Returns:
        `[U, N, L, E]`.
    """
    # an exported graph must not fix the number of launches, that is, its batch size
    if exporting() or q.shape[0] <= MAX_BATCH:
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    outputs = []
    for start in range(0, q.shape[0], MAX_BATCH):
        chunk = slice(start, start + MAX_BATCH)
        chunk_bias = bias if bias is None or bias.shape[0] == 1 else bias[chunk]
        outputs.append(F.scaled_dot_product_attention(q[chunk], k[chunk], v[chunk], chunk_bias, scale=scale))
    return torch.cat(outputs)
