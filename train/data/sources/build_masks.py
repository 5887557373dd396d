"""PLACEHOLDER train/data/sources/build_masks.py"""

from pathlib import Path
from typing import Any

from ...errors import UserError
from ...openmmlab.compat import mmseg_modules
from ...recipe.schema import Data
from ..digit_scenes import split_length
from .ade20k import ade20k
from .cityscapes import cityscapes
from .digit_scenes_masks import Scenes
from .voc import voc2012, voc2012_aug


def build_dataset(data: Data, split: str) -> Any:
    """The "train" or "val" split. Raises UserError naming a folder, list or mask that is missing."""
    if data.source == "digit_scenes":
        try:
            return Scenes(split, length=split_length(split, data.scenes), side=data.size)
        except ImportError as error:
            raise UserError(str(error)) from error
    mmseg_modules()
    builders = {"ade20k": ade20k, "cityscapes": cityscapes, "voc2012": voc2012, "voc2012_aug": voc2012_aug}
    return builders[data.source](Path(str(data.root)), split)
