"""The public function of window attention, its shape checks, and its registration as a torch operator.

Shapes as in reference.py, which defines the operator.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import choose_backend, common_unsupported_reasons
from ..precision import acc_dtype, cast_to_autocast
from ..recording import exporting
from ..workload import workload
from .reference import Lepe, Window, window_attention_reference
from .tiles import fits_one_tile

# name -> (B, (H, W), N, D, windows, with LePE): stages of the published models at 224 or 384, at 512 and at detection
# sizes. In cases named "-windows" and "-hifi" each window is an image of its own.
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

# limits of the Triton kernels
MAX_WINDOW_PIXELS = 4096
MAX_IMAGE_ELEMENTS = 1 << 30  # offsets within two images are 32-bit integers


def window_attention(
    qkv: Tensor,
    *,
    windows: Sequence[Window],
    lepe: Lepe | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention within windows. The Triton kernels make no copy of the map partitioned into windows.

    Args:
        qkv: `[B, H, W, 3, N, D]`, the projection's output.
        windows: (height, width) in pixels for each of the G equal groups of heads, in the order of the heads; None
            instead of a number means the whole side of the map.
        lepe: weight `[C', 1, 3, 3]` and bias `[C']` for each group, or None for no convolution.
        scale: factor of the logits; None means `D**-0.5`.
        backend: `auto`, `triton` or `reference`; None means the environment variable `TESSEL_KERNELS`.

    Returns:
        `[B, H, W, N, D]`. On `triton` the backward is deterministic and has no second derivative. It keeps `qkv` and,
        if a window has more than one tile of pixels, one float per query and head.

    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `backend="triton"` where it cannot run.
    """
    _check(qkv, windows, lepe)
    qkv = cast_to_autocast(qkv)
    if lepe is not None:
        lepe = [(cast_to_autocast(weight), cast_to_autocast(bias)) for weight, bias in lepe]
    reasons = window_attention_unsupported(qkv, windows=windows, lepe=lepe)
    batch, height, width, _, heads, _ = qkv.shape
    sides = [side for window in windows for side in _sides(window, qkv)]
    keys = sum(h * w for h, w in zip(sides[::2], sides[1::2], strict=True)) // len(windows)
    work = workload(qkv, queries=batch * height * width * heads, keys=keys)
    if choose_backend("window_attention", backend, reasons, work) == "triton":
        scale = qkv.shape[-1] ** -0.5 if scale is None else scale
        out, _ = _forward_op(qkv, [x for pair in lepe or () for x in pair], sides, scale)
        return out
    return window_attention_reference(qkv, windows=windows, lepe=lepe, scale=scale)


def window_attention_unsupported(qkv: Tensor, *, windows: Sequence[Window], lepe: Lepe | None = None) -> list[str]:
    """Return the reasons why the Triton kernels cannot run on these tensors; empty if they can."""
    reasons = common_unsupported_reasons(qkv, head_dim=qkv.shape[-1])
    if reasons and exporting():
        return reasons  # comparing open sizes would narrow the graph
    for height, width in (_sides(window, qkv) for window in windows):
        if height * width > MAX_WINDOW_PIXELS:
            reasons.append(f"a window of {height}x{width} has more than {MAX_WINDOW_PIXELS} pixels")
    if math.prod(qkv.shape[1:]) > MAX_IMAGE_ELEMENTS:
        reasons.append(f"qkv has more than {MAX_IMAGE_ELEMENTS} elements per image")
    for dtype in {x.dtype for pair in lepe or () for x in pair} - {qkv.dtype}:
        reasons.append(f"lepe has dtype={dtype}, qkv dtype={qkv.dtype}")
    return reasons


def _sides(window: Window, qkv: Tensor) -> tuple[int, int]:
    """Height and width of a window in pixels."""
    height, width = window
    return (qkv.shape[1] if height is None else height), (qkv.shape[2] if width is None else width)


def _check(qkv: Tensor, windows: Sequence[Window], lepe: Lepe | None) -> None:
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"window_attention: qkv must be [B, H, W, 3, heads, head_dim], got shape={tuple(qkv.shape)}")
    heads, head_dim = qkv.shape[4:]
    if not windows or heads % len(windows):
        raise ValueError(f"window_attention: heads={heads} must be divisible by the {len(windows)} windows given")
    for window in windows:
        if len(window) != 2 or any(side is not None and side < 1 for side in window):
            raise ValueError(f"window_attention: window={window} must be (height, width), both at least 1 or None")
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


# In the operators, `lepe` is weight and bias of each group in turn (or empty), and `sides` height and width of each
# group's windows in turn.


@torch.library.custom_op("tessel::window_attention", mutates_args=())
def _forward_op(qkv: Tensor, lepe: Sequence[Tensor], sides: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, W, N, D]` and lse: `[B, H, W, N]`, or empty if every window fits one tile."""
    if not qkv.numel():
        return _empty_outputs(qkv, lepe, sides, scale)
    from .triton import forward

    return forward(qkv.contiguous(), [x.contiguous() for x in lepe], sides, scale)


@_forward_op.register_fake
def _empty_outputs(qkv, lepe, sides, scale):
    out = qkv.new_empty(qkv.shape[:3] + qkv.shape[4:])
    needs_lse = not all(fits_one_tile(h * w) for h, w in zip(sides[::2], sides[1::2], strict=True))
    return out, qkv.new_empty(out.shape[:4] if needs_lse else (0,), dtype=acc_dtype(qkv))


@torch.library.custom_op("tessel::window_attention_backward", mutates_args=())
def _backward_op(
    qkv: Tensor, lepe: Sequence[Tensor], lse: Tensor, do: Tensor, sides: Sequence[int], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of qkv and of each tensor of lepe; `do` is the gradient of out."""
    if not qkv.numel():
        return torch.zeros_like(qkv), [torch.zeros_like(x) for x in lepe]
    from .triton import backward

    return backward(qkv.contiguous(), [x.contiguous() for x in lepe], lse, do.contiguous(), sides, scale)


@_backward_op.register_fake
def _(qkv, lepe, lse, do, sides, scale):
    return qkv.new_empty(qkv.shape), [x.new_empty(x.shape) for x in lepe]


def _save_for_backward(ctx, inputs, output):
    qkv, lepe, ctx.sides, ctx.scale = inputs
    _, lse = output
    ctx.save_for_backward(qkv, lse, *lepe)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zero tensor for lse; a gradient that is zero arrives as None


def _backward(ctx, do, _):
    qkv, lse, *lepe = ctx.saved_tensors
    if do is None:
        return None, [None] * len(lepe), None, None
    dqkv, dlepe = _backward_op(qkv, lepe, lse, do, ctx.sides, ctx.scale)
    return dqkv, dlepe, None, None


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


def _matmul_flops(qkv, sides) -> int:
    """FLOPs of one matrix product between all queries and the keys of their windows."""
    batch, height, width, _, heads, head_dim = qkv
    keys = sum(h * w for h, w in zip(sides[::2], sides[1::2], strict=True))
    return 2 * batch * height * width * heads * head_dim * keys // (len(sides) // 2)


def _conv_flops(qkv, lepe) -> int:
    batch, height, width, _, heads, head_dim = qkv
    return 2 * 9 * batch * height * width * heads * head_dim if lepe else 0


@register_flop_formula(torch.ops.tessel.window_attention)
def _forward_flops(qkv, lepe, sides, scale, *args, out_shape=None, **kwargs) -> int:
    return 2 * _matmul_flops(qkv, sides) + _conv_flops(qkv, lepe)


@register_flop_formula(torch.ops.tessel.window_attention_backward)
def _backward_flops(qkv, lepe, lse, do, sides, scale, *args, out_shape=None, **kwargs) -> int:
    return 5 * _matmul_flops(qkv, sides) + 2 * _conv_flops(qkv, lepe)
