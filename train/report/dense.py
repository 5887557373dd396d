"""The sections of a segmenter or detector: figures by class, predictions beside the truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..distributed.world import World
from ..errors import UserError
from ..recipe.registry import TASKS, task_spec
from .page import WIDTH, Contents, picture
from .runs import Run

NAMED = 60  # most classes that are drawn by name: the best and the worst half of them
COLUMNS, SHOWN = 2, 8  # pictures a row and in all


def headline(run: Run, result: Mapping[str, Any]) -> tuple[str, str]:
    """The figure of merit, and what it is."""
    assert run.metric is not None
    return f"{result[run.metric.key]:.1f} %", f"{run.metric.name} on {result['count']:,} held-out images{run.when}"


def sections(run: Run, folder: Path) -> dict[str, Contents]:
    return {"Classes": lambda: classes(run, folder), "Predictions": lambda: predictions(run, folder)}


def classes(run: Run, folder: Path) -> tuple[str, str]:
    """Each figure by class, in the order of the first."""
    figures: dict[str, dict[str, float]] = run.evaluated()["classes"]
    first, values = next(iter(figures.items()))
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        raise UserError("the held-out images hold none of the classes")
    ranked = sorted(known, key=known.__getitem__, reverse=True)
    shown = ranked if len(ranked) <= NAMED else [*ranked[: NAMED // 2], *ranked[-NAMED // 2 :]]
    text = f"{_title(first)} by class{run.when}: {ranked[0]} is the easiest, {ranked[-1]} the hardest."
    if len(shown) < len(ranked):
        text += f" Shown are the best {NAMED // 2} and the worst {NAMED // 2} of {len(ranked)}."
    return text, picture(folder, "classes", "figures by class", lambda: draw_classes(figures, shown))


def predictions(run: Run, folder: Path) -> tuple[str, str]:
    """The first held-out images as the task draws them."""
    run.evaluated()
    task = task_spec(run.recipe).build(run.recipe, World())
    try:
        pictures = [image for _, image in task.pictures(run.predictions, SHOWN)]
    except KeyError as error:
        raise UserError(f"the evaluation's predictions.npz lacks {error}; {run.judge} makes it anew") from error
    text = "The first held-out images: the truth on the left, the prediction on the right."
    return text, picture(folder, "predictions", "truth and predictions", lambda: draw_pictures(pictures))


def draw_classes(figures: Mapping[str, Mapping[str, float]], shown: Sequence[str]) -> Figure:
    """A row for each class of `shown`, best on top, and a mark for each figure."""
    figure = Figure(figsize=(WIDTH, 1.0 + 0.2 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for number, (key, values) in enumerate(figures.items()):
        places = [values.get(name) for name in shown]
        marks = [np.nan if value is None else value for value in places]
        axes.plot(marks, range(len(shown)), "o" if not number else "d", color=f"C{number}", label=_title(key))
    axes.set(xlabel="%", xlim=(-2, 102))
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    if len(figures) > 1:
        figure.legend(loc="outside upper left", ncols=len(figures))
    return figure


def draw_pictures(pictures: Sequence[Image.Image]) -> Figure:
    """Side by side, at one width."""
    rows = [pictures[at : at + COLUMNS] for at in range(0, len(pictures), COLUMNS)]
    gap = 0.04
    heights = [max(image.height / image.width for image in row) for row in rows]
    total = sum(heights) + gap * len(rows)
    figure = Figure(figsize=(WIDTH, WIDTH / COLUMNS * total))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    top = 0.0
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            below = top + (1 - gap) * image.height / image.width
            # pixels of a miniature stay pixels
            axes.imshow(image, extent=(column, column + 1 - gap, below, top), interpolation="nearest")
        top += height + gap
    axes.set(xlim=(0, COLUMNS - gap), ylim=(total, 0))
    return figure


def _title(key: str) -> str:
    """A figure as people call it."""
    names: dict[str, str] = {}
    for task in TASKS.values():
        names |= {**task.metric_names, **({task.metric.key: task.metric.name} if task.metric else {})}
    return names.get(key, key)
