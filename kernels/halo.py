"""Halo attention: blocked local attention whose keys reach a few pixels beyond the block (HaloNet).

Shapes: B images, H x W pixels of keys in b x b blocks, of which every `stride`-th row and column asks, so that a block
holds s x s queries (s = b / stride); its window has K x K keys (K = b + 2h). N heads of query and key width D and value
width E. Suffixes in this file: q_WssND is [W, s, s, N, D], W windows, one for each block of each image.

For the query at row iy, column ix of its block and the key at row jy, column jx of its window,

    logit = D**-0.5 q . k + q . height_rel[jy - iy + K - 1] + q . width_rel[jx - ix + K - 1]

then softmax over the window, times v (Vaswani et al., arXiv 2103.12731, in the reading of timm's layer). Keys and
values outside the map are zeros that stay in the softmax, or with `mask_border` are left out of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._launch import autocast, choose_backend, common_reasons, library
from ._precision import at_least_float32
from ._sdpa import fused_attention

# name -> (B, (H, W), N, D, E, b, h, stride): stages of the published models at their own and at detection sizes
CASES = {
    "50ts-stage2-256": (64, (32, 32), 4, 32, 32, 8, 3, 1),
    "50ts-stage3-256": (64, (16, 16), 8, 32, 32, 8, 3, 1),
    "50ts-stage4-256": (64, (8, 8), 8, 64, 64, 8, 3, 1),
    "h1-stage1-256": (64, (64, 64), 8, 8, 8, 8, 3, 1),
    "h1-stage2-entry-256": (64, (64, 64), 8, 16, 16, 8, 3, 2),
    "h1-stage2-256": (64, (32, 32), 8, 16, 16, 8, 3, 1),
    "h1-stage3-256": (64, (16, 16), 8, 32, 32, 8, 3, 1),
    "h5-stage2-448": (16, (56, 56), 8, 16, 40, 14, 2, 1),
    "50ts-stage2-800x1344": (2, (100, 168), 4, 32, 32, 8, 3, 1),
    "50ts-stage3-800x1344": (2, (50, 84), 8, 32, 32, 8, 3, 1),
}

# without gradients windows are worked through in groups whose relative logits stay near this size, so that they stay
# in cache and memory does not grow with the map
_GROUP_BYTES = 8 << 20

_MOST_KEYS = 4096  # of one window, in the kernels


def halo_attention(
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    *,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    mask_border: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention of each block of queries to its block of keys and `halo_size` pixels around it.

    Args:
        q: `[B, ceil(H / stride), ceil(W / stride), N, D]`, the pixels that ask.
        kv: `[B, H, W, N, D + E]`, each head's keys before its values.
        height_rel: `[2K - 1, D]`, added to the keys by vertical distance; iy counts the rows that ask.
        width_rel: `[2K - 1, D]`, likewise horizontally. The heads share both.
        block_size: b, a multiple of `stride`; the last blocks of a map may reach beyond it.
        backend: `auto`, `triton` or `reference`; None takes `TESSEL_KERNELS`.

    Returns:
        `[B, ceil(H / stride), ceil(W / stride), N, E]`. On `triton` the backward is deterministic, keeps the relative
        logits to single rows and columns, the result and one statistic per query, and can be taken once.

    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `backend="triton"` where it cannot run.
    """
    _check(q, kv, height_rel, width_rel, block_size, halo_size, stride)
    q, kv = autocast(q), autocast(kv)
    reasons = halo_attention_unsupported(q, kv, block_size=block_size, halo_size=halo_size)
    if choose_backend("halo_attention", backend, reasons) == "triton":
        rel = _reachable_logits(q, height_rel, width_rel, block_size // stride)
        return _HaloAttention.apply(q, kv, rel, block_size, halo_size, stride, mask_border)
    return halo_attention_reference(
        q, kv, height_rel, width_rel, block_size=block_size, halo_size=halo_size, stride=stride, mask_border=mask_border
    )


def halo_attention_reference(
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    *,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    mask_border: bool = False,
) -> Tensor:
    """The definition of `halo_attention`: every window copied out of the map, its logits expanded, then attention."""
    batch, height, width = kv.shape[:3]
    rows, cols = -(-height // block_size), -(-width // block_size)
    side = block_size // stride
    q_WssND = _blocks(q, side, rows, cols)
    kv_WKKNF = _windows(kv, block_size, halo_size, rows, cols)
    tables = _slide(height_rel, side), _slide(width_rel, side)
    outside = _outside(kv, block_size, halo_size, rows, cols) if mask_border else None

    windows, keys = q_WssND.shape[0], kv_WKKNF.shape[1] * kv_WKKNF.shape[2]
    group = max(1, _GROUP_BYTES // (q.shape[3] * side * side * keys * q.element_size()))
    if windows <= group or torch.is_grad_enabled() or torch.compiler.is_compiling():
        y_WqNE = _attend(q_WssND, kv_WKKNF, tables, outside)
    else:
        parts = [slice(start, start + group) for start in range(0, windows, group)]
        masks = [None if outside is None else outside[part] for part in parts]
        y_WqNE = torch.cat(
            [_attend(q_WssND[p], kv_WKKNF[p], tables, mask) for p, mask in zip(parts, masks, strict=True)]
        )
    y = y_WqNE.unflatten(1, (side, side)).unflatten(0, (batch, rows, cols)).transpose(2, 3)
    return y.flatten(3, 4).flatten(1, 2)[:, : q.shape[1], : q.shape[2]]


def halo_attention_unsupported(q: Tensor, kv: Tensor, *, block_size: int, halo_size: int) -> list[str]:
    """Why the Triton kernels cannot serve these tensors; empty where they can."""
    reasons = common_reasons(q, head_dim=q.shape[-1])
    value_dim, keys = kv.shape[-1] - q.shape[-1], (block_size + 2 * halo_size) ** 2
    if value_dim % 8 or value_dim > 128:
        reasons.append(f"value_dim={value_dim} is not a multiple of 8 up to 128")
    if kv.dtype != q.dtype:
        reasons.append(f"kv.dtype={kv.dtype} is not q.dtype={q.dtype}")
    if keys > _MOST_KEYS:
        reasons.append(f"the window of block_size + 2 * halo_size squared has {keys} keys, more than {_MOST_KEYS}")
    return reasons


def _check(
    q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, block_size: int, halo_size: int, stride: int
) -> None:
    if block_size < 1 or halo_size < 0 or stride < 1 or block_size % stride:
        raise ValueError(
            f"halo_attention: block_size={block_size} must be at least 1 and divisible by stride={stride}, "
            f"halo_size={halo_size} at least 0"
        )
    if q.dim() != 5 or kv.dim() != 5 or kv.shape[-1] <= q.shape[-1]:
        raise ValueError(
            "halo_attention: q must be [B, ceil(H/stride), ceil(W/stride), heads, D] and kv [B, H, W, heads, D + E], "
            f"got shapes {tuple(q.shape)} and {tuple(kv.shape)}"
        )
    batch, height, width, heads, _ = kv.shape
    expected = (batch, (height + stride - 1) // stride, (width + stride - 1) // stride, heads)
    if q.shape[:4] != expected:
        raise ValueError(
            f"halo_attention: q must be {(*expected, 'D')} for kv of shape={tuple(kv.shape)} and stride={stride}, "
            f"got shape={tuple(q.shape)}"
        )
    table = (2 * (block_size + 2 * halo_size) - 1, q.shape[-1])
    if height_rel.shape != table or width_rel.shape != table:
        raise ValueError(
            f"halo_attention: height_rel and width_rel must be {table} for block_size={block_size}, "
            f"halo_size={halo_size}, got shapes {tuple(height_rel.shape)} and {tuple(width_rel.shape)}"
        )


def _attend(q_WssND: Tensor, kv_WKKNF: Tensor, tables: tuple[Tensor, Tensor], outside: Tensor | None) -> Tensor:
    """Attention inside each window, `[W, s*s, N, E]`."""
    h_WNssK, w_WNssK = _relative_logits(q_WssND, tables)
    if outside is not None:
        # the sum below is -inf where either is
        h_WNssK = h_WNssK.masked_fill(outside[:, 0, None, None, None], -torch.inf)
        w_WNssK = w_WNssK.masked_fill(outside[:, 1, None, None, None], -torch.inf)
    bias_WNqk = (h_WNssK.unsqueeze(-1) + w_WNssK.unsqueeze(-2)).flatten(4).flatten(2, 3)
    q_WNqD = q_WssND.flatten(1, 2).transpose(1, 2)
    kv_WNkF = kv_WKKNF.flatten(1, 2).transpose(1, 2)
    head_dim = q_WssND.shape[-1]
    k_WNkD, v_WNkE = kv_WNkF[..., :head_dim], kv_WNkF[..., head_dim:]
    return fused_attention(q_WNqD, k_WNkD, v_WNkE, bias_WNqk).transpose(1, 2)


def _relative_logits(q_WssND: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Each query times the table rows of its window's K rows, and of its K columns: both `[W, N, s, s, K]`."""
    windows, side, _, heads, _ = q_WssND.shape
    shape = (side, windows, side, heads, tables[0].shape[2])
    # the axis whose tables differ goes first: one matrix product for each of its s positions
    h_sWsNK = (q_WssND.transpose(0, 1).flatten(1, 3) @ tables[0]).view(shape)
    w_sWsNK = (q_WssND.permute(2, 0, 1, 3, 4).flatten(1, 3) @ tables[1]).view(shape)
    return h_sWsNK.permute(1, 3, 0, 2, 4).contiguous(), w_sWsNK.permute(1, 3, 2, 0, 4).contiguous()


def _slide(table: Tensor, side: int) -> Tensor:
    """`[2K - 1, D] -> [s, D, K]`: the rows j - i + K - 1, j in 0..K-1, for each i in 0..s-1."""
    window = (table.shape[0] + 1) // 2
    return table.unfold(0, window, 1)[window - side :].flip(0)


def _blocks(q: Tensor, side: int, rows: int, cols: int) -> Tensor:
    """`[B, H, W, N, D] -> [B*rows*cols, s, s, N, D]`, zeros at the bottom and right where blocks reach beyond."""
    below, right = rows * side - q.shape[1], cols * side - q.shape[2]
    if below or right:
        q = F.pad(q, (0, 0, 0, 0, 0, right, 0, below))
    return q.unflatten(2, (cols, side)).unflatten(1, (rows, side)).transpose(2, 3).flatten(0, 2)


def _windows(kv: Tensor, block_size: int, halo_size: int, rows: int, cols: int) -> Tensor:
    """`[B, H, W, N, F] -> [B*rows*cols, K, K, N, F]`, zeros outside the map."""
    below = rows * block_size - kv.shape[1] + halo_size
    right = cols * block_size - kv.shape[2] + halo_size
    window = block_size + 2 * halo_size
    kv = F.pad(kv, (0, 0, 0, 0, halo_size, right, halo_size, below))
    windows = kv.unfold(1, window, block_size).unfold(2, window, block_size)  # [B, rows, cols, N, F, K, K]
    return windows.permute(0, 1, 2, 5, 6, 3, 4).flatten(0, 2)


def _outside(kv: Tensor, block_size: int, halo_size: int, rows: int, cols: int) -> Tensor:
    """Which rows and which columns of each window lie outside the map: `[B*rows*cols, 2, K]`, boolean."""

    def beyond(size: int, blocks: int) -> Tensor:
        start = torch.arange(blocks, device=kv.device) * block_size - halo_size
        at = start[:, None] + torch.arange(block_size + 2 * halo_size, device=kv.device)
        return (at < 0) | (at >= size)

    batch, height, width = kv.shape[:3]
    above = beyond(height, rows)[:, None].expand(-1, cols, -1)
    aside = beyond(width, cols)[None].expand(rows, -1, -1)
    return torch.stack((above, aside), 2).flatten(0, 1).repeat(batch, 1, 1)


def relative_columns(window: int, side: int) -> int:
    """Rows of a table that the queries of a block can reach, in a number that keeps matrix products aligned."""
    return -(-(window + side - 1) // 4) * 4


def _reachable_logits(q: Tensor, height_rel: Tensor, width_rel: Tensor, side: int) -> Tensor:
    """Each query times the table rows that its block can reach: `[B, Hq, Wq, N, 2, columns]`.

    Column j - i + side - 1 belongs to row (or column) j of the window and i of the block. One matrix product for both
    tables and all i: the kernels pick K of the columns as they load.
    """
    window = (height_rel.shape[0] + 1) // 2
    reach = window + side - 1
    tables = torch.stack((height_rel, width_rel))[:, -reach:]
    tables = F.pad(tables, (0, 0, 0, relative_columns(window, side) - reach))
    return (q @ tables.flatten(0, 1).mT).unflatten(-1, (2, -1))


_SIZES = "int block_size, int halo_size, int stride, bool mask_border"
library.define(
    f"halo_attention(Tensor q, Tensor kv, Tensor rel, {_SIZES}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    f"halo_attention_backward(Tensor q, Tensor kv, Tensor rel, Tensor out, Tensor lse, Tensor grad, {_SIZES})"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(q, kv, rel, block_size, halo_size, stride, mask_border):
    if not q.numel():
        return _forward_fake(q, kv, rel, block_size, halo_size, stride, mask_border)
    from .halo_triton import forward

    q, kv, rel = (x.contiguous() for x in (q, kv, rel))
    return forward(q, kv, rel, block_size, halo_size, stride, mask_border)


def _backward(q, kv, rel, out, lse, grad, block_size, halo_size, stride, mask_border):
    if not q.numel():
        return _backward_fake(q, kv, rel, out, lse, grad, block_size, halo_size, stride, mask_border)
    from .halo_triton import backward

    q, kv, rel, out, lse, grad = (x.contiguous() for x in (q, kv, rel, out, lse, grad))
    return backward(q, kv, rel, out, lse, grad, block_size, halo_size, stride, mask_border)


def _forward_fake(q, kv, rel, block_size, halo_size, stride, mask_border):
    out = q.new_empty(*q.shape[:4], kv.shape[-1] - q.shape[-1])
    return out, q.new_empty(q.shape[:4], dtype=at_least_float32(q))


def _backward_fake(q, kv, rel, out, lse, grad, block_size, halo_size, stride, mask_border):
    return q.new_empty(q.shape), kv.new_empty(kv.shape), rel.new_empty(rel.shape)


library.impl("halo_attention", _forward, "CompositeExplicitAutograd")
library.impl("halo_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("tessel::halo_attention", _forward_fake, lib=library)
torch.library.register_fake("tessel::halo_attention_backward", _backward_fake, lib=library)


class _HaloAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, rel, *sizes):
        out, lse = torch.ops.tessel.halo_attention(q, kv, rel, *sizes)
        ctx.save_for_backward(q, kv, rel, out, lse)
        ctx.sizes = sizes
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grads = torch.ops.tessel.halo_attention_backward(*ctx.saved_tensors, grad, *ctx.sizes)
        return *grads, None, None, None, None


def _pairs(q, block_size: int, halo_size: int) -> int:
    """Pairs of a query and a key of its window, over all heads and images."""
    return q[0] * q[1] * q[2] * q[3] * (block_size + 2 * halo_size) ** 2


@register_flop_formula(torch.ops.tessel.halo_attention)
def _forward_flops(q, kv, rel, block_size, halo_size, stride, mask_border, *args, out_shape=None, **kwargs) -> int:
    return 2 * _pairs(q, block_size, halo_size) * kv[-1]


@register_flop_formula(torch.ops.tessel.halo_attention_backward)
def _backward_flops(
    q, kv, rel, out, lse, grad, block_size, halo_size, stride, mask_border, *args, out_shape=None, **kwargs
) -> int:
    # three products of the width of the keys, two of the width of the values
    return 2 * _pairs(q, block_size, halo_size) * (2 * kv[-1] + q[-1])
