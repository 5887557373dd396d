"""`data.source=voc2012` and `voc2012_aug`: Pascal VOC 2012, with semantic masks or boxes."""

from pathlib import Path

from pydantic.dataclasses import dataclass

from ...errors import UserError
from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath, Source
from ..annotations import AnnotatedImage, Annotations, read_all
from ..detection import DetectionDataset
from ..files import UNPACK_HINT, check_exist, unpacked_root
from ..segmentation import IGNORE_INDEX, IndexMasks, SegmentationDataset, published_classes
from ..voc_xml import read_voc_image

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
    return SegmentationDataset(images, masks, **published_classes("voc"), reader=IndexMasks(table))


def read_annotations(root: Path, split: str) -> Annotations:
    """The XML files of a split. Raises UserError naming the files that are missing or are not in the format of VOC."""
    classes = [str(name) for name in CLASSES.split()]
    listing = root / "ImageSets/Main" / f"{split}.txt"
    try:
        names = listing.read_text(errors="replace").split()
    except OSError as error:
        raise UserError(f"{listing} cannot be read ({error.strerror}); data.source=voc2012 needs it") from error

    def read(name: str) -> AnnotatedImage:
        file, image = root / "Annotations" / f"{name}.xml", root / "JPEGImages" / f"{name}.jpg"
        return read_voc_image(file, image, classes, offset=1)

    images = read_all(names, read)
    return Annotations(str(root), classes, images)


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
