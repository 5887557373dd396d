"""Full attention: every position of a feature map attends to every other."""

from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.sdpa import fused_attention
from .explanation import Explanation, Pixel, qkv_attention
from .linear import apply_linear
from .registry import heads, token_mixer


@token_mixer("full_attention", fixed=("local", "lepe"), num_heads=heads(32))
@register_notrace_module
class FullAttention(nn.Module):
    """`proj(softmax(q k^T / sqrt(head_dim)) v + local(x) + lepe(v))` over all H*W positions of `x: [B, C, H, W]`.

    One linear layer gives q, k and v (Vaswani et al., arXiv 1706.03762, sec. 3.2). `local` and `lepe` are optional
    modules on the input of the mixer and on the map of values `[B, C, H, W]`, such as the depthwise convolution in
    BiFormer's stage 4.

    Raises ValueError if num_heads does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qkv_bias: bool = True,
        local: nn.Module | None = None,
        lepe: nn.Module | None = None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{type(self).__name__}: dim={dim} must be divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.local, self.lepe = local, lepe
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.project(x)
        y = self.attend(qkv).flatten(3)
        if self.local is not None:
            y = y + self.local(x).permute(0, 2, 3, 1)
        if self.lepe is not None:
            y = y + self.lepe(qkv[:, :, :, 2].flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return apply_linear(self.proj, y).permute(0, 3, 1, 2)

    def project(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, H, W, 3, heads, head_dim]`: q, k and v."""
        return apply_linear(self.qkv, x.permute(0, 2, 3, 1)).unflatten(-1, (3, self.num_heads, -1))

    def attend(self, qkv: Tensor) -> Tensor:
        """`[B, H, W, 3, heads, head_dim] -> [B, H, W, heads, head_dim]`."""
        q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
        return fused_attention(q, k, v).transpose(1, 2).unflatten(1, qkv.shape[1:3])

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The attention weights of the query."""
        return qkv_attention(self.attend, self.project(x), query)
