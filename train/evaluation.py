"""PLACEHOLDER train/evaluation.py"""

import dataclasses
import difflib
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from .. import zoo as zoo  # registers the models with timm, for load_run
from .distributed.parallel import autocast
from .distributed.world import World
from .errors import UserError
from .files import replacing, write_atomically, writing
from .recipe.load import load_recipe
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
    """The task's scores over the validation split; None if `stop()` turned true on any process."""
    scores, batches, training = task.scores(keep=keep), task.eval_batches(), model.training
    model.eval()
    try:
        # no_grad rather than inference_mode: tables that a model caches here serve its training too
        with world.raise_on_all_ranks(), torch.no_grad(), autocast(parallel, world):
            for batch in batches:
                if stop():
                    break
                scores.update(model, batch)
    finally:
        model.train(training)
        batches.close()
    return None if world.any_rank(stop()) else scores


def save_evaluation(run: Path, scores: MetricAccumulator, facts: dict[str, Any], world: World) -> dict[str, Any]:
    """Write `evaluation/` into the run directory, complete or not at all; the figures and `facts`."""
    figures, predictions = scores.compute() | scores.details() | facts, scores.predictions()
    path = run / "evaluation"
    with world.raise_on_all_ranks():
        if world.main:
            with writing(path), replacing(path) as part:
                np.savez_compressed(part / "predictions.npz", **predictions)  # type: ignore[arg-type]
                write_atomically(part / "evaluation.json", json.dumps(figures, indent=1) + "\n")
    return figures


def draw(task: Any, predictions: Mapping[str, np.ndarray], folder: Path, count: int) -> None:
    """`folder/NNNNNN.png` of each of the first `count` predictions that were kept, all or none."""
    with writing(folder), replacing(folder) as part:
        for index, picture in task.pictures(predictions, count):
            picture.save(part / f"{index:06d}.png")


def load_run(run: str | Path) -> tuple[Recipe, nn.Module]:
    """The recipe and the trained model of a finished run, in evaluation mode on the CPU."""
    path = Path(run)
    recipe = load_recipe(_recipe_file(path))
    _finished(path)
    if recipe.task.kind != "classify":
        return recipe, importlib.import_module(f".tasks.{recipe.task.kind}", __package__).load(path / "export")
    return recipe, timm.create_model(f"local-dir:{path / 'export'}", pretrained=True).eval()


def load_checkpoint(path: Path, model: nn.Module, world: World) -> int:
    """Give `model` the weights of a checkpoint, averaged ones if it has them; its step."""
    if problem := checkpoint.broken(path):
        raise UserError(f"checkpoint {path} is broken ({problem}); {checkpoint.sound_sibling(path)}")
    facts = checkpoint.manifest(path)
    part = "ema" if facts["averaged"] else "model"
    state = {part: model.state_dict()}
    checkpoint.load(path, state, world)
    model.load_state_dict(state[part])
    return facts["step"]


def opened(target: Path, overrides: list[str]) -> tuple[Path, Recipe]:
    """The run directory of a run or checkpoint, and its recipe with nothing to be fetched for its model."""
    run = target.absolute().parent.parent if (target / checkpoint.MANIFEST).is_file() else target
    recipe = load_recipe(_recipe_file(run), overrides)
    model = dataclasses.replace(recipe.model, pretrained=False, init_from=None)
    segment = dataclasses.replace(recipe.task.segment, load_from=None)
    return run, dataclasses.replace(recipe, model=model, task=dataclasses.replace(recipe.task, segment=segment))


def _same_classes(found: list[str], trained: list[str] | None, target: Path) -> None:
    """Raise UserError where the data has other classes than the model learned: its outputs would be misread."""
    if trained is None or found == trained:
        return
    at = next((i for i, pair in enumerate(zip(found, trained, strict=False)) if pair[0] != pair[1]), None)
    which = f"{len(found)} classes" if at is None else f"class {at} is {found[at]}"
    there = f"{len(trained)}" if at is None else trained[at]
    raise UserError(
        f"the data has other classes than {target} was trained on: {which}, there {there}; judge it on data with the "
        "same classes in the same order"
    )


def _recipe_file(run: Path) -> Path:
    if not (run / "recipe.yaml").is_file():
        near = [] if run.exists() else difflib.get_close_matches(str(run), timm.list_models(), n=3)
        hint = f"; did you mean the model {' or '.join(near)}?" if near else ""
        raise UserError(f"{run} is no run directory and no checkpoint: it holds no recipe.yaml{hint}")
    return run / "recipe.yaml"


def _finished(run: Path) -> dict[str, Any]:
    """The figures of a finished run."""
    if not (run / "DONE").is_file():
        raise UserError(
            f"{run} is not finished and has no export: go on training it, or evaluate one of {run}/checkpoints/step-*"
        )
    return json.loads((run / "DONE").read_text())
