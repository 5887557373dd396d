"""Trainings with a recipe, one for each model or probe and each seed."""

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..train.errors import UserError
from ..train.recipe.load import dump, load_recipe
from ..train.recipe.registry import task_spec
from .subjects import Subject


def train(subject: Subject, recipe: str, seed: int, out: Path) -> dict[str, Any]:
    """Train with the packaged recipe or file `recipe`, or continue, in a folder of `out`; see `train_run`."""
    overrides = [
        f"model.name={subject.name}",
        f"model.kwargs={json.dumps(dict(subject.options))}",
        *("model.pretrained=false", "model.init_from=null", f"run.seed={seed}"),
    ]
    name = f"{folder_name(subject.label)}-{recipe_digest(recipe, subject.name)}-seed{seed}"
    return train_run(recipe, overrides, out / name, "--train")


def recipe_digest(recipe: str, model: str, overrides: Sequence[str] = ()) -> str:
    """Eight hexadecimal digits that change with any value of the recipe, so that an edited recipe is trained anew."""
    values = dump(load_recipe(recipe, [*overrides, f"model.name={model}"]))
    return f"{zlib.crc32(values.encode()):08x}"


def folder_name(label: str) -> str:
    """A name for the folder of a run of the model that the user called `label`."""
    return re.sub(r"\W+", "-", label).strip("-")[:80]


def train_run(recipe: str, overrides: Sequence[str], run: Path, option: str) -> dict[str, Any]:
    """Train in the folder `run`, or continue there.

    Returns the recipe's metric at the end, its name and the number of updates. Raises UserError if the training fails,
    and, naming the command's `option`, for a recipe without evaluation.
    """
    from ..train.__main__ import main

    overrides = [*overrides, f"run.name={run.name}", f"run.out={run.parent}"]
    metric = task_spec(load_recipe(recipe, overrides)).metric
    if metric is None:
        raise UserError(f"{option} {recipe}: this task has no evaluation to compare")
    done = run / "DONE"
    if not done.exists() and main([recipe, *overrides]):
        raise UserError(f"the training in {run} failed; its messages are above")
    found = json.loads(done.read_text(encoding="utf-8"))
    return {"value": found[metric.key], "metric": metric.name, "step": found["step"]}
