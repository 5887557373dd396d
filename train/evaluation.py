"""Evaluating a model: over the validation split, of a run or a checkpoint, and writing what was found."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from .. import zoo as zoo  # registers the models with timm, for load_run
from .data.loader import Loader
from .distributed.parallel import autocast
from .distributed.world import World, is_out_of_memory
from .errors import UserError, one_line
from .files import damaged_file, replacing, write_atomically, writing
from .recipe.load import load_recipe
from .recipe.registry import TASKS
from .recipe.schema import Parallel, Recipe
from .run import checkpoint
from .tasks.base import MetricAccumulator, Task


def run_evaluation(
    task: Task,
    model: nn.Module,
    world: World,
    parallel: Parallel,
    *,
    keep: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> MetricAccumulator | None:
    """The task's metrics over the validation split; None if `stop()` became true on any process.

    Raises UserError on every process for an unreadable sample: metrics over fewer samples would not be comparable.
    """
    metrics, batches, training = task.metrics(keep=keep), task.eval_batches(), model.training
    model.eval()
    try:
        # no_grad rather than inference_mode: tensors that a model caches here are used in training too
        with world.raise_on_all_ranks(), _memory_errors(), torch.no_grad(), autocast(parallel, world):
            for batch in _without_gaps(batches):
                if stop():
                    break
                metrics.update(model, batch)
    finally:
        model.train(training)
        batches.close()
    if world.any_rank(stop()):
        return None
    task.note_evaluation(metrics)
    return metrics


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn a lack of memory into a UserError, which is raised on all processes and before which updates are saved."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory in an evaluation ({one_line(error, 120)}): lower data.eval_batch, and start again"
        ) from error


def _without_gaps(batches: Loader) -> Iterator[Any]:
    """The batches; the error for an unreadable sample says why it is one."""
    try:
        yield from batches
    except UserError as error:
        if not batches.failures:
            raise
        raise UserError(
            f"{error}; an evaluation replaces no sample. tessel check RECIPE lists all broken files"
        ) from error


def save_evaluation(run: Path, metrics: MetricAccumulator, facts: dict[str, Any], world: World) -> dict[str, Any]:
    """Write `evaluation/` of the run directory, completely or not at all. Returns the metrics and `facts`."""
    found, predictions = metrics.compute() | metrics.details() | facts, metrics.predictions()
    path = run / "evaluation"
    with world.raise_on_all_ranks():
        if world.main:
            with writing(path), replacing(path) as part:
                np.savez_compressed(part / "predictions.npz", **predictions)  # type: ignore[arg-type]
                write_atomically(part / "evaluation.json", json.dumps(found, indent=1) + "\n")
    return found


def save_pictures(task: Task, predictions: Mapping[str, np.ndarray], folder: Path, count: int) -> None:
    """Write `folder/NNNNNN.png` for each of the first `count` kept predictions, all or none."""
    with writing(folder), replacing(folder) as part:
        for index, picture in task.pictures(predictions, count):
            picture.save(part / f"{index:06d}.png")


def load_run(run: str | Path) -> tuple[Recipe, nn.Module]:
    """The recipe and the trained model of a finished run, in evaluation mode on the CPU."""
    path = Path(run)
    recipe = load_recipe(recipe_file(path))
    read_done(path)
    return recipe, resolve_name(TASKS[recipe.task.kind].load)(path / "export")


def load_checkpoint(path: Path, model: nn.Module, world: World) -> int:
    """Load the weights of a checkpoint into `model`, averaged ones if it has them. Returns its step."""
    if problem := checkpoint.find_damage(path):
        raise UserError(f"checkpoint {path} is damaged ({problem}); {checkpoint.suggest_sibling(path)}")
    facts = checkpoint.read_manifest(path)
    part = "ema" if facts["averaged"] else "model"
    state = {part: model.state_dict()}
    checkpoint.load(path, state, world)
    model.load_state_dict(state[part])
    return facts["step"]


def open_run(target: Path, overrides: list[str]) -> tuple[Path, Recipe]:
    """The directory and the recipe of a run or checkpoint; the recipe without initial weights, which are not needed."""
    run = target.absolute().parent.parent if (target / checkpoint.MANIFEST).is_file() else target
    return run, without_initial_weights(load_recipe(recipe_file(run), overrides))


def without_initial_weights(recipe: Recipe) -> Recipe:
    """The recipe with the keys cleared that name weights to start from."""
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, pretrained=False, init_from=None))
    for key in TASKS[recipe.task.kind].init_keys:
        recipe = _without(recipe, key.split("."))
    return recipe


def _without(section: Any, path: list[str]) -> Any:
    """The section with the key at `path` set to None."""
    first, *rest = path
    value = _without(getattr(section, first), rest) if rest else None
    return dataclasses.replace(section, **{first: value})


def check_classes(found: list[str] | None, trained: list[str] | None, target: Path) -> None:
    """Raises UserError if the data has other classes than the model was trained on."""
    if found is None or trained is None or found == trained:
        return
    at = next((i for i, pair in enumerate(zip(found, trained, strict=False)) if pair[0] != pair[1]), None)
    which = f"{len(found)} classes" if at is None else f"class {at} is {found[at]}"
    before = f"{len(trained)}" if at is None else trained[at]
    raise UserError(
        f"the data has other classes than {target} was trained on: {which}, in training {before}; use data with the "
        "same classes in the same order"
    )


def recipe_file(run: Path) -> Path:
    """The recipe of a run directory. Raises UserError if `run` is none."""
    if not (run / "recipe.yaml").is_file():
        near = [] if run.exists() else difflib.get_close_matches(str(run), timm.list_models(), n=3)
        hint = f"; did you mean the model {' or '.join(near)}?" if near else ""
        if run.is_file():
            hint = f"; `tessel predict RUN {run}` predicts an image with a run"
        raise UserError(f"{run} is neither a run directory nor a checkpoint: it has no recipe.yaml{hint}")
    return run / "recipe.yaml"


def read_done(run: Path) -> dict[str, Any]:
    """The content of DONE: the metrics of a finished run. Raises UserError if it is not finished."""
    if not (run / "DONE").is_file():
        raise UserError(
            f"{run} is not finished and has no export; continue its training, or evaluate one of "
            f"{run}/checkpoints/step-*"
        )
    with damaged_file(run / "DONE", "delete it, then the command that trained the run writes it again"):
        done = json.loads((run / "DONE").read_text(encoding="utf-8"))
        return {**done, "step": int(done["step"])}
