"""`data.source=masks`: own images beside masks of their pixels' classes."""

from pathlib import Path

from pydantic.dataclasses import dataclass

from ...errors import UserError
from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath
from ..layout import Folders, Pair
from ..mask_classes import OwnMasks, find_classes
from ..segmentation import SegmentationDataset
from ..split import SplitOptions

# the last three are listed so that an error names them, not a missing mask
EXTENSIONS = frozenset({".png", ".bmp", ".gif", ".tif", ".tiff", ".jpg", ".jpeg", ".webp"})


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Masks(SplitOptions):
    root: FilePath
    """folder with images/ and masks/, whose files have the same names"""
    images: str = "images"
    """name of the folder of the images"""
    masks: str = "masks"
    """name of the folder of the masks: PNG files with a class value or a class color per pixel"""
    mask_suffix: str = ""
    """what follows the name of an image in the name of its mask, for example _mask"""
    class_map: FilePath | None = None
    """file with the names of the classes, and if needed their values or colors; null: classes.csv, .yaml, .json or
    .txt in root, else the values in the masks are the classes"""
    ignore: tuple[int | str, ...] | None = None
    """values, colors ('#rrggbb', in quotes) or class names of unlabelled pixels; null: 255, unless it is a class"""
    train_split: str | None = None
    """name of the training part: of a folder or, with .txt, of a list of names; null: train"""
    val_split: str | None = None
    """name of the validation part; null: val"""


def open_masks(data: Masks, split: str) -> SegmentationDataset:
    """A split of own images and masks. Raises UserError saying what is missing or wrong, and what to write."""
    pairs = {part: find_pairs(data, part) for part in ("train", "val")}
    # the masks of both splits, so that both have the same classes
    masks = sorted({mask for part in pairs.values() for mask in files_of(part)[1]})
    found = find_classes(masks, Path(data.root), data.class_map, data.ignore)
    images, labels = files_of(pairs[split])
    return SegmentationDataset(images, labels, classes=found.classes, palette=found.palette, reader=OwnMasks(found))


def find_pairs(data: Masks, split: str) -> list[Pair]:
    """The images and masks of a split."""
    root = Path(data.root)
    if not root.is_dir():
        raise UserError(f"data.root={data.root} is not a folder")
    folders = Folders(root, data.images, data.masks, "mask", EXTENSIONS, data.mask_suffix)
    return folders.pairs(split, (data.train_split, data.val_split), data.split)


def files_of(pairs: list[Pair]) -> tuple[list[Path], list[Path]]:
    """The image files and the mask files of pairs."""
    return [pair.image for pair in pairs], [pair.label for pair in pairs if pair.label is not None]


SPEC = SourceSpec(
    name="masks",
    summary="own images and masks",
    options=Masks,
    datasets={"semantic masks": open_masks},
)
