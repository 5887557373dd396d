"""`compare`: all measures of all models, kept in a file so that a comparison that was stopped goes on."""

import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..train.errors import UserError, one_line
from ..train.files import write_atomically
from .matching import cost, matched
from .measures import costs, field, speeds
from .page import write_page
from .subjects import Subject
from .training import recipe_digest, train

FORMAT = 1
FILE = "comparison.json"


class Results:
    """The measured values by a key that says what was measured and how, in a file that is written after each."""

    def __init__(self, path: Path):
        self.path, self.values = path, dict[str, Any]()
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("format") != FORMAT:
                raise UserError(f"{path} has format {content.get('format')}, not {FORMAT}; choose another --out")
            self.values = content["measured"]

    def once(self, key: Sequence[Any], measure: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The value of `key`: that in the file, or else what `measure` returns for the arguments."""
        text = json.dumps(key)
        if text not in self.values:
            self.values[text] = measure(*arguments, **options)
            self.write([])
        return self.values[text]

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        content = {"format": FORMAT, "tessel": __version__, "torch": torch.__version__, "rows": rows}
        write_atomically(self.path, json.dumps({**content, "measured": self.values}, indent=1) + "\n")


def compare(
    subjects: Sequence[Subject],
    out: Path,
    *,
    sizes: Sequence[int] = (224,),
    match: str | None = None,
    batch: int = 8,
    seconds: float = 3.0,
    device: str = "cpu",
    recipe: str | None = None,
    seeds: int = 1,
    progress: Callable[[str, float], None] = lambda text, fraction: None,
) -> list[dict[str, Any]]:
    """A row of measures for each subject and size; writes comparison.json and index.html into the folder `out`.

    match: "gmacs" or "parameters": the models of the lab get the cost of the first subject at the first size. batch,
    seconds: of the timing, per model; without seconds there are no speeds. recipe, seeds: trains each model so often.
    progress: told what begins, and the fraction that is done. A comparison that was stopped goes on from
    comparison.json. Raises UserError naming a model that does not fit.
    """
    out.mkdir(parents=True, exist_ok=True)
    results, done = Results(out / FILE), itertools.count()
    total = len(sizes) * (len(subjects) + 1) + (len(subjects) * seeds if recipe else 0)

    def begin(text: str) -> None:
        progress(text, next(done) / total)

    if match:
        target = cost(subjects[0], sizes[0], match)
        subjects = [subjects[0], *(_matched(results, s, target, sizes[0], match) for s in subjects[1:])]
    rows = []
    for size in sizes:
        measured = []
        for subject in subjects:
            begin(f"{subject.label} at {size}")
            key = [*subject.key, size]
            found = results.once(["cost", *key], _named, costs, subject, size)
            measured.append({**found, **results.once(["field", *key], _named, field, subject, size)})
        begin(f"speeds at {size}")
        fast: dict[str, dict[str, float]] = {}
        if seconds:
            timing = {"batch": batch, "seconds": seconds, "device": device}
            keys = [subject.key for subject in subjects]
            fast = results.once(["speed", keys, size, timing], speeds, subjects, size, **timing)
        rows += [
            {
                "model": subject.label,
                "size": size,
                "options": dict(subject.options),
                **row,
                **fast.get(subject.label, {}),
            }
            for subject, row in zip(subjects, measured, strict=True)
        ]
    if recipe:
        for subject in subjects:
            digest, runs = recipe_digest(recipe, subject.name), []
            for seed in range(seeds):
                begin(f"{subject.label}: training {seed + 1} of {seeds}")
                key = ["train", *subject.key, recipe, digest, seed]
                runs.append(results.once(key, train, subject, recipe, seed, out / "runs"))
            values = [run["value"] for run in runs]
            accuracy = {"accuracy": statistics.mean(values), "accuracies": values, "metric": runs[0]["metric"]}
            for row in rows:
                row.update(accuracy if row["model"] == subject.label else {})
    results.write(rows)
    write_page(rows, out, title="Comparison", recipe=recipe)
    return rows


def _matched(results: Results, subject: Subject, target: float, size: int, by: str) -> Subject:
    key = ["match", *subject.key, target, size, by]
    return subject.changed(**results.once(key, lambda: dict(matched(subject, target, size, by).options)))


def _named(measure: Callable[[Subject, int], dict[str, Any]], subject: Subject, size: int) -> dict[str, Any]:
    """The measure; a UserError that names the model if it does not accept these images."""
    try:
        return measure(subject, size)
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{subject.label} with images of {size} x {size}: {one_line(error)}") from error
