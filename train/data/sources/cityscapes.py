"""PLACEHOLDER train/data/sources/cityscapes.py"""

from pathlib import Path

from ..layout import _files, _present
from ..segmentation import IGNORED, SegmentationDataset, _facts


def cityscapes(root: Path, split: str) -> SegmentationDataset:
    """Cityscapes with fine annotations: 19 of its labels are classes, the others are ignored."""
    from torchvision.datasets import Cityscapes

    images = _files(root / "leftImg8bit" / split, "*/*_leftImg8bit.png", root)
    masks = []
    for image in images:
        name = image.name.removesuffix("_leftImg8bit.png") + "_gtFine_labelIds.png"
        masks.append(root / "gtFine" / split / image.parent.name / name)
    labels = [label for label in Cityscapes.classes if label.id >= 0]
    table = {label.id: IGNORED if label.ignore_in_eval else label.train_id for label in labels}
    # the licence plate is -1, which is 255 in a byte
    return SegmentationDataset(images, _present(masks, "masks"), **_facts("cityscapes"), table=table | {255: IGNORED})
