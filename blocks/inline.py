"""InLine attention: linear attention with weights that sum to 1, and a local filter generated for each image."""

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.precision import acc_dtype, without_autocast
from ..kernels.tables import Grid
from .attentive_convolution import correlate
from .linear import apply_linear
from .registry import heads, token_mixer


@token_mixer("inline", fixed=("local",), num_heads=heads(32))
@register_notrace_module
class InLine(nn.Module):
    """Injective linear attention and a generated 3x3 convolution of v; `x: [B, C, H, W] -> [B, C, H, W]`.

    One linear layer gives q, k and v of N tokens. In each head, with means over all tokens,

        w[i, j] = (q[i] k[j] - q[i] mean(k)) / (N sqrt(head_dim)) + 1 / N        y[i] = sum_j w[i, j] v[j]

    The weights of a query sum to 1 and may be negative. Computed as `y = mean(v) + q M` with the covariance
    `M = (k - mean(k))^T v / (N sqrt(head_dim))`, so the cost is linear in N. The result is

        proj(y + conv(v, filter(mean(source))) + local(v))

    where `filter` generates a 3x3 depthwise filter for each image from the mean of `source`, the input unless another
    map is given, and `local` is an optional module on v (Han et al., arXiv 2412.06590: injective linear attention,
    local attention residual).

    With a class token the mixer is called with tokens `[B, C, 1, 1 + H*W]`, of which the first is the class token, and
    the size (H, W) of the map. The class token counts in N and in all means; the convolution leaves it out.

    Raises ValueError if num_heads does not divide dim.
    """

    def __init__(self, dim: int, *, num_heads: int, local: nn.Module | None = None):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"InLine: dim={dim} must be divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.filter = nn.Sequential(
            nn.Conv2d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv2d(dim, 9 * dim, 1, groups=num_heads)
        )
        self.local = local
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: Grid | None = None, *, source: Tensor | None = None) -> Tensor:
        shape, first = x.shape[2:], 0 if size is None else 1
        qkv = apply_linear(self.qkv, x.permute(0, 2, 3, 1)).flatten(1, 2)  # [B, tokens, 3*C]
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = injective_attention(q, k, v).transpose(1, 2).flatten(2)
        taps = self.filter((x if source is None else source).mean((2, 3), keepdim=True)).flatten(1)
        values = qkv[:, first:].chunk(3, -1)[2].unflatten(1, shape if size is None else size)
        local = correlate(values, taps.unflatten(1, (-1, 9)), 3)
        if self.local is not None:
            local = local + self.local(values.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        local = local.flatten(1, 2)
        y = y + (local if size is None else F.pad(local, (0, 0, 1, 0)))
        return apply_linear(self.proj, y).unflatten(1, shape).permute(0, 3, 1, 2)


def injective_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`mean(v) + q (k - mean(k))^T v / (N sqrt(d))` of `q, k, v: [B, heads, N, d]`; sums are in float32 or wider."""
    with without_autocast(k):
        exact, wide = k.to(acc_dtype(k)), v.to(acc_dtype(k))
        centered, mean = exact - exact.mean(2, keepdim=True), wide.mean(2, keepdim=True)
        covariance = centered.transpose(2, 3) @ wide * k.shape[3] ** -0.5 / k.shape[2]
        return mean.to(q.dtype) + q @ covariance.to(q.dtype)
