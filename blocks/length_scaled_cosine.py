"""Length-scaled cosine attention and its log-spaced continuous position bias (TransNeXt)."""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..kernels.precision import l2_normalize, without_autocast
from ..kernels.recomputing import recomputed
from ..kernels.recording import is_open
from ..kernels.sdpa import fused_attention
from ..kernels.tables import BiasTable, Grid, cache_tensors, expand_bias
from ..kernels.working_size import working_bytes
from .explanation import Explanation, Pixel, qkv_attention
from .linear import apply_linear
from .registry import heads, token_mixer

# the hidden layer of the position bias is computed in slices of this many bytes on the CPU, which fit into the cache
_SLICE = 4 << 20


@cache_tensors
def _distances(size: Grid, keys: Grid, trained_size: int, device: torch.device, dtype: torch.dtype):
    """All different distances query - key, log-scaled, `[n, m, 2]`, and the indices of a `BiasTable` of them."""
    (y, rows), (x, columns) = (
        _distances_of_axis(n, k, trained_size, device, dtype) for n, k in zip(size, keys, strict=True)
    )
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1), rows, columns


def _distances_of_axis(queries: int, keys: int, trained_size: int, device: torch.device, dtype: torch.dtype):
    """All different distances query - key along one axis, log-scaled `[n]`, and the index of each pair's distance.

    The index is `[keys, queries]`. A key lies at the center of its bin of an adaptive average pool from `queries`
    pixels to `keys` bins. Centers may lie between two pixels, so all positions are doubled to be integers. Example:
    4 queries and 2 keys have doubled query positions 0, 2, 4, 6 and doubled bin centers 1, 5; the doubled distances
    are -5, -3, ..., 5, n = 6 values in steps of 2.
    """
    j = torch.arange(keys, device=device)[:, None]
    # doubled: first pixel of the bin plus its last pixel
    center = j * queries // keys + ((j + 1) * queries + keys - 1) // keys - 1
    lowest = -((keys - 1) * queries // keys + queries - 1)
    highest = 2 * (queries - 1) - ((queries + keys - 1) // keys - 1)
    # if all bins have the same size, doubled distances are all even or all odd
    step = 1 if is_open(queries) or queries % keys else 2
    index = (2 * torch.arange(queries, device=device) - center - lowest) // step
    exact = torch.promote_types(dtype, torch.float32)
    u = torch.arange(lowest, highest + 1, step, device=device).to(exact) * (4 / (trained_size - 1))
    return (u.sign() * (u.abs() + 1).log2() / 3).to(dtype), index


class LogPositionBias(nn.Module):
    """A bias per head for each pair of query and key, computed by an MLP from their distance (dy, dx) = query - key:

        bias = fc2(relu(fc1(c(dy), c(dx))))        c(d) = sign(d) log2(1 + 8 |d| / (trained_size - 1)) / 3

    Distances are in pixels of the grid of queries. Keys on a coarser grid lie at the centers of the bins of an adaptive
    average pooling. `trained_size` is the side of the feature map that the weights were trained with (Shi, arXiv
    2311.17132, "log-spaced continuous position bias"; scaled as in the released code).

    Raises ValueError if trained_size < 2.
    """

    def __init__(self, num_heads: int, *, trained_size: int, hidden: int = 512):
        super().__init__()
        if trained_size < 2:
            raise ValueError(
                f"LogPositionBias: trained_size={trained_size} must be at least 2: distances are scaled by "
                "1 / (trained_size - 1)"
            )
        self.trained_size = trained_size
        self.fc1_weight = nn.Parameter(torch.empty(hidden, 2))
        self.fc1_bias = nn.Parameter(torch.empty(hidden))
        self.fc2_weight = nn.Parameter(torch.empty(num_heads, hidden))
        self.fc2_bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
            trunc_normal_(weight, std=0.02)
            nn.init.zeros_(bias)

    def forward(self, size: Grid, keys: Grid, nominal: tuple[Grid, Grid] | None = None) -> BiasTable:
        """The bias for queries on a grid of `size` and keys on a grid of `keys`, as a table and two indices.

        The bias of query (y, x) and key (i, j) is `table[:, rows[i, y], columns[j, x]]`, with table `[heads, n, m]`,
        rows `[keys_y, H]` and columns `[keys_x, W]`. If another pair of grids `nominal` is given, the bias is computed
        for these and resized bilinearly.
        """
        if nominal is None or nominal == (size, keys):
            return self._table(size, keys)
        return _resize(expand_bias(*self._table(*nominal)), size, keys)

    def _table(self, size: Grid, keys: Grid) -> BiasTable:
        weight = self.fc1_weight
        distances, rows, columns = _distances(size, keys, self.trained_size, weight.device, weight.dtype)
        with without_autocast(weight):
            slices = self._slices(distances)
            if len(slices) == 1:
                return self._mlp(distances), rows, columns
            # the hidden layer takes more memory than the rest of the block
            return torch.cat([recomputed(self._mlp, part) for part in slices], 1), rows, columns

    def _slices(self, distances: Tensor) -> tuple[Tensor, ...]:
        """Rows of distances whose hidden layers have the working size; all where a graph leaves their number open."""
        if is_open(distances.shape[0]) or is_open(distances.shape[1]):
            return (distances,)
        size = _SLICE if torch.compiler.is_compiling() else working_bytes(distances.device, cpu=_SLICE)
        return distances.split(max(1, size // (distances.shape[1] * self.fc1_bias.nbytes)))

    def _mlp(self, distances: Tensor) -> Tensor:
        """`[n, m, 2] -> [heads, n, m]`."""
        hidden = F.linear(distances.flatten(0, 1), self.fc1_weight, self.fc1_bias).relu_()
        y = torch.addmm(self.fc2_bias[:, None], self.fc2_weight, hidden.transpose(0, 1))
        return y.unflatten(1, distances.shape[:2])


def _resize(dense: Tensor, size: Grid, keys: Grid) -> BiasTable:
    """Resize a dense bias `[heads, keys_y, H, keys_x, W]` to other grids; the table has an entry for each pair."""
    nominal = dense.shape[2::2]
    bias = F.interpolate(dense.permute(0, 2, 4, 1, 3).flatten(1, 2), keys, mode="bilinear")
    bias = F.interpolate(bias.flatten(2).transpose(1, 2).unflatten(2, nominal), size, mode="bilinear")
    table = bias.unflatten(1, keys).transpose(2, 3).flatten(3).flatten(1, 2)
    rows, columns = (torch.arange(k * n, device=dense.device).view(k, n) for k, n in zip(keys, size, strict=True))
    return table, rows, columns


@token_mixer(
    "length_scaled_cosine",
    no_weight_decay=("temperature", "query_embedding", "fc1_weight", "fc2_weight"),
    num_heads=heads(24),
    trained_size=lambda place: place.side,
)
@register_notrace_module
class LengthScaledCosine(nn.Module):
    """Full attention with cosine logits scaled by the log of the number of keys; `x: [B, C, H, W] -> [B, C, H, W]`.

    One linear layer gives q, k and v. With hat(q) = q / |q|_2 in each head and N = H*W,

        y = proj(softmax((hat(q) + e) hat(k)^T * softplus(t) * ln(N) + bias) v)

    where e `query_embedding` and t `temperature` are learned per head and `bias` is `LogPositionBias` (Shi, arXiv
    2311.17132, "length-scaled cosine attention"). `trained_size` is the side of the map that the weights were trained
    with. If `nominal_size` is given, the bias is computed for a square map of that side and resized, as in the
    interpolation mode of the released dense-prediction models.

    Raises ValueError if num_heads does not divide dim, trained_size < 2 or nominal_size < 1.
    """

    def __init__(self, dim: int, *, num_heads: int, trained_size: int, nominal_size: int | None = None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"LengthScaledCosine: dim={dim} must be divisible by num_heads={num_heads}")
        if nominal_size is not None and nominal_size < 1:
            raise ValueError(f"LengthScaledCosine: nominal_size={nominal_size} must be at least 1, or None")
        self.num_heads, self.nominal_size = num_heads, nominal_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads))
        self.position = LogPositionBias(num_heads, trained_size=trained_size)
        self.proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_query(self.temperature, self.query_embedding)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(self.proj, self.attend(self.project(x)).flatten(3)).permute(0, 3, 1, 2)

    def project(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, H, W, 3, heads, head_dim]`: q, k and v."""
        return apply_linear(self.qkv, x.permute(0, 2, 3, 1)).unflatten(-1, (3, self.num_heads, -1))

    def attend(self, qkv: Tensor) -> Tensor:
        """`[B, H, W, 3, heads, head_dim] -> [B, H, W, heads, head_dim]`."""
        size = (qkv.shape[1], qkv.shape[2])
        nominal = None if self.nominal_size is None else ((self.nominal_size,) * 2,) * 2
        bias = expand_bias(*self.position(size, size, nominal)).permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)
        return length_scaled_cosine(qkv, bias, temperature=self.temperature, query_embedding=self.query_embedding)

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The attention weights of the query."""
        return qkv_attention(self.attend, self.project(x), query)


def reset_query(temperature: Tensor, query_embedding: Tensor) -> None:
    """The published initialization: softplus(temperature) = 1/0.24."""
    nn.init.constant_(temperature, math.log(math.exp(1 / 0.24) - 1))
    trunc_normal_(query_embedding, std=0.02)


def _log(count: int, like: Tensor) -> float | Tensor:
    """ln(count), as a tensor where the graph being exported leaves the count open."""
    return like.new_full((1,), count).log() if is_open(count) else math.log(count)


def length_scaled_cosine(qkv: Tensor, bias: Tensor, *, temperature: Tensor, query_embedding: Tensor) -> Tensor:
    """`qkv: [B, H, W, 3, N, D]`, `bias: [N, H*W, H*W]` -> `[B, H, W, N, D]`."""
    height, width = qkv.shape[1:3]
    q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
    with without_autocast(qkv):
        scale = F.softplus(temperature) * _log(height * width, temperature)
        q, k = (l2_normalize(q, dim=-1) + query_embedding) * scale, l2_normalize(k, dim=-1)
        y = fused_attention(q.to(v.dtype), k.to(v.dtype), v, bias[None].to(v.dtype), scale=1.0)
    return y.transpose(1, 2).unflatten(1, (height, width))
