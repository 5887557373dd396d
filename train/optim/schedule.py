"""PLACEHOLDER train/optim/schedule.py"""

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from ..errors import UserError
from ..recipe.plan import Plan
from ..recipe.schema import Recipe


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
