"""What a recipe amounts to on a data set and a number of processes: steps, micro-batches and learning rate."""

import dataclasses
import math
import typing

from ..errors import UserError
from .schema import Recipe


@dataclasses.dataclass(frozen=True)
class Plan:
    """Lengths in steps (updates), batches in images per process, and the scaled peak learning rate."""

    steps: int
    warmup: int
    epoch_steps: int
    micro_batch: int
    accumulate: int
    lr: float
    lr_text: str
    cooldown: int = 0
    milestones: tuple[int, ...] = ()
    freeze: int = 0  # first steps, in which the backbone does not change


def plan(recipe: Recipe, *, samples: int, world_size: int, micro_batch_multiple: int = 1) -> Plan:
    """Convert epochs to steps, divide the batch over the processes, and apply the lr rule.

    samples: size of the training split; micro_batch_multiple: the task needs micro-batches of a multiple of this.
    Raises UserError if batch sizes or lengths do not fit together.
    """
    batch, optim, sched = recipe.data.batch, recipe.optim, recipe.sched
    if batch > samples:
        raise UserError(
            f"data.batch={batch} is larger than the {samples} training images; use data.batch={samples} or less, or "
            "data.batch=auto"
        )
    micro = recipe.data.micro_batch or batch // world_size
    if not micro or batch % (micro * world_size):
        raise UserError(
            f"data.batch={batch} is not a multiple of data.micro_batch={micro or 'null'} x {world_size} processes; "
            "choose a batch size that is"
        )
    if micro % micro_batch_multiple:
        raise UserError(
            f"the task needs micro-batches of a multiple of {micro_batch_multiple} images, but each has {micro}; "
            "change data.micro_batch or data.batch"
        )
    per_unit = samples / batch if sched.epochs else 1
    steps = sched.steps or math.ceil(typing.cast(float, sched.epochs) * per_unit)
    warmup = round(sched.warmup * per_unit)
    if warmup >= steps:
        raise UserError(
            f"sched.warmup={sched.warmup:g} ({warmup} steps) must be shorter than the training ({steps} steps); lower "
            f"sched.warmup, for example to sched.warmup={_twentieth(recipe)}, or train for longer "
            f"(sched.{'epochs' if sched.epochs else 'steps'})"
        )
    freeze = round(sched.freeze * per_unit)
    if freeze >= steps:
        raise UserError(
            f"sched.freeze={sched.freeze:g} ({freeze} steps) must be shorter than the training ({steps} steps); "
            "model.freeze=backbone freezes the backbone for the whole training"
        )
    cooldown = round(sched.cooldown * per_unit)
    if warmup + cooldown >= steps:
        raise UserError(
            f"sched.cooldown={sched.cooldown:g} ({cooldown} steps) and the warm-up ({warmup} steps) must be shorter "
            f"than the training ({steps} steps)"
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
        freeze=freeze,
    )


def _twentieth(recipe: Recipe) -> str:
    """5 % of the training, in the unit of its length, as text."""
    sched = recipe.sched
    return f"{sched.epochs / 20:g}" if sched.epochs else str((sched.steps or 0) // 20)
