"""Window attention: every pixel attends to the pixels of its window; each group of heads has windows of its own.

Shapes: B images, H x W pixels, N heads of width D in G equal groups, C' = N / G * D channels a group; windows of h x w
pixels. Suffixes in this file: q_BHWC is [B, H, W, C'] and q_UhwC is [U, h, w, C'], U windows of all images.

For pixel p of window u, head by head,

    y[p] = softmax over pixels j of u of (scale * q[p] . k[j]) v[j]  +  bias + sum over taps t of weight[t] v[p + t]

where the sum, a depthwise 3x3 convolution that sees zeros beyond the window (LePE), is optional. Where windows do not
divide the map, their grid is centred on it, the odd row or column after; pixels beyond the map have q = k = v = 0 and
stay in the softmax (CSWin, arXiv 2107.00652, sec. 3.2, in the reading of its dense-prediction models).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._launch import autocast, choose_backend, common_reasons, library
from ._precision import at_least_float32
from ._sdpa import fused_attention

# name -> (B, (H, W), N, D, windows, with LePE): stages of the published models at 224 or 384, 512 and detection sizes;
# those named "-windows" and "-hifi" get each window as an image of its own
CASES = {
    "cswin-small-stage1-224": (64, (56, 56), 2, 32, ((56, 1), (1, 56)), True),
    "cswin-small-stage2-224": (64, (28, 28), 4, 32, ((28, 2), (2, 28)), True),
    "cswin-small-stage3-224": (64, (14, 14), 8, 32, ((14, 7), (7, 14)), True),
    "cswin-base-stage1-224": (64, (56, 56), 4, 24, ((56, 1), (1, 56)), True),
    "cswin-base-stage2-224": (64, (28, 28), 8, 24, ((28, 2), (2, 28)), True),
    "cswin-base-stage3-224": (64, (14, 14), 16, 24, ((14, 7), (7, 14)), True),
    "cswin-base-stage3-384": (64, (24, 24), 16, 24, ((24, 12), (12, 24)), True),
    "cswin-small-stage1-512": (2, (128, 128), 2, 32, ((128, 1), (1, 128)), True),
    "cswin-small-stage2-512": (2, (64, 64), 4, 32, ((64, 2), (2, 64)), True),
    "cswin-small-stage3-512": (2, (32, 32), 8, 32, ((32, 7), (7, 32)), True),
    "cswin-small-stage4-512": (2, (16, 16), 16, 32, ((16, 16),), True),
    "cswin-small-stage1-800x1344": (2, (200, 336), 2, 32, ((200, 1), (1, 336)), True),
    "cswin-small-stage2-800x1344": (2, (100, 168), 4, 32, ((100, 2), (2, 168)), True),
    "cswin-small-stage3-800x1344": (2, (50, 84), 8, 32, ((50, 7), (7, 84)), True),
    "davit-small-stage1-224-windows": (64 * 64, (7, 7), 3, 32, ((7, 7),), False),
    "davit-small-stage3-224-windows": (64 * 4, (7, 7), 12, 32, ((7, 7),), False),
    "davit-small-stage1-512-windows": (2 * 361, (7, 7), 3, 32, ((7, 7),), False),
    "davit-small-stage1-800x1344-windows": (2 * 1392, (7, 7), 3, 32, ((7, 7),), False),
    "litv2-small-stage3-224-hifi": (64 * 49, (2, 2), 2, 32, ((2, 2),), False),
    "litv2-small-stage3-512-hifi": (2 * 256, (2, 2), 2, 32, ((2, 2),), False),
    "litv2-small-stage3-800x1344-hifi": (2 * 1050, (2, 2), 2, 32, ((2, 2),), False),
}


_MOST_TOKENS = 4096  # of one window, in the kernels
_MOST_ELEMENTS = 1 << 30  # of one image: offsets inside two of them are 32-bit integers in the kernels

Lepe = Sequence[tuple[Tensor, Tensor]]


def window_attention(
    qkv: Tensor,
    *,
    windows: Sequence[tuple[int, int]],
    lepe: Lepe | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention within windows, without a copy of the map cut into them.

    Args:
        qkv: `[B, H, W, 3, N, D]`, the projection's output as it comes.
        windows: (height, width) in pixels for each of G equal groups of heads, in the order of the heads.
        lepe: weight `[C', 1, 3, 3]` and bias `[C']` for each group.
        scale: factor of the logits; None takes D**-0.5.
        backend: `auto`, `triton` or `reference`; None takes `TESSEL_KERNELS`.

    Returns:
        `[B, H, W, N, D]`. On `triton` the backward is deterministic, can be taken once, and keeps only `qkv`, and one
        statistic per row where a window has more than one tile of pixels.

    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `backend="triton"` where it cannot run.
    """
    _check(qkv, windows, lepe)
    qkv = autocast(qkv)
    if lepe is not None:
        lepe = [(autocast(weight), autocast(bias)) for weight, bias in lepe]
    reasons = window_attention_unsupported(qkv, windows=windows, lepe=lepe)
    if choose_backend("window_attention", backend, reasons) == "triton":
        sides = [side for window in windows for side in window]
        scale = qkv.shape[-1] ** -0.5 if scale is None else scale
        return _WindowAttention.apply(qkv, sides, scale, *(x for pair in lepe or () for x in pair))
    return window_attention_reference(qkv, windows=windows, lepe=lepe, scale=scale)


def window_attention_reference(
    qkv: Tensor, *, windows: Sequence[tuple[int, int]], lepe: Lepe | None = None, scale: float | None = None
) -> Tensor:
    """The definition of `window_attention`: the map cut into windows, then ordinary attention and convolution."""
    groups, head_dim = len(windows), qkv.shape[-1]
    # one split for all groups, so that the backward writes the packed gradient once
    parts = qkv.flatten(3).chunk(3 * groups, -1)
    results = []
    for g, window in enumerate(windows):
        q, k, v = parts[g::groups]
        taps = None if lepe is None else lepe[g]
        results.append(_attend(q, k, v, window, taps, head_dim=head_dim, scale=scale))
    y = results[0] if groups == 1 else torch.cat(results, -1)
    return y.unflatten(-1, qkv.shape[4:])


def window_attention_unsupported(
    qkv: Tensor, *, windows: Sequence[tuple[int, int]], lepe: Lepe | None = None
) -> list[str]:
    """Why the Triton kernels cannot serve these tensors; empty where they can."""
    reasons = common_reasons(qkv, head_dim=qkv.shape[-1])
    for height, width in windows:
        if height * width > _MOST_TOKENS:
            reasons.append(f"a window of {height}x{width} has more than {_MOST_TOKENS} pixels")
    if math.prod(qkv.shape[1:]) > _MOST_ELEMENTS:
        reasons.append(f"qkv has more than {_MOST_ELEMENTS} elements an image")
    for dtype in {x.dtype for pair in lepe or () for x in pair} - {qkv.dtype}:
        reasons.append(f"lepe has dtype={dtype}, qkv dtype={qkv.dtype}")
    return reasons


def _check(qkv: Tensor, windows: Sequence[tuple[int, int]], lepe: Lepe | None) -> None:
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"window_attention: qkv must be [B, H, W, 3, heads, head_dim], got shape={tuple(qkv.shape)}")
    heads, head_dim = qkv.shape[4:]
    if not windows or heads % len(windows):
        raise ValueError(f"window_attention: heads={heads} must be divisible by the {len(windows)} windows given")
    for window in windows:
        if len(window) != 2 or min(window) < 1:
            raise ValueError(f"window_attention: window={window} must be (height, width), both at least 1")
    if lepe is None:
        return
    if len(lepe) != len(windows):
        raise ValueError(
            f"window_attention: lepe has {len(lepe)} entries for {len(windows)} windows; give one for each"
        )
    channels = heads // len(windows) * head_dim
    for weight, bias in lepe:
        if weight.shape != (channels, 1, 3, 3) or bias.shape != (channels,):
            raise ValueError(
                f"window_attention: lepe must be ({channels}, 1, 3, 3) and ({channels},) for {heads} heads of "
                f"{head_dim} in {len(windows)} groups, got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )


def _attend(
    q_BHWC: Tensor,
    k_BHWC: Tensor,
    v_BHWC: Tensor,
    window: tuple[int, int],
    lepe: tuple[Tensor, Tensor] | None,
    *,
    head_dim: int,
    scale: float | None,
) -> Tensor:
    """One group of heads: `[B, H, W, C']`."""
    (_, height, width, dim), (win_h, win_w) = q_BHWC.shape, window
    rows, cols = -(-height // win_h), -(-width // win_w)
    if rows == 1 and cols > 1:
        # rows of a map are cut into windows without a copy, and convolutions like long rows better
        q, k, v = (t.transpose(1, 2) for t in (q_BHWC, k_BHWC, v_BHWC))
        turned = None if lepe is None else (lepe[0].mT, lepe[1])
        return _attend(q, k, v, (win_w, win_h), turned, head_dim=head_dim, scale=scale).transpose(1, 2)
    below, aside = rows * win_h - height, cols * win_w - width
    top, left = below // 2, aside // 2
    if below or aside:
        padding = (0, 0, left, aside - left, top, below - top)
        q_BHWC, k_BHWC, v_BHWC = (F.pad(t, padding) for t in (q_BHWC, k_BHWC, v_BHWC))
    if lepe is not None:
        # the convolution needs its input dense
        v_BHWC = v_BHWC.contiguous()
    q_UhwC, k_UhwC, v_UhwC = (_cut(t, win_h, win_w) for t in (q_BHWC, k_BHWC, v_BHWC))
    heads = (dim // head_dim, head_dim)
    q, k, v = (t.flatten(1, 2).unflatten(-1, heads).transpose(1, 2) for t in (q_UhwC, k_UhwC, v_UhwC))
    y_UhwC = fused_attention(q, k, v, scale=scale).transpose(1, 2).reshape(v_UhwC.shape)
    if lepe is not None:
        y_UhwC = y_UhwC + _convolve(v_UhwC, *lepe, rows * cols)
    y = y_UhwC.view(-1, rows, cols, win_h, win_w, dim).transpose(2, 3)
    y = y.reshape(-1, rows * win_h, cols * win_w, dim)
    return y[:, top : top + height, left : left + width] if below or aside else y


def _cut(x_BHWC: Tensor, win_h: int, win_w: int) -> Tensor:
    """`[B, H, W, C'] -> [U, h, w, C']`; the windows divide the map."""
    cells = x_BHWC.unflatten(2, (-1, win_w)).unflatten(1, (-1, win_h)).transpose(2, 3)
    return cells.flatten(0, 2)


def _convolve(v_UhwC: Tensor, weight: Tensor, bias: Tensor, count: int) -> Tensor:
    """Depthwise 3x3 convolution of each window, zeros beyond its border; `count` windows an image."""
    _, win_h, win_w, dim = v_UhwC.shape
    if win_h == 1:
        # only the middle row of the kernel falls on a window, and an image's windows may be rows of one map
        v = v_UhwC.view(-1, count, win_w, dim)
        y = F.conv2d(v.permute(0, 3, 1, 2), weight[:, :, 1:2], bias, padding=(0, 1), groups=dim)
    else:
        y = F.conv2d(v_UhwC.permute(0, 3, 1, 2), weight, bias, padding=1, groups=dim)
    return y.permute(0, 2, 3, 1).reshape(v_UhwC.shape)


library.define(
    "window_attention(Tensor qkv, Tensor[] lepe, SymInt[] sides, float scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "window_attention_backward(Tensor qkv, Tensor[] lepe, Tensor lse, Tensor grad, SymInt[] sides, float scale)"
    " -> (Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(qkv, lepe, sides, scale):
    if not qkv.numel():
        return _forward_fake(qkv, lepe, sides, scale)
    from .window_triton import forward

    return forward(qkv.contiguous(), [x.contiguous() for x in lepe], sides, scale)


def _backward(qkv, lepe, lse, grad, sides, scale):
    if not qkv.numel():
        return torch.zeros_like(qkv), [torch.zeros_like(x) for x in lepe]
    from .window_triton import backward

    return backward(qkv.contiguous(), [x.contiguous() for x in lepe], lse, grad.contiguous(), sides, scale)


def _forward_fake(qkv, lepe, sides, scale):
    from .window_triton import one_tile

    out = qkv.new_empty(qkv.shape[:3] + qkv.shape[4:])
    whole = all(one_tile(h * w) for h, w in zip(sides[::2], sides[1::2], strict=True))
    return out, qkv.new_empty((0,) if whole else out.shape[:4], dtype=at_least_float32(qkv))


def _backward_fake(qkv, lepe, lse, grad, sides, scale):
    return qkv.new_empty(qkv.shape), [x.new_empty(x.shape) for x in lepe]


library.impl("window_attention", _forward, "CompositeExplicitAutograd")
library.impl("window_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("tessel::window_attention", _forward_fake, lib=library)
torch.library.register_fake("tessel::window_attention_backward", _backward_fake, lib=library)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, sides, scale, *lepe):
        out, lse = torch.ops.tessel.window_attention(qkv, lepe, sides, scale)
        ctx.save_for_backward(qkv, lse, *lepe)
        ctx.settings = (sides, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        qkv, lse, *lepe = ctx.saved_tensors
        dqkv, dlepe = torch.ops.tessel.window_attention_backward(qkv, lepe, lse, grad, *ctx.settings)
        return dqkv, None, None, *dlepe


def _products(qkv, sides) -> int:
    """Flops of one matrix product between the pixels of the map and those of their windows."""
    batch, height, width, _, heads, head_dim = qkv
    keys = sum(h * w for h, w in zip(sides[::2], sides[1::2], strict=True))
    return 2 * batch * height * width * heads * head_dim * keys // (len(sides) // 2)


def _taps(qkv, lepe) -> int:
    """Flops of one depthwise convolution."""
    batch, height, width, _, heads, head_dim = qkv
    return 2 * 9 * batch * height * width * heads * head_dim if lepe else 0


@register_flop_formula(torch.ops.tessel.window_attention)
def _forward_flops(qkv, lepe, sides, scale, *args, out_shape=None, **kwargs) -> int:
    return 2 * _products(qkv, sides) + _taps(qkv, lepe)


@register_flop_formula(torch.ops.tessel.window_attention_backward)
def _backward_flops(qkv, lepe, lse, grad, sides, scale, *args, out_shape=None, **kwargs) -> int:
    return 5 * _products(qkv, sides) + 2 * _taps(qkv, lepe)
