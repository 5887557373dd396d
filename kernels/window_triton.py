"""Triton kernels of `window`: forward, the backward of windows of one tile, and the two halves of any other backward.

One program owns one head of one tile of pixels. Pixels are taken window by window and inside a window along its shorter
side first, so that the length of a stripe is a number of the run and neighbours in a tile are neighbours in the map. A
tile holds a part of a window, all of it, or (PACKED) several small windows, of any images, whose pixels see only their
own. Every gradient is a sum in a fixed order, without atomics: those of the convolution's weight and bias are summed
for each program first and then over the programs by torch.

Layout: qkv [B, H, W, 3, N, D], out and grad [B, H, W, N, D], all contiguous; statistics [B, H, W, N] in base 2; weight
[C', 3, 3] and bias [C'] of a group of heads; partial sums [programs, taps + 1, D], the bias last.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import interpreting
from ._precision import at_least_float32
from ._triton import LOG2_E, Launch, dot

POINTERS = {"lse_ptr": "fp32", "delta_ptr": "fp32", "partial_ptr": "fp32"}

# of a group of heads and its map; the number of windows is that of all images
_SIZES = ["windows", "height", "width", "win_h", "win_w", "heads", "first_head", "group"]


@triton.jit
def _split_program(tokens, group, TILE: tl.constexpr, PACKED: tl.constexpr):
    """Program id -> (first window of the tile, first pixel in it, head of the group), head fastest."""
    pid = tl.program_id(0)
    rest = pid // group
    if PACKED:
        window, start = rest * (TILE // tokens), 0
    else:
        tiles = tl.cdiv(tokens, TILE)
        window, start = rest // tiles, rest % tiles * TILE
    return window, start, pid % group


@triton.jit
def _image(window, size):
    """The image of a window, and the number of the window in it."""
    height, width, win_h, win_w = size
    count = tl.cdiv(height, win_h) * tl.cdiv(width, win_w)
    return (window // count).to(tl.int64), window % count


@triton.jit
def _pixels(cell, start, left, size, TILE: tl.constexpr, VERTICAL: tl.constexpr, PACKED: tl.constexpr):
    """A tile of pixels, from pixel `start` of window `cell` of an image on; `left` windows are left from there.

    Returns the window of each, counted from `cell`; whether it is a pixel of a window; whether of the map, too; its
    index in the map; and its place: row, column, and the first and last row and column that its window has of the map,
    where rows go on counting from image to image.
    """
    height, width, win_h, win_w = size
    item = start + tl.arange(0, TILE)
    slot = 0
    live = item < win_h * win_w
    if PACKED:
        slot = item // (win_h * win_w)
        item = item % (win_h * win_w)
        live = slot < tl.minimum(TILE // (win_h * win_w), left)
    rows, cols = tl.cdiv(height, win_h), tl.cdiv(width, win_w)
    above = (cell + slot) // (rows * cols) * height
    y0 = (cell + slot) // cols % rows * win_h - (rows * win_h - height) // 2
    x0 = (cell + slot) % cols * win_w - (cols * win_w - width) // 2
    if VERTICAL:
        y, x = above + y0 + item // win_w, x0 + item % win_w
    else:
        y, x = above + y0 + item % win_h, x0 + item // win_h
    top, bottom = above + tl.maximum(y0, 0), above + tl.minimum(y0 + win_h, height) - 1
    place = (y, x, top, bottom, tl.maximum(x0, 0), tl.minimum(x0 + win_w, width) - 1)
    return slot, live, live & _inside(place, 0, 0), y * width + x, place


@triton.jit
def _inside(place, dy, dx):
    """Whether the pixel `dy` rows and `dx` columns away belongs to the same window, and to the map."""
    y, x, top, bottom, first, last = place
    return (y + dy >= top) & (y + dy <= bottom) & (x + dx >= first) & (x + dx <= last)


@triton.jit
def _load(base, at, ok, stride, D: tl.constexpr, PAD_D: tl.constexpr):
    """Rows of D numbers, zeros where not `ok`."""
    d = tl.arange(0, PAD_D)
    return tl.load(base + at[:, None] * stride + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(base, at, ok, stride, rows, D: tl.constexpr, PAD_D: tl.constexpr):
    d = tl.arange(0, PAD_D)
    rows = rows.to(base.dtype.element_ty)
    tl.store(base + at[:, None] * stride + d[None, :], rows, mask=ok[:, None] & (d < D)[None, :])


@triton.jit
def _seen(query_slot, key_slot, key_live, PACKED: tl.constexpr):
    """Which keys take part in which softmax, `[queries, keys]` or one row for all queries."""
    if PACKED:
        return query_slot[:, None] == key_slot[None, :]
    else:
        return key_live[None, :]


@triton.jit
def _seen_by(query_slot, key_slot, key_live, PACKED: tl.constexpr):
    """`_seen` the other way round, `[keys, queries]`."""
    if PACKED:
        return key_slot[:, None] == query_slot[None, :]
    else:
        return key_live[:, None]


@triton.jit
def _add_local(
    acc, base, weight_ptr, at, ok, place, width, stride,
    D: tl.constexpr, PAD_D: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
):  # fmt: skip
    """Add the taps of the convolution; where windows are one pixel wide only the middle ones can be met."""
    d = tl.arange(0, PAD_D)
    for tap in tl.static_range(TAPS_Y * TAPS_X):
        dy, dx = tap // TAPS_X - TAPS_Y // 2, tap % TAPS_X - TAPS_X // 2
        v = _load(base, at + dy * width + dx, ok & _inside(place, dy, dx), stride, D, PAD_D)
        weight = tl.load(weight_ptr + d * 9 + dy * 3 + dx + 4, mask=d < D, other=0.0)
        acc += v.to(acc.dtype) * weight.to(acc.dtype)[None, :]
    return acc


@triton.jit
def _add_local_backward(
    dv, v, grad_ptr, weight_ptr, partial_ptr, at, ok, place, width, stride,
    D: tl.constexpr, PAD_D: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
):  # fmt: skip
    """Add the transposed taps to dv, and write the program's share of the gradients of weight and bias."""
    TAPS: tl.constexpr = TAPS_Y * TAPS_X
    d = tl.arange(0, PAD_D)
    partial_ptr += tl.program_id(0).to(tl.int64) * ((TAPS + 1) * D)
    for tap in tl.static_range(TAPS):
        dy, dx = tap // TAPS_X - TAPS_Y // 2, tap % TAPS_X - TAPS_X // 2
        grad = _load(grad_ptr, at - dy * width - dx, ok & _inside(place, -dy, -dx), stride, D, PAD_D).to(dv.dtype)
        weight = tl.load(weight_ptr + d * 9 + dy * 3 + dx + 4, mask=d < D, other=0.0)
        dv += grad * weight.to(dv.dtype)[None, :]
        tl.store(partial_ptr + tap * D + d, tl.sum(grad * v.to(dv.dtype), 0), mask=d < D)
        if tap == TAPS // 2:
            tl.store(partial_ptr + TAPS * D + d, tl.sum(grad, 0), mask=d < D)
    return dv


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    qkv_ptr, weight_ptr, bias_ptr, out_ptr, lse_ptr,
    windows, height, width, win_h, win_w, heads, first_head, group, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, VERTICAL: tl.constexpr,
    PACKED: tl.constexpr, WHOLE: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if qkv_ptr.dtype.element_ty == tl.float64 else tl.float32
    size, tokens = (height, width, win_h, win_w), win_h * win_w
    stride, part = 3 * heads * D, heads * D
    window, start, head = _split_program(tokens, group, TILE, PACKED)
    image, cell = _image(window, size)
    slot, live, ok, at, place = _pixels(cell, start, windows - window, size, TILE, VERTICAL, PACKED)
    origin, column = image * height * width, (first_head + head) * D
    qkv_ptr += origin * stride + column
    q = _load(qkv_ptr, at, ok, stride, D, PAD_D)
    most = tl.full([TILE], -float("inf"), acc_dtype)
    total = tl.zeros([TILE], acc_dtype)
    acc = tl.zeros([TILE, PAD_D], acc_dtype)
    for key in tl.range(0, STEP if WHOLE else tokens, STEP):
        k_slot, k_live, k_ok, k_at, _ = _pixels(cell, key, windows - window, size, STEP, VERTICAL, PACKED)
        k = _load(qkv_ptr + part, k_at, k_ok, stride, D, PAD_D)
        v = _load(qkv_ptr + 2 * part, k_at, k_ok, stride, D, PAD_D)
        seen = _seen(slot, k_slot, k_live, PACKED)
        s = tl.where(seen, dot(q, tl.trans(k), INTERPRET) * scale_log2, -float("inf"))
        new_most = tl.maximum(most, tl.max(s, 1))
        p = tl.exp2(s - new_most[:, None])
        shrink = tl.exp2(most - new_most)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, INTERPRET)
        most = new_most
    acc = acc / total[:, None]
    if TAPS_Y > 0:
        d = tl.arange(0, PAD_D)
        acc += tl.load(bias_ptr + head * D + d, mask=d < D, other=0.0).to(acc_dtype)[None, :]
        v_ptr, weight_ptr = qkv_ptr + 2 * part, weight_ptr + head * D * 9
        acc = _add_local(acc, v_ptr, weight_ptr, at, ok, place, width, stride, D, PAD_D, TAPS_Y, TAPS_X)
    _store(out_ptr + origin * part + column, at, ok, part, acc, D, PAD_D)
    if not WHOLE:
        tl.store(lse_ptr + (origin + at) * heads + first_head + head, most + tl.log2(total), mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def _whole_backward_kernel(
    qkv_ptr, weight_ptr, grad_ptr, dqkv_ptr, partial_ptr,
    windows, height, width, win_h, win_w, heads, first_head, group, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, TILE: tl.constexpr, VERTICAL: tl.constexpr, PACKED: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Windows of one tile: the weights are computed again, from nothing but qkv."""
    size = (height, width, win_h, win_w)
    stride, part = 3 * heads * D, heads * D
    window, start, head = _split_program(win_h * win_w, group, TILE, PACKED)
    image, cell = _image(window, size)
    slot, live, ok, at, place = _pixels(cell, start, windows - window, size, TILE, VERTICAL, PACKED)
    origin, column = image * height * width, (first_head + head) * D
    qkv_ptr += origin * stride + column
    dqkv_ptr += origin * stride + column
    grad_ptr += origin * part + column
    q = _load(qkv_ptr, at, ok, stride, D, PAD_D)
    k = _load(qkv_ptr + part, at, ok, stride, D, PAD_D)
    v = _load(qkv_ptr + 2 * part, at, ok, stride, D, PAD_D)
    grad = _load(grad_ptr, at, ok, part, D, PAD_D)
    seen = _seen(slot, slot, live, PACKED)
    s = tl.where(seen, dot(q, tl.trans(k), INTERPRET) * scale_log2, -float("inf"))
    most = tl.max(s, 1)
    p = tl.exp2(s - most[:, None])
    total = tl.sum(p, 1)
    p = p / total[:, None]
    dp = dot(grad, tl.trans(v), INTERPRET)
    delta = tl.sum(p * dp, 1)
    dq = dot((p * (dp - delta[:, None])).to(k.dtype), k, INTERPRET)
    _store(dqkv_ptr, at, ok, stride, dq * scale, D, PAD_D)
    # key-major products: on Hopper a transposed dot result may be silently wrong
    lse = most + tl.log2(total)
    seen = _seen_by(slot, slot, live, PACKED)
    s = tl.where(seen, dot(k, tl.trans(q), INTERPRET) * scale_log2, -float("inf"))
    p = tl.exp2(s - lse[None, :])
    ds = p * (dot(v, tl.trans(grad), INTERPRET) - delta[None, :])
    dk = dot(ds.to(q.dtype), q, INTERPRET)
    _store(dqkv_ptr + part, at, ok, stride, dk * scale, D, PAD_D)
    dv = dot(p.to(grad.dtype), grad, INTERPRET)
    if TAPS_Y > 0:
        weight_ptr += head * D * 9
        dv = _add_local_backward(
            dv, v, grad_ptr, weight_ptr, partial_ptr, at, ok, place, width, part, D, PAD_D, TAPS_Y, TAPS_X
        )
    _store(dqkv_ptr + 2 * part, at, ok, stride, dv, D, PAD_D)


@triton.jit(do_not_specialize=_SIZES)
def _query_backward_kernel(
    qkv_ptr, grad_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    windows, height, width, win_h, win_w, heads, first_head, group, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, VERTICAL: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradient of q, and delta = sum of p * dp, for the other half of the backward.

    Two passes over the keys: out . grad is not delta, since out has the convolution in it, and loses digits with the
    convolution subtracted (a relative error of 2e-2 in bfloat16 where this has 6e-3).
    """
    acc_dtype: tl.constexpr = tl.float64 if qkv_ptr.dtype.element_ty == tl.float64 else tl.float32
    size, tokens = (height, width, win_h, win_w), win_h * win_w
    stride, part = 3 * heads * D, heads * D
    window, start, head = _split_program(tokens, group, TILE, False)
    image, cell = _image(window, size)
    slot, live, ok, at, place = _pixels(cell, start, windows - window, size, TILE, VERTICAL, False)
    origin, column = image * height * width, (first_head + head) * D
    row = (origin + at) * heads + first_head + head
    qkv_ptr += origin * stride + column
    q = _load(qkv_ptr, at, ok, stride, D, PAD_D)
    grad = _load(grad_ptr + origin * part + column, at, ok, part, D, PAD_D)
    lse = tl.load(lse_ptr + row, mask=ok, other=float("inf"))
    delta = tl.zeros([TILE], acc_dtype)
    for key in tl.range(0, tokens, STEP):
        _, k_live, k_ok, k_at, _ = _pixels(cell, key, windows - window, size, STEP, VERTICAL, False)
        k = _load(qkv_ptr + part, k_at, k_ok, stride, D, PAD_D)
        v = _load(qkv_ptr + 2 * part, k_at, k_ok, stride, D, PAD_D)
        s = tl.where(k_live[None, :], dot(q, tl.trans(k), INTERPRET) * scale_log2, -float("inf"))
        delta += tl.sum(tl.exp2(s - lse[:, None]) * dot(grad, tl.trans(v), INTERPRET), 1)
    tl.store(delta_ptr + row, delta, mask=ok)
    dq = tl.zeros([TILE, PAD_D], acc_dtype)
    for key in tl.range(0, tokens, STEP):
        _, k_live, k_ok, k_at, _ = _pixels(cell, key, windows - window, size, STEP, VERTICAL, False)
        k = _load(qkv_ptr + part, k_at, k_ok, stride, D, PAD_D)
        v = _load(qkv_ptr + 2 * part, k_at, k_ok, stride, D, PAD_D)
        s = tl.where(k_live[None, :], dot(q, tl.trans(k), INTERPRET) * scale_log2, -float("inf"))
        ds = tl.exp2(s - lse[:, None]) * (dot(grad, tl.trans(v), INTERPRET) - delta[:, None])
        dq += dot(ds.to(k.dtype), k, INTERPRET)
    _store(dqkv_ptr + origin * stride + column, at, ok, stride, dq * scale, D, PAD_D)


@triton.jit(do_not_specialize=_SIZES)
def _key_backward_kernel(
    qkv_ptr, weight_ptr, grad_ptr, lse_ptr, delta_ptr, dqkv_ptr, partial_ptr,
    windows, height, width, win_h, win_w, heads, first_head, group, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, VERTICAL: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if qkv_ptr.dtype.element_ty == tl.float64 else tl.float32
    size, tokens = (height, width, win_h, win_w), win_h * win_w
    stride, part = 3 * heads * D, heads * D
    window, start, head = _split_program(tokens, group, TILE, False)
    image, cell = _image(window, size)
    slot, live, ok, at, place = _pixels(cell, start, windows - window, size, TILE, VERTICAL, False)
    origin, column = image * height * width, (first_head + head) * D
    qkv_ptr += origin * stride + column
    dqkv_ptr += origin * stride + column
    grad_ptr += origin * part + column
    k = _load(qkv_ptr + part, at, ok, stride, D, PAD_D)
    v = _load(qkv_ptr + 2 * part, at, ok, stride, D, PAD_D)
    dk = tl.zeros([TILE, PAD_D], acc_dtype)
    dv = tl.zeros([TILE, PAD_D], acc_dtype)
    for query in tl.range(0, tokens, STEP):
        _, _, q_ok, q_at, _ = _pixels(cell, query, windows - window, size, STEP, VERTICAL, False)
        q = _load(qkv_ptr, q_at, q_ok, stride, D, PAD_D)
        grad = _load(grad_ptr, q_at, q_ok, part, D, PAD_D)
        row = (origin + q_at) * heads + first_head + head
        lse = tl.load(lse_ptr + row, mask=q_ok, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=q_ok, other=0.0)
        # key-major products: on Hopper a transposed dot result may be silently wrong
        s = tl.where(live[:, None], dot(k, tl.trans(q), INTERPRET) * scale_log2, -float("inf"))
        p = tl.exp2(s - lse[None, :])
        dv += dot(p.to(grad.dtype), grad, INTERPRET)
        ds = p * (dot(v, tl.trans(grad), INTERPRET) - delta[None, :])
        dk += dot(ds.to(q.dtype), q, INTERPRET)
    _store(dqkv_ptr + part, at, ok, stride, dk * scale, D, PAD_D)
    if TAPS_Y > 0:
        weight_ptr += head * D * 9
        dv = _add_local_backward(
            dv, v, grad_ptr, weight_ptr, partial_ptr, at, ok, place, width, part, D, PAD_D, TAPS_Y, TAPS_X
        )
    _store(dqkv_ptr + 2 * part, at, ok, stride, dv, D, PAD_D)


def one_tile(tokens: int) -> bool:
    """Whether a window of `tokens` pixels fits one tile, so that its backward needs nothing but qkv."""
    return tokens <= 128


def _plan(window: tuple[int, int], head_dim: int, lepe: bool) -> dict[str, Launch]:
    """What is launched for a group of heads with these windows, whatever the map; the backward in order."""
    win_h, win_w = window
    tokens = win_h * win_w
    sizes = {
        "D": head_dim, "PAD_D": max(16, triton.next_power_of_2(head_dim)), "VERTICAL": win_h >= win_w,
        "INTERPRET": interpreting(),
    }  # fmt: skip
    taps = {"TAPS_Y": 2 * min(win_h, 2) - 1 if lepe else 0, "TAPS_X": 2 * min(win_w, 2) - 1 if lepe else 0}
    if one_tile(tokens):
        tile, warps = (64, 4) if tokens <= 64 else (128, 8)
        sizes |= {"TILE": tile, "PACKED": tokens <= 32, **taps}
        return {
            "forward": Launch(_forward_kernel, {**sizes, "STEP": tile, "WHOLE": True}, warps, 1),
            "backward": Launch(_whole_backward_kernel, sizes, warps, 1),
        }
    sizes |= {"TILE": 64, "STEP": 64}
    return {
        "forward": Launch(_forward_kernel, {**sizes, **taps, "PACKED": False, "WHOLE": False}, 4, 2),
        "backward of q": Launch(_query_backward_kernel, sizes, 4, 2),
        "backward of k, v": Launch(_key_backward_kernel, {**sizes, **taps}, 4, 2),
    }


class _Group(NamedTuple):
    """A group of heads: its windows, its heads, weight and bias of its convolution (or any tensors), its kernels."""

    window: tuple[int, int]
    first_head: int
    heads: int
    weight: Tensor
    bias: Tensor
    plan: dict[str, Launch]


def _groups(qkv: Tensor, lepe: Sequence[Tensor], sides: Sequence[int]) -> Iterator[_Group]:
    heads = qkv.shape[4] * 2 // len(sides)
    for g, window in enumerate(zip(sides[::2], sides[1::2], strict=True)):
        weight, bias = lepe[2 * g : 2 * g + 2] if lepe else (qkv, qkv)
        yield _Group(window, g * heads, heads, weight, bias, _plan(window, qkv.shape[-1], bool(lepe)))


def _counts(group: _Group, launch: Launch, qkv: Tensor) -> tuple[int, int]:
    """Windows of all images, and programs of one of the group's kernels."""
    batch, height, width = qkv.shape[:3]
    win_h, win_w = group.window
    windows, tile = batch * triton.cdiv(height, win_h) * triton.cdiv(width, win_w), launch.constants["TILE"]
    if launch.constants.get("PACKED"):
        return windows, triton.cdiv(windows, tile // (win_h * win_w)) * group.heads
    return windows, windows * triton.cdiv(win_h * win_w, tile) * group.heads


def _run(group: _Group, name: str, scales: tuple[float, ...], *tensors: Tensor) -> None:
    """Run a kernel of the group's plan; qkv comes first of its tensors."""
    qkv, launch = tensors[0], group.plan[name]
    windows, programs = _counts(group, launch, qkv)
    _, height, width, _, heads, _ = qkv.shape
    with torch.cuda.device_of(qkv):
        launch.kernel[(programs,)](
            *tensors, windows, height, width, *group.window, heads, group.first_head, group.heads, *scales,
            **launch.constants, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip


def forward(qkv: Tensor, lepe: Sequence[Tensor], sides: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Contiguous qkv and lepe -> out `[B, H, W, N, D]`, and max + log2(sum) of each row `[B, H, W, N]`.

    `lepe` is weight and bias of each group or empty, `sides` height and width of each group's windows. Only groups with
    windows of several tiles write the statistic; without such a group it is empty.
    """
    out = qkv.new_empty(qkv.shape[:3] + qkv.shape[4:])
    groups = list(_groups(qkv, lepe, sides))
    shape = (0,) if all("backward" in group.plan for group in groups) else out.shape[:4]
    lse = qkv.new_empty(shape, dtype=at_least_float32(qkv))
    for group in groups:
        _run(group, "forward", (scale * LOG2_E,), qkv, group.weight, group.bias, out, lse)
    return out, lse


def backward(
    qkv: Tensor, lepe: Sequence[Tensor], lse: Tensor, grad: Tensor, sides: Sequence[int], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Contiguous inputs of `forward`, its statistic and the gradient of `out` -> gradients of qkv and of lepe."""
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    scales = (scale, scale * LOG2_E)
    dlepe = []
    for group in _groups(qkv, lepe, sides):
        partial = _partial_sums(group, qkv) if lepe else qkv
        if "backward" in group.plan:
            _run(group, "backward", scales, qkv, group.weight, grad, dqkv, partial)
        else:  # the first writes delta, which the second reads
            _run(group, "backward of q", scales, qkv, grad, lse, delta, dqkv)
            _run(group, "backward of k, v", scales, qkv, group.weight, grad, lse, delta, dqkv, partial)
        if lepe:
            dlepe += _lepe_gradients(group, partial)
    return dqkv, dlepe


def _taps(group: _Group) -> tuple[int, int]:
    constants = group.plan["forward"].constants
    return constants["TAPS_Y"], constants["TAPS_X"]


def _partial_sums(group: _Group, qkv: Tensor) -> Tensor:
    """Room for the gradients of weight and bias from each program of the group's last kernel."""
    _, programs = _counts(group, list(group.plan.values())[-1], qkv)
    rows = _taps(group)
    shape = (programs, rows[0] * rows[1] + 1, qkv.shape[-1])
    return qkv.new_empty(shape, dtype=at_least_float32(qkv))


def _lepe_gradients(group: _Group, partial: Tensor) -> list[Tensor]:
    """Gradients of weight and bias; taps that never meet a window have none."""
    taps_y, taps_x = _taps(group)
    sums = partial.unflatten(0, (-1, group.heads)).sum(0)  # [heads, taps + 1, D]
    taps = sums[:, :-1].mT.reshape(-1, 1, taps_y, taps_x)
    y, x = (3 - taps_y) // 2, (3 - taps_x) // 2
    return [
        total.to(parameter.dtype, copy=True, memory_format=torch.contiguous_format)
        for total, parameter in ((F.pad(taps, (x, x, y, y)), group.weight), (sums[:, -1].flatten(), group.bias))
    ]


def launches(case: tuple) -> dict[str, Launch]:
    """The kernels of a forward and backward of one of `window.CASES`, in bfloat16."""
    _, _, _, head_dim, windows, lepe = case
    return {
        name if height >= width else f"{name}, wide": launch
        for height, width in windows
        for name, launch in _plan((height, width), head_dim, lepe).items()
    }
