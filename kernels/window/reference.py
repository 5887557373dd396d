"""Window attention in plain PyTorch: the definition that the Triton kernels are tested against.

Shapes: B images, H x W pixels, N heads of width D in G equal groups, C' = N / G * D channels per group, windows of
h x w pixels. Suffixes in this file: q_BHWC is [B, H, W, C'] and q_UhwC is [U, h, w, C'] with U windows of all images.

For pixel p of window u and each head, with j over the pixels of u,

    y[p] = sum_j softmax_j(scale * q[p] . k[j] + b[p, j]) v[j]  +  bias + sum_t weight[t] v[p + t]

The second part is optional (LePE): a depthwise 3x3 convolution whose taps t see zeros outside the window. If a window
does not divide H or W, the map is zero-padded on both sides (an odd row or column goes to the end). Padding is not
masked: its q = k = v = 0 stay in the softmax (CSWin, arXiv 2107.00652, sec. 3.2, as its dense-prediction models do it).

b is an optional bias for each pair of places in a window (Swin, arXiv 2103.14030, sec. 3.2, eq. 4). With `stride` s a
window has every s-th row and column: h * s rows of the map hold s windows (CrossFormer, arXiv 2108.00154, sec. 3.2).
With `start` the first row and column of a window are given. Windows then reach over every border of the map, and only
pixels of the map are keys, as in shifted windows (Swin, sec. 3.2) and in CrossFormer's dense-prediction models.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recording import compact, crop, is_open
from ..sdpa import fused_attention
from .placed import Start, placed_attention

# weight `[C', 1, 3, 3]` and bias `[C']` of the LePE convolution of each group of heads
Lepe = Sequence[tuple[Tensor, Tensor]]

# height and width of a window in pixels; None is the whole side of the map
Window = tuple[int | None, int | None]


def window_attention_reference(
    qkv: Tensor,
    *,
    windows: Sequence[Window],
    lepe: Lepe | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    start: Start | None = None,
    scale: float | None = None,
) -> Tensor:
    """Partition the map into windows, then ordinary attention and convolution; arguments as in `window_attention`."""
    if bias is not None or stride > 1 or start is not None:
        window = sides(windows[0], qkv)
        return placed_attention(qkv, window=window, bias=bias, stride=stride, start=start, scale=scale)
    groups, head_dim = len(windows), qkv.shape[-1]
    # a single split for all groups: its backward then writes the packed gradient once
    chunks = qkv.flatten(3).chunk(3 * groups, -1)
    outputs = []
    for g, window in enumerate(windows):
        q, k, v = chunks[g::groups]
        taps = None if lepe is None else lepe[g]
        outputs.append(_group_attention(q, k, v, window, taps, head_dim=head_dim, scale=scale))
    y = outputs[0] if groups == 1 else torch.cat(outputs, -1)
    return y.unflatten(-1, qkv.shape[4:])


def _group_attention(
    q_BHWC: Tensor,
    k_BHWC: Tensor,
    v_BHWC: Tensor,
    window: Window,
    lepe: tuple[Tensor, Tensor] | None,
    *,
    head_dim: int,
    scale: float | None,
) -> Tensor:
    """One group of heads: `[B, H, W, C']`."""
    height, width = q_BHWC.shape[1:3]
    if not _spans(window[0], height) or _spans(window[1], width):
        return _attend(q_BHWC, k_BHWC, v_BHWC, window, lepe, head_dim=head_dim, scale=scale)
    # Windows that span the height: transpose the map. Windows of whole rows need no copy, and convolutions are faster
    # along long rows.
    q, k, v = (x.transpose(1, 2) for x in (q_BHWC, k_BHWC, v_BHWC))
    transposed = None if lepe is None else (lepe[0].transpose(2, 3), lepe[1])
    return _attend(q, k, v, (window[1], window[0]), transposed, head_dim=head_dim, scale=scale).transpose(1, 2)


def _attend(
    q_BHWC: Tensor,
    k_BHWC: Tensor,
    v_BHWC: Tensor,
    window: Window,
    lepe: tuple[Tensor, Tensor] | None,
    *,
    head_dim: int,
    scale: float | None,
) -> Tensor:
    batch, height, width, dim = q_BHWC.shape
    (rows, win_h), (cols, win_w) = _count(window[0], height), _count(window[1], width)
    pad_h, pad_w = rows * win_h - height, cols * win_w - width
    top, left = pad_h // 2, pad_w // 2
    pads = is_open(pad_h) or is_open(pad_w) or bool(pad_h or pad_w)
    if pads:
        padding = (0, 0, left, pad_w - left, top, pad_h - top)
        q_BHWC, k_BHWC, v_BHWC = (F.pad(x, padding) for x in (q_BHWC, k_BHWC, v_BHWC))
    if lepe is not None:
        # the convolution needs a contiguous input
        v_BHWC = v_BHWC.contiguous()
    q_UhwC, k_UhwC, v_UhwC = (_partition(x, win_h, win_w) for x in (q_BHWC, k_BHWC, v_BHWC))
    heads = (dim // head_dim, head_dim)
    q, k, v = (x.flatten(1, 2).unflatten(-1, heads).transpose(1, 2) for x in (q_UhwC, k_UhwC, v_UhwC))
    y_UhwC = fused_attention(q, k, v, scale=scale).transpose(1, 2).reshape(v_UhwC.shape)
    if lepe is not None:
        y_UhwC = y_UhwC + _depthwise_conv(v_UhwC, *lepe, windows_per_image=rows * cols)
    y = compact(y_UhwC.view(batch, rows, cols, win_h, win_w, dim).transpose(2, 3))
    y = y.reshape(batch, rows * win_h, cols * win_w, dim)
    return crop(y, height, width, top=top, left=left) if pads else y


def sides(window: Window, qkv: Tensor) -> tuple[int, int]:
    """Height and width of a window in pixels."""
    height, width = window
    return (qkv.shape[1] if height is None else height), (qkv.shape[2] if width is None else width)


def _spans(window: int | None, side: int) -> bool:
    """Whether one window takes the whole side of the map."""
    return window is None or (not is_open(side) and side <= window)


def _count(window: int | None, side: int) -> tuple[int, int]:
    """Number of windows along a side of the map, and their size in pixels."""
    # not -(-side // window): in ONNX the quotient of a negative number is rounded towards zero
    return (1, side) if window is None else ((side + window - 1) // window, window)


def _partition(x_BHWC: Tensor, win_h: int, win_w: int) -> Tensor:
    """`[B, H, W, C'] -> [U, h, w, C']`. The window must divide H and W."""
    x = x_BHWC.unflatten(2, (-1, win_w)).unflatten(1, (-1, win_h)).transpose(2, 3)
    return x.flatten(0, 2)


def _depthwise_conv(v_UhwC: Tensor, weight: Tensor, bias: Tensor, *, windows_per_image: int) -> Tensor:
    """Depthwise 3x3 convolution of each window with zero padding, `[U, h, w, C']`."""
    _, win_h, win_w, dim = v_UhwC.shape
    if win_h == 1:
        # Only the middle row of the kernel meets the window. The windows of an image can then be rows of one map.
        v = v_UhwC.view(-1, windows_per_image, win_w, dim)
        y = F.conv2d(v.permute(0, 3, 1, 2), weight[:, :, 1:2], bias, padding=(0, 1), groups=dim)
    else:
        y = F.conv2d(v_UhwC.permute(0, 3, 1, 2), weight, bias, padding=1, groups=dim)
    return y.permute(0, 2, 3, 1).reshape(v_UhwC.shape)
