"""Shifted window attention (Swin): attention within windows, with a learned bias for each relative position."""

from math import isqrt

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..kernels import window_attention
from ..kernels.recording import compact, crop, is_open
from ..kernels.sdpa import fused_attention
from ..kernels.tables import cache_tensors
from ..kernels.window import window_kernels_run
from ..kernels.window.placed import roll
from .linear import apply_linear
from .padding import pad_to_multiple
from .registry import heads, token_mixer

# added to the logits of pixels that the shift has brought into one window
_MASKED = -100.0


@cache_tensors
def relative_index(window: int, device: torch.device) -> tuple[Tensor]:
    """The row of the bias table for each pair of query and key of a window, `[window**4]`."""
    y, x = (torch.arange(window**2, device=device) // window, torch.arange(window**2, device=device) % window)
    dy, dx = y[:, None] - y + window - 1, x[:, None] - x + window - 1
    return ((dy * (2 * window - 1) + dx).flatten(),)


@token_mixer("shifted_window", no_weight_decay=("bias_table",), num_heads=heads(32))
@register_notrace_module
class ShiftedWindow(nn.Module):
    """Attention within windows that may be shifted; `x: [B, C, H, W] -> [B, C, H, W]`.

    One linear layer gives q, k and v. In every window w of window x window pixels

        y[w] = proj(softmax(q[w] k[w]^T / sqrt(head_dim) + bias + mask) v[w])

    where `bias` is a table over the relative positions of query and key (Liu et al., arXiv 2103.14030, sec. 3.2). The
    map is first moved up and left by `shift` pixels, around the border; `mask` separates pixels that only this has
    made neighbors. A map with a side of at most `window` is not shifted. If `window` does not divide the map, the map
    is zero-padded at the bottom and right before the linear layer; padding is not masked, as in the published
    dense-prediction models.

    Raises ValueError if num_heads does not divide dim, window < 1, or shift is outside 0..window-1.
    """

    def __init__(self, dim: int, *, num_heads: int, window: int = 7, shift: int = 0):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"ShiftedWindow: dim={dim} must be divisible by num_heads={num_heads}")
        if window < 1:
            raise ValueError(f"ShiftedWindow: window={window} must be at least 1")
        if not 0 <= shift < window:
            raise ValueError(f"ShiftedWindow: shift={shift} must lie in 0..{window - 1}, below window={window}")
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.bias_table, std=0.02)

    def resized_weight(self, name: str, weight: Tensor) -> Tensor:
        """The bias table of another window, resized bicubically to ours, as the published fine-tuning does."""
        side = isqrt(weight.shape[0])
        if name != "bias_table" or side**2 != weight.shape[0] or weight.shape[1:] != self.bias_table.shape[1:]:
            return weight
        on_map = weight.t().unflatten(1, (side, side))[None]
        size = (2 * self.window - 1, 2 * self.window - 1)
        return F.interpolate(on_map, size, mode="bicubic")[0].flatten(1).t()

    def forward(self, x: Tensor) -> Tensor:
        (batch, dim, height, width), side, heads = x.shape, self.window, self.num_heads
        rows, columns = (height + side - 1) // side, (width + side - 1) // side
        windows, area = rows * columns, side**2
        x = pad_to_multiple(x.permute(0, 2, 3, 1), side, side)
        shift = self._shift(height, width, x)
        if isinstance(shift, int) and window_kernels_run(x, num_heads=heads, window=(side, side)):
            return crop(self._attend_in_place(x, shift), height, width).permute(0, 3, 1, 2)
        cells = compact(roll(x, -shift).reshape(batch, rows, side, columns, side, dim).transpose(2, 3))
        qkv = apply_linear(self.qkv, cells.reshape(batch, windows, area, dim))
        qkv = qkv.view(batch, windows, area, 3, heads, dim // heads)
        # windows and heads are one axis, so that one bias serves all images
        q, k, v = (
            compact(qkv.permute(3, 0, 1, 4, 2, 5)).reshape(3, batch, windows * heads, area, dim // heads).unbind(0)
        )
        y = fused_attention(q, k, v, self._bias(x, shift).reshape(1, windows * heads, area, area))
        y = compact(y.reshape(batch, windows, heads, area, dim // heads).transpose(2, 3))
        y = apply_linear(self.proj, y.reshape(batch, windows, area, dim)).view(batch, rows, columns, side, side, dim)
        y = compact(y.transpose(2, 3)).reshape(batch, rows * side, columns * side, dim)
        return crop(roll(y, shift), height, width).permute(0, 3, 1, 2)

    def _attend_in_place(self, x: Tensor, shift: int) -> Tensor:
        """The same for the padded map `x: [B, H, W, C]`, which is neither moved nor divided into windows."""
        side, heads = self.window, self.num_heads
        qkv = apply_linear(self.qkv, x).unflatten(-1, (3, heads, -1))
        table = self.bias_table.T.unflatten(1, (2 * side - 1, 2 * side - 1))
        y = window_attention(qkv, windows=((side, side),), bias=table, start=shift)
        return apply_linear(self.proj, y.flatten(3))

    def _shift(self, height: int, width: int, like: Tensor) -> int | Tensor:
        """The shift of a map of this size; a tensor where the graph being exported leaves the size open."""
        if not self.shift:
            return 0
        if is_open(height) or is_open(width):
            sides = torch.stack([like.new_full((), side, dtype=torch.int64) for side in (height, width)])
            return self.shift * (sides > self.window).all().long()
        return self.shift if min(height, width) > self.window else 0

    def _bias(self, x: Tensor, shift: int | Tensor) -> Tensor:
        """The bias of each window of the padded map `x: [B, H, W, C]`, with the mask: `[windows, heads, L, L]`."""
        (height, width), side = x.shape[1:3], self.window
        (index,) = relative_index(side, x.device)
        bias = self.bias_table.index_select(0, index).unflatten(0, (side**2, side**2)).permute(2, 0, 1)
        if isinstance(shift, int) and not shift:
            return bias.expand(height // side * (width // side), -1, -1, -1)
        (mask,) = shift_mask(height, width, side, shift, x.device, bias.dtype)
        return bias + mask


@cache_tensors
def shift_mask(
    height: int, width: int, window: int, shift: int | Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor]:
    """`[windows, 1, L, L]`: negative where query and key of a shifted map come from different parts of the image."""
    y, x = (
        (position >= side - window).long() + (position >= side - shift).long()
        for side, position in ((side, torch.arange(side, device=device)) for side in (height, width))
    )
    part = compact((3 * y[:, None] + x).unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2))
    part = part.flatten(2).flatten(0, 1)
    return ((part[:, None, :, None] != part[:, None, None]).to(dtype) * _MASKED,)
