"""`data.source=cityscapes`: Cityscapes with fine annotations."""

from pathlib import Path

from pydantic.dataclasses import dataclass

from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath, Source
from ..files import check_exist, list_files
from ..segmentation import IGNORE_INDEX, IndexMasks, SegmentationDataset, published_classes


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Cityscapes(Source):
    root: FilePath
    """folder with leftImg8bit/ and gtFine/"""


def open_cityscapes(data: Cityscapes, split: str) -> SegmentationDataset:
    """The 19 evaluated labels are classes, the others are ignored. Raises UserError if files are missing."""
    from torchvision.datasets import Cityscapes as Torchvision

    root = Path(data.root)
    images = list_files(root / "leftImg8bit" / split, "*/*_leftImg8bit.png", root)
    masks = []
    for image in images:
        name = image.name.removesuffix("_leftImg8bit.png") + "_gtFine_labelIds.png"
        masks.append(root / "gtFine" / split / image.parent.name / name)
    labels = [label for label in Torchvision.classes if label.id >= 0]
    # the license plate has the id -1, stored as 255
    table = {255: IGNORE_INDEX}
    table |= {label.id: IGNORE_INDEX if label.ignore_in_eval else label.train_id for label in labels}
    masks = check_exist(masks, "masks")
    return SegmentationDataset(images, masks, **published_classes("cityscapes"), reader=IndexMasks(table))


SPEC = SourceSpec(
    name="cityscapes",
    summary="Cityscapes, 19 classes",
    options=Cityscapes,
    datasets={"semantic masks": open_cityscapes},
)
