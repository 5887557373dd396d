"""PLACEHOLDER train/data/sources/ade20k.py"""

from pathlib import Path

from ..layout import _files, _present, inside
from ..segmentation import IGNORED, SegmentationDataset, _facts


def ade20k(root: Path, split: str) -> SegmentationDataset:
    """ADE20K scene parsing (SceneParse150): `{images,annotations}/{training,validation}/*`; 0 in a mask is no class."""
    root = inside(root, "ADEChallengeData2016", "images")
    part = {"train": "training", "val": "validation"}[split]
    images = _files(root / "images" / part, "*.jpg", root)
    masks = _present([root / "annotations" / part / f"{image.stem}.png" for image in images], "masks")
    table = {0: IGNORED, 255: IGNORED} | {value: value - 1 for value in range(1, 151)}
    return SegmentationDataset(images, masks, **_facts("ade20k"), table=table)
