"""Mask files as users have them: one value per pixel (a palette index or a gray level), or one color per pixel.

A color is handled as the number r << 16 | g << 8 | b.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import UserError
from .class_file import Color, hex_color
from .image_io import decoding_errors, open_image, open_regular
from .segmentation import INDEX_MODES

MAX_COLORS = 256  # of one mask file; more are a photo or the blend of antialiased borders
THREADS = 8
LOSSY = ("JPEG", "WEBP", "MPO")  # formats that change colors and values
BLENDED = (
    "antialiased or resized with interpolation: write masks without antialiasing, and resize them with the nearest "
    "neighbor"
)


class MaskFile(NamedTuple):
    """values: [H, W] int32, of a colored mask r << 16 | g << 8 | b; palette: color of each value of an indexed one."""

    values: np.ndarray
    colored: bool
    palette: list[Color] | None


@dataclass
class Survey:
    """What some mask files contain. values, colors: number of pixels by value and by color."""

    values: Counter[int] = field(default_factory=Counter)
    colors: Counter[int] = field(default_factory=Counter)
    palette: dict[int, int] = field(default_factory=dict)  # value -> color, of the first mask that has the value
    indexed: bool = True  # every mask has one value per pixel, or is gray
    paletted: bool = True  # every mask has a color palette, or colors


def read_mask_file(path: str) -> MaskFile:
    """The values or colors of a mask file.

    Raises UserError for a damaged file, and for one that is no mask: lossy, partly transparent or of another mode.
    """
    with decoding_errors(f"mask {path}"), open_regular(path) as file, open_image(file) as mask:
        if mask.format in LOSSY:
            raise UserError(f"mask {path} is a {mask.format} file, which changes values; save masks as PNG")
        if mask.mode in INDEX_MODES:
            palette = _palette(mask) if mask.mode == "P" else None
            return MaskFile(np.array(mask).astype(np.int32), False, palette)
        if mask.mode not in ("RGB", "RGBA", "LA", "PA"):
            raise UserError(
                f"mask {path} is an image of mode {mask.mode}; a mask has one value (modes P, L, "
                "I;16) or one color (mode RGB) per pixel"
            )
        if mask.mode != "RGB" and mask.getchannel("A").getextrema() != (255, 255):
            raise UserError(f"mask {path} is transparent in part; save it without an alpha channel")
        pixels = np.asarray(mask.convert("RGB")).astype(np.int32)
        return MaskFile(pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2], True, None)


def matching_values(file: MaskFile, colored: bool, path: str) -> np.ndarray:
    """The values of a mask as the classes are given, by colors or by values. Raises UserError if it has none such."""
    if file.colored == colored:
        return file.values
    if colored:
        if file.palette is None:
            return file.values.clip(0, 255) * 0x010101
        return np.array([pack(color) for color in file.palette], np.int32)[file.values]
    if (file.values != (file.values & 255) * 0x010101).any():
        raise UserError(
            f"mask {path} has colors, where the classes are values; save it with one value per pixel, or give each "
            "class a color in the file of data.class_map"
        )
    return file.values & 255


def survey(masks: Sequence[Path]) -> Survey:
    """The values and colors in the mask files. Damaged ones are left out: they are told when they are read."""
    found = Survey()
    with ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(_survey_file, masks):
            if part is not None:
                found.values += part.values
                found.colors += part.colors
                found.palette = part.palette | found.palette
                found.indexed &= part.indexed
                found.paletted &= part.paletted
    return found


def _survey_file(path: Path) -> Survey | None:
    try:
        file = read_mask_file(str(path))
    except UserError:
        if path.suffix.lower() in (".jpg", ".jpeg", ".webp"):
            raise
        return None
    values, counts = counted(file.values)
    if file.colored:
        if len(values) > MAX_COLORS:
            raise UserError(f"mask {path} has {len(values):,} colors; it is no mask, or was {BLENDED}")
        grey = all(value == (value & 255) * 0x010101 for value in values)
        by_value = Counter({value & 255: count for value, count in zip(values, counts, strict=True)} if grey else {})
        return Survey(by_value, Counter(dict(zip(values, counts, strict=True))), indexed=grey)
    by_value = Counter(dict(zip(values, counts, strict=True)))
    if file.palette is None:
        return Survey(by_value, paletted=False)
    palette = {value: pack(file.palette[value]) for value in values}
    by_color: Counter[int] = Counter()
    for value, count in by_value.items():
        by_color[palette[value]] += count
    return Survey(by_value, by_color, palette)


def counted(values: np.ndarray) -> tuple[list[int], list[int]]:
    """The values that occur, rising, and how often each does."""
    if values.size and 0 <= values.min() <= values.max() < 2**16:  # many times faster than sorting
        counts = np.bincount(values.ravel())
        found = counts.nonzero()[0]
        return found.tolist(), counts[found].tolist()
    found, counts = np.unique(values, return_counts=True)
    return found.tolist(), counts.tolist()


def _palette(mask: Image.Image) -> list[Color]:
    """256 colors; those that the file does not define are black."""
    numbers = (mask.convert("P").getpalette("RGB") or [])[:768]
    numbers += [0] * (768 - len(numbers))
    return [(numbers[at], numbers[at + 1], numbers[at + 2]) for at in range(0, 768, 3)]


def show(value: int, colored: bool) -> str:
    """A value or color for messages."""
    return hex_color(unpack(value)) if colored else str(value)


def pack(color: Sequence[int]) -> int:
    """A color as one number."""
    return color[0] << 16 | color[1] << 8 | color[2]


def unpack(value: int) -> Color:
    """The color of a number."""
    return value >> 16, value >> 8 & 255, value & 255
