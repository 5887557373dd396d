"""Triton kernels of aggregated attention: forward, and five kernels for the backward.

One program owns one head of one tile of consecutive pixels. The nine pixels of a window are nine loads of the tile
shifted by one offset; their scores are the columns of a [tile, 16] array. Pooled keys come in tiles, as matrix
products. The bias of a query and a pooled key lies in the table at the sum of an offset of the query and an offset of
the key, since every row of an index array ascends with one common step. Tiles of it are loaded as [keys, queries],
because consecutive queries of a row of the map read consecutive entries of a row of the table.

Every gradient is a sum in a fixed order, without atomics. Keys gather from the nine queries that see them. Pooled keys
add up partial sums over splits of the queries. The gradient of the bias is first summed over images for each pair of
query and key, for some rows of keys at a time; then each table entry gathers the pairs that use it.

Layout: maps [B, H, W, N, D] (the value keeps the row stride V_STEP * N * D of the qkv it is a part of), filters
[N, 9, B, H, W], pooled maps [B, P, N, D]; lse and delta [B, H, W, N]. `dim` is N * D. `offs_o` counts the nine pixels
of a window, padded to 16.
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

# sizes that change with the images: no binary is specialized to their values
_SIZES = [
    "batch", "height", "width", "keys", "pooled_width", "table_size", "table_width", "blocks", "key_blocks",
    "split_pixels", "first_key", "last_key", "split_images", "first_row", "last_row", "splits",
]  # fmt: skip


@triton.jit
def _locate_program(heads, blocks):
    """Return (outer index, block, head); the index and the head as int64, because they multiply whole maps."""
    outer, block, head = split_program_id(heads, blocks)
    return outer.to(tl.int64), block, head.to(tl.int64)


@triton.jit
def _window_mask(mask_m, y, x, height, width):
    """Which of the nine pixels around (y, x) lie in the map, `[tile, 16]`; false from column 9 on."""
    offs_o = tl.arange(0, 16)
    row = y[:, None] + (offs_o // 3 - 1)[None, :]
    column = x[:, None] + (offs_o % 3 - 1)[None, :]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return mask_m[:, None] & (offs_o < 9)[None, :] & inside


@triton.jit
def _neighbor(mask_m, y, x, height, width, o: tl.constexpr):
    """Return the offset of the pixel at place `o` of the window around (y, x), and whether it lies in the map."""
    row = y + (o // 3 - 1)
    column = x + (o % 3 - 1)
    return row * width + column, mask_m & (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def _window_products(a, ptr, row_stride, mask_m, y, x, height, width, D: tl.constexpr):
    """Products of each row of `a` with the nine rows around its pixel, `[tile, 16]`; 0 outside the map."""
    offs_o = tl.arange(0, 16)
    products = tl.zeros([a.shape[0], 16], a.dtype)
    for o in tl.static_range(9):
        offs, mask = _neighbor(mask_m, y, x, height, width, o)
        row = load_rows(ptr, offs, mask, row_stride, D, a.shape[1])
        products = tl.where((offs_o == o)[None, :], tl.sum(a * row.to(a.dtype), 1)[:, None], products)
    return products


@triton.jit
def _add_window_rows(acc, weights, ptr, row_stride, mask_m, y, x, height, width, D: tl.constexpr):
    """Add to `acc` the nine rows around each pixel, weighted by the columns of `weights` `[tile, 16]`."""
    offs_o = tl.arange(0, 16)
    for o in tl.static_range(9):
        offs, mask = _neighbor(mask_m, y, x, height, width, o)
        row = load_rows(ptr, offs, mask, row_stride, D, acc.shape[1])
        weight = tl.sum(tl.where((offs_o == o)[None, :], weights, 0.0), 1)
        acc += weight[:, None] * row.to(acc.dtype)
    return acc


@triton.jit
def _window_logits(q, k_ptr, local_ptr, head, row_stride, mask_m, y, x, height, width, D: tl.constexpr):
    """Base-2 logits of the nine keys around each query, `[tile, 16]`; `q` has the accumulation dtype."""
    offs_o = tl.arange(0, 16)
    s = _window_products(q, k_ptr, row_stride, mask_m, y, x, height, width, D)
    return (s + tl.load(local_ptr + head * 9 + offs_o, mask=offs_o < 9, other=0.0)[None, :]) * LOG2_E_CONSTEXPR


@triton.jit
def _index_step(index_ptr, length):
    """The step of an index array from one pixel to the next."""
    more = length > 1
    second = tl.load(index_ptr + 1, mask=more, other=0)
    return tl.where(more, second - tl.load(index_ptr), 1).to(tl.int32)


@triton.jit
def _query_bias_offsets(rows_ptr, columns_ptr, y, x, height, width, table_width):
    """Offset in the table of each query's bias, relative to that of the first query."""
    return y * _index_step(rows_ptr, height) * table_width + x * _index_step(columns_ptr, width)


@triton.jit
def _key_bias_offsets(rows_ptr, columns_ptr, offs_n, mask_n, height, width, pooled_width, table_width):
    """Offset in the table of each pooled key's bias for the first query."""
    row = tl.load(rows_ptr + (offs_n // pooled_width) * height, mask=mask_n, other=0)
    column = tl.load(columns_ptr + (offs_n % pooled_width) * width, mask=mask_n, other=0)
    return (row * table_width + column).to(tl.int32)


@triton.jit
def _load_bias(bias_ptr, key_offs, mask_n, query_offs, mask_m):
    """Bias of a tile of pooled keys and queries, `[N, M]`."""
    mask = mask_n[:, None] & mask_m[None, :]
    return tl.load(bias_ptr + (key_offs[:, None] + query_offs[None, :]), mask=mask, other=0.0)


@triton.jit
def _pooled_block(
    q, pk_ptr, pv_ptr, bias_ptr, rows_ptr, columns_ptr, start, keys, dim, query_offs, mask_m,
    height, width, pooled_width, table_width,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Load BLOCK_N pooled keys and values from `start` on; return them and the base-2 logits of the queries q."""
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < keys
    pk = load_rows(pk_ptr, offs_n, mask_n, dim, D, PAD_D)
    pv = load_rows(pv_ptr, offs_n, mask_n, dim, D, PAD_D)
    key_offs = _key_bias_offsets(rows_ptr, columns_ptr, offs_n, mask_n, height, width, pooled_width, table_width)
    bias = tl.trans(_load_bias(bias_ptr, key_offs, mask_n, query_offs, mask_m))
    s = (dot(q, tl.trans(pk), INTERPRET) + bias) * LOG2_E_CONSTEXPR
    return pk, pv, tl.where(mask_n[None, :], s, -float("inf"))


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, filters_ptr, pk_ptr, pv_ptr, local_ptr, bias_ptr, rows_ptr, columns_ptr, o_ptr, lse_ptr,
    batch, height, width, heads, keys, pooled_width, table_size, table_width, blocks,
    D: tl.constexpr, PAD_D: tl.constexpr, V_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = acc_dtype_of(q_ptr.dtype.element_ty)
    image, block, head = _locate_program(heads, blocks)
    dim, pixels = heads * D, height * width
    pixel_0 = image * pixels
    offs_o = tl.arange(0, 16)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < pixels
    y, x = offs_m // width, offs_m % width
    q = load_rows(q_ptr + pixel_0 * dim + head * D, offs_m, mask_m, dim, D, PAD_D)
    in_map = _window_mask(mask_m, y, x, height, width)
    k_ptr += pixel_0 * dim + head * D
    s_window = _window_logits(q.to(ACC), k_ptr, local_ptr, head, dim, mask_m, y, x, height, width, D)
    s_window = tl.where(in_map, s_window, -float("inf"))
    # masked queries have only -inf so far: start them at 0, or the difference below would be NaN
    m_i = tl.where(mask_m, tl.max(s_window, 1), 0.0)
    l_i = tl.sum(tl.exp2(s_window - m_i[:, None]), 1)
    acc = tl.zeros([BLOCK_M, PAD_D], ACC)
    query_offs = _query_bias_offsets(rows_ptr, columns_ptr, y, x, height, width, table_width)
    bias_ptr += head * table_size
    pk_ptr += image * keys * dim + head * D
    pv_ptr += image * keys * dim + head * D
    for start in tl.range(0, keys, BLOCK_N):
        _, pv, s = _pooled_block(
            q, pk_ptr, pv_ptr, bias_ptr, rows_ptr, columns_ptr, start, keys, dim, query_offs, mask_m,
            height, width, pooled_width, table_width, D, PAD_D, BLOCK_N, INTERPRET,
        )  # fmt: skip
        m_i, l_i, acc = online_softmax_step(m_i, l_i, acc, s, pv, INTERPRET)
    lse = m_i + tl.log2(l_i)
    filters_ptr += head * 9 * batch * pixels + pixel_0
    filter_ptrs = filters_ptr + (offs_m[:, None] + offs_o[None, :].to(tl.int64) * batch * pixels)
    filters = tl.load(filter_ptrs, mask=in_map, other=0.0)
    weights = tl.exp2(s_window - lse[:, None]) + filters.to(ACC)
    v_stride = V_STEP * dim
    v_ptr += pixel_0 * v_stride + head * D
    acc /= l_i[:, None]
    acc = _add_window_rows(acc, weights, v_ptr, v_stride, mask_m, y, x, height, width, D)
    store_rows(o_ptr + pixel_0 * dim + head * D, offs_m, mask_m, dim, acc, D, PAD_D)
    tl.store(lse_ptr + (pixel_0 + offs_m) * heads + head, lse, mask=mask_m)


@triton.jit(do_not_specialize=_SIZES)
def query_backward_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, local_ptr, bias_ptr, rows_ptr, columns_ptr, do_ptr, lse_ptr,
    dq_ptr, dfilters_ptr, dlocal_ptr, delta_ptr,
    batch, height, width, heads, keys, pooled_width, table_size, table_width, blocks,
    D: tl.constexpr, PAD_D: tl.constexpr, V_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradients of q and of the filters, partial sums for the local bias, and delta for the other kernels.

    delta is not sum(o * do): o contains the filters' part, which does not belong to the softmax. So the pooled keys are
    looped over twice, first for delta.
    """
    ACC: tl.constexpr = acc_dtype_of(q_ptr.dtype.element_ty)
    image, block, head = _locate_program(heads, blocks)
    dim, v_stride, pixels = heads * D, V_STEP * heads * D, height * width
    pixel_0 = image * pixels
    offs_o = tl.arange(0, 16)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < pixels
    y, x = offs_m // width, offs_m % width
    q = load_rows(q_ptr + pixel_0 * dim + head * D, offs_m, mask_m, dim, D, PAD_D)
    do = load_rows(do_ptr + pixel_0 * dim + head * D, offs_m, mask_m, dim, D, PAD_D)
    lse = tl.load(lse_ptr + (pixel_0 + offs_m) * heads + head, mask=mask_m, other=float("inf"))
    in_map = _window_mask(mask_m, y, x, height, width)
    k_ptr += pixel_0 * dim + head * D
    v_ptr += pixel_0 * v_stride + head * D
    s_window = _window_logits(q.to(ACC), k_ptr, local_ptr, head, dim, mask_m, y, x, height, width, D)
    p_window = tl.where(in_map, tl.exp2(s_window - lse[:, None]), 0.0)
    dp_window = _window_products(do.to(ACC), v_ptr, v_stride, mask_m, y, x, height, width, D)
    dfilters_ptr += head * 9 * batch * pixels + pixel_0
    dfilter_ptrs = dfilters_ptr + (offs_m[:, None] + offs_o[None, :].to(tl.int64) * batch * pixels)
    tl.store(dfilter_ptrs, dp_window.to(dfilters_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_o < 9)[None, :])
    delta = tl.sum(p_window * dp_window, 1)
    query_offs = _query_bias_offsets(rows_ptr, columns_ptr, y, x, height, width, table_width)
    bias_ptr += head * table_size
    pk_ptr += image * keys * dim + head * D
    pv_ptr += image * keys * dim + head * D
    for start in tl.range(0, keys, BLOCK_N):
        _, pv, s = _pooled_block(
            q, pk_ptr, pv_ptr, bias_ptr, rows_ptr, columns_ptr, start, keys, dim, query_offs, mask_m,
            height, width, pooled_width, table_width, D, PAD_D, BLOCK_N, INTERPRET,
        )  # fmt: skip
        delta += tl.sum(tl.exp2(s - lse[:, None]) * dot(do, tl.trans(pv), INTERPRET), 1)
    tl.store(delta_ptr + (pixel_0 + offs_m) * heads + head, delta, mask=mask_m)
    dq = tl.zeros([BLOCK_M, PAD_D], ACC)
    for start in tl.range(0, keys, BLOCK_N):
        pk, pv, s = _pooled_block(
            q, pk_ptr, pv_ptr, bias_ptr, rows_ptr, columns_ptr, start, keys, dim, query_offs, mask_m,
            height, width, pooled_width, table_width, D, PAD_D, BLOCK_N, INTERPRET,
        )  # fmt: skip
        ds = tl.exp2(s - lse[:, None]) * (dot(do, tl.trans(pv), INTERPRET) - delta[:, None])
        dq += dot(ds.to(pk.dtype), pk, INTERPRET)
    ds_window = p_window * (dp_window - delta[:, None])
    tl.store(dlocal_ptr + tl.program_id(0).to(tl.int64) * 9 + offs_o, tl.sum(ds_window, 0), mask=offs_o < 9)
    dq = _add_window_rows(dq, ds_window, k_ptr, dim, mask_m, y, x, height, width, D)
    store_rows(dq_ptr + pixel_0 * dim + head * D, offs_m, mask_m, dim, dq, D, PAD_D)


@triton.jit(do_not_specialize=_SIZES)
def key_backward_kernel(
    q_ptr, k_ptr, v_ptr, filters_ptr, local_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    batch, height, width, heads, blocks,
    D: tl.constexpr, PAD_D: tl.constexpr, V_STEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v from the nine queries whose windows contain each key."""
    ACC: tl.constexpr = acc_dtype_of(q_ptr.dtype.element_ty)
    image, block, head = _locate_program(heads, blocks)
    dim, v_stride, pixels = heads * D, V_STEP * heads * D, height * width
    pixel_0 = image * pixels
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < pixels
    y, x = offs_n // width, offs_n % width
    base = pixel_0 * dim + head * D
    k = load_rows(k_ptr + base, offs_n, mask_n, dim, D, PAD_D).to(ACC)
    v = load_rows(v_ptr + pixel_0 * v_stride + head * D, offs_n, mask_n, v_stride, D, PAD_D).to(ACC)
    dk = tl.zeros([BLOCK_N, PAD_D], ACC)
    dv = tl.zeros([BLOCK_N, PAD_D], ACC)
    for o in tl.static_range(9):
        # the query whose window has this key at place o
        offs_m, mask_m = _neighbor(mask_n, y, x, height, width, 8 - o)
        q = load_rows(q_ptr + base, offs_m, mask_m, dim, D, PAD_D).to(ACC)
        do = load_rows(do_ptr + base, offs_m, mask_m, dim, D, PAD_D).to(ACC)
        lse = tl.load(lse_ptr + (pixel_0 + offs_m) * heads + head, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + (pixel_0 + offs_m) * heads + head, mask=mask_m, other=0.0)
        filters = tl.load(filters_ptr + (head * 9 + o) * batch * pixels + pixel_0 + offs_m, mask=mask_m, other=0.0)
        s = tl.sum(q * k, 1) + tl.load(local_ptr + head * 9 + o)
        p = tl.exp2(s * LOG2_E_CONSTEXPR - lse)
        ds = p * (tl.sum(do * v, 1) - delta)
        dk += ds[:, None] * q
        dv += (p + filters.to(ACC))[:, None] * do
    store_rows(dk_ptr + base, offs_n, mask_n, dim, dk, D, PAD_D)
    store_rows(dv_ptr + base, offs_n, mask_n, dim, dv, D, PAD_D)


@triton.jit(do_not_specialize=_SIZES)
def pooled_backward_kernel(
    q_ptr, pk_ptr, pv_ptr, bias_ptr, rows_ptr, columns_ptr, do_ptr, lse_ptr, delta_ptr, dk_part_ptr, dv_part_ptr,
    batch, height, width, heads, keys, pooled_width, table_size, table_width, blocks, split_pixels,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Partial gradients of a tile of pooled keys and values from the queries of one split of the map."""
    ACC: tl.constexpr = acc_dtype_of(q_ptr.dtype.element_ty)
    outer, block, head = _locate_program(heads, blocks)
    image, split = outer % batch, outer // batch
    dim, pixels = heads * D, height * width
    pixel_0 = image * pixels
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < keys
    pooled_0 = image * keys * dim + head * D
    pk = load_rows(pk_ptr + pooled_0, offs_n, mask_n, dim, D, PAD_D)
    pv = load_rows(pv_ptr + pooled_0, offs_n, mask_n, dim, D, PAD_D)
    key_offs = _key_bias_offsets(rows_ptr, columns_ptr, offs_n, mask_n, height, width, pooled_width, table_width)
    bias_ptr += head * table_size
    q_ptr += pixel_0 * dim + head * D
    do_ptr += pixel_0 * dim + head * D
    dk = tl.zeros([BLOCK_N, PAD_D], ACC)
    dv = tl.zeros([BLOCK_N, PAD_D], ACC)
    first = (split * split_pixels).to(tl.int32)
    for start in tl.range(first, tl.minimum(first + split_pixels, pixels), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < pixels
        q = load_rows(q_ptr, offs_m, mask_m, dim, D, PAD_D)
        do = load_rows(do_ptr, offs_m, mask_m, dim, D, PAD_D)
        lse = tl.load(lse_ptr + (pixel_0 + offs_m) * heads + head, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + (pixel_0 + offs_m) * heads + head, mask=mask_m, other=0.0)
        query_offs = _query_bias_offsets(
            rows_ptr, columns_ptr, offs_m // width, offs_m % width, height, width, table_width
        )
        bias = _load_bias(bias_ptr, key_offs, mask_n, query_offs, mask_m)
        p = tl.exp2((dot(pk, tl.trans(q), INTERPRET) + bias) * LOG2_E_CONSTEXPR - lse[None, :])
        p = tl.where(mask_n[:, None], p, 0.0)
        dk, dv = dkdv_step(dk, dv, p, q, pv, do, delta, INTERPRET)
    part_0 = (split * batch + image) * keys * dim + head * D
    store_rows(dk_part_ptr + part_0, offs_n, mask_n, dim, dk, D, PAD_D)
    store_rows(dv_part_ptr + part_0, offs_n, mask_n, dim, dv, D, PAD_D)


@triton.jit(do_not_specialize=_SIZES)
def pair_backward_kernel(
    q_ptr, pk_ptr, pv_ptr, bias_ptr, rows_ptr, columns_ptr, do_ptr, lse_ptr, delta_ptr, pairs_ptr,
    batch, height, width, heads, keys, pooled_width, table_size, table_width,
    blocks, key_blocks, first_key, last_key, split_images,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Bias gradient of each pair of a query and a key in [first_key, last_key), summed over the images of a split."""
    ACC: tl.constexpr = acc_dtype_of(q_ptr.dtype.element_ty)
    outer, block, head = _locate_program(heads, blocks)
    key_block, split = (outer % key_blocks).to(tl.int32), outer // key_blocks
    dim, pixels = heads * D, height * width
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < pixels
    offs_n = first_key + key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < last_key
    key_offs = _key_bias_offsets(rows_ptr, columns_ptr, offs_n, mask_n, height, width, pooled_width, table_width)
    query_offs = _query_bias_offsets(rows_ptr, columns_ptr, offs_m // width, offs_m % width, height, width, table_width)
    bias = _load_bias(bias_ptr + head * table_size, key_offs, mask_n, query_offs, mask_m)
    dbias = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    image = split * split_images
    for _ in tl.range(0, tl.minimum(split_images, batch - image).to(tl.int32)):
        query_0, pooled_0 = image * pixels * dim + head * D, image * keys * dim + head * D
        q = load_rows(q_ptr + query_0, offs_m, mask_m, dim, D, PAD_D)
        do = load_rows(do_ptr + query_0, offs_m, mask_m, dim, D, PAD_D)
        pk = load_rows(pk_ptr + pooled_0, offs_n, mask_n, dim, D, PAD_D)
        pv = load_rows(pv_ptr + pooled_0, offs_n, mask_n, dim, D, PAD_D)
        lse = tl.load(lse_ptr + (image * pixels + offs_m) * heads + head, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + (image * pixels + offs_m) * heads + head, mask=mask_m, other=0.0)
        p = tl.exp2((dot(pk, tl.trans(q), INTERPRET) + bias) * LOG2_E_CONSTEXPR - lse[None, :])
        dbias += p * (dot(pv, tl.trans(do), INTERPRET) - delta[None, :])
        image += 1
    # [splits, N, keys, H*W]
    pair_row = (split * heads + head) * (last_key - first_key) + (offs_n - first_key)
    pair_ptrs = pairs_ptr + pair_row[:, None] * pixels + offs_m[None, :]
    tl.store(pair_ptrs, dbias, mask=mask_n[:, None] & mask_m[None, :])


@triton.jit(do_not_specialize=_SIZES)
def table_backward_kernel(
    pairs_ptr, rows_ptr, columns_ptr, dbias_ptr,
    height, width, heads, pooled_width, table_size, table_width, blocks, first_row, last_row, splits,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to each table entry the pairs that use it, for the rows [first_row, last_row) of pooled keys."""
    table_row, block, head = _locate_program(heads, blocks)
    row_step, column_step = _index_step(rows_ptr, height), _index_step(columns_ptr, width)
    table_column = block * BLOCK + tl.arange(0, BLOCK)
    mask = table_column < table_width
    dbias_ptr += head * table_size + table_row * table_width
    total = tl.load(dbias_ptr + table_column, mask=mask & (first_row > 0), other=0.0)
    pixels = height * width
    for i in tl.range(first_row, last_row):
        # the only row y of queries whose bias for row i of keys lies in this row of the table, if there is one
        distance = (table_row - tl.load(rows_ptr + i * height)).to(tl.int32)
        y = distance // row_step
        if (distance >= 0) & (y * row_step == distance) & (y < height):
            for j in tl.range(0, pooled_width):
                distance_x = table_column - tl.load(columns_ptr + j * width).to(tl.int32)
                x = distance_x // column_step
                used = mask & (distance_x >= 0) & (x * column_step == distance_x) & (x < width)
                key = (i - first_row) * pooled_width + j
                for split in tl.range(0, splits):
                    pair_row = (split * heads + head) * ((last_row - first_row) * pooled_width) + key
                    total += tl.load(pairs_ptr + pair_row * pixels + y * width + x, mask=used, other=0.0)
    tl.store(dbias_ptr + table_column, total, mask=mask)
