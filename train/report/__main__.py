"""The report on a run: one self-contained HTML page, and its pictures as PNG files beside it.

    python -m tessel.train.report RUN                    writes RUN/report/index.html
    python -m tessel.train.report RUN RUN... --out DIR   lays the curves of several runs over each other

What a run does not have yet is left out, with a sentence that says why.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from html import escape
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch

from ..errors import UserError, report_errors
from ..files import write_atomically
from ..recipe.registry import task_spec
from ..run.profiling import count_parameters
from .curves import curves
from .page import duration, page
from .runs import Run, command, next_steps, one_metric, read_run


def task_sections(run: Run) -> Any:
    """The module with the `headline` and the `sections` of the run's task; None if it has none of its own."""
    name = task_spec(run.recipe).report
    return import_module(name) if name else None


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
    own = task_sections(run)
    if own and run.result:
        tiles.append(own.headline(run, run.result))
    with suppress(UserError):
        tiles.append((f"{count_parameters(run.model) / 1e6:.2f} M", "parameters"))
    if run.train:
        last = run.train[-1]
        tiles.append((duration(run.seconds), "training time"))
        tiles.append((f"{last['step']:,}", f"steps of {recipe.data.batch:,} images, {last['epoch']:.1f} epochs"))
    facts = {
        "Model": recipe.model.name,
        "Data": f"{recipe.data.location}, {recipe.data.size} × {recipe.data.size} pixels",
        "Optimizer": f"{optim.name}, learning rate {optim.lr:g}, {recipe.sched.name} schedule, seed {recipe.run.seed}",
        "Last step": f"{datetime.fromtimestamp(run.train[-1]['time']):%d %B %Y, %H:%M}" if run.train else "none yet",
        "Reported with": f"tessel {version('tessel')}, torch {torch.__version__}, timm {timm.__version__}",
        "Command": command(run, f"{run.name}-again"),
    }
    listed = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    text = escape((run.path / "recipe.yaml").read_text(encoding="utf-8"))
    head = f"<dl>{listed}</dl>\n<details><summary>The whole recipe</summary><pre>{text}</pre></details>"
    sections = {"Training": lambda: curves([run], folder), **(own.sections(run, folder) if own else {})}
    return page(run.name, tiles, head, sections)


def report_many(runs: Sequence[Run], folder: Path) -> str:
    """The page that compares runs."""
    metric = one_metric(runs)
    rows = [("run", "model", metric.name if metric else "", "steps", "training time")]
    for run in runs:
        result, last = run.result, run.train[-1] if run.train else None
        figure, steps = (
            f"{result[metric.key]:.1f} %{run.when}" if result and metric else "",
            f"{last['step']:,}" if last else "",
        )
        rows.append((run.name, run.recipe.model.name, figure, steps, duration(run.seconds)))
    table = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return page(f"{len(runs)} runs compared", [], f"<table>{table}</table>", {"Training": lambda: curves(runs, folder)})


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
