"""`data.source=ade20k`: ADE20K scene parsing (SceneParse150)."""

from pathlib import Path

from pydantic.dataclasses import dataclass

from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath, Source
from ..files import check_exist, list_files, unpacked_root
from ..segmentation import IGNORE_INDEX, IndexMasks, SegmentationDataset, published_classes


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ADE20K(Source):
    root: FilePath
    """folder with {images,annotations}/{training,validation}/*"""


def open_ade20k(data: ADE20K, split: str) -> SegmentationDataset:
    """150 classes; 0 in a mask file means unlabelled. Raises UserError if files are missing."""
    root = unpacked_root(Path(data.root), "ADEChallengeData2016", "images")
    part = {"train": "training", "val": "validation"}[split]
    images = list_files(root / "images" / part, "*.jpg", root)
    masks = check_exist([root / "annotations" / part / f"{image.stem}.png" for image in images], "masks")
    table = {0: IGNORE_INDEX, 255: IGNORE_INDEX} | {value: value - 1 for value in range(1, 151)}
    return SegmentationDataset(images, masks, **published_classes("ade20k"), reader=IndexMasks(table))


SPEC = SourceSpec(
    name="ade20k",
    summary="ADE20K scene parsing, 150 classes",
    options=ADE20K,
    datasets={"semantic masks": open_ade20k},
)
