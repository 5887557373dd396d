"""Strip self-attention (S2AFormer)."""

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.recording import crop
from ..kernels.sdpa import fused_attention
from .explanation import Explanation, Pixel, attention, gradient_at, spread
from .linear import apply_linear
from .padding import pad_to_multiple
from .registry import by_stage, heads, token_mixer


@token_mixer("strip", num_heads=heads(32), reduction=by_stage(8, 4, 2, 1))
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
        return apply_linear(self.proj, self.attend(*self.project(x)).flatten(3)).permute(0, 3, 1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, C, H, W]` to q `[B, H, W, heads, qk_dim]`, and k and v of the downsampled map."""
        x = x.permute(0, 2, 3, 1)
        padded = pad_to_multiple(x, self.reduction, self.reduction)
        reduced = self.reduce(padded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        layers = ((self.q, x), (self.k, reduced), (self.v, reduced))
        q, k, v = (apply_linear(layer, t).unflatten(-1, (self.num_heads, -1)) for layer, t in layers)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The values that the queries attend to, `[B, H, W, heads, dim / heads]`."""
        y = strip_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)))
        return y.transpose(1, 2).unflatten(1, q.shape[1:3])

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The attention weights of the query; those of a downsampled position are divided among the positions in it."""
        q, k, v = self.project(x)
        reduced = gradient_at(lambda v: self.attend(q, k, v), v, query)
        padded = pad_to_multiple(x.permute(0, 2, 3, 1), self.reduction, self.reduction).permute(0, 3, 1, 2)
        weights = spread(reduced, lambda x: F.avg_pool2d(x, self.reduction), padded)
        return attention(crop(weights, *x.shape[2:]))


def strip_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, N, L, d]`, `[B, N, M, d]`, `[B, N, M, D]` -> `[B, N, L, D]` with logits scaled by d**-0.5.

    Fused attention needs q, k and v of one width, so q and k are zero-padded to D, which does not change the logits.
    """
    narrow, width = q.shape[-1], v.shape[-1]
    q, k = (F.pad(t, (0, width - narrow)) for t in (q, k))
    return fused_attention(q, k, v, scale=narrow**-0.5)
