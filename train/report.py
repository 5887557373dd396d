"""The report on a run: one self-contained HTML page, and its pictures as PNG files beside it.

    python -m tessel.train.report RUN                    writes RUN/report/index.html
    python -m tessel.train.report RUN RUN... --out DIR   lays the curves of several runs over each other

What a run does not have yet is left out, with a sentence that says why.
"""

import argparse
import base64
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from cycler import cycler
from matplotlib import rc_context, rcParams
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from safetensors import SafetensorError
from torch import nn

from .config import load_recipe
from .data import build_dataset
from .evaluate import load_run
from .explain import explain
from .launch import write_atomically
from .perf import parameters
from .schema import Recipe, UserError, report_errors

WIDTH = 9.2  # inches of a picture as wide as the page
NAMED, COUNTED = 60, 20  # most classes that a confusion matrix names, and that it writes the counts of
COLUMNS, SHOWN = 8, 24  # images a row and in all among the hardest ones
Contents = Callable[[], tuple[str, str]]  # of a section: text, and HTML below it

STYLE: dict[str, Any] = {
    **{"font.family": "DejaVu Sans", "font.size": 8.5, "savefig.dpi": 200},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.labelpad": 6},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6},
    **{"axes.titlelocation": "left", "axes.titlepad": 10, "axes.titlesize": "medium", "axes.titleweight": "bold"},
    **{"figure.titlesize": "medium", "figure.titleweight": "bold", "legend.frameon": False, "lines.linewidth": 1.6},
    **{f"{axis}tick.{rank}.size": 0 for axis in "xy" for rank in ("major", "minor")},
}


def _scheme(paper: str, ink: str, quiet: str, line: str, colours: str) -> dict[str, Any]:
    return {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        **dict.fromkeys(("text.color", "axes.titlecolor"), ink),
        **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), quiet),
        **dict.fromkeys(("grid.color", "axes.edgecolor"), line),
        "axes.prop_cycle": cycler(color=colours.split()),
    }


# by the ending of the picture's file name; the page shows the one that suits the reader's screen
SCHEMES = {
    "": _scheme("#ffffff", "#1f2328", "#667079", "#e4e7eb", "#2b6cb0 #dd6b20 #2f855a #805ad5 #b7791f #718096"),
    "-dark": _scheme("#0d1117", "#e6edf3", "#8d96a0", "#272d36", "#63a4e8 #f08c4b #5fb98a #b197f5 #d9b04a #9aa5b1"),
}

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --quiet: #667079; --line: #e4e7eb; --accent: #2b6cb0 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --quiet: #8d96a0; --line: #272d36; --accent: #63a4e8 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 980px; padding: 56px 30px 72px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { margin: 0; font-size: 34px; line-height: 1.15; letter-spacing: -.02em; overflow-wrap: anywhere }
h2 { margin: 60px 0 4px; font-size: 20px; letter-spacing: -.01em }
p { margin: 0 0 16px; max-width: 72ch; color: var(--quiet); overflow-wrap: anywhere }
img { display: block; width: 100%; height: auto }
.tiles { display: flex; flex-wrap: wrap; gap: 14px 52px; margin: 28px 0; padding: 22px 0;
  border: solid var(--line); border-width: 1px 0 }
.tiles b { display: block; font-size: 30px; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums }
.tiles div:first-child b { color: var(--accent) }
.tiles span, dt, th, summary { color: var(--quiet); font-size: 13.5px; font-weight: 400 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 24px; margin: 0; font-size: 14.5px }
dd { margin: 0; overflow-wrap: anywhere }
pre { overflow-x: auto; padding: 14px 16px; border: 1px solid var(--line); border-radius: 6px;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
summary { margin-top: 20px; cursor: pointer }
table { width: 100%; margin: 28px 0; border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); text-align: left }
"""


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
    def result(self) -> dict[str, Any] | None:
        """top1 and count of the evaluation, else of the last one during training."""
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


def _read_evaluation(path: Path) -> tuple[dict[str, Any] | None, dict[str, np.ndarray] | None]:
    scores, predictions = path / "evaluation.json", path / "predictions.npz"
    if not (scores.is_file() and predictions.is_file()):
        return None, None
    with np.load(predictions) as arrays:
        return json.loads(scores.read_text(encoding="utf-8")), dict(arrays)


def write_report(runs: Sequence[Run], out: Path | None = None) -> Path:
    """Write the report on one run (into RUN/report unless `out` says otherwise) or on several; the page's path.

    Raises UserError for several runs without `out`, and for a folder that cannot be written.
    """
    if out is None and len(runs) > 1:
        raise UserError("a report on several runs belongs to none of them; say where to write it with --out DIR")
    folder = out or runs[0].path / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        html = report_one(runs[0], folder) if len(runs) == 1 else report_many(runs, folder)
        write_atomically(folder / "index.html", html)
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {folder}: {error}; choose another folder with --out"
        ) from error
    return folder / "index.html"


def report_one(run: Run, folder: Path) -> str:
    """The page on one run."""
    recipe, optim, tiles = run.recipe, run.recipe.optim, []
    if run.result:
        rate, count = run.result["top1"] / 100, run.result["count"]
        spread = 100 * (rate * (1 - rate) / count) ** 0.5
        tiles.append((f"{100 * rate:.1f} %", f"top-1 on {count:,} held-out images, ± {spread:.1f}"))
    with suppress(UserError):
        tiles.append((f"{parameters(run.model) / 1e6:.2f} M", "parameters"))
    if run.train:
        last = run.train[-1]
        tiles.append((duration(run.seconds), "training time"))
        tiles.append((f"{last['step']:,}", f"steps of {recipe.data.batch:,} images, {last['epoch']:.1f} epochs"))
    facts = {
        "Model": recipe.model.name,
        "Data": f"{recipe.data.root or recipe.data.source}, {recipe.data.size} × {recipe.data.size} pixels",
        "Optimizer": f"{optim.name}, learning rate {optim.lr:g}, {recipe.sched.name} schedule, seed {recipe.run.seed}",
        "Last step": f"{datetime.fromtimestamp(run.train[-1]['time']):%d %B %Y, %H:%M}" if run.train else "none yet",
        "Reported with": f"tessel {version('tessel')}, torch {torch.__version__}, timm {timm.__version__}",
        "Command": command(run, f"{run.name}-again"),
    }
    listed = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    text = escape((run.path / "recipe.yaml").read_text(encoding="utf-8"))
    head = f"<dl>{listed}</dl>\n<details><summary>The whole recipe</summary><pre>{text}</pre></details>"
    sections = {
        "Training": lambda: curves([run], folder),
        "Confusion": lambda: confusion(run, folder),
        "Hardest images": lambda: hardest(run, folder),
        "What the mixers attended to": lambda: attention(run, folder),
    }
    return page(run.name, tiles, head, sections)


def report_many(runs: Sequence[Run], folder: Path) -> str:
    """The page that compares runs."""
    rows = [("run", "model", "top-1", "steps", "training time")]
    for run in runs:
        result, last = run.result, run.train[-1] if run.train else None
        top1, steps = f"{result['top1']:.1f} %" if result else "", f"{last['step']:,}" if last else ""
        rows.append((run.name, run.recipe.model.name, top1, steps, duration(run.seconds)))
    table = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return page(f"{len(runs)} runs compared", [], f"<table>{table}</table>", {"Training": lambda: curves(runs, folder)})


def curves(runs: Sequence[Run], folder: Path) -> tuple[str, str]:
    """What was logged, by step."""
    if not any(run.train for run in runs):
        raise UserError("no training step is logged yet")
    waiting = np.mean([line["data_wait"] for run in runs for line in run.train])
    text = f"As logged, the loss on a logarithmic scale. Waiting for data took {waiting:.0%} of the time."
    above = picture(folder, "learning", "loss and accuracy", lambda: draw_learning(runs))
    below = picture(folder, "optimisation", "learning rate, gradient norm, speed", lambda: draw_optimisation(runs))
    return text, above + below


def confusion(run: Run, folder: Path) -> tuple[str, str]:
    """Which classes are taken for which."""
    target, prediction, probability = _evaluation(run)
    size = probability.shape[1]
    names = [str(number) for number in range(size)]
    with suppress(UserError):
        names = run.held_out.classes if len(run.held_out.classes) == size else names
    counts = np.zeros((size, size), dtype=int)
    np.add.at(counts, (target, prediction), 1)
    wrong = counts - np.diag(counts.diagonal())
    text = f"{wrong.sum():,} of {len(target):,} held-out images are taken for another class."
    if wrong.any():
        true, taken = np.unravel_index(wrong.argmax(), wrong.shape)
        share = f"{wrong[true, taken]} of {counts[true].sum()}"
        text += f" The commonest mistake is to take {names[true]} for {names[taken]}: {share}."
    return text, picture(folder, "confusion", "true and predicted classes", lambda: draw_confusion(counts, names))


def hardest(run: Run, folder: Path) -> tuple[str, str]:
    """The mistakes, then the right answers that were least certain."""
    target, prediction, probability = _evaluation(run)
    right = target == prediction
    chosen = np.lexsort((probability[np.arange(len(target)), target], right))[:SHOWN]
    data = run.held_out
    samples = [data[int(i)] for i in chosen] if len(data) == len(target) else []
    if [label for _, label in samples] != target[chosen].tolist():
        raise UserError("the evaluation was made on other data than the recipe names")
    cards = [
        (image, data.classes[target[i]], data.classes[prediction[i]], float(probability[i, prediction[i]]))
        for i, (image, _) in zip(chosen, samples, strict=True)
    ]
    mistakes, rest = (~right).sum(), "the right answers that were least certain"
    if not mistakes:
        text = f"There are no mistakes; these are {rest}."
    elif mistakes < len(cards):
        text = f"First the mistakes, as true → predicted class; then {rest}."
    else:
        text = f"The worst {len(cards)} of {mistakes:,} mistakes, as true → predicted class."
    text += " Below each image stands the probability of the predicted class."
    return text, picture(folder, "hardest", "the hardest images", lambda: draw_hardest(cards))


def attention(run: Run, folder: Path) -> tuple[str, str]:
    """What the mixers attended to in a few held-out images."""
    draw = explain(run.model, run.held_out, run.recipe.data)
    text = "A query, outlined in orange, attends to what is shaded blue; shown for the last such mixer of each stage."
    return text, picture(folder, "attention", "what queries attend to", draw)


def _evaluation(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if run.predictions is None:
        raise UserError(f"there is no evaluation yet; python -m tessel.train.evaluate {run.path} makes one")
    return run.predictions["target"], run.predictions["prediction"], run.predictions["probability"]


def draw_learning(runs: Sequence[Run]) -> Figure:
    """Loss of training and held-out images, and accuracy."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2, sharex=True, gridspec_kw={"wspace": 0.06})
    for i, run in enumerate(runs):
        colour = f"C{i + (len(runs) == 1)}"
        held_out = {"color": colour, "marker": "o", "markersize": 3.2}
        loss.plot(*series(run.train, "loss"), color=f"C{i}", linewidth=1.1, alpha=0.8)
        loss.plot(*series(run.evals, "loss"), **held_out)
        accuracy.plot(*series(run.evals, "top1"), **held_out)
        for step, top1 in list(zip(*series(run.evals, "top1"), strict=True))[-1:]:
            accuracy.annotate(f"{top1:.1f}", (step, top1), (6, -3), textcoords="offset points", color=colour)
    loss.set(title="Loss", xlabel="step", ylabel="cross entropy, nats", yscale="log")
    loss.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    loss.minorticks_off()
    accuracy.set(title="Held-out accuracy", xlabel="step", ylabel="top-1, %")
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


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """counts: [true, predicted]. Shades are shares of the true class; beside them, the share that is right."""
    size, totals = len(counts), counts.sum(1, keepdims=True)
    shares, right = counts / np.maximum(totals, 1), np.eye(size, dtype=bool)
    paper, ink = rcParams["figure.facecolor"], rcParams["text.color"]
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    matrix, recall = figure.subplots(1, 2, sharey=True, width_ratios=[1.4, 1], gridspec_kw={"wspace": 0.04})
    for colour, cells in (("C0", right & (counts > 0)), ("C1", ~right & (counts > 0))):
        if not cells.any():
            continue
        most = shares[cells].max()
        shades = LinearSegmentedColormap.from_list(colour, [paper, colour])
        matrix.imshow(np.where(cells, shares, np.nan), cmap=shades, vmin=-0.1 * most, vmax=most, aspect="auto")
        for true, predicted in np.argwhere(cells) if size <= COUNTED else ():
            text = paper if shares[true, predicted] > most / 2 else ink
            matrix.text(predicted, true, str(counts[true, predicted]), color=text, ha="center", va="center")
    found, mean = np.where(totals[:, 0], 100 * shares.diagonal(), np.nan), 100 * counts.trace() / counts.sum()
    recall.axvline(mean, color="C0", linewidth=0.8, alpha=0.6)
    recall.text(mean, 1.01, f"all {mean:.1f}", transform=recall.get_xaxis_transform(), color="C0", ha="center")
    recall.plot(found, range(size), "o", color="C0", markersize=5 if size <= COUNTED else 2)
    recall.set(title="Right answers, by true class", xlabel="share of the class, %")
    recall.set_xlim(min(np.nanmin(found) - 2, 90), 101)
    matrix.set(title="Images, by true and predicted class", xlabel="predicted class", ylabel="true class")
    matrix.grid(False)
    labels = [_short(name) for name in names] if size <= NAMED else []
    matrix.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, labels), default=0) > 3 else 0)
    matrix.set_yticks(range(len(labels)), labels)
    for edge in np.arange(0.5, len(labels) - 1):
        for draw in (matrix.axhline, matrix.axvline):
            draw(edge, color=rcParams["grid.color"], linewidth=rcParams["grid.linewidth"])
    return figure


def draw_hardest(cards: Sequence[tuple[Any, str, str, float]]) -> Figure:
    """cards: image, true class, predicted class, probability of the predicted class."""
    rows, height = -(-len(cards) // COLUMNS), 1.4
    figure = Figure(figsize=(WIDTH, WIDTH / COLUMNS * height * rows))
    # one panel for all images: a panel each would take far longer to draw
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for place, (image, true, predicted, probability) in enumerate(cards):
        x, y = place % COLUMNS + 0.5, place // COLUMNS * height + 0.72
        across, down = (0.46 * side / max(image.size) for side in image.size)
        axes.imshow(image, extent=(x - across, x + across, y + down, y - down))
        names = [_short(name) for name in dict.fromkeys((true, predicted))]
        title = (" → " if max(map(len, names)) < 5 else " →\n").join(names)
        colour = "C1" if true != predicted else rcParams["text.color"]
        axes.text(x, y - down - 0.04, title, ha="center", va="bottom", color=colour, fontweight="bold")
        below = f"{100 * probability:.0f} %"
        axes.text(x, y + down + 0.04, below, ha="center", va="top", color=rcParams["xtick.color"])
    axes.set(xlim=(0, COLUMNS), ylim=(rows * height, 0))
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}…"


def series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one figure."""
    return [line["step"] for line in lines], [line[key] for line in lines]


def name_runs(figure: Figure, runs: Sequence[Run]) -> Figure:
    """A legend of the runs' colours above the panels, where there is more than one run."""
    if len(runs) > 1:
        handles = [Line2D([], [], color=f"C{i}", label=run.name) for i, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside upper left", ncols=4)
    return figure


def picture(folder: Path, name: str, words: str, draw: Callable[[], Figure]) -> str:
    """Draw in every colour scheme, write `name*.png` into the folder, and return the HTML that holds them all."""
    inline = {}
    for ending, colours in SCHEMES.items():
        file, part = folder / f"{name}{ending}.png", folder / f".{name}{ending}.png.part"
        settings: Any = STYLE | colours
        try:
            with rc_context(settings):
                draw().savefig(part, format="png", metadata={"Software": None})
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
        inline[ending] = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{inline["-dark"]}">'
        f'<img alt="{escape(words)}" src="{inline[""]}"></picture>'
    )


def page(title: str, tiles: Iterable[tuple[str, str]], head: str, sections: Mapping[str, Contents]) -> str:
    """The HTML page: tiles of (figure, what it is), further HTML, and titled sections."""
    row = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles)
    body = []
    for name, contents in sections.items():
        try:
            text, shown = contents()
        except UserError as error:
            text, shown = f"Left out: {error}.", ""
        body.append(f"<section><h2>{escape(name)}</h2><p>{escape(text)}</p>{shown}</section>")
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head>
<body>
<h1>{escape(title)}</h1>
{f'<div class="tiles">{row}</div>' if row else ""}
{head}
{"".join(body)}
</body>
</html>
"""


def duration(seconds: float) -> str:
    """3725 -> 1 h 2 min"""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tessel.train.report", description=__doc__, formatter_class=form)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default, for one run: RUN/report")
    options = parser.parse_args(argv)
    with report_errors() as outcome:
        runs = [read_run(path) for path in options.runs]
        print(f"report: {write_report(runs, options.out)} (open it in a browser)")
        if len(runs) == 1:
            print(f"next:\n{next_steps(runs[0])}")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
