"""Attention whose temperature falls with the number of positions that a query sees (selective attention)."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.precision import acc_dtype
from ..kernels.sdpa import fused_attention
from .full_attention import FullAttention
from .registry import heads, token_mixer


@token_mixer("position_temperature", num_heads=heads(32))
@register_notrace_module
class PositionTemperature(FullAttention):
    """`FullAttention` with logits times `1 + exp(-exp(beta)) log(n)`; `x: [B, C, H, W] -> [B, C, H, W]`.

    `beta` is one learned number, and n the number of positions that the query sees. In the released language models
    (arXiv 2411.12892, the part that depends on the position) each query sees the positions up to its own: with
    `causal`, here row by row. Without it n = H*W for all queries, which is our reading for images.

    Raises ValueError if num_heads does not divide dim.
    """

    def __init__(self, dim: int, *, num_heads: int, causal: bool = False):
        super().__init__(dim, num_heads=num_heads)
        self.causal = causal
        self.beta = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.beta, 1.5)

    def attend(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, H*W, head_dim]
        length = q.shape[2]
        exact = acc_dtype(q)  # half precision cannot count so far
        seen, hidden = q.new_full((1, 1), length, dtype=exact), None
        if self.causal:
            seen = torch.arange(1, length + 1, dtype=exact, device=q.device)[:, None]
            hidden = q.new_full((1, 1, length, length), -torch.inf).triu(1)
        factor = 1 + (-self.beta.to(exact).exp()).exp() * seen.log()
        y = fused_attention(q * factor.to(q.dtype), k, v, hidden)
        return y.transpose(1, 2).unflatten(1, qkv.shape[1:3])
