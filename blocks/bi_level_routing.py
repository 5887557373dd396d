"""Bi-level routing attention (BiFormer)."""

from dataclasses import replace

from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels import routed_attention
from ..kernels.precision import acc_dtype, without_autocast
from ..kernels.recording import crop
from .explanation import Explanation, Pixel, attention, gradient_at
from .padding import pad_to_multiple
from .registry import by_stage, heads, token_mixer


@token_mixer("bi_level_routing", num_heads=heads(32), topk=by_stage(1, 4, 16, 49))
@register_notrace_module
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
        height, width = x.shape[-2:]
        qkv = self.project(x)
        y = self.attend(qkv.unflatten(-1, (3, self.num_heads, -1)), self.choose(qkv)).flatten(3)
        v = qkv.chunk(3, -1)[2]
        y = y + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(crop(y, height, width)).permute(0, 3, 1, 2)

    def attend(self, qkv: Tensor, chosen: Tensor) -> Tensor:
        """Attention to the `chosen` regions, `[B, H', W', 3, heads, head_dim] -> [B, H', W', heads, head_dim]`."""
        return routed_attention(qkv, chosen, grid=(self.n_win, self.n_win), scale=self.scale)

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The attention weights of the query, which are zero outside the regions that its region is routed to."""
        qkv = self.project(x)
        chosen = self.choose(qkv)
        split = qkv.unflatten(-1, (3, self.num_heads, -1))
        weights = gradient_at(lambda qkv: self.attend(qkv, chosen), split, query)[:, :, :, 2]
        regions = f"attention to {self.topk} of {self.n_win**2} regions"
        return replace(attention(crop(weights, *x.shape[2:])), text=regions)

    def route(self, x: Tensor) -> Tensor:
        """The regions that each region of `x: [B, C, H, W]` attends to: `[B, n_win**2, topk]`.

        Regions are numbered row by row; the one with the highest affinity comes first.
        """
        return self.choose(self.project(x))

    def project(self, x: Tensor) -> Tensor:
        """q, k and v side by side, padded to whole regions: `[B, C, H, W] -> [B, H', W', 3*C]`."""
        return self.qkv(pad_to_multiple(x.permute(0, 2, 3, 1), self.n_win, self.n_win))

    def choose(self, qkv: Tensor) -> Tensor:
        """The topk regions of each region by their mean q and k: `[B, H', W', 3*C] -> [B, n_win**2, topk]`."""
        n = self.n_win
        # in half precision, rounding would change the choice among regions of nearly equal affinity
        dtype = acc_dtype(qkv)
        qk = qkv.detach()[..., : 2 * (qkv.shape[-1] // 3)]
        # one axis after the other: one mean over two axes that are not adjacent is several times slower
        means = qk.unflatten(1, (n, -1)).mean(2, dtype=dtype).unflatten(2, (n, -1)).mean(3)
        q_mean, k_mean = means.flatten(1, 2).chunk(2, -1)
        with without_autocast(qkv):
            affinity = q_mean @ k_mean.transpose(1, 2)
        return affinity.topk(self.topk, dim=-1).indices
