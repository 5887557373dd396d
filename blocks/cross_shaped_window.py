"""Cross-shaped window attention (CSWin)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels import window_attention
from .explanation import Explanation, Pixel, qkv_attention
from .linear import apply_linear
from .plain import is_plain
from .registry import by_stage, heads, token_mixer


@token_mixer("cross_shaped_window", num_heads=heads(32, step=2), stripe_width=by_stage(1, 2, 7, None))
@register_notrace_module
class CrossShapedWindow(nn.Module):
    """Attention within stripes, half of the heads vertical, half horizontal; `x: [B, C, H, W] -> [B, C, H, W]`.

    One linear layer gives q, k and v. The first half of the channels is divided into stripes of `stripe_width` columns
    and full height, the second half into stripes of `stripe_width` rows and full width. In each stripe w

        y[w] = softmax(q[w] k[w]^T / sqrt(head_dim)) v[w] + lepe(v[w])        result = proj(y)

    where `lepe` is a 3x3 depthwise convolution per direction, zero-padded at the border of each stripe (Dong et al.,
    arXiv 2107.00652, sec. 3.2). With `stripe_width=None` the whole map is one stripe for all heads. If `stripe_width`
    does not divide the map, q, k and v are zero-padded on both sides (an odd row or column at the end); padding is not
    masked, as in the published dense-prediction models.

    Raises ValueError if num_heads does not divide dim, if it is odd and there are two directions, or if
    stripe_width < 1.
    """

    def __init__(self, dim: int, *, num_heads: int, stripe_width: int | None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"CrossShapedWindow: dim={dim} must be divisible by num_heads={num_heads}")
        if stripe_width is not None and num_heads % 2:
            raise ValueError(
                f"CrossShapedWindow: num_heads={num_heads} must be even, half for each direction of stripes; "
                "stripe_width=None has one direction"
            )
        if stripe_width is not None and stripe_width < 1:
            raise ValueError(f"CrossShapedWindow: stripe_width={stripe_width} must be at least 1, or None")
        self.num_heads, self.stripe_width = num_heads, stripe_width
        self.qkv = nn.Linear(dim, 3 * dim)
        directions = 1 if stripe_width is None else 2
        part = dim // directions
        self.lepe: Any = nn.ModuleList(nn.Conv2d(part, part, 3, padding=1, groups=part) for _ in range(directions))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = apply_linear(self.qkv, x.permute(0, 2, 3, 1)).unflatten(-1, (3, self.num_heads, -1))
        windows = self.windows
        if is_plain(*self.lepe):
            lepe = [(conv.weight, conv.bias) for conv in self.lepe]
            y = window_attention(qkv, windows=windows, lepe=lepe).flatten(3)
        else:
            values = qkv[:, :, :, 2].flatten(3).chunk(len(windows), -1)
            parts = [conv_by_window(*part) for part in zip(self.lepe, values, windows, strict=True)]
            y = window_attention(qkv, windows=windows).flatten(3) + torch.cat(parts, -1)
        return apply_linear(self.proj, y).permute(0, 3, 1, 2)

    @property
    def windows(self) -> tuple[tuple[int | None, int | None], ...]:
        """(height, width) of the stripes in each direction, None for the whole side of the map."""
        stripe = self.stripe_width
        return ((None, None),) if stripe is None else ((None, stripe), (stripe, None))

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The attention weights of the query, which are zero outside its stripes; without `lepe`."""
        qkv = apply_linear(self.qkv, x.permute(0, 2, 3, 1)).unflatten(-1, (3, self.num_heads, -1))
        return qkv_attention(lambda qkv: window_attention(qkv, windows=self.windows), qkv, query)


def conv_by_window(conv: nn.Module, x: Tensor, window: tuple[int | None, int | None]) -> Tensor:
    """One call of a 3x3 convolution on `x: [B, H, W, C]` that treats every window as an image of its own.

    `window` is (height, width), None for the whole side of the map; a map that it does not divide is padded on both
    sides, as `window_attention` does.
    """
    height, width = x.shape[1:3]
    win_h, win_w = height if window[0] is None else window[0], width if window[1] is None else window[1]
    below = (height + win_h - 1) // win_h * win_h - height
    right = (width + win_w - 1) // win_w * win_w - width
    top, left = below // 2, right // 2
    x = F.pad(x, (0, 0, left, right - left, top, below - top))
    cells = x.unflatten(2, (-1, win_w)).unflatten(1, (-1, win_h))  # [B, rows, h, cols, w, C]
    # a border of zeros separates the windows
    cells = F.pad(cells, (0, 0, 1, 1, 0, 0, 1, 1))
    y = conv(cells.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    y = y.unflatten(2, (-1, win_w + 2)).unflatten(1, (-1, win_h + 2))[:, :, 1:-1, :, 1:-1]
    return y.flatten(3, 4).flatten(1, 2)[:, top : top + height, left : left + width]
