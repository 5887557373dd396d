"""Triton kernels of window attention: forward, one backward for windows of one tile, two for larger windows.

One program owns one head of one tile of pixels. Pixels are taken window by window, and inside a window along its
shorter side first. So the stripe length can be a runtime argument (one binary for all maps), and neighbors in a tile
are neighbors in the map, which keeps loads coalesced. A tile holds a part of a window, a whole window, or (PACKED)
several small windows of any images, whose pixels attend only to their own window. Every gradient is a sum in a fixed
order, without atomics: the gradients of the convolution's weight and bias are summed per program first, then over the
programs by torch.

Layout: qkv [B, H, W, 3, N, D], o and do [B, H, W, N, D], all contiguous; lse and delta [B, H, W, N]; weight [C', 3, 3]
and bias [C'] of a group of heads; partial sums [programs, taps + 1, D] with the bias last. `dim` is N * D: q, k and v
of a pixel lie `dim` elements apart.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreting
from ..precision import acc_dtype
from ..triton_common import (
    LOG2_E,
    KernelSpec,
    acc_dtype_of,
    dkdv_step,
    dot,
    load_rows,
    online_softmax_step,
    padded_dim,
    split_program_id,
    store_rows,
)
from .tiles import fits_one_tile

POINTER_TYPES = {"lse_ptr": "fp32", "delta_ptr": "fp32", "partial_ptr": "fp32"}

# Runtime sizes of a group of heads and its map. `windows` counts the windows of all images.
_SIZES = ["windows", "height", "width", "win_h", "win_w", "heads", "first_head", "group_heads"]


@triton.jit
def _locate_program(windows, size, group_heads, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Return (image, window in the image, first pixel in the window, windows left from there on, head of the group)."""
    height, width, win_h, win_w = size
    pixels = win_h * win_w
    if PACKED:
        window, _, head = split_program_id(group_heads, 1)
        window *= BLOCK // pixels
        start = 0
    else:
        window, block, head = split_program_id(group_heads, tl.cdiv(pixels, BLOCK))
        start = block * BLOCK
    windows_per_image = tl.cdiv(height, win_h) * tl.cdiv(width, win_w)
    return (window // windows_per_image).to(tl.int64), window % windows_per_image, start, windows - window, head


@triton.jit
def _tile(window, start, left, size, BLOCK: tl.constexpr, VERTICAL: tl.constexpr, PACKED: tl.constexpr):
    """Describe BLOCK pixels, from pixel `start` of `window` on; `left` windows exist from `window` on.

    Returns, for each pixel: the index of its window, counted from `window`; whether it belongs to a window (`valid`);
    whether it also lies in the map (`mask`); its offset in the map; and `coords` = (row, column, first and last row,
    first and last column of its window inside the map). Rows are counted on from image to image.
    """
    height, width, win_h, win_w = size
    item = start + tl.arange(0, BLOCK)
    slot = 0
    valid = item < win_h * win_w
    if PACKED:
        slot = item // (win_h * win_w)
        item = item % (win_h * win_w)
        valid = slot < tl.minimum(BLOCK // (win_h * win_w), left)
    rows, cols = tl.cdiv(height, win_h), tl.cdiv(width, win_w)
    first_row = (window + slot) // (rows * cols) * height
    y0 = (window + slot) // cols % rows * win_h - (rows * win_h - height) // 2
    x0 = (window + slot) % cols * win_w - (cols * win_w - width) // 2
    if VERTICAL:
        y, x = first_row + y0 + item // win_w, x0 + item % win_w
    else:
        y, x = first_row + y0 + item % win_h, x0 + item // win_h
    y_min, y_max = first_row + tl.maximum(y0, 0), first_row + tl.minimum(y0 + win_h, height) - 1
    coords = (y, x, y_min, y_max, tl.maximum(x0, 0), tl.minimum(x0 + win_w, width) - 1)
    return slot, valid, valid & _in_window(coords, 0, 0), y * width + x, coords


@triton.jit
def _in_window(coords, dy, dx):
    """Whether the pixel `dy` rows and `dx` columns away lies in the same window and in the map."""
    y, x, y_min, y_max, x_min, x_max = coords
    return (y + dy >= y_min) & (y + dy <= y_max) & (x + dx >= x_min) & (x + dx <= x_max)


@triton.jit
def _softmax_mask(slot_m, slot_n, valid_n, PACKED: tl.constexpr):
    """Which keys each query attends to: `[M, N]`, or `[1, N]` if that is the same for all queries."""
    if PACKED:
        return slot_m[:, None] == slot_n[None, :]
    else:
        return valid_n[None, :]


@triton.jit
def _softmax_mask_transposed(slot_m, slot_n, valid_n, PACKED: tl.constexpr):
    """`_softmax_mask` as `[N, M]` or `[N, 1]`."""
    if PACKED:
        return slot_n[:, None] == slot_m[None, :]
    else:
        return valid_n[:, None]


@triton.jit
def _key_block(
    q, qkv_ptr, window, start, left, slot_m, size, heads, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_N: tl.constexpr, VERTICAL: tl.constexpr, PACKED: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Load BLOCK_N keys and values from pixel `start` on; return k, v and the base-2 logits of the queries q."""
    slot_n, valid_n, mask_n, offs_n, _ = _tile(window, start, left, size, BLOCK_N, VERTICAL, PACKED)
    dim, qkv_stride = heads * D, 3 * heads * D
    k = load_rows(qkv_ptr + dim, offs_n, mask_n, qkv_stride, D, PAD_D)
    v = load_rows(qkv_ptr + 2 * dim, offs_n, mask_n, qkv_stride, D, PAD_D)
    attends = _softmax_mask(slot_m, slot_n, valid_n, PACKED)
    return k, v, tl.where(attends, dot(q, tl.trans(k), INTERPRET) * scale_log2, -float("inf"))


@triton.jit
def _add_lepe(
    acc, v_ptr, weight_ptr, offs, mask, coords, width, row_stride,
    D: tl.constexpr, PAD_D: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
):  # fmt: skip
    """Add the taps of the convolution. TAPS_Y or TAPS_X is 1 in windows one pixel high or wide, else 3."""
    offs_d = tl.arange(0, PAD_D)
    for tap in tl.static_range(TAPS_Y * TAPS_X):
        dy, dx = tap // TAPS_X - TAPS_Y // 2, tap % TAPS_X - TAPS_X // 2
        v = load_rows(v_ptr, offs + dy * width + dx, mask & _in_window(coords, dy, dx), row_stride, D, PAD_D)
        weight = tl.load(weight_ptr + offs_d * 9 + dy * 3 + dx + 4, mask=offs_d < D, other=0.0)
        acc += v.to(acc.dtype) * weight.to(acc.dtype)[None, :]
    return acc


@triton.jit
def _add_lepe_backward(
    dv, v, do_ptr, weight_ptr, partial_ptr, offs, mask, coords, width, row_stride,
    D: tl.constexpr, PAD_D: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
):  # fmt: skip
    """Add the transposed taps to dv; store this program's partial sums of the gradients of weight and bias."""
    TAPS: tl.constexpr = TAPS_Y * TAPS_X
    offs_d = tl.arange(0, PAD_D)
    partial_ptr += tl.program_id(0).to(tl.int64) * ((TAPS + 1) * D)
    for tap in tl.static_range(TAPS):
        dy, dx = tap // TAPS_X - TAPS_Y // 2, tap % TAPS_X - TAPS_X // 2
        do = load_rows(do_ptr, offs - dy * width - dx, mask & _in_window(coords, -dy, -dx), row_stride, D, PAD_D)
        do = do.to(dv.dtype)
        weight = tl.load(weight_ptr + offs_d * 9 + dy * 3 + dx + 4, mask=offs_d < D, other=0.0)
        dv += do * weight.to(dv.dtype)[None, :]
        tl.store(partial_ptr + tap * D + offs_d, tl.sum(do * v.to(dv.dtype), 0), mask=offs_d < D)
        if tap == TAPS // 2:
            tl.store(partial_ptr + TAPS * D + offs_d, tl.sum(do, 0), mask=offs_d < D)
    return dv


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    qkv_ptr, weight_ptr, bias_ptr, o_ptr, lse_ptr,
    windows, height, width, win_h, win_w, heads, first_head, group_heads, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VERTICAL: tl.constexpr,
    PACKED: tl.constexpr, ONE_TILE: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    size = (height, width, win_h, win_w)
    dim, qkv_stride = heads * D, 3 * heads * D
    image, window, start, left, head = _locate_program(windows, size, group_heads, BLOCK_M, PACKED)
    slot_m, valid_m, mask_m, offs_m, coords = _tile(window, start, left, size, BLOCK_M, VERTICAL, PACKED)
    pixel_0, channel_0 = image * height * width, (first_head + head) * D
    qkv_ptr += pixel_0 * qkv_stride + channel_0
    q = load_rows(qkv_ptr, offs_m, mask_m, qkv_stride, D, PAD_D)
    m_i = tl.full([BLOCK_M], -float("inf"), ACC)
    l_i = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, PAD_D], ACC)
    for start_n in tl.range(0, BLOCK_N if ONE_TILE else win_h * win_w, BLOCK_N):
        _, v, s = _key_block(
            q, qkv_ptr, window, start_n, left, slot_m, size, heads, scale_log2,
            D, PAD_D, BLOCK_N, VERTICAL, PACKED, INTERPRET,
        )  # fmt: skip
        m_i, l_i, acc = online_softmax_step(m_i, l_i, acc, s, v, INTERPRET)
    acc = acc / l_i[:, None]
    if TAPS_Y > 0:
        offs_d = tl.arange(0, PAD_D)
        acc += tl.load(bias_ptr + head * D + offs_d, mask=offs_d < D, other=0.0).to(ACC)[None, :]
        v_ptr, weight_ptr = qkv_ptr + 2 * dim, weight_ptr + head * D * 9
        acc = _add_lepe(acc, v_ptr, weight_ptr, offs_m, mask_m, coords, width, qkv_stride, D, PAD_D, TAPS_Y, TAPS_X)
    store_rows(o_ptr + pixel_0 * dim + channel_0, offs_m, mask_m, dim, acc, D, PAD_D)
    if not ONE_TILE:
        tl.store(lse_ptr + (pixel_0 + offs_m) * heads + first_head + head, m_i + tl.log2(l_i), mask=mask_m)


@triton.jit(do_not_specialize=_SIZES)
def _one_tile_backward_kernel(
    qkv_ptr, weight_ptr, do_ptr, dqkv_ptr, partial_ptr,
    windows, height, width, win_h, win_w, heads, first_head, group_heads, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_M: tl.constexpr, VERTICAL: tl.constexpr, PACKED: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Whole backward of windows of one tile. The softmax is recomputed from qkv alone; the tile is queries and keys."""
    size = (height, width, win_h, win_w)
    dim, qkv_stride = heads * D, 3 * heads * D
    image, window, start, left, head = _locate_program(windows, size, group_heads, BLOCK_M, PACKED)
    slot, valid, mask, offs, coords = _tile(window, start, left, size, BLOCK_M, VERTICAL, PACKED)
    pixel_0, channel_0 = image * height * width, (first_head + head) * D
    qkv_ptr += pixel_0 * qkv_stride + channel_0
    dqkv_ptr += pixel_0 * qkv_stride + channel_0
    do_ptr += pixel_0 * dim + channel_0
    q = load_rows(qkv_ptr, offs, mask, qkv_stride, D, PAD_D)
    k = load_rows(qkv_ptr + dim, offs, mask, qkv_stride, D, PAD_D)
    v = load_rows(qkv_ptr + 2 * dim, offs, mask, qkv_stride, D, PAD_D)
    do = load_rows(do_ptr, offs, mask, dim, D, PAD_D)
    attends = _softmax_mask(slot, slot, valid, PACKED)
    s = tl.where(attends, dot(q, tl.trans(k), INTERPRET) * scale_log2, -float("inf"))
    m_i = tl.max(s, 1)
    p = tl.exp2(s - m_i[:, None])
    l_i = tl.sum(p, 1)
    p = p / l_i[:, None]
    dp = dot(do, tl.trans(v), INTERPRET)
    delta = tl.sum(p * dp, 1)
    dq = dot((p * (dp - delta[:, None])).to(k.dtype), k, INTERPRET)
    store_rows(dqkv_ptr, offs, mask, qkv_stride, dq * scale, D, PAD_D)
    # P^T and dS^T are products of their own: on Hopper a transposed product may be silently wrong
    lse = m_i + tl.log2(l_i)
    attends = _softmax_mask_transposed(slot, slot, valid, PACKED)
    s = tl.where(attends, dot(k, tl.trans(q), INTERPRET) * scale_log2, -float("inf"))
    p = tl.exp2(s - lse[None, :])
    ds = p * (dot(v, tl.trans(do), INTERPRET) - delta[None, :])
    dk = dot(ds.to(q.dtype), q, INTERPRET)
    store_rows(dqkv_ptr + dim, offs, mask, qkv_stride, dk * scale, D, PAD_D)
    dv = dot(p.to(do.dtype), do, INTERPRET)
    if TAPS_Y > 0:
        weight_ptr += head * D * 9
        dv = _add_lepe_backward(
            dv, v, do_ptr, weight_ptr, partial_ptr, offs, mask, coords, width, dim, D, PAD_D, TAPS_Y, TAPS_X
        )
    store_rows(dqkv_ptr + 2 * dim, offs, mask, qkv_stride, dv, D, PAD_D)


@triton.jit(do_not_specialize=_SIZES)
def _query_backward_kernel(
    qkv_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    windows, height, width, win_h, win_w, heads, first_head, group_heads, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VERTICAL: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradient of q, and delta = sum_j p dp for the kernel of k and v. Loops over the keys twice.

    delta is not computed as sum(o * do): o contains the convolution, and subtracting that loses digits (relative error
    2e-2 in bfloat16, against 6e-3 here).
    """
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    size, pixels = (height, width, win_h, win_w), win_h * win_w
    dim, qkv_stride = heads * D, 3 * heads * D
    image, window, start, left, head = _locate_program(windows, size, group_heads, BLOCK_M, False)
    slot_m, valid_m, mask_m, offs_m, coords = _tile(window, start, left, size, BLOCK_M, VERTICAL, False)
    pixel_0, channel_0 = image * height * width, (first_head + head) * D
    offs_lse = (pixel_0 + offs_m) * heads + first_head + head
    qkv_ptr += pixel_0 * qkv_stride + channel_0
    q = load_rows(qkv_ptr, offs_m, mask_m, qkv_stride, D, PAD_D)
    do = load_rows(do_ptr + pixel_0 * dim + channel_0, offs_m, mask_m, dim, D, PAD_D)
    lse = tl.load(lse_ptr + offs_lse, mask=mask_m, other=float("inf"))
    delta = tl.zeros([BLOCK_M], ACC)
    for start_n in tl.range(0, pixels, BLOCK_N):
        _, v, s = _key_block(
            q, qkv_ptr, window, start_n, left, slot_m, size, heads, scale_log2,
            D, PAD_D, BLOCK_N, VERTICAL, False, INTERPRET,
        )  # fmt: skip
        delta += tl.sum(tl.exp2(s - lse[:, None]) * dot(do, tl.trans(v), INTERPRET), 1)
    tl.store(delta_ptr + offs_lse, delta, mask=mask_m)
    dq = tl.zeros([BLOCK_M, PAD_D], ACC)
    for start_n in tl.range(0, pixels, BLOCK_N):
        k, v, s = _key_block(
            q, qkv_ptr, window, start_n, left, slot_m, size, heads, scale_log2,
            D, PAD_D, BLOCK_N, VERTICAL, False, INTERPRET,
        )  # fmt: skip
        ds = tl.exp2(s - lse[:, None]) * (dot(do, tl.trans(v), INTERPRET) - delta[:, None])
        dq += dot(ds.to(k.dtype), k, INTERPRET)
    store_rows(dqkv_ptr + pixel_0 * qkv_stride + channel_0, offs_m, mask_m, qkv_stride, dq * scale, D, PAD_D)


@triton.jit(do_not_specialize=_SIZES)
def _key_backward_kernel(
    qkv_ptr, weight_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr, partial_ptr,
    windows, height, width, win_h, win_w, heads, first_head, group_heads, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VERTICAL: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v: a program owns BLOCK_N keys and loops over the queries of their window."""
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    size, pixels = (height, width, win_h, win_w), win_h * win_w
    dim, qkv_stride = heads * D, 3 * heads * D
    image, window, start, left, head = _locate_program(windows, size, group_heads, BLOCK_N, False)
    slot_n, valid_n, mask_n, offs_n, coords = _tile(window, start, left, size, BLOCK_N, VERTICAL, False)
    pixel_0, channel_0 = image * height * width, (first_head + head) * D
    qkv_ptr += pixel_0 * qkv_stride + channel_0
    dqkv_ptr += pixel_0 * qkv_stride + channel_0
    do_ptr += pixel_0 * dim + channel_0
    k = load_rows(qkv_ptr + dim, offs_n, mask_n, qkv_stride, D, PAD_D)
    v = load_rows(qkv_ptr + 2 * dim, offs_n, mask_n, qkv_stride, D, PAD_D)
    dk = tl.zeros([BLOCK_N, PAD_D], ACC)
    dv = tl.zeros([BLOCK_N, PAD_D], ACC)
    for start_m in tl.range(0, pixels, BLOCK_M):
        _, _, mask_m, offs_m, _ = _tile(window, start_m, left, size, BLOCK_M, VERTICAL, False)
        q = load_rows(qkv_ptr, offs_m, mask_m, qkv_stride, D, PAD_D)
        do = load_rows(do_ptr, offs_m, mask_m, dim, D, PAD_D)
        offs_lse = (pixel_0 + offs_m) * heads + first_head + head
        lse = tl.load(lse_ptr + offs_lse, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + offs_lse, mask=mask_m, other=0.0)
        s = tl.where(valid_n[:, None], dot(k, tl.trans(q), INTERPRET) * scale_log2, -float("inf"))
        p = tl.exp2(s - lse[None, :])
        dk, dv = dkdv_step(dk, dv, p, q, v, do, delta, INTERPRET)
    store_rows(dqkv_ptr + dim, offs_n, mask_n, qkv_stride, dk * scale, D, PAD_D)
    if TAPS_Y > 0:
        weight_ptr += head * D * 9
        dv = _add_lepe_backward(
            dv, v, do_ptr, weight_ptr, partial_ptr, offs_n, mask_n, coords, width, dim, D, PAD_D, TAPS_Y, TAPS_X
        )
    store_rows(dqkv_ptr + 2 * dim, offs_n, mask_n, qkv_stride, dv, D, PAD_D)


def _kernel_specs(window: tuple[int, int], head_dim: int, lepe: bool) -> dict[str, KernelSpec]:
    """Return the kernels for a group of heads with these windows, for maps of any size, in launch order."""
    win_h, win_w = window
    pixels = win_h * win_w
    constants = {"D": head_dim, "PAD_D": padded_dim(head_dim), "VERTICAL": win_h >= win_w, "INTERPRET": interpreting()}
    taps = {"TAPS_Y": 2 * min(win_h, 2) - 1 if lepe else 0, "TAPS_X": 2 * min(win_w, 2) - 1 if lepe else 0}
    if fits_one_tile(pixels):
        block, num_warps = (64, 4) if pixels <= 64 else (128, 8)
        constants |= {"BLOCK_M": block, "PACKED": pixels <= 32, **taps}
        return {
            "forward": KernelSpec(_forward_kernel, {**constants, "BLOCK_N": block, "ONE_TILE": True}, num_warps, 1),
            "backward": KernelSpec(_one_tile_backward_kernel, constants, num_warps, 1),
        }
    constants |= {"BLOCK_M": 64, "BLOCK_N": 64}
    return {
        "forward": KernelSpec(_forward_kernel, {**constants, **taps, "PACKED": False, "ONE_TILE": False}, 4, 2),
        "backward of q": KernelSpec(_query_backward_kernel, constants, 4, 2),
        "backward of k, v": KernelSpec(_key_backward_kernel, {**constants, **taps}, 4, 2),
    }


class _Group(NamedTuple):
    """A group of heads with its windows, its convolution (any tensors if there is none), and its kernels."""

    window: tuple[int, int]
    first_head: int
    heads: int
    weight: Tensor
    bias: Tensor
    specs: dict[str, KernelSpec]


def _groups(qkv: Tensor, lepe: Sequence[Tensor], sides: Sequence[int]) -> Iterator[_Group]:
    heads = qkv.shape[4] * 2 // len(sides)
    for g, window in enumerate(zip(sides[::2], sides[1::2], strict=True)):
        weight, bias = lepe[2 * g : 2 * g + 2] if lepe else (qkv, qkv)
        yield _Group(window, g * heads, heads, weight, bias, _kernel_specs(window, qkv.shape[-1], bool(lepe)))


def _counts(group: _Group, spec: KernelSpec, qkv: Tensor) -> tuple[int, int]:
    """Return the number of windows of all images and the number of programs of one of the group's kernels."""
    batch, height, width = qkv.shape[:3]
    win_h, win_w = group.window
    windows, block = batch * triton.cdiv(height, win_h) * triton.cdiv(width, win_w), spec.constants["BLOCK_M"]
    if spec.constants.get("PACKED"):
        return windows, triton.cdiv(windows, block // (win_h * win_w)) * group.heads
    return windows, windows * triton.cdiv(win_h * win_w, block) * group.heads


def _launch(group: _Group, name: str, scales: tuple[float, ...], *tensors: Tensor) -> None:
    """Launch the group's kernel `name`. The first tensor must be qkv."""
    qkv, spec = tensors[0], group.specs[name]
    windows, programs = _counts(group, spec, qkv)
    _, height, width, _, heads, _ = qkv.shape
    with torch.cuda.device_of(qkv):
        spec.kernel[(programs,)](
            *tensors, windows, height, width, *group.window, heads, group.first_head, group.heads, *scales,
            **spec.constants, num_warps=spec.num_warps, num_stages=spec.num_stages,
        )  # fmt: skip


def forward(qkv: Tensor, lepe: Sequence[Tensor], sides: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, W, N, D]` and lse `[B, H, W, N]`.

    All inputs must be contiguous. `lepe` is weight and bias of each group in turn, or empty; `sides` is height and
    width of each group's windows in turn. Only groups with windows of several tiles write lse; it is empty if there is
    no such group.
    """
    out = qkv.new_empty(qkv.shape[:3] + qkv.shape[4:])
    groups = list(_groups(qkv, lepe, sides))
    shape = (0,) if all("backward" in group.specs for group in groups) else out.shape[:4]
    lse = qkv.new_empty(shape, dtype=acc_dtype(qkv))
    for group in groups:
        _launch(group, "forward", (scale * LOG2_E,), qkv, group.weight, group.bias, out, lse)
    return out, lse


def backward(
    qkv: Tensor, lepe: Sequence[Tensor], lse: Tensor, do: Tensor, sides: Sequence[int], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of qkv and of each tensor of lepe, from the inputs of `forward`, its lse and do."""
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    scales = (scale, scale * LOG2_E)
    dlepe = []
    for group in _groups(qkv, lepe, sides):
        partial = _empty_partial_sums(group, qkv) if lepe else qkv
        if "backward" in group.specs:
            _launch(group, "backward", scales, qkv, group.weight, do, dqkv, partial)
        else:  # the first kernel writes delta, the second reads it
            _launch(group, "backward of q", scales, qkv, do, lse, delta, dqkv)
            _launch(group, "backward of k, v", scales, qkv, group.weight, do, lse, delta, dqkv, partial)
        if lepe:
            dlepe += _lepe_gradients(group, partial)
    return dqkv, dlepe


def _taps(group: _Group) -> tuple[int, int]:
    constants = group.specs["forward"].constants
    return constants["TAPS_Y"], constants["TAPS_X"]


def _empty_partial_sums(group: _Group, qkv: Tensor) -> Tensor:
    """Allocate the buffer for the weight and bias gradients of each program of the group's last kernel."""
    _, programs = _counts(group, list(group.specs.values())[-1], qkv)
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


def aot_specs(case: tuple) -> dict[str, KernelSpec]:
    """Return the kernels of a forward and backward of one of `window.CASES`, for ahead-of-time compilation."""
    _, _, _, head_dim, windows, lepe = case
    return {
        name if height >= width else f"{name}, wide": spec
        for height, width in windows
        for name, spec in _kernel_specs((height, width), head_dim, lepe).items()
    }
