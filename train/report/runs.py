"""What a run directory holds."""

import json
import shlex
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np
from torch import nn

from ..errors import UserError, one_line
from ..evaluation import load_run
from ..recipe.load import load_recipe
from ..recipe.registry import Metric, open_dataset, task_spec
from ..recipe.schema import Recipe
from ..tasks.models import CREATE_ERRORS

# what json, numpy, zipfile and a look at their contents raise for files that are cut off, overwritten or another's
DAMAGES = (BadZipFile, EOFError, LookupError, OSError, RuntimeError, TokenError, TypeError, ValueError, zlib.error)
NEEDED = {"step", "epoch", "time", "step_seconds", "data_wait"}  # in each line on training


@dataclass(frozen=True)
class Run:
    """What a run directory holds: the recipe, the lines of `metrics.jsonl` by kind and, once evaluated, the evaluation.

    `done` has the figures with which training ended, `scores` those of the last evaluation, which may be of another
    checkpoint or on other data (its `overrides`). A classifier's `predictions` have `target [N]`, `prediction [N]` and
    `probability [N, classes]`, in data-set order.
    """

    path: Path
    recipe: Recipe
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    done: dict[str, Any] | None
    scores: dict[str, Any] | None
    predictions: dict[str, np.ndarray] | None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def metric(self) -> Metric | None:
        """The primary metric; None if the task has no evaluation."""
        return task_spec(self.recipe).metric

    @property
    def result(self) -> dict[str, Any] | None:
        """The figures of the evaluation as trained, else of the last one of the training."""
        if self.scores and not self.scores.get("overrides"):
            return self.scores
        return self.done or (self.evals[-1] if self.evals else None)

    @property
    def when(self) -> str:
        """Of which step the evaluation is, where that is not the one at which training ended."""
        step = (self.scores or {}).get("step")
        as_ended = self.result is not self.scores or step == (self.done or {}).get("step")
        return "" if as_ended else f", at step {step:,}"

    def evaluated(self) -> dict[str, Any]:
        """The figures of the evaluation. Raises UserError where there is none, or one on other data."""
        if self.scores is None:
            raise UserError(f"there is no evaluation yet; {self.judge} makes one")
        if overrides := self.scores.get("overrides"):
            raise UserError(f"the evaluation is with {' '.join(overrides)}; {self.judge} makes one as trained")
        return self.scores

    def predicted(self, *names: str) -> list[np.ndarray]:
        """These arrays of the predictions. Raises UserError like `evaluated`, and where one is lacking."""
        self.evaluated()
        assert self.predictions is not None
        if lacking := [name for name in names if name not in self.predictions]:
            file = self.path / "evaluation/predictions.npz"
            raise UserError(f"{file} lacks {', '.join(lacking)}; {self.judge} makes it anew")
        return [self.predictions[name] for name in names]

    @property
    def judge(self) -> str:
        """The command that evaluates the run as trained."""
        return judging(self.path)

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
        except UserError:
            raise
        except CREATE_ERRORS as error:
            raise UserError(f"{self.path / 'export'} cannot be read: {one_line(error)}") from error

    @cached_property
    def held_out(self) -> Any:
        """The validation split. Raises UserError where it cannot be read."""
        return open_dataset(self.recipe, "val")


def read_run(path: Path) -> Run:
    """Read a run directory. Raises UserError where `path` is none or a file in it is damaged."""
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is not a run directory: it has no recipe.yaml; name one that tessel.train made")
    recipe, done = load_recipe(path / "recipe.yaml"), path / "DONE"
    metric = task_spec(recipe).metric
    figures = {"step", *((metric.key, "count") if metric else ())}
    lines = _read_metrics(path / "metrics.jsonl", {"train": NEEDED, "eval": figures})
    with _reading(done, "remove it, and the command that trained the run finishes it again"):
        ended = _checked(json.loads(done.read_text(encoding="utf-8")), figures) if done.exists() else None
    with _reading(path / "evaluation", f"{judging(path)} makes it anew"):
        return Run(path, recipe, lines["train"], lines["eval"], ended, *_read_evaluation(path / "evaluation", figures))


def judging(path: Path) -> str:
    return shlex.join(["python", "-m", "tessel.train.evaluate", str(path)])


def one_metric(runs: Sequence[Run]) -> Metric | None:
    """The metric of runs of one task. Raises UserError where they are of several."""
    metrics = {run.metric for run in runs}
    if len(metrics) > 1:
        kinds = ", ".join(f"{run.path}: {run.recipe.task.kind}" for run in runs)
        raise UserError(f"runs of different tasks have no figure in common ({kinds}); report on those of one task")
    return metrics.pop()


def _read_metrics(file: Path, needed: dict[str, set[str]]) -> dict[str, list[dict[str, Any]]]:
    """The lines of each kind that is `needed`, with the keys that are."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in needed}
    with _reading(file, "mend or remove that line"):
        # a run that is being written may end in half a line
        whole = file.read_text(encoding="utf-8").rpartition("\n")[0] if file.exists() else ""
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                kind = (line := json.loads(text))["kind"]
                if kind in needed:
                    found[kind].append(_checked(line, needed[kind]))
            except DAMAGES as error:
                raise ValueError(f"line {number}: {one_line(error)}") from error
    return found


def _read_evaluation(path: Path, figures: set[str]) -> tuple[dict[str, Any] | None, dict[str, np.ndarray] | None]:
    scores, predictions = path / "evaluation.json", path / "predictions.npz"
    if not (scores.is_file() and predictions.is_file()):
        return None, None
    with open(predictions, "rb") as file, np.load(file) as arrays:
        return _checked(json.loads(scores.read_text(encoding="utf-8")), figures), dict(arrays)


def _checked(figures: dict[str, Any], needed: set[str]) -> dict[str, Any]:
    if lacking := sorted(needed - figures.keys()):
        raise ValueError(f"it lacks {', '.join(lacking)}")
    return figures


@contextmanager
def _reading(path: Path, remedy: str) -> Iterator[None]:
    """Turn what a damaged file raises within into the UserError that names it."""
    try:
        yield
    except (*DAMAGES, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); {remedy}") from error


def command(run: Run, name: str, *changes: str) -> str:
    """The command that trains by the recipe of `run` once more, as a run of another name."""
    return shlex.join(["python", "-m", "tessel.train", str(run.path / "recipe.yaml"), f"run.name={name}", *changes])


def next_steps(run: Run) -> str:
    """What to type after the report on `run`."""
    seed, out = run.recipe.run.seed + 1, Path(run.recipe.run.out)
    twin, pair = out / f"{run.name}-seed{seed}", out / f"{run.name}-compared"
    return (
        f"  {run.judge}    judge it again\n"
        f"  {command(run, twin.name, f'run.seed={seed}')}    train with another seed\n"
        f"  {shlex.join(['python', '-m', 'tessel.train.report', str(run.path), str(twin), '--out', str(pair)])}"
        "    and compare the two"
    )
