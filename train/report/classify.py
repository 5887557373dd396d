"""Report sections of a classification run: confusion matrix, hardest images, attention maps."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..data.bands import viewable
from ..errors import UserError
from .attention_maps import attention_figure, capture_examples
from .page import WIDTH, Section, picture
from .runs import RunRecord

MAX_NAMED, MAX_COUNTED = 60, 20  # with more classes, the confusion matrix has no class names, no counts in its cells
COLUMNS, MAX_IMAGES = 8, 24  # hardest images per row and in all
LINE = 0.13  # height of a line of text among the hardest images, in widths of a column


def headline(run: RunRecord, result: Mapping[str, Any]) -> tuple[str, str]:
    """The first tile of the page: top-1 accuracy with the standard error of a proportion."""
    rate, count = result["top1"] / 100, result["count"]
    error = 100 * (rate * (1 - rate) / count) ** 0.5
    return f"{100 * rate:.1f} %", f"top-1 on {count:,} held-out images, ± {error:.1f}{run.at_step}"


def sections(run: RunRecord, folder: Path) -> dict[str, Section]:
    return {
        "Confusion": lambda: confusion(run, folder),
        "Hardest images": lambda: hardest(run, folder),
        "What the mixers attended to": lambda: attention(run, folder),
    }


def confusion(run: RunRecord, folder: Path) -> tuple[str, str]:
    """The confusion matrix and the accuracy by class."""
    target, prediction, probability = run.require_predictions("target", "prediction", "probability")
    size = probability.shape[1]
    names = [str(number) for number in range(size)]
    with suppress(UserError):
        names = run.held_out.classes if len(run.held_out.classes) == size else names
    counts = np.zeros((size, size), dtype=int)
    np.add.at(counts, (target, prediction), 1)
    wrong = counts - np.diag(counts.diagonal())
    text = f"{wrong.sum():,} of {len(target):,} held-out images are misclassified{run.at_step}."
    if wrong.any():
        true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
        share = f"{wrong[true, predicted]} of {counts[true].sum()}"
        text += f" The most frequent mistake is {names[true]} classified as {names[predicted]}: {share}."
    return text, picture(folder, "confusion", "true and predicted classes", lambda: draw_confusion(counts, names))


def hardest(run: RunRecord, folder: Path) -> tuple[str, str]:
    """The misclassified images, then the correct ones with the lowest probability."""
    target, prediction, probability = run.require_predictions("target", "prediction", "probability")
    right = target == prediction
    chosen = np.lexsort((probability[np.arange(len(target)), target], right))[:MAX_IMAGES]
    data = run.held_out
    samples = [data[int(i)] for i in chosen] if len(data) == len(target) else []
    if [label for _, label in samples] != target[chosen].tolist():
        raise UserError("the evaluation was made on other data than that of the recipe")
    cards = [
        (viewable(image), data.classes[target[i]], data.classes[prediction[i]], float(probability[i, prediction[i]]))
        for i, (image, _) in zip(chosen, samples, strict=True)
    ]
    mistakes, rest = (~right).sum(), "the correct images with the lowest probability of their class"
    if not mistakes:
        text = f"There are no mistakes; these are {rest}."
    elif mistakes < len(cards):
        text = f"First the mistakes, as true → predicted class; then {rest}."
    else:
        text = f"The worst {len(cards)} of {mistakes:,} mistakes, as true → predicted class."
    text += " Below each image: the probability of the predicted class."
    return text, picture(folder, "hardest", "the hardest images", lambda: draw_hardest(cards))


def attention(run: RunRecord, folder: Path) -> tuple[str, str]:
    """What the token mixers attended to in a few held-out images."""
    if (channels := run.recipe.model.in_chans or 3) != 3:
        raise UserError(f"attention is drawn on images of 3 channels, and these have {channels}")
    images, captures = capture_examples(run.model, run.held_out, run.recipe.data)
    text = "Orange: the query region. Blue: the regions it attends to, in the last such mixer of each stage."
    return text, picture(folder, "attention", "what queries attend to", lambda: attention_figure(images, captures))


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Confusion matrix, shaded by the fraction of the true class; beside it the accuracy by class.

    counts: [true, predicted].
    """
    size, totals = len(counts), counts.sum(1, keepdims=True)
    shares, right = counts / np.maximum(totals, 1), np.eye(size, dtype=bool)
    paper, ink = rcParams["figure.facecolor"], rcParams["text.color"]
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    matrix, recall = figure.subplots(1, 2, sharey=True, width_ratios=[1.4, 1], gridspec_kw={"wspace": 0.04})
    for color, cells in (("C0", right & (counts > 0)), ("C1", ~right & (counts > 0))):
        if not cells.any():
            continue
        most = shares[cells].max()
        shades = LinearSegmentedColormap.from_list(color, [paper, color])
        matrix.imshow(np.where(cells, shares, np.nan), cmap=shades, vmin=-0.1 * most, vmax=most, aspect="auto")
        for true, predicted in np.argwhere(cells) if size <= MAX_COUNTED else ():
            text = paper if shares[true, predicted] > most / 2 else ink
            matrix.text(predicted, true, str(counts[true, predicted]), color=text, ha="center", va="center")
    accuracy, mean = np.where(totals[:, 0], 100 * shares.diagonal(), np.nan), 100 * counts.trace() / counts.sum()
    recall.axvline(mean, color="C0", linewidth=0.8, alpha=0.6)
    recall.plot(accuracy, range(size), "o", color="C0", markersize=5 if size <= MAX_COUNTED else 2)
    recall.set(title="Accuracy by true class", xlabel=f"%  (line: all images, {mean:.1f} %)", xlim=(-2, 102))
    matrix.set(title="Images, by true and predicted class", xlabel="predicted class", ylabel="true class")
    matrix.grid(False)
    labels = [_short(name) for name in names] if size <= MAX_NAMED else []
    matrix.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, labels), default=0) > 3 else 0)
    matrix.set_yticks(range(len(labels)), labels)
    for edge in np.arange(0.5, len(labels) - 1):
        for draw in (matrix.axhline, matrix.axvline):
            draw(edge, color=rcParams["grid.color"], linewidth=rcParams["grid.linewidth"])
    return figure


def draw_hardest(cards: Sequence[tuple[Any, str, str, float]]) -> Figure:
    """A grid of images, each with its classes above and a probability below.

    cards: image, true class, predicted class, probability of the predicted class.
    """
    titles = [_title(true, predicted) for _, true, predicted, _ in cards]
    above = LINE * max((title.count("\n") + 1 for title in titles), default=1) + 0.06
    rows, height = -(-len(cards) // COLUMNS), above + 1 + LINE
    figure = Figure(figsize=(WIDTH, WIDTH / COLUMNS * height * rows))
    # one axes for all images: drawing one axes per image takes far longer
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for number, (title, (image, true, predicted, probability)) in enumerate(zip(titles, cards, strict=True)):
        x, y = number % COLUMNS + 0.5, number // COLUMNS * height + above + 0.46
        half_width, half_height = (0.46 * side / max(image.size) for side in image.size)
        axes.imshow(image, extent=(x - half_width, x + half_width, y + half_height, y - half_height))
        color = "C1" if true != predicted else rcParams["text.color"]
        axes.text(x, y - half_height - 0.04, title, ha="center", va="bottom", color=color, fontweight="bold")
        below = f"{100 * probability:.0f} %"
        axes.text(x, y + half_height + 0.04, below, ha="center", va="top", color=rcParams["xtick.color"])
    axes.set(xlim=(0, COLUMNS), ylim=(rows * height, 0))
    return figure


def _title(true: str, predicted: str) -> str:
    """ "true → predicted" on one or two lines, or the class alone if they agree."""
    names = [_short(name) for name in dict.fromkeys((true, predicted))]
    return (" → " if max(map(len, names)) < 5 else " →\n").join(names)


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}…"
