"""Report sections of a classification run: confusion matrix, hardest images, attention maps."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from ..data.bands import viewable
from ..errors import UserError
from .attention_maps import attention_figure, capture_examples, examples
from .page import NARROW, WIDTH, Section, card, charts, gallery, picture, shorten, wide
from .probe_maps import probe_attention, probe_figure, query_fields
from .runs import RunRecord

MAX_NAMED, MAX_COUNTED = 60, 20  # with more classes, the confusion matrix has no class names, no counts in its cells
MAX_IMAGES = 24  # hardest images
THUMBNAIL = 320  # longest side of an image of any of them, in pixels


def headline(run: RunRecord, result: Mapping[str, Any]) -> tuple[str, str]:
    """The first tile of the page: top-1 accuracy with the standard error of a proportion."""
    rate, count = result["top1"] / 100, result["count"]
    error = 100 * (rate * (1 - rate) / count) ** 0.5
    return f"{100 * rate:.1f} %", f"top-1 on {count:,} held-out images, ± {error:.1f}{run.at_step}"


def sections(run: RunRecord, folder: Path) -> dict[str, Section]:
    found = {"Confusion": lambda: confusion(run, folder), "Hardest images": lambda: hardest(run)}
    if run.recipe.task.probe in (None, "linear"):
        return {**found, "What the mixers attended to": lambda: attention(run, folder)}
    return {**found, "What the probe reads": lambda: probe(run, folder)}


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
    matrix = picture(folder, "confusion", "true and predicted classes", partial(draw_confusion, counts, names))
    recall = picture(folder, "recall", "accuracy by true class", partial(draw_recall, counts, names))
    # many classes need the width of the page
    return text, charts([matrix, recall]) if size <= MAX_COUNTED else wide(matrix) + charts([recall])


def hardest(run: RunRecord) -> tuple[str, str]:
    """The misclassified images, then the correct ones with the lowest probability."""
    target, prediction, probability = run.require_predictions("target", "prediction", "probability")
    right = target == prediction
    chosen = np.lexsort((probability[np.arange(len(target)), target], right))[:MAX_IMAGES]
    data = run.held_out
    samples = [data[int(i)] for i in chosen] if len(data) == len(target) else []
    if [label for _, label in samples] != target[chosen].tolist():
        raise UserError("the evaluation was made on other data than that of the recipe")
    cards = [
        hardest_card(
            viewable(image), data.classes[target[i]], data.classes[prediction[i]], float(probability[i, prediction[i]])
        )
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
    return text, gallery(cards, least=96)


def attention(run: RunRecord, folder: Path) -> tuple[str, str]:
    """What the token mixers attended to in a few held-out images."""
    if (channels := run.recipe.model.in_chans or 3) != 3:
        raise UserError(f"attention is drawn on images of 3 channels, and these have {channels}")
    images, captures = capture_examples(run.model, run.held_out, run.recipe.data)
    text = "Orange: the query. Blue: what it takes from each position, in the last token mixer of each stage."
    html = picture(folder, "attention", "what queries attend to", lambda: attention_figure(images, captures))
    return text, wide(html)


def probe(run: RunRecord, folder: Path) -> tuple[str, str]:
    """What the queries of a probe take from the feature maps of a few held-out images."""
    if run.recipe.task.probe == "attentive":
        raise UserError("task.probe=attentive does not tell its weights; the other attentive probes do")
    if (channels := run.recipe.model.in_chans or 3) != 3:
        raise UserError(f"attention is drawn on images of 3 channels, and these have {channels}")
    pictures, images = examples(run.model, run.held_out, run.recipe.data)
    weights = probe_attention(run.model, images)
    text = f"What the queries of the pooling ({run.recipe.task.probe}) take from each position, each by its maximum."
    html = picture(folder, "probe", "what the queries take", lambda: probe_figure(pictures, query_fields(weights)))
    return text, wide(html)


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Confusion matrix, shaded by the fraction of the true class. counts: [true, predicted]."""
    size, totals = len(counts), counts.sum(1, keepdims=True)
    shares, right = counts / np.maximum(totals, 1), np.eye(size, dtype=bool)
    paper, ink = rcParams["figure.facecolor"], rcParams["text.color"]
    figure = Figure(figsize=(NARROW, 4.2) if size <= MAX_COUNTED else (WIDTH, 0.8 * WIDTH), layout="constrained")
    matrix = figure.subplots()
    for color, cells in (("C0", right & (counts > 0)), ("C1", ~right & (counts > 0))):
        if not cells.any():
            continue
        most = shares[cells].max()
        shades = LinearSegmentedColormap.from_list(color, [paper, color])
        matrix.imshow(np.where(cells, shares, np.nan), cmap=shades, vmin=-0.1 * most, vmax=most, aspect="auto")
        for true, predicted in np.argwhere(cells) if size <= MAX_COUNTED else ():
            text = paper if shares[true, predicted] > most / 2 else ink
            matrix.text(predicted, true, str(counts[true, predicted]), color=text, ha="center", va="center")
    matrix.set(title="Images, by true and predicted class", xlabel="predicted class", ylabel="true class")
    matrix.grid(False)
    labels = _name_rows(matrix, names)
    matrix.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, labels), default=0) > 3 else 0)
    for edge in np.arange(0.5, len(labels) - 1):
        for draw in (matrix.axhline, matrix.axvline):
            draw(edge, color=rcParams["grid.color"], linewidth=rcParams["grid.linewidth"])
    return figure


def draw_recall(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """The accuracy of each true class, and a line at that of all images. counts: [true, predicted]."""
    size, totals = len(counts), counts.sum(1)
    figure = Figure(figsize=(NARROW, max(4.2, 0.17 * min(size, MAX_NAMED))), layout="constrained")
    axes = figure.subplots()
    accuracy, mean = np.where(totals, 100 * counts.diagonal() / np.maximum(totals, 1), np.nan), 100 * counts.trace()
    mean /= counts.sum()
    axes.axvline(mean, color="C0", linewidth=0.8, alpha=0.6)
    axes.plot(accuracy, range(size), "o", color="C0", markersize=5 if size <= MAX_COUNTED else 2)
    axes.set(title="Accuracy by true class", xlabel=f"%  (line: all images, {mean:.1f} %)", xlim=(-2, 102))
    axes.set(ylim=(size - 0.5, -0.5))
    _name_rows(axes, names)
    return figure


def _name_rows(axes: Axes, names: Sequence[str]) -> list[str]:
    """Write the names of the classes beside the rows; return them. Too many names are left out."""
    labels = [shorten(name, 14) for name in names] if len(names) <= MAX_NAMED else []
    axes.set_yticks(range(len(labels)), labels)
    return labels


def hardest_card(image: Image.Image, true: str, predicted: str, probability: float) -> str:
    """HTML of an image with its true → predicted class, or the class alone if they agree, and its probability."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    names = " → ".join(escape(name) for name in dict.fromkeys((true, predicted)))
    style = ' class="error"' if true != predicted else ""
    caption = f"<b{style}>{names}</b><br>{100 * probability:.0f} %"
    return card(image, caption, alt=f"{true} classified as {predicted}")
