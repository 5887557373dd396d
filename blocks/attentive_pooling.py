"""Attentive poolings: a vector from the tokens of a frozen encoder, for a probe that trains no more than this.

`POOLINGS` has the poolings that Psomas et al. (arXiv 2506.10178) compare, by name, as their benchmark configures them.
Each maps a feature map `[B, C, H, W]`, and class tokens `[B, P, C]` if there are any, to a vector `[B, C']`.
"""

import math
from abc import abstractmethod

import torch
from timm.layers import Mlp, resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int]  # rows and columns of the map


class AttentivePooling(nn.Module):
    """Base of the poolings. Attributes: `dim`, the channels C of the map; `width`, those of the vector, C'."""

    def __init__(self, dim: int, width: int | None = None):
        super().__init__()
        self.dim, self.width = dim, width or dim

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor:
        """x: [B, C, H, W]; prefix: class tokens [B, P, C], put before those of the map -> [B, C']"""
        return self.pool(*_tokens(x, prefix))[0]

    def weights(self, x: Tensor, prefix: Tensor | None = None) -> Tensor:
        """How much each of the M queries takes from each position of the map: [B, M, H, W], the mean over heads."""
        tokens, grid = _tokens(x, prefix)
        return self.pool(tokens, grid)[1][..., -grid[0] * grid[1] :].unflatten(-1, grid)

    @abstractmethod
    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """x: tokens [B, N, C], of which the last H * W are the map row by row -> [B, C'], and weights [B, M, N]"""


def _tokens(x: Tensor, prefix: Tensor | None) -> tuple[Tensor, Grid]:
    tokens, grid = x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])
    return tokens if prefix is None else torch.cat((prefix, tokens), dim=1), grid


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Softmax attention: query [B, M, C]; key, value [B, N, C] -> [B, M, C], and the weights [B, heads, M, N]."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2), weights


def divisor(dim: int, heads: int) -> int:
    """The largest number of heads, `heads` or fewer by a power of two, that divides `dim` channels."""
    return math.gcd(dim, heads)


class CrossAttention(nn.Module):
    """Multi-head attention with all four projections. qkv_bias: biases of the first three."""

    def __init__(self, dim: int, *, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """query: [B, M, C]; key, value: [B, N, C] -> [B, M, C], and the weights [B, M, N], the mean over heads"""
        x, weights = attend(self.q(query), self.k(key), self.v(value), self.num_heads)
        return self.proj(x), weights.mean(1)


def _query(number: int, dim: int, std: float = 0.02) -> nn.Parameter:
    return nn.Parameter(torch.randn(1, number, dim) * std)


class EfficientPooling(AttentivePooling):
    """Efficient probing: M learned queries q, each of which pools a slice of one value projection.

    A = softmax_N(q x^T / sqrt(C)); y_m = sum_n A[m, n] V_m[n], where V = x W and V_m are its channels m C'/M to
    (m + 1) C'/M (arXiv 2506.10178). The tokens themselves are the keys. Raises ValueError if C' is no multiple of
    `queries`. queries: None for 32, or the largest power of two below that divides C'; reduction: C / C'.
    """

    def __init__(self, dim: int, *, queries: int | None = None, reduction: int = 1):
        if reduction < 1 or dim % reduction:
            raise ValueError(f"dim={dim} is no multiple of reduction={reduction}; give a divisor of dim")
        super().__init__(dim, dim // reduction)
        number = divisor(self.width, 32) if queries is None else queries
        if number < 1 or self.width % number:
            raise ValueError(f"queries={number} do not divide the {self.width} channels of the values")
        self.query = _query(number, dim)
        self.v = nn.Linear(dim, self.width, bias=False)

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        weights = (self.query * self.dim**-0.5 @ x.transpose(-2, -1)).softmax(-1)
        values = self.v(x).unflatten(-1, (self.query.shape[1], -1)).transpose(1, 2)  # [B, M, N, C' / M]
        return (weights.unsqueeze(2) @ values).flatten(1), weights


class GatedPooling(AttentivePooling):
    """ABMILP: single-head self-attention, then a sum of its tokens weighted by a small network (arXiv 1802.04712).

    The score of a token is w tanh(V x + b); its softmax over the tokens weights them.
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.attention = CrossAttention(dim, num_heads=1, qkv_bias=False)
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        x, _ = self.attention(x, x, x)
        weights = self.score(x).transpose(-2, -1).softmax(-1)
        return (weights @ x).squeeze(1), weights


class SimPool(AttentivePooling):
    """SimPool: attention of the mean token over normalized tokens (arXiv 2309.06891). Values are not projected."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        value = self.norm(x)
        pooled, weights = attend(self.q(x.mean(1, keepdim=True)), self.k(value), value, 1)
        return pooled.squeeze(1), weights.squeeze(1)


class PlainSimPool(AttentivePooling):
    """SimPool without projections: the normalized mean token is the query, normalized tokens are the keys, 12 heads."""

    def __init__(self, dim: int, *, num_heads: int | None = None):
        super().__init__(dim)
        self.norm, self.num_heads = nn.LayerNorm(dim, eps=1e-6), num_heads or divisor(dim, 12)

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        pooled, weights = attend(self.norm(x.mean(1, keepdim=True)), self.norm(x), x, self.num_heads)
        return pooled.squeeze(1), weights.mean(1)


class ClipPooling(AttentivePooling):
    """CLIP's pooling: self-attention over the mean token and the others, with learned positions; the first output.

    grid: the map that the positions are of; those of another map are interpolated (arXiv 2103.00020, section 2.4).
    """

    def __init__(self, dim: int, *, grid: Grid, prefix: int = 0, num_heads: int | None = None):
        super().__init__(dim)
        self.grid, self.prefix = tuple(grid), 1 + prefix
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.position = nn.Parameter(torch.randn(self.prefix + grid[0] * grid[1], dim) * dim**-0.5)
        self.attention = CrossAttention(dim, num_heads=num_heads or divisor(dim, 4))

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        x, position = self.norm(x), self.position
        if grid != self.grid:
            position = resample_abs_pos_embed(position[None], list(grid), list(self.grid), self.prefix)[0]
        x = torch.cat((x.mean(1, keepdim=True), x), dim=1) + position
        pooled, weights = self.attention(x[:, :1], x, x)
        return pooled.squeeze(1), weights[..., 1:]


class SiglipPooling(AttentivePooling):
    """SigLIP's pooling: attention of one learned query, then x + MLP(x) without a norm (arXiv 2303.15343)."""

    def __init__(self, dim: int, *, num_heads: int | None = None):
        super().__init__(dim)
        self.query = _query(1, dim, dim**-0.5)
        self.attention = CrossAttention(dim, num_heads=num_heads or divisor(dim, 8))
        self.mlp = Mlp(dim, 4 * dim)

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        pooled, weights = self.attention(self.query.expand(x.shape[0], -1, -1), x, x)
        return (pooled + self.mlp(pooled)).squeeze(1), weights


class AimPooling(AttentivePooling):
    """AIM's pooling: attention of one learned query over batch-normalized tokens, without biases (arXiv 2401.08541)."""

    def __init__(self, dim: int, *, num_heads: int | None = None):
        super().__init__(dim)
        self.num_heads = num_heads or divisor(dim, 16)
        self.query = _query(1, dim)
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        pooled, weights = attend(self.query.expand(x.shape[0], -1, -1), self.k(x), self.v(x), self.num_heads)
        return pooled.squeeze(1), weights.mean(1)


class CbamPooling(AttentivePooling):
    """CBAM as a pooling: gates of channels, then of positions, a residual, ReLU, and the mean (arXiv 1807.06521).

    Class tokens are left out. The weights are the gates of the positions.
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        hidden = max(1, dim // 16)
        self.channels = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, dim, 1, bias=False)
        )
        self.positions = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1))

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        x = x[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(-1, grid)
        mean, largest = (self.channels(pooled) for pooled in (x.mean((2, 3), True), x.amax((2, 3), True)))
        gated = x * (mean + largest).sigmoid()
        weights = self.positions(torch.cat((gated.mean(1, True), gated.amax(1, True)), dim=1)).sigmoid()
        return F.relu(gated * weights + x).mean((2, 3)), weights.flatten(2)


class CocaPooling(AttentivePooling):
    """CoCa's pooling: a learned query of 8 heads over one head of keys and values of 64 channels (arXiv 2205.01917).

    The benchmark draws 196 queries and uses the first output only; here is one query.
    """

    def __init__(self, dim: int, *, num_heads: int = 8, head_dim: int = 64):
        super().__init__(dim)
        self.num_heads = num_heads
        self.query = _query(1, dim, 1.0)
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.kv = nn.Linear(dim, 2 * head_dim, bias=False)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        query = self.q(self.norm(self.query)).unflatten(-1, (self.num_heads, -1)).squeeze(1)  # [1, heads, head_dim]
        key, value = self.kv(x).chunk(2, -1)
        pooled, weights = attend(query.expand(x.shape[0], -1, -1), key, value, 1)
        return self.proj(pooled.flatten(1)), weights.mean(2)


class CaitPooling(AttentivePooling):
    """CaiT's class attention: one block in which only the class token is updated (arXiv 2103.17239, section 3)."""

    def __init__(self, dim: int, *, num_heads: int | None = None):
        super().__init__(dim)
        self.query = _query(1, dim)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attention = CrossAttention(dim, num_heads=num_heads or divisor(dim, 4))
        self.mlp = Mlp(dim, 4 * dim)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), 1e-5)) for _ in range(2))
        self.norm = nn.LayerNorm(dim)

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        query = self.query.expand(x.shape[0], -1, -1)
        x = self.norm1(torch.cat((query, x), dim=1))
        attended, weights = self.attention(x[:, :1], x, x)
        query = query + self.scale1 * attended
        query = query + self.scale2 * self.mlp(self.norm2(query))
        return self.norm(query).squeeze(1), weights[..., 1:]


class BlockPooling(AttentivePooling):
    """A transformer block, and the mean of its tokens, as in DINO's encoder (arXiv 2104.14294).

    The weights are the mean over all queries.
    """

    def __init__(self, dim: int, *, num_heads: int | None = None):
        super().__init__(dim)
        self.norm1, self.norm2 = (nn.LayerNorm(dim) for _ in range(2))
        self.attention = CrossAttention(dim, num_heads=num_heads or divisor(dim, 8), qkv_bias=False)
        self.mlp = Mlp(dim, 4 * dim)

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        normed = self.norm1(x)
        attended, weights = self.attention(normed, normed, normed)
        x = x + attended
        return (x + self.mlp(self.norm2(x))).mean(1), weights.mean(1, keepdim=True)


class JepaPooling(AttentivePooling):
    """V-JEPA's pooling: a cross-attention block of one learned query, with an MLP (arXiv 2404.08471)."""

    def __init__(self, dim: int, *, num_heads: int | None = None):
        super().__init__(dim)
        self.query = _query(1, dim)
        self.norm1, self.norm2 = (nn.LayerNorm(dim) for _ in range(2))
        self.attention = CrossAttention(dim, num_heads=num_heads or divisor(dim, 16))
        self.mlp = Mlp(dim, 4 * dim)

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        query, x = self.query.expand(x.shape[0], -1, -1), self.norm1(x)
        attended, weights = self.attention(query, x, x)
        query = query + attended
        return (query + self.mlp(self.norm2(query))).squeeze(1), weights


class DolgPooling(AttentivePooling):
    """DOLG's local branch: the mean of normalized features, each times a learned score (arXiv 2108.02927).

    The weights are the scores, softplus(w relu(f)).
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.feature, self.norm = nn.Linear(dim, dim), nn.BatchNorm1d(dim)
        self.score = nn.Linear(dim, 1)

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        x = self.norm(self.feature(x).transpose(1, 2)).transpose(1, 2)
        weights = F.softplus(self.score(x.relu()))
        return (F.normalize(x, dim=-1) * weights).mean(1), weights.transpose(-2, -1)


class CaePooling(AttentivePooling):
    """CAE's pooling: attention of one learned query with a norm before each projection (arXiv 2202.03026).

    The published module has a fourth norm, which it never calls; here it is left out.
    """

    def __init__(self, dim: int, *, num_heads: int | None = None):
        super().__init__(dim)
        self.query = _query(1, dim)
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(dim) for _ in range(3))
        self.attention = CrossAttention(dim, num_heads=num_heads or divisor(dim, 8), qkv_bias=False)

    def pool(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        query = self.norm_q(self.query).expand(x.shape[0], -1, -1)
        pooled, weights = self.attention(query, self.norm_k(x), self.norm_v(x))
        return pooled.squeeze(1), weights


POOLINGS: dict[str, type[AttentivePooling]] = {
    "ep": EfficientPooling,
    "abmilp": GatedPooling,
    "aim": AimPooling,
    "cae": CaePooling,
    "cait": CaitPooling,
    "cbam": CbamPooling,
    "clip": ClipPooling,
    "coca": CocaPooling,
    "dinovit": BlockPooling,
    "dolg": DolgPooling,
    "esimpool": PlainSimPool,
    "jepa": JepaPooling,
    "siglip": SiglipPooling,
    "simpool": SimPool,
}
"""The poolings of attentive probes by the name that the benchmark gives them."""
