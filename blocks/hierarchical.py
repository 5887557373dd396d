"""Attention within windows and, between windows, of their means, under one softmax (hierarchical self-attention)."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor

from ..kernels.precision import acc_dtype, without_autocast
from ..kernels.recording import compact, crop
from .full_attention import FullAttention
from .padding import pad_to_multiple
from .registry import heads, token_mixer


@token_mixer("hierarchical", num_heads=heads(32))
@register_notrace_module
class Hierarchical(FullAttention):
    """Full attention made constant between windows; `x: [B, C, H, W] -> [B, C, H, W]`.

    One linear layer gives q, k and v, and s = q k^T / sqrt(head_dim). In each head the weight of position j for the
    query i is, within their window B, and for all i in B and j in another window D,

        exp(l[B]) / Z[B] * softmax over B of s[i]        exp(mean(q over B) mean(k over D)^T / sqrt(head_dim)) / Z[B]

        l[B] = mean over i in B of logsumexp over j in B of s[i, j]

    where Z[B] makes the weights sum to 1. Of all weights with one value for each pair of windows these are nearest to
    the softmax of s, in the sum over queries of the Kullback-Leibler divergence from it (arXiv 2509.15448, here with
    one level of windows). The cost is N window**2 + (N / window**2)**2 for N positions. Windows at the bottom and right
    are smaller if `window`, their side, does not divide the map.

    From the paper, with no published code to compare with: the closed form for one level follows from that property;
    the paper's normalized queries and keys and its terms for the place of a window are left out.

    Raises ValueError if num_heads does not divide dim or window < 1.
    """

    def __init__(self, dim: int, *, num_heads: int, window: int = 7):
        super().__init__(dim, num_heads=num_heads)
        if window < 1:
            raise ValueError(f"Hierarchical: window={window} must be at least 1")
        self.window = window

    def attend(self, qkv: Tensor) -> Tensor:
        """`[B, H, W, 3, heads, head_dim] -> [B, H, W, heads, head_dim]`."""
        (batch, height, width, _, heads, head_dim), side = qkv.shape, self.window
        rows, columns = (height + side - 1) // side, (width + side - 1) // side
        cells = compact(pad_to_multiple(qkv.flatten(3), side, side))
        cells = cells.reshape(batch, rows, side, columns, side, 3 * heads * head_dim).transpose(2, 3)
        cells = compact(cells).reshape(batch * rows * columns, side * side, 3, heads, head_dim)
        q, k, v = cells.permute(2, 0, 3, 1, 4).unbind(0)
        in_rows = (torch.arange(rows * side, device=qkv.device) < height).view(rows, 1, side, 1)
        in_columns = (torch.arange(columns * side, device=qkv.device) < width).view(1, columns, 1, side)
        inside = compact(in_rows & in_columns).reshape(rows * columns, side * side).repeat(batch, 1)
        y = compact(hierarchical_attention(q, k, v, inside, batch=batch, windows=rows * columns).transpose(1, 2))
        y = y.reshape(batch, rows, columns, side, side, heads * head_dim)
        y = compact(y.transpose(2, 3)).reshape(batch, rows * side, columns * side, heads, head_dim)
        return crop(y, height, width)


def hierarchical_attention(q: Tensor, k: Tensor, v: Tensor, inside: Tensor, *, batch: int, windows: int) -> Tensor:
    """Attention of `q, k, v: [B * windows, heads, n, d]`, zeros where `inside: [B * windows, n]` is False.

    Weights are computed in float32 or wider.
    """
    heads, scale, dtype = q.shape[1], q.shape[-1] ** -0.5, v.dtype
    with without_autocast(q):
        exact = acc_dtype(q)
        inside = inside.to(exact).unsqueeze(1)
        count = inside.sum(-1, keepdim=True)  # [B * windows, 1, 1]
        q, k, v = q.to(exact) * scale, k.to(exact), v.to(exact)
        scores = q @ k.transpose(-2, -1) + inside.log().unsqueeze(2)
        total = scores.logsumexp(-1, keepdim=True)
        within = (scores - total).exp() @ v
        own = (total.squeeze(-1) * inside).sum(-1, keepdim=True) / count

        def by_head(x: Tensor) -> Tensor:
            """`[B * windows, heads, d] -> [B * heads, windows, d]`."""
            x = compact(x).view(batch, windows, heads, x.shape[-1])
            return compact(x.transpose(1, 2)).reshape(batch * heads, windows, x.shape[-1])

        def by_window(x: Tensor) -> Tensor:
            """`[B * heads, windows, d] -> [B * windows, heads, 1, d]`."""
            x = compact(x).view(batch, heads, windows, x.shape[-1])
            return compact(x.transpose(1, 2)).reshape(batch * windows, heads, 1, x.shape[-1])

        mean_q, mean_k, mean_v = (by_head(t.sum(-2) / count) for t in (q, k, v))
        sizes = by_head(count.log().expand(-1, heads, -1)).transpose(1, 2)
        number = torch.arange(windows, device=q.device)
        between = torch.bmm(mean_q, mean_k.transpose(1, 2)) + sizes
        between = between.masked_fill(number[:, None] == number, -torch.inf)
        weights = torch.cat([by_head(own), between], -1).softmax(-1)
        far = torch.bmm(weights[..., 1:], mean_v)
        return (by_window(weights[..., :1]) * within + by_window(far)).to(dtype)
