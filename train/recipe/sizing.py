"""Keys with the value `auto`: the numbers that they stand for on a data set, as docs/recipes.md lists them.

`sized` replaces them once the number of training images is known. The run directory records the recipe with numbers,
and a later start takes them from there (`recorded`), so that a run does not change when images are added.
"""

import dataclasses
import math
from typing import Any

from .load import flatten
from .registry import Auto, task_spec
from .schema import Recipe

AUTO = "auto"
SHARED_KEYS = (
    "data.batch",
    "sched.epochs",
    "sched.warmup",
    "sched.patience",
    "optim.layer_decay",
    "ema.decay",
    "eval.every",
    "ckpt.every",
    "log.every",
    "parallel.precision",
)
"""The keys that `sized` replaces, besides those of the task; `tasks.models` resolves `model.pretrained`."""
IMAGES = 200_000  # training images that a run sees, as far as `Auto.epochs` allows it
UPDATES_PER_EPOCH = 8  # at least, as far as `Auto.batch` allows it
WARMUP = 0.05  # of the training
LAYER_DECAY = 0.9
PATIENCE = 10
EVALUATIONS, EVALUATIONS_PER_EPOCH = 30, 2
LOG_LINES, LOG_EVERY = 100, 50
AVERAGED = 0.05  # part of the training over which the moving average extends
DECAY = (0.9, 0.9998)  # lowest and highest decay of the moving average


def auto_keys(recipe: Recipe) -> list[str]:
    """The dotted keys that `sized` replaces."""
    found = flatten(recipe)
    return [key for key in (*SHARED_KEYS, *task_spec(recipe).auto.keys) if found[key] == AUTO]


def sized(recipe: Recipe, *, samples: int, processes: int = 1, multiple: int = 1, bf16: bool = False) -> Recipe:
    """The recipe with numbers for `auto`.

    samples: size of the training split; multiple: what the task needs micro-batches to be a multiple of; bf16: whether
    the device has it.
    """
    limits = task_spec(recipe).auto
    chosen: dict[str, Any] = {}

    def value(key: str, automatic: Any) -> Any:
        section, _, name = key.partition(".")
        given = getattr(getattr(recipe, section), name)
        if given != AUTO:
            return given
        chosen[key] = automatic
        return automatic

    divisor = processes * (recipe.data.micro_batch or multiple)
    batch = value("data.batch", batch_size(samples, limits, divisor))
    epoch = samples / batch
    epochs = value("sched.epochs", None if recipe.sched.steps else epoch_count(samples, limits))
    steps = recipe.sched.steps or math.ceil(epochs * epoch)
    length = epochs or steps
    value("sched.warmup", round(length * WARMUP, 2) if epochs else round(steps * WARMUP))
    from_weights = starts_from_weights(recipe)
    value("optim.layer_decay", LAYER_DECAY if from_weights else None)
    # from random weights, the first evaluations say little about the later ones
    value("sched.patience", PATIENCE if from_weights else None)
    value("ema.decay", round(min(max(1 - 1 / max(AVERAGED * steps, 1), DECAY[0]), DECAY[1]), 5))
    often = max(1, round(max(steps / EVALUATIONS, epoch / EVALUATIONS_PER_EPOCH)))
    evaluate = value("eval.every", often)
    value("ckpt.every", evaluate or max(1, round(epoch)))
    value("log.every", min(max(1, steps // LOG_LINES), LOG_EVERY))
    value("parallel.precision", "bf16" if bf16 else "fp32")
    for key, choose in limits.keys.items():
        value(key, choose(recipe))
    return replaced(recipe, chosen)


def batch_size(samples: int, limits: Auto, divisor: int) -> int:
    """The largest power of two that leaves 8 updates an epoch, within the task's range and the number of samples.

    It is then rounded down to a multiple of `divisor`, at least one.
    """
    low, high = limits.batch
    power = 2 ** int(math.log2(max(samples / UPDATES_PER_EPOCH, 1)))
    return max(min(max(power, low), high, samples) // divisor, 1) * divisor


def epoch_count(samples: int, limits: Auto) -> float:
    """Epochs in which 200,000 images are seen, within the task's range."""
    low, high = limits.epochs
    return float(min(max(round(IMAGES / samples), low), high))


def starts_from_weights(recipe: Recipe) -> bool:
    """Whether the recipe names initial weights."""
    found = flatten(recipe)
    names = ("model.pretrained", "model.init_from", *task_spec(recipe).init_keys)
    return any(found[name] for name in names)


def recorded(recipe: Recipe, begun: Recipe) -> Recipe:
    """The recipe with the numbers that an earlier start of its run, `begun`, has in the place of `auto`."""
    known = flatten(begun)
    keys = auto_keys(recipe) + ["model.pretrained"] * (recipe.model.pretrained == AUTO)
    return replaced(recipe, {key: known[key] for key in keys if key in known})


def replaced(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with other values of the keys `section.key`."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        changed = dataclasses.replace(getattr(recipe, section), **{name: value})
        recipe = dataclasses.replace(recipe, **{section: changed})
    return recipe


def describe_auto(asked: Recipe, recipe: Recipe) -> str | None:
    """The keys for which `asked` has `auto`, with their numbers in `recipe`; None if there are none."""
    values = flatten(recipe)
    shown = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    texts = [f"{key}={'null' if shown[key] is None else shown[key]}" for key in auto_keys(asked)]
    return f"auto: {', '.join(texts)}" if texts else None
