"""`data.source=yolo`: own images with text files of boxes or polygons, in the format of YOLO."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic.dataclasses import dataclass

from ...errors import FaultsError, UserError, one_line
from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath
from ..annotations import NO_SEGMENTATION, AnnotatedImage, AnnotatedObject, Annotations
from ..class_file import find_class_file, read_class_file
from ..detection import DetectionDataset
from ..image_io import EXTENSIONS, upright_size
from ..semantic_masks import ObjectMasks, SemanticMasks
from ..split import PART_NAMES, SplitOptions

MAX_FRACTION = 100.0  # sanity limit of a coordinate; a box may extend beyond its image, which `check` tells
DIGITS = 3  # of a coordinate in pixels
MAX_FAULTS = 5  # invalid label files in one message
THREADS = 8


@dataclass(frozen=True, kw_only=True, config=STRICT)
class YOLO(ObjectMasks, SplitOptions):
    root: FilePath
    """folder with data.yaml, or with images/, labels/ and classes.txt; or the YAML file itself"""


class Listing(NamedTuple):
    """What data.yaml says. train, val: folders or lists of images; box_columns: of a row that has keypoints."""

    source: str
    classes: list[str]
    train: list[Path]
    val: list[Path]
    box_columns: int | None


class Row(NamedTuple):
    """A line of a label file. points: x and y as fractions of the image; box: x1, y1, x2, y2, likewise."""

    label: int
    box: tuple[float, float, float, float]
    points: list[float] | None


def open_boxes(data: YOLO, split: str) -> DetectionDataset:
    """Boxes and classes; of a polygon, the box around it. Raises UserError naming an invalid file."""
    return DetectionDataset(read_split(data, split, masks=False), masks=False)


def open_instance_masks(data: YOLO, split: str) -> DetectionDataset:
    """Boxes, classes and masks, for files whose objects are all polygons. Raises UserError naming an invalid file."""
    return DetectionDataset(read_split(data, split, masks=True), masks=True)


def open_semantic_masks(data: YOLO, split: str) -> SemanticMasks:
    """The class of each pixel, drawn from the polygons."""
    return SemanticMasks(open_instance_masks(data, split), data.background_class)


def read_split(data: YOLO, split: str, *, masks: bool) -> Annotations:
    """The images of a split and their objects. An image without a label file has no objects.

    Raises UserError naming the first invalid label files and the number of further ones.
    """
    listing = read_listing(Path(data.root))
    names, images = list_images(listing.val if split == "val" and listing.val else listing.train)
    labels = [label_file(image) for image in images]
    _check_labels(images, labels)
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(upright_size, images))
    found, faults = [], []
    for image, label, size in zip(images, labels, sizes, strict=True):
        try:
            rows = list(_rows(label, listing, masks)) if label.is_file() else []
        except (OSError, ValueError) as error:
            faults.append(f"{label}: {one_line(error)}")
            continue
        width, height = size or (0, 0)
        objects = [_object(row, place, width or 1, height or 1) for place, row in rows]
        found.append(AnnotatedImage(str(image), height, width, objects))
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS} more label files" if len(faults) > MAX_FAULTS else ""
        raise FaultsError("; ".join(faults[:MAX_FAULTS]) + more, faults)
    annotations = Annotations(listing.source, listing.classes, found)
    return annotations if listing.val else annotations.part(split, data.split, names)


def read_listing(root: Path) -> Listing:
    """The classes and image folders of a data set. Raises UserError if data.yaml cannot be read."""
    if root.is_file():
        return _read_yaml(root)
    if (file := root / "data.yaml").is_file():
        return _read_yaml(file)
    classes = find_class_file(root, None)
    files = [file for file in sorted(root.glob("*.y*ml")) if file != classes]
    if len(files) == 1:
        return _read_yaml(files[0])
    if classes is None or not (root / "images").is_dir():
        raise UserError(
            f"data.root={root} has neither data.yaml nor images/, labels/ and classes.txt; it may also be the YAML "
            "file itself"
        )
    parts = {
        part: next(([root / "images" / name] for name in names if (root / "images" / name).is_dir()), [])
        for part, names in PART_NAMES.items()
    }
    names = [entry.name for entry in read_class_file(classes)]
    return Listing(str(root), names, parts["train"] or [root / "images"], parts["val"], None)


def _read_yaml(file: Path) -> Listing:
    try:
        # every scalar stays text, so that a class may be called no or on
        content = yaml.load(file.read_text(encoding="utf-8-sig"), yaml.BaseLoader)
        names = content["names"]
        if isinstance(names, Mapping):
            names = [names[key] for key in sorted(names, key=float)]
            if sorted(map(float, content["names"])) != list(range(len(names))):
                raise ValueError(
                    f"names has the keys {', '.join(content['names'])}, but must number the classes from 0"
                )
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"names={names!r:.80} must be a list of class names")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two classes are called {twice[0]}")
        if "nc" in content and int(content["nc"]) != len(names):
            raise ValueError(f"nc={content['nc']}, but names has {len(names)} classes")
        train, val = (
            _entries(next((content[key] for key in PART_NAMES[part] if content.get(key)), None))
            for part in ("train", "val")
        )
        if not train:
            raise ValueError("it has no train, the folder of the training images")
        base = file.parent / content.get("path", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{file} is not a data.yaml of YOLO: {one_line(error)}") from error
    columns = 5 if "kpt_shape" in content else None
    train, val = ([_resolve(entry, base, file.parent, file) for entry in entries] for entries in (train, val))
    return Listing(str(file), list(names), train, val, columns)


def _entries(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(entry) for entry in value]


def _resolve(entry: str, base: Path, folder: Path, file: Path) -> Path:
    """The folder or list of an entry of data.yaml, which may have been written on another machine.

    Tried are the folder below `path`, and below the folder of the file; some tools write ../train for train.
    """
    candidates = [place / name for name in (entry, entry.removeprefix("../")) for place in (base, folder)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise UserError(f"{file} names {entry}, which is neither {candidates[0]} nor {candidates[1]}; correct path in it")


def list_images(entries: Sequence[Path]) -> tuple[list[str], list[Path]]:
    """The images in folders and lists, sorted, and their names below the folder or as the list writes them.

    Raises UserError for missing images, and if there are none.
    """
    found: dict[Path, str] = {}
    for entry in entries:
        if entry.is_dir():
            files = (file for file in entry.rglob("*") if file.suffix.lower() in EXTENSIONS)
            found |= {file: file.relative_to(entry).as_posix() for file in files if not file.name.startswith(".")}
            continue
        lines = filter(None, (line.strip() for line in entry.read_text().splitlines()))
        listed = {entry.parent / line: line for line in lines}
        if missing := [str(image) for image in listed if not image.is_file()]:
            raise UserError(f"{len(missing)} images of {entry} are missing: {', '.join(missing[:5])}")
        found |= listed
    if not found:
        raise UserError(f"{', '.join(map(str, entries))} has no images ({', '.join(sorted(EXTENSIONS))})")
    images = sorted(found)
    return [found[image] for image in images], images


def label_file(image: Path) -> Path:
    """The text file of an image: below labels/ in place of the last images/ in its path, else beside the image."""
    parts = list(image.with_suffix(".txt").parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts)


def _check_labels(images: Sequence[Path], labels: Sequence[Path]) -> None:
    """Raises UserError if two images share a label file, or if there is no label file at all."""
    owner: dict[Path, Path] = {}
    for image, label in zip(images, labels, strict=True):
        if label in owner:
            raise UserError(f"{owner[label]} and {image} have the same label file {label}; remove or rename one")
        owner[label] = image
    if not any(label.is_file() for label in labels):
        raise UserError(f"none of the {len(labels)} images has a label file; that of {images[0]} would be {labels[0]}")


def _rows(file: Path, listing: Listing, masks: bool) -> Iterator[tuple[str, Row]]:
    """("line N of FILE", row) of a label file. Raises ValueError for a line that is not in the format."""
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = _row([float(word) for word in line.split()], listing)
        except ValueError as error:
            raise ValueError(f"line {number} ({line.strip():.60}): {error}") from error
        if masks and row.points is None:
            raise ValueError(f"line {number} is a box, not a polygon; it {NO_SEGMENTATION}")
        yield f"line {number} of {file.name}", row


def _row(values: list[float], listing: Listing) -> Row:
    label, numbers = values[0], values[1 : listing.box_columns]
    if label % 1 or not 0 <= label < len(listing.classes):
        raise ValueError(f"class {label:g} is not one of 0 to {len(listing.classes) - 1}, which {listing.source} names")
    if not all(abs(number) < MAX_FRACTION for number in numbers):
        raise ValueError("the coordinates must be fractions of the width and height, from 0 to 1")
    if len(numbers) in (4, 5):  # a fifth one is the score of a prediction
        x, y, w, h = numbers[:4]
        return Row(int(label), (x - w / 2, y - h / 2, x + w / 2, y + h / 2), None)
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError("a line is class x y width height, or class and at least three points of a polygon")
    xs, ys = numbers[::2], numbers[1::2]
    return Row(int(label), (min(xs), min(ys), max(xs), max(ys)), numbers)


def _object(row: Row, place: str, width: int, height: int) -> AnnotatedObject:
    """A row in pixels of an image of this size, turned as its EXIF orientation says."""
    x1, y1, x2, y2 = (value * side for value, side in zip(row.box, (width, height) * 2, strict=True))
    box = (x1, y1, x2, y2)
    if row.points is None:
        return AnnotatedObject(place, box, row.label, 0, (x2 - x1) * (y2 - y1), None)
    xs, ys = [x * width for x in row.points[::2]], [y * height for y in row.points[1::2]]
    area = abs(math.fsum(xs[at - 1] * ys[at] - xs[at] * ys[at - 1] for at in range(len(xs)))) / 2
    polygon = [round(value, DIGITS) for point in zip(xs, ys, strict=True) for value in point]
    return AnnotatedObject(place, box, row.label, 0, area, [polygon])


SPEC = SourceSpec(
    name="yolo",
    summary="own images with text files of boxes or polygons, in the format of YOLO",
    options=YOLO,
    datasets={
        "boxes": open_boxes,
        "instance masks": open_instance_masks,
        "semantic masks": open_semantic_masks,
    },
)
