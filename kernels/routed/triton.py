"""Triton kernels of routed attention: forward, inverse list of the routing, and two kernels for the backward.

One program owns one head of one tile of pixels of one region. The other side of the attention comes as a list of
regions, flattened to pixels: item j is pixel j % r of region list[j // r], and is loaded from the map in place. For
queries it is the list of the regions they were routed to; for keys the list of the regions that were routed to them
(the inverse list). So all gradients are sums in a fixed order, without atomics.

Layout: qkv [B, H, W, 3, N, D], o and do [B, H, W, N, D], all contiguous; lse and delta [B, H, W, N]. `dim` is N * D:
q, k and v of a pixel lie `dim` elements apart.
"""

from collections.abc import Sequence

import torch
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

POINTER_TYPES = {"index_ptr": "i32", "list_ptr": "i32", "count_ptr": "i32", "lse_ptr": "fp32", "delta_ptr": "fp32"}

_SIZES = ["height", "width", "regions", "cols", "region_h", "region_w", "blocks"]  # runtime sizes of the map


@triton.jit
def _locate_program(heads, blocks, regions):
    """Return (image, region, block, head)."""
    outer, block, head = split_program_id(heads, blocks)
    return (outer // regions).to(tl.int64), outer % regions, block, head


@triton.jit
def _offsets(region, item, region_h, region_w, cols, width):
    """Offset in the map of pixel `item` (row-major) of `region`."""
    return ((region // cols) * region_h + item // region_w) * width + (region % cols) * region_w + item % region_w


@triton.jit
def _listed_pixels(list_ptr, start, end, region_h, region_w, cols, width, BLOCK: tl.constexpr):
    """Offsets in the map of items [start, start + BLOCK) of a list of regions, and which of them come before `end`."""
    pixels = region_h * region_w
    item = start + tl.arange(0, BLOCK)
    mask = item < end
    region = tl.load(list_ptr + item // pixels, mask=mask, other=0)
    return _offsets(region, item % pixels, region_h, region_w, cols, width), mask


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    qkv_ptr, index_ptr, o_ptr, lse_ptr, height, width, heads, regions, cols, region_h, region_w, blocks, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, TOPK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    image, region, block, head = _locate_program(heads, blocks, regions)
    pixels = region_h * region_w
    dim, qkv_stride = heads * D, 3 * heads * D
    pixel_0 = image * height * width
    item = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = item < pixels
    offs_m = _offsets(region, item, region_h, region_w, cols, width)
    qkv_ptr += pixel_0 * qkv_stride + head * D
    index_ptr += (image * regions + region) * TOPK
    q = load_rows(qkv_ptr, offs_m, mask_m, qkv_stride, D, PAD_D)
    m_i = tl.full([BLOCK_M], -float("inf"), ACC)
    l_i = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, PAD_D], ACC)
    for start_n in tl.range(0, pixels * TOPK, BLOCK_N):
        offs_n, mask_n = _listed_pixels(index_ptr, start_n, pixels * TOPK, region_h, region_w, cols, width, BLOCK_N)
        k = load_rows(qkv_ptr + dim, offs_n, mask_n, qkv_stride, D, PAD_D)
        v = load_rows(qkv_ptr + 2 * dim, offs_n, mask_n, qkv_stride, D, PAD_D)
        s = tl.where(mask_n[None, :], dot(q, tl.trans(k), INTERPRET) * scale_log2, -float("inf"))
        m_i, l_i, acc = online_softmax_step(m_i, l_i, acc, s, v, INTERPRET)
    store_rows(o_ptr + head * D, pixel_0 + offs_m, mask_m, dim, acc / l_i[:, None], D, PAD_D)
    tl.store(lse_ptr + (pixel_0 + offs_m) * heads + head, m_i + tl.log2(l_i), mask=mask_m)


@triton.jit(do_not_specialize=["regions"])
def _inverse_list_kernel(
    index_ptr, list_ptr, count_ptr, regions, TOPK: tl.constexpr, PAD_K: tl.constexpr, BLOCK: tl.constexpr
):
    """For each region: the regions that were routed to it, in ascending order, and how many there are."""
    pid = tl.program_id(0).to(tl.int64)
    region, image = (pid % regions).to(tl.int32), pid // regions
    offs_k = tl.arange(0, PAD_K)
    count = region * 0
    start = region * 0
    while start < regions:
        query = start + tl.arange(0, BLOCK)
        offs = (image * regions + query)[:, None] * TOPK + offs_k[None, :]
        routed = tl.load(index_ptr + offs, mask=(query < regions)[:, None] & (offs_k < TOPK)[None, :], other=-1)
        hit = tl.max((routed == region).to(tl.int32), 1)
        position = count + tl.cumsum(hit, 0) - 1
        tl.store(list_ptr + pid * regions + position, query, mask=hit > 0)
        count += tl.sum(hit, 0)
        start += BLOCK
    tl.store(count_ptr + pid, count)


@triton.jit(do_not_specialize=_SIZES)
def _query_backward_kernel(
    qkv_ptr, index_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    height, width, heads, regions, cols, region_h, region_w, blocks, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, TOPK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradient of q: a program owns BLOCK_M queries and loops over the keys of their routed regions."""
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    image, region, block, head = _locate_program(heads, blocks, regions)
    pixels = region_h * region_w
    dim, qkv_stride = heads * D, 3 * heads * D
    pixel_0 = image * height * width
    item = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = item < pixels
    offs_m = _offsets(region, item, region_h, region_w, cols, width)
    qkv_ptr += pixel_0 * qkv_stride + head * D
    index_ptr += (image * regions + region) * TOPK
    q = load_rows(qkv_ptr, offs_m, mask_m, qkv_stride, D, PAD_D)
    do = load_rows(do_ptr + pixel_0 * dim + head * D, offs_m, mask_m, dim, D, PAD_D)
    lse = tl.load(lse_ptr + (pixel_0 + offs_m) * heads + head, mask=mask_m, other=float("inf"))
    delta = tl.load(delta_ptr + (pixel_0 + offs_m) * heads + head, mask=mask_m, other=0.0)
    dq = tl.zeros([BLOCK_M, PAD_D], ACC)
    for start_n in tl.range(0, pixels * TOPK, BLOCK_N):
        offs_n, mask_n = _listed_pixels(index_ptr, start_n, pixels * TOPK, region_h, region_w, cols, width, BLOCK_N)
        k = load_rows(qkv_ptr + dim, offs_n, mask_n, qkv_stride, D, PAD_D)
        v = load_rows(qkv_ptr + 2 * dim, offs_n, mask_n, qkv_stride, D, PAD_D)
        p = tl.exp2(dot(q, tl.trans(k), INTERPRET) * scale_log2 - lse[:, None])
        p = tl.where(mask_n[None, :], p, 0.0)
        ds = p * (dot(do, tl.trans(v), INTERPRET) - delta[:, None])
        dq += dot(ds.to(k.dtype), k, INTERPRET)
    store_rows(dqkv_ptr + pixel_0 * qkv_stride + head * D, offs_m, mask_m, qkv_stride, dq * scale, D, PAD_D)


@triton.jit(do_not_specialize=_SIZES)
def _key_backward_kernel(
    qkv_ptr, list_ptr, count_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    height, width, heads, regions, cols, region_h, region_w, blocks, scale, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v: a program owns BLOCK_N keys and loops over the queries of the inverse list."""
    ACC: tl.constexpr = acc_dtype_of(qkv_ptr.dtype.element_ty)
    image, region, block, head = _locate_program(heads, blocks, regions)
    pixels = region_h * region_w
    dim, qkv_stride = heads * D, 3 * heads * D
    pixel_0 = image * height * width
    item = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = item < pixels
    offs_n = _offsets(region, item, region_h, region_w, cols, width)
    qkv_ptr += pixel_0 * qkv_stride + head * D
    do_ptr += pixel_0 * dim + head * D
    list_ptr += (image * regions + region) * regions
    k = load_rows(qkv_ptr + dim, offs_n, mask_n, qkv_stride, D, PAD_D)
    v = load_rows(qkv_ptr + 2 * dim, offs_n, mask_n, qkv_stride, D, PAD_D)
    dk = tl.zeros([BLOCK_N, PAD_D], ACC)
    dv = tl.zeros([BLOCK_N, PAD_D], ACC)
    queries = tl.load(count_ptr + image * regions + region) * pixels
    for start_m in tl.range(0, queries, BLOCK_M):
        offs_m, mask_m = _listed_pixels(list_ptr, start_m, queries, region_h, region_w, cols, width, BLOCK_M)
        q = load_rows(qkv_ptr, offs_m, mask_m, qkv_stride, D, PAD_D)
        do = load_rows(do_ptr, offs_m, mask_m, dim, D, PAD_D)
        lse = tl.load(lse_ptr + (pixel_0 + offs_m) * heads + head, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + (pixel_0 + offs_m) * heads + head, mask=mask_m, other=0.0)
        p = tl.exp2(dot(k, tl.trans(q), INTERPRET) * scale_log2 - lse[None, :])
        dk, dv = dkdv_step(dk, dv, p, q, v, do, delta, INTERPRET)
    dqkv_ptr += pixel_0 * qkv_stride + head * D
    store_rows(dqkv_ptr + dim, offs_n, mask_n, qkv_stride, dk * scale, D, PAD_D)
    store_rows(dqkv_ptr + 2 * dim, offs_n, mask_n, qkv_stride, dv, D, PAD_D)


def _kernel_specs(region_pixels: int, head_dim: int, topk: int) -> dict[str, KernelSpec]:
    """Return the kernels for regions of this many pixels, for maps of any size."""
    own = min(64, padded_dim(region_pixels))  # tile of the program's own pixels
    num_warps = 4 if own == 64 else 2
    constants = {"D": head_dim, "PAD_D": padded_dim(head_dim), "INTERPRET": interpreting()}
    query = {**constants, "TOPK": topk, "BLOCK_M": own, "BLOCK_N": 64}
    inverse = {"TOPK": topk, "PAD_K": triton.next_power_of_2(topk), "BLOCK": 32}
    return {
        "forward": KernelSpec(_forward_kernel, query, num_warps),
        "inverse list": KernelSpec(_inverse_list_kernel, inverse, 4),
        "backward of q": KernelSpec(_query_backward_kernel, query, num_warps),
        "backward of k, v": KernelSpec(_key_backward_kernel, {**constants, "BLOCK_M": 64, "BLOCK_N": own}, num_warps),
    }


def _launch(spec: KernelSpec, own: str, grid: Sequence[int], scales: tuple[float, ...], *tensors: Tensor) -> None:
    """Launch a kernel that tiles every region by its constant `own`. The first tensor must be qkv."""
    batch, height, width, _, heads, _ = tensors[0].shape
    region_h, region_w, regions = height // grid[0], width // grid[1], grid[0] * grid[1]
    blocks = triton.cdiv(region_h * region_w, spec.constants[own])
    spec.kernel[(batch * regions * blocks * heads,)](
        *tensors, height, width, heads, regions, grid[1], region_h, region_w, blocks, *scales,
        **spec.constants, num_warps=spec.num_warps, num_stages=spec.num_stages,
    )  # fmt: skip


def forward(qkv: Tensor, index: Tensor, grid: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, W, N, D]` and lse `[B, H, W, N]`. The inputs must be contiguous."""
    out = qkv.new_empty(qkv.shape[:3] + qkv.shape[4:])
    lse = out.new_empty(out.shape[:4], dtype=acc_dtype(qkv))
    specs = _specs_of(qkv, index, grid)
    with torch.cuda.device_of(qkv):
        _launch(specs["forward"], "BLOCK_M", grid, (scale * LOG2_E,), qkv, index.int(), out, lse)
    return out, lse


def backward(
    qkv: Tensor, index: Tensor, out: Tensor, lse: Tensor, do: Tensor, grid: Sequence[int], scale: float
) -> Tensor:
    """Return the gradient of qkv from the inputs of `forward`, its outputs and do. All must be contiguous."""
    index = index.int()
    batch, regions, _ = index.shape
    dqkv = torch.empty_like(qkv)
    delta = (out.to(lse.dtype) * do.to(lse.dtype)).sum(-1)
    lists = index.new_empty(batch, regions, regions)
    counts = index.new_empty(batch, regions)
    specs, scales = _specs_of(qkv, index, grid), (scale, scale * LOG2_E)
    inverse = specs["inverse list"]
    with torch.cuda.device_of(qkv):
        inverse.kernel[(batch * regions,)](
            index, lists, counts, regions,
            **inverse.constants, num_warps=inverse.num_warps, num_stages=inverse.num_stages,
        )  # fmt: skip
        _launch(specs["backward of q"], "BLOCK_M", grid, scales, qkv, index, do, lse, delta, dqkv)
        _launch(specs["backward of k, v"], "BLOCK_N", grid, scales, qkv, lists, counts, do, lse, delta, dqkv)
    return dqkv


def _specs_of(qkv: Tensor, index: Tensor, grid: Sequence[int]) -> dict[str, KernelSpec]:
    return _kernel_specs(qkv.shape[1] * qkv.shape[2] // (grid[0] * grid[1]), qkv.shape[-1], index.shape[-1])


def aot_specs(case: tuple) -> dict[str, KernelSpec]:
    """Return the kernels of a forward and backward of one of `routed.CASES`, for ahead-of-time compilation."""
    _, (height, width), (rows, cols), _, head_dim, topk = case
    return _kernel_specs((height // rows) * (width // cols), head_dim, topk)
