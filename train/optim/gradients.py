"""The update: timm's optimizers and schedules, clipping, and what happens to a gradient that is not finite."""

import math

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ..distributed.parallel import to_local
from ..recipe.schema import Optim


def clip_gradients(optimizer: torch.optim.Optimizer, optim: Optim) -> torch.Tensor:
    """Clip the gradients as the recipe says; their norm before that."""
    # from its groups, a list: to walk through the model's modules at every update would cost a percent of a small one's
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if optim.clip and optim.clip_mode == "agc" and any(isinstance(parameter, DTensor) for parameter in parameters):
        clip_units(parameters, optim.clip)
    elif optim.clip:
        dispatch_clip_grad(parameters, optim.clip, mode=optim.clip_mode)
    return norm


def clip_units(parameters: list[nn.Parameter], factor: float) -> None:
    """Adaptive clipping (Brock et al., arXiv 2102.06171, equation 3) of shards, to what timm's makes of the whole."""
    for parameter in parameters:
        assert parameter.grad is not None
        grad = parameter.grad.detach()
        limit = unit_norm(parameter.detach()).clamp(min=1e-3) * factor
        norm = unit_norm(grad)
        to_local(grad).mul_(torch.where(norm < limit, 1.0, limit / norm.clamp(min=1e-6)))


def unit_norm(tensor: torch.Tensor) -> torch.Tensor:
    """The norm of each of this process's rows [rows, 1, ...], or of a whole vector over all processes []."""
    if tensor.ndim > 1:
        # shards are cut between rows
        return torch.linalg.vector_norm(to_local(tensor), dim=tuple(range(1, tensor.ndim)), keepdim=True)
    norm = torch.linalg.vector_norm(tensor)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class NonFiniteError(Exception):
    """A gradient that is not finite, where no more may be skipped."""

    def __init__(self, step: int, norm: float, loss: float):
        super().__init__(f"loss {loss:g} and gradient norm {norm:g} at step {step}")
        self.step, self.norm, self.loss = step, norm, loss


class NonFiniteGuard:
    """Decides for each update whether it is applied: a non-finite one is skipped, and after `max_skips` in a row fatal.

    Where the only other choice is to stop, a GPU is asked one step late, so that nothing waits for it.
    """

    def __init__(self, max_skips: int, scaler: torch.amp.GradScaler):
        self.max_skips, self.scaler = max_skips, scaler
        self.skipped = 0
        self.unchecked: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def admits(self, step: int, norm: torch.Tensor, loss: torch.Tensor) -> bool:
        """Whether to apply the update of `step`. Raises NonFiniteError."""
        if self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return True  # an overflow is the scaler's to skip as long as it has scale to give up
        if norm.is_cuda and not self.max_skips:
            self.check_deferred()
            self.unchecked = step, norm, loss
            return True
        return self._judge(step, norm, loss)

    def check_deferred(self) -> None:
        """VariantEvaluator the update that was applied unjudged, if any. Raises NonFiniteError."""
        unchecked, self.unchecked = self.unchecked, None
        if unchecked:
            self._judge(*unchecked)

    def _judge(self, step: int, norm: torch.Tensor, loss: torch.Tensor) -> bool:
        if math.isfinite(norm):
            self.skipped = 0
            return True
        self.skipped += 1
        if self.skipped > self.max_skips:
            raise NonFiniteError(step, float(norm), float(loss))
        return False
