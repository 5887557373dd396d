"""A classifier's sections: confusion matrix, hardest images, what the mixers attended to."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..errors import UserError
from .attention_maps import explain
from .page import WIDTH, Contents, picture
from .runs import Run

NAMED, COUNTED = 60, 20  # most classes that a confusion matrix names, and that it writes the counts of
COLUMNS, SHOWN = 8, 24  # images a row and in all among the hardest ones


def headline(run: Run, result: Mapping[str, Any]) -> tuple[str, str]:
    """The figure of merit, and what it is."""
    rate, count = result["top1"] / 100, result["count"]
    spread = 100 * (rate * (1 - rate) / count) ** 0.5
    return f"{100 * rate:.1f} %", f"top-1 on {count:,} held-out images, ± {spread:.1f}{run.when}"


def sections(run: Run, folder: Path) -> dict[str, Contents]:
    return {
        "Confusion": lambda: confusion(run, folder),
        "Hardest images": lambda: hardest(run, folder),
        "What the mixers attended to": lambda: attention(run, folder),
    }


def confusion(run: Run, folder: Path) -> tuple[str, str]:
    """Which classes are taken for which."""
    target, prediction, probability = run.predicted("target", "prediction", "probability")
    size = probability.shape[1]
    names = [str(number) for number in range(size)]
    with suppress(UserError):
        names = run.held_out.classes if len(run.held_out.classes) == size else names
    counts = np.zeros((size, size), dtype=int)
    np.add.at(counts, (target, prediction), 1)
    wrong = counts - np.diag(counts.diagonal())
    text = f"{wrong.sum():,} of {len(target):,} held-out images are taken for another class{run.when}."
    if wrong.any():
        true, taken = np.unravel_index(wrong.argmax(), wrong.shape)
        share = f"{wrong[true, taken]} of {counts[true].sum()}"
        text += f" The commonest mistake is to take {names[true]} for {names[taken]}: {share}."
    return text, picture(folder, "confusion", "true and predicted classes", lambda: draw_confusion(counts, names))


def hardest(run: Run, folder: Path) -> tuple[str, str]:
    """The mistakes, then the right answers that were least certain."""
    target, prediction, probability = run.predicted("target", "prediction", "probability")
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
