"""`data.source=folder`: one folder of images per class."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic.dataclasses import dataclass

from ...errors import UserError
from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath
from ..bands import ARRAY_EXTENSIONS
from ..image_io import EXTENSIONS
from ..labeled_files import LabeledFiles
from ..split import PART_NAMES, SplitOptions, held_out

LAYOUT = "data.root must contain train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg, which data.split divides"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Folder(SplitOptions):
    root: FilePath
    """folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or with CLASS/*.jpg; .npy and .npz files are read too"""
    train_split: str | None = None
    """subfolder of root with the training images; null: train"""
    val_split: str | None = None
    """subfolder of root with the validation images; null: val"""


class ImageFolder(LabeledFiles):
    """(RGB image, class index) of the images below `root/CLASS/`; classes in alphabetical order.

    Arrays (.npy, .npz) are its images if there are no others.
    """

    def __init__(self, root: Path, chosen: Callable[[list[str], np.ndarray], np.ndarray] | None = None):
        """chosen: (paths below root, class indices) -> which of them belong to the data set, bool; None: all.

        Raises UserError if the folder cannot be read, or a class has no images.
        """
        try:
            folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
            everything = [sorted(folder.rglob("*")) for folder in folders]
        except OSError as error:
            raise UserError(f"image folder {root} cannot be read ({error.strerror}); {LAYOUT}") from error
        files = [[file for file in found if file.suffix.lower() in EXTENSIONS] for found in everything]
        if not any(files):
            files = [[file for file in found if file.suffix.lower() in ARRAY_EXTENSIONS] for found in everything]
        if not folders:
            raise UserError(f"{root} has no class folders, hence no images; {LAYOUT}")
        if broken := [folder.name for folder in folders if not folder.name.isprintable()]:
            raise UserError(
                f"the name of the class folder {broken[0]!a} in {root} has control characters or is no UTF-8; rename it"
            )
        if empty := [folder.name for folder, found in zip(folders, files, strict=True) if not found]:
            raise UserError(
                f"class {empty[0]} in {root} has no images ({', '.join(sorted(EXTENSIONS))}); add some or remove it"
            )
        paths = [file for found in files for file in found]
        targets = np.repeat(np.arange(len(folders)), [len(found) for found in files])
        if chosen is not None:
            kept = np.flatnonzero(chosen([path.relative_to(root).as_posix() for path in paths], targets))
            paths, targets = [paths[number] for number in kept], targets[kept]
        super().__init__([str(path) for path in paths], targets, [folder.name for folder in folders])


def open_folder(data: Folder, split: str) -> ImageFolder:
    """A split of the images: the folder of the split, or without a validation folder a part of the others.

    Raises UserError naming what is missing.
    """
    train, val = _find(data, "train"), _find(data, "val")
    if val is not None and split == "val":
        return ImageFolder(val)  # an evaluation needs no training images
    if val is not None and train is None:
        raise UserError(f"data.root={data.root} has the folder {val.name}, but no folder train; {LAYOUT}")
    if val is not None and train is not None:
        return ImageFolder(train)

    def chosen(names: list[str], targets: np.ndarray) -> np.ndarray:
        return held_out(names, data.split, targets.tolist()) == (split == "val")

    images = ImageFolder(train or Path(data.root), chosen)
    if not len(images):
        raise UserError(f"data.root={data.root} has one image per class, too few for validation; add some")
    return images


def _find(data: Folder, part: str) -> Path | None:
    """The folder of a split; None if there is none. Raises UserError if the one that the recipe names is missing."""
    name = data.train_split if part == "train" else data.val_split
    for candidate in (name,) if name else PART_NAMES[part]:
        if (folder := Path(data.root) / candidate).exists():
            return folder
    if name:
        raise UserError(f"data.{part}_split={name}: image folder {Path(data.root) / name} cannot be read; {LAYOUT}")
    return None


SPEC = SourceSpec(
    name="folder",
    summary="own images, one folder per class",
    options=Folder,
    datasets={"labels": open_folder},
)
