"""Triton kernels of `routed`: forward, inverse list, and the two halves of the backward.

One program owns one head of one tile of pixels of one region. A region's partners come as a list of regions, flattened
into pixels: item j is pixel j % r of region list[j // r], whose keys and values are loaded in place. Queries list the
regions they were routed to; keys list the regions that were routed to them (the inverse list), so that both gradients
are sums in a fixed order and no atomic is needed.

Layout: qkv [B, H, W, 3, N, D], out and grad [B, H, W, N, D], all contiguous; statistics [B, H, W, N] in base 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import interpreting
from ._precision import at_least_float32
from ._triton import LOG2_E, Launch, dot

POINTERS = {"index_ptr": "i32", "list_ptr": "i32", "count_ptr": "i32", "lse_ptr": "fp32", "delta_ptr": "fp32"}


@triton.jit
def _split_program(heads, tiles, regions):
    """Program id -> (image, region, tile, head), head fastest: neighbours share the cache lines of a pixel."""
    pid = tl.program_id(0).to(tl.int64)
    rest = pid // heads
    head = (pid % heads).to(tl.int32)
    tile = (rest % tiles).to(tl.int32)
    rest = rest // tiles
    return rest // regions, (rest % regions).to(tl.int32), tile, head


@triton.jit
def _pixel(region, item, region_h, region_w, cols, width):
    """Index in the map of pixel `item` (row-major) of `region`."""
    return ((region // cols) * region_h + item // region_w) * width + (region % cols) * region_w + item % region_w


@triton.jit
def _rows(base, pixels, stride, d):
    return base + pixels[:, None] * stride + d[None, :]


@triton.jit(do_not_specialize=["height", "width", "regions", "cols", "region_h", "region_w", "tiles"])
def _forward_kernel(
    qkv_ptr, index_ptr, out_ptr, lse_ptr, height, width, heads, regions, cols, region_h, region_w, tiles, scale,
    D: tl.constexpr, PAD_D: tl.constexpr, TOPK: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if qkv_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, region, tile, head = _split_program(heads, tiles, regions)
    pixels = region_h * region_w
    stride, part = 3 * heads * D, heads * D
    d = tl.arange(0, PAD_D)
    item = tile * TILE_Q + tl.arange(0, TILE_Q)
    q_ok = item < pixels
    q_at = _pixel(region, item, region_h, region_w, cols, width)
    q_mask = q_ok[:, None] & (d < D)[None, :]
    qkv_ptr += image * height * width * stride + head * D
    q = tl.load(_rows(qkv_ptr, q_at, stride, d), mask=q_mask, other=0.0)
    top = tl.full([TILE_Q], -float("inf"), acc_dtype)
    total = tl.zeros([TILE_Q], acc_dtype)
    acc = tl.zeros([TILE_Q, PAD_D], acc_dtype)
    for start in tl.range(0, pixels * TOPK, TILE_K):
        j = start + tl.arange(0, TILE_K)
        k_ok = j < pixels * TOPK
        partner = tl.load(index_ptr + (image * regions + region) * TOPK + j // pixels, mask=k_ok, other=0)
        k_at = _pixel(partner, j % pixels, region_h, region_w, cols, width)
        k_mask = k_ok[:, None] & (d < D)[None, :]
        k = tl.load(_rows(qkv_ptr + part, k_at, stride, d), mask=k_mask, other=0.0)
        v = tl.load(_rows(qkv_ptr + 2 * part, k_at, stride, d), mask=k_mask, other=0.0)
        s = tl.where(k_ok[None, :], dot(q, tl.trans(k), INTERPRET) * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, INTERPRET)
        top = new_top
    o_at = image * height * width + q_at
    tl.store(_rows(out_ptr + head * D, o_at, part, d), (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=q_mask)
    tl.store(lse_ptr + o_at * heads + head, top + tl.log2(total), mask=q_ok)


@triton.jit(do_not_specialize=["regions"])
def _invert_kernel(
    index_ptr, list_ptr, count_ptr, regions, TOPK: tl.constexpr, PAD_K: tl.constexpr, TILE: tl.constexpr
):
    """For each region the regions that were routed to it, ascending, and their number."""
    pid = tl.program_id(0).to(tl.int64)
    region, image = (pid % regions).to(tl.int32), pid // regions
    t = tl.arange(0, PAD_K)
    count = region * 0
    start = region * 0
    while start < regions:
        query = start + tl.arange(0, TILE)
        at = (image * regions + query)[:, None] * TOPK + t[None, :]
        chosen = tl.load(index_ptr + at, mask=(query < regions)[:, None] & (t < TOPK)[None, :], other=-1)
        hit = tl.max((chosen == region).to(tl.int32), 1)
        slot = count + tl.cumsum(hit, 0) - 1
        tl.store(list_ptr + pid * regions + slot, query, mask=hit > 0)
        count += tl.sum(hit, 0)
        start += TILE
    tl.store(count_ptr + pid, count)


@triton.jit(do_not_specialize=["height", "width", "regions", "cols", "region_h", "region_w", "tiles"])
def _query_backward_kernel(
    qkv_ptr, index_ptr, grad_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    height, width, heads, regions, cols, region_h, region_w, tiles, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, TOPK: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if qkv_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, region, tile, head = _split_program(heads, tiles, regions)
    pixels = region_h * region_w
    stride, part = 3 * heads * D, heads * D
    d = tl.arange(0, PAD_D)
    item = tile * TILE_Q + tl.arange(0, TILE_Q)
    q_ok = item < pixels
    q_at = _pixel(region, item, region_h, region_w, cols, width)
    q_mask = q_ok[:, None] & (d < D)[None, :]
    origin = image * height * width
    qkv_ptr += origin * stride + head * D
    q = tl.load(_rows(qkv_ptr, q_at, stride, d), mask=q_mask, other=0.0)
    grad = tl.load(_rows(grad_ptr + origin * part + head * D, q_at, part, d), mask=q_mask, other=0.0)
    lse = tl.load(lse_ptr + (origin + q_at) * heads + head, mask=q_ok, other=float("inf"))
    delta = tl.load(delta_ptr + (origin + q_at) * heads + head, mask=q_ok, other=0.0)
    dq = tl.zeros([TILE_Q, PAD_D], acc_dtype)
    for start in tl.range(0, pixels * TOPK, TILE_K):
        j = start + tl.arange(0, TILE_K)
        k_ok = j < pixels * TOPK
        partner = tl.load(index_ptr + (image * regions + region) * TOPK + j // pixels, mask=k_ok, other=0)
        k_at = _pixel(partner, j % pixels, region_h, region_w, cols, width)
        k_mask = k_ok[:, None] & (d < D)[None, :]
        k = tl.load(_rows(qkv_ptr + part, k_at, stride, d), mask=k_mask, other=0.0)
        v = tl.load(_rows(qkv_ptr + 2 * part, k_at, stride, d), mask=k_mask, other=0.0)
        p = tl.exp2(dot(q, tl.trans(k), INTERPRET) * scale_log2 - lse[:, None])
        p = tl.where(k_ok[None, :], p, 0.0)
        ds = p * (dot(grad, tl.trans(v), INTERPRET) - delta[:, None])
        dq += dot(ds.to(k.dtype), k, INTERPRET)
    dq_rows = _rows(dqkv_ptr + origin * stride + head * D, q_at, stride, d)
    tl.store(dq_rows, (dq * scale).to(dqkv_ptr.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=["height", "width", "regions", "cols", "region_h", "region_w", "tiles"])
def _key_backward_kernel(
    qkv_ptr, list_ptr, count_ptr, grad_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    height, width, heads, regions, cols, region_h, region_w, tiles, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if qkv_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, region, tile, head = _split_program(heads, tiles, regions)
    pixels = region_h * region_w
    stride, part = 3 * heads * D, heads * D
    d = tl.arange(0, PAD_D)
    item = tile * TILE_K + tl.arange(0, TILE_K)
    k_at = _pixel(region, item, region_h, region_w, cols, width)
    k_mask = (item < pixels)[:, None] & (d < D)[None, :]
    origin = image * height * width
    qkv_ptr += origin * stride + head * D
    k = tl.load(_rows(qkv_ptr + part, k_at, stride, d), mask=k_mask, other=0.0)
    v = tl.load(_rows(qkv_ptr + 2 * part, k_at, stride, d), mask=k_mask, other=0.0)
    dk = tl.zeros([TILE_K, PAD_D], acc_dtype)
    dv = tl.zeros([TILE_K, PAD_D], acc_dtype)
    items = tl.load(count_ptr + image * regions + region) * pixels
    for start in tl.range(0, items, TILE_Q):
        j = start + tl.arange(0, TILE_Q)
        q_ok = j < items
        partner = tl.load(list_ptr + (image * regions + region) * regions + j // pixels, mask=q_ok, other=0)
        q_at = _pixel(partner, j % pixels, region_h, region_w, cols, width)
        q_mask = q_ok[:, None] & (d < D)[None, :]
        q = tl.load(_rows(qkv_ptr, q_at, stride, d), mask=q_mask, other=0.0)
        grad = tl.load(_rows(grad_ptr + origin * part + head * D, q_at, part, d), mask=q_mask, other=0.0)
        lse = tl.load(lse_ptr + (origin + q_at) * heads + head, mask=q_ok, other=float("inf"))
        delta = tl.load(delta_ptr + (origin + q_at) * heads + head, mask=q_ok, other=0.0)
        # key-major products: on Hopper a transposed dot result may be silently wrong
        p = tl.exp2(dot(k, tl.trans(q), INTERPRET) * scale_log2 - lse[None, :])
        dv += dot(p.to(grad.dtype), grad, INTERPRET)
        ds = p * (dot(v, tl.trans(grad), INTERPRET) - delta[None, :])
        dk += dot(ds.to(q.dtype), q, INTERPRET)
    dqkv_ptr += origin * stride + head * D
    tl.store(_rows(dqkv_ptr + part, k_at, stride, d), (dk * scale).to(dqkv_ptr.dtype.element_ty), mask=k_mask)
    tl.store(_rows(dqkv_ptr + 2 * part, k_at, stride, d), dv.to(dqkv_ptr.dtype.element_ty), mask=k_mask)


def tiles(pixels: int) -> tuple[int, int, int]:
    """(tile of the region's own pixels, tile of its partners' pixels, warps) for regions of `pixels` pixels."""
    own = min(64, max(16, triton.next_power_of_2(pixels)))
    return own, 64, 4 if own == 64 else 2


def _geometry(qkv: Tensor, grid: tuple[int, int], tile: int) -> tuple[tuple[int, ...], int]:
    """Run-time sizes every kernel takes, and the number of programs."""
    batch, height, width, _, heads, _ = qkv.shape
    region_h, region_w = height // grid[0], width // grid[1]
    regions, count = grid[0] * grid[1], triton.cdiv(region_h * region_w, tile)
    return (height, width, heads, regions, grid[1], region_h, region_w, count), batch * regions * count * heads


def _widths(head_dim: int) -> dict[str, int | bool]:
    return {"D": head_dim, "PAD_D": max(16, triton.next_power_of_2(head_dim)), "INTERPRET": interpreting()}


def _list_constants(topk: int) -> dict[str, int]:
    return {"TOPK": topk, "PAD_K": triton.next_power_of_2(topk), "TILE": 32}


def forward(qkv: Tensor, index: Tensor, grid: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    """Contiguous qkv, index -> out `[B, H, W, N, D]`, and max + log2(sum) of each row `[B, H, W, N]`."""
    out = qkv.new_empty(qkv.shape[:3] + qkv.shape[4:])
    lse = out.new_empty(out.shape[:4], dtype=at_least_float32(qkv))
    own, partner, warps = tiles(qkv.shape[1] * qkv.shape[2] // (grid[0] * grid[1]))
    sizes, programs = _geometry(qkv, grid, own)
    with torch.cuda.device_of(qkv):
        _forward_kernel[(programs,)](
            qkv, index.int(), out, lse, *sizes, scale * LOG2_E,
            **_widths(qkv.shape[-1]), TOPK=index.shape[-1], TILE_Q=own, TILE_K=partner, num_warps=warps,
        )  # fmt: skip
    return out, lse


def backward(
    qkv: Tensor, index: Tensor, out: Tensor, lse: Tensor, grad: Tensor, grid: tuple[int, int], scale: float
) -> Tensor:
    """Contiguous inputs of `forward`, its results and the gradient of `out` -> gradient of qkv."""
    index = index.int()
    batch, regions, topk = index.shape
    dqkv = torch.empty_like(qkv)
    delta = (out.to(lse.dtype) * grad.to(lse.dtype)).sum(-1)
    lists = index.new_empty(batch, regions, regions)
    counts = index.new_empty(batch, regions)
    own, partner, warps = tiles(qkv.shape[1] * qkv.shape[2] // regions)
    sizes, programs = _geometry(qkv, grid, own)
    scales = (scale, scale * LOG2_E)
    constants = {**_widths(qkv.shape[-1]), "num_warps": warps}
    with torch.cuda.device_of(qkv):
        _invert_kernel[(batch * regions,)](index, lists, counts, regions, **_list_constants(topk))
        _query_backward_kernel[(programs,)](
            qkv, index, grad, lse, delta, dqkv, *sizes, *scales, TOPK=topk, TILE_Q=own, TILE_K=partner, **constants
        )
        _key_backward_kernel[(programs,)](
            qkv, lists, counts, grad, lse, delta, dqkv, *sizes, *scales, TILE_Q=partner, TILE_K=own, **constants
        )
    return dqkv


def launches(case: tuple) -> dict[str, Launch]:
    """The kernels of a forward and backward of one of `routed.CASES`, in bfloat16."""
    _, (height, width), (rows, cols), _, head_dim, topk = case
    own, partner, warps = tiles((height // rows) * (width // cols))
    widths = _widths(head_dim)
    query = {**widths, "TOPK": topk, "TILE_Q": own, "TILE_K": partner}
    return {
        "forward": Launch(_forward_kernel, query, warps),
        "inverse list": Launch(_invert_kernel, _list_constants(topk), 4),
        "backward of q": Launch(_query_backward_kernel, query, warps),
        "backward of k, v": Launch(_key_backward_kernel, {**widths, "TILE_Q": partner, "TILE_K": own}, warps),
    }
