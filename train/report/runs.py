"""Reads a run directory for the report: recipe, metrics, evaluation, model and data."""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..errors import UserError, one_line
from ..evaluation import load_run
from ..recipe.load import load_recipe
from ..recipe.registry import Metric, open_dataset, task_spec
from ..recipe.schema import Recipe

REQUIRED_TRAIN_KEYS = {"step", "epoch", "time", "step_seconds", "data_wait"}  # of a "train" line in metrics.jsonl


@dataclass(frozen=True)
class RunRecord:
    """Contents of a run directory.

    train, evals: the lines of metrics.jsonl of these kinds. done: DONE, the metrics at the end of the training.
    evaluation: evaluation.json; it may be of another checkpoint, or with the recipe changed by its `overrides`.
    predictions: predictions.npz, in data-set order; a classifier's are `target [N]`, `prediction [N]` and
    `probability [N, classes]`.
    """

    path: Path
    recipe: Recipe
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    done: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    predictions: dict[str, np.ndarray] | None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def export(self) -> Path:
        """The folder with the exported model. Raises UserError if the run is not finished."""
        if not self.done:
            raise UserError(f"{self.path} is not finished and has no exported model yet")
        return self.path / "export"

    @property
    def metric(self) -> Metric | None:
        """The primary metric; None if the task has no evaluation."""
        return task_spec(self.recipe).metric

    @property
    def result(self) -> dict[str, Any] | None:
        """The metrics to report: evaluation.json unless it has overrides, else DONE, else the last eval line."""
        if self.evaluation and not self.evaluation.get("overrides"):
            return self.evaluation
        return self.done or (self.evals[-1] if self.evals else None)

    @property
    def at_step(self) -> str:
        """ ", at step N" if `result` is of another step than the last one of the training, else ""."""
        step = (self.evaluation or {}).get("step")
        as_ended = self.result is not self.evaluation or step == (self.done or {}).get("step")
        return "" if as_ended else f", at step {step:,}"

    def require_evaluation(self) -> dict[str, Any]:
        """evaluation.json. Raises UserError if there is none, or if it was made with overrides."""
        if self.evaluation is None:
            raise UserError(f"there is no evaluation yet; {self.evaluate_command} makes one")
        if overrides := self.evaluation.get("overrides"):
            raise UserError(
                f"the evaluation was made with {' '.join(overrides)}; {self.evaluate_command} makes one without"
            )
        return self.evaluation

    def require_predictions(self, *names: str) -> list[np.ndarray]:
        """The named arrays of predictions.npz. Raises UserError like `require_evaluation`, and for a missing array."""
        self.require_evaluation()
        assert self.predictions is not None
        if missing := [name for name in names if name not in self.predictions]:
            file = self.path / "evaluation/predictions.npz"
            raise UserError(f"{file} lacks {', '.join(missing)}; {self.evaluate_command} writes it again")
        return [self.predictions[name] for name in names]

    @property
    def evaluate_command(self) -> str:
        return evaluate_command(self.path)

    @property
    def last_step(self) -> int:
        """The last step in metrics.jsonl; 0 if there is none."""
        return max((line["step"] for line in [*self.train[-1:], *self.evals[-1:]]), default=0)

    @property
    def training_seconds(self) -> float:
        """Time spent in training steps: without evaluations, and without the time between two starts."""
        steps = np.diff([0, *(line["step"] for line in self.train)])
        return float(sum(steps * [line["step_seconds"] for line in self.train]))

    @property
    def unreadable(self) -> int:
        """Number of training samples that were unreadable and replaced, as corrupt.jsonl lists them."""
        file = self.path / "corrupt.jsonl"
        return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0

    @cached_property
    def model(self) -> nn.Module:
        """The trained model. Raises UserError if there is none yet or it cannot be read."""
        try:
            return load_run(self.path)[1]
        except UserError:
            raise
        except Exception as error:  # timm and safetensors raise many classes for damaged files
            raise UserError(f"{self.path / 'export'} cannot be read: {one_line(error)}") from error

    @cached_property
    def held_out(self) -> Any:
        """The validation split. Raises UserError if it cannot be read."""
        return open_dataset(self.recipe, "val")


def read_run(path: Path) -> RunRecord:
    """Read a run directory. Raises UserError if `path` is not one, or naming the file in it that is damaged."""
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is not a run directory: it has no recipe.yaml; name one that `tessel train` wrote")
    recipe, done = load_recipe(path / "recipe.yaml"), path / "DONE"
    metric = task_spec(recipe).metric
    required = {"step", *((metric.key, "count") if metric else ())}
    lines = _read_metrics(path / "metrics.jsonl", {"train": REQUIRED_TRAIN_KEYS, "eval": required})
    with _reading(done, "delete it, then the command that trained the run writes it again"):
        ended = _require(json.loads(done.read_text(encoding="utf-8")), required) if done.exists() else None
    with _reading(path / "evaluation", f"{evaluate_command(path)} writes it again"):
        evaluation, predictions = _read_evaluation(path / "evaluation", required)
    return RunRecord(path, recipe, lines["train"], lines["eval"], ended, evaluation, predictions)


def evaluate_command(path: Path) -> str:
    """The command that evaluates the run at `path` with its own recipe."""
    return shlex.join(["tessel", "evaluate", str(path)])


def one_metric(runs: Sequence[RunRecord]) -> Metric | None:
    """The main metric of runs of one task. Raises UserError for runs of several tasks."""
    metrics = {run.metric for run in runs}
    if len(metrics) > 1:
        kinds = ", ".join(f"{run.path}: {run.recipe.task.kind}" for run in runs)
        raise UserError(f"runs of different tasks have no metric in common ({kinds}); report on runs of one task")
    return metrics.pop()


def _read_metrics(file: Path, required: dict[str, set[str]]) -> dict[str, list[dict[str, Any]]]:
    """The lines of each kind in `required`, each of which must have the keys listed there."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in required}
    with _reading(file, "correct or delete that line"):
        # the last line of a running training may be incomplete
        complete = file.read_text(encoding="utf-8").rpartition("\n")[0] if file.exists() else ""
        for number, text in enumerate(complete.splitlines(), start=1):
            try:
                kind = (line := json.loads(text))["kind"]
                if kind in required:
                    found[kind].append(_require(line, required[kind]))
            except (LookupError, TypeError, ValueError) as error:
                raise ValueError(f"line {number}: {one_line(error)}") from error
    return found


def _read_evaluation(path: Path, required: set[str]) -> tuple[dict[str, Any] | None, dict[str, np.ndarray] | None]:
    evaluation, predictions = path / "evaluation.json", path / "predictions.npz"
    if not (evaluation.is_file() and predictions.is_file()):
        return None, None
    with open(predictions, "rb") as file, np.load(file) as arrays:
        return _require(json.loads(evaluation.read_text(encoding="utf-8")), required), dict(arrays)


def _require(metrics: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    if missing := sorted(keys - metrics.keys()):
        raise ValueError(f"it lacks {', '.join(missing)}")
    return metrics


@contextmanager
def _reading(path: Path, remedy: str) -> Iterator[None]:
    """Turn any exception in the block, which reads `path`, into a UserError that names it."""
    try:
        yield
    except Exception as error:  # json, numpy and zipfile raise a dozen classes for damaged files
        raise UserError(f"{path} cannot be read ({one_line(error)}); {remedy}") from error


def train_command(run: RunRecord, name: str, *overrides: str) -> str:
    """The command that trains with the recipe of `run` again, under another run name."""
    return shlex.join(["tessel", "train", str(run.path / "recipe.yaml"), f"run.name={name}", *overrides])


def next_steps(run: RunRecord) -> str:
    """Commands to type after the report on `run`, one per line with a comment."""
    seed, out = run.recipe.run.seed + 1, Path(run.recipe.run.out)
    other, both = out / f"{run.name}-seed{seed}", out / f"{run.name}-compared"
    return (
        f"  {run.evaluate_command}    evaluate it again\n"
        f"  {train_command(run, other.name, f'run.seed={seed}')}    train with another seed\n"
        f"  {shlex.join(['tessel', 'report', str(run.path), str(other), '--out', str(both)])}"
        "    compare the two runs"
    )
