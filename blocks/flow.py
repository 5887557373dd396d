"""Flow attention (Flowformer): linear attention whose flows between the tokens are conserved."""

from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.precision import acc_dtype, without_autocast
from .linear import apply_linear
from .registry import heads, token_mixer


@token_mixer("flow", num_heads=heads(32))
@register_notrace_module
class Flow(nn.Module):
    """Linear attention with competition between keys and gates on queries; `x: [B, C, H, W] -> [B, C, H, W]`.

    One linear layer gives q, k and v, [N, d] in each head, over the N = H*W positions; sigmoids make q and k positive.
    With (a, b) = sum_d (a_d + eps)(b_d + eps) and sums over all positions

        1 / I[i] = (q[i], sum_j k[j]) + eps                         the flow into query i
        1 / O[j] = (k[j], sum_i q[i]) + eps                         the flow out of key j
        gate[i] = sigmoid((q[i], sum_j k[j] O[j]) + eps)            its inflow if every key sends a flow of 1
        w[j] = N softmax_j(min((k[j], sum_i q[i] I[i]) + eps, 1))   its outflow if every query receives a flow of 1
        y[i] = proj(gate[i] I[i] q[i] sum_j k[j]^T w[j] v[j])

    (Wu et al., arXiv 2202.06258, sec. 3; eps and the minimum are those of the released vision model). The sums are
    computed once, so time and memory grow as the number of positions; they are in float32 or wider.

    Raises ValueError if num_heads does not divide dim.
    """

    def __init__(self, dim: int, *, num_heads: int, eps: float = 1e-6):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Flow: dim={dim} must be divisible by num_heads={num_heads}")
        self.num_heads, self.eps = num_heads, eps
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        qkv = apply_linear(self.qkv, x.permute(0, 2, 3, 1)).flatten(1, 2)  # [B, H*W, 3*C]
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.attention(q, k, v).to(qkv.dtype)
        y = y.transpose(1, 2).flatten(2).unflatten(1, (height, width))
        return apply_linear(self.proj, y).permute(0, 3, 1, 2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, heads, N, d]` each, to the same shape in float32 or wider."""
        exact = acc_dtype(q)
        with without_autocast(q):
            q, k, v = q.to(exact).sigmoid(), k.to(exact).sigmoid(), v.to(exact)
            inverse_in = 1 / self._dot(q, k.sum(-2, keepdim=True))  # [B, heads, N, 1]
            inverse_out = 1 / self._dot(k, q.sum(-2, keepdim=True))
            gate = self._dot(q, inverse_out.transpose(-2, -1) @ k).sigmoid()
            outflow = self._dot(k, inverse_in.transpose(-2, -1) @ q).clamp(-1, 1)
            weight = outflow.softmax(-2) * k.shape[-2]
            return gate * inverse_in * (q @ (k.transpose(-2, -1) @ (weight * v)))

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """`(a, b)` of `a: [..., N, d]` and `b: [..., 1, d]`, as `[..., N, 1]`."""
        b = b + self.eps
        # (a + eps) b + eps, without a map of a + eps
        return a @ b.transpose(-2, -1) + (self.eps * b.sum(-1, keepdim=True) + self.eps)
