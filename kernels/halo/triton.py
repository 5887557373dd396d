"""Triton kernels of halo attention: forward, and two kernels for the backward.

One program owns one head of one tile of a block. In the forward and the backward of q these are queries, and the
program loops over the keys of the block's window. In the backward of k and v they are keys, and the program loops over
the queries of every block whose window reaches into the tile. Both gradients are sums in a fixed order, without
atomics.

The relative logits arrive as `rel`, see `relative.reachable_logits`. A tile of queries loads those of its window's rows
and of its window's columns side by side, PAD_W columns each. The bias of a pair,

    bias[m, n] = rel_rows[m, row(n)] + rel_cols[m, col(n)],

is computed as a matrix product with a two-hot matrix instead of a gather: exact, and on the tensor cores. The two-hot
matrix depends on the key's place in the window of the query's block, so a tile never holds queries of two blocks.

Layout: q and dq [B, Hq, Wq, N, D], o and do [B, Hq, Wq, N, E], kv [B, H, W, N, D + E], rel [B, Hq, Wq, N, 2, COLUMNS],
all contiguous; lse and delta [B, Hq, Wq, N]. `offs_m` counts queries of all heads, `offs_n` counts pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreting
from ..precision import acc_dtype
from ..triton_common import (
    LOG2_E_CONSTEXPR,
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
from .relative import relative_columns

POINTER_TYPES = {"lse_ptr": "fp32", "delta_ptr": "fp32"}


@triton.jit
def _locate_program(height, width, heads, SIZE: tl.constexpr, TILES: tl.constexpr):
    """Return (image, block row, block column, tile of the block, head)."""
    rows, cols = tl.cdiv(height, SIZE), tl.cdiv(width, SIZE)
    block, tile, head = split_program_id(heads, TILES)
    return (block // (rows * cols)).to(tl.int64), block // cols % rows, block % cols, tile, head


@triton.jit
def _query_0(image, head, height, width, heads, Q_STRIDE: tl.constexpr):
    """Offset of the first query of an image and head, counted in queries of all heads."""
    return image * (tl.cdiv(height, Q_STRIDE) * tl.cdiv(width, Q_STRIDE) * heads) + head


@triton.jit
def _query_tile(
    block_y, block_x, tile, height, width, heads, SIZE: tl.constexpr, Q_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Return row and column in the block, offset from the first query, and mask of a tile of a block's queries."""
    SIDE: tl.constexpr = SIZE // Q_STRIDE
    item = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i, j = item // SIDE, item % SIDE
    y, x = block_y * SIDE + i, block_x * SIDE + j
    mask_m = (item < SIDE * SIDE) & (y * Q_STRIDE < height) & (x * Q_STRIDE < width)
    return i, j, (y * tl.cdiv(width, Q_STRIDE) + x) * heads, mask_m


@triton.jit
def _pixel_offsets(y, x, mask, height, width):
    """Return the offset of each pixel in the map, and the mask of those that lie in it."""
    return y * width + x, mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _window_range(first, size, WINDOW: tl.constexpr, MASK_BORDER: tl.constexpr):
    """Rows (or columns) [low, high) of a window that take part in the softmax; `first` is the map's row of row 0."""
    low, high = 0, WINDOW
    if MASK_BORDER:
        low, high = tl.maximum(-first, 0), tl.minimum(size - first, WINDOW)
    return low, high


@triton.jit
def _reaching_blocks(first, last, size, SIZE: tl.constexpr, HALO: tl.constexpr):
    """Rows (or columns) [low, high) of blocks whose windows reach into the pixels first..last."""
    return tl.maximum(first - HALO, 0) // SIZE, tl.minimum((last + HALO) // SIZE + 1, tl.cdiv(size, SIZE))


@triton.jit
def _rel_ptrs(rel_ptr, offs_m, i, j, SIDE: tl.constexpr, COLUMNS: tl.constexpr, PAD_W: tl.constexpr):
    """Pointers to the logits of the window's rows (first PAD_W columns) and of its columns (the other PAD_W)."""
    t = tl.arange(0, 2 * PAD_W)[None, :]
    first = SIDE - 1 + tl.where(t < PAD_W, -i[:, None], COLUMNS - PAD_W - j[:, None])
    return rel_ptr + offs_m[:, None] * (2 * COLUMNS) + first + t


@triton.jit
def _rel_mask(mask_m, WINDOW: tl.constexpr, PAD_W: tl.constexpr):
    return mask_m[:, None] & (tl.arange(0, 2 * PAD_W) % PAD_W < WINDOW)[None, :]


@triton.jit
def _two_hot(row, col, t, PAD_W: tl.constexpr, dtype: tl.constexpr):
    """1 where t is `row` or PAD_W + `col`, else 0."""
    # through float32, because the interpreter casts only floats to bfloat16
    return (tl.where(t < PAD_W, row, PAD_W + col) == t).to(tl.float32).to(dtype)


@triton.jit
def _key_block(
    q, rel, kv_ptr, start, y_0, x_0, row_low, col_low, cols, keys, height, width, heads, scale,
    D: tl.constexpr, E: tl.constexpr, PAD_D: tl.constexpr, PAD_E: tl.constexpr, PAD_W: tl.constexpr,
    BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Load keys [start, start + BLOCK_N) of a window; return k, v, row and column in the window, base-2 logits of q.

    The window starts at pixel (y_0, x_0); its rows from row_low on and `cols` columns from col_low on take part.
    """
    offs = start + tl.arange(0, BLOCK_N)
    row, col = row_low + offs // cols, col_low + offs % cols
    offs_n, mask_n = _pixel_offsets(y_0 + row, x_0 + col, offs < keys, height, width)
    k = load_rows(kv_ptr, offs_n, mask_n, heads * (D + E), D, PAD_D)
    v = load_rows(kv_ptr + D, offs_n, mask_n, heads * (D + E), E, PAD_E)
    t = tl.arange(0, 2 * PAD_W)[:, None]
    s = dot(q, tl.trans(k), INTERPRET) * scale
    s += dot(rel, _two_hot(row[None, :], col[None, :], t, PAD_W, rel.dtype), INTERPRET)
    return k, v, row, col, tl.where((offs < keys)[None, :], s * LOG2_E_CONSTEXPR, -float("inf"))


@triton.jit(do_not_specialize=["height", "width"])
def _forward_kernel(
    q_ptr, kv_ptr, rel_ptr, o_ptr, lse_ptr, height, width, heads, scale,
    D: tl.constexpr, E: tl.constexpr, PAD_D: tl.constexpr, PAD_E: tl.constexpr,
    SIZE: tl.constexpr, HALO: tl.constexpr, Q_STRIDE: tl.constexpr, COLUMNS: tl.constexpr, PAD_W: tl.constexpr,
    MASK_BORDER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = acc_dtype_of(q_ptr.dtype.element_ty)
    SIDE: tl.constexpr = SIZE // Q_STRIDE
    WINDOW: tl.constexpr = SIZE + 2 * HALO
    image, block_y, block_x, tile, head = _locate_program(height, width, heads, SIZE, tl.cdiv(SIDE * SIDE, BLOCK_M))
    i, j, offs_m, mask_m = _query_tile(block_y, block_x, tile, height, width, heads, SIZE, Q_STRIDE, BLOCK_M)
    query_0 = _query_0(image, head, height, width, heads, Q_STRIDE)
    q = load_rows(q_ptr + query_0 * D, offs_m, mask_m, D, D, PAD_D)
    rel_ptrs = _rel_ptrs(rel_ptr + query_0 * (2 * COLUMNS), offs_m, i, j, SIDE, COLUMNS, PAD_W)
    rel = tl.load(rel_ptrs, mask=_rel_mask(mask_m, WINDOW, PAD_W), other=0.0)
    kv_ptr += (image * (height * width * heads) + head) * (D + E)
    y_0, x_0 = block_y * SIZE - HALO, block_x * SIZE - HALO
    row_low, row_high = _window_range(y_0, height, WINDOW, MASK_BORDER)
    col_low, col_high = _window_range(x_0, width, WINDOW, MASK_BORDER)
    keys, cols = (row_high - row_low) * (col_high - col_low), col_high - col_low
    m_i = tl.full([BLOCK_M], -float("inf"), ACC)
    l_i = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, PAD_E], ACC)
    for start in tl.range(0, keys, BLOCK_N):
        _, v, _, _, s = _key_block(
            q, rel, kv_ptr, start, y_0, x_0, row_low, col_low, cols, keys, height, width, heads, scale,
            D, E, PAD_D, PAD_E, PAD_W, BLOCK_N, INTERPRET,
        )  # fmt: skip
        m_i, l_i, acc = online_softmax_step(m_i, l_i, acc, s, v, INTERPRET)
    store_rows(o_ptr + query_0 * E, offs_m, mask_m, E, acc / l_i[:, None], E, PAD_E)
    tl.store(lse_ptr + query_0 + offs_m, m_i + tl.log2(l_i), mask=mask_m)


@triton.jit(do_not_specialize=["height", "width"])
def _query_backward_kernel(
    q_ptr, kv_ptr, rel_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, drel_ptr, height, width, heads, scale,
    D: tl.constexpr, E: tl.constexpr, PAD_D: tl.constexpr, PAD_E: tl.constexpr,
    SIZE: tl.constexpr, HALO: tl.constexpr, Q_STRIDE: tl.constexpr, COLUMNS: tl.constexpr, PAD_W: tl.constexpr,
    MASK_BORDER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradients of q and rel, and delta = sum(o * do) for the kernel of k and v."""
    ACC: tl.constexpr = acc_dtype_of(q_ptr.dtype.element_ty)
    SIDE: tl.constexpr = SIZE // Q_STRIDE
    WINDOW: tl.constexpr = SIZE + 2 * HALO
    image, block_y, block_x, tile, head = _locate_program(height, width, heads, SIZE, tl.cdiv(SIDE * SIDE, BLOCK_M))
    i, j, offs_m, mask_m = _query_tile(block_y, block_x, tile, height, width, heads, SIZE, Q_STRIDE, BLOCK_M)
    query_0 = _query_0(image, head, height, width, heads, Q_STRIDE)
    q = load_rows(q_ptr + query_0 * D, offs_m, mask_m, D, D, PAD_D)
    rel_ptrs = _rel_ptrs(rel_ptr + query_0 * (2 * COLUMNS), offs_m, i, j, SIDE, COLUMNS, PAD_W)
    rel = tl.load(rel_ptrs, mask=_rel_mask(mask_m, WINDOW, PAD_W), other=0.0)
    o = load_rows(o_ptr + query_0 * E, offs_m, mask_m, E, E, PAD_E)
    do = load_rows(do_ptr + query_0 * E, offs_m, mask_m, E, E, PAD_E)
    lse = tl.load(lse_ptr + query_0 + offs_m, mask=mask_m, other=float("inf"))
    delta = tl.sum(o.to(ACC) * do.to(ACC), 1)
    tl.store(delta_ptr + query_0 + offs_m, delta, mask=mask_m)
    kv_ptr += (image * (height * width * heads) + head) * (D + E)
    y_0, x_0 = block_y * SIZE - HALO, block_x * SIZE - HALO
    row_low, row_high = _window_range(y_0, height, WINDOW, MASK_BORDER)
    col_low, col_high = _window_range(x_0, width, WINDOW, MASK_BORDER)
    keys, cols = (row_high - row_low) * (col_high - col_low), col_high - col_low
    t = tl.arange(0, 2 * PAD_W)[None, :]
    dq = tl.zeros([BLOCK_M, PAD_D], ACC)
    drel = tl.zeros([BLOCK_M, 2 * PAD_W], ACC)
    for start in tl.range(0, keys, BLOCK_N):
        k, v, row, col, s = _key_block(
            q, rel, kv_ptr, start, y_0, x_0, row_low, col_low, cols, keys, height, width, heads, scale,
            D, E, PAD_D, PAD_E, PAD_W, BLOCK_N, INTERPRET,
        )  # fmt: skip
        ds = tl.exp2(s - lse[:, None]) * (dot(do, tl.trans(v), INTERPRET) - delta[:, None])
        ds = ds.to(k.dtype)
        dq += dot(ds, k, INTERPRET)
        drel += dot(ds, _two_hot(row[:, None], col[:, None], t, PAD_W, ds.dtype), INTERPRET)
    store_rows(dq_ptr + query_0 * D, offs_m, mask_m, D, dq * scale, D, PAD_D)
    drel_ptr += query_0 * (2 * COLUMNS)
    drel_ptrs = _rel_ptrs(drel_ptr, offs_m, i, j, SIDE, COLUMNS, PAD_W)
    tl.store(drel_ptrs, drel.to(drel_ptr.dtype.element_ty), mask=_rel_mask(mask_m, WINDOW, PAD_W))
    # the remaining columns belong to table rows that these queries cannot reach: zero gradient
    PAD_C: tl.constexpr = 2 * PAD_W  # COLUMNS is less than 2 * WINDOW before it is rounded up to a multiple of 4
    c = tl.arange(0, 2 * PAD_C)
    place = c % PAD_C - (SIDE - 1) + tl.where(c[None, :] < PAD_C, i[:, None], j[:, None])
    unreachable = mask_m[:, None] & (c % PAD_C < COLUMNS)[None, :] & ((place < 0) | (place >= WINDOW))
    zero_ptrs = drel_ptr + offs_m[:, None] * (2 * COLUMNS) + (c % PAD_C + c // PAD_C * COLUMNS)[None, :]
    tl.store(zero_ptrs, tl.zeros([BLOCK_M, 2 * PAD_C], drel_ptr.dtype.element_ty), mask=unreachable)


@triton.jit(do_not_specialize=["height", "width"])
def _key_backward_kernel(
    q_ptr, kv_ptr, rel_ptr, do_ptr, lse_ptr, delta_ptr, dkv_ptr, height, width, heads, scale,
    D: tl.constexpr, E: tl.constexpr, PAD_D: tl.constexpr, PAD_E: tl.constexpr,
    SIZE: tl.constexpr, HALO: tl.constexpr, Q_STRIDE: tl.constexpr, COLUMNS: tl.constexpr, PAD_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v: a program owns BLOCK_N keys and loops over the blocks whose windows reach them."""
    ACC: tl.constexpr = acc_dtype_of(q_ptr.dtype.element_ty)
    SIDE: tl.constexpr = SIZE // Q_STRIDE
    WINDOW: tl.constexpr = SIZE + 2 * HALO
    QUERY_TILES: tl.constexpr = (SIDE * SIDE + BLOCK_M - 1) // BLOCK_M
    image, block_y, block_x, tile, head = _locate_program(height, width, heads, SIZE, tl.cdiv(SIZE * SIZE, BLOCK_N))
    item = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    y, x = block_y * SIZE + item // SIZE, block_x * SIZE + item % SIZE
    offs_n, mask_n = _pixel_offsets(y, x, item < SIZE * SIZE, height, width)
    key_0 = (image * (height * width * heads) + head) * (D + E)
    k = load_rows(kv_ptr + key_0, offs_n, mask_n, heads * (D + E), D, PAD_D)
    v = load_rows(kv_ptr + key_0 + D, offs_n, mask_n, heads * (D + E), E, PAD_E)
    query_0 = _query_0(image, head, height, width, heads, Q_STRIDE)
    q_ptr += query_0 * D
    do_ptr += query_0 * E
    rel_ptr += query_0 * (2 * COLUMNS)
    t = tl.arange(0, 2 * PAD_W)[None, :]
    dk = tl.zeros([BLOCK_N, PAD_D], ACC)
    dv = tl.zeros([BLOCK_N, PAD_E], ACC)
    first_row = block_y * SIZE + tile * BLOCK_N // SIZE
    last_row = block_y * SIZE + tl.minimum(tile * BLOCK_N + BLOCK_N - 1, SIZE * SIZE - 1) // SIZE
    row_low, row_high = _reaching_blocks(first_row, last_row, height, SIZE, HALO)
    col_low, col_high = _reaching_blocks(block_x * SIZE, block_x * SIZE + SIZE - 1, width, SIZE, HALO)
    for step in tl.range(0, (row_high - row_low) * (col_high - col_low) * QUERY_TILES):
        block = step // QUERY_TILES
        q_block_y, q_block_x = row_low + block // (col_high - col_low), col_low + block % (col_high - col_low)
        i, j, offs_m, mask_m = _query_tile(
            q_block_y, q_block_x, step % QUERY_TILES, height, width, heads, SIZE, Q_STRIDE, BLOCK_M
        )
        q = load_rows(q_ptr, offs_m, mask_m, D, D, PAD_D)
        do = load_rows(do_ptr, offs_m, mask_m, E, E, PAD_E)
        rel_ptrs = _rel_ptrs(rel_ptr, offs_m, i, j, SIDE, COLUMNS, PAD_W)
        rel = tl.load(rel_ptrs, mask=_rel_mask(mask_m, WINDOW, PAD_W), other=0.0)
        lse = tl.load(lse_ptr + query_0 + offs_m, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + query_0 + offs_m, mask=mask_m, other=0.0)
        row, col = y - q_block_y * SIZE + HALO, x - q_block_x * SIZE + HALO
        in_window = (row >= 0) & (row < WINDOW) & (col >= 0) & (col < WINDOW)
        s = dot(k, tl.trans(q), INTERPRET) * scale
        s += dot(_two_hot(row[:, None], col[:, None], t, PAD_W, rel.dtype), tl.trans(rel), INTERPRET)
        p = tl.exp2(tl.where(in_window[:, None], s * LOG2_E_CONSTEXPR, -float("inf")) - lse[None, :])
        dk, dv = dkdv_step(dk, dv, p, q, v, do, delta, INTERPRET)
    dkv_ptr += key_0
    store_rows(dkv_ptr, offs_n, mask_n, heads * (D + E), dk * scale, D, PAD_D)
    store_rows(dkv_ptr + D, offs_n, mask_n, heads * (D + E), dv, E, PAD_E)


def _kernel_specs(
    head_dim: int, value_dim: int, block_size: int, halo_size: int, stride: int, mask_border: bool
) -> dict[str, KernelSpec]:
    """Return the kernels for these sizes, for maps of any size."""
    window, side = block_size + 2 * halo_size, block_size // stride
    constants = {
        "D": head_dim, "E": value_dim, "PAD_D": padded_dim(head_dim), "PAD_E": padded_dim(value_dim),
        "SIZE": block_size, "HALO": halo_size, "Q_STRIDE": stride,
        "COLUMNS": relative_columns(window, side), "PAD_W": padded_dim(window), "INTERPRET": interpreting(),
    }  # fmt: skip
    # Short tiles on the side that is looped over waste little of a window and leave registers for more programs
    query = {"BLOCK_M": min(64, padded_dim(side**2)), "BLOCK_N": 32, "MASK_BORDER": mask_border, **constants}
    key = {"BLOCK_M": min(32, padded_dim(side**2)), "BLOCK_N": min(64, padded_dim(block_size**2)), **constants}
    query_warps, key_warps = (4 if own == 64 else 2 for own in (query["BLOCK_M"], key["BLOCK_N"]))
    return {
        "forward": KernelSpec(_forward_kernel, query, query_warps),
        "backward of q": KernelSpec(_query_backward_kernel, query, query_warps),
        "backward of k, v": KernelSpec(_key_backward_kernel, key, key_warps, num_stages=2),
    }


def _launch(spec: KernelSpec, tiles: int, *tensors: Tensor) -> None:
    """Launch a kernel that splits every block into `tiles` tiles. The first two tensors must be q and kv."""
    q, kv = tensors[:2]
    batch, height, width, heads, _ = kv.shape
    block_size = spec.constants["SIZE"]
    blocks = triton.cdiv(height, block_size) * triton.cdiv(width, block_size)
    with torch.cuda.device_of(q):
        spec.kernel[(batch * blocks * tiles * heads,)](
            *tensors, height, width, heads, q.shape[-1] ** -0.5,
            **spec.constants, num_warps=spec.num_warps, num_stages=spec.num_stages,
        )  # fmt: skip


def forward(
    q: Tensor, kv: Tensor, rel: Tensor, block_size: int, halo_size: int, stride: int, mask_border: bool
) -> tuple[Tensor, Tensor]:
    """Return out `[B, Hq, Wq, N, E]` and lse `[B, Hq, Wq, N]`. The inputs must be contiguous."""
    head_dim, value_dim = q.shape[-1], kv.shape[-1] - q.shape[-1]
    out = q.new_empty(*q.shape[:4], value_dim)
    lse = q.new_empty(q.shape[:4], dtype=acc_dtype(q))
    spec = _kernel_specs(head_dim, value_dim, block_size, halo_size, stride, mask_border)["forward"]
    _launch(spec, triton.cdiv((block_size // stride) ** 2, spec.constants["BLOCK_M"]), q, kv, rel, out, lse)
    return out, lse


def backward(
    q: Tensor, kv: Tensor, rel: Tensor, out: Tensor, lse: Tensor, do: Tensor,
    block_size: int, halo_size: int, stride: int, mask_border: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, kv and rel from the contiguous inputs of `forward`, its outputs and do."""
    head_dim, value_dim = q.shape[-1], kv.shape[-1] - q.shape[-1]
    dq, dkv, drel, delta = (torch.empty_like(x) for x in (q, kv, rel, lse))
    specs = _kernel_specs(head_dim, value_dim, block_size, halo_size, stride, mask_border)
    spec = specs["backward of q"]  # writes delta, which the kernel of k and v reads
    tiles = triton.cdiv((block_size // stride) ** 2, spec.constants["BLOCK_M"])
    _launch(spec, tiles, q, kv, rel, out, do, lse, delta, dq, drel)
    spec = specs["backward of k, v"]
    _launch(spec, triton.cdiv(block_size**2, spec.constants["BLOCK_N"]), q, kv, rel, do, lse, delta, dkv)
    return dq, dkv, drel


def aot_specs(case: tuple) -> dict[str, KernelSpec]:
    """Return the kernels of a forward and backward of one of `halo.CASES`, for ahead-of-time compilation."""
    _, _, _, head_dim, value_dim, block_size, halo_size, stride = case
    return _kernel_specs(head_dim, value_dim, block_size, halo_size, stride, mask_border=False)
