"""Attention by `F.scaled_dot_product_attention`, or by matrix products and a softmax where those take less time.

They take less time on the CPU in two cases: for few keys, and for a bias that is learned. A batch that is too large for
one launch on a GPU is split.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import acc_dtype, autocast_dtype
from .recording import exporting, transformed

# CUDA limits a grid axis to 65,535 blocks, and the fused kernels put the batch on such an axis
MAX_BATCH = 65535

# with so many keys or fewer, PyTorch's fused attention on the CPU takes longer than two products and a softmax: seven
# times as long with 9 keys, 1.2 times with 49
FEW_KEYS = 64
# the scores of several images may take so many bytes on the CPU, which fit into the cache
_SCORES = 1 << 20


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
    if bias is not None and _takes_products(q, bias):
        return _attention_with_learned_bias(q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale)
    # an exported graph must not fix the number of launches, that is, its batch size
    if exporting() or q.shape[0] <= MAX_BATCH:
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    outputs = []
    for start in range(0, q.shape[0], MAX_BATCH):
        chunk = slice(start, start + MAX_BATCH)
        chunk_bias = bias if bias is None or bias.shape[0] == 1 else bias[chunk]
        outputs.append(F.scaled_dot_product_attention(q[chunk], k[chunk], v[chunk], chunk_bias, scale=scale))
    return torch.cat(outputs)


def _takes_products(q: Tensor, bias: Tensor) -> bool:
    """Whether the bias is learned on the CPU, in single or double precision.

    In half precision PyTorch's function is more exact, since it keeps the scores in single precision.
    """
    return (
        q.device.type == "cpu"
        and bias.requires_grad
        and torch.is_grad_enabled()
        and acc_dtype(q) == q.dtype == autocast_dtype(q)
        and not exporting()
        and not transformed(bias)
    )


def _attention_with_learned_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    # PyTorch has no fused kernel for this on the CPU. It also computes products, and takes longer, because it searches
    # for rows in which every key is masked.
    scores = (q * scale) @ k.transpose(2, 3)
    scores += bias
    return scores.softmax(3) @ v


def attention_to_few(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(D) + bias^T) v` for many queries and a number of keys that is the same for all maps.

    Args:
        q: `[U, N, L, D]`.
        k: `[U, N, M, D]`.
        v: `[U, N, M, E]`.
        bias: `[1, N, M, L]`, the keys first.

    Returns:
        `[U, N, L, E]`.
    """
    if q.device.type != "cpu" or exporting() or k.shape[2] > FEW_KEYS:
        return fused_attention(q, k, v, bias.transpose(2, 3))
    if torch.compiler.is_compiling() or q.shape[0] <= (images := max(1, _SCORES // bias.nbytes)):
        return _attention_in_products(q, k, v, bias)
    parts = zip(q.split(images), k.split(images), v.split(images), strict=True)
    return torch.cat([_attention_in_products(*part, bias) for part in parts])


def _attention_in_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    # with the keys first, every step runs along the queries
    scores = (k * k.shape[3] ** -0.5) @ q.transpose(2, 3) + bias
    return scores.softmax(2, dtype=acc_dtype(scores)).to(v.dtype).transpose(2, 3) @ v
