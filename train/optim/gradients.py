"""Gradient clipping, and what happens to an update whose gradient is not finite."""

import math

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ..distributed.parallel import to_local
from ..recipe.schema import Optim


def clip_gradients(optimizer: torch.optim.Optimizer, optim: Optim) -> torch.Tensor:
    """Clip the gradients in place by `optim.clip` and `optim.clip_mode`; return their L2 norm before clipping."""
    # the optimizer's parameter groups: walking through the model's modules takes 1 % of a small model's step
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
    """Adaptive gradient clipping (Brock et al., arXiv 2102.06171, eq. 3) of sharded parameters.

    The result is that of timm's `adaptive_clip_grad` on the unsharded parameters.
    """
    for parameter in parameters:
        assert parameter.grad is not None
        grad = parameter.grad.detach()
        limit = unit_norm(parameter.detach()).clamp(min=1e-3) * factor
        norm = unit_norm(grad)
        to_local(grad).mul_(torch.where(norm < limit, 1.0, limit / norm.clamp(min=1e-6)))


def unit_norm(tensor: torch.Tensor) -> torch.Tensor:
    """The L2 norm per unit: of each row of the local shard, `[rows, 1, ...]`, or of a whole vector or scalar, `[]`.

    FSDP shards dimension 0, so a row is never split; the norm of a sharded vector is reduced over the processes.
    """
    if tensor.ndim > 1:
        return torch.linalg.vector_norm(to_local(tensor), dim=tuple(range(1, tensor.ndim)), keepdim=True)
    norm = torch.linalg.vector_norm(tensor)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class NonFiniteError(Exception):
    """The gradient norm of an update is NaN or infinite, and no more updates may be skipped."""

    def __init__(self, step: int, norm: float, loss: float):
        super().__init__(f"loss {loss:g} and gradient norm {norm:g} at step {step}")
        self.step, self.norm, self.loss = step, norm, loss


class NonFiniteGuard:
    """Skips updates whose gradient norm is not finite, and stops the run after more than `max_skips` in a row.

    With `max_skips=0` a GPU norm is checked one step later, so that the CPU does not wait for the GPU at every step.
    The update is then applied unchecked; the run stops before these weights are evaluated or saved.
    """

    def __init__(self, max_skips: int, scaler: torch.amp.GradScaler):
        self.max_skips, self.scaler = max_skips, scaler
        self.skipped = 0  # in a row
        self.unchecked: tuple[int, torch.Tensor, torch.Tensor] | None = None  # step, norm and loss

    def should_apply(self, step: int, norm: torch.Tensor, loss: torch.Tensor) -> bool:
        """Whether to apply the update of `step`; False skips it. Raises NonFiniteError."""
        if self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return True  # fp16 overflow: GradScaler skips the update itself and lowers its scale
        if norm.device.type != "cpu" and not self.max_skips:
            self.check_deferred()
            self.unchecked = step, norm, loss
            return True
        return self._check(step, norm, loss)

    def check_deferred(self) -> None:
        """Check the update that was applied unchecked, if there is one. Raises NonFiniteError."""
        unchecked, self.unchecked = self.unchecked, None
        if unchecked:
            self._check(*unchecked)

    def _check(self, step: int, norm: torch.Tensor, loss: torch.Tensor) -> bool:
        if math.isfinite(norm):
            self.skipped = 0
            return True
        self.skipped += 1
        if self.skipped > self.max_skips:
            raise NonFiniteError(step, float(norm), float(loss))
        return False
