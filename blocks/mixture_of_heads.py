"""Mixture-of-head attention (MoH): the heads of an attention are weighted for each position, some of them by zero."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.precision import acc_dtype
from ..kernels.recording import exporting
from ..kernels.tables import cache_tensors
from .auxiliary import AuxiliaryLoss
from .full_attention import FullAttention
from .linear import apply_linear
from .plain import is_plain
from .registry import Place, heads, token_mixer


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over the last axis, in float32 or wider."""
    return logits.softmax(-1, dtype=acc_dtype(logits))


class HeadGates(AuxiliaryLoss):
    """The weight of each head for each position, `u: [B, H, W, C] -> [B, H, W, num_heads]`.

    The first S = `shared` heads always count, of the E others the k = `routed` with the largest p = softmax(W_r u). T
    are these k heads.

        s = S softmax(W_s u)        r[e] = k p[e] / (sum of p over T) for e in T, else 0        c = 2 softmax(W_g u)
        weights = [c[0] s, c[1] r]        if k = 0: s        if S = 0: r        if S = 1: s = 1

    In training mode it adds `balance` E sum_e mean(p[e]) mean(e in T), with means over all positions of the batch, to
    the losses of the model (Jin et al., arXiv 2410.11842).

    Raises ValueError for numbers of heads that do not fit.
    """

    def __init__(self, dim: int, *, num_heads: int, shared: int, routed: int, balance: float = 0.01):
        super().__init__()
        if not 0 <= shared <= num_heads or not 0 <= routed <= num_heads - shared:
            raise ValueError(
                f"HeadGates: shared={shared} heads and routed={routed} of the others do not fit num_heads={num_heads}"
            )
        if not routed and shared != num_heads:
            raise ValueError(f"HeadGates: routed=0 leaves heads unused; set shared={num_heads}, which is num_heads")
        self.shared, self.routed, self.balance = shared, routed, balance
        self.shared_router = nn.Linear(dim, shared, bias=False) if shared > 1 else None
        self.routed_router = nn.Linear(dim, num_heads - shared, bias=False) if routed else None
        self.group_router = nn.Linear(dim, 2, bias=False) if routed and shared else None

    def forward(self, u: Tensor) -> Tensor:
        shared, routed, groups = self._logits(u)
        if routed is None:
            return torch.ones_like(u[..., :1]) if shared is None else self.shared * probabilities(shared)
        routed = self._select(routed)
        if groups is None:
            return self.routed * routed
        # the factors S and k of the two groups are applied to the two weights of the groups
        (factors,) = _factors(max(1, self.shared), self.routed, u.device)
        first, second = (probabilities(groups) * factors).split(1, -1)
        return torch.cat([first if shared is None else first * probabilities(shared), second * routed], -1)

    def _logits(self, u: Tensor) -> list[Tensor | None]:
        """The logits of the shared heads, of the routed heads and of the two groups; None where there is no router."""
        routers = [self.shared_router, self.routed_router, self.group_router]
        present = [router for router in routers if router is not None]
        if len(present) > 1 and is_plain(*present) and not exporting():
            # one product, since each is small
            weight = torch.cat([router.weight for router in present])
            parts = iter(F.linear(u, weight).split([len(router.weight) for router in present], -1))
        else:
            parts = (router(u) for router in present)
        return [None if router is None else next(parts) for router in routers]

    def _select(self, logits: Tensor) -> Tensor:
        """p of the largest `routed` of the last axis, scaled to the sum 1, and 0 of the others."""
        top, indices = logits.topk(self.routed, -1)
        weights = probabilities(top)  # the factor that softmax over all heads would add cancels
        zeros = torch.zeros_like(logits, dtype=weights.dtype)
        if self.training:
            shares = zeros.scatter(-1, indices, 1.0).mean((0, 1, 2))
            mean = probabilities(logits).mean((0, 1, 2))
            self.add_loss(mean @ shares * (self.balance * len(mean)))
        return zeros.scatter(-1, indices, weights)


@cache_tensors
def _factors(shared: int, routed: int, device: torch.device) -> tuple[Tensor]:
    return (torch.tensor([2.0 * shared, 2.0 * routed], device=device),)


def _full_attention(place: Place) -> FullAttention:
    return FullAttention(place.dim, num_heads=heads(32)(place))


@token_mixer("mixture_of_heads", fixed=("attention",), attention=_full_attention)
@register_notrace_module
class MixtureOfHeads(nn.Module):
    """`proj(g * heads(x))` with the weight g of each head for each position; `x: [B, C, H, W] -> [B, C, H, W]`.

    `attention` is any mixer with an attribute `num_heads`, whose last layer is `proj`, before which each head has the
    C / num_heads channels in its place: `FullAttention`, `Aggregated`, `LengthScaledCosine` and others. This module
    takes over its `proj`. `HeadGates` computes g from x (Jin et al., arXiv 2410.11842).

    shared: heads that always count, None for a quarter of them. routed: how many of the others count for a position,
    None for half of all heads.

    All heads are computed, so heads that do not count save no time.

    Raises ValueError for numbers of heads that do not fit.
    """

    def __init__(
        self,
        dim: int,
        *,
        attention: nn.Module,
        shared: int | None = None,
        routed: int | None = None,
        balance: float = 0.01,
    ):
        super().__init__()
        self.num_heads = int(attention.num_heads)  # type: ignore[arg-type]
        shared = max(1, self.num_heads // 4) if shared is None else shared
        routed = self.num_heads // 2 if routed is None else routed
        self.gates = HeadGates(dim, num_heads=self.num_heads, shared=shared, routed=routed, balance=balance)
        self.attention, self.proj = attention, attention.get_submodule("proj")
        attention.proj = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1))
        gates = self.gates(x.permute(0, 2, 3, 1)).unsqueeze(-1)
        return apply_linear(self.proj, (y * gates.to(y.dtype)).flatten(3)).permute(0, 3, 1, 2)
