"""Halo attention: blocked local attention whose keys reach a few pixels beyond the block (HaloNet).

Shapes: W windows, one for each b x b block of each image; N heads of query width D and value width E; a block holds
s x s queries (s = b / stride), its window K x K keys (K = b + 2h). Suffixes in this file: q_WssND is [W, s, s, N, D].
"""

import torch
import torch.nn.functional as F
from timm.layers import make_divisible, register_notrace_module, trunc_normal_
from torch import Tensor, nn

# without gradients windows are worked through in groups whose relative logits stay near this size, so that they stay
# in cache and memory does not grow with the map
_GROUP_BYTES = 8 << 20


class _Projection(nn.Linear):
    """A linear map without bias that starts as a truncated normal of std in_features**-0.5."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        trunc_normal_(self.weight, std=self.in_features**-0.5)


@register_notrace_module
class Halo(nn.Module):
    """Attention of each b x b block to itself and h pixels around it: `x: [B, dim, H, W] -> [B, out_dim, H, W]`.

    For the query at row iy, column ix of its block and the key at row jy, column jx of its window, K = b + 2h wide,

        logit = head_dim**-0.5 q . k + q . height_rel[jy - iy + K - 1] + q . width_rel[jx - ix + K - 1]

    then softmax over the window, times v; heads share the two tables (Vaswani et al., arXiv 2103.12731, in the
    reading of timm's layer). There is no output projection. Keys and values outside the map are zeros that stay in
    the softmax, or with `mask_border` are left out of it. Maps that b does not divide are extended at the bottom and
    right in the same way, and the result is cropped.

    `head_dim` is the width of a query and key head (default: out_dim, rounded to a multiple of 8, over num_heads); a
    value head has out_dim / num_heads. With `stride=2` the result is `[B, out_dim, ceil(H/2), ceil(W/2)]`: every second
    pixel asks, and iy, ix count the pixels that ask; where b is odd all ask and the result is average-pooled.

    Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        out_dim: int | None = None,
        head_dim: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        mask_border: bool = False,
    ):
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        if num_heads < 1 or out_dim % num_heads:
            raise ValueError(f"Halo: out_dim={out_dim} must be divisible by num_heads={num_heads}")
        head_dim = make_divisible(out_dim) // num_heads if head_dim is None else head_dim
        if head_dim < 1:
            raise ValueError(
                f"Halo: head_dim={head_dim} must be at least 1; use fewer heads than num_heads={num_heads}"
            )
        if block_size < 1 or halo_size < 0:
            raise ValueError(f"Halo: block_size={block_size} must be at least 1 and halo_size={halo_size} at least 0")
        if stride not in (1, 2):
            raise ValueError(f"Halo: stride={stride} must be 1 or 2")
        pooled = stride == 2 and block_size % 2 == 1
        self.num_heads, self.block_size, self.halo_size = num_heads, block_size, halo_size
        self.query_stride, self.mask_border = 1 if pooled else stride, mask_border
        self.q = _Projection(dim, num_heads * head_dim)
        self.kv = _Projection(dim, num_heads * head_dim + out_dim)
        window = block_size + 2 * halo_size
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim))
        # maps of odd size end in a smaller pool, as a strided convolution would have it
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if pooled else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=table.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        step = self.query_stride
        y = halo_attention(
            self.q(x[:, ::step, ::step]).unflatten(-1, (self.num_heads, -1)),
            self.kv(x).unflatten(-1, (self.num_heads, -1)),
            self.height_rel,
            self.width_rel,
            block_size=self.block_size,
            halo_size=self.halo_size,
            stride=step,
            mask_border=self.mask_border,
        )
        return self.pool(y.flatten(3).permute(0, 3, 1, 2))


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
) -> Tensor:
    """The attention of `Halo` between its projections.

    `q: [B, ceil(H/stride), ceil(W/stride), N, D]`, `kv: [B, H, W, N, D + E]` with each head's keys before its values,
    tables `[2K - 1, D]`; returns `[B, ceil(H/stride), ceil(W/stride), N, E]`. The stride must divide the block.
    """
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
    return F.scaled_dot_product_attention(q_WNqD, k_WNkD, v_WNkE, bias_WNqk).transpose(1, 2)


def _relative_logits(q_WssND: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Each query times the table rows of its window's K rows, and of its K columns: both `[W, N, s, s, K]`."""
    windows, side, _, heads, _ = q_WssND.shape
    shape = (side, windows, side, heads, -1)
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
