"""Evaluation of the published weights of a segmenter or detector, by the recipe of its training."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints import read_state
from .distributed.parallel import prepare_model
from .errors import UserError
from .evaluate import check_eval_keys, start
from .evaluation import run_evaluation, without_initial_weights
from .recipe.load import find_recipe, load_recipe
from .recipe.registry import task_spec
from .tasks.base import Task


class Reproduction(NamedTuple):
    """The metrics that an evaluation found, and the published value of the first.

    names: metric -> name, the primary one first. expected: the sentence in the recipe's head. published: its first
    number of the primary metric; None if it has none.
    """

    metrics: dict[str, Any]
    names: dict[str, str]
    expected: str
    published: float | None


def evaluate_published(source: str, overrides: list[str], weights: Path, *, state_key: str = "") -> Reproduction:
    """Evaluate the weights in the file `weights`, at `state_key`, on the validation split of the recipe `source`.

    The file has mmsegmentation's or mmdetection's names for the heads and the paper's for the backbone. Raises
    UserError if it does not fit the recipe.
    """
    recipe = without_initial_weights(load_recipe(source, check_eval_keys(overrides)))
    spec = task_spec(recipe)
    if not weights.is_file():
        raise UserError(f"--weights {weights}: no such file")
    with start(recipe) as world:
        task: Task = spec.build(recipe, world)
        model: Any = task.build_model()
        if spec.metric is None or not hasattr(model, "load_published"):
            raise UserError(f"{source} has task.kind={recipe.task.kind}; give a recipe of segmentation or detection")
        with world.raise_on_all_ranks():
            try:
                model.load_published(read_state(weights, state_key=state_key))
            except (ValueError, OSError) as error:
                raise UserError(f"{weights} does not fit the model of {source}: {error}") from error
        prepare_model(model, recipe.parallel, world)
        metrics = run_evaluation(task, model, world, recipe.parallel)
        assert metrics is not None
        names = {spec.metric.key: spec.metric.name, **spec.metric_names}
        found = metrics.compute()
    expected = expectation(find_recipe(source).read_text(encoding="utf-8"))
    number = re.search(rf"{spec.metric.name} (\d+(?:\.\d+)?)", expected)
    names = {key: name for key, name in names.items() if key in found}
    return Reproduction(found, names, expected, float(number[1]) if number else None)


def expectation(recipe: str) -> str:
    """What the head of a recipe says in its entry `expected`, in one line; empty if it has none."""
    match = re.search(r"^# expected: *(.*(?:\n# {6,}.*)*)", recipe, re.MULTILINE)
    return re.sub(r"\s*\n#\s*", " ", match[1]).strip() if match else ""
