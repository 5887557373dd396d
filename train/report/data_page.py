"""The page of `tessel check --report`: samples drawn with their labels, histograms, and what is wrong."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from ..data.bands import viewable
from ..data.inspection import Finding, SplitFacts, image_size
from ..data.segmentation import IGNORE_INDEX
from ..data.transform_errors import sample_name
from ..errors import UserError
from ..recipe.schema import Recipe
from ..tasks.detect.overlay import COLORS, draw_objects
from ..tasks.segment.overlay import overlay
from .page import NARROW, Section, card, charts, gallery, page, picture, shorten, swatch

SAMPLES, MAX_SAMPLES = 24, 60  # drawn per split: at least and, if there are more classes, at most
MAX_FAULTY = 12  # samples with an error that are drawn
MAX_LISTED = 500  # errors and warnings
MAX_CLASSES = 60  # bars in the chart of classes
SIDE = 480  # longer side of a drawn image, in pixels
MAX_NAMES = 8  # names of classes below an image


def data_page(recipe: Recipe, splits: Mapping[str, SplitFacts], findings: Mapping[str, Sequence[Finding]]) -> str:
    """The HTML page on the data of a recipe, in one file. findings: also of a split that cannot be opened."""
    every = [finding for found in findings.values() for finding in found]
    tiles = [(f"{facts.total:,}", f"images in {name}") for name, facts in splits.items()]
    tiles += [(f"{len(facts.classes)}", "classes") for facts in list(splits.values())[:1] if facts.classes]
    errors = sum(finding.is_error for finding in every)
    tiles += [(f"{errors:,}", "errors"), (f"{len(every) - errors:,}", "warnings")]
    with TemporaryDirectory() as folder:
        sections: dict[str, Section] = {"Errors and warnings": partial(problems, findings)}
        for name, facts in splits.items():
            sections |= {f"Samples of {name}": partial(samples, facts, recipe.run.seed)}
        if any(facts.classes for facts in splits.values()):
            sections["Classes"] = partial(classes, splits, Path(folder))
        sections["Sizes"] = partial(sizes, splits, Path(folder))
        return page(f"Data of {recipe.data.location}", tiles, "", sections)


def problems(findings: Mapping[str, Sequence[Finding]]) -> tuple[str, str]:
    """The sentences, errors first."""
    rows = [(not found.is_error, split, found.text) for split, one in findings.items() for found in one]
    if not rows:
        return "There are none.", ""
    rows.sort(key=lambda row: row[0])
    cells = (
        f"<tr><td>{escape(split)}</td><td>{'warning' if mild else 'error'}</td><td>{escape(text)}</td></tr>"
        for mild, split, text in rows[:MAX_LISTED]
    )
    text = "Errors hinder training or distort its result; a warning may be as you want it."
    if len(rows) > MAX_LISTED:
        text += f" The first {MAX_LISTED} of {len(rows):,}."
    return text, f'<table class="text">{"".join(cells)}</table>'


def samples(facts: SplitFacts, seed: int) -> tuple[str, str]:
    """Randomly chosen samples with their labels, after some that have an error."""
    drawn = list(_cards(facts, choose(facts, seed)))
    if not drawn:
        raise UserError("no sample can be drawn")
    faulty = "first some with an error, then " if any(sample.problems for sample in facts.samples) else ""
    covered = ", with each class at least once if possible" if facts.classes else ""
    text = f"{len(drawn)} of {len(facts.samples):,} samples: {faulty}a random choice{covered}."
    return text, gallery(drawn, least=160)


def choose(facts: SplitFacts, seed: int) -> list[int]:
    """Indices of samples with an error, then of random ones: one of each class, rarest first, then any."""
    readable = [index for index, sample in enumerate(facts.samples) if sample.size]
    faulty = [index for index in readable if facts.samples[index].problems][:MAX_FAULTY]
    order = np.random.default_rng(seed).permutation(readable).tolist()
    first: dict[int, int] = {}  # class -> the first sample in this order that contains it
    for index in order:
        for label in facts.samples[index].classes:
            first.setdefault(label, index)
    frequency = facts.images_by_class()
    rarest = sorted(first, key=lambda label: frequency[label])
    chosen = list(dict.fromkeys(first[label] for label in rarest))[:MAX_SAMPLES]
    chosen = list(dict.fromkeys([*chosen, *order]))[: max(SAMPLES, len(chosen))]
    return list(dict.fromkeys([*faulty, *chosen]))


def _cards(facts: SplitFacts, indices: Sequence[int]) -> Iterator[str]:
    """HTML of each sample that can be drawn."""
    for index in indices:
        try:
            image, target = facts.dataset[index]
            drawn = draw_sample(image, target, facts)
        except UserError:
            continue
        if drawn is None:
            continue
        name = sample_name(facts.dataset, index)
        lines = [escape(name if name.startswith("sample ") else Path(name).name)]
        if facts.classes:
            lines.append(legend(facts, index))
        path = name.removeprefix("image ")
        faults = (problem.removeprefix("image ").removeprefix(f"{path}: ") for problem in facts.samples[index].problems)
        lines += [f'<em class="error">{escape(fault)}</em>' for fault in faults]
        yield card(drawn, "<br>".join(lines), alt=f"{name} with its labels", title=name)


def draw_sample(image: Any, target: Any, facts: SplitFacts) -> Image.Image | None:
    """The image under its mask or boxes; None if it is no image. Small images are enlarged, large ones reduced."""
    if image_size(image) is None:
        return None
    picture, names = viewable(np.atleast_3d(image) if isinstance(image, np.ndarray) else image), facts.classes
    factor = SIDE / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    small = picture.convert("RGB").resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BILINEAR)
    if names and isinstance(target, dict) and {"boxes", "labels"} <= target.keys():
        labels = np.asarray(target["labels"], np.int64)
        known = (labels >= 0) & (labels < len(names))
        boxes = np.asarray(target["boxes"], np.float32).reshape(-1, 4)[known] * factor
        objects = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels[known])}
        if "masks" in target:
            masks = [Image.fromarray(np.asarray(mask, np.uint8)).resize(size) for mask in target["masks"][known]]
            objects["masks"] = torch.from_numpy(np.array(masks, np.uint8).reshape(-1, *size[::-1]))
        drawn = draw_objects(pil_to_tensor(small), objects, names)
        return Image.fromarray(drawn.permute(1, 2, 0).numpy())
    if isinstance(target, Image.Image):
        target = np.asarray(target)
    if names and isinstance(target, np.ndarray) and target.ndim == 2:
        mask = np.where((target >= 0) & (target < len(names)), target, IGNORE_INDEX).astype(np.uint8)
        mask = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        return overlay(small, [mask], [list(color(facts, number)) for number in range(len(names))])
    return small


def color(facts: SplitFacts, number: int) -> tuple[int, ...]:
    """The color of a class in pictures."""
    if hasattr(facts.dataset, "palette"):
        return tuple(int(value) for value in facts.dataset.palette[number])
    text = COLORS[number % len(COLORS)]
    return tuple(bytes.fromhex(text.removeprefix("#")))


def legend(facts: SplitFacts, index: int) -> str:
    """HTML: the classes of a sample, with the colors in which they are drawn and the number of objects."""
    assert facts.classes is not None
    labels, parts = facts.samples[index].labels, []
    for label, count in sorted(labels.counts, key=lambda pair: -pair[1])[:MAX_NAMES]:
        name = escape(facts.classes[label])
        mark = swatch(color(facts, label)) if labels.unit else ""
        parts.append(f"<b>{mark}{name}{f' × {count}' if labels.unit == 'objects' and count > 1 else ''}</b>")
    if len(labels.counts) > MAX_NAMES:
        parts.append(f"and {len(labels.counts) - MAX_NAMES} more")
    return " ".join(parts) or ("no objects" if labels.unit == "objects" else "no label")


def classes(splits: Mapping[str, SplitFacts], folder: Path) -> tuple[str, str]:
    """How many images have each class, by split."""
    shown = [facts for facts in splits.values() if facts.classes]
    names, counts = shown[0].classes or [], [facts.images_by_class() for facts in shown]
    if any(facts.classes != names for facts in shown):
        raise UserError("the splits have different classes")
    order = np.argsort(-counts[0], kind="stable")
    text = "Images that contain each class."
    if len(order) > MAX_CLASSES:
        half = MAX_CLASSES // 2
        order = np.concatenate([order[:half], order[-half:]])
        text += f" The {half} most and the {half} least frequent of {len(names)}."

    def draw() -> Figure:
        figure = Figure(figsize=(NARROW, 0.9 + 0.2 * len(order) * len(shown)), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / len(shown)
        for number, (facts, count) in enumerate(zip(shown, counts, strict=True)):
            places = np.arange(len(order)) + (number - (len(shown) - 1) / 2) * height
            bars = axes.barh(places, count[order], height, color=f"C{number}", label=facts.name)
            axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7)
        axes.set_yticks(range(len(order)), [shorten(names[number], 24) for number in order])
        axes.set(xlabel="images", xlim=(0, 1.12 * max(1, *(count.max() for count in counts))))
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
        figure.legend(loc="outside upper left", ncols=len(shown))
        return figure

    return text, charts([picture(folder, "classes", "images by class", draw)])


def sizes(splits: Mapping[str, SplitFacts], folder: Path) -> tuple[str, str]:
    """Histograms of the widths, heights and aspect ratios."""
    found = {name: facts.sizes for name, facts in splits.items() if len(facts.sizes)}
    if not found:
        raise UserError("no image could be read")
    every = np.concatenate(list(found.values()))
    low, high = every.min(0), every.max(0)
    kinds = len(np.unique(every, axis=0))
    text = f"All images are {low[0]} × {low[1]} pixels."
    if kinds > 1:
        text = f"Widths of {low[0]} to {high[0]} pixels, heights of {low[1]} to {high[1]}; {kinds:,} different sizes."
    values = {
        "Width, pixels": lambda size: size[:, 0],
        "Height, pixels": lambda size: size[:, 1],
        "Width / height": lambda size: size[:, 0] / size[:, 1],
    }

    def draw(title: str, value: Any) -> Figure:
        figure = Figure(figsize=(NARROW, 2.6), layout="constrained")
        axes = figure.subplots()
        edges = np.histogram_bin_edges(value(every), bins=min(30, max(1, kinds)))
        columns = [value(size) for size in found.values()]
        axes.hist(columns, edges.tolist(), stacked=True, label=list(found), color=[f"C{i}" for i in range(len(found))])
        axes.set(title=title, ylabel="images")
        axes.legend()
        return figure

    drawn = (
        picture(folder, f"size{n}", title, partial(draw, title, value))
        for n, (title, value) in enumerate(values.items())
    )
    return text, charts(drawn if kinds > 1 else [])
