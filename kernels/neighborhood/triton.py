"""Triton kernels of neighborhood attention: forward, and three kernels for the backward.

Dilation divides the map into classes of pixels, see geometry.py; an axis of a class has n positions. In the forward and
the backward of q, one program owns one head of a tile of TILE x TILE queries of a class, and loops over the keys that
one of them sees. In the backward of k and v it owns a tile of keys, and loops over the queries that see one of them. In
the backward of the table it owns one row of the table and a run of queries, and visits each query's keys in this row;
the sums of the runs are added in PyTorch. All gradients are sums in a fixed order, without atomics.

The bias of a pair is loaded from the table [N, 2K - 1, 2K - 1] by the offset of the key from the query. A query sees a
key if the key lies in the K x K positions from the query's first key on.

Layout: qkv and dqkv [B, H, W, 3, N, D], o and do [B, H, W, N, D], lse and delta [B, H, W, N], all contiguous. `offs_m`
and `offs_n` count pixels of an image.
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

POINTER_TYPES = {"table_ptr": "fp32", "lse_ptr": "fp32", "delta_ptr": "fp32", "dtable_ptr": "fp32"}

TILE = 8  # side of a tile
RUN = 2048  # queries of a program in the backward of the table


@triton.jit
def _locate_program(height, width, heads, dilation, TILE: tl.constexpr):
    """Return (image, class, first position and number of positions of rows, the same of columns, head)."""
    tiles_y = tl.cdiv(tl.cdiv(height, dilation), TILE)
    tiles_x = tl.cdiv(tl.cdiv(width, dilation), TILE)
    block, _, head = split_program_id(heads, 1)
    tile_x = block % (dilation * tiles_x)
    tile_y = block // (dilation * tiles_x) % (dilation * tiles_y)
    image = (block // (dilation * tiles_x) // (dilation * tiles_y)).to(tl.int64)
    c_y, c_x = tile_y // tiles_y, tile_x // tiles_x
    n_y, n_x = (height - c_y + dilation - 1) // dilation, (width - c_x + dilation - 1) // dilation
    return image, c_y, c_x, tile_y % tiles_y * TILE, n_y, tile_x % tiles_x * TILE, n_x, head


@triton.jit
def _first_key(position, n, KERNEL: tl.constexpr):
    """The first key of the query at `position` of a class of n positions."""
    return tl.minimum(tl.maximum(position - KERNEL // 2, 0), n - KERNEL)


@triton.jit
def _keys_of_tile(first, n, TILE: tl.constexpr, KERNEL: tl.constexpr):
    """Positions [low, high) of the keys that the queries from `first` on see."""
    last = tl.minimum(first + TILE, n) - 1
    return _first_key(first, n, KERNEL), _first_key(last, n, KERNEL) + KERNEL


@triton.jit
def _queries_of_tile(first, n, TILE: tl.constexpr, KERNEL: tl.constexpr):
    """Positions [low, high) of the queries that see the keys from `first` on."""
    last = tl.minimum(first + TILE, n) - 1
    low = tl.where(first < KERNEL, 0, first - KERNEL // 2)
    high = tl.where(last >= n - KERNEL, n, last + KERNEL // 2 + 1)
    return low, high


@triton.jit
def _pixels(y, x, c_y, c_x, width, dilation):
    """Pixels of the image at positions (y, x) of a class."""
    return (y * dilation + c_y) * width + x * dilation + c_x


@triton.jit
def _logits(products, table_ptr, y, x, key_y, key_x, mask, n_y, n_x, scale, KERNEL: tl.constexpr):
    """Base-2 logits of the queries at (y, x) for the keys at (key_y, key_x), -inf where they do not see them."""
    row, col = key_y - _first_key(y, n_y, KERNEL), key_x - _first_key(x, n_x, KERNEL)
    seen = mask & (row >= 0) & (row < KERNEL) & (col >= 0) & (col < KERNEL)
    entry = (key_y - y + KERNEL - 1) * (2 * KERNEL - 1) + key_x - x + KERNEL - 1
    bias = tl.load(table_ptr + entry, mask=seen, other=0.0)
    return tl.where(seen, (products * scale + bias) * LOG2_E_CONSTEXPR, -float("inf"))


@triton.jit(do_not_specialize=["height", "width", "dilation"])
def _forward_kernel(
    qkv_ptr, table_ptr, o_ptr, lse_ptr, height, width, heads, dilation, scale,
    D: tl.constexpr, PAD_D: tl.constexpr, KERNEL: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    BLOCK_M: tl.constexpr = TILE * TILE
    image, c_y, c_x, y_0, n_y, x_0, n_x, head = _locate_program(height, width, heads, dilation, TILE)
    item = tl.arange(0, BLOCK_M)
    y, x = y_0 + item // TILE, x_0 + item % TILE
    offs_m, mask_m = _pixels(y, x, c_y, c_x, width, dilation), (y < n_y) & (x < n_x)
    pixel_0 = image * (height * width)
    qkv_ptr += (pixel_0 * (3 * heads) + head) * D
    table_ptr += head * ((2 * KERNEL - 1) * (2 * KERNEL - 1))
    q = load_rows(qkv_ptr, offs_m, mask_m, 3 * heads * D, D, PAD_D)
    row_low, row_high = _keys_of_tile(y_0, n_y, TILE, KERNEL)
    col_low, col_high = _keys_of_tile(x_0, n_x, TILE, KERNEL)
    keys, cols = (row_high - row_low) * (col_high - col_low), col_high - col_low
    # finite, because the first keys of the loop may be seen by only some of the queries
    m_i = tl.full([BLOCK_M], -1e30, ACC)
    l_i = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, PAD_D], ACC)
    for start in tl.range(0, keys, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        key_y, key_x = row_low + offs // cols, col_low + offs % cols
        offs_n, mask_n = _pixels(key_y, key_x, c_y, c_x, width, dilation), offs < keys
        k = load_rows(qkv_ptr + heads * D, offs_n, mask_n, 3 * heads * D, D, PAD_D)
        v = load_rows(qkv_ptr + 2 * heads * D, offs_n, mask_n, 3 * heads * D, D, PAD_D)
        s = _logits(
            dot(q, tl.trans(k), INTERPRET), table_ptr, y[:, None], x[:, None], key_y[None, :], key_x[None, :],
            mask_m[:, None] & mask_n[None, :], n_y, n_x, scale, KERNEL,
        )  # fmt: skip
        m_i, l_i, acc = online_softmax_step(m_i, l_i, acc, s, v, INTERPRET)
    l_i = tl.where(mask_m, l_i, 1.0)
    store_rows(o_ptr + (pixel_0 * heads + head) * D, offs_m, mask_m, heads * D, acc / l_i[:, None], D, PAD_D)
    tl.store(lse_ptr + pixel_0 * heads + head + offs_m * heads, m_i + tl.log2(l_i), mask=mask_m)


@triton.jit(do_not_specialize=["height", "width", "dilation"])
def _query_backward_kernel(
    qkv_ptr, table_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr, height, width, heads, dilation, scale,
    D: tl.constexpr, PAD_D: tl.constexpr, KERNEL: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradient of q, and delta = sum(o * do) for the kernels of k, v and of the table."""
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    BLOCK_M: tl.constexpr = TILE * TILE
    image, c_y, c_x, y_0, n_y, x_0, n_x, head = _locate_program(height, width, heads, dilation, TILE)
    item = tl.arange(0, BLOCK_M)
    y, x = y_0 + item // TILE, x_0 + item % TILE
    offs_m, mask_m = _pixels(y, x, c_y, c_x, width, dilation), (y < n_y) & (x < n_x)
    pixel_0 = image * (height * width)
    qkv_0 = (pixel_0 * (3 * heads) + head) * D
    qkv_ptr += qkv_0
    table_ptr += head * ((2 * KERNEL - 1) * (2 * KERNEL - 1))
    query_0 = pixel_0 * heads + head
    q = load_rows(qkv_ptr, offs_m, mask_m, 3 * heads * D, D, PAD_D)
    o = load_rows(o_ptr + query_0 * D, offs_m, mask_m, heads * D, D, PAD_D)
    do = load_rows(do_ptr + query_0 * D, offs_m, mask_m, heads * D, D, PAD_D)
    lse = tl.load(lse_ptr + query_0 + offs_m * heads, mask=mask_m, other=float("inf"))
    delta = tl.sum(o.to(ACC) * do.to(ACC), 1)
    tl.store(delta_ptr + query_0 + offs_m * heads, delta, mask=mask_m)
    row_low, row_high = _keys_of_tile(y_0, n_y, TILE, KERNEL)
    col_low, col_high = _keys_of_tile(x_0, n_x, TILE, KERNEL)
    keys, cols = (row_high - row_low) * (col_high - col_low), col_high - col_low
    dq = tl.zeros([BLOCK_M, PAD_D], ACC)
    for start in tl.range(0, keys, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        key_y, key_x = row_low + offs // cols, col_low + offs % cols
        offs_n, mask_n = _pixels(key_y, key_x, c_y, c_x, width, dilation), offs < keys
        k = load_rows(qkv_ptr + heads * D, offs_n, mask_n, 3 * heads * D, D, PAD_D)
        v = load_rows(qkv_ptr + 2 * heads * D, offs_n, mask_n, 3 * heads * D, D, PAD_D)
        s = _logits(
            dot(q, tl.trans(k), INTERPRET), table_ptr, y[:, None], x[:, None], key_y[None, :], key_x[None, :],
            mask_m[:, None] & mask_n[None, :], n_y, n_x, scale, KERNEL,
        )  # fmt: skip
        ds = tl.exp2(s - lse[:, None]) * (dot(do, tl.trans(v), INTERPRET) - delta[:, None])
        dq += dot(ds.to(k.dtype), k, INTERPRET)
    store_rows(dqkv_ptr + qkv_0, offs_m, mask_m, 3 * heads * D, dq * scale, D, PAD_D)


@triton.jit(do_not_specialize=["height", "width", "dilation"])
def _key_backward_kernel(
    qkv_ptr, table_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr, height, width, heads, dilation, scale,
    D: tl.constexpr, PAD_D: tl.constexpr, KERNEL: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v."""
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    BLOCK_N: tl.constexpr = TILE * TILE
    image, c_y, c_x, y_0, n_y, x_0, n_x, head = _locate_program(height, width, heads, dilation, TILE)
    item = tl.arange(0, BLOCK_N)
    key_y, key_x = y_0 + item // TILE, x_0 + item % TILE
    offs_n, mask_n = _pixels(key_y, key_x, c_y, c_x, width, dilation), (key_y < n_y) & (key_x < n_x)
    pixel_0 = image * (height * width)
    qkv_0 = (pixel_0 * (3 * heads) + head) * D
    qkv_ptr += qkv_0
    table_ptr += head * ((2 * KERNEL - 1) * (2 * KERNEL - 1))
    query_0 = pixel_0 * heads + head
    k = load_rows(qkv_ptr + heads * D, offs_n, mask_n, 3 * heads * D, D, PAD_D)
    v = load_rows(qkv_ptr + 2 * heads * D, offs_n, mask_n, 3 * heads * D, D, PAD_D)
    row_low, row_high = _queries_of_tile(y_0, n_y, TILE, KERNEL)
    col_low, col_high = _queries_of_tile(x_0, n_x, TILE, KERNEL)
    queries, cols = (row_high - row_low) * (col_high - col_low), col_high - col_low
    dk = tl.zeros([BLOCK_N, PAD_D], ACC)
    dv = tl.zeros([BLOCK_N, PAD_D], ACC)
    for start in tl.range(0, queries, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        y, x = row_low + offs // cols, col_low + offs % cols
        offs_m, mask_m = _pixels(y, x, c_y, c_x, width, dilation), offs < queries
        q = load_rows(qkv_ptr, offs_m, mask_m, 3 * heads * D, D, PAD_D)
        do = load_rows(do_ptr + query_0 * D, offs_m, mask_m, heads * D, D, PAD_D)
        lse = tl.load(lse_ptr + query_0 + offs_m * heads, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + query_0 + offs_m * heads, mask=mask_m, other=0.0)
        s = _logits(
            dot(k, tl.trans(q), INTERPRET), table_ptr, y[None, :], x[None, :], key_y[:, None], key_x[:, None],
            mask_n[:, None] & mask_m[None, :], n_y, n_x, scale, KERNEL,
        )  # fmt: skip
        dk, dv = dkdv_step(dk, dv, tl.exp2(s - lse[None, :]), q, v, do, delta, INTERPRET)
    dqkv_ptr += qkv_0
    store_rows(dqkv_ptr + heads * D, offs_n, mask_n, 3 * heads * D, dk * scale, D, PAD_D)
    store_rows(dqkv_ptr + 2 * heads * D, offs_n, mask_n, 3 * heads * D, dv, D, PAD_D)


@triton.jit(do_not_specialize=["height", "width", "dilation", "queries"])
def _table_backward_kernel(
    qkv_ptr, table_ptr, do_ptr, lse_ptr, delta_ptr, dtable_ptr, height, width, heads, dilation, scale, queries,
    D: tl.constexpr, PAD_D: tl.constexpr, KERNEL: tl.constexpr, PAD_T: tl.constexpr, RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What a run of `RUN` of all `queries` (of one head) adds to the gradient of one row of the table."""
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    SIDE: tl.constexpr = 2 * KERNEL - 1
    run, dy, head = split_program_id(heads, SIDE)
    qkv_ptr += head * D
    do_ptr += head * D
    t = tl.arange(0, PAD_T)
    sums = tl.zeros([PAD_T], ACC)
    first = run.to(tl.int64) * RUN
    for start in tl.range(0, tl.minimum(queries - first, RUN).to(tl.int32), BLOCK):
        offs_m = first + start + tl.arange(0, BLOCK)
        mask_m = offs_m < queries
        row, col = offs_m // width % height, offs_m % width
        y, x = row // dilation, col // dilation
        n_y = (height - row % dilation + dilation - 1) // dilation
        n_x = (width - col % dilation + dilation - 1) // dilation
        q = load_rows(qkv_ptr, offs_m, mask_m, 3 * heads * D, D, PAD_D).to(ACC)
        do = load_rows(do_ptr, offs_m, mask_m, heads * D, D, PAD_D).to(ACC)
        lse = tl.load(lse_ptr + offs_m * heads + head, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + offs_m * heads + head, mask=mask_m, other=0.0)
        key_y = y + dy - (KERNEL - 1)
        place_y = key_y - _first_key(y, n_y, KERNEL)
        mask_row = mask_m & (place_y >= 0) & (place_y < KERNEL)
        for dx in tl.range(0, SIDE):
            key_x = x + dx - (KERNEL - 1)
            place_x = key_x - _first_key(x, n_x, KERNEL)
            seen = mask_row & (place_x >= 0) & (place_x < KERNEL)
            offs_n = offs_m + ((dy - (KERNEL - 1)) * width + dx - (KERNEL - 1)) * dilation
            k = load_rows(qkv_ptr + heads * D, offs_n, seen, 3 * heads * D, D, PAD_D)
            v = load_rows(qkv_ptr + 2 * heads * D, offs_n, seen, 3 * heads * D, D, PAD_D)
            bias = tl.load(table_ptr + (head * SIDE + dy) * SIDE + dx)
            s = (tl.sum(q * k.to(ACC), 1) * scale + bias) * LOG2_E_CONSTEXPR
            p = tl.exp2(tl.where(seen, s, -float("inf")) - lse)
            sums += tl.where(t == dx, tl.sum(p * (tl.sum(do * v.to(ACC), 1) - delta)), 0.0)
    tl.store(dtable_ptr + ((run * heads + head) * SIDE + dy) * SIDE + t, sums, mask=t < SIDE)


def _kernel_specs(head_dim: int, kernel: int) -> dict[str, KernelSpec]:
    """Return the kernels for these sizes, for maps and dilations of any size."""
    sizes = {"D": head_dim, "PAD_D": padded_dim(head_dim), "KERNEL": kernel}
    tiles = {**sizes, "TILE": TILE, "BLOCK": 32, "INTERPRET": interpreting()}
    runs = {**sizes, "PAD_T": triton.next_power_of_2(2 * kernel - 1), "RUN": RUN, "BLOCK": 64}
    return {
        "forward": KernelSpec(_forward_kernel, tiles, num_warps=4),
        "backward of q": KernelSpec(_query_backward_kernel, tiles, num_warps=4),
        "backward of k, v": KernelSpec(_key_backward_kernel, tiles, num_warps=4, num_stages=2),
        "backward of the table": KernelSpec(_table_backward_kernel, runs, num_warps=4),
    }


def _launch(spec: KernelSpec, programs: int, dilation: int, *tensors: Tensor, extra: tuple[int, ...] = ()) -> None:
    """Launch `programs` programs for each head. The first tensor must be qkv."""
    height, width, _, heads, head_dim = tensors[0].shape[1:]
    with torch.cuda.device_of(tensors[0]):
        spec.kernel[(programs * heads,)](
            *tensors, height, width, heads, dilation, head_dim**-0.5, *extra,
            **spec.constants, num_warps=spec.num_warps, num_stages=spec.num_stages,
        )  # fmt: skip


def _tiles(qkv: Tensor, dilation: int) -> int:
    """Number of tiles of one head, in all images."""
    rows, columns = (dilation * triton.cdiv(triton.cdiv(size, dilation), TILE) for size in qkv.shape[1:3])
    return qkv.shape[0] * rows * columns


def forward(qkv: Tensor, table: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, W, N, D]` and lse `[B, H, W, N]`. The inputs must be contiguous."""
    batch, height, width, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, height, width, heads, head_dim)
    lse = qkv.new_empty(out.shape[:4], dtype=acc_dtype(qkv))
    spec = _kernel_specs(head_dim, (table.shape[-1] + 1) // 2)["forward"]
    _launch(spec, _tiles(qkv, dilation), dilation, qkv, table, out, lse)
    return out, lse


def backward(qkv: Tensor, table: Tensor, out: Tensor, lse: Tensor, do: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of qkv and table from the contiguous inputs of `forward`, its outputs and do."""
    dqkv, delta, tiles = torch.empty_like(qkv), torch.empty_like(lse), _tiles(qkv, dilation)
    specs = _kernel_specs(qkv.shape[-1], (table.shape[-1] + 1) // 2)
    # writes delta, which the other kernels read
    _launch(specs["backward of q"], tiles, dilation, qkv, table, out, do, lse, delta, dqkv)
    _launch(specs["backward of k, v"], tiles, dilation, qkv, table, do, lse, delta, dqkv)
    queries = qkv.shape[:3].numel()
    runs = triton.cdiv(queries, RUN)
    dtable = table.new_empty(runs, *table.shape)
    _launch(
        specs["backward of the table"], runs * table.shape[-1], dilation, qkv, table, do, lse, delta, dtable,
        extra=(queries,),
    )  # fmt: skip
    return dqkv, dtable.sum(0)


def aot_specs(case: tuple) -> dict[str, KernelSpec]:
    """Return the kernels of a forward and backward of one of `neighborhood.CASES`, for ahead-of-time compilation."""
    _, _, _, head_dim, kernel, _ = case
    return _kernel_specs(head_dim, kernel)
