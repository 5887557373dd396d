"""Own data in folders: pairs of an image and a label file with the same name, and which of them are for training.

The layouts, with "masks" standing for the folder of the label files:

    images/train/ masks/train/ images/val/ masks/val/     a folder per split below images and masks
    train/images/ train/masks/ val/images/ val/masks/     images and masks below a folder per split
    images/ masks/ train.txt val.txt                      a list of names per split
    images/ masks/                                        no split: a part is held out by a hash of the names
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import UserError
from .files import MAX_LISTED
from .image_io import EXTENSIONS
from .split import PART_NAMES, held_out

LISTS = ("", "ImageSets/Segmentation", "ImageSets/Main")  # folders below the root that may hold lists of names


class Pair(NamedTuple):
    """An image and its label file; name: path below the folder of the images, without the extension."""

    name: str
    image: Path
    label: Path | None


@dataclass(frozen=True)
class Folders:
    """Where the files of a data set are, and what its label files are called."""

    root: Path
    images: str  # name of the folder of the images
    labels: str  # name of the folder of the label files; may be the same folder
    kind: str  # word for a label file, in errors
    extensions: frozenset[str]  # of label files
    suffix: str = ""  # what follows the name of an image in the name of its label file
    optional: bool = False  # an image without a label file has nothing to label

    def pairs(self, split: str, names: tuple[str | None, str | None], fraction: float) -> list[Pair]:
        """The pairs of the split "train" or "val", sorted by name, or in the order of their list.

        names: of the folders or lists of the two splits, where the user gave them; fraction: of the images that are
        held out if there is no validation part. Raises UserError naming what is missing, double or ambiguous.
        """
        train, val = (self._find(part, name) for part, name in zip(("train", "val"), names, strict=True))
        if val is not None and train is None:
            place = val if isinstance(val, Path) else val[0]
            raise UserError(f"{place} is there, but no training part: {self.layouts()}")
        found = val if split == "val" and val is not None else train
        pairs = self._read(found)
        if val is None:
            pairs = in_split(pairs, [pair.name for pair in pairs], split, fraction)
        if not pairs:
            raise UserError(
                f"data.root={self.root} has too few images to hold out a part for validation; add some, or give a "
                "validation part"
            )
        return pairs

    def layouts(self, part: str = "train") -> str:
        """The places in which a split is looked for."""
        images, labels = self.images, self.labels
        return (
            f"needed are {images}/{part} and {labels}/{part}, {part}/{images} and {part}/{labels}, {images} and "
            f"{labels} with a list {part}.txt, or {images} and {labels} alone (below {self.root})"
        )

    def _find(self, part: str, name: str | None) -> Path | tuple[Path, Path] | None:
        """The list of a split, or its folders of images and label files; None if there is none."""
        for candidate in (name,) if name else PART_NAMES[part]:
            if candidate.endswith(".txt"):
                return self.root / candidate
            for images, labels in (
                (f"{self.images}/{candidate}", f"{self.labels}/{candidate}"),
                (f"{candidate}/{self.images}", f"{candidate}/{self.labels}"),
            ):
                if (self.root / images).is_dir() and (self.root / labels).is_dir():
                    return self.root / images, self.root / labels
            for folder in LISTS:
                if (listing := self.root / folder / f"{candidate}.txt").is_file():
                    return listing
        if name:
            raise UserError(f"data.{part}_split={name} names no part of {self.root}: {self.layouts(name)}")
        return None

    def _read(self, found: Path | tuple[Path, Path] | None) -> list[Pair]:
        if isinstance(found, tuple):
            return self._pair_up(*found)
        images, labels = self.root / self.images, self.root / self.labels
        if not images.is_dir() or not labels.is_dir():
            raise UserError(f"data.root={self.root} has no folders of images and {self.kind}s: {self.layouts()}")
        return self._pair_up(images, labels, None if found is None else read_list(found, self.images))

    def _pair_up(self, images: Path, labels: Path, wanted: Sequence[str] | None = None) -> list[Pair]:
        """All pairs in two folders, or those whose names are `wanted`."""
        by_name = _by_name(_files(images, EXTENSIONS), images)
        label_of = _by_name(_files(labels, self.extensions), labels)
        if images == labels and self.suffix:
            by_name = {name: file for name, file in by_name.items() if not name.endswith(self.suffix)}
        if not by_name:
            raise UserError(f"{images} has no images ({', '.join(sorted(EXTENSIONS))})")
        every = wanted is None
        wanted = sorted(by_name) if wanted is None else wanted
        unknown = [name for name in wanted if name not in by_name]
        _raise_missing(unknown, f"names of the list are not in {images}", "remove them from the list")
        pairs = [Pair(name, by_name[name], label_of.get(name + self.suffix)) for name in wanted]
        if not self.optional and (missing := [pair.name for pair in pairs if pair.label is None]):
            hint = _suffix_hint(missing[0], label_of) if not self.suffix else ""
            hint = hint or f"add each {self.kind}, under the name of its image, or move these images to another folder"
            _raise_missing(missing, f"images of {images} have no {self.kind} in {labels}", hint)
        if every and (images != labels or not self.suffix):
            extra = sorted(label_of.keys() - {name + self.suffix for name in by_name})
            hint = "add the images, or move these files to another folder"
            _raise_missing(extra, f"{self.kind}s of {labels} have no image in {images}", hint)
        return pairs


def in_split(rows: Sequence[Any], names: Sequence[str], split: str, fraction: float) -> list[Any]:
    """The rows of data without a validation part that belong to the split "train" or "val"."""
    chosen = held_out(names, fraction)
    return [row for row, held in zip(rows, chosen, strict=True) if held == (split == "val")]


def read_list(file: Path, folder: str) -> list[str]:
    """The names in a list file, one per line. A line may omit the file extension, and may begin with `folder`.

    Raises UserError if the list cannot be read, is empty, or has a name twice.
    """
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list {file} cannot be read ({error})") from error
    names = []
    for line in filter(None, lines):
        path = PurePosixPath(line)
        name = path.with_suffix("") if path.suffix.lower() in EXTENSIONS else path
        names.append(str(name).removeprefix(f"{folder}/"))
    if not names:
        raise UserError(f"list {file} names no images")
    if twice := _repeated(names):
        raise UserError(f"list {file} names {twice[0]} twice")
    return names


def _files(folder: Path, extensions: Iterable[str]) -> Iterator[Path]:
    """The files below a folder that have one of the extensions, without hidden ones, which some systems leave."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix.lower() in extensions and not hidden and file.is_file():
            yield file


def _by_name(files: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Name -> file. Raises UserError if two files have the same name up to the extension."""
    found: dict[str, Path] = {}
    for file in sorted(files):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise UserError(f"{found[name]} and {file} have the same name; remove or rename one of them")
        found[name] = file
    return found


def _repeated(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]


def _raise_missing(names: Sequence[str], what: str, hint: str) -> None:
    if names:
        listed = ", ".join(names[:MAX_LISTED]) + ", ..." * (len(names) > MAX_LISTED)
        raise UserError(f"{len(names)} {what}: {listed}; {hint}")


def _suffix_hint(name: str, labels: Iterable[str]) -> str:
    """A remedy, if the label file of the image only has a longer name."""
    endings = sorted(label.removeprefix(name) for label in labels if label.startswith(name))
    return f"data.mask_suffix={endings[0]} would fit" if endings else ""
