"""Aggregated attention (TransNeXt)."""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from .length_scaled_cosine import BiasTable, Grid, LogPositionBias, expand, kept, reset_query, unit
from .precision import without_autocast

# the rows of queries are worked through in groups with about this many weights of pooled keys in each image (not each
# batch: the number of groups would then depend on the batch size, and a program exported for one could serve no other)
_GROUP = 1 << 20


@kept
def _borders(size: Grid, window: int, pooled: int, device: torch.device, dtype: torch.dtype):
    """Where windows leave the map, and the scale of each query.

    Masks of rows `[window, 1, H, 1]` and of columns `[window, 1, W]`, 0 inside and -inf outside, and
    ln(number of keys) `[H*W]`.
    """
    inside = []
    for side in size:
        position = torch.arange(side, device=device) + torch.arange(window, device=device)[:, None] - window // 2
        inside.append((position >= 0) & (position < side))
    rows, columns = (torch.zeros(i.shape, device=device, dtype=dtype).masked_fill(~i, -torch.inf) for i in inside)
    keys = inside[0].sum(0)[:, None] * inside[1].sum(0) + pooled
    return rows[:, None, :, None], columns[:, None], keys.to(dtype).log().flatten()


@register_notrace_module
class Aggregated(nn.Module):
    """Attention to the neighbourhood and to a pooled map under one softmax; `x: [B, C, H, W] -> [B, C, H, W]`.

    A query's keys are the pixels of the window around it that lie inside the map, and the pixels of
    x' = norm(adaptive_avg_pool(gelu(sr(x)))). With ^ division by the length per head, n the number of keys,

        A = softmax(softplus(t) ln(n) (q^ + e) [k^, k'^]^T + [r, bias])
        y = proj((A_window + q^ w + b) v + A_pooled v')

    where k, v and k', v' come from x and x' by the same linear map, e `query_embedding`, t `temperature`,
    r `relative_pos_bias_local`, w `learnable_tokens` and b `learnable_bias` are learned per head, and `bias` is that of
    `LogPositionBias` (Shi, arXiv 2311.17132, "aggregated attention").

    The pooled map has `H // reduction` rows, at least one, or `pool_size` of them, at most H; columns likewise.
    `trained_size` is the side of the map that the weights were trained on. With `nominal_size` the bias is computed for
    a square map of that side and resized, as the released dense-prediction models do in their interpolation mode.

    Raises ValueError if num_heads does not divide dim, window is even, or a size is too small.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        reduction: int,
        trained_size: int,
        window: int = 3,
        pool_size: int | None = None,
        nominal_size: int | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Aggregated: dim={dim} must be divisible by num_heads={num_heads}")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"Aggregated: window={window} must be odd, with the query at its centre")
        for name, value in {"reduction": reduction, "pool_size": pool_size, "nominal_size": nominal_size}.items():
            if value is not None and value < 1:
                raise ValueError(f"Aggregated: {name}={value} must be at least 1")
        self.dim, self.num_heads, self.window = dim, num_heads, window
        self.reduction, self.pool_size, self.nominal_size = reduction, pool_size, nominal_size
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, head_dim))
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, window**2))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, head_dim, window**2))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, window**2))
        self.position = LogPositionBias(num_heads, trained_size=trained_size)
        self.proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_query(self.temperature, self.query_embedding)
        trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        grid = self._grid(size)
        x = x.permute(0, 2, 3, 1)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        nominal = None
        if self.nominal_size is not None:
            side = (self.nominal_size, self.nominal_size)
            nominal = (side, self._grid(side))
        y = aggregated_attention(
            qkv,
            self._pool(x, grid),
            self.position(size, grid, nominal),
            temperature=self.temperature,
            query_embedding=self.query_embedding,
            local_bias=self.relative_pos_bias_local,
            filters=self.learnable_tokens,
            filter_bias=self.learnable_bias,
        )
        return self.proj(y.flatten(3)).permute(0, 3, 1, 2)

    def _grid(self, size: Grid) -> Grid:
        """Rows and columns of the pooled map."""
        if self.pool_size is not None:
            return min(self.pool_size, size[0]), min(self.pool_size, size[1])
        return max(1, size[0] // self.reduction), max(1, size[1] // self.reduction)

    def _pool(self, x: Tensor, grid: Grid) -> Tensor:
        """`[B, H, W, C]` to keys and values of the pooled map, `[B, rows, columns, 2, heads, head_dim]`."""
        # without a kernel's extent the convolution is a linear map, which is faster on channels_last maps
        full = F.gelu(F.linear(x, self.sr.weight.flatten(1), self.sr.bias))
        pooled = F.adaptive_avg_pool2d(full.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
        # the map of keys and values is shared, that of queries is not needed
        kv = F.linear(self.norm(pooled), self.qkv.weight[self.dim :], self.qkv.bias[self.dim :])
        return kv.unflatten(-1, (2, self.num_heads, -1))


def aggregated_attention(
    qkv: Tensor,
    pooled: Tensor,
    bias: BiasTable,
    *,
    temperature: Tensor,
    query_embedding: Tensor,
    local_bias: Tensor,
    filters: Tensor,
    filter_bias: Tensor,
) -> Tensor:
    """`qkv: [B, H, W, 3, N, D]`, `pooled: [B, rows, columns, 2, N, D]` -> `[B, H, W, N, D]`, the core of `Aggregated`.

    `bias` is the table of the pooled keys with its two indices (`LogPositionBias`); the rest are parameters
    `[N, 1, 1]`, `[N, 1, D]`, `[N, K]`, `[N, D, K]`, `[N, 1, K]` for a window of K pixels, row-major.
    """
    height, width = qkv.shape[1:3]
    window = math.isqrt(local_bias.shape[1])
    with without_autocast(qkv):
        q, kv = qkv.split((1, 2), 3)
        # pixels last: sums over a head's channels and shifts within the map then run over contiguous rows
        q = unit(q.squeeze(3).permute(0, 3, 4, 1, 2).contiguous(), dim=2)  # [B, N, D, H, W]
        k, v = F.pad(kv.permute(3, 0, 4, 5, 1, 2), (window // 2,) * 4).unbind(0)
        k_pooled, v_pooled = pooled.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)  # [B, N, P, D]

        above, left, length = _borders((height, width), window, k_pooled.shape[2], q.device, q.dtype)
        pixels = q.flatten(3)
        scaled = (pixels + query_embedding.mT) * (F.softplus(temperature) * length)
        border = local_bias.unflatten(1, (window, window))[..., None, None] + above + left
        scores = _window_scores(scaled.view_as(q), unit(k, dim=2), window) + border.flatten(1, 2)
        weights, y = _joint_softmax(scores, scaled.view_as(q), unit(k_pooled, dim=-1), v_pooled, bias)
        weights = weights + (filters.mT.to(q.dtype) @ pixels + filter_bias.mT).view_as(weights)
        y = _add_window_values(y, weights, v, window)
    return y.permute(0, 3, 4, 1, 2).to(qkv.dtype)


def _window_scores(q: Tensor, k: Tensor, window: int) -> Tensor:
    """`[B, N, D, H, W]` and the keys with a border of window // 2 -> `[B, N, K, H, W]`."""
    height, width = q.shape[3:]
    shifted = [k[..., i : i + height, j : j + width] for i in range(window) for j in range(window)]
    return torch.stack([(q * k_o).sum(2) for k_o in shifted], 2)


def _joint_softmax(
    scores: Tensor, q: Tensor, k_pooled: Tensor, v_pooled: Tensor, bias: BiasTable
) -> tuple[Tensor, Tensor]:
    """One softmax over the scores of the window `[B, N, K, H, W]` and of the pooled keys `[B, N, P, D]`.

    Returns the weights of the window `[B, N, K, H, W]` and the weighted sum of the pooled values `[B, N, D, H, W]`.
    """
    table, rows, columns = bias
    size, grid = q.shape[3:], (rows.shape[0], columns.shape[0])
    batch, heads, keys = k_pooled.shape[:3]
    step = max(1, _GROUP // (heads * keys * size[1]))
    near, far = [], []
    for part, q_part, rows_part in zip(scores.split(step, 3), q.split(step, 3), rows.split(step, 1), strict=True):
        pooled = (k_pooled @ q_part.flatten(3)).view(batch, heads, *grid, *part.shape[3:])
        pooled = pooled + expand(table, rows_part, columns).transpose(2, 3)
        weights = torch.cat([part, pooled.flatten(2, 3)], 2).softmax(2)
        part, pooled = weights.split((part.shape[2], keys), 2)
        near.append(part)
        far.append((v_pooled.mT @ pooled.flatten(3).to(v_pooled.dtype)).unflatten(3, part.shape[3:]))
    return (near[0], far[0]) if len(near) == 1 else (torch.cat(near, 3), torch.cat(far, 3))


def _add_window_values(y: Tensor, weights: Tensor, v: Tensor, window: int) -> Tensor:
    """`y + weighted sum of the window's values`, `[B, N, D, H, W]`; `v` has a border of window // 2."""
    height, width = y.shape[3:]
    for o, weight in enumerate(weights.unbind(2)):
        i, j = divmod(o, window)
        y = torch.addcmul(y, weight[:, :, None], v[..., i : i + height, j : j + width])
    return y
