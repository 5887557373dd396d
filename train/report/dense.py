"""Report sections of a segmentation or detection run: metrics by class, ground truth beside predictions."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..distributed.world import World
from ..errors import UserError
from ..recipe.registry import TASKS, task_spec
from .page import NARROW, Section, card, charts, gallery, picture, shorten, swatch
from .runs import RunRecord

MAX_CLASSES = 60  # drawn in the chart; of more, the best and the worst 30 are
MAX_PICTURES = 8


def headline(run: RunRecord, result: Mapping[str, Any]) -> tuple[str, str]:
    """The first tile of the page: value and label of the main metric."""
    assert run.metric is not None
    return f"{result[run.metric.key]:.1f} %", f"{run.metric.name} on {result['count']:,} held-out images{run.at_step}"


def sections(run: RunRecord, folder: Path) -> dict[str, Section]:
    return {
        "Classes": lambda: classes(run, folder),
        "Predictions": lambda: predictions(run),
    }


def classes(run: RunRecord, folder: Path) -> tuple[str, str]:
    """The metrics by class; classes are sorted by the first metric."""
    by_class: dict[str, dict[str, float]] = run.require_evaluation()["classes"]
    first, values = next(iter(by_class.items()))
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        raise UserError("the held-out images contain none of the classes")
    ranked = sorted(known, key=known.__getitem__, reverse=True)
    shown = ranked if len(ranked) <= MAX_CLASSES else [*ranked[: MAX_CLASSES // 2], *ranked[-MAX_CLASSES // 2 :]]
    text = f"{_title(first)} by class{run.at_step}"
    equal = known[ranked[0]] == known[ranked[-1]]
    text += "." if equal else f": best for {ranked[0]}, worst for {ranked[-1]}."
    if len(shown) < len(ranked):
        text += f" Shown are the best {MAX_CLASSES // 2} and the worst {MAX_CLASSES // 2} of {len(ranked)}."
    return text, charts([picture(folder, "classes", "metrics by class", lambda: draw_classes(by_class, shown))])


def predictions(run: RunRecord) -> tuple[str, str]:
    """The first held-out images, drawn by the task."""
    run.require_evaluation()
    task = task_spec(run.recipe).build(run.recipe, World())
    try:
        pictures = [image for _, image in task.pictures(run.predictions, MAX_PICTURES)]
        colors = task.legend(run.predictions, MAX_PICTURES)
    except KeyError as error:
        raise UserError(
            f"the evaluation's predictions.npz lacks {error}; {run.evaluate_command} writes it again"
        ) from error
    text = "The first held-out images: ground truth on the left, prediction on the right."
    cards = gallery((card(image, "", alt="ground truth and prediction") for image in pictures), least=400)
    return text, legend(colors) + cards


def legend(colors: Mapping[str, Sequence[int]]) -> str:
    """HTML of the names and colors of classes; nothing if there are none."""
    names = "".join(f"<span>{swatch(color)}{escape(name)}</span> " for name, color in colors.items())
    return f'<p class="legend">{names}</p>' if names else ""


def draw_classes(by_class: Mapping[str, Mapping[str, float]], shown: Sequence[str]) -> Figure:
    """A row per class of `shown`, best on top, with a marker per metric. by_class: metric -> class -> percent."""
    figure = Figure(figsize=(NARROW, 1.0 + 0.2 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for number, (key, values) in enumerate(by_class.items()):
        row_values = [values.get(name) for name in shown]
        percent = [np.nan if value is None else value for value in row_values]
        axes.plot(percent, range(len(shown)), "o" if not number else "d", color=f"C{number}", label=_title(key))
    axes.set(xlabel="%", xlim=(-2, 102))
    axes.set_yticks(range(len(shown)), [shorten(name, 24) for name in shown])
    axes.invert_yaxis()
    if len(by_class) > 1:
        figure.legend(loc="outside upper left", ncols=len(by_class))
    return figure


def _title(key: str) -> str:
    """The usual name of a metric."""
    names: dict[str, str] = {}
    for task in TASKS.values():
        names |= {**task.metric_names, **({task.metric.key: task.metric.name} if task.metric else {})}
    return names.get(key, key)
