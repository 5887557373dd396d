"""Routed attention in plain PyTorch that gathers the keys and values of only some query regions at a time.

The memory beside inputs and outputs is bounded: the backward gathers keys and values again, group by group, where
autograd on the reference would keep them for all regions. On the CPU, PyTorch's fused attention computes each group.

Suffixes: U = B * R regions of all images with r pixels each, j = K * r keys; other letters as in reference.py.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..precision import acc_dtype
from ..working_size import working_bytes

# Size of the buffers of one group on the CPU: large enough for efficient matrix products, small beside the model
GROUP_BYTES = 4 << 20

# Gathered copies cost more than attention to the whole map under a mask if regions have at most so many pixels and
# are routed to at least one region in so many.
WHOLE_MAP_PIXELS, WHOLE_MAP_REGIONS = 8, 4


def keeps_statistics(qkv: Tensor) -> bool:
    """Whether `backward` reads the output and the statistic of the softmax of `forward`."""
    return qkv.device.type == "cpu"


def forward(qkv: Tensor, index: Tensor, grid: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Contiguous qkv `[B, H, W, 3, N, D]` and index `[B, R, K]` -> out `[B, H, W, N, D]` and lse `[B, H, W, N]`.

    lse is the logarithm of the sum of each query's softmax; it is empty unless `keeps_statistics`.
    """
    index, grid, mask = _whole_map(qkv, index, grid)
    out, lse = qkv.new_empty(qkv.shape[:3] + qkv.shape[4:]), qkv.new_empty(0, dtype=acc_dtype(qkv))
    q_UrND, kv_UrCND = _to_regions(qkv[:, :, :, 0], grid), _to_regions(qkv[:, :, :, 1:], grid)
    groups = region_groups(qkv, index)
    parts = [_attention(q_UrND[g], _gather(kv_UrCND, i), scale, None if mask is None else mask[g]) for g, i in groups]
    y, statistics = zip(*parts, strict=True)
    _write_regions(out, torch.cat(y), grid)
    if keeps_statistics(qkv):
        lse = lse.new_empty(out.shape[:4])
        _write_regions(lse, torch.cat(statistics), grid)
    return out, lse


def backward(
    qkv: Tensor, index: Tensor, out: Tensor, lse: Tensor, do: Tensor, grid: Sequence[int], scale: float
) -> Tensor:
    """The gradient of qkv from the contiguous inputs and outputs of `forward` and the gradient of out."""
    index, grid, mask = _whole_map(qkv, index, grid)
    q_UrND, kv_UrCND = _to_regions(qkv[:, :, :, 0], grid), _to_regions(qkv[:, :, :, 1:], grid)
    kept = [_to_regions(x, grid) for x in ((do, out, lse) if keeps_statistics(qkv) else (do,))]
    dq_UrND = torch.empty_like(q_UrND, memory_format=torch.contiguous_format)
    # many query regions add to one key region: accumulate in at least float32
    dk_UrND, dv_UrND = torch.zeros(2, *q_UrND.shape, dtype=acc_dtype(qkv), device=qkv.device)
    for group, chosen in region_groups(qkv, index):
        inputs = q_UrND[group], _gather(kv_UrCND, chosen), scale, None if mask is None else mask[group]
        dq, dk, dv = _attention_backward(*inputs, *(x[group] for x in kept))
        dq_UrND[group] = dq
        for total, x in ((dk_UrND, dk), (dv_UrND, dv)):
            total.index_add_(0, chosen.flatten(), x.reshape(-1, *total.shape[1:]).to(total.dtype))
    dqkv = torch.empty_like(qkv)
    for i, x in enumerate((dq_UrND, dk_UrND, dv_UrND)):
        _write_regions(dqkv[:, :, :, i], x, grid)
    return dqkv


def region_groups(qkv: Tensor, index: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The groups, as many query regions as fit into the working size: their range, and the regions chosen by each.

    All images' regions are numbered in turn; the second entry is `[regions of the group, K]`.
    """
    batch, regions, topk = index.shape
    pixels = qkv.shape[1] * qkv.shape[2] // regions
    heads, head_dim = qkv.shape[-2:]
    weights = 0 if keeps_statistics(qkv) else pixels  # of each key; fused attention does not write them to memory
    region_bytes = heads * topk * pixels * 2 * (head_dim + weights) * qkv.element_size()
    step = max(1, working_bytes(qkv.device, cpu=GROUP_BYTES) // max(1, region_bytes))
    flat = (index + torch.arange(batch, device=index.device)[:, None, None] * regions).flatten(0, 1)
    for start in range(0, batch * regions, step):
        yield slice(start, start + step), flat[start : start + step]


def _whole_map(qkv: Tensor, index: Tensor, grid: Sequence[int]) -> tuple[Tensor, Sequence[int], Tensor | None]:
    """Index, grid and mask of the attention to compute: the arguments and None, or one region under a mask.

    The mask is added to the scores: `[B, 1, H*W, H*W]`, 0 at pixels of the chosen regions, else -inf.
    """
    (batch, height, width), (rows, cols), (_, regions, topk) = qkv.shape[:3], grid, index.shape
    h, w = height // rows, width // cols
    if topk < regions and (h * w > WHOLE_MAP_PIXELS or topk * WHOLE_MAP_REGIONS < regions):
        return index, grid, None
    mask = None
    if topk < regions:
        mask = qkv.new_full((batch, regions, regions), -float("inf")).scatter_(2, index, 0)
        pair = mask.view(batch, rows, 1, cols, 1, rows, 1, cols, 1)
        mask = pair.expand(-1, -1, h, -1, w, -1, h, -1, w).reshape(batch, 1, height * width, height * width)
    return index.new_zeros(batch, 1, 1), (1, 1), mask


def _as_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    """View `[B, H, W, ...]` as `[B, n_rows, n_cols, h, w, ...]`."""
    return x.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1)).transpose(2, 3)


def _to_regions(x: Tensor, grid: Sequence[int]) -> Tensor:
    """`[B, H, W, ...] -> [U, r, ...]`."""
    x = _as_grid(x, grid)
    return x.reshape(x.shape[:3].numel(), x.shape[3] * x.shape[4], *x.shape[5:])


def _write_regions(x: Tensor, value: Tensor, grid: Sequence[int]) -> None:
    """Overwrite `x` `[B, H, W, ...]` by the regions `[U, r, ...]`."""
    x = _as_grid(x, grid)
    x.copy_(value.reshape(x.shape))


def _gather(kv_UrCND: Tensor, chosen: Tensor) -> Tensor:
    """k and v `[U', j, 2, N, D]` of the regions `chosen` `[U', K]` by each of U' query regions."""
    picked = kv_UrCND.index_select(0, chosen.flatten())
    return picked.reshape(chosen.shape[0], -1, *picked.shape[2:])


def _attention(q: Tensor, kv: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """q `[U, r, N, D]`, k and v `[U, j, 2, N, D]` -> out `[U, r, N, D]` and lse `[U, r, N]`, empty unless kept."""
    q, k, v = (x.transpose(1, 2) for x in (q, *kv.unbind(2)))
    if keeps_statistics(q):
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
        return y.transpose(1, 2), lse.transpose(1, 2)
    y = _weights(q, k, scale, mask) @ v
    return y.transpose(1, 2), y.new_empty(0)


def _attention_backward(
    q: Tensor, kv: Tensor, scale: float, mask: Tensor | None, do: Tensor, *kept: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v; `kept` are out and lse of `_attention` if it keeps them."""
    q, k, v, do, *statistics = (x.transpose(1, 2) for x in (q, *kv.unbind(2), do, *kept))
    if statistics:
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, *statistics, 0.0, False, attn_mask=mask, scale=scale
        )
    else:
        p = _weights(q, k, scale, mask)
        dp = do @ v.mT
        ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        gradients = ds @ k, ds.mT @ q, p.mT @ do
    return tuple(x.transpose(1, 2) for x in gradients)


def _weights(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Softmax weights `[U, N, r, j]` in the dtype of q; the softmax runs in at least float32."""
    scores = (q * scale) @ k.mT
    if mask is not None:
        scores += mask
    return scores.softmax(-1, dtype=acc_dtype(q)).to(q.dtype)
