"""The update: timm's optimizers and schedules, clipping, and what happens to a gradient that is not finite."""

import difflib
import math

import timm.optim
import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from .config import Plan
from .schema import Optim, Recipe, UserError


def build_optimizer(model: nn.Module, optim: Optim, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer; its groups keep decay off biases, norms and what the model's no_weight_decay names."""
    known = [str(name) for name in timm.optim.list_optimizers()]
    if (name := optim.name) not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["adamw"]
        raise UserError(f"optim.name={name!r} is unknown to timm; did you mean {' or '.join(near)}?")
    groups = {"weight_decay": optim.weight_decay, "layer_decay": optim.layer_decay}
    try:
        return timm.optim.create_optimizer_v2(model, name, lr, **groups, **optim.kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.name={name} does not take optim.kwargs={optim.kwargs}: {error}") from error


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, plan: Plan) -> Scheduler:
    """timm's schedule, counted in steps; it also applies each group's layer decay."""
    sched = recipe.sched
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched.name,
        num_epochs=plan.steps,
        warmup_epochs=plan.warmup,
        warmup_lr=sched.warmup_lr,
        min_lr=sched.min_lr,
        decay_rate=sched.decay_rate or (1.0 if sched.name == "poly" else 0.1),
        decay_epochs=sched.decay_steps,
        decay_milestones=list(sched.milestones or ()),
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert schedule is not None
    return schedule


def clip(model: nn.Module, optim: Optim) -> torch.Tensor:
    """Clip the gradients as the recipe says; their norm before that."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if optim.clip:
        dispatch_clip_grad(parameters, optim.clip, mode=optim.clip_mode)
    return norm


class NonFinite(Exception):
    """A gradient that is not finite, where no more may be skipped."""

    def __init__(self, step: int, norm: float, loss: float):
        super().__init__(f"loss {loss:g} and gradient norm {norm:g} at step {step}")
        self.step, self.norm, self.loss = step, norm, loss


class Guard:
    """Decides for each update whether it is applied: a non-finite one is skipped, and after `max_skips` in a row fatal.

    Where the only other choice is to stop, a GPU is asked one step late, so that nothing waits for it.
    """

    def __init__(self, max_skips: int, scaler: torch.amp.GradScaler):
        self.max_skips, self.scaler = max_skips, scaler
        self.skipped = 0
        self.unchecked: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def admits(self, step: int, norm: torch.Tensor, loss: torch.Tensor) -> bool:
        """Whether to apply the update of `step`. Raises NonFinite."""
        if self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return True  # an overflow is the scaler's to skip as long as it has scale to give up
        if norm.is_cuda and not self.max_skips:
            self.settle()
            self.unchecked = step, norm, loss
            return True
        return self._judge(step, norm, loss)

    def settle(self) -> None:
        """Judge the update that was applied unjudged, if any. Raises NonFinite."""
        unchecked, self.unchecked = self.unchecked, None
        if unchecked:
            self._judge(*unchecked)

    def _judge(self, step: int, norm: torch.Tensor, loss: torch.Tensor) -> bool:
        if math.isfinite(norm):
            self.skipped = 0
            return True
        self.skipped += 1
        if self.skipped > self.max_skips:
            raise NonFinite(step, float(norm), float(loss))
        return False
