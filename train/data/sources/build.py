"""PLACEHOLDER train/data/sources/build.py"""

from pathlib import Path
from typing import Any

from ...errors import UserError
from ...recipe.schema import Data
from .folder import Folder


def build_dataset(data: Data, split: str) -> Any:
    """The "train" or "val" split as pairs (PIL.Image RGB, class), untransformed, with `classes: list[str]`.

    Raises UserError naming a folder that is missing, unreadable or without images.
    """
    if data.source == "digits":
        from .digits import digits

        try:
            return digits(split)
        except ImportError as error:
            raise UserError(str(error)) from error
    usual = "validation" if split == "val" and data.source in ("hfds", "tfds") else split
    name = (data.train_split if split == "train" else data.val_split) or usual
    if data.source == "folder":
        return Folder(Path(str(data.root)) / name)
    from ..external import open_reader

    return open_reader(data, name)
