"""Charts of metrics.jsonl over the training steps, of one run or of several."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from ..errors import UserError
from .page import NARROW, charts, picture, shorten
from .runs import RunRecord, one_metric

FEW_POINTS = 25  # curves of at most so many points get markers, so that a single point is visible
LEGEND_COLUMNS = 2
THIRD = 3.2  # width of one of three charts beside each other, inches
TITLES = {"lr": "Learning rate", "grad_norm": "Gradient norm, L2", "images_per_second": "Speed, images/s"}


def curves(runs: Sequence[RunRecord], folder: Path) -> tuple[str, str]:
    """The section with all charts."""
    if not any(run.train for run in runs):
        raise UserError("no training step is logged yet")
    waiting = np.mean([line["data_wait"] for run in runs for line in run.train])
    text = (
        "The loss has a logarithmic axis. The training loss is measured with augmentation, mixing and drop path on, so "
        f"it can lie above the loss on held-out images. Waiting for data took {waiting:.0%} of the time."
    )
    learning = [picture(folder, "loss", "loss by step", partial(draw_loss, runs))]
    if one_metric(runs):
        learning.append(picture(folder, "metric", "metric on held-out images by step", partial(draw_metric, runs)))
    rest = [picture(folder, key, f"{title} by step", partial(draw_key, runs, key)) for key, title in TITLES.items()]
    return text, charts(learning) + charts(rest)


def draw_loss(runs: Sequence[RunRecord]) -> Figure:
    """Loss on training and held-out images."""
    figure, axes = _chart(runs, NARROW, 3.0)
    for i, run in enumerate(runs):
        plot(axes, *series(run.train, "loss"), color=f"C{i}", linewidth=1.1, alpha=0.8)
        axes.plot(*series(run.evals, "loss"), **_held_out(runs, i))
    axes.set(title="Loss, logarithmic", yscale="log")
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    axes.minorticks_off()
    trained, evaluated = ("C0", "C1") if len(runs) == 1 else ("0.5", "0.5")
    axes.plot([], [], color=trained, linewidth=1.1, label="training")
    axes.plot([], [], color=evaluated, marker="o", markersize=3.2, label="held out")
    axes.legend()
    return figure


def draw_metric(runs: Sequence[RunRecord]) -> Figure:
    """The main metric on held-out images; of a single run with the value of its export, or else its last one."""
    metric = one_metric(runs)
    assert metric is not None
    figure, axes = _chart(runs, NARROW, 3.0)
    lowest: list[float] = []
    for i, run in enumerate(runs):
        steps, values = series(run.evals, metric.key)
        plot(axes, steps, values, **_held_out(runs, i))
        lowest += values
        if len(runs) == 1 and steps:  # of several, the values may lie on each other; the table has them
            # with early stopping, the export has the weights of an earlier evaluation
            kept = (run.done or {}).get("step")
            number = steps.index(kept) if kept in steps else len(steps) - 1
            place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "right" if number else "left"}
            ground = {"facecolor": rcParams["axes.facecolor"], "edgecolor": "none", "pad": 1}
            axes.annotate(f"{values[number]:.1f}", (steps[number], values[number]), color="C1", bbox=ground, **place)
    axes.set(title=f"{metric.name} on held-out images", ylabel="%")
    axes.margins(y=0.12)
    # curves that lie high up would be flat on an axis from 0; the label then says where it starts
    start = 10 * (min(lowest, default=0) // 10)
    if start >= 50 and max(lowest) <= 100:
        axes.set(ylim=(start - 10, None), ylabel=f"% (axis starts at {start - 10:g})")
    else:
        axes.set(ylim=(0, max(1, axes.get_ylim()[1])))
    return figure


def draw_key(runs: Sequence[RunRecord], key: str) -> Figure:
    """A quantity of the "train" lines, on an axis from 0."""
    figure, axes = _chart(runs, THIRD, 2.3)
    for i, run in enumerate(runs):
        plot(axes, *series(run.train, key), color=f"C{i}", linewidth=1.3)
    axes.set(title=TITLES[key], ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:g}")
    return figure


def _chart(runs: Sequence[RunRecord], width: float, height: float) -> tuple[Figure, Axes]:
    """An empty chart over the steps; a legend above it names the runs if there are several."""
    rows = -(-len(runs) // LEGEND_COLUMNS) if len(runs) > 1 else 0
    figure = Figure(figsize=(width, height + 0.2 * rows), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", xlim=(0, 1.04 * max((run.last_step for run in runs), default=0) or 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(runs) > 1:
        handles = [Line2D([], [], color=f"C{i}", label=shorten(run.name, 20)) for i, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside upper left", ncols=LEGEND_COLUMNS)
    return figure, axes


def _held_out(runs: Sequence[RunRecord], number: int) -> dict[str, Any]:
    """Style of a curve on held-out images."""
    return {"color": f"C{number + (len(runs) == 1)}", "marker": "o", "markersize": 3.2}


def series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; lines without it, or with null for a non-finite value, are left out."""
    logged = [line for line in lines if line.get(key) is not None]
    return [line["step"] for line in logged], [line[key] for line in logged]


def plot(axes: Axes, steps: Sequence[int], values: Sequence[float], **style: Any) -> None:
    """A line, with markers if it has few points."""
    if len(steps) <= FEW_POINTS:
        style = {"marker": "o", "markersize": 3.2 if len(steps) > 1 else 6} | style
    axes.plot(steps, values, **style)
