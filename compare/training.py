"""Short trainings of each model with the same recipe, one for each seed."""

import json
import re
from pathlib import Path
from typing import Any

from ..train.errors import UserError
from ..train.recipe.load import load_recipe
from ..train.recipe.registry import task_spec
from .subjects import Subject


def train(subject: Subject, recipe: str, seed: int, out: Path) -> dict[str, Any]:
    """Train with the packaged recipe or file `recipe`, or continue, in a folder of `out`.

    Returns the recipe's metric at the end, its name and the number of updates. Raises UserError if the training fails.
    """
    from ..train.__main__ import main

    name = re.sub(r"\W+", "-", subject.label).strip("-")[:80] + f"-seed{seed}"
    overrides = [
        f"model.name={subject.name}",
        f"model.kwargs={json.dumps(dict(subject.options))}",
        *("model.pretrained=false", "model.init_from=null", f"run.seed={seed}", f"run.name={name}", f"run.out={out}"),
    ]
    metric = task_spec(load_recipe(recipe, overrides)).metric
    if metric is None:
        raise UserError(f"--train {recipe}: this task has no evaluation to compare")
    done = out / name / "DONE"
    if not done.exists() and main([recipe, *overrides]):
        raise UserError(f"the training of {subject.label!r} in {out / name} failed; its messages are above")
    found = json.loads(done.read_text(encoding="utf-8"))
    return {"value": found[metric.key], "metric": metric.name, "step": found["step"]}
