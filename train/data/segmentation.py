"""Images with semantic masks, from image files and mask files side by side.

A sample is (RGB image, uint8 mask [H, W]); IGNORE_INDEX marks unlabelled pixels. A data set also has `classes` and
`palette`, a color per class.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from .image_io import decoding_errors, read_oriented

IGNORE_INDEX = 255
UNKNOWN = -1  # a value without a class


class SegmentationDataset:
    """Pairs of image and mask files. The paths are arrays, so that data loader workers share their memory."""

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path],
        *,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]],
        table: Mapping[int, int],
    ):
        """table: value in a mask file -> class index or IGNORE_INDEX; other values are errors."""
        self.images, self.masks = (np.array([str(path).encode() for path in paths]) for paths in (images, masks))
        self.classes, self.palette = list(classes), [list(color) for color in palette]
        self.table = np.full(2**16, UNKNOWN, np.int16)
        self.table[list(table)] = list(table.values())

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The file of a sample, for messages."""
        return self.images[index].decode()

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        path = self.masks[index].decode()
        mask = self.to_classes(read_mask(path), path)
        return read_oriented(self.images[index].decode(), (mask.shape[1], mask.shape[0])), mask

    def to_classes(self, values: np.ndarray, path: str) -> np.ndarray:
        """Values of a mask file to class indices. Raises UserError naming values without a class."""
        if values.size and not 0 <= values.min() <= values.max() < len(self.table):
            value = values.min() if values.min() < 0 else values.max()
            raise UserError(f"mask {path} has the value {value}, which is not a class")
        mask = self.table[values]
        if mask.size and mask.min() == UNKNOWN:
            unknown = sorted(set(np.unique(values[mask == UNKNOWN]).tolist()))[:5]
            raise UserError(
                f"mask {path} has the values {', '.join(map(str, unknown))}, which are none of the "
                f"{len(self.classes)} classes; is it from another data set, or a color image?"
            )
        return mask.astype(np.uint8)


def read_mask(path: str) -> np.ndarray:
    """The values [H, W] of a mask: palette indices, or gray levels of 8 or 16 bits."""
    with decoding_errors(f"mask {path}"), Image.open(path) as mask:
        if mask.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise UserError(f"mask {path} is an image of mode {mask.mode}; it must have one class index per pixel")
        return np.array(mask).astype(np.int32)


def published_classes(name: str) -> dict[str, Any]:
    """Class names and palette of a data set that mmsegmentation knows."""
    from ..openmmlab.compat import mmseg_modules

    mmseg_modules()
    from mmseg.utils import get_classes, get_palette

    return {"classes": get_classes(name), "palette": get_palette(name)}
