"""The learning-rate schedule: timm's schedulers, counted in optimizer steps."""

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from ..errors import UserError
from ..recipe.plan import Plan
from ..recipe.schema import Recipe


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, plan: Plan) -> Scheduler:
    """timm's scheduler for `recipe.sched`. Its `step_update(step)` sets the learning rates and keeps no history.

    timm multiplies the rate of each parameter group by the group's `lr_scale`, which is its layer decay. Raises
    UserError if `sched.decay_steps` or the warm-up does not fit the number of steps.
    """
    sched, rest = recipe.sched, plan.steps - plan.warmup
    decay = sched.decay_steps or round(0.2 * rest)
    if sched.name in ("wsd", "rsqrt") and not 0 < decay <= rest:
        raise UserError(
            f"sched.decay_steps={sched.decay_steps or 'null'} ({decay} steps) does not fit sched.name={sched.name}: of "
            f"{plan.steps} steps, {plan.warmup} are warm-up; make it 1 to {rest}, or train for more steps"
        )
    if sched.name == "rsqrt" and not plan.warmup:
        raise UserError(
            "sched.name=rsqrt takes the length of the warm-up as its time scale; give sched.warmup of at least one step"
        )
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched.name,
        num_epochs=plan.steps - plan.cooldown,
        warmup_epochs=plan.warmup,
        warmup_lr=sched.warmup_lr,
        min_lr=sched.min_lr,
        decay_rate=sched.decay_rate or (1.0 if sched.name == "poly" else 0.1),
        decay_epochs=sched.decay_steps,
        # timm lowers the rate one step before the milestone it is given
        decay_milestones=[milestone + 1 for milestone in plan.milestones],
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert schedule is not None
    return schedule
