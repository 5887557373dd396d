"""The update: timm's optimizers and schedules, clipping, and what happens to a gradient that is not finite."""

import difflib
import math
import re
from functools import partial
from typing import Any

import timm.optim
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from .config import Plan
from .errors import UserError
from .parallel import local
from .schema import Optim, Recipe


def build_optimizer(model: nn.Module, optim: Optim, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer; its groups keep decay off biases, norms and what the model's no_weight_decay names."""
    known = [str(name) for name in timm.optim.list_optimizers()]
    if (name := optim.name) not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["adamw"]
        raise UserError(f"optim.name={name!r} is unknown to timm; did you mean {' or '.join(near)}?")
    grouping: dict[str, Any] = {
        "weight_decay": optim.weight_decay,
        "layer_decay": optim.layer_decay,
        "filter_bias_and_bn": not optim.decay_norms,
    }
    if optim.lr_factors:
        grouping["param_group_fn"] = partial(factored_groups, optim=optim, lr=lr)
    try:
        return timm.optim.create_optimizer_v2(model, name, lr, **grouping, **optim.kwargs)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AssertionError) as error:
        raise UserError(f"optim.name={name} cannot be built with optim.kwargs={optim.kwargs}: {error}") from error


def factored_groups(model: nn.Module, optim: Optim, lr: float) -> list[dict[str, Any]]:
    """timm's parameter groups, cut by `optim.lr_factors`; a group's schedule starts at its own lr and ends with all."""
    spared = getattr(model, "no_weight_decay", set)()
    args: dict[str, Any] = {"no_weight_decay_list": spared, "weight_decay_exclude_1d": not optim.decay_norms}
    if optim.layer_decay is None:
        groups = param_groups_weight_decay(model, optim.weight_decay, **args)
    else:
        groups = param_groups_layer_decay(model, optim.weight_decay, layer_decay=optim.layer_decay, **args)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern in optim.lr_factors:
        try:
            found = [name for name in names.values() if re.search(pattern, name)]
        except re.error as error:
            raise UserError(f"optim.lr_factors: {pattern!r} is no regular expression ({error})") from error
        if not found:
            raise UserError(
                f"optim.lr_factors: {pattern!r} is found in no name of a trained parameter; they are called "
                f"{next(iter(names.values()))} and the like"
            )
    cut = []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            factors = (factor for pattern, factor in optim.lr_factors.items() if re.search(pattern, names[parameter]))
            parts.setdefault(next(factors, 1.0), []).append(parameter)
        cut += [{**group, "params": members, "lr": lr * factor} for factor, members in parts.items()]
    return cut


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, plan: Plan) -> Scheduler:
    """timm's schedule, counted in steps; it also applies each group's layer decay."""
    sched, rest = recipe.sched, plan.steps - plan.warmup
    decay = sched.decay_steps or round(0.2 * rest)
    if sched.name in ("wsd", "rsqrt") and not 0 < decay <= rest:
        raise UserError(
            f"sched.decay_steps={sched.decay_steps or 'null'} ({decay} steps) does not fit sched.name={sched.name}: of "
            f"{plan.steps} steps, {plan.warmup} are warm-up; make it 1 to {rest}, or train for more"
        )
    if sched.name == "rsqrt" and not plan.warmup:
        raise UserError("sched.name=rsqrt decays in units of its warm-up; give sched.warmup of a step or more")
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched.name,
        num_epochs=plan.steps - plan.cooldown,
        warmup_epochs=plan.warmup,
        warmup_lr=sched.warmup_lr,
        min_lr=sched.min_lr,
        decay_rate=sched.decay_rate or (1.0 if sched.name == "poly" else 0.1),
        decay_epochs=sched.decay_steps,
        # timm decays a step before the milestone it is given
        decay_milestones=[milestone + 1 for milestone in plan.milestones],
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert schedule is not None
    return schedule


def clip(optimizer: torch.optim.Optimizer, optim: Optim) -> torch.Tensor:
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
        local(grad).mul_(torch.where(norm < limit, 1.0, limit / norm.clamp(min=1e-6)))


def unit_norm(tensor: torch.Tensor) -> torch.Tensor:
    """The norm of each of this process's rows [rows, 1, ...], or of a whole vector over all processes []."""
    if tensor.ndim > 1:
        # shards are cut between rows
        return torch.linalg.vector_norm(local(tensor), dim=tuple(range(1, tensor.ndim)), keepdim=True)
    norm = torch.linalg.vector_norm(tensor)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


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
