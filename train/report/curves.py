"""Charts of metrics.jsonl over the training steps, of one run or of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from ..errors import UserError
from .page import WIDTH, picture
from .runs import RunRecord, one_metric

FEW_POINTS = 25  # curves of at most so many points get markers, so that a single point is visible


def curves(runs: Sequence[RunRecord], folder: Path) -> tuple[str, str]:
    """The section with all charts."""
    if not any(run.train for run in runs):
        raise UserError("no training step is logged yet")
    waiting = np.mean([line["data_wait"] for run in runs for line in run.train])
    text = (
        "Loss on a logarithmic scale. The training loss is measured with augmentation, mixing and drop path on, so it "
        f"can lie above the loss on held-out images. Waiting for data took {waiting:.0%} of the time."
    )
    learning = picture(folder, "learning", "loss and accuracy", lambda: draw_learning(runs))
    rest = picture(folder, "optimisation", "learning rate, gradient norm, speed", lambda: draw_optimization(runs))
    return text, learning + rest


def draw_learning(runs: Sequence[RunRecord]) -> Figure:
    """Loss on training and held-out images; main metric on held-out images."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    metric = one_metric(runs)
    loss, accuracy = figure.subplots(1, 2, sharex=True, gridspec_kw={"wspace": 0.06})
    for i, run in enumerate(runs):
        color = f"C{i + (len(runs) == 1)}"
        held_out = {"color": color, "marker": "o", "markersize": 3.2}
        plot(loss, *series(run.train, "loss"), color=f"C{i}", linewidth=1.1, alpha=0.8)
        loss.plot(*series(run.evals, "loss"), **held_out)
        if metric is None:
            continue
        accuracy.plot(*series(run.evals, metric.key), **held_out)
        for step, last in list(zip(*series(run.evals, metric.key), strict=True))[-1:]:
            accuracy.annotate(f"{last:.1f}", (step, last), (6, -3), textcoords="offset points", color=color)
    loss.set(title="Loss", xlabel="step", yscale="log")
    loss.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    loss.minorticks_off()
    loss.set_xlim(left=0)
    accuracy.set(title="Held-out images", xlabel="step", ylabel=f"{metric.name}, %" if metric else "no evaluation")
    trained, evaluated = ("C0", "C1") if len(runs) == 1 else ("0.5", "0.5")
    loss.plot([], [], color=trained, linewidth=1.1, label="training")
    loss.plot([], [], color=evaluated, marker="o", markersize=3.2, label="held out")
    loss.legend()
    return name_runs(figure, runs)


def draw_optimization(runs: Sequence[RunRecord]) -> Figure:
    """Learning rate, gradient norm and speed."""
    figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
    titles = {"lr": "Learning rate", "grad_norm": "Gradient norm, L2", "images_per_second": "Speed, images/s"}
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for i, run in enumerate(runs):
            plot(axes, *series(run.train, key), color=f"C{i}", linewidth=1.3)
        axes.set(title=title, xlabel="step")
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.yaxis.set_major_formatter("{x:g}")
    return name_runs(figure, runs)


def series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; lines without it, or with null for a non-finite value, are left out."""
    logged = [line for line in lines if line.get(key) is not None]
    return [line["step"] for line in logged], [line[key] for line in logged]


def plot(axes: Axes, steps: Sequence[int], values: Sequence[float], **style: Any) -> None:
    """A line, with markers if it has few points."""
    if len(steps) <= FEW_POINTS:
        style |= {"marker": ".", "markersize": 5}
    axes.plot(steps, values, **style)


def name_runs(figure: Figure, runs: Sequence[RunRecord]) -> Figure:
    """Add a legend of the runs' colors above the panels if there are several runs; return the figure."""
    if len(runs) > 1:
        handles = [Line2D([], [], color=f"C{i}", label=run.name) for i, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside upper left", ncols=4)
    return figure
