"""The report of a run: one self-contained HTML page, and the pictures in it as PNG files beside it.

    python -m tessel.train.report RUN                    writes RUN/report/index.html
    python -m tessel.train.report RUN RUN... --out DIR   lays the curves of several runs over each other
"""

import argparse
import base64
import io
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from torch import nn

from .augment import eval_transform, input_config
from .config import Recipe, UserError, load_recipe
from .data import build_dataset
from .explain import attention_figure, capture

WIDTH = 9.2  # inches of a picture that fills the page
COLUMNS, SHOWN = 8, 24  # the page of hardest images
EXPLAINED = 4  # images in the attention picture
NAMED, COUNTED = 60, 20  # most classes that a confusion matrix names, and writes the counts of

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelpad": 6,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "figure.titlesize": "medium",
    "figure.titleweight": "bold",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 200,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


def theme(*, paper: str, ink: str, quiet: str, line: str, colours: Sequence[str]) -> dict[str, Any]:
    """matplotlib settings of one colour scheme."""
    inked, quieted = ("text.color", "axes.titlecolor"), ("axes.labelcolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(quieted, quiet),
        **dict.fromkeys(("grid.color", "axes.edgecolor"), line),
        "axes.prop_cycle": cycler(color=colours),
    }


# file name ending -> colours; the page shows the one that suits the reader's screen
THEMES = {
    "": theme(
        paper="#ffffff",
        ink="#1f2328",
        quiet="#667079",
        line="#e4e7eb",
        colours=("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#b7791f", "#718096"),
    ),
    "-dark": theme(
        paper="#0d1117",
        ink="#e6edf3",
        quiet="#8d96a0",
        line="#272d36",
        colours=("#63a4e8", "#f08c4b", "#5fb98a", "#b197f5", "#d9b04a", "#9aa5b1"),
    ),
}

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --quiet: #667079; --line: #e4e7eb; --accent: #2b6cb0 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --quiet: #8d96a0; --line: #272d36; --accent: #63a4e8 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 980px; padding: 56px 30px 72px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { margin: 0; font-size: 34px; line-height: 1.15; letter-spacing: -.02em }
h2 { margin: 56px 0 4px; font-size: 20px; letter-spacing: -.01em }
p { margin: 0 0 14px; max-width: 68ch; color: var(--quiet) }
img { display: block; width: 100%; height: auto }
.tiles { display: flex; flex-wrap: wrap; gap: 14px 52px; margin: 30px 0; padding: 22px 0;
  border: solid var(--line); border-width: 1px 0 }
.tiles b { display: block; font-size: 30px; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums }
.tiles div:first-child b { color: var(--accent) }
.tiles span, dt, th { color: var(--quiet); font-size: 13.5px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 22px; margin: 0; font-size: 14.5px }
dd { margin: 0; overflow-wrap: anywhere }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
pre { overflow-x: auto; padding: 14px 16px; border: 1px solid var(--line); border-radius: 6px }
summary { margin-top: 22px; color: var(--quiet); font-size: 14.5px; cursor: pointer }
table { width: 100%; border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); text-align: left }
"""


@dataclass(frozen=True)
class Run:
    """What a run directory holds: its recipe, the lines of `metrics.jsonl` by kind, and its evaluation, if there is one.

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
    def seconds(self) -> float:
        """Time spent on training steps, pauses between resumed parts left out."""
        steps = np.diff([0, *(line["step"] for line in self.train)])
        return float(steps @ [line["step_seconds"] for line in self.train]) if self.train else 0.0

    @property
    def result(self) -> dict[str, Any] | None:
        """top1, loss and count of the evaluation, else of the last evaluation during training."""
        return self.scores or (self.evals[-1] if self.evals else None)


def read_run(path: Path) -> Run:
    """Read a run directory. Raises UserError where `path` is none or its files cannot be read."""
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is not a run directory (it has no recipe.yaml); name one that python -m tessel.train wrote")
    log, scores, predictions = (
        path / name for name in ("metrics.jsonl", "evaluation/evaluation.json", "evaluation/predictions.npz")
    )
    try:
        # a run that is being written may end in half a line
        complete = log.read_text(encoding="utf-8").rpartition("\n")[0] if log.exists() else ""
        lines = [json.loads(line) for line in complete.splitlines()]
        evaluated = scores.exists() and predictions.exists()
        arrays = dict(np.load(predictions)) if evaluated else None
        return Run(
            path=path,
            recipe=load_recipe(path / "recipe.yaml"),
            train=[line for line in lines if line["kind"] == "train"],
            evals=[line for line in lines if line["kind"] == "eval"],
            scores=json.loads(scores.read_text(encoding="utf-8")) if evaluated else None,
            predictions=arrays,
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"run directory {path} cannot be read: {error}") from error


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run (default: into RUN/report) or of several (into `out`); returns the page's path.

    Raises UserError for a path that is no run directory, or several runs without `out`.
    """
    runs = [read_run(path) for path in paths]
    if out is None and len(runs) > 1:
        raise UserError("a report on several runs belongs to none of them: say where to write it with --out DIR")
    folder = out or runs[0].path / "report"
    folder.mkdir(parents=True, exist_ok=True)
    html = single(runs[0], folder) if len(runs) == 1 else several(runs, folder)
    publish(folder / "index.html", html.encode())
    return folder / "index.html"


def single(run: Run, folder: Path) -> str:
    """The page of one run."""
    from .evaluate import load_run

    model = load_run(run.path)[1] if (run.path / "export" / "config.json").exists() else None
    sections = [
        curves([run], folder),
        confusion(run, folder),
        hardest(run, folder),
        attention(run, model, folder),
    ]
    recipe, result = run.recipe, run.result
    tiles = []
    if result:
        error = 100 * (result["top1"] / 100 * (1 - result["top1"] / 100) / result["count"]) ** 0.5
        tiles.append((f"{result['top1']:.1f} %", f"top-1 on {result['count']:,} held-out images, ± {error:.1f}"))
    if model is not None:
        tiles.append((count(sum(p.numel() for p in model.parameters())), "parameters"))
    if run.train:
        last = run.train[-1]
        tiles.append((duration(run.seconds), f"training on {recipe.run.device}" if recipe.run.device != "auto" else "training"))
        tiles.append((f"{last['step']:,}", f"steps of {recipe.data.batch} images, {last['epoch']:.1f} epochs"))
    facts = {
        "model": recipe.model.name,
        "data": f"{recipe.data.root or recipe.data.source}, {recipe.data.size} x {recipe.data.size} pixels",
        "optimizer": f"{recipe.optim.name}, learning rate {recipe.optim.lr:g} ({recipe.sched.name}), seed {recipe.run.seed}",
        "finished": date([*run.train, *run.evals]),
        "made with": versions(),
        "again": f"<code>{escape(f'python -m tessel.train {run.path}/recipe.yaml run.name={run.name}-again')}</code>",
    }
    listed = "".join(f"<dt>{k}</dt><dd>{v if k == 'again' else escape(v)}</dd>" for k, v in facts.items())
    recipe_text = escape((run.path / "recipe.yaml").read_text(encoding="utf-8"))
    head = f"<dl>{listed}</dl><details><summary>recipe.yaml</summary><pre>{recipe_text}</pre></details>"
    return page(run.name, tiles, head, sections)
