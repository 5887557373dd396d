"""Attention in which a class token takes part and half of the pixels (the light UniFormer models)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, register_notrace_module
from torch import Tensor, nn

from ..kernels.precision import acc_dtype, without_autocast
from ..kernels.recording import is_open
from ..kernels.sdpa import fused_attention
from .depthwise import depthwise
from .linear import apply_linear
from .residual import Residual


class Selection(NamedTuple):
    """A feature map, the class token, and how much the class token attends to each pixel."""

    map: Tensor
    """`[B, C, H, W]`"""
    token: Tensor
    """`[B, C]`"""
    score: Tensor
    """`[B, H*W]`, not negative, in float32 or wider"""


class ScoredAttention(nn.Module):
    """Full attention over a sequence `[B, T, C]`, and the row of its first token, `[B, T]`, averaged over the heads.

    Raises ValueError if num_heads does not divide dim.
    """

    def __init__(self, dim: int, *, num_heads: int):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"ScoredAttention: dim={dim} must be divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = apply_linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = fused_attention(q, k, v).transpose(1, 2).flatten(2)
        return apply_linear(self.proj, y), first_row(q, k)


def first_row(q: Tensor, k: Tensor) -> Tensor:
    """Probabilities of the first query over all keys, averaged over the heads: `[B, n, T, d]` each to `[B, T]`."""
    exact = acc_dtype(q)
    with without_autocast(q):
        logits = k.to(exact) @ q[:, :, 0, :, None].to(exact) * q.shape[-1] ** -0.5
    return logits.squeeze(-1).softmax(-1).mean(1)


class SequenceBlock(nn.Module):
    """A transformer block on a sequence `[B, T, C]`.

    Returns the sequence, the sum of what both branches add to it, without drop path, and the row of the first token.
    """

    def __init__(self, dim: int, *, num_heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mixer = ScoredAttention(dim, num_heads=num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed, row = self.mixer(self.norm1(x))
        x = x + self.drop_path(mixed)
        changed = self.mlp(self.norm2(x))
        return x + self.drop_path(changed), mixed + changed, row


@register_notrace_module
class ScoreTokens(nn.Module):
    """The block that begins a selection: `[B, C, H, W]` to a `Selection`; a new class token and all pixels attend."""

    def __init__(self, dim: int, *, num_heads: int, mlp_ratio: float, drop_path: float = 0.0):
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 1, dim))
        self.cpe = Residual(depthwise(dim, kernel=3))
        self.sequence = SequenceBlock(dim, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the class token to zero; the layers have their own initialization."""
        nn.init.zeros_(self.token)

    def forward(self, x: Tensor) -> Selection:
        x = self.cpe(x)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        sequence, _, row = self.sequence(torch.cat([self.token.expand(x.shape[0], -1, -1), pixels], 1))
        return Selection(as_map(sequence[:, 1:], x), sequence[:, 0], row[:, 1:])


@register_notrace_module
class SelectTokens(nn.Module):
    """A block in which the class token, the K = floor(H*W / 2) pixels of highest score and a mean of the others attend.

    `Selection -> Selection`. After a depthwise 3x3 convolution with a shortcut on the whole map, the pixels that are
    not kept are represented by one token, their mean with the scores as weights; what the block adds to this token is
    added to each of them. The scores of kept pixels are averaged with the attention that the class token pays them here
    (Li et al., arXiv 2201.09450, the light models; order of steps as in the released code). Scores carry gradients.

    On maps of one or two pixels all scores are averaged, the last with the attention to the mean token, as in the
    released code.
    """

    def __init__(self, dim: int, *, num_heads: int, mlp_ratio: float, drop_path: float = 0.0):
        super().__init__()
        self.cpe = Residual(depthwise(dim, kernel=3))
        self.sequence = SequenceBlock(dim, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path)

    def forward(self, selection: Selection) -> Selection:
        x, token, score = self.cpe(selection.map), selection.token, selection.score
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        count = pixels.shape[1]
        kept = count // 2
        score, order = score.sort(1, descending=True)
        index = order.unsqueeze(-1).expand(-1, -1, pixels.shape[-1])
        pixels = pixels.gather(1, index)
        rest = pixels[:, kept:]
        weights = score[:, kept:] / score[:, kept:].sum(1, keepdim=True)
        mean = weights.unsqueeze(1).to(rest.dtype) @ rest
        sequence, change, row = self.sequence(torch.cat([token.unsqueeze(1), pixels[:, :kept], mean], 1))
        pixels = torch.cat([sequence[:, 1:-1], rest + change[:, -1:]], 1)
        averaged = kept if is_open(count) or count > 2 else count
        score = torch.cat([(score[:, :averaged] + row[:, 1 : averaged + 1]) / 2, score[:, averaged:]], 1)
        # back to their places: every entry is overwritten
        pixels, score = pixels.scatter(1, index, pixels), score.scatter(1, order, score)
        return Selection(as_map(pixels, x), sequence[:, 0], score)


@register_notrace_module
class MergeSelection(nn.Module):
    """Downsampling of a selection by two: `down` of the map, a linear layer of the class token, pooled scores.

    Scores are averaged over 2x2 pixels, without an odd last row or column. Then they are scaled to their former sum.
    """

    def __init__(self, in_chs: int, out_chs: int, *, down: nn.Module):
        super().__init__()
        self.down = down
        self.token = nn.Linear(in_chs, out_chs)

    def forward(self, selection: Selection) -> Selection:
        height, width = selection.map.shape[-2:]
        score = selection.score.unflatten(1, (height, width))
        # as the map: a side of one pixel is padded to two
        score = F.pad(score, (0, int(width == 1), 0, int(height == 1)))
        score = F.avg_pool2d(score.unsqueeze(1), 2).flatten(1)
        score = score * (selection.score.sum(1, keepdim=True) / score.sum(1, keepdim=True))
        return Selection(self.down(selection.map), self.token(selection.token), score)


def as_map(tokens: Tensor, like: Tensor) -> Tensor:
    """`[B, H*W, C]` to `[B, C, H, W]`, of the size of `like`."""
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
