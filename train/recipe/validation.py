"""Rules between the shared keys of a recipe: which contradict each other, and which have no effect.

A key without effect is an error, since its author expects an effect. Keys that only parametrize a disabled feature
(`sched.warmup_lr` with `sched.warmup=0`) are allowed, so that one override can switch a feature off. The rules of a
single task are in its `TaskSpec.conflicts`.
"""

from collections.abc import Iterator

from .registry import SOURCES, sources_with, task_spec
from .schema import Recipe

# keys that a schedule reads besides its length, warm-up and end
SCHED_KEYS = {
    "step": {"decay_rate", "decay_steps"},
    "multistep": {"decay_rate", "milestones"},
    "poly": {"decay_rate"},
    "wsd": {"decay_steps"},
    "rsqrt": {"decay_steps"},
}
# timm's optimizers that need whole tensors, or use operations that DTensor lacks
UNSHARDED_OPTIMIZERS = ("adafactor", "adamp", "sgdp")


def conflicts(recipe: Recipe) -> Iterator[str]:
    """One sentence for each conflict between keys."""
    spec, source = task_spec(recipe), recipe.data.source
    kind = spec.sample_kind(recipe.task)
    if kind not in SOURCES[source].datasets:
        known = ", ".join(sources_with(kind))
        yield f"data.source={source} has no {kind}, which task.kind={spec.kind} reads here; use one of {known}"
    if not spec.any_channels and recipe.model.in_chans not in (None, 3):
        yield f"model.in_chans={recipe.model.in_chans} does not work with task.kind={spec.kind}, which reads 3 channels"
    yield from _schedule(recipe)
    yield from _optimizer(recipe)
    if recipe.sched.freeze and recipe.model.freeze == "backbone":
        yield "sched.freeze has no effect together with model.freeze=backbone; remove one of them"
    if spec.metric is None and recipe.sched.patience:
        yield f"sched.patience has no effect with task.kind={spec.kind}, which has no evaluation; remove it"
    if recipe.model.init_from and recipe.model.pretrained is True:
        yield "model.pretrained has no effect together with model.init_from; remove one of them"
    yield from spec.conflicts(recipe)


def _schedule(recipe: Recipe) -> Iterator[str]:
    sched = recipe.sched
    if sched.epochs != "auto" and (sched.epochs is None) == (sched.steps is None):
        yield "give one of sched.epochs and sched.steps"
    for key in ("decay_rate", "decay_steps", "milestones"):
        if getattr(sched, key) is not None and key not in SCHED_KEYS.get(sched.name, ()):
            yield f"sched.{key} has no effect with sched.name={sched.name}; remove it"
    for name, key in (("multistep", "milestones"), ("step", "decay_steps")):
        if sched.name == name and not getattr(sched, key):
            yield f"sched.name={name} needs sched.{key}"
    if sched.cooldown and sched.name not in ("cosine", "poly", "tanh"):
        yield f"sched.cooldown has no effect with sched.name={sched.name}; remove it"


def _optimizer(recipe: Recipe) -> Iterator[str]:
    optim, parallel = recipe.optim, recipe.parallel
    if parallel.shard and parallel.strategy != "hsdp":
        yield f"parallel.shard has no effect with parallel.strategy={parallel.strategy}; remove it"
    if parallel.precision == "fp16" and parallel.strategy != "ddp":
        yield f"parallel.precision=fp16 does not work with parallel.strategy={parallel.strategy}; use bf16"
    if parallel.strategy != "ddp" and optim.name in UNSHARDED_OPTIMIZERS:
        yield f"optim.name={optim.name} cannot update sharded parameters; use adamw, or parallel.strategy=ddp"
    if optim.name.startswith("lookahead"):
        inner = optim.name.partition("_")[2]
        yield f"optim.name={optim.name} keeps weights that its state dict does not contain; use {inner}"
    if optim.name == "adahessian":
        yield "optim.name=adahessian needs second derivatives, which this trainer does not compute; use adamw"


def check_range(key: str, pair: tuple[float, float]) -> Iterator[str]:
    """A sentence if `pair` is not a rising range of positive numbers."""
    if not 0 < pair[0] <= pair[1]:
        yield f"{key}={list(pair)} must be two positive numbers, the smaller one first"
