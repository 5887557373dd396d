"""Halo attention in plain PyTorch: the definition that the Triton kernels are tested against.

Shapes: B images, H x W pixels (keys) in blocks of b x b. Queries are subsampled by `stride` in both directions, so a
block holds s x s queries (s = b / stride); its window has K x K keys (K = b + 2h with halo size h). N heads with query
and key dim D and value dim E. Suffixes in this file: q_WssND is [W, s, s, N, D] with W windows, one for each block of
each image; F is D + E.

For the query at row iy, column ix of its block and the key at row jy, column jx of its window,

    logit = D**-0.5 q . k + q . height_rel[jy - iy + K - 1] + q . width_rel[jx - ix + K - 1]

then softmax over the window, times v (Vaswani et al., arXiv 2103.12731, as timm's layer implements it). Keys and values
outside the map are zero and stay in the softmax, unless `mask_border` masks them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recording import compact, crop, exporting, is_open
from ..sdpa import fused_attention
from ..working_size import working_bytes

# Without gradients, windows are computed in chunks whose relative logits take about this many bytes on the CPU: they
# stay in cache and memory does not grow with the map.
CHUNK_BYTES = 8 << 20


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
    """Copy every window, expand its relative logits, then ordinary attention; arguments as in `halo_attention`."""
    batch, height, width = kv.shape[:3]
    # not -(-height // block_size): in ONNX the quotient of a negative number is rounded towards zero
    rows, cols = (height + block_size - 1) // block_size, (width + block_size - 1) // block_size
    side = block_size // stride
    q_WssND = split_blocks(q, side, rows, cols)
    kv_WKKNF = _windows(kv, block_size, halo_size, rows, cols)
    tables = _shifted_tables(height_rel, side), _shifted_tables(width_rel, side)
    outside = _outside(kv, block_size, halo_size, rows, cols) if mask_border else None

    windows, keys = q_WssND.shape[0], kv_WKKNF.shape[1] * kv_WKKNF.shape[2]
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or exporting()
    window_bytes = q.shape[3] * side * side * keys * q.element_size()
    # the number of windows comes last: comparing it would fix the batch size of a recorded graph
    if whole or windows <= (chunk := max(1, working_bytes(q.device, cpu=CHUNK_BYTES) // window_bytes)):
        y_WqNE = attend_windows(q_WssND, kv_WKKNF, tables, outside)
    else:
        chunks = [slice(start, start + chunk) for start in range(0, windows, chunk)]
        masks = [None if outside is None else outside[c] for c in chunks]
        y_WqNE = torch.cat(
            [attend_windows(q_WssND[c], kv_WKKNF[c], tables, mask) for c, mask in zip(chunks, masks, strict=True)]
        )
    # batch and rows of blocks as one axis: XNNPACK (ExecuTorch) has at most 6 axes
    y = y_WqNE.unflatten(1, (side, side)).unflatten(0, (batch * rows, cols)).transpose(1, 2)
    y = compact(y).flatten(2, 3).unflatten(0, (batch, rows)).flatten(1, 2)
    return crop(y, q.shape[1], q.shape[2])


def attend_windows(q_WssND: Tensor, kv_WKKNF: Tensor, tables: tuple[Tensor, Tensor], outside: Tensor | None) -> Tensor:
    """Attention inside each window, `[W, s*s, N, E]`."""
    h_WNssK, w_WNssK = _relative_logits(q_WssND, tables)
    if outside is not None:
        # the sum below is -inf if either part is
        h_WNssK = h_WNssK.masked_fill(outside[:, 0, None, None, None], -torch.inf)
        w_WNssK = w_WNssK.masked_fill(outside[:, 1, None, None, None], -torch.inf)
    bias_WNqk = (h_WNssK.unsqueeze(-1) + w_WNssK.unsqueeze(-2)).flatten(4).flatten(2, 3)
    q_WNqD = q_WssND.flatten(1, 2).transpose(1, 2)
    kv_WNkF = kv_WKKNF.flatten(1, 2).transpose(1, 2)
    head_dim = q_WssND.shape[-1]
    k_WNkD, v_WNkE = kv_WNkF.split((head_dim, kv_WNkF.shape[-1] - head_dim), -1)
    return fused_attention(q_WNqD, k_WNkD, v_WNkE, bias_WNqk).transpose(1, 2)


def _relative_logits(q_WssND: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Each query times the table rows of its window's K rows, and of its K columns: both `[W, N, s, s, K]`."""
    # move the axis whose tables differ to the front: one matrix product for each of its s positions
    h_sWsNK = _by_position(q_WssND.transpose(0, 1), tables[0])
    w_sWsNK = _by_position(q_WssND.permute(2, 0, 1, 3, 4), tables[1])
    return h_sWsNK.permute(1, 3, 0, 2, 4).contiguous(), w_sWsNK.permute(1, 3, 2, 0, 4).contiguous()


def _by_position(q_sWsND: Tensor, table_sDK: Tensor) -> Tensor:
    """The queries times the table of their position, `[s, W, s, N, K]`."""
    q, shape = q_sWsND.flatten(1, 3), (*q_sWsND.shape[:-1], table_sDK.shape[2])
    if not exporting():
        return (q @ table_sDK).view(shape)
    # the table first: the optimizer of ONNX graphs broadcasts it wrongly otherwise (docs/upstream.md)
    return compact((table_sDK.transpose(1, 2) @ q.transpose(1, 2)).transpose(1, 2)).reshape(shape)


def _shifted_tables(table: Tensor, side: int) -> Tensor:
    """`[2K - 1, D] -> [s, D, K]`: for each query position i in 0..s-1 the rows j - i + K - 1 with j in 0..K-1."""
    window = (table.shape[0] + 1) // 2
    return table.unfold(0, window, 1)[window - side :].flip(0)


def split_blocks(x: Tensor, side: int, rows: int, cols: int) -> Tensor:
    """`[B, H, W, N, D] -> [B*rows*cols, s, s, N, D]`, zero-padded at the bottom and right."""
    below, right = rows * side - x.shape[1], cols * side - x.shape[2]
    if is_open(below) or is_open(right) or below or right:
        x = F.pad(x, (0, 0, 0, 0, 0, right, 0, below))
    x = x.unflatten(1, (rows, side)).flatten(0, 1).unflatten(2, (cols, side))  # [B*rows, s, cols, s, N, D]
    return compact(x.transpose(1, 2)).flatten(0, 1)


def _windows(kv: Tensor, block_size: int, halo_size: int, rows: int, cols: int) -> Tensor:
    """`[B, H, W, N, F] -> [B*rows*cols, K, K, N, F]`, zeros outside the map."""
    below = rows * block_size - kv.shape[1] + halo_size
    right = cols * block_size - kv.shape[2] + halo_size
    window = block_size + 2 * halo_size
    heads = kv.shape[3:]
    kv = F.pad(kv, (0, 0, 0, 0, halo_size, right, halo_size, below)).flatten(3)
    if kv.device.type == "cpu" and not exporting():
        # on the CPU the backward of `unfold` takes much longer than the backward of an embedding
        pixels = torch.arange(kv[..., 0].numel(), device=kv.device).view(kv.shape[:3])
        pixels = pixels.unfold(1, window, block_size).unfold(2, window, block_size)
        return F.embedding(pixels.flatten(0, 2), kv.flatten(0, 2)).unflatten(-1, heads)
    windows = kv.unfold(1, window, block_size).unfold(2, window, block_size)  # [B, rows, cols, N*F, K, K]
    return compact(windows.permute(0, 1, 2, 4, 5, 3)).flatten(0, 2).unflatten(-1, heads)


def _outside(kv: Tensor, block_size: int, halo_size: int, rows: int, cols: int) -> Tensor:
    """Which rows and which columns of each window lie outside the map: `[B*rows*cols, 2, K]`, boolean."""

    def outside(size: int, blocks: int) -> Tensor:
        start = torch.arange(blocks, device=kv.device) * block_size - halo_size
        position = start[:, None] + torch.arange(block_size + 2 * halo_size, device=kv.device)
        return (position < 0) | (position >= size)

    batch, height, width = kv.shape[:3]
    outside_rows = outside(height, rows)[:, None].expand(-1, cols, -1)
    outside_cols = outside(width, cols)[None].expand(rows, -1, -1)
    return torch.stack((outside_rows, outside_cols), 2).flatten(0, 1).repeat(batch, 1, 1)
