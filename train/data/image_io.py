"""Reading image files as they are meant to be seen: EXIF orientation applied, transparent pixels over a background,
16 bits scaled to 8, and errors that name the file."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..errors import UserError
from ..recipe.schema import PixelFormat
from .bands import ARRAY_EXTENSIONS, as_channels, is_array_file, read_array

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
# those of the endings above, whatever ending a file has: others start programs (EPS starts Ghostscript)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "JPEG2000")
RGB = PixelFormat()

Picture = Image.Image | np.ndarray  # RGB, or [H, W, C] if the model reads other channels


def read_image(
    open_file: Callable[[], Any], name: str, *, pixel_format: PixelFormat = RGB, size: tuple[int, int] | None = None
) -> Any:
    """The picture in the binary file that `open_file()` returns, rotated as its EXIF orientation says.

    It is an 8-bit RGB image. Transparent pixels are composed over `pixel_format.background`, 16-bit values are scaled;
    CMYK, palettes and gray levels are converted. For a model with other than 1 or 3 channels (`pixel_format.channels`)
    it is an array `[H, W, channels]` with the values in the file. .npy and .npz files are read too; a model with 1 or 3
    channels takes 8 or 16 bits from them.

    name: for errors, and to recognize arrays by their ending. size: width and height of the annotations. They show
    whether the annotator's tool applied the EXIF orientation: if only the image as stored has this size, it is not
    rotated. Raises UserError if neither has, if the file is damaged, or if it has other channels.
    """
    with decoding_errors(f"image {name}"), open_file() as file:
        if pixel_format.channels not in (1, 3) and is_array_file(name):
            picture: Any = as_channels(read_array(file, name), pixel_format.channels)
        elif name.lower().endswith(tuple(ARRAY_EXTENSIONS)):
            picture = as_rgb(image_of_array(read_array(file, name)), pixel_format.background)
        else:
            with open_image(file) as stored:
                picture = as_picture(orient(stored, size), pixel_format)
    if size and (found := picture_size(picture)) != size:
        raise UserError(
            f"image {name} is {found[0]} x {found[1]} pixels, but its annotation is for {size[0]} x {size[1]}"
        )
    return picture


def upright_size(path: str | Path) -> tuple[int, int] | None:
    """Width and height of the image at `path`, rotated as its EXIF orientation says; None if it cannot be read.

    Only the header is read.
    """
    try:
        with open_regular(str(path)) as file, open_image(file) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.height, image.width) if turned else image.size
    except Exception:  # decoders raise all kinds of exceptions for damaged files
        return None


def read_file(path: str, *, pixel_format: PixelFormat = RGB, size: tuple[int, int] | None = None) -> Any:
    """The picture in the file at `path`; see `read_image`."""
    return read_image(partial(open_regular, path), path, pixel_format=pixel_format, size=size)


def open_image(file: BinaryIO) -> Image.Image:
    """The image in a binary file of one of `FORMATS`, not yet decoded."""
    return Image.open(file, formats=FORMATS)


def open_regular(path: str) -> BinaryIO:
    """The file at `path`. Raises OSError for a pipe, a socket or a device, which may never answer."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is no regular file")
    return open(path, "rb")


def orient(stored: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """The image rotated by its EXIF orientation, unless only the stored one has the `size` of its annotations."""
    stored.load()  # PIL rotates a TIFF when it decodes it
    if stored.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return stored
    upright = ImageOps.exif_transpose(stored)
    return stored if size and upright.size != size and stored.size == size else upright


def as_picture(upright: Image.Image, pixel_format: PixelFormat) -> Picture:
    """The image as a model reads it: 8-bit RGB, or an array `[H, W, channels]`.

    Raises ValueError if the image has other channels.
    """
    if pixel_format.channels in (1, 3):
        return as_rgb(upright, pixel_format.background)
    return as_channels(np.asarray(upright), pixel_format.channels)


def as_rgb(image: Image.Image, background: tuple[int, int, int] = RGB.background) -> Image.Image:
    """The image in 8-bit RGB, transparent pixels over `background`.

    The high bytes of 16-bit values are taken; PIL's own conversion would clip at 255. Raises ValueError for
    floating-point pixels.
    """
    if image.mode == "F":
        raise ValueError("it has floating-point pixels of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("RGB")


def image_of_array(array: np.ndarray) -> Image.Image:
    """An image of an array `[H, W]`, `[H, W, 1]` or `[H, W, 3]` with 8 or 16 bits. Raises ValueError for others."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"it has values of type {array.dtype}; a model of 1 or 3 channels takes uint8 and uint16")
    if array.ndim == 3 and array.shape[2] != 3:
        raise ValueError(f"it has {array.shape[2]} channels; set model.in_chans={array.shape[2]}")
    if array.dtype == np.uint16:
        array = (array // 256).astype(np.uint8)
    return Image.fromarray(array)


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height of an image or an array `[H, W, C]`."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])


@contextmanager
def decoding_errors(name: str) -> Iterator[None]:
    """Turn any exception of a decoder into a UserError with the file's `name`."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:  # decoders raise all kinds of exceptions for damaged files
        raise UserError(f"{name} cannot be decoded ({error}); repair or remove the file") from error
