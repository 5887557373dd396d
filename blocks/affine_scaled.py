"""Attention whose weights are scaled and shifted for each query and head (affine-scaled attention)."""

from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.precision import acc_dtype
from ..kernels.sdpa import fused_attention
from .explanation import Explanation, Pixel, qkv_attention
from .linear import apply_linear
from .registry import heads, token_mixer

# share of the old value in the running mean of the factors
_KEPT = 0.9


class _Tracked(torch.autograd.Function):
    """The identity, whose backward pass updates a running mean.

    A forward pass can run twice for one update of the weights, with gradient checkpointing, and must then compute the
    same; a backward pass runs once.
    """

    @staticmethod
    def forward(ctx: Any, scale: Tensor, running_mean: Tensor) -> Tensor:
        ctx.mean, ctx.running_mean = scale.detach().mean((0, 1, 2)), running_mean
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.running_mean.lerp_(ctx.mean.to(ctx.running_mean.dtype), 1 - _KEPT)
        return gradients[0], None


@token_mixer("affine_scaled", num_heads=heads(32))
@register_notrace_module
class AffineScaled(nn.Module):
    """Full attention with the weights `a P + (m - a) / n` in place of P; `x: [B, C, H, W] -> [B, C, H, W]`.

    P is the softmax over all n = H*W positions, `a = sigmoid(scale(x))` one number for each query and head, and m the
    running mean of a for each head. The weights of a query sum to m, and some may be negative:

        y[i] = a[i] sum_j P[i, j] v[j] + (m - a[i]) mean(v)

    (arXiv 2602.23057). Each backward pass in training mode updates m to `0.9 m + 0.1 mean(a)`; evaluation leaves it.
    From the paper, with no published code to compare with: the sigmoid, the first value 0.5 of a and of m, and the use
    on images are our reading.

    Raises ValueError if num_heads does not divide dim.
    """

    running_mean: Tensor

    def __init__(self, dim: int, *, num_heads: int):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"AffineScaled: dim={dim} must be divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.scale = nn.Linear(dim, num_heads)
        self.register_buffer("running_mean", torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.scale.weight)
        nn.init.zeros_(self.scale.bias)
        self.running_mean.fill_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.weighted(self.project(x), self.factors(x))
        return apply_linear(self.proj, y.flatten(3)).permute(0, 3, 1, 2)

    def project(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, H, W, 3, heads, head_dim]`: q, k and v."""
        return apply_linear(self.qkv, x.permute(0, 2, 3, 1)).unflatten(-1, (3, self.num_heads, -1))

    def factors(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, H, W, heads]`: a."""
        factors = self.scale(x.permute(0, 2, 3, 1)).sigmoid()
        if self.training and factors.requires_grad:
            return _Tracked.apply(factors, self.running_mean)
        return factors

    def weighted(self, qkv: Tensor, factors: Tensor) -> Tensor:
        """`[B, H, W, 3, heads, head_dim]`, `[B, H, W, heads] -> [B, H, W, heads, head_dim]`."""
        q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
        a = factors.flatten(1, 2).transpose(1, 2).unsqueeze(-1)
        mean = v.mean(2, keepdim=True, dtype=acc_dtype(v)).to(v.dtype)
        y = a * fused_attention(q, k, v) + (self.running_mean.to(a.dtype)[:, None, None] - a) * mean
        return y.transpose(1, 2).unflatten(1, qkv.shape[1:3])

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The weights of the query, which may be negative."""
        factors = self.factors(x)
        return qkv_attention(lambda qkv: self.weighted(qkv, factors), self.project(x), query)
