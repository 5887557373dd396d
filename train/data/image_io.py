"""PLACEHOLDER train/data/image_io.py"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}


def decoded(opener: Callable[[], Any], name: str) -> Image.Image:
    """The RGB image in the binary file that `opener()` opens. Raises UserError naming it, whatever is wrong with it."""
    with decoding(f"image {name}"), opener() as file, Image.open(file) as image:
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB; 16 bits are scaled, which PIL's own conversion would clip at 255."""
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers, whose white is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert("RGB")


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file within into the UserError that names it."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:  # what decoders raise at damaged files has no end
        raise UserError(f"{name} cannot be decoded ({error}); repair or remove the file") from error
