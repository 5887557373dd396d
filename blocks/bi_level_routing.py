"""Bi-level routing attention (BiFormer), with the region sizes of either released implementation."""

from dataclasses import replace
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels import routed_attention
from ..kernels.precision import acc_dtype, without_autocast
from ..kernels.recording import as_matrix, crop
from ..kernels.tables import Grid
from .explanation import Explanation, Pixel, attention, gradient_at
from .linear import apply_linear
from .padding import pad_to
from .registry import by_stage, heads, token_mixer


@token_mixer("bi_level_routing", num_heads=heads(32), topk=by_stage(1, 4, 16, 49))
class BiLevelRouting(nn.Module):
    """Attention of the queries of a region to the keys of a few chosen regions; `x: [B, C, H, W] -> [B, C, H, W]`.

    The map is divided into n_win x n_win regions. With q_R and k_R the means of queries and keys over each region, of
    all heads together,

        I = topk(q_R k_R^T)        y = proj(attention(q, k[I], v[I]) + lepe(v))

    where logits are scaled by dim**-0.5 (the width of all heads, not of one) and `lepe` is a depthwise convolution over
    the whole map (Zhu et al., arXiv 2303.08810, sec. 3.2, eq. 2-7). No gradient flows through the choice I. If n_win
    does not divide H or W, the map is zero-padded at the bottom and right before the linear layer; padding is not
    masked, as in the published dense-prediction models.

    Raises ValueError if num_heads does not divide dim or topk exceeds the n_win**2 regions.
    """

    def __init__(self, dim: int, *, num_heads: int, n_win: int = 7, topk: int = 4, local_kernel: int = 5):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"BiLevelRouting: dim={dim} must be divisible by num_heads={num_heads}")
        if not 1 <= topk <= n_win**2:
            raise ValueError(f"BiLevelRouting: topk={topk} must lie in 1..n_win**2={n_win**2}")
        self.num_heads, self.n_win, self.topk = num_heads, n_win, topk
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = nn.Conv2d(dim, dim, local_kernel, padding=local_kernel // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2], x.shape[3]
        qkv = self.project(x)
        y = self.attend(qkv.unflatten(-1, (3, self.num_heads, -1)), self.choose(qkv, size), size).flatten(3)
        v = qkv.chunk(3, -1)[2]
        y = y + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return apply_linear(self.proj, crop(y, *size)).permute(0, 3, 1, 2)

    def attend(self, qkv: Tensor, chosen: Tensor, size: Grid) -> Tensor:
        """Attention to the `chosen` regions, `[B, H', W', 3, heads, head_dim] -> [B, H', W', heads, head_dim]`.

        `size` is (H, W) of the map before padding.
        """
        return routed_attention(qkv, chosen, grid=self.regions(*size)[0], scale=self.scale)

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The attention weights of the query, which are zero outside the regions that its region is routed to."""
        size = x.shape[2], x.shape[3]
        qkv = self.project(x)
        chosen = self.choose(qkv, size)
        split = qkv.unflatten(-1, (3, self.num_heads, -1))
        weights = gradient_at(lambda qkv: self.attend(qkv, chosen, size), split, query)[:, :, :, 2]
        return replace(attention(crop(weights, *size)), text=f"{self.topk} of {chosen.shape[1]} regions")

    def route(self, x: Tensor) -> Tensor:
        """The regions that each of the R regions of `x: [B, C, H, W]` attends to: `[B, R, topk]`.

        Regions are numbered row by row; the one with the highest affinity comes first.
        """
        return self.choose(self.project(x), (x.shape[2], x.shape[3]))

    def regions(self, height: int, width: int) -> tuple[Grid, Grid]:
        """Number of regions of a map, (vertically, horizontally), and (height, width) of each in pixels."""
        n = self.n_win
        return (n, n), ((height + n - 1) // n, (width + n - 1) // n)

    def project(self, x: Tensor) -> Tensor:
        """q, k and v side by side, padded to whole regions: `[B, C, H, W] -> [B, H', W', 3*C]`."""
        return apply_linear(self.qkv, pad_to(x.permute(0, 2, 3, 1), *self._padded(x)))

    def choose(self, qkv: Tensor, size: Grid) -> Tensor:
        """The topk regions of each region by their mean q and k: `[B, H', W', 3*C] -> [B, R, topk]`.

        `size` is (H, W) of the map before padding.
        """
        # of v too, since a part of qkv would be copied
        q_mean, k_mean, _ = self._means(qkv.detach(), size).flatten(1, 2).chunk(3, -1)
        with without_autocast(qkv):
            affinity = q_mean @ k_mean.transpose(1, 2)
        return affinity.topk(self.topk, dim=-1).indices

    def _padded(self, x: Tensor) -> Grid:
        """The size of `x: [B, C, H, W]` when padded to whole regions."""
        (rows, columns), (height, width) = self.regions(x.shape[2], x.shape[3])
        return rows * height, columns * width

    def _means(self, x: Tensor, size: Grid) -> Tensor:
        """`[B, H', W', C] -> [B, rows, columns, C]`: the mean of each region."""
        (batch, _, _, dim), ((rows, columns), (height, width)) = x.shape, self.regions(*size)
        x = as_matrix(x, batch * rows, height * columns * width * dim).view(batch * rows, height, -1)
        # in half precision, rounding would change the choice among regions of nearly equal affinity.
        # one axis after the other: one mean over two axes that are not adjacent is several times slower
        x = as_matrix(x.mean(1, dtype=acc_dtype(x)), batch * rows * columns, width * dim)
        return x.view(-1, width, dim).mean(1).view(batch, rows, columns, dim)


# not as a decorator, which hides from type checkers what the class below inherits
register_notrace_module(BiLevelRouting)


@token_mixer("floored_bi_level_routing", num_heads=heads(32), topk=by_stage(1, 4, 16, 49))
@register_notrace_module
class FlooredBiLevelRouting(BiLevelRouting):
    """`BiLevelRouting` with regions of floor(H / n_win) x floor(W / n_win) pixels, at least one.

    There are at least n_win regions per side, and more where the last ones hold the rest. q, k and v are padded after
    the linear layer: keys and values of the padding are 0. They are not masked, but the means of a region are those of
    its pixels within the map. This is the rule of the second released implementation (`bra_nchw`), which refuses maps
    with a side of less than n_win pixels; here they are padded to n_win.
    """

    def regions(self, height: int, width: int) -> tuple[Grid, Grid]:
        (rows, region_height), (columns, region_width) = (_floored(side, self.n_win) for side in (height, width))
        return (rows, columns), (region_height, region_width)

    def project(self, x: Tensor) -> Tensor:
        return pad_to(apply_linear(self.qkv, x.permute(0, 2, 3, 1)), *self._padded(x))

    def _means(self, x: Tensor, size: Grid) -> Tensor:
        (rows, columns), region = self.regions(*size)
        # a mean over a whole region, with its padding of zeros, is too small by its share of pixels within the map
        vertical, horizontal = (
            (side - torch.arange(number, device=x.device) * pixels).clamp(1, pixels) / pixels
            for side, number, pixels in zip(size, (rows, columns), region, strict=True)
        )
        return super()._means(x, size) / (vertical[:, None, None] * horizontal[:, None])


def _floored(side: Any, n_win: int) -> tuple[int, int]:
    """Number of regions along a side, and pixels of each: `side` / n_win rounded down, at least 1."""
    pixels: Any = torch.sym_max(1, side // n_win)
    number: Any = torch.sym_max(n_win, (side + pixels - 1) // pixels)
    return number, pixels
