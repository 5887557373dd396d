"""Triton kernels of window attention: forward, backward for windows of one tile and for larger ones, and of the bias.

One program owns one head of one tile of pixels. Pixels are taken window by window, and inside a window along its
shorter side first. So the stripe length can be a runtime argument (one binary for all maps), and neighbors in a tile
are neighbors in the map, which keeps loads coalesced. A tile holds a part of a window, a whole window, or (PACKED)
several small windows of any images, whose pixels attend only to their own window. Every gradient is a sum in a fixed
order, without atomics: the gradients of the convolution's weight and bias are summed per program first, then over the
programs by torch. The bias is summed over windows, so it has a kernel of its own: a program owns a tile of one head's
bias and a run of windows.

STRIDE is the distance between the pixels of a window. With PLACED the windows begin at pixel `start` of each axis, and
pixels outside of the map are no keys; else they are keys of value 0.

Layout: qkv [B, H, W, 3, N, D], o and do [B, H, W, N, D], all contiguous; lse and delta [B, H, W, N]; weight [C', 3, 3]
and bias [C'] of a group of heads; partial sums [programs, taps + 1, D] with the bias last; `pairs` is the bias of each
pair [N, h * w, h * w]. `dim` is N * D: q, k and v of a pixel lie `dim` elements apart.
"""

import triton
import triton.language as tl

from ..triton_common import (
    LOG2_E_CONSTEXPR,
    acc_dtype_of,
    dkdv_step,
    dot,
    load_rows,
    online_softmax_step,
    split_program_id,
    store_rows,
)

# Runtime sizes of a group of heads and its map. `windows` counts the windows of all images.
_SIZES = ["windows", "height", "width", "win_h", "win_w", "heads", "first_head", "group_heads", "start"]


@triton.jit
def _parts(side, window, start, STRIDE: tl.constexpr, PLACED: tl.constexpr):
    """Along an axis: number of parts of window * STRIDE pixels, and how many pixels of the first lie before the map."""
    span = window * STRIDE
    if PLACED:
        before = tl.where(start > 0, span - start, 0)
        return tl.cdiv(side + before, span), before
    else:
        parts = tl.cdiv(side, span)
        return parts, (parts * span - side) // 2


@triton.jit
def _windows_per_image(size, STRIDE: tl.constexpr, PLACED: tl.constexpr):
    height, width, win_h, win_w, start = size
    rows, _ = _parts(height, win_h, start, STRIDE, PLACED)
    cols, _ = _parts(width, win_w, start, STRIDE, PLACED)
    return rows * cols * (STRIDE * STRIDE)


@triton.jit
def _locate_program(
    windows, size, group_heads, BLOCK: tl.constexpr, PACKED: tl.constexpr, STRIDE: tl.constexpr, PLACED: tl.constexpr
):
    """Return (image, window in the image, first pixel in the window, windows left from there on, head of the group)."""
    pixels = size[2] * size[3]
    if PACKED:
        window, _, head = split_program_id(group_heads, 1)
        window *= BLOCK // pixels
        start = 0
    else:
        window, block, head = split_program_id(group_heads, tl.cdiv(pixels, BLOCK))
        start = block * BLOCK
    windows_per_image = _windows_per_image(size, STRIDE, PLACED)
    return (window // windows_per_image).to(tl.int64), window % windows_per_image, start, windows - window, head


@triton.jit
def _tile(
    window, first, left, size, BLOCK: tl.constexpr, VERTICAL: tl.constexpr, PACKED: tl.constexpr,
    STRIDE: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Describe BLOCK pixels, from pixel `first` of `window` on; `left` windows exist from `window` on.

    Returns, for each pixel: the index of its window, counted from `window`; whether it belongs to a window (`valid`);
    whether it also lies in the map (`mask`); its offset in the map; and `coords` = (row, column, first and last row,
    first and last column of its window inside the map). Rows are counted on from image to image.
    """
    height, width, win_h, win_w, start = size
    item = first + tl.arange(0, BLOCK)
    slot = 0
    valid = item < win_h * win_w
    if PACKED:
        slot = item // (win_h * win_w)
        item = item % (win_h * win_w)
        valid = slot < tl.minimum(BLOCK // (win_h * win_w), left)
    rows, above = _parts(height, win_h, start, STRIDE, PLACED)
    cols, before = _parts(width, win_w, start, STRIDE, PLACED)
    if STRIDE == 1:
        first_row = (window + slot) // (rows * cols) * height
        y0 = (window + slot) // cols % rows * win_h - above
        x0 = (window + slot) % cols * win_w - before
    else:
        rows, cols = rows * STRIDE, cols * STRIDE
        first_row = (window + slot) // (rows * cols) * height
        row, col = (window + slot) // cols % rows, (window + slot) % cols
        y0 = row // STRIDE * (win_h * STRIDE) + row % STRIDE - above
        x0 = col // STRIDE * (win_w * STRIDE) + col % STRIDE - before
    if VERTICAL:
        y, x = first_row + y0 + item // win_w * STRIDE, x0 + item % win_w * STRIDE
    else:
        y, x = first_row + y0 + item % win_h * STRIDE, x0 + item // win_h * STRIDE
    y_end, x_end = y0 + (win_h - 1) * STRIDE + 1, x0 + (win_w - 1) * STRIDE + 1
    y_min, y_max = first_row + tl.maximum(y0, 0), first_row + tl.minimum(y_end, height) - 1
    coords = (y, x, y_min, y_max, tl.maximum(x0, 0), tl.minimum(x_end, width) - 1)
    return slot, valid, valid & _in_window(coords, 0, 0), y * width + x, coords


@triton.jit
def _in_window(coords, dy, dx):
    """Whether the pixel `dy` rows and `dx` columns away lies in the same window and in the map."""
    y, x, y_min, y_max, x_min, x_max = coords
    return (y + dy >= y_min) & (y + dy <= y_max) & (x + dx >= x_min) & (x + dx <= x_max)


@triton.jit
def _softmax_mask(slot_m, slot_n, valid_n, mask_n, PACKED: tl.constexpr, PLACED: tl.constexpr):
    """Which keys each query attends to: `[M, N]`, or `[1, N]` if that is the same for all queries."""
    if PACKED and PLACED:
        return (slot_m[:, None] == slot_n[None, :]) & mask_n[None, :]
    elif PACKED:
        return slot_m[:, None] == slot_n[None, :]
    elif PLACED:
        return mask_n[None, :]
    else:
        return valid_n[None, :]


@triton.jit
def _softmax_mask_transposed(slot_m, slot_n, valid_n, mask_n, PACKED: tl.constexpr, PLACED: tl.constexpr):
    """`_softmax_mask` as `[N, M]` or `[N, 1]`."""
    if PACKED and PLACED:
        return (slot_n[:, None] == slot_m[None, :]) & mask_n[:, None]
    elif PACKED:
        return slot_n[:, None] == slot_m[None, :]
    elif PLACED:
        return mask_n[:, None]
    else:
        return valid_n[:, None]


@triton.jit
def _places(first, size, BLOCK: tl.constexpr, VERTICAL: tl.constexpr):
    """The places of the pixels of a tile among those of their window, row by row."""
    win_h, win_w = size[2], size[3]
    item = (first + tl.arange(0, BLOCK)) % (win_h * win_w)
    if VERTICAL:
        return item
    else:
        return item % win_h * win_w + item // win_h


@triton.jit
def _add_bias(s, pairs_ptr, head, place_m, place_n, valid, size, BIAS: tl.constexpr):
    """Add the bias of each query and key to the base-2 logits `s`; the places have the axes of `s`."""
    if BIAS:
        pixels = size[2] * size[3]
        offs = (head * pixels + place_m) * pixels + place_n
        return s + tl.load(pairs_ptr + offs, mask=valid, other=0.0) * LOG2_E_CONSTEXPR
    else:
        return s


@triton.jit
def _key_block(
    q, qkv_ptr, pairs_ptr, window, first, left, slot_m, place_m, valid_m, size, head, heads, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_N: tl.constexpr, VERTICAL: tl.constexpr, PACKED: tl.constexpr,
    STRIDE: tl.constexpr, PLACED: tl.constexpr, BIAS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Load BLOCK_N keys and values from pixel `first` on; return k, v and the base-2 logits of the queries q."""
    slot_n, valid_n, mask_n, offs_n, _ = _tile(window, first, left, size, BLOCK_N, VERTICAL, PACKED, STRIDE, PLACED)
    dim, qkv_stride = heads * D, 3 * heads * D
    k = load_rows(qkv_ptr + dim, offs_n, mask_n, qkv_stride, D, PAD_D)
    v = load_rows(qkv_ptr + 2 * dim, offs_n, mask_n, qkv_stride, D, PAD_D)
    attends = _softmax_mask(slot_m, slot_n, valid_n, mask_n, PACKED, PLACED)
    place_n, valid = _places(first, size, BLOCK_N, VERTICAL), valid_m[:, None] & valid_n[None, :]
    s = dot(q, tl.trans(k), INTERPRET) * scale_log2
    s = _add_bias(s, pairs_ptr, head, place_m[:, None], place_n[None, :], valid, size, BIAS)
    return k, v, tl.where(attends, s, -float("inf"))


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
def forward_kernel(
    qkv_ptr, weight_ptr, bias_ptr, pairs_ptr, o_ptr, lse_ptr,
    windows, height, width, win_h, win_w, heads, first_head, group_heads, start, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VERTICAL: tl.constexpr,
    PACKED: tl.constexpr, ONE_TILE: tl.constexpr, STRIDE: tl.constexpr, PLACED: tl.constexpr, BIAS: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    size = (height, width, win_h, win_w, start)
    dim, qkv_stride = heads * D, 3 * heads * D
    image, window, first, left, head = _locate_program(windows, size, group_heads, BLOCK_M, PACKED, STRIDE, PLACED)
    slot_m, valid_m, mask_m, offs_m, coords = _tile(
        window, first, left, size, BLOCK_M, VERTICAL, PACKED, STRIDE, PLACED
    )
    pixel_0, channel_0 = image * height * width, (first_head + head) * D
    qkv_ptr += pixel_0 * qkv_stride + channel_0
    q = load_rows(qkv_ptr, offs_m, mask_m, qkv_stride, D, PAD_D)
    place_m = _places(first, size, BLOCK_M, VERTICAL)
    # finite where the first keys, or all keys of a query outside of the map, may be masked
    m_i = tl.full([BLOCK_M], -1e30 if PLACED else -float("inf"), ACC)
    l_i = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, PAD_D], ACC)
    for start_n in tl.range(0, BLOCK_N if ONE_TILE else win_h * win_w, BLOCK_N):
        _, v, s = _key_block(
            q, qkv_ptr, pairs_ptr, window, start_n, left, slot_m, place_m, valid_m, size, head, heads, scale_log2,
            D, PAD_D, BLOCK_N, VERTICAL, PACKED, STRIDE, PLACED, BIAS, INTERPRET,
        )  # fmt: skip
        m_i, l_i, acc = online_softmax_step(m_i, l_i, acc, s, v, INTERPRET)
    if PLACED:
        l_i = tl.where(mask_m, l_i, 1.0)
    acc = acc / l_i[:, None]
    if TAPS_Y > 0:
        offs_d = tl.arange(0, PAD_D)
        acc += tl.load(bias_ptr + head * D + offs_d, mask=offs_d < D, other=0.0).to(ACC)[None, :]
        v_ptr, weight_ptr = qkv_ptr + 2 * dim, weight_ptr + head * D * 9
        acc = _add_lepe(acc, v_ptr, weight_ptr, offs_m, mask_m, coords, width, qkv_stride, D, PAD_D, TAPS_Y, TAPS_X)
    store_rows(o_ptr + pixel_0 * dim + channel_0, offs_m, mask_m, dim, acc, D, PAD_D)
    if BIAS or not ONE_TILE:
        tl.store(lse_ptr + (pixel_0 + offs_m) * heads + first_head + head, m_i + tl.log2(l_i), mask=mask_m)


@triton.jit(do_not_specialize=_SIZES)
def one_tile_backward_kernel(
    qkv_ptr, weight_ptr, pairs_ptr, do_ptr, delta_ptr, dqkv_ptr, partial_ptr,
    windows, height, width, win_h, win_w, heads, first_head, group_heads, start, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_M: tl.constexpr, VERTICAL: tl.constexpr, PACKED: tl.constexpr,
    STRIDE: tl.constexpr, PLACED: tl.constexpr, BIAS: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Whole backward of windows of one tile, but for the bias, whose kernel reads the delta that is stored here.

    The softmax is recomputed from qkv and the bias; the tile is queries and keys.
    """
    size = (height, width, win_h, win_w, start)
    dim, qkv_stride = heads * D, 3 * heads * D
    image, window, first, left, head = _locate_program(windows, size, group_heads, BLOCK_M, PACKED, STRIDE, PLACED)
    slot, valid, mask, offs, coords = _tile(window, first, left, size, BLOCK_M, VERTICAL, PACKED, STRIDE, PLACED)
    pixel_0, channel_0 = image * height * width, (first_head + head) * D
    qkv_ptr += pixel_0 * qkv_stride + channel_0
    dqkv_ptr += pixel_0 * qkv_stride + channel_0
    do_ptr += pixel_0 * dim + channel_0
    q = load_rows(qkv_ptr, offs, mask, qkv_stride, D, PAD_D)
    k = load_rows(qkv_ptr + dim, offs, mask, qkv_stride, D, PAD_D)
    v = load_rows(qkv_ptr + 2 * dim, offs, mask, qkv_stride, D, PAD_D)
    do = load_rows(do_ptr, offs, mask, dim, D, PAD_D)
    attends = _softmax_mask(slot, slot, valid, mask, PACKED, PLACED)
    place, both = _places(first, size, BLOCK_M, VERTICAL), valid[:, None] & valid[None, :]
    s = dot(q, tl.trans(k), INTERPRET) * scale_log2
    s = _add_bias(s, pairs_ptr, head, place[:, None], place[None, :], both, size, BIAS)
    s = tl.where(attends, s, -float("inf"))
    m_i = tl.max(s, 1)
    if PLACED:
        m_i = tl.maximum(m_i, -1e30)
    p = tl.exp2(s - m_i[:, None])
    l_i = tl.sum(p, 1)
    if PLACED:
        l_i = tl.where(mask, l_i, 1.0)
    p = p / l_i[:, None]
    dp = dot(do, tl.trans(v), INTERPRET)
    delta = tl.sum(p * dp, 1)
    if BIAS:
        tl.store(delta_ptr + (pixel_0 + offs) * heads + first_head + head, delta, mask=mask)
    dq = dot((p * (dp - delta[:, None])).to(k.dtype), k, INTERPRET)
    store_rows(dqkv_ptr, offs, mask, qkv_stride, dq * scale, D, PAD_D)
    # P^T and dS^T are products of their own: on Hopper a transposed product may be silently wrong
    lse = m_i + tl.log2(l_i)
    attends = _softmax_mask_transposed(slot, slot, valid, mask, PACKED, PLACED)
    s = dot(k, tl.trans(q), INTERPRET) * scale_log2
    s = _add_bias(s, pairs_ptr, head, place[None, :], place[:, None], both, size, BIAS)
    s = tl.where(attends, s, -float("inf"))
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
def query_backward_kernel(
    qkv_ptr, pairs_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    windows, height, width, win_h, win_w, heads, first_head, group_heads, start, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VERTICAL: tl.constexpr,
    STRIDE: tl.constexpr, PLACED: tl.constexpr, BIAS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradient of q, and delta = sum_j p dp for the kernel of k and v. Loops over the keys twice.

    delta is not computed as sum(o * do): o contains the convolution, and subtracting that loses digits (relative error
    2e-2 in bfloat16, against 6e-3 here).
    """
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    size, pixels = (height, width, win_h, win_w, start), win_h * win_w
    dim, qkv_stride = heads * D, 3 * heads * D
    image, window, first, left, head = _locate_program(windows, size, group_heads, BLOCK_M, False, STRIDE, PLACED)
    slot_m, valid_m, mask_m, offs_m, coords = _tile(window, first, left, size, BLOCK_M, VERTICAL, False, STRIDE, PLACED)
    pixel_0, channel_0 = image * height * width, (first_head + head) * D
    offs_lse = (pixel_0 + offs_m) * heads + first_head + head
    qkv_ptr += pixel_0 * qkv_stride + channel_0
    q = load_rows(qkv_ptr, offs_m, mask_m, qkv_stride, D, PAD_D)
    do = load_rows(do_ptr + pixel_0 * dim + channel_0, offs_m, mask_m, dim, D, PAD_D)
    lse = tl.load(lse_ptr + offs_lse, mask=mask_m, other=float("inf"))
    place_m = _places(first, size, BLOCK_M, VERTICAL)
    delta = tl.zeros([BLOCK_M], ACC)
    for start_n in tl.range(0, pixels, BLOCK_N):
        _, v, s = _key_block(
            q, qkv_ptr, pairs_ptr, window, start_n, left, slot_m, place_m, valid_m, size, head, heads, scale_log2,
            D, PAD_D, BLOCK_N, VERTICAL, False, STRIDE, PLACED, BIAS, INTERPRET,
        )  # fmt: skip
        delta += tl.sum(tl.exp2(s - lse[:, None]) * dot(do, tl.trans(v), INTERPRET), 1)
    tl.store(delta_ptr + offs_lse, delta, mask=mask_m)
    dq = tl.zeros([BLOCK_M, PAD_D], ACC)
    for start_n in tl.range(0, pixels, BLOCK_N):
        k, v, s = _key_block(
            q, qkv_ptr, pairs_ptr, window, start_n, left, slot_m, place_m, valid_m, size, head, heads, scale_log2,
            D, PAD_D, BLOCK_N, VERTICAL, False, STRIDE, PLACED, BIAS, INTERPRET,
        )  # fmt: skip
        ds = tl.exp2(s - lse[:, None]) * (dot(do, tl.trans(v), INTERPRET) - delta[:, None])
        dq += dot(ds.to(k.dtype), k, INTERPRET)
    store_rows(dqkv_ptr + pixel_0 * qkv_stride + channel_0, offs_m, mask_m, qkv_stride, dq * scale, D, PAD_D)


@triton.jit(do_not_specialize=_SIZES)
def key_backward_kernel(
    qkv_ptr, weight_ptr, pairs_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr, partial_ptr,
    windows, height, width, win_h, win_w, heads, first_head, group_heads, start, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VERTICAL: tl.constexpr,
    STRIDE: tl.constexpr, PLACED: tl.constexpr, BIAS: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v: a program owns BLOCK_N keys and loops over the queries of their window."""
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    size, pixels = (height, width, win_h, win_w, start), win_h * win_w
    dim, qkv_stride = heads * D, 3 * heads * D
    image, window, first, left, head = _locate_program(windows, size, group_heads, BLOCK_N, False, STRIDE, PLACED)
    slot_n, valid_n, mask_n, offs_n, coords = _tile(window, first, left, size, BLOCK_N, VERTICAL, False, STRIDE, PLACED)
    pixel_0, channel_0 = image * height * width, (first_head + head) * D
    qkv_ptr += pixel_0 * qkv_stride + channel_0
    dqkv_ptr += pixel_0 * qkv_stride + channel_0
    do_ptr += pixel_0 * dim + channel_0
    k = load_rows(qkv_ptr + dim, offs_n, mask_n, qkv_stride, D, PAD_D)
    v = load_rows(qkv_ptr + 2 * dim, offs_n, mask_n, qkv_stride, D, PAD_D)
    place_n, seen_n = _places(first, size, BLOCK_N, VERTICAL), mask_n if PLACED else valid_n
    dk = tl.zeros([BLOCK_N, PAD_D], ACC)
    dv = tl.zeros([BLOCK_N, PAD_D], ACC)
    for start_m in tl.range(0, pixels, BLOCK_M):
        _, valid_m, mask_m, offs_m, _ = _tile(window, start_m, left, size, BLOCK_M, VERTICAL, False, STRIDE, PLACED)
        q = load_rows(qkv_ptr, offs_m, mask_m, qkv_stride, D, PAD_D)
        do = load_rows(do_ptr, offs_m, mask_m, dim, D, PAD_D)
        offs_lse = (pixel_0 + offs_m) * heads + first_head + head
        lse = tl.load(lse_ptr + offs_lse, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + offs_lse, mask=mask_m, other=0.0)
        place_m, valid = _places(start_m, size, BLOCK_M, VERTICAL), valid_n[:, None] & valid_m[None, :]
        s = dot(k, tl.trans(q), INTERPRET) * scale_log2
        s = _add_bias(s, pairs_ptr, head, place_m[None, :], place_n[:, None], valid, size, BIAS)
        s = tl.where(seen_n[:, None], s, -float("inf"))
        p = tl.exp2(s - lse[None, :])
        dk, dv = dkdv_step(dk, dv, p, q, v, do, delta, INTERPRET)
    store_rows(dqkv_ptr + dim, offs_n, mask_n, qkv_stride, dk * scale, D, PAD_D)
    if TAPS_Y > 0:
        weight_ptr += head * D * 9
        dv = _add_lepe_backward(
            dv, v, do_ptr, weight_ptr, partial_ptr, offs_n, mask_n, coords, width, dim, D, PAD_D, TAPS_Y, TAPS_X
        )
    store_rows(dqkv_ptr + 2 * dim, offs_n, mask_n, qkv_stride, dv, D, PAD_D)


@triton.jit(do_not_specialize=[*_SIZES, "run"])
def bias_backward_kernel(
    qkv_ptr, pairs_ptr, do_ptr, lse_ptr, delta_ptr, dpairs_ptr,
    windows, height, width, win_h, win_w, heads, start, run, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK: tl.constexpr, VERTICAL: tl.constexpr, STRIDE: tl.constexpr,
    PLACED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """What `run` windows add to the gradient of a tile of the bias, [BLOCK queries, BLOCK keys] of one head."""
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    size, pixels = (height, width, win_h, win_w, start), win_h * win_w
    dim, qkv_stride = heads * D, 3 * heads * D
    tiles = tl.cdiv(pixels, BLOCK)
    part, tile, head = split_program_id(heads, tiles * tiles)
    first_m, first_n = tile // tiles * BLOCK, tile % tiles * BLOCK
    place_m, place_n = _places(first_m, size, BLOCK, VERTICAL), _places(first_n, size, BLOCK, VERTICAL)
    item = tl.arange(0, BLOCK)
    valid = (first_m + item < pixels)[:, None] & (first_n + item < pixels)[None, :]
    offs = place_m[:, None] * pixels + place_n[None, :]
    bias = tl.load(pairs_ptr + head * pixels * pixels + offs, mask=valid, other=0.0) * LOG2_E_CONSTEXPR
    per_image = _windows_per_image(size, STRIDE, PLACED)
    sums = tl.zeros([BLOCK, BLOCK], ACC)
    for index in tl.range(part * run, tl.minimum(part * run + run, windows)):
        image, window = (index // per_image).to(tl.int64), index % per_image
        _, _, mask_m, offs_m, _ = _tile(window, first_m, 1, size, BLOCK, VERTICAL, False, STRIDE, PLACED)
        _, valid_n, mask_n, offs_n, _ = _tile(window, first_n, 1, size, BLOCK, VERTICAL, False, STRIDE, PLACED)
        pixel_0 = image * height * width
        rows_ptr = qkv_ptr + pixel_0 * qkv_stride + head * D
        q = load_rows(rows_ptr, offs_m, mask_m, qkv_stride, D, PAD_D)
        k = load_rows(rows_ptr + dim, offs_n, mask_n, qkv_stride, D, PAD_D)
        v = load_rows(rows_ptr + 2 * dim, offs_n, mask_n, qkv_stride, D, PAD_D)
        do = load_rows(do_ptr + pixel_0 * dim + head * D, offs_m, mask_m, dim, D, PAD_D)
        offs_lse = (pixel_0 + offs_m) * heads + head
        lse = tl.load(lse_ptr + offs_lse, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + offs_lse, mask=mask_m, other=0.0)
        seen_n = mask_n if PLACED else valid_n
        s = tl.where(seen_n[None, :], dot(q, tl.trans(k), INTERPRET) * scale_log2 + bias, -float("inf"))
        sums += tl.exp2(s - lse[:, None]) * (dot(do, tl.trans(v), INTERPRET) - delta[:, None])
    dpairs_ptr += (part * heads + head).to(tl.int64) * pixels * pixels
    tl.store(dpairs_ptr + offs, sums, mask=valid)
