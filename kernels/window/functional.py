"""The public function of window attention, its shape checks, and its registration as a torch operator.

Shapes as in reference.py, which defines the operator.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..dispatch import choose_backend, common_unsupported_reasons
from ..precision import acc_dtype, autocast_dtype, cast_to_autocast
from ..recording import exporting
from ..workload import Workload, workload
from .placed import Start
from .position import bias_gradient, dense_bias
from .reference import Lepe, Window, sides, window_attention_reference
from .tiles import Case, fits_one_tile

# stages of the published models at 224 or 384, at 512 and at detection sizes. In cases named "-windows" and "-hifi"
# each window is an image of its own. Maps of Swin are padded to multiples of the window before.
CASES = {
    "cswin-small-stage1-224": Case(64, (56, 56), 2, 32, ((56, 1), (1, 56)), True),
    "cswin-small-stage2-224": Case(64, (28, 28), 4, 32, ((28, 2), (2, 28)), True),
    "cswin-small-stage3-224": Case(64, (14, 14), 8, 32, ((14, 7), (7, 14)), True),
    "cswin-base-stage1-224": Case(64, (56, 56), 4, 24, ((56, 1), (1, 56)), True),
    "cswin-base-stage2-224": Case(64, (28, 28), 8, 24, ((28, 2), (2, 28)), True),
    "cswin-base-stage3-224": Case(64, (14, 14), 16, 24, ((14, 7), (7, 14)), True),
    "cswin-base-stage3-384": Case(64, (24, 24), 16, 24, ((24, 12), (12, 24)), True),
    "cswin-small-stage1-512": Case(2, (128, 128), 2, 32, ((128, 1), (1, 128)), True),
    "cswin-small-stage2-512": Case(2, (64, 64), 4, 32, ((64, 2), (2, 64)), True),
    "cswin-small-stage3-512": Case(2, (32, 32), 8, 32, ((32, 7), (7, 32)), True),
    "cswin-small-stage4-512": Case(2, (16, 16), 16, 32, ((16, 16),), True),
    "cswin-small-stage1-800x1344": Case(2, (200, 336), 2, 32, ((200, 1), (1, 336)), True),
    "cswin-small-stage2-800x1344": Case(2, (100, 168), 4, 32, ((100, 2), (2, 168)), True),
    "cswin-small-stage3-800x1344": Case(2, (50, 84), 8, 32, ((50, 7), (7, 84)), True),
    "davit-small-stage1-224-windows": Case(64 * 64, (7, 7), 3, 32, ((7, 7),), False),
    "davit-small-stage3-224-windows": Case(64 * 4, (7, 7), 12, 32, ((7, 7),), False),
    "davit-small-stage1-512-windows": Case(2 * 361, (7, 7), 3, 32, ((7, 7),), False),
    "davit-small-stage1-800x1344-windows": Case(2 * 1392, (7, 7), 3, 32, ((7, 7),), False),
    "litv2-small-stage3-224-hifi": Case(64 * 49, (2, 2), 2, 32, ((2, 2),), False),
    "litv2-small-stage3-512-hifi": Case(2 * 256, (2, 2), 2, 32, ((2, 2),), False),
    "litv2-small-stage3-800x1344-hifi": Case(2 * 1050, (2, 2), 2, 32, ((2, 2),), False),
    "swin-tiny-stage1-224": Case(64, (56, 56), 3, 32, ((7, 7),), bias="table", start=0),
    "swin-tiny-stage1-224-shifted": Case(64, (56, 56), 3, 32, ((7, 7),), bias="table", start=3),
    "swin-tiny-stage2-224-shifted": Case(64, (28, 28), 6, 32, ((7, 7),), bias="table", start=3),
    "swin-tiny-stage3-224-shifted": Case(64, (14, 14), 12, 32, ((7, 7),), bias="table", start=3),
    "swin-tiny-stage4-224": Case(64, (7, 7), 24, 32, ((7, 7),), bias="table", start=0),
    "swin-base-stage1-384-shifted": Case(16, (96, 96), 4, 32, ((12, 12),), bias="table", start=6),
    "swin-tiny-stage1-800x1344-shifted": Case(2, (203, 336), 3, 32, ((7, 7),), bias="table", start=3),
    "crossformer-small-stage1-224-long": Case(64, (56, 56), 3, 32, ((7, 7),), bias="dense", stride=8, start=0),
    "crossformer-small-stage2-224-long": Case(64, (28, 28), 6, 32, ((7, 7),), bias="dense", stride=4, start=0),
    "crossformer-small-stage3-224-long": Case(64, (14, 14), 12, 32, ((7, 7),), bias="dense", stride=2, start=0),
    "crossformer-small-stage1-800x1344-long": Case(2, (200, 336), 3, 32, ((7, 7),), bias="dense", stride=8, start=0),
    "crossformer-pp-small-stage1-224-long": Case(64, (56, 56), 2, 32, ((4, 4),), bias="dense", stride=4, start=0),
    "crossformer-pp-small-stage3-224": Case(64, (14, 14), 8, 32, ((14, 14),), bias="dense", start=0),
}

# limits of the Triton kernels
MAX_WINDOW_PIXELS = 4096
MAX_IMAGE_ELEMENTS = 1 << 30  # offsets within two images are 32-bit integers


def window_attention(
    qkv: Tensor,
    *,
    windows: Sequence[Window],
    lepe: Lepe | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    start: Start | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention within windows. The Triton kernels make no copy of the map partitioned into windows.

    Args:
        qkv: `[B, H, W, 3, N, D]`, the projection's output.
        windows: (height, width) in pixels for each of the G equal groups of heads, in the order of the heads; None
            instead of a number means the whole side of the map.
        lepe: weight `[C', 1, 3, 3]` and bias `[C']` for each group, or None for no convolution.
        bias: added to the logits. For windows of h x w either dense, `[N, h * w, h * w]` for each query and key with
            pixels numbered row by row, or a table `[N, 2h - 1, 2w - 1]`, by row and by column of the query minus those
            of the key, in steps of `stride` and counted from -(h - 1) and -(w - 1).
        stride: distance between the pixels of a window; 1 means adjacent pixels.
        start: first row and column of a window, from 0 to h * stride - 1 and w * stride - 1 (a tensor is accepted in a
            graph of open sizes). Pixels outside of the map are no keys then. None: the map is zero-padded on both
            sides, and padding belongs to the keys.
        scale: factor of the logits; None means `D**-0.5`.
        backend: `auto`, `triton` or `reference`; None means the environment variable `TESSEL_KERNELS`.

    `bias`, `stride` above 1 and `start` need a single window for all heads, and no `lepe`.

    Returns:
        `[B, H, W, N, D]`. On `triton` the backward is deterministic and has no second derivative. It keeps `qkv`,
        `bias` and, with a bias or if a window has more than one tile of pixels, one float per query and head.

    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `backend="triton"` where it cannot run.
    """
    _check(qkv, windows, lepe)
    _check_place(qkv, windows, lepe, bias, stride, start)
    qkv = cast_to_autocast(qkv)
    if lepe is not None:
        lepe = [(cast_to_autocast(weight), cast_to_autocast(bias)) for weight, bias in lepe]
    reasons = window_attention_unsupported(qkv, windows=windows, lepe=lepe, start=start)
    work = _workload(qkv, windows, bias=bias is not None)
    if choose_backend("window_attention", backend, reasons, work) == "triton":
        scale = qkv.shape[-1] ** -0.5 if scale is None else scale
        exact = None if bias is None else bias.to(acc_dtype(qkv))
        pixels = [side for window in windows for side in sides(window, qkv)]
        place = -1 if start is None else int(start)
        out, _ = _forward_op(qkv, [x for pair in lepe or () for x in pair], exact, pixels, stride, place, scale)
        return out
    return window_attention_reference(
        qkv, windows=windows, lepe=lepe, bias=bias, stride=stride, start=start, scale=scale
    )


def _workload(qkv: Tensor, windows: Sequence[Window], *, bias: bool) -> Workload:
    keys = sum(math.prod(sides(window, qkv)) for window in windows) // len(windows)
    return workload(qkv, queries=math.prod(qkv.shape[:3]) * qkv.shape[4], keys=keys, bias=bias)


def window_kernels_run(x: Tensor, *, num_heads: int, window: Window) -> bool:
    """Whether the Triton kernels run in a call with a bias whose qkv is a projection of `x: [B, H, W, C]`.

    Blocks ask before they project: plain PyTorch copies the windows, and x is a third as wide as qkv. Raises
    RuntimeError where the default backend is `triton` and cannot run.
    """
    anywhere = dispatch.default_backend == "triton" or dispatch.interpreting()
    if exporting() or not (x.is_cuda or anywhere):
        return False
    batch, height, width, channels = x.shape
    scalar = x.new_empty((), dtype=autocast_dtype(x))
    qkv = scalar.expand(batch, height, width, 3, num_heads, channels // num_heads)
    reasons = window_attention_unsupported(qkv, windows=(window,))
    work = _workload(qkv, (window,), bias=True)._replace(training=torch.is_grad_enabled() and x.requires_grad)
    return choose_backend("window_attention", None, reasons, work) == "triton"


def window_attention_unsupported(
    qkv: Tensor, *, windows: Sequence[Window], lepe: Lepe | None = None, start: Start | None = None
) -> list[str]:
    """Return the reasons why the Triton kernels cannot run on these tensors; empty if they can."""
    reasons = common_unsupported_reasons(qkv, head_dim=qkv.shape[-1])
    if reasons and exporting():
        return reasons  # comparing open sizes would narrow the graph
    for height, width in (sides(window, qkv) for window in windows):
        if height * width > MAX_WINDOW_PIXELS:
            reasons.append(f"a window of {height}x{width} has more than {MAX_WINDOW_PIXELS} pixels")
    if math.prod(qkv.shape[1:]) > MAX_IMAGE_ELEMENTS:
        reasons.append(f"qkv has more than {MAX_IMAGE_ELEMENTS} elements per image")
    for dtype in {x.dtype for pair in lepe or () for x in pair} - {qkv.dtype}:
        reasons.append(f"lepe has dtype={dtype}, qkv dtype={qkv.dtype}")
    if isinstance(start, Tensor):
        reasons.append("start is a tensor")
    return reasons


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


def _check_place(
    qkv: Tensor, windows: Sequence[Window], lepe: Lepe | None, bias: Tensor | None, stride: int, start: Start | None
) -> None:
    if stride < 1:
        raise ValueError(f"window_attention: stride={stride} must be at least 1")
    if bias is None and stride == 1 and start is None:
        return
    if len(windows) != 1 or lepe is not None:
        raise ValueError(
            f"window_attention: bias, stride and start need one window for all heads and no lepe, got {len(windows)} "
            f"windows and {'no ' if lepe is None else ''}lepe"
        )
    if stride > 1 and None in windows[0]:
        raise ValueError(f"window_attention: stride={stride} needs a window of given sides, got window={windows[0]}")
    if isinstance(start, int) and not all(0 <= start < n * stride for n in windows[0] if n is not None):
        raise ValueError(
            f"window_attention: start={start} must be at least 0 and below the extent of the window, "
            f"window={windows[0]} times stride={stride}"
        )
    if bias is not None and not exporting():
        (height, width), heads = sides(windows[0], qkv), qkv.shape[4]
        dense, table = (heads, height * width, height * width), (heads, 2 * height - 1, 2 * width - 1)
        if bias.shape not in (dense, table):
            raise ValueError(
                f"window_attention: bias must be {dense} or a table {table} for {heads} heads and a window of "
                f"{height}x{width}, got shape={tuple(bias.shape)}"
            )


# In the operators, `lepe` is weight and bias of each group in turn (or empty), `bias` has the accumulators' dtype,
# `sides` is height and width of each group's windows in turn, and `start` is -1 instead of None.


@torch.library.custom_op("tessel::window_attention", mutates_args=())
def _forward_op(
    qkv: Tensor,
    lepe: Sequence[Tensor],
    bias: Tensor | None,
    sides: Sequence[int],
    stride: int,
    start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, W, N, D]` and lse: `[B, H, W, N]`, or empty if every window fits one tile and has no bias."""
    if not qkv.numel():
        return _empty_outputs(qkv, lepe, bias, sides, stride, start, scale)
    from .triton import forward

    return forward(qkv.contiguous(), [x.contiguous() for x in lepe], _dense(bias, sides), sides, stride, start, scale)


@_forward_op.register_fake
def _empty_outputs(qkv, lepe, bias, sides, stride, start, scale):
    out = qkv.new_empty(qkv.shape[:3] + qkv.shape[4:])
    one_tile = all(fits_one_tile(h * w) for h, w in zip(sides[::2], sides[1::2], strict=True))
    return out, qkv.new_empty(out.shape[:4] if bias is not None or not one_tile else (0,), dtype=acc_dtype(qkv))


def _dense(bias: Tensor | None, sides: Sequence[int]) -> Tensor | None:
    return None if bias is None else dense_bias(bias, (sides[0], sides[1])).contiguous()


@torch.library.custom_op("tessel::window_attention_backward", mutates_args=())
def _backward_op(
    qkv: Tensor,
    lepe: Sequence[Tensor],
    bias: Tensor | None,
    lse: Tensor,
    do: Tensor,
    sides: Sequence[int],
    stride: int,
    start: int,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of qkv, and of each tensor of lepe or of bias; `do` is the gradient of out."""
    parameters = lepe if bias is None else [bias]
    if not qkv.numel():
        return torch.zeros_like(qkv), [torch.zeros_like(x) for x in parameters]
    from .triton import backward

    dqkv, gradients = backward(
        qkv.contiguous(),
        [x.contiguous() for x in lepe],
        _dense(bias, sides),
        lse,
        do.contiguous(),
        sides,
        stride,
        start,
        scale,
    )
    if bias is not None:
        gradients = [bias_gradient(gradients[0], (sides[0], sides[1]), bias)]
    return dqkv, gradients


@_backward_op.register_fake
def _(qkv, lepe, bias, lse, do, sides, stride, start, scale):
    return qkv.new_empty(qkv.shape), [x.new_empty(x.shape) for x in (lepe if bias is None else [bias])]


def _save_for_backward(ctx, inputs, output):
    qkv, lepe, bias, *ctx.sizes = inputs
    _, lse = output
    ctx.save_for_backward(qkv, lse, bias, *lepe)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zero tensor for lse; a gradient that is zero arrives as None


def _backward(ctx, do, _):
    qkv, lse, bias, *lepe = ctx.saved_tensors
    nothing = [None] * len(ctx.sizes)
    if do is None:
        return None, [None] * len(lepe), None, *nothing
    dqkv, gradients = _backward_op(qkv, lepe, bias, lse, do, *ctx.sizes)
    if bias is None:
        return dqkv, gradients, None, *nothing
    return dqkv, [], gradients[0], *nothing


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
def _forward_flops(qkv, lepe, bias, sides, *args, out_shape=None, **kwargs) -> int:
    return 2 * _matmul_flops(qkv, sides) + _conv_flops(qkv, lepe)


@register_flop_formula(torch.ops.tessel.window_attention_backward)
def _backward_flops(qkv, lepe, bias, lse, do, sides, *args, out_shape=None, **kwargs) -> int:
    return 5 * _matmul_flops(qkv, sides) + 2 * _conv_flops(qkv, lepe)
