"""Halo attention (HaloNet)."""

import torch
from timm.layers import make_divisible, register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..kernels import halo_attention
from .explanation import Explanation, Pixel, attention, gradient_at
from .linear import apply_linear
from .registry import divisor, token_mixer


@token_mixer("halo", fixed=("out_dim", "stride"), num_heads=divisor(8))
@register_notrace_module
class Halo(nn.Module):
    """Attention of each b x b block to itself and h pixels around it; `x: [B, dim, H, W] -> [B, out_dim, H, W]`.

    For the query at row iy and column ix of its block, and the key at row jy and column jx of the K x K window around
    the block, K = b + 2h,

        logit = head_dim**-0.5 q . k + q . height_rel[jy - iy + K - 1] + q . width_rel[jx - ix + K - 1]

    The softmax of the logits over the window is multiplied by v; all heads share the two tables (Vaswani et al., arXiv
    2103.12731, as implemented in timm). There is no output projection. Keys and values outside the map are zero; they
    are not masked unless `mask_border` is true. If b does not divide H or W, the map is extended at the bottom and
    right in the same way, and the result is cropped.

    b is `block_size`, h `halo_size`. `head_dim` is the width of a query and key head, by default out_dim, rounded to a
    multiple of 8, over num_heads; a value head has out_dim / num_heads. With `stride=2` only every second row and
    column has queries, iy and ix count these, and the result is `[B, out_dim, ceil(H/2), ceil(W/2)]`. If b is odd, all
    pixels have queries and the result is average-pooled instead.

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
        self.q = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.kv = nn.Linear(dim, num_heads * head_dim + out_dim, bias=False)
        window = block_size + 2 * halo_size
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim))
        # rounds odd sizes up, as a strided convolution does
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if pooled else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.q, self.kv):
            trunc_normal_(layer.weight, std=layer.in_features**-0.5)
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=table.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.attend(*self.project(x)).flatten(3).permute(0, 3, 1, 2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, C, H, W]` to queries `[B, h, w, heads, head_dim]`, and keys and values side by side `[B, H, W, ...]`."""
        x, step = x.permute(0, 2, 3, 1), self.query_stride
        q, kv = apply_linear(self.q, x[:, ::step, ::step]), apply_linear(self.kv, x)
        return q.unflatten(-1, (self.num_heads, -1)), kv.unflatten(-1, (self.num_heads, -1))

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """The values that the queries attend to, `[B, h, w, heads, out_dim / heads]`."""
        return halo_attention(
            q,
            kv,
            self.height_rel,
            self.width_rel,
            block_size=self.block_size,
            halo_size=self.halo_size,
            stride=self.query_stride,
            mask_border=self.mask_border,
        )

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The attention weights of the query, which are zero outside its block and halo."""
        q, kv = self.project(x)
        row, column = query[0] // self.query_stride, query[1] // self.query_stride
        weights = gradient_at(lambda kv: self.attend(q, kv), kv, (row, column))
        return attention(weights[..., q.shape[-1] :])
