"""PLACEHOLDER train/data/sources/voc.py"""

from pathlib import Path

from ...errors import UserError
from ..layout import MISSING, _present, inside
from ..segmentation import IGNORED, SegmentationDataset, _facts


def voc2012(root: Path, split: str) -> SegmentationDataset:
    """Pascal VOC 2012, the lists `train` and `val` of its segmentation."""
    return _voc(root, split, "SegmentationClass")


def voc2012_aug(root: Path, split: str) -> SegmentationDataset:
    """Pascal VOC 2012 with the further training masks of Hariharan et al. (ICCV 2011), in the list `trainaug`."""
    if split == "val":
        return _voc(root, split, "SegmentationClass")
    return _voc(root, "trainaug", "SegmentationClassAug")


def _voc(root: Path, name: str, folder: str) -> SegmentationDataset:
    for inner in ("VOCdevkit/VOC2012", "VOC2012"):
        root = inside(root, inner, "JPEGImages")
    listing = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    try:
        # a line of the augmented list may also be the paths of image and mask
        names = [Path(line.split()[0]).stem for line in listing.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"list {listing} cannot be read ({error.strerror}){MISSING}") from error
    if not names:
        raise UserError(f"list {listing} names no images{MISSING}")
    images = _present([root / "JPEGImages" / f"{name}.jpg" for name in names], f"images of {listing}")
    masks = _present([root / folder / f"{image.stem}.png" for image in images], f"masks of {listing}")
    return SegmentationDataset(
        images, masks, **_facts("voc"), table={255: IGNORED} | {value: value for value in range(21)}
    )
