"""HiLo attention (LITv2): some heads attend within small windows, the others to an average-pooled map."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels import window_attention
from ..kernels.recording import crop
from ..kernels.sdpa import fused_attention
from .explanation import Explanation, Pixel, attention, gradient_at, spread
from .linear import apply_linear
from .padding import pad_to_multiple
from .registry import by_stage, heads, token_mixer


@token_mixer("hilo", num_heads=heads(32), window=by_stage(2, 2, 2, 1), alpha=0.9)
@register_notrace_module
class HiLo(nn.Module):
    """Window attention in Hi-Fi heads, attention to a pooled map in Lo-Fi heads; `x: [B, C, H, W] -> [B, C, H, W]`.

    Of n = num_heads heads of width C / n, int(n * alpha) are Lo-Fi (`l_*`), the others are Hi-Fi (`h_*`):

        y = concat(h_proj(windowed(h_qkv(x))), l_proj(attention(l_q(x), l_kv(pool(x)))))

    `windowed` is attention within windows of window x window tokens, `pool` the average over these windows. With
    window 1 all heads are Lo-Fi, which then is full attention (Pan, Cai, Zhuang, arXiv 2205.13213, sec. 4). If `window`
    does not divide H or W, the map is zero-padded at the bottom and right before the linear layers; padding is not
    masked, as in the published dense-prediction models.

    Raises ValueError if num_heads does not divide dim, window is below 1, or alpha is outside [0, 1].
    """

    def __init__(self, dim: int, *, num_heads: int, window: int = 2, alpha: float = 0.5):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"HiLo: dim={dim} must be divisible by num_heads={num_heads}")
        if window < 1:
            raise ValueError(f"HiLo: window={window} must be at least 1 (1: full attention)")
        if not 0 <= alpha <= 1:
            raise ValueError(f"HiLo: alpha={alpha}, the fraction of Lo-Fi heads, must lie in 0..1")
        self.window, self.head_dim = window, dim // num_heads
        self.low_heads = num_heads if window == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        low, high = self.low_heads * self.head_dim, self.high_heads * self.head_dim
        if high:
            self.h_qkv = nn.Linear(dim, 3 * high)
            self.h_proj = nn.Linear(high, high)
        if low:
            self.l_q = nn.Linear(dim, low)
            self.l_kv = nn.Linear(dim, 2 * low)
            self.l_proj = nn.Linear(low, low)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        padded = pad_to_multiple(x, self.window, self.window) if self.window > 1 else x
        branches = [self._high(x, padded)] if self.high_heads else []
        if self.low_heads:
            branches.append(self._low(x, padded))
        y = branches[0] if len(branches) == 1 else torch.cat(branches, -1)
        return y.permute(0, 3, 1, 2)

    def _high(self, x: Tensor, padded: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        return apply_linear(self.h_proj, crop(windowed(self._high_qkv(padded), self.window), height, width).flatten(3))

    def _high_qkv(self, padded: Tensor) -> Tensor:
        return apply_linear(self.h_qkv, padded).unflatten(-1, (3, self.high_heads, self.head_dim))

    def _low(self, x: Tensor, padded: Tensor) -> Tensor:
        return apply_linear(self.l_proj, low_attention(*self._low_q_kv(x, padded)).flatten(3))

    def _low_q_kv(self, x: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
        # no queries for the padding, whose outputs would be cropped
        q = apply_linear(self.l_q, x).unflatten(-1, (self.low_heads, self.head_dim))
        pooled = self._pool(padded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return q, apply_linear(self.l_kv, pooled).unflatten(-1, (2, self.low_heads, self.head_dim))

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.window) if self.window > 1 else x

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The attention weights of the query; those of a pooled position are divided among the positions in it."""
        x = x.permute(0, 2, 3, 1)
        padded = pad_to_multiple(x, self.window, self.window)
        weights = []
        if self.high_heads:
            qkv = self._high_qkv(padded)
            weights.append(gradient_at(lambda qkv: windowed(qkv, self.window), qkv, query)[:, :, :, 2])
        if self.low_heads:
            q, kv = self._low_q_kv(x, padded)
            pooled = gradient_at(lambda kv: low_attention(q, kv), kv, query)[:, :, :, 1]
            weights.append(spread(pooled, self._pool, padded.permute(0, 3, 1, 2)))
        return attention(crop(torch.cat(weights, 3), *x.shape[1:3]))


def low_attention(q: Tensor, kv: Tensor) -> Tensor:
    """Attention of a map to a pooled map: `[B, H, W, n, d]`, `[B, h, w, 2, n, d] -> [B, H, W, n, d]`."""
    k, v = kv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
    y = fused_attention(q.flatten(1, 2).transpose(1, 2), k, v)
    return y.transpose(1, 2).unflatten(1, q.shape[1:3])


def windowed(qkv: Tensor, window: int) -> Tensor:
    """Attention within windows of window x window tokens: `[B, H, W, 3, n, d] -> [B, H, W, n, d]`.

    `window` must divide H and W.
    """
    # heads and channels as one axis: XNNPACK (ExecuTorch) has at most 6 axes
    cells = qkv.flatten(3).unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
    y = window_attention(cells.flatten(0, 2).unflatten(-1, qkv.shape[3:]), windows=((window, window),))
    y = y.flatten(3).unflatten(0, cells.shape[:3]).transpose(2, 3)  # [B, rows, h, cols, w, n*d]
    return y.flatten(3, 4).flatten(1, 2).unflatten(-1, qkv.shape[4:])
