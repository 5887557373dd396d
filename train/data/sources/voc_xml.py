"""`data.source=voc`: own images with annotations in the format of Pascal VOC, an XML file per image."""

from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from ...errors import UserError
from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath
from ..annotations import AnnotatedImage, Annotations, read_all
from ..class_file import find_class_file, read_class_file
from ..detection import DetectionDataset
from ..layout import Folders, Pair
from ..split import PART_NAMES, SplitOptions
from ..voc_xml import object_names, read_voc_image

IMAGES, ANNOTATIONS = ("images", "JPEGImages"), ("annotations", "Annotations", "labels")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VOCFiles(SplitOptions):
    root: FilePath
    """folder with the images and their XML files"""
    images: str | None = None
    """name of the folder of the images; null: images or JPEGImages, else the XML files lie beside the images"""
    annotations: str | None = None
    """name of the folder of the XML files; null: annotations, Annotations or labels"""
    class_map: FilePath | None = None
    """file with the names of the classes; null: classes.csv, .yaml, .json or .txt in root, else the names in the
    training annotations, sorted"""
    voc_offset: Literal[0, 1] = 0
    """number of the first pixel in the XML files: 1 in Pascal VOC itself, 0 in most tools' files"""
    train_split: str | None = None
    """name of the training part: of a folder or, with .txt, of a list of names; null: train"""
    val_split: str | None = None
    """name of the validation part; null: val"""


def open_boxes(data: VOCFiles, split: str) -> DetectionDataset:
    """Boxes and classes. An image without an XML file has no objects. Raises UserError naming an invalid file."""
    root = Path(data.root)
    if not root.is_dir():
        raise UserError(f"data.root={data.root} is not a folder")
    pairs = find_pairs(data, split)
    classes = find_classes(data, pairs if split == "train" else find_pairs(data, "train"))

    def read(pair: Pair) -> AnnotatedImage:
        if pair.label is None:
            return AnnotatedImage(str(pair.image))
        return read_voc_image(pair.label, pair.image, classes, offset=data.voc_offset)

    images = read_all(pairs, read)
    return DetectionDataset(Annotations(str(root), classes, images), masks=False)


def find_pairs(data: VOCFiles, split: str) -> list[Pair]:
    """The images of a split and their XML files."""
    root = Path(data.root)
    images = data.images or _existing_folder(root, IMAGES)
    annotations = data.annotations or _existing_folder(root, ANNOTATIONS)
    folders = Folders(root, images, annotations, "annotation", frozenset({".xml"}), optional=True)
    return folders.pairs(split, (data.train_split, data.val_split), data.split)


def find_classes(data: VOCFiles, train: list[Pair]) -> list[str]:
    """The classes of a file, else those that the training annotations name."""
    if (file := find_class_file(Path(data.root), data.class_map)) is not None:
        return [entry.name for entry in read_class_file(file)]
    names = {name for pair in train if pair.label is not None for name in object_names(pair.label)}
    if not names:
        raise UserError(f"data.root={data.root} has no XML file of a training image that names an object")
    return sorted(names)


def _existing_folder(root: Path, names: tuple[str, ...]) -> str:
    """The first of `names` that is a folder of the data set; "." if none is."""
    parts = ("", *PART_NAMES["train"])
    return next((name for name in names if any((root / part / name).is_dir() for part in parts)), ".")


SPEC = SourceSpec(
    name="voc",
    summary="own images with XML files in the format of Pascal VOC",
    options=VOCFiles,
    datasets={"boxes": open_boxes},
)
