"""Agent attention: a few agent tokens gather from all positions, then every position reads from the agents."""

from math import isqrt

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..kernels.sdpa import attention_to_few, fused_attention
from ..kernels.tables import Grid, cache_tensors
from .linear import apply_linear
from .pooling import adaptive_pool
from .registry import by_stage, heads, token_mixer

# side of the coarse table of the position bias
_TABLE = 7


@cache_tensors
def linear_weights(old: int, new: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
    """The weights of linear interpolation from `old` to `new` samples, `[new, old]`."""
    exact = torch.promote_types(dtype, torch.float32)
    position = (torch.arange(new, device=device, dtype=exact) + 0.5) * old / new - 0.5
    distance = position.clamp(0, old - 1)[:, None] - torch.arange(old, device=device, dtype=exact)
    return ((1 - distance.abs()).clamp_min(0).to(dtype),)


class AgentBias(nn.Module):
    """A learned bias for each agent and position, `[heads, agents, H*W]`: a coarse table plus row and column terms.

        bias[h, a, (y, x)] = resize(table)[h, a, y, x] + resize(rows)[h, a, y] + resize(columns)[h, a, x]

    The table has 7 x 7 entries, rows and columns have `trained_size` each; all are resized bilinearly to the map. If
    the agents lie on another grid than the square of the parameters, the agent axis is resized in the same way. With
    `class_token` the first column is that of the class token (Han et al.,
    arXiv 2312.08874, agent bias).
    """

    def __init__(self, num_heads: int, *, agents: int, trained_size: int, class_token: bool = False):
        super().__init__()
        self.side = isqrt(agents)
        self.table = nn.Parameter(torch.empty(num_heads, agents, _TABLE, _TABLE))
        self.rows = nn.Parameter(torch.empty(num_heads, agents, trained_size))
        self.columns = nn.Parameter(torch.empty(num_heads, agents, trained_size))
        self.token = nn.Parameter(torch.empty(num_heads, agents, 1)) if class_token else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            trunc_normal_(parameter, std=0.02)

    def resized_weight(self, name: str, weight: Tensor) -> Tensor:
        """Rows or columns of another `trained_size`, resized linearly to ours, as the published fine-tuning does."""
        own = getattr(self, name)
        if name not in ("rows", "columns") or weight.shape[:-1] != own.shape[:-1]:
            return weight
        return F.interpolate(weight, own.shape[-1], mode="linear")

    def forward(self, size: Grid, agents: Grid) -> Tensor:
        """The bias for a map of `size` and agents on a grid of `agents`."""
        table, rows, columns = (self._by_agents(t, agents) for t in (self.table, self.rows, self.columns))
        vertical, horizontal = (
            F.interpolate(t, side, mode="linear") for t, side in zip((rows, columns), size, strict=True)
        )
        down, across = (linear_weights(_TABLE, side, table.device, table.dtype)[0] for side in size)
        # faster than `F.interpolate` of the table; each row of `down` sums to 1, so the column terms can be added first
        on_rows = table @ across.T + horizontal.unsqueeze(-2)
        bias = (down @ on_rows + vertical.unsqueeze(-1)).flatten(2)
        return bias if self.token is None else torch.cat([self._by_agents(self.token, agents), bias], 2)

    def _by_agents(self, x: Tensor, agents: Grid) -> Tensor:
        """Resize the agent axis of `x: [heads, agents, ...]`."""
        if agents == (self.side, self.side):
            return x
        on_grid = x.flatten(2).transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.interpolate(on_grid, agents, mode="bilinear").flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])


@token_mixer(
    "agent",
    fixed=("class_token",),
    num_heads=heads(32),
    trained_size=lambda place: place.side,
    agents=by_stage(9, 16, 49, 49),
)
@register_notrace_module
class Agent(nn.Module):
    """Two small softmax attentions with agent tokens between them; `x: [B, C, H, W] -> [B, C, H, W]`.

    One linear layer gives q, k and v. Agents A are q, average-pooled to a square grid of `agents` tokens. In each head

        gathered = softmax(A k^T / sqrt(head_dim) + b1) v        y = softmax(q A^T / sqrt(head_dim) + b2^T) gathered
        result = proj(y + local(v))

    where b1 and b2 are an `AgentBias` each and `local` is a 3x3 depthwise convolution (Han et al., arXiv 2312.08874).
    The cost is linear in H*W. `trained_size` is the side of the map that the weights were trained
    with; biases are resized to the actual map. With `pool_side` the agents lie on a grid of that side instead, and the
    biases are resized to it, as in the published dense-prediction models.

    With `class_token` the mixer is called with tokens `[B, C, 1, 1 + H*W]`, of which the first is the class token, and
    the size (H, W) of the map. The class token is a query and a key; pooling and convolution leave it out.

    Raises ValueError if num_heads does not divide dim, agents is not a square, or a size is below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        trained_size: int,
        agents: int = 49,
        pool_side: int | None = None,
        class_token: bool = False,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Agent: dim={dim} must be divisible by num_heads={num_heads}")
        if agents < 1 or isqrt(agents) ** 2 != agents:
            raise ValueError(f"Agent: agents={agents} must be the square of a number of at least 1, such as 49")
        if trained_size < 1:
            raise ValueError(f"Agent: trained_size={trained_size} must be at least 1")
        if pool_side is not None and pool_side < 1:
            raise ValueError(f"Agent: pool_side={pool_side} must be at least 1, or None for sqrt(agents)")
        self.num_heads, self.class_token = num_heads, class_token
        side = pool_side or isqrt(agents)
        self.agent_grid = (side, side)
        bias = {"agents": agents, "trained_size": trained_size, "class_token": class_token}
        self.qkv = nn.Linear(dim, 3 * dim)
        self.gather_bias = AgentBias(num_heads, **bias)
        self.read_bias = AgentBias(num_heads, **bias)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: Grid | None = None) -> Tensor:
        shape = x.shape[2:]
        size, first = (shape[0], shape[1]) if size is None else size, int(self.class_token)
        q, k, v = apply_linear(self.qkv, x.permute(0, 2, 3, 1)).flatten(1, 2).chunk(3, -1)  # [B, tokens, C]
        agents = adaptive_pool(as_map(q[:, first:], size), self.agent_grid).flatten(2).transpose(1, 2)
        q, k, values, agents = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v, agents))
        gathered = fused_attention(agents, k, values, self.gather_bias(size, self.agent_grid)[None])
        y = attention_to_few(q, agents, gathered, self.read_bias(size, self.agent_grid)[None])
        local = self.local(as_map(v[:, first:], size)).permute(0, 2, 3, 1).flatten(1, 2)
        y = y.transpose(1, 2).flatten(2) + (F.pad(local, (0, 0, 1, 0)) if self.class_token else local)
        return apply_linear(self.proj, y).unflatten(1, shape).permute(0, 3, 1, 2)


def as_map(tokens: Tensor, size: Grid) -> Tensor:
    """`[B, H*W, C] -> [B, C, H, W]`."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)
