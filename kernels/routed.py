"""Bi-level routed attention: each query region attends to the pixels of the regions it was routed to.

Shapes: B images, H x W pixels in a grid of R = n_rows * n_cols equal regions of r pixels each, N heads of width D,
K routed regions for each query region. Suffixes in this file: q_BRNrD is [B, R, N, r, D].

For query region i with routed regions I(i), head by head,

    y[p] = softmax over pixels j of all regions in I(i) of (scale * q[p] . k[j]) v[j]        p in region i

(BiFormer, arXiv 2303.08810, eq. 5-6 and algorithm 1, without the local branch).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._launch import autocast, choose_backend, common_reasons, library
from ._precision import at_least_float32

# name -> (B, (H, W), (n_rows, n_cols), N, D, K): stages of the published models at 224, 512 and detection sizes
CASES = {
    "tiny-stage1-224": (64, (56, 56), (7, 7), 2, 32, 1),
    "tiny-stage2-224": (64, (28, 28), (7, 7), 4, 32, 4),
    "tiny-stage3-224": (64, (14, 14), (7, 7), 8, 32, 16),
    "base-stage1-512": (2, (128, 128), (8, 8), 3, 32, 1),
    "base-stage2-512": (2, (64, 64), (8, 8), 6, 32, 4),
    "base-stage3-512": (2, (32, 32), (8, 8), 12, 32, 16),
    "base-stage1-800x1344": (2, (208, 336), (16, 16), 3, 32, 1),
    "base-stage3-800x1344": (2, (64, 96), (16, 16), 12, 32, 16),
}

# plain PyTorch works through the query regions in groups whose buffers stay near this size: large enough to keep the
# matrix products busy, small against the model
_GROUP_BYTES = 4 << 20


def routed_attention(
    qkv: Tensor, index: Tensor, *, grid: tuple[int, int], scale: float, backend: str | None = None
) -> Tensor:
    """Attention of each region over its routed regions, without a copy of keys and values per region.

    Args:
        qkv: `[B, H, W, 3, N, D]`, the projection's output as it comes; H and W divisible by the grid.
        index: `[B, R, K]` integers in [0, R): the regions each query region attends to, row-major, in any order.
        grid: regions per column and per row, (n_rows, n_cols); R is their product.
        scale: factor of the logits.
        backend: `auto`, `triton` or `reference`; None takes `TESSEL_KERNELS`.

    Returns:
        `[B, H, W, N, D]`. Only `qkv`, the result and one statistic per row are kept for the backward, which is
        deterministic and can be taken once (no double backward except on `reference`).

    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `backend="triton"` where it cannot run.
    """
    _check(qkv, index, grid)
    qkv = autocast(qkv)
    reasons = routed_attention_unsupported(qkv, index, grid=grid)
    chosen = choose_backend("routed_attention", backend, reasons)
    # an exported graph should not need this package to run
    if chosen == "reference" or (chosen == "auto" and torch.compiler.is_exporting()):
        return routed_attention_reference(qkv, index, grid=grid, scale=scale)
    return _RoutedAttention.apply(qkv, index, grid, scale, chosen == "triton")


def routed_attention_reference(qkv: Tensor, index: Tensor, *, grid: tuple[int, int], scale: float) -> Tensor:
    """The definition of `routed_attention`: gather the routed keys and values, then ordinary attention."""
    q_BRNrD, k_BRNrD, v_BRNrD = _to_regions(qkv, grid).unbind(3)
    k_BRNjD, v_BRNjD = _gather(k_BRNrD, index), _gather(v_BRNrD, index)
    logits_BRNrj = (q_BRNrD * scale) @ k_BRNjD.mT
    weights_BRNrj = logits_BRNrj.softmax(-1, dtype=at_least_float32(qkv)).to(qkv.dtype)
    return _from_regions(weights_BRNrj @ v_BRNjD, grid, (qkv.shape[1], qkv.shape[2]))


def routed_attention_unsupported(qkv: Tensor, index: Tensor, *, grid: tuple[int, int]) -> list[str]:
    """Why the Triton kernel cannot serve these tensors; empty where it can."""
    return common_reasons(qkv, head_dim=qkv.shape[-1])


def _check(qkv: Tensor, index: Tensor, grid: tuple[int, int]) -> None:
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"routed_attention: qkv must be [B, H, W, 3, heads, head_dim], got shape={tuple(qkv.shape)}")
    (height, width), (rows, cols) = qkv.shape[1:3], grid
    if height % rows or width % cols:
        raise ValueError(
            f"routed_attention: H={height}, W={width} must be divisible by grid={rows}x{cols}; pad the map first"
        )
    if index.dim() != 3 or index.shape[0] != qkv.shape[0] or index.shape[1] != rows * cols:
        raise ValueError(
            f"routed_attention: index must be [B={qkv.shape[0]}, R={rows * cols}, K], got shape={tuple(index.shape)}"
        )


def _to_regions(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, H, W, ..., N, D]` -> `[B, R, N, ..., r, D]` with one or no axis between W and N (moved behind N)."""
    rows, cols = grid
    x = x.unflatten(2, (cols, -1)).unflatten(1, (rows, -1)).transpose(2, 3)  # [B, rows, cols, h, w, ..., N, D]
    x = x.flatten(3, 4).flatten(1, 2)  # [B, R, r, ..., N, D]
    return x.movedim(2, -2) if x.dim() == 5 else x.permute(0, 1, 4, 3, 2, 5)


def _from_regions(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """`[B, R, N, r, D]` -> `[B, H, W, N, D]`, the inverse of `_to_regions`."""
    (rows, cols), (height, width) = grid, size
    x = x.movedim(-2, 2).unflatten(2, (height // rows, width // cols)).unflatten(1, (rows, cols))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """`[B, R, N, r, D]`, `[B, R', K]` -> `[B, R', N, K*r, D]`: the pixels of the selected regions, in order."""
    batch, regions = x.shape[:2]
    flat = index + torch.arange(batch, device=index.device)[:, None, None] * regions
    picked = x.flatten(0, 1).index_select(0, flat.flatten())  # [B*R'*K, N, r, D]
    return picked.unflatten(0, index.shape).transpose(2, 3).flatten(3, 4)


def _groups(qkv: Tensor, index: Tensor) -> Iterator[Tensor]:
    """Query regions in runs whose gathered keys, values and weights fit the working size."""
    batch, regions, topk = index.shape
    pixels = qkv.shape[1] * qkv.shape[2] // regions
    heads, width = qkv.shape[-2:]
    one_region = batch * heads * topk * pixels * 2 * (width + pixels) * qkv.element_size()
    step = min(regions, max(1, _GROUP_BYTES // max(1, one_region)))
    yield from torch.arange(regions, device=qkv.device).split(step)


class _RegionView:
    """A map `[B, H, W, N, D]` read and written some regions at a time, as `[B, R', N, r, D]`."""

    def __init__(self, x: Tensor, grid: tuple[int, int]):
        self.cols = grid[1]
        self.view = x.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1)).transpose(2, 3)

    def __getitem__(self, regions: Tensor) -> Tensor:
        picked = self.view[:, regions // self.cols, regions % self.cols]  # [B, R', h, w, N, D]
        return picked.flatten(2, 3).transpose(2, 3)

    def __setitem__(self, regions: Tensor, value: Tensor) -> None:
        pixels = value.transpose(2, 3).unflatten(2, self.view.shape[3:5])
        self.view[:, regions // self.cols, regions % self.cols] = pixels


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax weights `[B, R, N, r, j]` in the type of q, the softmax in at least float32."""
    return ((q * scale) @ k.mT).softmax(-1, dtype=at_least_float32(q)).to(q.dtype)


def _forward_grouped(qkv: Tensor, index: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
    q, k, v = qkv.unbind(3)
    k, v = _to_regions(k, grid), _to_regions(v, grid)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q, y = _RegionView(q, grid), _RegionView(out, grid)
    for group in _groups(qkv, index):
        picked = index[:, group]
        y[group] = _weights(q[group], _gather(k, picked), scale) @ _gather(v, picked)
    return out


def _backward_grouped(qkv: Tensor, index: Tensor, grad: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
    q, k, v = qkv.unbind(3)
    k, v = _to_regions(k, grid), _to_regions(v, grid)
    dqkv = torch.empty_like(qkv)
    q, dy, dq = _RegionView(q, grid), _RegionView(grad, grid), _RegionView(dqkv[:, :, :, 0], grid)
    # many query regions add into one key region: sum in at least float32
    dk, dv = (torch.zeros_like(k, dtype=at_least_float32(k), memory_format=torch.contiguous_format) for _ in "kv")
    for group in _groups(qkv, index):
        picked = index[:, group]
        q_g, k_g, v_g, dy_g = q[group], _gather(k, picked), _gather(v, picked), dy[group]
        p = _weights(q_g, k_g, scale)
        _scatter_add(dv, picked, p.mT @ dy_g)
        dp = dy_g @ v_g.mT
        ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        dq[group] = ds @ k_g
        _scatter_add(dk, picked, ds.mT @ q_g)
    size = (qkv.shape[1], qkv.shape[2])
    dqkv[:, :, :, 1] = _from_regions(dk, grid, size)
    del dk
    dqkv[:, :, :, 2] = _from_regions(dv, grid, size)
    return dqkv


def _scatter_add(total: Tensor, index: Tensor, x: Tensor) -> None:
    """Add `[B, R', N, K*r, D]` into the selected regions of `total` `[B, R, N, r, D]`: the adjoint of `_gather`."""
    batch, regions, _, pixels, _ = total.shape
    flat = index + torch.arange(batch, device=index.device)[:, None, None] * regions
    x = x.unflatten(3, (index.shape[2], pixels)).transpose(2, 3).flatten(0, 2)
    total.view(batch * regions, *total.shape[2:]).index_add_(0, flat.flatten(), x.to(total.dtype))


library.define(
    "routed_attention(Tensor qkv, Tensor index, int[] grid, float scale, bool triton) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "routed_attention_backward(Tensor qkv, Tensor index, Tensor out, Tensor lse, Tensor grad, int[] grid, float scale,"
    " bool triton) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(qkv, index, grid, scale, triton):
    qkv, index = qkv.contiguous(), index.contiguous()
    if triton and qkv.numel():
        from .routed_triton import forward

        return forward(qkv, index, grid, scale)
    return _forward_grouped(qkv, index, grid, scale), qkv.new_empty(0)


def _backward(qkv, index, out, lse, grad, grid, scale, triton):
    qkv, index, grad = qkv.contiguous(), index.contiguous(), grad.contiguous()
    if triton and qkv.numel():
        from .routed_triton import backward

        return backward(qkv, index, out.contiguous(), lse, grad, grid, scale)
    return _backward_grouped(qkv, index, grad, grid, scale)


def _forward_fake(qkv, index, grid, scale, triton):
    out = qkv.new_empty(qkv.shape[:3] + qkv.shape[4:])
    lse = out.new_empty(out.shape[:4], dtype=at_least_float32(qkv)) if triton else qkv.new_empty(0)
    return out, lse


def _backward_fake(qkv, index, out, lse, grad, grid, scale, triton):
    return qkv.new_empty(qkv.shape)


library.impl("routed_attention", _forward, "CompositeExplicitAutograd")
library.impl("routed_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("tessel::routed_attention", _forward_fake, lib=library)
torch.library.register_fake("tessel::routed_attention_backward", _backward_fake, lib=library)


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, index, grid, scale, triton):
        out, lse = torch.ops.tessel.routed_attention(qkv, index, grid, scale, triton)
        # plain PyTorch recomputes the weights; only the kernel needs the result and its statistic again
        ctx.save_for_backward(qkv, index, out if triton else lse, lse)
        ctx.settings = (grid, scale, triton)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dqkv = torch.ops.tessel.routed_attention_backward(*ctx.saved_tensors, grad, *ctx.settings)
        return dqkv, None, None, None, None


@register_flop_formula(torch.ops.tessel.routed_attention)
def _forward_flops(qkv, index, grid, scale, triton, *args, out_shape=None, **kwargs) -> int:
    batch, height, width, _, heads, head_dim = qkv
    keys = index[-1] * (height // grid[0]) * (width // grid[1])
    return 4 * batch * height * width * heads * head_dim * keys


@register_flop_formula(torch.ops.tessel.routed_attention_backward)
def _backward_flops(qkv, index, out, lse, grad, grid, scale, triton, *args, out_shape=None, **kwargs) -> int:
    # five products of the same size, where the forward has two
    return 5 * _forward_flops(qkv, index, grid, scale, triton) // 2
