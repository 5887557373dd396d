"""Aggregated attention (TransNeXt)."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..kernels import aggregated_attention
from ..kernels.linear import linear
from ..kernels.tables import Grid
from .explanation import Explanation, Pixel, attention, gradient_at, spread
from .length_scaled_cosine import LogPositionBias, reset_query
from .linear import apply_linear
from .plain import is_plain
from .pooling import adaptive_pool
from .registry import by_stage, heads, token_mixer


@token_mixer(
    "aggregated",
    no_weight_decay=("temperature", "query_embedding", "relative_pos_bias_local", "fc1_weight", "fc2_weight"),
    num_heads=heads(24),
    reduction=by_stage(8, 4, 2, 2),
    trained_size=lambda place: place.side,
)
@register_notrace_module
class Aggregated(nn.Module):
    """Attention to a sliding window and to a pooled map with one softmax over both; `x: [B, C, H, W] -> [B, C, H, W]`.

    The keys of a query are the pixels of the map in the window around it, and all pixels of the pooled map
    x' = norm(adaptive_avg_pool(gelu(sr(x)))). With n the number of keys and hat(q) = q / |q|_2 in each head,

        A = softmax(softplus(t) ln(n) (hat(q) + e) [hat(k), hat(k')]^T + [r, bias])
        y = proj((A_window + hat(q) w + b) v + A_pooled v')

    The same linear layer gives k, v from x and k', v' from x'. Learned per head: e `query_embedding`, t `temperature`,
    r `relative_pos_bias_local`, w `learnable_tokens`, b `learnable_bias`; `bias` is `LogPositionBias` (Shi, arXiv
    2311.17132, "aggregated attention").

    The pooled map has `max(1, H // reduction)` rows, or `min(pool_size, H)` if `pool_size` is given; columns likewise.
    `trained_size` is the side of the map that the weights were trained with. If `nominal_size` is given, the bias is
    computed for a square map of that side and resized, as in the interpolation mode of the released dense-prediction
    models.

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
            raise ValueError(f"Aggregated: window={window} must be odd, with the query at its center")
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
        # only for a contiguous map the layer is a single operation
        y = self.attend(*self.project(x)).contiguous()
        return apply_linear(self.proj, y.flatten(3)).permute(0, 3, 1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, C, H, W]` to q, k and v `[B, H, W, 3, heads, head_dim]`, and k and v of the pooled map."""
        x = x.permute(0, 2, 3, 1)
        qkv = apply_linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1))
        return qkv, self._pool(x, self._grid((x.shape[1], x.shape[2])))

    def attend(self, qkv: Tensor, pooled: Tensor) -> Tensor:
        """Attention to the window and to the pooled map, `[B, H, W, heads, head_dim]`."""
        size, grid = (qkv.shape[1], qkv.shape[2]), (pooled.shape[1], pooled.shape[2])
        nominal = None
        if self.nominal_size is not None:
            side = (self.nominal_size, self.nominal_size)
            nominal = (side, self._grid(side))
        return aggregated_attention(
            qkv,
            pooled,
            self.position(size, grid, nominal),
            temperature=self.temperature,
            query_embedding=self.query_embedding,
            local_bias=self.relative_pos_bias_local,
            filters=self.learnable_tokens,
            filter_bias=self.learnable_bias,
        )

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The attention weights of the query; those of a pooled position are divided among the positions in it."""
        qkv, pooled = self.project(x)
        local = gradient_at(lambda qkv: self.attend(qkv, pooled), qkv, query)[:, :, :, 2]
        cells = gradient_at(lambda pooled: self.attend(qkv, pooled), pooled, query)[:, :, :, 1]
        grid = (pooled.shape[1], pooled.shape[2])
        return attention(local + spread(cells, lambda x: adaptive_pool(x, grid), x))

    def _grid(self, size: Grid) -> Grid:
        """Rows and columns of the pooled map, for a map of `size`."""
        if self.pool_size is not None:
            return min(self.pool_size, size[0]), min(self.pool_size, size[1])
        return max(1, size[0] // self.reduction), max(1, size[1] // self.reduction)

    def _pool(self, x: Tensor, grid: Grid) -> Tensor:
        """`[B, H, W, C]` to keys and values of the pooled map, `[B, rows, columns, 2, heads, head_dim]`."""
        if is_plain(self.sr):
            # a 1x1 convolution is a linear layer, which is faster on channels_last maps
            full = linear(x, self.sr.weight.flatten(1), self.sr.bias).permute(0, 3, 1, 2)
        else:
            full = self.sr(x.permute(0, 3, 1, 2))
        pooled = adaptive_pool(F.gelu(full), grid).permute(0, 2, 3, 1)
        # the layer is called, though the queries are not needed: an adapter has an effect only if it is
        return apply_linear(self.qkv, self.norm(pooled)).unflatten(-1, (3, self.num_heads, -1))[:, :, :, 1:]
