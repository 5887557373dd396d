"""Triton kernels of `aggregated`: forward, and the backward by queries, by keys, by pooled keys and by biases.

One program owns one head of one tile of consecutive pixels. The nine pixels of a window are nine loads of the tile
moved by one offset; their scores lie in the columns of a [tile, 16] array. Pooled keys come in tiles, multiplied as
matrices. The bias of a query and a pooled key lies at the sum of an offset of the query and an offset of the key, since
each row of an index array ascends in equal steps; tiles of it are loaded key by query, for queries that follow one
another in a row of the map do so in a row of the table.

Every gradient is a sum in a fixed order, without atomics: keys gather from the nine queries that see them, pooled keys
from partial sums over runs of queries. The gradient of the bias is first summed over the images for each pair of query
and key, some rows of keys at a time; then each entry of the table gathers the pairs it serves.

Layout: maps [B, H, W, N, D] (the value with the stride of the qkv it is a part of), filters [N, 9, B, H, W], pooled
maps [B, P, N, D]; statistics [B, H, W, N] in base 2.
"""

import triton
import triton.language as tl

from ._triton import LOG2_E, dot

_LOG2_E = tl.constexpr(LOG2_E)

# what changes with the size of the images: one binary serves them all
_SIZES = [
    "batch", "height", "width", "keys", "pooled_width", "table_size", "table_width", "tiles", "key_tiles", "span",
    "first_key", "last_key", "images", "first", "last", "runs",
]  # fmt: skip


@triton.jit
def _split_program(heads, tiles):
    """Program id -> (image, tile, head), head fastest: neighbours share the cache lines of a pixel."""
    pid = tl.program_id(0).to(tl.int64)
    rest = pid // heads
    return rest // tiles, (rest % tiles).to(tl.int32), pid % heads


@triton.jit
def _at(base, pixels, stride, d):
    return base + pixels[:, None] * stride + d[None, :]


@triton.jit
def _window(ok, y, x, height, width):
    """Which of the nine pixels around (y, x) lie in the map, `[tile, 16]`; columns from 9 on are none."""
    o = tl.arange(0, 16)
    row = y[:, None] + (o // 3 - 1)[None, :]
    column = x[:, None] + (o % 3 - 1)[None, :]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return ok[:, None] & (o < 9)[None, :] & inside


@triton.jit
def _neighbour(ok, y, x, height, width, o: tl.constexpr):
    """The pixel at offset `o` of the window around (y, x), and whether it lies in the map."""
    row = y + (o // 3 - 1)
    column = x + (o % 3 - 1)
    return row * width + column, ok & (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def _window_products(a, base, stride, ok, y, x, height, width, D: tl.constexpr):
    """The products of each row of `a` with the nine rows around its pixel, `[tile, 16]`, 0 outside the map."""
    d = tl.arange(0, a.shape[1])
    o = tl.arange(0, 16)
    products = tl.zeros([a.shape[0], 16], a.dtype)
    for i in tl.static_range(9):
        pixel, inside = _neighbour(ok, y, x, height, width, i)
        row = tl.load(_at(base, pixel, stride, d), mask=inside[:, None] & (d < D)[None, :], other=0.0)
        products = tl.where((o == i)[None, :], tl.sum(a * row.to(a.dtype), 1)[:, None], products)
    return products


@triton.jit
def _window_sum(total, weights, base, stride, ok, y, x, height, width, D: tl.constexpr):
    """`total` and the nine rows around each pixel, weighted by the columns of `weights`."""
    d = tl.arange(0, total.shape[1])
    o = tl.arange(0, 16)
    for i in tl.static_range(9):
        pixel, inside = _neighbour(ok, y, x, height, width, i)
        row = tl.load(_at(base, pixel, stride, d), mask=inside[:, None] & (d < D)[None, :], other=0.0)
        weight = tl.sum(tl.where((o == i)[None, :], weights, 0.0), 1)
        total += weight[:, None] * row.to(total.dtype)
    return total


@triton.jit
def _step(index_ptr, length):
    """By how much an index array grows from one pixel to the next."""
    more = length > 1
    second = tl.load(index_ptr + 1, mask=more, other=0)
    return tl.where(more, second - tl.load(index_ptr), 1).to(tl.int32)


@triton.jit
def _query_offset(rows_ptr, columns_ptr, y, x, height, width, table_width):
    """Where the table has the bias of a query, counted from that of the first query."""
    return y * _step(rows_ptr, height) * table_width + x * _step(columns_ptr, width)


@triton.jit
def _key_offset(rows_ptr, columns_ptr, key, ok, height, width, pooled_width, table_width):
    """Where the table has the bias of a pooled key for the first query."""
    row = tl.load(rows_ptr + (key // pooled_width) * height, mask=ok, other=0)
    column = tl.load(columns_ptr + (key % pooled_width) * width, mask=ok, other=0)
    return (row * table_width + column).to(tl.int32)


@triton.jit
def _keys(
    pk_ptr, pv_ptr, rows_ptr, columns_ptr, j, end, stride, height, width, pooled_width, table_width,
    D: tl.constexpr, PAD_D: tl.constexpr,
):  # fmt: skip
    """Pooled keys `j` and their values, where the table has their bias, and which of them come before `end`."""
    d = tl.arange(0, PAD_D)
    ok = j < end
    mask = ok[:, None] & (d < D)[None, :]
    pk = tl.load(_at(pk_ptr, j, stride, d), mask=mask, other=0.0)
    pv = tl.load(_at(pv_ptr, j, stride, d), mask=mask, other=0.0)
    return pk, pv, _key_offset(rows_ptr, columns_ptr, j, ok, height, width, pooled_width, table_width), ok


@triton.jit
def _bias(bias_ptr, key_at, key_ok, query_at, query_ok):
    """`[keys, queries]`."""
    return tl.load(
        bias_ptr + (key_at[:, None] + query_at[None, :]), mask=key_ok[:, None] & query_ok[None, :], other=0.0
    )


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, filters_ptr, pk_ptr, pv_ptr, local_ptr, bias_ptr, rows_ptr, columns_ptr, out_ptr, lse_ptr,
    batch, height, width, heads, keys, pooled_width, table_size, table_width, tiles,
    D: tl.constexpr, PAD_D: tl.constexpr, V_PARTS: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, tile, head = _split_program(heads, tiles)
    stride, pixels = heads * D, height * width
    origin = image * pixels
    d = tl.arange(0, PAD_D)
    o = tl.arange(0, 16)
    m = tile * TILE_Q + tl.arange(0, TILE_Q)
    ok = m < pixels
    y, x = m // width, m % width
    mask = ok[:, None] & (d < D)[None, :]
    q = tl.load(_at(q_ptr + origin * stride + head * D, m, stride, d), mask=mask, other=0.0)
    inside = _window(ok, y, x, height, width)
    k_ptr += origin * stride + head * D
    near = _window_products(q.to(acc_dtype), k_ptr, stride, ok, y, x, height, width, D)
    near = (near + tl.load(local_ptr + head * 9 + o, mask=o < 9, other=0.0)[None, :]) * _LOG2_E
    near = tl.where(inside, near, -float("inf"))
    # rows beyond the map have no score at all until the pooled keys come
    top = tl.where(ok, tl.max(near, 1), 0.0)
    total = tl.sum(tl.exp2(near - top[:, None]), 1)
    acc = tl.zeros([TILE_Q, PAD_D], acc_dtype)
    query_at = _query_offset(rows_ptr, columns_ptr, y, x, height, width, table_width)
    bias_ptr += head * table_size
    pk_ptr += image * keys * stride + head * D
    pv_ptr += image * keys * stride + head * D
    for start in tl.range(0, keys, TILE_K):
        j = start + tl.arange(0, TILE_K)
        pk, pv, key_at, j_ok = _keys(
            pk_ptr, pv_ptr, rows_ptr, columns_ptr, j, keys, stride, height, width, pooled_width, table_width, D, PAD_D
        )
        bias = tl.trans(_bias(bias_ptr, key_at, j_ok, query_at, ok))
        s = tl.where(j_ok[None, :], (dot(q, tl.trans(pk), INTERPRET) + bias) * _LOG2_E, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + dot(p.to(pv.dtype), pv, INTERPRET)
        top = new_top
    lse = top + tl.log2(total)
    filters_ptr += head * 9 * batch * pixels + origin
    filters = tl.load(filters_ptr + (m[:, None] + o[None, :].to(tl.int64) * batch * pixels), mask=inside, other=0.0)
    weights = tl.exp2(near - lse[:, None]) + filters.to(acc_dtype)
    v_stride = V_PARTS * heads * D
    acc /= total[:, None]
    acc = _window_sum(acc, weights, v_ptr + origin * v_stride + head * D, v_stride, ok, y, x, height, width, D)
    out_at = _at(out_ptr + origin * stride + head * D, m, stride, d)
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + (origin + m) * heads + head, lse, mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def query_backward_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, local_ptr, bias_ptr, rows_ptr, columns_ptr, grad_ptr, lse_ptr,
    dq_ptr, dfilters_ptr, dlocal_ptr, delta_ptr,
    batch, height, width, heads, keys, pooled_width, table_size, table_width, tiles,
    D: tl.constexpr, PAD_D: tl.constexpr, V_PARTS: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, tile, head = _split_program(heads, tiles)
    stride, v_stride, pixels = heads * D, V_PARTS * heads * D, height * width
    origin = image * pixels
    d = tl.arange(0, PAD_D)
    o = tl.arange(0, 16)
    m = tile * TILE_Q + tl.arange(0, TILE_Q)
    ok = m < pixels
    y, x = m // width, m % width
    mask = ok[:, None] & (d < D)[None, :]
    q = tl.load(_at(q_ptr + origin * stride + head * D, m, stride, d), mask=mask, other=0.0)
    grad = tl.load(_at(grad_ptr + origin * stride + head * D, m, stride, d), mask=mask, other=0.0)
    lse = tl.load(lse_ptr + (origin + m) * heads + head, mask=ok, other=float("inf"))
    inside = _window(ok, y, x, height, width)
    k_ptr += origin * stride + head * D
    v_ptr += origin * v_stride + head * D
    near = _window_products(q.to(acc_dtype), k_ptr, stride, ok, y, x, height, width, D)
    near = (near + tl.load(local_ptr + head * 9 + o, mask=o < 9, other=0.0)[None, :]) * _LOG2_E
    p_near = tl.where(inside, tl.exp2(near - lse[:, None]), 0.0)
    dp_near = _window_products(grad.to(acc_dtype), v_ptr, v_stride, ok, y, x, height, width, D)
    dfilters_ptr += head * 9 * batch * pixels + origin
    dfilters_at = dfilters_ptr + (m[:, None] + o[None, :].to(tl.int64) * batch * pixels)
    tl.store(dfilters_at, dp_near.to(dfilters_ptr.dtype.element_ty), mask=ok[:, None] & (o < 9)[None, :])
    # not the product of gradient and result: that holds the filters' part, which takes no part in the softmax
    delta = tl.sum(p_near * dp_near, 1)
    query_at = _query_offset(rows_ptr, columns_ptr, y, x, height, width, table_width)
    bias_ptr += head * table_size
    pk_ptr += image * keys * stride + head * D
    pv_ptr += image * keys * stride + head * D
    for start in tl.range(0, keys, TILE_K):
        j = start + tl.arange(0, TILE_K)
        pk, pv, key_at, j_ok = _keys(
            pk_ptr, pv_ptr, rows_ptr, columns_ptr, j, keys, stride, height, width, pooled_width, table_width, D, PAD_D
        )
        bias = tl.trans(_bias(bias_ptr, key_at, j_ok, query_at, ok))
        p = tl.exp2((dot(q, tl.trans(pk), INTERPRET) + bias) * _LOG2_E - lse[:, None])
        delta += tl.sum(tl.where(j_ok[None, :], p, 0.0) * dot(grad, tl.trans(pv), INTERPRET), 1)
    tl.store(delta_ptr + (origin + m) * heads + head, delta, mask=ok)
    dq = tl.zeros([TILE_Q, PAD_D], acc_dtype)
    for start in tl.range(0, keys, TILE_K):
        j = start + tl.arange(0, TILE_K)
        pk, pv, key_at, j_ok = _keys(
            pk_ptr, pv_ptr, rows_ptr, columns_ptr, j, keys, stride, height, width, pooled_width, table_width, D, PAD_D
        )
        bias = tl.trans(_bias(bias_ptr, key_at, j_ok, query_at, ok))
        p = tl.exp2((dot(q, tl.trans(pk), INTERPRET) + bias) * _LOG2_E - lse[:, None])
        ds = tl.where(j_ok[None, :], p, 0.0) * (dot(grad, tl.trans(pv), INTERPRET) - delta[:, None])
        dq += dot(ds.to(pk.dtype), pk, INTERPRET)
    ds_near = p_near * (dp_near - delta[:, None])
    tl.store(dlocal_ptr + tl.program_id(0).to(tl.int64) * 9 + o, tl.sum(ds_near, 0), mask=o < 9)
    dq = _window_sum(dq, ds_near, k_ptr, stride, ok, y, x, height, width, D)
    dq_at = _at(dq_ptr + origin * stride + head * D, m, stride, d)
    tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def key_backward_kernel(
    q_ptr, k_ptr, v_ptr, filters_ptr, local_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    batch, height, width, heads, tiles,
    D: tl.constexpr, PAD_D: tl.constexpr, V_PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, tile, head = _split_program(heads, tiles)
    stride, v_stride, pixels = heads * D, V_PARTS * heads * D, height * width
    origin = image * pixels
    d = tl.arange(0, PAD_D)
    n = tile * TILE + tl.arange(0, TILE)
    ok = n < pixels
    y, x = n // width, n % width
    mask = ok[:, None] & (d < D)[None, :]
    at = origin * stride + head * D
    k = tl.load(_at(k_ptr + at, n, stride, d), mask=mask, other=0.0).to(acc_dtype)
    v = tl.load(_at(v_ptr + origin * v_stride + head * D, n, v_stride, d), mask=mask, other=0.0).to(acc_dtype)
    dk = tl.zeros([TILE, PAD_D], acc_dtype)
    dv = tl.zeros([TILE, PAD_D], acc_dtype)
    for o in tl.static_range(9):
        # the query whose window has this key at offset o
        m, q_ok = _neighbour(ok, y, x, height, width, 8 - o)
        q_mask = q_ok[:, None] & (d < D)[None, :]
        q = tl.load(_at(q_ptr + at, m, stride, d), mask=q_mask, other=0.0).to(acc_dtype)
        grad = tl.load(_at(grad_ptr + at, m, stride, d), mask=q_mask, other=0.0).to(acc_dtype)
        lse = tl.load(lse_ptr + (origin + m) * heads + head, mask=q_ok, other=float("inf"))
        delta = tl.load(delta_ptr + (origin + m) * heads + head, mask=q_ok, other=0.0)
        extra = tl.load(filters_ptr + (head * 9 + o) * batch * pixels + origin + m, mask=q_ok, other=0.0)
        s = tl.sum(q * k, 1) + tl.load(local_ptr + head * 9 + o)
        p = tl.exp2(s * _LOG2_E - lse)
        ds = p * (tl.sum(grad * v, 1) - delta)
        dk += ds[:, None] * q
        dv += (p + extra.to(acc_dtype))[:, None] * grad
    tl.store(_at(dk_ptr + at, n, stride, d), dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(_at(dv_ptr + at, n, stride, d), dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def pooled_backward_kernel(
    q_ptr, pk_ptr, pv_ptr, bias_ptr, rows_ptr, columns_ptr, grad_ptr, lse_ptr, delta_ptr, dk_part_ptr, dv_part_ptr,
    batch, height, width, heads, keys, pooled_width, table_size, table_width, tiles, span,
    D: tl.constexpr, PAD_D: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Partial gradients of a tile of pooled keys from the queries [span * run, span * (run + 1))."""
    acc_dtype: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    rest, tile, head = _split_program(heads, tiles)
    image, run = rest % batch, rest // batch
    stride, pixels = heads * D, height * width
    origin = image * pixels
    d = tl.arange(0, PAD_D)
    j = tile * TILE_K + tl.arange(0, TILE_K)
    j_ok = j < keys
    j_mask = j_ok[:, None] & (d < D)[None, :]
    pooled_at = image * keys * stride + head * D
    pk = tl.load(_at(pk_ptr + pooled_at, j, stride, d), mask=j_mask, other=0.0)
    pv = tl.load(_at(pv_ptr + pooled_at, j, stride, d), mask=j_mask, other=0.0)
    key_at = _key_offset(rows_ptr, columns_ptr, j, j_ok, height, width, pooled_width, table_width)
    bias_ptr += head * table_size
    q_ptr += origin * stride + head * D
    grad_ptr += origin * stride + head * D
    dk = tl.zeros([TILE_K, PAD_D], acc_dtype)
    dv = tl.zeros([TILE_K, PAD_D], acc_dtype)
    first = (run * span).to(tl.int32)
    for start in tl.range(first, tl.minimum(first + span, pixels), TILE_Q):
        m = start + tl.arange(0, TILE_Q)
        ok = m < pixels
        mask = ok[:, None] & (d < D)[None, :]
        q = tl.load(_at(q_ptr, m, stride, d), mask=mask, other=0.0)
        grad = tl.load(_at(grad_ptr, m, stride, d), mask=mask, other=0.0)
        lse = tl.load(lse_ptr + (origin + m) * heads + head, mask=ok, other=float("inf"))
        delta = tl.load(delta_ptr + (origin + m) * heads + head, mask=ok, other=0.0)
        query_at = _query_offset(rows_ptr, columns_ptr, m // width, m % width, height, width, table_width)
        bias = _bias(bias_ptr, key_at, j_ok, query_at, ok)
        # key-major products: on Hopper a transposed dot result may be silently wrong
        p = tl.exp2((dot(pk, tl.trans(q), INTERPRET) + bias) * _LOG2_E - lse[None, :])
        p = tl.where(j_ok[:, None], p, 0.0)
        dv += dot(p.to(grad.dtype), grad, INTERPRET)
        ds = p * (dot(pv, tl.trans(grad), INTERPRET) - delta[None, :])
        dk += dot(ds.to(q.dtype), q, INTERPRET)
    part_at = (run * batch + image) * keys * stride + head * D
    tl.store(_at(dk_part_ptr + part_at, j, stride, d), dk, mask=j_mask)
    tl.store(_at(dv_part_ptr + part_at, j, stride, d), dv, mask=j_mask)


@triton.jit(do_not_specialize=_SIZES)
def pair_backward_kernel(
    q_ptr, pk_ptr, pv_ptr, bias_ptr, rows_ptr, columns_ptr, grad_ptr, lse_ptr, delta_ptr, pairs_ptr,
    batch, height, width, heads, keys, pooled_width, table_size, table_width,
    tiles, key_tiles, first_key, last_key, images,
    D: tl.constexpr, PAD_D: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The gradient of the bias of each pair of query and key in [first_key, last_key), summed over a run of images."""
    acc_dtype: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    rest, tile, head = _split_program(heads, tiles)
    key_tile, run = (rest % key_tiles).to(tl.int32), rest // key_tiles
    stride, pixels = heads * D, height * width
    d = tl.arange(0, PAD_D)
    m = tile * TILE_Q + tl.arange(0, TILE_Q)
    ok = m < pixels
    mask = ok[:, None] & (d < D)[None, :]
    j = first_key + key_tile * TILE_K + tl.arange(0, TILE_K)
    j_ok = j < last_key
    j_mask = j_ok[:, None] & (d < D)[None, :]
    key_at = _key_offset(rows_ptr, columns_ptr, j, j_ok, height, width, pooled_width, table_width)
    query_at = _query_offset(rows_ptr, columns_ptr, m // width, m % width, height, width, table_width)
    bias = _bias(bias_ptr + head * table_size, key_at, j_ok, query_at, ok)
    total = tl.zeros([TILE_K, TILE_Q], acc_dtype)
    image = run * images
    for _ in tl.range(0, tl.minimum(images, batch - image).to(tl.int32)):
        at, pooled_at = image * pixels * stride + head * D, image * keys * stride + head * D
        q = tl.load(_at(q_ptr + at, m, stride, d), mask=mask, other=0.0)
        grad = tl.load(_at(grad_ptr + at, m, stride, d), mask=mask, other=0.0)
        pk = tl.load(_at(pk_ptr + pooled_at, j, stride, d), mask=j_mask, other=0.0)
        pv = tl.load(_at(pv_ptr + pooled_at, j, stride, d), mask=j_mask, other=0.0)
        lse = tl.load(lse_ptr + (image * pixels + m) * heads + head, mask=ok, other=float("inf"))
        delta = tl.load(delta_ptr + (image * pixels + m) * heads + head, mask=ok, other=0.0)
        p = tl.exp2((dot(pk, tl.trans(q), INTERPRET) + bias) * _LOG2_E - lse[None, :])
        total += p * (dot(pv, tl.trans(grad), INTERPRET) - delta[None, :])
        image += 1
    # [runs, N, keys, H*W]
    pair_at = ((run * heads + head) * (last_key - first_key) + (j - first_key))[:, None] * pixels + m[None, :]
    tl.store(pairs_ptr + pair_at, total, mask=j_ok[:, None] & ok[None, :])


@triton.jit(do_not_specialize=_SIZES)
def table_backward_kernel(
    pairs_ptr, rows_ptr, columns_ptr, dbias_ptr,
    height, width, heads, pooled_width, table_size, table_width, tiles, first, last, runs,
    TILE: tl.constexpr,
):  # fmt: skip
    """Add to each entry of the table the pairs it serves, of the pooled keys' rows [first, last)."""
    row, tile, head = _split_program(heads, tiles)
    row_step, column_step = _step(rows_ptr, height), _step(columns_ptr, width)
    column = tile * TILE + tl.arange(0, TILE)
    ok = column < table_width
    dbias_ptr += head * table_size + row * table_width
    total = tl.load(dbias_ptr + column, mask=ok & (first > 0), other=0.0)
    pixels = height * width
    for i in tl.range(first, last):
        above = (row - tl.load(rows_ptr + i * height)).to(tl.int32)
        y = above // row_step
        if (above >= 0) & (y * row_step == above) & (y < height):
            for j in tl.range(0, pooled_width):
                left = column - tl.load(columns_ptr + j * width).to(tl.int32)
                x = left // column_step
                served = ok & (left >= 0) & (x * column_step == left) & (x < width)
                key = (i - first) * pooled_width + j
                for run in tl.range(0, runs):
                    pair_at = ((run * heads + head) * ((last - first) * pooled_width) + key) * pixels + y * width
                    total += tl.load(pairs_ptr + pair_at + x, mask=served, other=0.0)
    tl.store(dbias_ptr + column, total, mask=ok)
