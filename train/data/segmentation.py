"""Images with semantic masks, from image files and mask files side by side.

A sample is (RGB image, uint8 mask [H, W]); IGNORE_INDEX marks unlabelled pixels. A data set also has `classes` and
`palette`, a color per class.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from .fingerprint import file_sizes
from .image_io import RGB, decoding_errors, open_image, open_regular, read_file

IGNORE_INDEX = 255
UNKNOWN = -1  # a value without a class
INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # of images with one value per pixel


class SegmentationDataset:
    """Pairs of image and mask files. The paths are arrays, so that data loader workers share their memory."""

    pixel_format = RGB

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path],
        *,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]],
        reader: Callable[[str], np.ndarray],
    ):
        """reader: path of a mask file -> uint8 class indices or IGNORE_INDEX, [H, W]; see `IndexMasks`."""
        self.images, self.masks = (np.array([os.fsencode(path) for path in paths]) for paths in (images, masks))
        self.classes, self.palette, self.reader = list(classes), [list(color) for color in palette], reader

    def __len__(self) -> int:
        return len(self.images)

    def contents(self) -> list[np.ndarray]:
        """What a run records of the samples beside their images; see `fingerprint`."""
        return [file_sizes(map(os.fsdecode, self.masks))]

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        mask = self.reader(os.fsdecode(self.masks[index]))
        size = (mask.shape[1], mask.shape[0])
        return read_file(self.image_path(index), pixel_format=self.pixel_format, size=size), mask

    def image_path(self, index: int) -> str:
        return os.fsdecode(self.images[index])


class IndexMasks:
    """Reads mask files of one value per pixel: palette indices, or gray levels of 8 or 16 bits."""

    def __init__(self, table: Mapping[int, int]):
        """table: value in a mask file -> class index or IGNORE_INDEX; other values are errors."""
        self.classes = len({label for label in table.values() if label != IGNORE_INDEX})
        self.table = np.full(2**16, UNKNOWN, np.int16)
        self.table[list(table)] = list(table.values())

    def __call__(self, path: str) -> np.ndarray:
        return self.to_classes(read_mask(path), path)

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
                f"{self.classes} classes; is it from another data set, or a color image? Own masks are read with "
                "data.source=masks"
            )
        return mask.astype(np.uint8)


def read_mask(path: str) -> np.ndarray:
    """The values [H, W] of a mask: palette indices, or gray levels of 8 or 16 bits."""
    with decoding_errors(f"mask {path}"), open_regular(path) as file, open_image(file) as mask:
        if mask.mode not in INDEX_MODES:
            raise UserError(f"mask {path} is an image of mode {mask.mode}; it must have one class index per pixel")
        return np.array(mask).astype(np.int32)


def published_classes(name: str) -> dict[str, Any]:
    """Class names and palette of a data set that mmsegmentation knows."""
    from ..openmmlab.compat import mmseg_modules

    mmseg_modules()
    from mmseg.utils import get_classes, get_palette

    return {"classes": get_classes(name), "palette": get_palette(name)}
