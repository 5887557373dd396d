"""Reading image files: decoding to 8-bit RGB, EXIF orientation, and errors that name the file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..errors import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}


def read_image(open_file: Callable[[], Any], name: str) -> Image.Image:
    """The RGB image in the binary file that `open_file()` returns. Raises UserError with `name` if it is damaged."""
    with decoding_errors(f"image {name}"), open_file() as file, Image.open(file) as image:
        return as_rgb(image)


def read_oriented(path: str, size: tuple[int, int] | None) -> Image.Image:
    """The RGB image at `path`, rotated as its EXIF orientation says.

    size: width and height of its annotations. They show whether the annotator's tool applied the EXIF orientation: if
    only the image as stored has this size, it is not rotated. Raises UserError if neither has, or if the file is
    damaged.
    """
    with decoding_errors(f"image {path}"), Image.open(path) as stored:
        upright = ImageOps.exif_transpose(stored)
        image = as_rgb(stored if size and upright.size != size and stored.size == size else upright)
    if size and image.size != size:
        raise UserError(
            f"image {path} is {image.width} x {image.height} pixels, but its annotation is for {size[0]} x {size[1]}"
        )
    return image


def upright_size(path: str | Path) -> tuple[int, int] | None:
    """Width and height of the image at `path`, rotated as its EXIF orientation says; None if it cannot be read.

    Only the header is read.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.height, image.width) if turned else image.size
    except Exception:  # decoders raise all kinds of exceptions for damaged files
        return None


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB. 16-bit values are scaled; PIL's own conversion would clip them at 255."""
    if image.mode == "F":
        raise ValueError("it has floating-point pixels of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert("RGB")


@contextmanager
def decoding_errors(name: str) -> Iterator[None]:
    """Turn any exception of a decoder into a UserError with the file's `name`."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:  # decoders raise all kinds of exceptions for damaged files
        raise UserError(f"{name} cannot be decoded ({error}); repair or remove the file") from error
