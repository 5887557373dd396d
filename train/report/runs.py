"""What a run directory holds."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import nn

from ..config import load_recipe
from ..data import build_dataset
from ..errors import UserError
from ..evaluate import load_run
from ..schema import Recipe


@dataclass(frozen=True)
class Metric:
    """The figure by which a task's runs are compared: its key in the logs, and how people call it."""

    key: str
    name: str


METRICS = {  # by task.kind
    "classify": Metric("top1", "top-1"),
    "segment": Metric("miou", "mIoU"),
    "detect": Metric("box_ap", "box AP"),
}


@dataclass(frozen=True)
class Run:
    """What a run directory holds: the recipe, the lines of `metrics.jsonl` by kind and, once evaluated, the evaluation.

    `predictions` has `target [N]`, `prediction [N]` and `probability [N, classes]`, in data-set order.
    """

    path: Path
    recipe: Recipe
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    scores: dict[str, Any] | None
    predictions: dict[str, np.ndarray] | None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def metric(self) -> Metric:
        return METRICS[self.recipe.task.kind]

    @property
    def result(self) -> dict[str, Any] | None:
        """The figures of the evaluation, else of the last one during training."""
        return self.scores or (self.evals[-1] if self.evals else None)

    @property
    def seconds(self) -> float:
        """Time spent in training steps, without evaluations and the pauses before a resume."""
        steps = np.diff([0, *(line["step"] for line in self.train)])
        return float(sum(steps * [line["step_seconds"] for line in self.train]))

    @cached_property
    def model(self) -> nn.Module:
        """The trained model. Raises UserError where there is none yet."""
        try:
            return load_run(self.path)[1]
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{self.path / 'export'} cannot be read: {error}") from error

    @cached_property
    def held_out(self) -> Any:
        """The validation split. Raises UserError where it cannot be read."""
        return build_dataset(self.recipe.data, "val")


def read_run(path: Path) -> Run:
    """Read a run directory. Raises UserError where `path` is none or a file in it is damaged."""
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is not a run directory: it has no recipe.yaml; name one that tessel.train made")
    recipe, metrics = load_recipe(path / "recipe.yaml"), path / "metrics.jsonl"
    try:
        # a run that is being written may end in half a line
        whole = metrics.read_text(encoding="utf-8").rpartition("\n")[0] if metrics.exists() else ""
        lines = [json.loads(line) for line in whole.splitlines()]
        train, evals = ([line for line in lines if line["kind"] == kind] for kind in ("train", "eval"))
        return Run(path, recipe, train, evals, *_read_evaluation(path / "evaluation"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the run in {path} cannot be read: {error}") from error


def one_metric(runs: Sequence[Run]) -> Metric:
    """The metric of runs of one task. Raises UserError where they are of several."""
    metrics = {run.metric for run in runs}
    if len(metrics) > 1:
        kinds = ", ".join(f"{run.path}: {run.recipe.task.kind}" for run in runs)
        raise UserError(f"runs of different tasks have no figure in common ({kinds}); report on those of one task")
    return metrics.pop()


def _read_evaluation(path: Path) -> tuple[dict[str, Any] | None, dict[str, np.ndarray] | None]:
    scores, predictions = path / "evaluation.json", path / "predictions.npz"
    if not (scores.is_file() and predictions.is_file()):
        return None, None
    with np.load(predictions) as arrays:
        return json.loads(scores.read_text(encoding="utf-8")), dict(arrays)


def command(run: Run, name: str, *changes: str) -> str:
    """The command that trains by the recipe of `run` once more, as a run of another name."""
    return shlex.join(["python", "-m", "tessel.train", str(run.path / "recipe.yaml"), f"run.name={name}", *changes])


def next_steps(run: Run) -> str:
    """What to type after the report on `run`."""
    seed, out = run.recipe.run.seed + 1, Path(run.recipe.run.out)
    twin, pair = out / f"{run.name}-seed{seed}", out / f"{run.name}-compared"
    return (
        f"  {shlex.join(['python', '-m', 'tessel.train.evaluate', str(run.path)])}    judge it again\n"
        f"  {command(run, twin.name, f'run.seed={seed}')}    train with another seed\n"
        f"  {shlex.join(['python', '-m', 'tessel.train.report', str(run.path), str(twin), '--out', str(pair)])}"
        "    and compare the two"
    )
