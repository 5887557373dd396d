"""Cross-shaped window attention (CSWin)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn


@register_notrace_module
class CrossShapedWindow(nn.Module):
    """Half of the heads attend within vertical stripes, half within horizontal; `x: [B, C, H, W] -> [B, C, H, W]`.

    With q, k, v the thirds of one linear map, each stripe w of `stripe_width` columns (first half of the channels) or
    rows (second half) and of the map's full length gives

        y[w] = softmax(q[w] k[w]^T / sqrt(head_dim)) v[w] + lepe(v[w])        result = proj(y)

    where `lepe`, a 3x3 depthwise convolution per direction, takes each stripe for an image of its own and sees zeros
    beyond its border (Dong et al., arXiv 2107.00652, sec. 3.2). `stripe_width=None` makes one stripe of
    the whole map, for all heads. Where `stripe_width` does not divide the map, zero queries, keys and values are added
    around it, half on each side (the odd one at the end); they are not masked, as in the published dense-prediction
    models.

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
        lepe = [(conv.weight, conv.bias) for conv in self.lepe]
        y = cross_shaped_attention(qkv, lepe, stripe_width=self.stripe_width)
        return self.proj(y.flatten(3)).permute(0, 3, 1, 2)


def cross_shaped_attention(qkv: Tensor, lepe: Sequence[tuple[Tensor, Tensor]], *, stripe_width: int | None) -> Tensor:
    """Attention within stripes plus the convolution of their values: `[B, H, W, 3, N, D] -> [B, H, W, N, D]`.

    `lepe` has weight `[C', 1, 3, 3]` and bias `[C']` of the vertical and of the horizontal stripes, N / 2 heads each;
    of one global window of all N heads where `stripe_width` is None.
    """
    heads, head_dim = qkv.shape[-2:]
    if stripe_width is None:
        q, k, v = qkv.flatten(4).unbind(3)
        y = _row_stripes(q, k, v, *lepe[0], width=qkv.shape[1], head_dim=head_dim)
        return y.unflatten(-1, (heads, head_dim))
    # one split into six, so that the backward writes the packed gradient once
    q0, q1, k0, k1, v0, v1 = qkv.flatten(3).chunk(6, -1)
    weight, bias = lepe[0]
    q0, k0, v0 = q0.transpose(1, 2), k0.transpose(1, 2), v0.transpose(1, 2)
    vertical = _row_stripes(q0, k0, v0, weight.mT, bias, width=stripe_width, head_dim=head_dim)
    horizontal = _row_stripes(q1, k1, v1, *lepe[1], width=stripe_width, head_dim=head_dim)
    return torch.cat([vertical.transpose(1, 2), horizontal], -1).unflatten(-1, (heads, head_dim))


def _row_stripes(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, *, width: int, head_dim: int) -> Tensor:
    """Attention and convolution within stripes of `width` rows: each `[B, H, W, C'] -> [B, H, W, C']`."""
    batch, height, length, dim = q.shape
    count = -(-height // width)
    missing = count * width - height
    top = missing // 2
    if missing:
        q, k, v = (F.pad(t, (0, 0, 0, 0, top, missing - top)) for t in (q, k, v))
    # the convolution needs its input dense
    v = v.contiguous()
    shape = (batch * count, width * length, dim // head_dim, head_dim)
    q, k, values = (t.reshape(shape).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, values).transpose(1, 2).reshape(v.shape)
    if width == 1:
        # only the middle row of the kernel falls on a stripe, and all stripes may stay one image
        local = F.conv2d(v.permute(0, 3, 1, 2), weight[:, :, 1:2], bias, padding=(0, 1), groups=dim)
    else:
        stripes = v.view(batch * count, width, length, dim)
        local = F.conv2d(stripes.permute(0, 3, 1, 2), weight, bias, padding=1, groups=dim)
    y = y + local.permute(0, 2, 3, 1).reshape(v.shape)
    return y[:, top : top + height] if missing else y
