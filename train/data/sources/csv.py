"""`data.source=csv`: a CSV or parquet file with a line for each image: its path, and its class or its labels.

One class per image (task.kind=classify) or several labels (task.kind=multilabel), in one column or in one column per
label.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

from ...errors import UserError, one_line
from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath
from ..class_map import class_index, read_class_map
from ..labeled_files import LabeledFiles, LabelSetFiles
from ..split import SplitOptions, held_out

MAX_LISTED = 20  # columns in one message
TRIED = 20  # images that are looked for before a training begins
COLUMN_REMEDY = "set data.input_key, data.target_key or data.split_key to yours, or data.delimiter"
YES, NO = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no", ""}  # values in a column of one label


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CSV(SplitOptions):
    root: FilePath
    """CSV, TSV or parquet file with a line for each image; parquet needs the package pyarrow"""
    val: FilePath | None = None
    """file of the validation images, absolute or beside root; null: those that split_key or split chooses"""
    images: FilePath | None = None
    """folder from which the paths in the file start; null: the folder of root"""
    input_key: str = "path"
    """column of the paths"""
    target_key: str = "label"
    """column of the class, or with task.kind=multilabel of the labels"""
    label_columns: tuple[str, ...] = ()
    """with task.kind=multilabel: columns named like the labels, with 1 or 0, instead of target_key"""
    label_separator: str = ";"
    """what stands between the labels of an image in target_key, with task.kind=multilabel"""
    delimiter: str | None = None
    """what stands between the columns; null: a comma, a tab in .tsv files"""
    split_key: str | None = None
    """column that says to which split an image belongs; null: none does"""
    train_split: str | None = None
    """value of split_key for training images; null: train"""
    val_split: str | None = None
    """value of split_key for validation images; null: val"""
    class_map: FilePath | None = None
    """text file with one class per line; null: the classes in the file, sorted"""


Row = Mapping[str, Any]


def open_labels(data: CSV, split: str) -> LabeledFiles:
    """A split of images with one class each. Raises UserError naming the file and the line that is wrong."""
    if data.label_columns:
        raise UserError("data.label_columns holds several labels per image, which task.kind=multilabel trains on")
    table = Table(data)
    labels: dict[str, str] = {}
    for place, path, row in table.rows():
        label = _text(row, data.target_key)
        if not label:
            raise UserError(
                f"{place} has no class in the column {data.target_key}; fill it, remove the line, or set "
                "task.kind=multilabel, which trains on images of any number of labels"
            )
        if labels.setdefault(path, label) != label:
            raise UserError(
                f"{place} has the class {label} for {path}, and another line has {labels[path]}; task.kind=multilabel "
                "trains on several labels per image"
            )
    classes = _classes(data, set(labels.values()))
    index = {name: number for number, name in enumerate(classes)}
    targets = {path: class_index(label, index, data) for path, label in labels.items()}
    paths = table.split(split, targets)
    return LabeledFiles([table.locate(path) for path in paths], [targets[path] for path in paths], classes)


def open_label_sets(data: CSV, split: str) -> LabelSetFiles:
    """A split of images with any number of labels each; lines of one path add up.

    Raises UserError naming the file and the line that is wrong.
    """
    table = Table(data)
    labels: dict[str, set[str]] = {}
    for place, path, row in table.rows():
        found = _marked(data, row, place) if data.label_columns else _listed(data, row)
        labels.setdefault(path, set()).update(found)
    names = set().union(*labels.values(), data.label_columns)
    if not names:
        raise UserError(f"{data.root} has no labels in the column {data.target_key}; check data.target_key")
    classes = _classes(data, names)
    index = {name: number for number, name in enumerate(classes)}
    sets = {path: sorted(class_index(label, index, data) for label in found) for path, found in labels.items()}
    # an image is held out with those of its rarest label
    count = np.bincount([number for found in sets.values() for number in found], minlength=len(classes))
    rarest = {path: min(found, key=lambda number: (count[number], number), default=-1) for path, found in sets.items()}
    paths = table.split(split, rarest)
    hot = np.zeros((len(paths), len(classes)), bool)
    for line, path in zip(hot, paths, strict=True):
        line[sets[path]] = True
    return LabelSetFiles([table.locate(path) for path in paths], hot, classes)


class Table:
    """The lines of both splits, and which image belongs to which."""

    def __init__(self, data: CSV):
        self.data = data
        if data.val and data.split_key:
            raise UserError("data.split_key has no effect together with data.val; remove one of them")
        files = [Path(data.root), *([Path(data.root).parent / data.val] if data.val else [])]
        self.files = [(file, read_table(file, data.delimiter)) for file in files]
        self.split_of: dict[str, str] = {}  # path in the file -> split, where the data say it

    def rows(self) -> Iterator[tuple[str, str, Row]]:
        """(place in the file, path in the file, columns) of every line of either split."""
        data = self.data
        needed = [data.input_key, *(data.label_columns or (data.target_key,))]
        needed += [data.split_key] if data.split_key else []
        values = {data.train_split or "train": "train", data.val_split or "val": "val"}
        for number, (file, lines) in enumerate(self.files):
            if lines and (missing := [key for key in needed if key not in lines[0]]):
                columns = ", ".join(list(lines[0])[:MAX_LISTED])
                raise UserError(f"{file} has no column {missing[0]}, its columns are {columns}; {COLUMN_REMEDY}")
            for line, row in enumerate(lines, 2):
                place, path = f"{file}, line {line}", _text(row, data.input_key)
                if not path:
                    raise UserError(f"{place} has no path in the column {data.input_key}")
                part = values.get(_text(row, data.split_key)) if data.split_key else ("train", "val")[number]
                if part is None:
                    continue
                if (data.split_key or data.val) and self.split_of.setdefault(path, part) != part:
                    raise UserError(f"{place}: {path} is in both splits; remove one of the lines")
                yield place, path, row

    def split(self, split: str, groups: Mapping[str, int]) -> list[str]:
        """The paths of a split, in the order of the file. groups: path -> class, by which images are held out."""
        paths, data = list(groups), self.data
        if self.split_of:
            chosen = [path for path in paths if self.split_of[path] == split]
        else:
            held = held_out([self._name(path) for path in paths], data.split, [groups[path] for path in paths])
            chosen = [path for path, out in zip(paths, held, strict=True) if out == (split == "val")]
        if not chosen:
            where = f"the column {data.split_key}" if data.split_key else data.val or f"data.split={data.split}"
            raise UserError(f"{data.root}: {where} leaves no images for the split {split}")
        tried = [self.locate(chosen[number]) for number in range(0, len(chosen), -(-len(chosen) // TRIED))]
        if not any(Path(path).is_file() for path in tried):
            raise UserError(
                f"{data.root}: its images are missing, for example {tried[0]}; set data.images to the folder from "
                "which the paths start"
            )
        return chosen

    def locate(self, path: str) -> str:
        """The file of an image."""
        return str(self._root / path)

    @property
    def _root(self) -> Path:
        return Path(self.data.images) if self.data.images else Path(self.data.root).parent

    def _name(self, path: str) -> str:
        """The path from the root on, so that the split does not depend on where the data are."""
        whole = PurePath(path)
        return (whole.relative_to(self._root) if whole.is_relative_to(self._root) else whole).as_posix()


def read_table(file: Path, delimiter: str | None = None) -> list[Row]:
    """The lines of a CSV or parquet file by column name. Raises UserError if it cannot be read."""
    if file.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(file)
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            separator = delimiter or ("\t" if file.suffix.lower() == ".tsv" else ",")
            rows: list[Row] = list(csv.DictReader(lines, delimiter=separator, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error, TypeError) as error:
        raise UserError(f"data.root={file} cannot be read ({one_line(error)})") from error
    for number, row in enumerate(rows, 2):
        if None in row:
            raise UserError(f"{file}, line {number} has more columns than the first line; quote values with a comma")
    if not rows:
        raise UserError(f"data.root={file} has no lines below the names of its columns")
    return rows


def _read_parquet(file: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(f"data.root={file}: parquet files need the package pyarrow: pip install pyarrow") from error
    try:
        rows = parquet.read_table(file).to_pylist()
    except (OSError, ArrowException) as error:
        raise UserError(f"data.root={file} cannot be read ({one_line(error)})") from error
    if not rows:
        raise UserError(f"data.root={file} has no lines")
    return rows


def _classes(data: CSV, found: set[str]) -> list[str]:
    """The classes in the order of the model's outputs; numbers are sorted as numbers."""
    if data.class_map:
        return read_class_map(data)
    if data.label_columns:
        return list(data.label_columns)
    return sorted(found, key=int if all(name.isdecimal() for name in found) else str)


def _listed(data: CSV, row: Row) -> Sequence[str]:
    """The labels in one column: a text with separators, or the list of a parquet file."""
    value = row[data.target_key]
    parts = value if isinstance(value, list) else str("" if value is None else value).split(data.label_separator)
    return [label for part in parts if (label := str(part).strip())]


def _marked(data: CSV, row: Row, place: str) -> list[str]:
    """The labels whose columns hold 1."""
    found = []
    for name in data.label_columns:
        value = _text(row, name).lower()
        if value not in YES | NO:
            raise UserError(f"{place} has {value!r} in the column {name}; it must be 1 or 0")
        if value in YES:
            found.append(name)
    return found


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    return "" if value is None else str(value).strip()


SPEC = SourceSpec(
    name="csv",
    summary="own images, listed in a CSV or parquet file with their classes or labels",
    options=CSV,
    datasets={"labels": open_labels, "label sets": open_label_sets},
)
