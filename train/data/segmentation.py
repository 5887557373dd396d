"""Images with a class for every pixel, from data sets in the layout in which they are handed out, and digit scenes.

A data set is a sequence of (PIL.Image RGB, uint8 mask [H, W], 255: not known) with `classes` and `palette`.
Paths lie in numpy arrays, so that loader processes share their memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ..errors import UserError
from .image_io import as_rgb, decoding

IGNORED = 255


UNKNOWN = -1


ORIENTATION = 0x0112  # the EXIF tag


class SegmentationDataset(Dataset[tuple[Image.Image, np.ndarray]]):
    """Image files and mask files, side by side."""

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path],
        *,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]],
        table: Mapping[int, int],
    ):
        """table: value in a mask file to class or IGNORED; another value there is an error."""
        self.images, self.masks = (np.array([str(path).encode() for path in paths]) for paths in (images, masks))
        self.classes, self.palette = list(classes), [list(colour) for colour in palette]
        self.table = np.full(2**16, UNKNOWN, np.int16)
        self.table[list(table)] = list(table.values())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image_path, mask_path = self.images[index].decode(), self.masks[index].decode()
        image, mask = read_image(image_path), self.translated(read_mask(mask_path), mask_path)
        return oriented(image, mask, f"image {image_path} and mask {mask_path}"), mask

    def translated(self, values: np.ndarray, path: str) -> np.ndarray:
        """File values to classes."""
        if values.size and not 0 <= values.min() <= values.max() < len(self.table):
            raise UserError(
                f"mask {path} holds the value {values.min() if values.min() < 0 else values.max()}, no class"
            )
        mask = self.table[values]
        if mask.size and mask.min() == UNKNOWN:
            strange = sorted(set(np.unique(values[mask == UNKNOWN]).tolist()))[:5]
            raise UserError(
                f"mask {path} holds the values {', '.join(map(str, strange))}, which stand for none of the "
                f"{len(self.classes)} classes; is it of another data set, or recoloured?"
            )
        return mask.astype(np.uint8)


def read_image(path: str) -> Image.Image:
    """RGB as stored; the orientation it asks for in EXIF is still in `info`."""
    with decoding(f"image {path}"), Image.open(path) as image:
        turn = image.getexif().get(ORIENTATION, 1)
        colours = as_rgb(image)
    colours.info = {"orientation": turn}
    return colours


def read_mask(path: str) -> np.ndarray:
    """The values [H, W] of a mask: palette indices, or grey levels of 8 or 16 bits."""
    with decoding(f"mask {path}"), Image.open(path) as mask:
        if mask.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise UserError(f"mask {path} is a picture of mode {mask.mode}; it must hold class numbers, one a pixel")
        return np.array(mask).astype(np.int32)


def oriented(image: Image.Image, mask: np.ndarray, names: str) -> Image.Image:
    """The image as its mask was drawn on it: turned as EXIF says, unless only the image as stored has the mask's size.

    None of the data sets here says which it is. Annotators see a turned image and their masks carry no tag, so turned
    is right where both sizes fit; where only the stored size fits, the masks were made by a tool that ignores the tag.
    """
    stored, turned = image.size, image
    if (turn := image.info.get("orientation", 1)) != 1:
        exif = Image.Exif()
        exif[ORIENTATION] = turn
        tagged = image.copy()
        tagged.info["exif"] = exif.tobytes()
        turned = ImageOps.exif_transpose(tagged)
    wanted = (mask.shape[1], mask.shape[0])
    for candidate in (turned, image):
        if candidate.size == wanted:
            return candidate
    raise UserError(
        f"{names} differ in size: {stored[0]} x {stored[1]} and {wanted[0]} x {wanted[1]} pixels; a mask needs the "
        "size of its image"
    )


def _facts(name: str) -> dict[str, Any]:
    from mmseg.utils import get_classes, get_palette

    return {"classes": get_classes(name), "palette": get_palette(name)}
