"""PLACEHOLDER train/data/sources/build_boxes.py"""

from pathlib import Path
from typing import Any

from ...errors import UserError
from ...recipe.schema import Recipe
from ..detection import DetectionDataset
from ..digit_scenes import DigitScenes, split_length
from .coco import read_coco
from .digit_scenes_boxes import Scenes
from .voc_boxes import read_voc


def build_dataset(recipe: Recipe, split: str) -> Any:
    """The "train" or "val" split with `classes: list[str]`. Raises UserError naming what is missing or unreadable.

    Images without objects to learn are left out of "train" unless `task.detect.empty` is on; "val" has all images.
    """
    data, detect = recipe.data, recipe.task.detect
    masks, all_images = detect.detector == "mask_rcnn", split == "val" or detect.empty
    if data.source == "digit_scenes":
        try:
            return Scenes(DigitScenes(split, length=split_length(split, data.scenes), side=data.size), masks=masks)
        except ImportError as error:
            raise UserError(str(error)) from error
    root = Path(str(data.root))
    if data.source == "voc2012":
        return DetectionDataset(read_voc(root, split), masks=False, all_images=all_images)
    annotations, images = detect.train if split == "train" else detect.val
    return DetectionDataset(read_coco(root / annotations, root / images, masks), masks=masks, all_images=all_images)
