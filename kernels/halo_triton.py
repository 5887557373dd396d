"""Triton kernels of `halo`: forward, and the two halves of the backward.

One program owns one head of one tile of a block: of its queries (forward, backward of q), which meet the keys of the
block's window tile by tile, or of its keys (backward of k, v), which meet the queries of every block whose window
reaches into theirs. Both gradients are sums in a fixed order, so that no atomic is needed.

Relative logits come as `rel`, the product of each query with every row of the two tables that its block can reach. A
tile of queries loads those of its window's rows and of its window's columns side by side, PAD_W each. The sum of two of
them for one key is a product with a column that has two ones: exact, and no gather. Where the ones stand depends on the
key and on the block that asks, hence no tile mixes blocks.

Layout: q, out, grad [B, Hq, Wq, N, D or E], kv [B, H, W, N, D + E], rel [B, Hq, Wq, N, 2, COLUMNS], all contiguous;
statistics [B, Hq, Wq, N] in base 2. `q_at` counts queries of all heads, `k_at` pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import interpreting
from ._precision import at_least_float32
from ._triton import LOG2_E, Launch, dot
from .halo import relative_columns

POINTERS = {"lse_ptr": "fp32", "delta_ptr": "fp32"}

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _split_program(height, width, heads, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Program id -> (image, block row, block column, tile, head), head fastest: neighbours share a pixel's lines."""
    pid = tl.program_id(0)
    rows, cols = tl.cdiv(height, BLOCK), tl.cdiv(width, BLOCK)
    rest = pid // heads
    block = rest // TILES
    return (block // (rows * cols)).to(tl.int64), block // cols % rows, block % cols, rest % TILES, pid % heads


@triton.jit
def _first_query(image, head, height, width, heads, STRIDE: tl.constexpr):
    """Index of the first query of a head and image in everything that has a row for each."""
    return image * (tl.cdiv(height, STRIDE) * tl.cdiv(width, STRIDE) * heads) + head


@triton.jit
def _queries(
    block_y, block_x, tile, height, width, heads, BLOCK: tl.constexpr, STRIDE: tl.constexpr, TILE_Q: tl.constexpr
):
    """A tile of a block's queries: row and column in the block, index from the first, which of them exist."""
    SIDE: tl.constexpr = BLOCK // STRIDE
    item = tile * TILE_Q + tl.arange(0, TILE_Q)
    i, j = item // SIDE, item % SIDE
    y, x = block_y * SIDE + i, block_x * SIDE + j
    ok = (item < SIDE * SIDE) & (y * STRIDE < height) & (x * STRIDE < width)
    return i, j, (y * tl.cdiv(width, STRIDE) + x) * heads, ok


@triton.jit
def _pixels(y, x, ok, height, width):
    """Index of each pixel of the map, and whether it is one."""
    return y * width + x, ok & (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _part(first, size, WINDOW: tl.constexpr, MASK_BORDER: tl.constexpr):
    """The rows (or columns) [low, high) of a window that take part: all of them, or those inside the map."""
    low, high = 0, WINDOW
    if MASK_BORDER:
        low, high = tl.maximum(-first, 0), tl.minimum(size - first, WINDOW)
    return low, high


@triton.jit
def _asking(first, last, size, BLOCK: tl.constexpr, HALO: tl.constexpr):
    """The rows (or columns) [low, high) of blocks in the map whose windows reach the pixels first..last."""
    return tl.maximum(first - HALO, 0) // BLOCK, tl.minimum((last + HALO) // BLOCK + 1, tl.cdiv(size, BLOCK))


@triton.jit
def _row_mask(ok, WIDTH: tl.constexpr, PAD: tl.constexpr):
    return ok[:, None] & (tl.arange(0, PAD) < WIDTH)[None, :]


@triton.jit
def _row_at(base, at, stride, PAD: tl.constexpr):
    return base + at[:, None] * stride + tl.arange(0, PAD)[None, :]


@triton.jit
def _rel_at(base, at, i, j, SIDE: tl.constexpr, COLUMNS: tl.constexpr, PAD_W: tl.constexpr):
    """Where a tile's logits of its window's rows (first PAD_W columns) and columns (the others) stand in `rel`."""
    t = tl.arange(0, 2 * PAD_W)[None, :]
    first = SIDE - 1 + tl.where(t < PAD_W, -i[:, None], COLUMNS - PAD_W - j[:, None])
    return base + at[:, None] * (2 * COLUMNS) + first + t


@triton.jit
def _rel_mask(ok, WINDOW: tl.constexpr, PAD_W: tl.constexpr):
    return ok[:, None] & (tl.arange(0, 2 * PAD_W) % PAD_W < WINDOW)[None, :]


@triton.jit
def _two_ones(row, col, t, PAD_W: tl.constexpr, dtype: tl.constexpr):
    """1 where t is `row` or PAD_W + `col`, else 0."""
    # the interpreter casts only floats to bfloat16
    return (tl.where(t < PAD_W, row, PAD_W + col) == t).to(tl.float32).to(dtype)


@triton.jit(do_not_specialize=["height", "width"])
def _forward_kernel(
    q_ptr, kv_ptr, rel_ptr, out_ptr, lse_ptr, height, width, heads, scale,
    D: tl.constexpr, E: tl.constexpr, PAD_D: tl.constexpr, PAD_E: tl.constexpr,
    BLOCK: tl.constexpr, HALO: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, PAD_W: tl.constexpr,
    MASK_BORDER: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    SIDE: tl.constexpr = BLOCK // STRIDE
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    image, block_y, block_x, tile, head = _split_program(height, width, heads, BLOCK, tl.cdiv(SIDE * SIDE, TILE_Q))
    i, j, q_at, q_ok = _queries(block_y, block_x, tile, height, width, heads, BLOCK, STRIDE, TILE_Q)
    first = _first_query(image, head, height, width, heads, STRIDE)
    q = tl.load(_row_at(q_ptr + first * D, q_at, D, PAD_D), mask=_row_mask(q_ok, D, PAD_D), other=0.0)
    rel_at = _rel_at(rel_ptr + first * (2 * COLUMNS), q_at, i, j, SIDE, COLUMNS, PAD_W)
    rel = tl.load(rel_at, mask=_rel_mask(q_ok, WINDOW, PAD_W), other=0.0)
    kv_ptr += (image * (height * width * heads) + head) * (D + E)
    top, left = block_y * BLOCK - HALO, block_x * BLOCK - HALO
    row_low, row_high = _part(top, height, WINDOW, MASK_BORDER)
    col_low, col_high = _part(left, width, WINDOW, MASK_BORDER)
    keys, cols = (row_high - row_low) * (col_high - col_low), col_high - col_low
    t = tl.arange(0, 2 * PAD_W)[:, None]
    most = tl.full([TILE_Q], -float("inf"), acc_dtype)
    total = tl.zeros([TILE_Q], acc_dtype)
    acc = tl.zeros([TILE_Q, PAD_E], acc_dtype)
    for start in tl.range(0, keys, TILE_K):
        n = start + tl.arange(0, TILE_K)
        row, col = row_low + n // cols, col_low + n % cols
        k_at, k_ok = _pixels(top + row, left + col, n < keys, height, width)
        k = tl.load(_row_at(kv_ptr, k_at, heads * (D + E), PAD_D), mask=_row_mask(k_ok, D, PAD_D), other=0.0)
        v = tl.load(_row_at(kv_ptr + D, k_at, heads * (D + E), PAD_E), mask=_row_mask(k_ok, E, PAD_E), other=0.0)
        s = dot(q, tl.trans(k), INTERPRET) * scale
        s += dot(rel, _two_ones(row[None, :], col[None, :], t, PAD_W, rel.dtype), INTERPRET)
        s = tl.where((n < keys)[None, :], s * _LOG2_E, -float("inf"))
        new_most = tl.maximum(most, tl.max(s, 1))
        p = tl.exp2(s - new_most[:, None])
        shrink = tl.exp2(most - new_most)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, INTERPRET)
        most = new_most
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(_row_at(out_ptr + first * E, q_at, E, PAD_E), out, mask=_row_mask(q_ok, E, PAD_E))
    tl.store(lse_ptr + first + q_at, most + tl.log2(total), mask=q_ok)


@triton.jit(do_not_specialize=["height", "width"])
def _query_backward_kernel(
    q_ptr, kv_ptr, rel_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, drel_ptr, height, width, heads, scale,
    D: tl.constexpr, E: tl.constexpr, PAD_D: tl.constexpr, PAD_E: tl.constexpr,
    BLOCK: tl.constexpr, HALO: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, PAD_W: tl.constexpr,
    MASK_BORDER: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    SIDE: tl.constexpr = BLOCK // STRIDE
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    image, block_y, block_x, tile, head = _split_program(height, width, heads, BLOCK, tl.cdiv(SIDE * SIDE, TILE_Q))
    i, j, q_at, q_ok = _queries(block_y, block_x, tile, height, width, heads, BLOCK, STRIDE, TILE_Q)
    first = _first_query(image, head, height, width, heads, STRIDE)
    d_mask, e_mask = _row_mask(q_ok, D, PAD_D), _row_mask(q_ok, E, PAD_E)
    q = tl.load(_row_at(q_ptr + first * D, q_at, D, PAD_D), mask=d_mask, other=0.0)
    rel_at = _rel_at(rel_ptr + first * (2 * COLUMNS), q_at, i, j, SIDE, COLUMNS, PAD_W)
    rel = tl.load(rel_at, mask=_rel_mask(q_ok, WINDOW, PAD_W), other=0.0)
    out = tl.load(_row_at(out_ptr + first * E, q_at, E, PAD_E), mask=e_mask, other=0.0)
    grad = tl.load(_row_at(grad_ptr + first * E, q_at, E, PAD_E), mask=e_mask, other=0.0)
    lse = tl.load(lse_ptr + first + q_at, mask=q_ok, other=float("inf"))
    delta = tl.sum(out.to(acc_dtype) * grad.to(acc_dtype), 1)
    tl.store(delta_ptr + first + q_at, delta, mask=q_ok)
    kv_ptr += (image * (height * width * heads) + head) * (D + E)
    top, left = block_y * BLOCK - HALO, block_x * BLOCK - HALO
    row_low, row_high = _part(top, height, WINDOW, MASK_BORDER)
    col_low, col_high = _part(left, width, WINDOW, MASK_BORDER)
    keys, cols = (row_high - row_low) * (col_high - col_low), col_high - col_low
    t = tl.arange(0, 2 * PAD_W)
    dq = tl.zeros([TILE_Q, PAD_D], acc_dtype)
    drel = tl.zeros([TILE_Q, 2 * PAD_W], acc_dtype)
    for start in tl.range(0, keys, TILE_K):
        n = start + tl.arange(0, TILE_K)
        row, col = row_low + n // cols, col_low + n % cols
        k_at, k_ok = _pixels(top + row, left + col, n < keys, height, width)
        k = tl.load(_row_at(kv_ptr, k_at, heads * (D + E), PAD_D), mask=_row_mask(k_ok, D, PAD_D), other=0.0)
        v = tl.load(_row_at(kv_ptr + D, k_at, heads * (D + E), PAD_E), mask=_row_mask(k_ok, E, PAD_E), other=0.0)
        s = dot(q, tl.trans(k), INTERPRET) * scale
        s += dot(rel, _two_ones(row[None, :], col[None, :], t[:, None], PAD_W, rel.dtype), INTERPRET)
        s = tl.where((n < keys)[None, :], s * _LOG2_E, -float("inf"))
        ds = tl.exp2(s - lse[:, None]) * (dot(grad, tl.trans(v), INTERPRET) - delta[:, None])
        ds = ds.to(k.dtype)
        dq += dot(ds, k, INTERPRET)
        drel += dot(ds, _two_ones(row[:, None], col[:, None], t[None, :], PAD_W, ds.dtype), INTERPRET)
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(_row_at(dq_ptr + first * D, q_at, D, PAD_D), dq, mask=d_mask)
    drel_ptr += first * (2 * COLUMNS)
    drel = drel.to(drel_ptr.dtype.element_ty)
    tl.store(_rel_at(drel_ptr, q_at, i, j, SIDE, COLUMNS, PAD_W), drel, mask=_rel_mask(q_ok, WINDOW, PAD_W))
    # the other columns are those of table rows that these queries cannot reach
    PAD_C: tl.constexpr = 2 * PAD_W  # COLUMNS is less than 2 * WINDOW before it is rounded up to a multiple of 4
    c = tl.arange(0, 2 * PAD_C)
    place = c % PAD_C - (SIDE - 1) + tl.where(c[None, :] < PAD_C, i[:, None], j[:, None])
    beyond = q_ok[:, None] & (c % PAD_C < COLUMNS)[None, :] & ((place < 0) | (place >= WINDOW))
    zero_at = drel_ptr + q_at[:, None] * (2 * COLUMNS) + (c % PAD_C + c // PAD_C * COLUMNS)[None, :]
    tl.store(zero_at, tl.zeros([TILE_Q, 2 * PAD_C], drel_ptr.dtype.element_ty), mask=beyond)


@triton.jit(do_not_specialize=["height", "width"])
def _key_backward_kernel(
    q_ptr, kv_ptr, rel_ptr, grad_ptr, lse_ptr, delta_ptr, dkv_ptr, height, width, heads, scale,
    D: tl.constexpr, E: tl.constexpr, PAD_D: tl.constexpr, PAD_E: tl.constexpr,
    BLOCK: tl.constexpr, HALO: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, PAD_W: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    SIDE: tl.constexpr = BLOCK // STRIDE
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    QUERY_TILES: tl.constexpr = (SIDE * SIDE + TILE_Q - 1) // TILE_Q
    image, block_y, block_x, tile, head = _split_program(height, width, heads, BLOCK, tl.cdiv(BLOCK * BLOCK, TILE_K))
    item = tile * TILE_K + tl.arange(0, TILE_K)
    y, x = block_y * BLOCK + item // BLOCK, block_x * BLOCK + item % BLOCK
    k_at, k_ok = _pixels(y, x, item < BLOCK * BLOCK, height, width)
    d_mask, e_mask = _row_mask(k_ok, D, PAD_D), _row_mask(k_ok, E, PAD_E)
    first_key = (image * (height * width * heads) + head) * (D + E)
    k = tl.load(_row_at(kv_ptr + first_key, k_at, heads * (D + E), PAD_D), mask=d_mask, other=0.0)
    v = tl.load(_row_at(kv_ptr + first_key + D, k_at, heads * (D + E), PAD_E), mask=e_mask, other=0.0)
    first = _first_query(image, head, height, width, heads, STRIDE)
    q_ptr += first * D
    grad_ptr += first * E
    rel_ptr += first * (2 * COLUMNS)
    t = tl.arange(0, 2 * PAD_W)[None, :]
    dk = tl.zeros([TILE_K, PAD_D], acc_dtype)
    dv = tl.zeros([TILE_K, PAD_E], acc_dtype)
    # the blocks of the map whose windows reach into this tile
    top = block_y * BLOCK + tile * TILE_K // BLOCK
    bottom = block_y * BLOCK + tl.minimum(tile * TILE_K + TILE_K - 1, BLOCK * BLOCK - 1) // BLOCK
    row_low, row_high = _asking(top, bottom, height, BLOCK, HALO)
    col_low, col_high = _asking(block_x * BLOCK, block_x * BLOCK + BLOCK - 1, width, BLOCK, HALO)
    for step in tl.range(0, (row_high - row_low) * (col_high - col_low) * QUERY_TILES):
        block = step // QUERY_TILES
        asking_y, asking_x = row_low + block // (col_high - col_low), col_low + block % (col_high - col_low)
        i, j, q_at, q_ok = _queries(asking_y, asking_x, step % QUERY_TILES, height, width, heads, BLOCK, STRIDE, TILE_Q)
        q = tl.load(_row_at(q_ptr, q_at, D, PAD_D), mask=_row_mask(q_ok, D, PAD_D), other=0.0)
        grad = tl.load(_row_at(grad_ptr, q_at, E, PAD_E), mask=_row_mask(q_ok, E, PAD_E), other=0.0)
        rel_at = _rel_at(rel_ptr, q_at, i, j, SIDE, COLUMNS, PAD_W)
        rel = tl.load(rel_at, mask=_rel_mask(q_ok, WINDOW, PAD_W), other=0.0)
        lse = tl.load(lse_ptr + first + q_at, mask=q_ok, other=float("inf"))
        delta = tl.load(delta_ptr + first + q_at, mask=q_ok, other=0.0)
        row, col = y - asking_y * BLOCK + HALO, x - asking_x * BLOCK + HALO
        seen = (row >= 0) & (row < WINDOW) & (col >= 0) & (col < WINDOW)
        # key-major products: on Hopper a transposed dot result may be silently wrong
        s = dot(k, tl.trans(q), INTERPRET) * scale
        s += dot(_two_ones(row[:, None], col[:, None], t, PAD_W, rel.dtype), tl.trans(rel), INTERPRET)
        p = tl.exp2(tl.where(seen[:, None], s * _LOG2_E, -float("inf")) - lse[None, :])
        dv += dot(p.to(grad.dtype), grad, INTERPRET)
        ds = p * (dot(v, tl.trans(grad), INTERPRET) - delta[None, :])
        dk += dot(ds.to(q.dtype), q, INTERPRET)
    dkv_ptr += first_key
    dk, dv = (dk * scale).to(dkv_ptr.dtype.element_ty), dv.to(dkv_ptr.dtype.element_ty)
    tl.store(_row_at(dkv_ptr, k_at, heads * (D + E), PAD_D), dk, mask=d_mask)
    tl.store(_row_at(dkv_ptr + D, k_at, heads * (D + E), PAD_E), dv, mask=e_mask)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _plan(
    head_dim: int, value_dim: int, block_size: int, halo_size: int, stride: int, mask_border: bool
) -> dict[str, Launch]:
    """What is launched for these sizes, whatever the map."""
    window, side = block_size + 2 * halo_size, block_size // stride
    sizes = {
        "D": head_dim, "E": value_dim, "PAD_D": _padded(head_dim), "PAD_E": _padded(value_dim),
        "BLOCK": block_size, "HALO": halo_size, "STRIDE": stride,
        "COLUMNS": relative_columns(window, side), "PAD_W": _padded(window), "INTERPRET": interpreting(),
    }  # fmt: skip
    # short tiles of partners waste little of a window and leave registers for more programs at a time
    query = {"TILE_Q": min(64, _padded(side**2)), "TILE_K": 32, "MASK_BORDER": mask_border, **sizes}
    key = {"TILE_Q": min(32, _padded(side**2)), "TILE_K": min(64, _padded(block_size**2)), **sizes}
    query_warps, key_warps = (4 if own == 64 else 2 for own in (query["TILE_Q"], key["TILE_K"]))
    return {
        "forward": Launch(_forward_kernel, query, query_warps),
        "backward of q": Launch(_query_backward_kernel, query, query_warps),
        "backward of k, v": Launch(_key_backward_kernel, key, key_warps, stages=2),
    }


def _run(launch: Launch, tiles: int, *tensors: Tensor) -> None:
    """Run a kernel of `_plan` that splits every block into `tiles`; q and kv come first of its tensors."""
    q, kv = tensors[:2]
    batch, height, width, heads, _ = kv.shape
    block_size = launch.constants["BLOCK"]
    blocks = triton.cdiv(height, block_size) * triton.cdiv(width, block_size)
    with torch.cuda.device_of(q):
        launch.kernel[(batch * blocks * tiles * heads,)](
            *tensors, height, width, heads, q.shape[-1] ** -0.5,
            **launch.constants, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip


def forward(
    q: Tensor, kv: Tensor, rel: Tensor, block_size: int, halo_size: int, stride: int, mask_border: bool
) -> tuple[Tensor, Tensor]:
    """Contiguous q, kv, rel -> out `[B, Hq, Wq, N, E]`, and max + log2(sum) of each query `[B, Hq, Wq, N]`."""
    head_dim, value_dim = q.shape[-1], kv.shape[-1] - q.shape[-1]
    out = q.new_empty(*q.shape[:4], value_dim)
    lse = q.new_empty(q.shape[:4], dtype=at_least_float32(q))
    launch = _plan(head_dim, value_dim, block_size, halo_size, stride, mask_border)["forward"]
    _run(launch, triton.cdiv((block_size // stride) ** 2, launch.constants["TILE_Q"]), q, kv, rel, out, lse)
    return out, lse


def backward(
    q: Tensor, kv: Tensor, rel: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
    block_size: int, halo_size: int, stride: int, mask_border: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous inputs of `forward`, its results and the gradient of `out` -> gradients of q, kv and rel."""
    head_dim, value_dim = q.shape[-1], kv.shape[-1] - q.shape[-1]
    dq, dkv, drel, delta = (torch.empty_like(x) for x in (q, kv, rel, lse))
    plan = _plan(head_dim, value_dim, block_size, halo_size, stride, mask_border)
    launch = plan["backward of q"]  # writes delta, which the other half reads
    tiles = triton.cdiv((block_size // stride) ** 2, launch.constants["TILE_Q"])
    _run(launch, tiles, q, kv, rel, out, grad, lse, delta, dq, drel)
    launch = plan["backward of k, v"]
    _run(launch, triton.cdiv(block_size**2, launch.constants["TILE_K"]), q, kv, rel, grad, lse, delta, dkv)
    return dq, dkv, drel


def launches(case: tuple) -> dict[str, Launch]:
    """The kernels of a forward and backward of one of `halo.CASES`, in bfloat16."""
    _, _, _, head_dim, value_dim, block_size, halo_size, stride = case
    return _plan(head_dim, value_dim, block_size, halo_size, stride, mask_border=False)
