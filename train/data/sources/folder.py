"""`data.source=folder`: one folder of images per class."""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic.dataclasses import dataclass

from ...errors import UserError
from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath, Source
from ..image_io import EXTENSIONS, read_image

LAYOUT = "data.root must contain train/CLASS/*.jpg and val/CLASS/*.jpg"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Folder(Source):
    root: FilePath
    """folder with train/CLASS/*.jpg and val/CLASS/*.jpg"""
    train_split: str | None = None
    """subfolder of root with the training images; null: train"""
    val_split: str | None = None
    """subfolder of root with the validation images; null: val"""


class ImageFolder:
    """(RGB image, class index) of the images below `root/CLASS/`; classes in alphabetical order.

    The paths are one array, so that data loader workers share its memory.
    """

    def __init__(self, root: Path):
        """Raises UserError if the folder cannot be read, or a class has no images."""
        try:
            folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
            files = [sorted(f for f in folder.rglob("*") if f.suffix.lower() in EXTENSIONS) for folder in folders]
        except OSError as error:
            raise UserError(f"image folder {root} cannot be read ({error.strerror}); {LAYOUT}") from error
        if empty := [folder.name for folder, found in zip(folders, files, strict=True) if not found]:
            raise UserError(
                f"class {empty[0]} in {root} has no images ({', '.join(sorted(EXTENSIONS))}); add some or remove it"
            )
        if not folders:
            raise UserError(f"{root} has no class folders, hence no images; {LAYOUT}")
        self.classes = [folder.name for folder in folders]
        self.paths = np.array([str(file).encode() for found in files for file in found])
        self.targets = np.repeat(np.arange(len(folders)), [len(found) for found in files])

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The file of a sample, for messages."""
        return self.paths[index].decode()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self.name(index)
        return read_image(partial(open, path, "rb"), path), int(self.targets[index])


def open_folder(data: Folder, split: str) -> ImageFolder:
    name = (data.train_split if split == "train" else data.val_split) or split
    return ImageFolder(Path(data.root) / name)


SPEC = SourceSpec(
    name="folder",
    summary="own images, one folder per class",
    options=Folder,
    datasets={"labels": open_folder},
)
