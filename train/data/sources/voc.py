"""`data.source=voc2012` and `voc2012_aug`: Pascal VOC 2012, with semantic masks or boxes."""

from pathlib import Path
from xml.etree import ElementTree

from pydantic.dataclasses import dataclass

from ...errors import UserError
from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath, Source
from ..annotations import MAX_COORDINATE, AnnotatedImage, AnnotatedObject, Annotations, read_all
from ..detection import DetectionDataset
from ..files import UNPACK_HINT, check_exist, unpacked_root
from ..segmentation import IGNORE_INDEX, SegmentationDataset, published_classes

CLASSES: str = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VOC(Source):
    root: FilePath
    """folder with JPEGImages/, ImageSets/ and SegmentationClass/ or Annotations/; voc2012_aug: SegmentationClassAug/"""


def open_masks(data: VOC, split: str) -> SegmentationDataset:
    """The segmentation lists `train` and `val`."""
    return _masks(data, split, "SegmentationClass")


def open_augmented_masks(data: VOC, split: str) -> SegmentationDataset:
    """The list `trainaug` with the training masks of Hariharan et al. (ICCV 2011), and the list `val`."""
    if split == "val":
        return _masks(data, split, "SegmentationClass")
    return _masks(data, "trainaug", "SegmentationClassAug")


def open_boxes(data: VOC, split: str) -> DetectionDataset:
    """The lists `train` and `val` of ImageSets/Main."""
    return DetectionDataset(read_annotations(_root(data), split), masks=False)


def _root(data: VOC) -> Path:
    root = Path(data.root)
    for inner in ("VOCdevkit/VOC2012", "VOC2012"):
        root = unpacked_root(root, inner, "JPEGImages")
    return root


def _masks(data: VOC, name: str, folder: str) -> SegmentationDataset:
    root = _root(data)
    listing = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    try:
        # a line of the augmented list may also hold the paths of image and mask
        names = [Path(line.split()[0]).stem for line in listing.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"list {listing} cannot be read ({error.strerror}){UNPACK_HINT}") from error
    if not names:
        raise UserError(f"list {listing} names no images{UNPACK_HINT}")
    images = check_exist([root / "JPEGImages" / f"{name}.jpg" for name in names], f"images of {listing}")
    masks = check_exist([root / folder / f"{image.stem}.png" for image in images], f"masks of {listing}")
    table = {255: IGNORE_INDEX} | {value: value for value in range(21)}
    return SegmentationDataset(images, masks, **published_classes("voc"), table=table)


def read_annotations(root: Path, split: str) -> Annotations:
    """The XML files of a split; objects marked difficult count as crowds, as in the evaluation of VOC.

    Raises UserError naming the files that are missing or are not in the format of VOC.
    """
    classes = [str(name) for name in CLASSES.split()]
    try:
        names = (root / "ImageSets/Main" / f"{split}.txt").read_text(errors="replace").split()
        images = read_all(names, lambda name: _read_image(root, name, classes))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); data.source=voc2012 needs it") from error
    return Annotations(str(root), classes, images)


def _read_image(root: Path, name: str, classes: list[str]) -> AnnotatedImage:
    from torchvision.datasets import VOCDetection

    file = root / "Annotations" / f"{name}.xml"
    try:
        content = VOCDetection.parse_voc_xml(ElementTree.parse(file).getroot())["annotation"]
        size = content.get("size", {})
        height, width = (_number(size, key, "0") for key in ("height", "width"))
        if height % 1 or width % 1:
            raise ValueError(f"the size is {width:g} x {height:g}, but must be whole numbers")
        objects = [_read_object(one, classes) for one in content.get("object", [])]
    except (ValueError, KeyError, TypeError, AttributeError, ElementTree.ParseError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{file} is not a valid Pascal VOC annotation ({reason}); repair it") from error
    return AnnotatedImage(str(root / "JPEGImages" / f"{name}.jpg"), int(height), int(width), objects)


def _read_object(one: dict, classes: list[str]) -> AnnotatedObject:
    kind, difficult = one["name"], _number(one, "difficult", "0")
    if kind not in classes:
        raise ValueError(f"the object name {kind!r} is not a class of Pascal VOC")
    if difficult not in (0, 1):
        raise ValueError(f"difficult is {one['difficult']!r}, but must be 0 or 1")
    # VOC counts pixels from 1 and includes the last one
    x1, y1 = (_number(one["bndbox"], side) - 1 for side in ("xmin", "ymin"))
    x2, y2 = (_number(one["bndbox"], side) for side in ("xmax", "ymax"))
    area = (x2 - x1) * (y2 - y1)
    return AnnotatedObject(f"a {kind}", (x1, y1, x2, y2), classes.index(kind), int(difficult), area, None)


def _number(part: dict[str, str], key: str, default: str | None = None) -> float:
    text = part[key] if default is None else part.get(key, default)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < MAX_COORDINATE:
        raise ValueError(f"{key} is {text!r}, but must be a number")
    return value


SPEC = SourceSpec(
    name="voc2012",
    summary="Pascal VOC 2012",
    options=VOC,
    datasets={"semantic masks": open_masks, "boxes": open_boxes},
)
AUGMENTED = SourceSpec(
    name="voc2012_aug",
    summary="Pascal VOC 2012 with the additional training masks of SBD",
    options=VOC,
    datasets={"semantic masks": open_augmented_masks},
)
