"""Report on a run: one self-contained HTML page, index.html, with its pictures as PNG files beside it.

    tessel report RUN                    writes RUN/report/index.html
    tessel report RUN RUN... --out DIR   compares several runs: their curves in the same charts

Sections for which the run has no data yet are left out, and the page says why.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch

from ... import __version__
from ..errors import UserError, report_errors
from ..files import write_atomically
from ..recipe.registry import task_spec
from ..run.profiling import count_parameters
from .curves import curves
from .page import code, duration, page, wide
from .runs import RunRecord, next_steps, one_metric, read_run, train_command


def task_sections(run: RunRecord) -> Any:
    """The module with the `headline` and the `sections` of the run's task; None if it has none of its own."""
    name = task_spec(run.recipe).report
    return import_module(name) if name else None


def usage(run: RunRecord) -> tuple[str, str]:
    """Code that loads the exported model and runs it on an image file. Raises UserError if there is no export."""
    text = "Loads the exported model, prepares an image file as in the evaluation, and predicts:"
    return text, code(task_spec(run.recipe).usage_code(run.recipe, str(run.export)))


def write_report(runs: Sequence[RunRecord], out: Path | None = None) -> Path:
    """Write the report on one run or on several into the folder `out`; return the path of the page.

    out: by default RUN/report of a single run. Raises UserError for several runs without `out`, and if the folder
    cannot be written.
    """
    if out is None and len(runs) > 1:
        raise UserError("a report on several runs needs a folder to write to: give --out DIR")
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


def report_one(run: RunRecord, folder: Path) -> str:
    """The HTML page on one run; its pictures are written into `folder`."""
    recipe, optim, tiles = run.recipe, run.recipe.optim, []
    own = task_sections(run)
    if own and run.result:
        tiles.append(own.headline(run, run.result))
    with suppress(UserError):
        tiles.append((f"{count_parameters(run.model) / 1e6:.2f} M", "parameters"))
    if run.train:
        last = run.train[-1]
        tiles.append((duration(run.training_seconds), "training time"))
        tiles.append((f"{last['step']:,}", f"steps of {recipe.data.batch:,} images, {last['epoch']:.1f} epochs"))
    facts = {
        "Model": recipe.model.name,
        "Data": f"{recipe.data.location}, {recipe.data.size} × {recipe.data.size} pixels",
        "Optimizer": f"{optim.name}, learning rate {optim.lr:g}, {recipe.sched.name} schedule, seed {recipe.run.seed}",
        "Last step": f"{datetime.fromtimestamp(run.train[-1]['time']):%d %B %Y, %H:%M}" if run.train else "none yet",
        **({"Ended": run.done["ended"]} if run.done and "ended" in run.done else {}),
        "Reported with": f"tessel {__version__}, torch {torch.__version__}, timm {timm.__version__}",
        "Command": train_command(run, f"{run.name}-again"),
    }
    if unreadable := run.unreadable:
        samples = "1 training sample" if unreadable == 1 else f"{unreadable:,} training samples"
        facts["Unreadable"] = f"{samples}, replaced by others; corrupt.jsonl lists them"
    listed = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    text = escape((run.path / "recipe.yaml").read_text(encoding="utf-8"))
    head = f"<dl>{listed}</dl>\n<details><summary>The whole recipe</summary><pre>{text}</pre></details>"
    sections = {"Training": lambda: curves([run], folder), **(own.sections(run, folder) if own else {})}
    if task_spec(recipe).usage:
        sections["Use this model"] = lambda: usage(run)
    return page(run.name, tiles, head, sections)


def report_many(runs: Sequence[RunRecord], folder: Path) -> str:
    """The HTML page that compares runs; its pictures are written into `folder`."""
    metric = one_metric(runs)
    rows = [("run", "model", metric.name if metric else "", "steps", "training time")]
    for run in runs:
        result, last = run.result, run.train[-1] if run.train else None
        value = f"{result[metric.key]:.1f} %{run.at_step}" if result and metric else ""
        steps = f"{last['step']:,}" if last else ""
        rows.append((run.name, run.recipe.model.name, value, steps, duration(run.training_seconds)))
    table = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return page(
        f"{len(runs)} runs compared", [], wide(f"<table>{table}</table>"), {"Training": lambda: curves(runs, folder)}
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tessel report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to; for one run, default RUN/report")
    options = parser.parse_args(argv)
    with report_errors() as outcome:
        runs = [read_run(path) for path in options.runs]
        print(f"report: {write_report(runs, options.out)} (open it in a browser)")
        if len(runs) == 1:
            print(f"next:\n{next_steps(runs[0])}")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
