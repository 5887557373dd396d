"""Channel attention (DaViT's channel group attention): the channels of a head attend to each other."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.linear import linear
from ..kernels.precision import acc_dtype, without_autocast
from ..kernels.recording import exporting
from .explanation import Explanation, Pixel
from .linear import apply_linear
from .plain import is_plain
from .registry import heads, token_mixer


@token_mixer("channel", num_heads=heads(32))
@register_notrace_module
class Channel(nn.Module):
    """Attention between the channels of each head; `x: [B, C, H, W] -> [B, C, H, W]`.

    One linear layer gives q, k and v, [N, d] in each head, over the N = H*W positions:

        A = softmax(d**-0.5 k^T v)   [d, d], over the channels of v        y = proj(concat over heads of q A^T)

    (Ding et al., arXiv 2204.03645, sec. 3.3, eq. 4; q, k and v are used as in the released code). The logits are sums
    over N positions.

    A is the same for all positions, so A and the linear layers before and after it are one [C, C] matrix per image. If
    N >= 2*C, this matrix is computed first and applied to x, which takes less time and memory than computing q. That
    reads the weights of both linear layers; they are called instead if they are not plain, or while exporting.

    Raises ValueError if num_heads does not divide dim.
    """

    def __init__(self, dim: int, *, num_heads: int):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Channel: dim={dim} must be divisible by num_heads={num_heads}")
        self.dim, self.num_heads = dim, num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, C]
        merge = not exporting() and height * width >= 2 * self.dim and is_plain(self.qkv, self.proj)
        y = self.merged(tokens) if merge else self.direct(tokens)
        return y.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The attention between channels, the same for all queries."""
        kv = apply_linear(self.qkv, x.permute(0, 2, 3, 1).flatten(1, 2)).split((self.dim, 2 * self.dim), -1)[1]
        return Explanation(torch.block_diag(*self.attention(kv)[0]), "channels", "channel attention")

    def direct(self, x: Tensor) -> Tensor:
        """The definition: q, k and v of each token, `[B, N, C] -> [B, N, C]`."""
        q, kv = apply_linear(self.qkv, x).split((self.dim, 2 * self.dim), -1)
        q = q.unflatten(-1, (self.num_heads, -1)).permute(0, 2, 3, 1)  # [B, heads, d, N]
        y = self.attention(kv).to(q.dtype) @ q
        return apply_linear(self.proj, y.permute(0, 3, 1, 2).flatten(2))

    def merged(self, x: Tensor) -> Tensor:
        """The same with one matrix for q, attention and output of each image, `[B, N, C] -> [B, N, C]`."""
        w_q, w_kv = self.qkv.weight.split((self.dim, 2 * self.dim))
        b_q, b_kv = self.qkv.bias.split((self.dim, 2 * self.dim))
        attention = self.attention(linear(x, w_kv, b_kv)).to(w_q.dtype)
        with without_autocast(x):
            per_head = self.proj.weight.unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # [heads, C, d]
            mix = (per_head @ attention).transpose(1, 2).flatten(2)  # [B, C, C]
            weight, bias = mix @ w_q, mix @ b_q + self.proj.bias
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

    def attention(self, kv: Tensor) -> Tensor:
        """A of each head, `[B, N, 2*C] -> [B, heads, d, d]`, in float32 or wider: the logits are sums over the map."""
        kv = kv.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        exact = acc_dtype(kv)
        k, v = kv.to(exact, memory_format=torch.contiguous_format).unbind(0)
        with without_autocast(kv):
            return (k.transpose(-2, -1) @ v * self.scale).softmax(-1)
