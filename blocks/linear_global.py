"""Linear global attention (L2ViT): attention with a ReLU in place of the softmax."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.precision import acc_dtype, without_autocast
from .explanation import Explanation, Pixel, qkv_attention
from .linear import apply_linear
from .registry import heads, token_mixer


@token_mixer("linear_global", num_heads=heads(32))
@register_notrace_module
class LinearGlobal(nn.Module):
    """ReLU linear attention over all positions; `x: [B, C, H, W] -> [B, C, H, W]`.

    One linear layer gives q, k and v. With q' = relu(q), k' = relu(k) and sums over all H*W positions, position i is

        y[i] = proj(q'[i] (t * sum_j k'[j]^T v[j]) / max(q'[i] . sum_j k'[j], floor))

    in each head, where `temperature` t is learned (Zheng, arXiv 2501.16182, linear global attention). Both sums are
    computed once, so time and memory grow as the number of positions. Where the denominator is below `floor`, the
    output shrinks with q' and is no mean; the published models have the floor 100 for every image size.

    Raises ValueError if num_heads does not divide dim or floor is not positive.
    """

    def __init__(self, dim: int, *, num_heads: int, floor: float = 100.0):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"LinearGlobal: dim={dim} must be divisible by num_heads={num_heads}")
        if floor <= 0:
            raise ValueError(f"LinearGlobal: floor={floor}, the smallest denominator, must be positive")
        self.num_heads, self.floor = num_heads, floor
        self.qkv = nn.Linear(dim, 3 * dim)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the temperature to head_dim**-0.5; the layers have their own initialization."""
        nn.init.constant_(self.temperature, (self.proj.in_features // self.num_heads) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(self.proj, self.attend(self.project(x)).flatten(3)).permute(0, 3, 1, 2)

    def project(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, H, W, 3, heads, head_dim]`: q, k and v."""
        return apply_linear(self.qkv, x.permute(0, 2, 3, 1)).unflatten(-1, (3, self.num_heads, -1))

    def attend(self, qkv: Tensor) -> Tensor:
        """`[B, H, W, 3, heads, head_dim] -> [B, H, W, heads, head_dim]`."""
        q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attention(q, k, v).to(qkv.dtype).transpose(1, 2).unflatten(1, qkv.shape[1:3])

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The weights of the query, whose sum is the temperature where the denominator is above the floor."""
        return qkv_attention(self.attend, self.project(x), query)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, heads, N, d]` each, to the same shape in float32 or wider: the sums grow with the number of tokens."""
        exact = acc_dtype(q)
        q, k, v = F.relu(q.to(exact)), F.relu(k.to(exact)), v.to(exact)
        with without_autocast(q):
            summary = self.temperature.to(exact) * (k.transpose(-2, -1) @ v)  # [B, heads, d, d]
            total = (q @ k.sum(-2).unsqueeze(-1)).clamp_min(self.floor)  # [B, heads, N, 1]
            return q @ summary / total
