"""Launches of the Triton kernels of window attention, see triton_kernels.py."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..dispatch import interpreting
from ..precision import acc_dtype
from ..triton_common import LOG2_E, KernelSpec, padded_dim
from .tiles import Case, fits_one_tile
from .triton_kernels import (
    bias_backward_kernel,
    forward_kernel,
    key_backward_kernel,
    one_tile_backward_kernel,
    query_backward_kernel,
)

POINTER_TYPES = dict.fromkeys(("lse_ptr", "delta_ptr", "partial_ptr", "pairs_ptr", "dpairs_ptr"), "fp32")

RUN = 16  # windows of a program in the backward of the bias, at least
MAX_PARTIAL_BYTES = 64 << 20  # of the sums that these programs store


def _kernel_specs(
    window: tuple[int, int], head_dim: int, *, lepe: bool, bias: bool, stride: int, placed: bool
) -> dict[str, KernelSpec]:
    """Return the kernels for a group of heads with these windows, for maps of any size, in launch order."""
    win_h, win_w = window
    pixels = win_h * win_w
    sizes = {"D": head_dim, "PAD_D": padded_dim(head_dim), "VERTICAL": win_h >= win_w, "INTERPRET": interpreting()}
    sizes |= {"STRIDE": stride, "PLACED": placed}
    constants = sizes | {"BIAS": bias}
    taps = {"TAPS_Y": 2 * min(win_h, 2) - 1 if lepe else 0, "TAPS_X": 2 * min(win_w, 2) - 1 if lepe else 0}
    if fits_one_tile(pixels):
        block, packed = 64 if pixels <= 64 else 128, pixels <= 32
        # in a packed tile every pair computes where its bias lies, which takes registers
        num_warps = 8 if block == 128 or (packed and bias) else 4
        constants |= {"BLOCK_M": block, "PACKED": packed, **taps}
        specs = {
            "forward": KernelSpec(forward_kernel, {**constants, "BLOCK_N": block, "ONE_TILE": True}, num_warps, 1),
            "backward": KernelSpec(one_tile_backward_kernel, constants, num_warps, 1),
        }
    else:
        constants |= {"BLOCK_M": 64, "BLOCK_N": 64}
        specs = {
            "forward": KernelSpec(forward_kernel, {**constants, **taps, "PACKED": False, "ONE_TILE": False}, 4, 2),
            "backward of q": KernelSpec(query_backward_kernel, constants, 4, 2),
            "backward of k, v": KernelSpec(key_backward_kernel, {**constants, **taps}, 4, 2),
        }
    if bias:
        block = min(64, padded_dim(pixels))
        specs["backward of the bias"] = KernelSpec(bias_backward_kernel, {**sizes, "BLOCK": block}, 8, 2)
    return specs


class _Group(NamedTuple):
    """A group of heads with its windows, its convolution (any tensors if there is none), and its kernels.

    start: the first row and column of a window, or -1 for windows that are centered on the map.
    """

    window: tuple[int, int]
    first_head: int
    heads: int
    weight: Tensor
    bias: Tensor
    stride: int
    start: int
    specs: dict[str, KernelSpec]


def _groups(
    qkv: Tensor, lepe: Sequence[Tensor], pairs: Tensor | None, sides: Sequence[int], stride: int, start: int
) -> Iterator[_Group]:
    heads = qkv.shape[4] * 2 // len(sides)
    options = {"lepe": bool(lepe), "bias": pairs is not None, "stride": stride, "placed": start >= 0}
    for g, window in enumerate(zip(sides[::2], sides[1::2], strict=True)):
        weight, bias = lepe[2 * g : 2 * g + 2] if lepe else (qkv, qkv)
        specs = _kernel_specs(window, qkv.shape[-1], **options)
        yield _Group(window, g * heads, heads, weight, bias, stride, start, specs)


def _windows(group: _Group, qkv: Tensor) -> int:
    """The number of windows of all images."""
    count = qkv.shape[0]
    for side, window in zip(qkv.shape[1:3], group.window, strict=True):
        span = window * group.stride
        before = span - group.start if group.start > 0 else 0
        count *= triton.cdiv(side + before, span) * group.stride
    return count


def _programs(group: _Group, spec: KernelSpec, qkv: Tensor) -> int:
    """The number of programs of one of the group's kernels, but for that of the bias."""
    windows, block, pixels = _windows(group, qkv), spec.constants["BLOCK_M"], group.window[0] * group.window[1]
    if spec.constants.get("PACKED"):
        return triton.cdiv(windows, block // pixels) * group.heads
    return windows * triton.cdiv(pixels, block) * group.heads


def _launch(group: _Group, name: str, scales: tuple[float, ...], *tensors: Tensor) -> None:
    """Launch the group's kernel `name`. The first tensor must be qkv."""
    qkv, spec = tensors[0], group.specs[name]
    _, height, width, _, heads, _ = qkv.shape
    with torch.cuda.device_of(qkv):
        spec.kernel[(_programs(group, spec, qkv),)](
            *tensors, _windows(group, qkv), height, width, *group.window, heads, group.first_head, group.heads,
            group.start, *scales, **spec.constants, num_warps=spec.num_warps, num_stages=spec.num_stages,
        )  # fmt: skip


def forward(
    qkv: Tensor,
    lepe: Sequence[Tensor],
    pairs: Tensor | None,
    sides: Sequence[int],
    stride: int,
    start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, W, N, D]` and lse `[B, H, W, N]`.

    All inputs must be contiguous. `lepe` is weight and bias of each group in turn, or empty; `pairs` is the dense bias
    or None; `sides` is height and width of each group's windows in turn; `start` is -1 for windows that are centered.
    Only groups with a bias or with windows of several tiles write lse; it is empty if there is no such group.
    """
    out = qkv.new_empty(qkv.shape[:3] + qkv.shape[4:])
    groups = list(_groups(qkv, lepe, pairs, sides, stride, start))
    empty = pairs is None and all("backward" in group.specs for group in groups)
    lse = qkv.new_empty((0,) if empty else out.shape[:4], dtype=acc_dtype(qkv))
    for group in groups:
        tensors = group.weight, group.bias, qkv if pairs is None else pairs, out, lse
        _launch(group, "forward", (scale * LOG2_E,), qkv, *tensors)
    return out, lse


def backward(
    qkv: Tensor,
    lepe: Sequence[Tensor],
    pairs: Tensor | None,
    lse: Tensor,
    do: Tensor,
    sides: Sequence[int],
    stride: int,
    start: int,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of qkv, and of each tensor of lepe or of `pairs`: arguments of `forward`, its lse and do."""
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    scales, bias = (scale, scale * LOG2_E), qkv if pairs is None else pairs
    gradients = []
    for group in _groups(qkv, lepe, pairs, sides, stride, start):
        partial = _empty_partial_sums(group, qkv) if lepe else qkv
        if "backward" in group.specs:
            _launch(group, "backward", scales, qkv, group.weight, bias, do, delta, dqkv, partial)
        else:  # the first kernel writes delta, the second reads it
            _launch(group, "backward of q", scales, qkv, bias, do, lse, delta, dqkv)
            _launch(group, "backward of k, v", scales, qkv, group.weight, bias, do, lse, delta, dqkv, partial)
        if lepe:
            gradients += _lepe_gradients(group, partial)
        if pairs is not None:
            gradients.append(_bias_gradient(group, qkv, pairs, do, lse, delta, scale))
    return dqkv, gradients


def _bias_gradient(
    group: _Group, qkv: Tensor, pairs: Tensor, do: Tensor, lse: Tensor, delta: Tensor, scale: float
) -> Tensor:
    """The gradient of `pairs`: a sum over windows, first by each program, then over the programs."""
    spec, windows, (_, height, width, _, heads, _) = (
        group.specs["backward of the bias"],
        _windows(group, qkv),
        qkv.shape,
    )
    # not more than this many parts, so that their sums do not take too much memory
    parts = max(1, MAX_PARTIAL_BYTES // pairs.nbytes)
    run = max(RUN, triton.cdiv(windows, parts))
    partial = pairs.new_empty(triton.cdiv(windows, run), *pairs.shape)
    tiles = triton.cdiv(pairs.shape[-1], spec.constants["BLOCK"])
    with torch.cuda.device_of(qkv):
        spec.kernel[(len(partial) * tiles**2 * heads,)](
            qkv, pairs, do, lse, delta, partial, windows, height, width, *group.window, heads, group.start, run,
            scale * LOG2_E, **spec.constants, num_warps=spec.num_warps, num_stages=spec.num_stages,
        )  # fmt: skip
    return partial.sum(0)


def _taps(group: _Group) -> tuple[int, int]:
    constants = group.specs["forward"].constants
    return constants["TAPS_Y"], constants["TAPS_X"]


def _empty_partial_sums(group: _Group, qkv: Tensor) -> Tensor:
    """Allocate the buffer for the weight and bias gradients of each program of the group's last kernel."""
    programs = _programs(group, list(group.specs.values())[-1], qkv)
    taps_y, taps_x = _taps(group)
    return qkv.new_empty((programs, taps_y * taps_x + 1, qkv.shape[-1]), dtype=acc_dtype(qkv))


def _lepe_gradients(group: _Group, partial: Tensor) -> list[Tensor]:
    """Return the gradients of weight and bias. Taps that never meet a window get zero."""
    taps_y, taps_x = _taps(group)
    sums = partial.unflatten(0, (-1, group.heads)).sum(0)  # [heads, taps + 1, D]
    taps = sums[:, :-1].mT.reshape(-1, 1, taps_y, taps_x)
    y, x = (3 - taps_y) // 2, (3 - taps_x) // 2
    return [
        gradient.to(parameter.dtype, copy=True, memory_format=torch.contiguous_format)
        for gradient, parameter in ((F.pad(taps, (x, x, y, y)), group.weight), (sums[:, -1].flatten(), group.bias))
    ]


def aot_specs(case: Case) -> dict[str, KernelSpec]:
    """Return the kernels of a forward and backward of one of `window.CASES`, for ahead-of-time compilation."""
    options = {"lepe": case.lepe, "bias": case.bias != "none", "stride": case.stride, "placed": case.start is not None}
    return {
        name if height >= width else f"{name}, wide": spec
        for height, width in case.windows
        for name, spec in _kernel_specs((height, width), case.head_dim, **options).items()
    }
