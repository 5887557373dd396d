"""The page of a comparison: a table, and charts of cost against speed and accuracy."""

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..train.files import write_atomically
from ..train.report.page import NARROW, charts, page, picture, shorten, wide

Rows = Sequence[Mapping[str, Any]]

# heading -> text of a cell
COLUMNS: dict[str, Any] = {
    "model": lambda row: row["model"],
    "size": lambda row: str(row["size"]),
    "parameters, M": lambda row: f"{row['parameters'] / 1e6:.2f}",
    "GMACs": lambda row: f"{row['macs'] / 1e9:.2f}",
    "activations, MB": lambda row: f"{row['activation_bytes'] / 1e6:.1f}",
    "growth": lambda row: "" if row["growth"] is None else f"{row['growth']:.2f}",
    "field": lambda row: f"{row['receptive_field']:.2f}",
    "images/s": lambda row: f"{row['inference']:.1f}",
    "images/s, training": lambda row: f"{row['training']:.1f}",
    "accuracy": lambda row: accuracy(row),
}
# heading -> key of a measure that not every comparison has
OPTIONAL = {"images/s": "inference", "images/s, training": "training", "accuracy": "accuracy"}
HEAD = (
    "GMACs: multiply-adds of one image, in billions. Activations: the most memory of tensors at one time in inference, "
    "without the weights, in float32. Growth: the multiply-adds grow as the number of tokens to this power, from these "
    "images to those of twice the side. Field: side of the square around the center of the last map with 99 % of the "
    "effective receptive field, over the side of the image, with random weights. Speeds: all models in turns."
)


def accuracy(row: Mapping[str, Any]) -> str:
    """Mean and, of several seeds, the range."""
    values = row.get("accuracies")
    if not values:
        return ""
    spread = f" ({min(values):.1f} to {max(values):.1f}, {len(values)} seeds)" if len(values) > 1 else ""
    return f"{row['accuracy']:.1f}{spread}"


def cells(rows: Rows) -> list[list[str]]:
    """The table as text, its headings first."""
    shown = [name for name in COLUMNS if any(OPTIONAL.get(name, "model") in row for row in rows)]
    return [shown, *([COLUMNS[name](row) for name in shown] for row in rows)]


def table(rows: Sequence[Sequence[str]]) -> str:
    """HTML of a table, the first row of which are the headings."""
    head, *body = rows
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{lines}</table>"


def write_page(rows: Rows, folder: Path, *, title: str, recipe: str | None) -> None:
    """Write `index.html`, which needs no other file, and its pictures as PNG files."""
    drawn = [
        picture(folder, key, f"{label} against GMACs", partial(draw, rows, "macs", 1e9, "GMACs", key, label))
        for key, label in (("inference", "images/s"), ("accuracy", "accuracy"))
        if any(key in row for row in rows)
    ]
    if any(len(row.get("accuracies", ())) > 1 for row in rows):
        drawn.append(picture(folder, "seeds", "accuracy of each seed", partial(draw_seeds, rows)))
    sections = {"Measures": lambda: (HEAD, wide(table(cells(rows)))), "Charts": lambda: ("", charts(drawn))}
    note = (
        f"Accuracies are those of short trainings with {recipe}, all with the same number of updates." if recipe else ""
    )
    write_atomically(folder / "index.html", page(title, [], f"<p>{escape(note)}</p>" if note else "", sections))


def draw(rows: Rows, x: str, unit: float, x_label: str, y: str, y_label: str) -> Figure:
    """A point for each row, with its name."""
    figure = Figure(figsize=(NARROW, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(row for row in rows if y in row):
        axes.plot(row[x] / unit, row[y], "o", color=f"C{number % 6}")
        axes.annotate(
            shorten(row["model"], 24), (row[x] / unit, row[y]), (4, 3), textcoords="offset points", fontsize=6
        )
    axes.set(title=f"{y_label} against {x_label}", xlabel=x_label)
    axes.margins(0.15)
    return figure


def draw_seeds(rows: Rows) -> Figure:
    """A line for each model, ordered by its mean accuracy: a dot for each seed, a bar at the mean."""
    models = {row["model"]: row for row in rows if "accuracies" in row}
    ordered = sorted(models.values(), key=lambda row: row["accuracy"])
    figure = Figure(figsize=(NARROW, 1 + 0.2 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    for line, row in enumerate(ordered):
        axes.plot(row["accuracies"], [line] * len(row["accuracies"]), "o", color="C0", alpha=0.6, markersize=4)
        axes.plot(row["accuracy"], line, "|", color="black", markersize=9)
    axes.set_yticks(range(len(ordered)), [shorten(row["model"], 40) for row in ordered], fontsize=7)
    axes.set_xlabel(ordered[0]["metric"])
    # of the figure, since the axes, beside the names of models, are too narrow for it
    figure.suptitle("accuracy of each seed, a bar at their mean", x=0.02, ha="left", size="medium", weight="bold")
    axes.grid(axis="x", alpha=0.3)
    return figure
