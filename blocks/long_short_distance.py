"""Long short distance attention (CrossFormer) and its dynamic position bias."""

from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels import window_attention
from ..kernels.recording import compact, crop, is_open
from ..kernels.sdpa import fused_attention
from ..kernels.tables import Grid, cache_tensors, expand_bias
from ..kernels.window import window_kernels_run
from .linear import apply_linear
from .padding import pad_to_multiple
from .registry import by_stage, heads, token_mixer
from .residual import block

# rows and columns of a group, and the interval between its tokens
Grouping = tuple[int, int, int]


class DynamicPositionBias(nn.Module):
    """A bias per head for each pair of tokens of a group, computed by an MLP from their offset, query minus key.

    Offsets are (rows, columns), counted in tokens of the group. Each of the three hidden layers has `hidden` channels
    and is followed by LayerNorm and ReLU (Wang et al., arXiv 2108.00154, sec. 3.3).
    """

    def __init__(self, num_heads: int, *, hidden: int):
        super().__init__()
        self.embed = nn.Linear(2, hidden)
        widths = (hidden, hidden, num_heads)
        self.layers = nn.Sequential(
            *(block(norm=nn.LayerNorm(hidden), act=nn.ReLU(), fc=nn.Linear(hidden, width)) for width in widths)
        )

    def forward(self, group: Grid, like: Tensor) -> Tensor:
        """The bias `[heads, N, N]` of queries and keys of a group of N = rows * columns, on the device of `like`."""
        rows, columns = group
        offsets, from_row, from_column = _offsets(rows, columns, like.device, like.dtype)
        table = self.layers(self.embed(offsets)).permute(2, 0, 1)
        # [heads, keys_y, rows, keys_x, columns]
        return expand_bias(table, from_row, from_column).permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)


@cache_tensors
def _offsets(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """All different offsets `[2 rows - 1, 2 columns - 1, 2]`, and the index of each pair's offset, `[key, query]`."""
    y, x = (torch.arange(1 - n, n, device=device).to(dtype) for n in (rows, columns))
    # not by `expand`: torch.export cannot save a sum of open sizes within a branch
    offsets = torch.stack([y[:, None] + 0 * x, 0 * y[:, None] + x], -1)
    i, j = (torch.arange(n, device=device) for n in (rows, columns))
    return offsets, i[None] - i[:, None] + rows - 1, j[None] - j[:, None] + columns - 1


@token_mixer("long_short_distance", num_heads=heads(32), interval=by_stage(8, 4, 2, 1))
@register_notrace_module
class LongShortDistance(nn.Module):
    """Attention within groups of tokens that lie `interval` apart; `x: [B, C, H, W] -> [B, C, H, W]`.

    The map is divided into squares of group * interval tokens a side, and each square into interval**2 groups: token
    (y, x) of a square belongs to the group (y mod interval, x mod interval). Interval 1 is short distance attention,
    that is, windows; a larger one is long distance attention. In every group g

        y[g] = proj(softmax(q[g] k[g]^T / sqrt(head_dim) + bias) v[g])

    with `DynamicPositionBias` of max(1, dim // 16) hidden channels (Wang et al., arXiv 2108.00154, sec. 3.2, 3.3). If
    the squares do not divide the map, it is padded at the bottom and right; padding is masked. A map of which a side is
    at most `group` is a single group, as in the published dense-prediction models.

    Raises ValueError if num_heads does not divide dim, or group or interval is below 1.
    """

    def __init__(self, dim: int, *, num_heads: int, group: int = 7, interval: int = 1):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"LongShortDistance: dim={dim} must be divisible by num_heads={num_heads}")
        if group < 1 or interval < 1:
            raise ValueError(f"LongShortDistance: group={group} and interval={interval} must be at least 1")
        self.num_heads, self.group, self.interval = num_heads, group, interval
        self.qkv = nn.Linear(dim, 3 * dim)
        self.position = DynamicPositionBias(num_heads, hidden=max(1, dim // 16))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        height, width = x.shape[1:3]
        if is_open(height) or is_open(width):
            # a graph with both cases, since a comparison here would narrow it to one
            small: Any = torch.sym_min(height, width) <= self.group
            y = torch.cond(small, self._as_one_group, self._in_squares, (compact(x),))
        else:
            small = min(height, width) <= self.group
            window = (height, width) if small else (self.group, self.group)
            if window_kernels_run(x, num_heads=self.num_heads, window=window):
                y = self._attend_in_place(x, window, 1 if small else self.interval)
            else:
                y = self._as_one_group(x) if small else self._in_squares(x)
        return y.permute(0, 3, 1, 2)

    def _attend_in_place(self, x: Tensor, window: Grid, interval: int) -> Tensor:
        """The same for the map `x: [B, H, W, C]`, which is neither padded nor divided into groups."""
        qkv = apply_linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1))
        bias = self.position(window, x)
        y = window_attention(qkv, windows=(window,), bias=bias, stride=interval, start=0)
        return apply_linear(self.proj, y.flatten(3))

    def _as_one_group(self, x: Tensor) -> Tensor:
        return compact(self._attend(x, (x.shape[1], x.shape[2], 1)))

    def _in_squares(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        side, grouping = self.group * self.interval, (self.group, self.group, self.interval)
        padded = pad_to_multiple(x, side, side)
        mask = None
        if is_open(height) or is_open(width) or padded.shape[1:3] != (height, width):
            mask = padding_mask((height, width), padded, grouping)
        return compact(crop(self._attend(padded, grouping, mask), height, width))

    def _attend(self, x: Tensor, grouping: Grouping, mask: Tensor | None = None) -> Tensor:
        """Attention within the groups of `x: [B, H, W, C]`; `mask` is added to the bias of every image."""
        tokens = split(x, grouping)
        qkv = apply_linear(self.qkv, tokens).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.position(grouping[:2], tokens).to(v.dtype)[None]
        if mask is not None:
            bias = (bias + mask.to(v.dtype)).repeat(x.shape[0], 1, 1, 1)
        y = apply_linear(self.proj, fused_attention(q, k, v, bias).transpose(1, 2).flatten(2))
        return merge(y, x.shape, grouping)


def split(x: Tensor, grouping: Grouping) -> Tensor:
    """`[B, H, W, C]` to groups `[U, N, C]`, those of one image in succession."""
    batch, height, width, channels = x.shape
    rows, columns, interval = grouping
    squares = height // (rows * interval), width // (columns * interval)
    x = x.reshape(batch * squares[0], rows, interval * squares[1], columns, interval, channels)
    x = compact(x.permute(0, 2, 4, 1, 3, 5))
    return x.reshape(batch * squares[0] * squares[1] * interval * interval, rows * columns, channels)


def merge(groups: Tensor, shape: torch.Size, grouping: Grouping) -> Tensor:
    """The inverse of `split`: `[U, N, C]` to `shape`, `[B, H, W, C]`."""
    batch, height, width, channels = shape
    rows, columns, interval = grouping
    squares = height // (rows * interval), width // (columns * interval)
    x = groups.reshape(batch * squares[0], interval * squares[1], interval, rows, columns, channels)
    return compact(x.permute(0, 3, 1, 4, 2, 5)).reshape(batch, height, width, channels)


def padding_mask(size: Grid, padded: Tensor, grouping: Grouping) -> Tensor:
    """Large negative logits for keys that are padding, `[groups, 1, 1, N]`; `size` is that of the map in `padded`."""
    inside = [torch.arange(n, device=padded.device) < s for s, n in zip(size, padded.shape[1:3], strict=True)]
    tokens = split((inside[0][:, None] & inside[1])[None, :, :, None], grouping)[:, None, None, :, 0]
    # finite in every dtype, since a group may consist of padding only
    return torch.where(tokens, 0.0, -3e4)
