"""What was logged during training, by step, of one run or of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from ..errors import UserError
from .page import WIDTH, picture
from .runs import Run, one_metric


def curves(runs: Sequence[Run], folder: Path) -> tuple[str, str]:
    """What was logged, by step."""
    if not any(run.train for run in runs):
        raise UserError("no training step is logged yet")
    waiting = np.mean([line["data_wait"] for run in runs for line in run.train])
    text = f"As logged, the loss on a logarithmic scale. Waiting for data took {waiting:.0%} of the time."
    above = picture(folder, "learning", "loss and accuracy", lambda: draw_learning(runs))
    below = picture(folder, "optimisation", "learning rate, gradient norm, speed", lambda: draw_optimisation(runs))
    return text, above + below


def draw_learning(runs: Sequence[Run]) -> Figure:
    """Loss of training and held-out images, and accuracy."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    metric = one_metric(runs)
    loss, accuracy = figure.subplots(1, 2, sharex=True, gridspec_kw={"wspace": 0.06})
    for i, run in enumerate(runs):
        colour = f"C{i + (len(runs) == 1)}"
        held_out = {"color": colour, "marker": "o", "markersize": 3.2}
        loss.plot(*series(run.train, "loss"), color=f"C{i}", linewidth=1.1, alpha=0.8)
        loss.plot(*series(run.evals, "loss"), **held_out)
        if metric is None:
            continue
        accuracy.plot(*series(run.evals, metric.key), **held_out)
        for step, last in list(zip(*series(run.evals, metric.key), strict=True))[-1:]:
            accuracy.annotate(f"{last:.1f}", (step, last), (6, -3), textcoords="offset points", color=colour)
    loss.set(title="Loss", xlabel="step", yscale="log")
    loss.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    loss.minorticks_off()
    accuracy.set(title="Held-out images", xlabel="step", ylabel=f"{metric.name}, %" if metric else "no evaluation")
    trained, judged = ("C0", "C1") if len(runs) == 1 else ("0.5", "0.5")
    loss.plot([], [], color=trained, linewidth=1.1, label="training")
    loss.plot([], [], color=judged, marker="o", markersize=3.2, label="held out")
    loss.legend()
    return name_runs(figure, runs)


def draw_optimisation(runs: Sequence[Run]) -> Figure:
    """Learning rate, gradient norm and speed."""
    figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
    titles = {"lr": "Learning rate", "grad_norm": "Gradient norm, L2", "images_per_second": "Speed, images/s"}
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for i, run in enumerate(runs):
            axes.plot(*series(run.train, key), color=f"C{i}", linewidth=1.3)
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:g}")
    return name_runs(figure, runs)


def series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one figure, where it was logged and finite."""
    known = [line for line in lines if line.get(key) is not None]
    return [line["step"] for line in known], [line[key] for line in known]


def name_runs(figure: Figure, runs: Sequence[Run]) -> Figure:
    """A legend of the runs' colours above the panels, where there is more than one run."""
    if len(runs) > 1:
        handles = [Line2D([], [], color=f"C{i}", label=run.name) for i, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside upper left", ncols=4)
    return figure
