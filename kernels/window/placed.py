"""Windows of every n-th pixel, windows that begin at a given pixel, and windows with a bias, in plain PyTorch.

Along each axis the map is divided into parts of span = window * stride pixels, and each part into `stride` windows: a
pixel belongs to the window of its remainder by `stride`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recording import compact, crop, is_open
from ..sdpa import fused_attention
from ..tables import cache_tensors
from .position import dense_bias

# added to the logits of pairs that do not attend to each other; finite in every dtype
_MASKED = -3e4

# first row and column of a window; a tensor in a graph of open sizes
Start = int | Tensor


class _Layout(NamedTuple):
    """Rows and columns of parts, height and width of a window, and the stride."""

    rows: int
    cols: int
    height: int
    width: int
    stride: int


def placed_attention(
    qkv: Tensor,
    *,
    window: tuple[int, int],
    bias: Tensor | None,
    stride: int,
    start: Start | None,
    scale: float | None,
) -> Tensor:
    """`[B, H, W, 3, N, D] -> [B, H, W, N, D]`; arguments as in `window_attention`."""
    height, width, _, heads, head_dim = qkv.shape[1:]
    span_h, span_w = window[0] * stride, window[1] * stride
    layout = _Layout((height + span_h - 1) // span_h, (width + span_w - 1) // span_w, *window, stride)
    bottom, right = layout.rows * span_h - height, layout.cols * span_w - width
    top, left = (bottom // 2, right // 2) if start is None else (0, 0)
    # always in a graph that is compiled, so that one graph serves all sizes
    pads = torch.compiler.is_compiling() or is_open(bottom) or is_open(right) or bool(bottom or right)
    if pads:
        qkv = F.pad(qkv.flatten(3), (0, 0, left, right - left, top, bottom - top)).unflatten(3, (3, heads, head_dim))
    shift = 0 if start is None else start
    moves = not isinstance(shift, int) or shift > 0
    if moves:
        # a window over the border becomes whole; a mask keeps apart its pixels from opposite sides of the map
        qkv = roll(qkv.flatten(3), -shift).unflatten(3, (3, heads, head_dim))
    mask = None
    if start is not None and (pads or moves):
        (mask,) = _mask(height, width, layout, shift, qkv.device, qkv.dtype)
    pairs = None if bias is None else dense_bias(bias, window).to(qkv.dtype)
    attend = _attend_adjacent if stride == 1 else _attend_strided
    y = attend(qkv, layout, pairs, mask, scale)
    if moves:
        y = roll(y.flatten(3), shift).unflatten(3, (heads, head_dim))
    return crop(y, height, width, top=top, left=left) if pads else y


def _attend_adjacent(
    qkv: Tensor, layout: _Layout, bias: Tensor | None, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention within windows of adjacent pixels, which divide the map; `mask` is `[windows, n, n]`."""
    batch, height, width, _, heads, head_dim = qkv.shape
    rows, cols, win_h, win_w, _ = layout
    pixels = win_h * win_w

    def partition(x: Tensor) -> Tensor:
        x = x.reshape(batch * rows, win_h, cols, win_w, heads, head_dim)
        # windows and heads are one axis, so that one mask serves all images
        return compact(x.permute(0, 2, 4, 1, 3, 5)).reshape(batch, rows * cols * heads, pixels, head_dim)

    q, k, v = (partition(x) for x in qkv.unbind(3))
    if mask is None:
        q, k, v = (x.view(batch * rows * cols, heads, pixels, head_dim) for x in (q, k, v))
        y = fused_attention(q, k, v, None if bias is None else bias[None], scale=scale)
    else:
        pairs = mask[:, None].expand(-1, heads, -1, -1) if bias is None else bias + mask[:, None]
        y = fused_attention(q, k, v, pairs.reshape(1, -1, pixels, pixels), scale=scale)
    y = y.reshape(batch * rows, cols, heads, win_h, win_w, head_dim)
    return compact(y.permute(0, 3, 1, 4, 2, 5)).reshape(batch, height, width, heads, head_dim)


def _attend_strided(
    qkv: Tensor, layout: _Layout, bias: Tensor | None, mask: Tensor | None, scale: float | None
) -> Tensor:
    """The same for windows of every n-th pixel."""
    batch, height, width, _, heads, head_dim = qkv.shape
    rows, cols, win_h, win_w, stride = layout
    tokens = _split(qkv.flatten(3), layout).unflatten(-1, (3, heads, head_dim))
    q, k, v = tokens.permute(2, 0, 3, 1, 4).unbind(0)
    pairs = None if bias is None else bias[None]
    if mask is not None:
        pairs = (mask[:, None] if bias is None else bias + mask[:, None]).repeat(batch, 1, 1, 1)
    y = fused_attention(q, k, v, pairs, scale=scale).transpose(1, 2).flatten(2)
    y = y.reshape(batch * rows, stride * cols, stride, win_h, win_w, heads * head_dim)
    return compact(y.permute(0, 3, 1, 4, 2, 5)).reshape(batch, height, width, heads, head_dim)


def _split(x: Tensor, layout: _Layout) -> Tensor:
    """`[B, H, W, C] -> [windows of all images, n, C]`."""
    batch, channels = x.shape[0], x.shape[-1]
    rows, cols, win_h, win_w, stride = layout
    x = x.reshape(batch * rows, win_h, stride * cols, win_w, stride, channels)
    x = compact(x.permute(0, 2, 4, 1, 3, 5))
    return x.reshape(batch * rows * cols * stride * stride, win_h * win_w, channels)


def roll(x: Tensor, shift: Start) -> Tensor:
    """Move a map `[B, H, W, C]` down and right by `shift` pixels, around the border."""
    if isinstance(shift, int):
        return x.roll((shift, shift), (1, 2)) if shift else x
    rows, columns = (_around(torch.arange(side, device=x.device) - shift, side) for side in x.shape[1:3])
    return x.index_select(1, rows).index_select(2, columns)


def _around(position: Tensor, side: int) -> Tensor:
    """Positions modulo `side` that are less than one side away; ONNX has no remainder by an open size."""
    position = torch.where(position < 0, position + side, position)
    return torch.where(position >= side, position - side, position)


@cache_tensors
def _mask(
    height: int, width: int, layout: _Layout, start: Start, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor]:
    """`[windows, n, n]`: negative for pairs of which one is padding, or which come from opposite sides of the map.

    The map, of height x width, was padded at the bottom and right and then moved by -start.
    """
    rows, cols, win_h, win_w, stride = layout
    y, x = (
        _part_of_axis(side, parts * window * stride, start, device)
        for side, parts, window in ((height, rows, win_h), (width, cols, win_w))
    )
    part = 3 * y[:, None] + x[None]
    part = torch.where((y[:, None] == 2) | (x[None] == 2), 8, part)
    windows = _split(part[None, :, :, None], layout)[:, :, 0]
    return ((windows[:, :, None] != windows[:, None]).to(dtype) * _MASKED,)


def _part_of_axis(side: int, padded: int, start: Start, device: torch.device) -> Tensor:
    """For each place of the moved axis 0, 1 if the pixel there was moved around the border, or 2 if it is padding."""
    pixel = torch.arange(padded, device=device) + start
    around = pixel >= padded
    return torch.where(torch.where(around, pixel - padded, pixel) >= side, 2, around.long())
