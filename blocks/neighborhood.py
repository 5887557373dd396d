"""Neighborhood attention (NAT, DiNAT)."""

import torch
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..kernels import neighborhood_attention
from ..kernels.recording import crop
from .explanation import Explanation, Pixel, attention, gradient_at
from .linear import apply_linear
from .padding import pad_to_size
from .registry import heads, token_mixer


@token_mixer("neighborhood_attention", num_heads=heads(32))
@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Attention of each pixel to the K x K pixels nearest to it; `x: [B, C, H, W] -> [B, C, H, W]`.

    With q, k, v from one linear layer, the query at pixel i and the keys j of its neighborhood,

        y[i] = proj(softmax_j(q[i] . k[j] / sqrt(head_dim) + rpb[offset of j from i]) v[j])

    (Hassani et al., arXiv 2204.07143, sec. 3.1, eq. 2 to 4). At a border the window is shifted into the map, so that
    every pixel has K * K neighbors, itself among them. With `dilation` d, only pixels whose row and column differ from
    those of i by multiples of d are considered (Hassani and Shi, arXiv 2209.15001, sec. 3.1).

    A map with a side below K * d is zero-padded to it at the bottom and right, before the linear layer. Padding is not
    masked: its keys and values are the bias of the linear layer, as in the published models.

    `kernel_size` is K. Raises ValueError if num_heads does not divide dim, K is even, or d is below 1.
    """

    def __init__(self, dim: int, *, num_heads: int, kernel_size: int = 7, dilation: int = 1):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"NeighborhoodAttention: dim={dim} must be divisible by num_heads={num_heads}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"NeighborhoodAttention: kernel_size={kernel_size} must be odd and at least 1")
        if dilation < 1:
            raise ValueError(f"NeighborhoodAttention: dilation={dilation} must be at least 1")
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.rpb, std=0.02)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}"

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        y = self.attend(self.project(x))
        return apply_linear(self.proj, crop(y, height, width).flatten(3)).permute(0, 3, 1, 2)

    def project(self, x: Tensor) -> Tensor:
        """q, k and v of the map, padded to the span of a neighborhood: `[B, H', W', 3, heads, head_dim]`."""
        span = self.kernel_size * self.dilation
        padded = pad_to_size(x.permute(0, 2, 3, 1), span, span)
        return apply_linear(self.qkv, padded).unflatten(-1, (3, self.num_heads, -1))

    def attend(self, qkv: Tensor) -> Tensor:
        """`[B, H', W', 3, heads, head_dim] -> [B, H', W', heads, head_dim]`."""
        return neighborhood_attention(qkv, self.rpb, dilation=self.dilation)

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The attention weights of the query, which are zero outside its neighborhood."""
        weights = gradient_at(self.attend, self.project(x), query)[:, :, :, 2]
        return attention(crop(weights, *x.shape[2:]))
