"""Routed attention in plain PyTorch that gathers the keys and values of only some query regions at a time.

The memory beside inputs and outputs is bounded: the backward recomputes the gathered keys, values and weights group by
group, where autograd on the reference would keep them for all regions.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..precision import acc_dtype
from ..working_size import working_bytes
from .regions import gather_regions, merge_regions, scatter_add_regions, split_regions

# Size of the buffers of one group on the CPU: large enough for efficient matrix products, small beside the model
GROUP_BYTES = 4 << 20


def forward(qkv: Tensor, index: Tensor, grid: Sequence[int], scale: float) -> Tensor:
    """Contiguous qkv `[B, H, W, 3, N, D]` and index `[B, R, K]` -> out `[B, H, W, N, D]`."""
    q, k, v = qkv.unbind(3)
    k, v = split_regions(k, grid), split_regions(v, grid)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q, y = _as_grid(q, grid), _as_grid(out, grid)
    for group in region_groups(qkv, index):
        selected = index[:, group]
        p = _weights(_read_regions(q, group), gather_regions(k, selected), scale)
        _write_regions(y, group, p @ gather_regions(v, selected))
    return out


def backward(qkv: Tensor, index: Tensor, do: Tensor, grid: Sequence[int], scale: float) -> Tensor:
    """Return the gradient of qkv from the contiguous inputs of `forward` and the gradient of its output."""
    q, k, v = qkv.unbind(3)
    k, v = split_regions(k, grid), split_regions(v, grid)
    dqkv = torch.empty_like(qkv)
    q, do, dq = _as_grid(q, grid), _as_grid(do, grid), _as_grid(dqkv[:, :, :, 0], grid)
    # many query regions add to one key region: accumulate in at least float32
    dk, dv = (torch.zeros_like(k, dtype=acc_dtype(k), memory_format=torch.contiguous_format) for _ in "kv")
    for group in region_groups(qkv, index):
        selected = index[:, group]
        q_g, do_g = _read_regions(q, group), _read_regions(do, group)
        k_g, v_g = gather_regions(k, selected), gather_regions(v, selected)
        p = _weights(q_g, k_g, scale)
        scatter_add_regions(dv, selected, p.mT @ do_g)
        dp = do_g @ v_g.mT
        ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        _write_regions(dq, group, ds @ k_g)
        scatter_add_regions(dk, selected, ds.mT @ q_g)
    size = (qkv.shape[1], qkv.shape[2])
    dqkv[:, :, :, 1] = merge_regions(dk, grid, size)
    del dk
    dqkv[:, :, :, 2] = merge_regions(dv, grid, size)
    return dqkv


def region_groups(qkv: Tensor, index: Tensor) -> Iterator[Tensor]:
    """Yield the numbers of the query regions of each group, as many as fit into the working size."""
    batch, regions, topk = index.shape
    pixels = qkv.shape[1] * qkv.shape[2] // regions
    heads, head_dim = qkv.shape[-2:]
    region_bytes = batch * heads * topk * pixels * 2 * (head_dim + pixels) * qkv.element_size()
    step = min(regions, max(1, working_bytes(qkv.device, cpu=GROUP_BYTES) // max(1, region_bytes)))
    yield from torch.arange(regions, device=qkv.device).split(step)


def _as_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    """View `[B, H, W, N, D]` as `[B, n_rows, n_cols, h, w, N, D]`."""
    return x.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1)).transpose(2, 3)


def _read_regions(x: Tensor, regions: Tensor) -> Tensor:
    """Copy some regions of a view by `_as_grid`: `[B, R', N, r, D]`."""
    cols = x.shape[2]
    return x[:, regions // cols, regions % cols].flatten(2, 3).transpose(2, 3)


def _write_regions(x: Tensor, regions: Tensor, value_BRNrD: Tensor) -> None:
    """Overwrite some regions of a view by `_as_grid`."""
    cols = x.shape[2]
    x[:, regions // cols, regions % cols] = value_BRNrD.transpose(2, 3).unflatten(2, x.shape[3:5])


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax weights `[B, R', N, r, j]` in the dtype of q; the softmax runs in at least float32."""
    return ((q * scale) @ k.mT).softmax(-1, dtype=acc_dtype(q)).to(q.dtype)
