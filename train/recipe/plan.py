"""PLACEHOLDER train/recipe/plan.py"""

import dataclasses
import math
import typing

from ..errors import UserError
from .schema import Recipe


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe comes to on this data and this many processes, counted in steps (updates) and images."""

    steps: int
    warmup: int
    epoch_steps: int
    micro_batch: int
    accumulate: int
    lr: float
    lr_text: str
    cooldown: int = 0
    milestones: tuple[int, ...] = ()


def plan(recipe: Recipe, *, samples: int, world_size: int) -> Plan:
    """Convert epochs, batches and the lr rule once. Raises UserError where they do not fit together."""
    batch, optim, sched = recipe.data.batch, recipe.optim, recipe.sched
    if batch > samples:
        raise UserError(
            f"data.batch={batch} is larger than the {samples} training images; use data.batch={samples} or less"
        )
    micro = recipe.data.micro_batch or batch // world_size
    if not micro or batch % (micro * world_size):
        raise UserError(
            f"data.batch={batch} is no multiple of data.micro_batch={micro or 'null'} x {world_size} processes; "
            "choose a batch that divides evenly"
        )
    if (recipe.data.aug.mixup or recipe.data.aug.cutmix) and micro % 2:
        raise UserError(f"mixup and cutmix pair images, but a micro-batch holds {micro}; make data.micro_batch even")
    per_unit = samples / batch if sched.epochs else 1
    steps = sched.steps or math.ceil(typing.cast(float, sched.epochs) * per_unit)
    warmup = round(sched.warmup * per_unit)
    if warmup >= steps:
        raise UserError(
            f"sched.warmup={sched.warmup:g} ({warmup} steps) leaves nothing of the {steps} steps; shorten it"
        )
    cooldown = round(sched.cooldown * per_unit)
    if warmup + cooldown >= steps:
        raise UserError(
            f"sched.cooldown={sched.cooldown:g} ({cooldown} steps) and the warm-up leave nothing of the {steps} steps; "
            "shorten it"
        )
    ratio = batch / optim.lr_base_batch
    factor = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[optim.lr_rule]
    text = f"{optim.lr * factor:.3g}"
    if optim.lr_rule != "none":
        text += f" = {optim.lr:g} x {'sqrt ' * (optim.lr_rule == 'sqrt')}({batch} / {optim.lr_base_batch})"
    return Plan(
        steps=steps,
        warmup=warmup,
        epoch_steps=max(1, round(samples / batch)),
        micro_batch=micro,
        accumulate=batch // (micro * world_size),
        lr=optim.lr * factor,
        lr_text=f"{text}, rule {optim.lr_rule}, global batch {batch}",
        cooldown=cooldown,
        milestones=tuple(round(milestone * per_unit) for milestone in sched.milestones or ()),
    )
