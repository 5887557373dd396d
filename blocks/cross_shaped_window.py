"""Cross-shaped window attention (CSWin)."""

from typing import Any

from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels import window_attention


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
        qkv = self.qkv(x.permute(0, 2, 3, 1)).unflatten(-1, (3, self.num_heads, -1))
        (height, width), stripe = x.shape[2:], self.stripe_width
        windows = ((height, width),) if stripe is None else ((height, stripe), (stripe, width))
        y = window_attention(qkv, windows=windows, lepe=[(conv.weight, conv.bias) for conv in self.lepe])
        return self.proj(y.flatten(3)).permute(0, 3, 1, 2)
