"""torch's fused attention, in parts where the batch is larger than it takes."""

import torch
import torch.nn.functional as F
from torch import Tensor

# the GPU's fused attention launches no more batch entries than this
_MOST_ENTRIES = 65535


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """`softmax(scale * q k^T + bias) v`: `[U, N, L, D], [U, N, M, D], [U, N, M, E] -> [U, N, L, E]`.

    `bias` is `[U, N, L, M]`, or with 1 in place of U; `scale` defaults to D**-0.5. Where windows or regions are the
    batch, U passes what one launch takes.
    """
    # an exported graph should not limit its batch
    if torch.compiler.is_exporting() or q.shape[0] <= _MOST_ENTRIES:
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    parts = []
    for start in range(0, q.shape[0], _MOST_ENTRIES):
        part = slice(start, start + _MOST_ENTRIES)
        own = bias if bias is None or bias.shape[0] == 1 else bias[part]
        parts.append(F.scaled_dot_product_attention(q[part], k[part], v[part], own, scale=scale))
    return torch.cat(parts)
