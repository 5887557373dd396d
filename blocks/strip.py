"""Strip self-attention (S2AFormer)."""

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.sdpa import fused_attention
from .padding import pad_to_multiple


@register_notrace_module
class Strip(nn.Module):
    """Attention with narrow queries and keys, to a downsampled map; `x: [B, C, H, W] -> [B, C, H, W]`.

    With x' = norm(depthwise convolution of x, kernel and stride `reduction`), x' = x if `reduction` is 1,

        y = proj(softmax(q(x) k(x')^T / sqrt(qk_dim)) v(x'))

    where each head of q and k has `qk_dim` channels, by default one, and each head of v has dim / num_heads (Xu et al.,
    arXiv 2505.22195, strip self-attention; the paper does not state qk_dim). If `reduction` does not divide H or W, the
    map is zero-padded at the bottom and right before the convolution; padding is not masked.

    Raises ValueError if num_heads does not divide dim, or qk_dim is not within 1..dim / num_heads.
    """

    def __init__(self, dim: int, *, num_heads: int, reduction: int = 1, qk_dim: int = 1):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Strip: dim={dim} must be divisible by num_heads={num_heads}")
        if not 1 <= qk_dim <= dim // num_heads:
            raise ValueError(f"Strip: qk_dim={qk_dim} must lie in 1..dim / num_heads={dim // num_heads}")
        if reduction < 1:
            raise ValueError(f"Strip: reduction={reduction} must be at least 1")
        self.num_heads, self.reduction, self.qk_dim = num_heads, reduction, qk_dim
        self.reduce = nn.Identity()
        if reduction > 1:
            self.reduce = nn.Sequential()
            self.reduce.add_module("conv", nn.Conv2d(dim, dim, reduction, reduction, groups=dim, bias=False))
            self.reduce.add_module("norm", nn.BatchNorm2d(dim))
        self.q = nn.Linear(dim, num_heads * qk_dim)
        self.k = nn.Linear(dim, num_heads * qk_dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        x = x.permute(0, 2, 3, 1)
        padded = pad_to_multiple(x, self.reduction, self.reduction)
        reduced = self.reduce(padded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = strip_attention(*(self._heads(t) for t in (self.q(x), self.k(reduced), self.v(reduced))))
        return self.proj(y.transpose(1, 2).flatten(2).unflatten(1, size)).permute(0, 3, 1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, H, W, heads * D] -> [B, heads, H*W, D]`."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def strip_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, N, L, d]`, `[B, N, M, d]`, `[B, N, M, D]` -> `[B, N, L, D]` with logits scaled by d**-0.5.

    Fused attention needs q, k and v of one width, so q and k are zero-padded to D, which does not change the logits.
    """
    narrow, width = q.shape[-1], v.shape[-1]
    q, k = (F.pad(t, (0, width - narrow)) for t in (q, k))
    return fused_attention(q, k, v, scale=narrow**-0.5)
