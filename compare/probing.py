"""`probe`: several models with several probes, kept in a file so that a comparison that was stopped goes on."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from ..train.errors import UserError
from ..train.files import write_atomically
from ..train.recipe.load import load_recipe
from ..train.recipe.registry import task_spec
from ..train.report.attention_maps import examples
from ..train.report.page import charts, page, picture, wide
from ..train.report.probe_maps import Field, probe_attention, probe_figure
from ..train.report.runs import read_run
from .comparison import Results
from .page import Rows, accuracy, draw, table
from .training import folder_name, recipe_digest, train_run

FILE = "probes.json"
COLUMNS: dict[str, Any] = {
    "model": lambda row: row["model"],
    "probe": lambda row: row["probe"],
    "frozen, M": lambda row: f"{row['frozen'] / 1e6:.2f}",
    "trained, M": lambda row: f"{row['trained'] / 1e6:.3f}",
    "accuracy": lambda row: accuracy(row),
}


def probe(
    models: Sequence[str],
    probes: Sequence[str],
    out: Path,
    *,
    recipe: str,
    overrides: Sequence[str] = (),
    seeds: int = 1,
    progress: Callable[[str, float], None] = lambda text, fraction: None,
) -> list[dict[str, Any]]:
    """A row for each model and probe: its parameters, and its accuracy after a training with each seed.

    models: names of timm or tessel, whose published weights are loaded, or local-dir:RUN/export. probes: values of
    task.probe. recipe, overrides: of the training. The folder `out` gets probes.json, probes.md, index.html and the
    runs. A comparison that was stopped goes on from probes.json. progress: told what begins, and the fraction that is
    done. Raises UserError naming what does not fit.
    """
    spec = task_spec(load_recipe(recipe, [*overrides, f"model.name={models[0]}"]))
    if spec.kind not in ("classify", "multilabel"):
        raise UserError(f"--recipe {recipe}: task.kind={spec.kind} has no probes; use a recipe of classification")
    out.mkdir(parents=True, exist_ok=True)
    results, done = Results(out / FILE), itertools.count()
    rows, total = [], len(models) * len(probes) * seeds
    for model, kind in itertools.product(models, probes):
        digest = recipe_digest(recipe, model, overrides)
        runs = [out / "runs" / f"{folder_name(model)}-{kind}-{digest}-seed{seed}" for seed in range(seeds)]
        found = []
        for seed, run in enumerate(runs):
            progress(f"{model}: {kind}, training {seed + 1} of {seeds}", next(done) / total)
            chosen = [f"model.name={model}", "model.pretrained=true", *overrides]
            chosen += [f"task.probe={kind}", f"run.seed={seed}", "log.progress=lines"]
            key = [model, kind, recipe, digest, *overrides, seed]
            found.append(results.once(["train", *key], train_run, recipe, chosen, run, "--recipe"))
        values = [one["value"] for one in found]
        sizes = results.once(["parameters", model, kind, recipe, digest, *overrides], parameters, runs[0])
        row = {"model": model, "probe": kind, **sizes, "accuracy": statistics.mean(values), "accuracies": values}
        rows.append({**row, "metric": found[0]["metric"], "run": str(runs[0])})
    results.write(rows)
    write_atomically(out / "probes.md", markdown(rows))
    write_page(rows, out, recipe)
    return rows


def parameters(run: Path) -> dict[str, int]:
    """The number of parameters that the run trained, and of those that it left as they were."""
    record = read_run(run)
    model: Any = record.model
    if record.recipe.task.probe == "linear":
        classifier = model.get_classifier()
        heads = classifier if isinstance(classifier, tuple) else (classifier,)
        trained = sum(p.numel() for head in heads for p in head.parameters())
    else:
        trained = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone."))
    return {"trained": trained, "frozen": sum(p.numel() for p in model.parameters()) - trained}


def markdown(rows: Rows) -> str:
    """The table in Markdown."""
    head, *body = ([str(cell).replace("|", "\\|") for cell in row] for row in cells(rows))
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(rows: Rows) -> list[list[str]]:
    """The table as text, its headings first."""
    return [list(COLUMNS), *([COLUMNS[name](row) for name in COLUMNS] for row in rows)]


def write_page(rows: Rows, folder: Path, recipe: str) -> None:
    """Write `index.html`, which needs no other file, and its pictures as PNG files."""
    models = dict.fromkeys(row["model"] for row in rows)
    several = len(models) > 1
    labelled = [{**row, "model": f"{row['probe']}, {row['model']}" if several else row["probe"]} for row in rows]
    chart = picture(
        folder,
        "accuracy",
        "accuracy against trained parameters",
        partial(draw, labelled, "trained", 1e6, "trained parameters, M", "accuracy", rows[0]["metric"]),
    )
    sections = {
        "Measures": lambda: ("", wide(table(cells(rows))) + charts([chart])),
        **{f"What the probes of {model} read": partial(attention, rows, model, folder) for model in models},
    }
    note = f"<p>{escape(rows[0]['metric'])} after trainings of the probes with {escape(recipe)}.</p>"
    write_atomically(folder / "index.html", page("Probes", [], note, sections))


def attention(rows: Rows, model: str, folder: Path) -> tuple[str, str]:
    """The weights of each probe of a model for the same images, as the mean over its queries."""
    pictures: list[Tensor] = []
    fields: list[Field] = []
    for row in rows:
        if row["model"] != model or row["probe"] in ("linear", "attentive"):
            continue
        record = read_run(Path(row["run"]))
        if (channels := record.recipe.model.in_chans or 3) != 3:
            raise UserError(f"attention is drawn on images of 3 channels, and these have {channels}")
        if record.recipe.task.kind != "classify":
            raise UserError("the pictures are of images with one class")
        pictures, images = examples(record.model, record.held_out, record.recipe.data)
        weights = probe_attention(record.model, images)
        fields += [
            (f"{row['probe']}, map {number}" if len(weights) > 1 else row["probe"], one.mean(1))
            for number, one in enumerate(weights, start=1)
        ]
    if not fields:
        raise UserError("linear and attentive probes do not tell their weights; the other attentive probes do")
    name = f"attention-{folder_name(model)}"
    html = picture(folder, name, "what the probes read", lambda: probe_figure(pictures, fields))
    return "The weights of each position, as the mean over the queries; each picture by its maximum.", wide(html)
