"""Images from wherever a user has them: files, folders, patterns, urls, PIL images, arrays and tensors."""

import dataclasses
import glob
import io
from collections.abc import Iterable, Iterator, Sequence, Set
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..train.data.bands import ARRAY_EXTENSIONS, as_channels
from ..train.data.image_io import (
    EXTENSIONS,
    RGB,
    Picture,
    as_picture,
    as_rgb,
    decoding_errors,
    image_of_array,
    read_image,
)
from ..train.errors import UserError
from ..train.recipe.schema import PixelFormat

_TIMEOUT = 30.0  # seconds, for each answer of a server


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image that could not be read: its path or url, and why."""

    source: str
    reason: str


def find_images(sources: Iterable[str | Path]) -> list[str]:
    """The files and urls that `sources` name: a file, a url, a folder with all images below it, or a pattern.

    Arrays (.npy, .npz) are the images of a folder that has no others. A file that does not exist stays in the list:
    reading it fails by itself. Raises UserError for a folder or a pattern without images.
    """
    found: list[str] = []
    for source in map(str, sources):
        path = Path(source).expanduser()
        if _is_url(source):
            found.append(source)
        elif path.is_dir():
            images = _files_below(path, EXTENSIONS) or _files_below(path, ARRAY_EXTENSIONS)
            if not images:
                endings = ", ".join(sorted(EXTENSIONS | ARRAY_EXTENSIONS))
                raise UserError(f"{source}: there are no images in this folder; read are {endings}")
            found += images
        elif glob.has_magic(source) and not path.exists():
            images = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
            if not images:
                raise UserError(f"{source}: no file matches this pattern")
            found += images
        else:
            found.append(source)
    return found


def _files_below(folder: Path, endings: Set[str]) -> list[str]:
    return sorted(str(file) for file in folder.rglob("*") if file.suffix.lower() in endings and file.is_file())


def as_list(images: Any) -> list[Any]:
    """The images as a list: of one image, of a sequence of images, or of a batch [N, ...] in an array or a tensor."""
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, str | Path | Image.Image):
        return [images]
    if isinstance(images, Sequence | Iterator):
        return list(images)
    raise TypeError(
        f"images of type {type(images).__name__}: give paths, PIL images, arrays, tensors, or a list of them"
    )


def open_image(image: Any, number: int, pixel_format: PixelFormat = RGB) -> tuple[str, Picture]:
    """The name and the picture of a path, a url, a PIL image, an array [H, W(, C)] or a tensor [C, H, W].

    The picture is an 8-bit RGB image, made of integers of 8 or 16 bits or of floats in 0..1. For a model of other than
    1 or 3 channels (`pixel_format.channels`) it is an array [H, W, channels] with the values as given. An image without
    a name is called by its `number`. Raises UserError if the image cannot be read.
    """
    if isinstance(image, str | Path):
        name = str(image)
        if _is_url(name):
            return name, read_image(lambda: io.BytesIO(_download(name)), name, pixel_format=pixel_format)
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"image {name}: no such file")
        return name, read_image(lambda: path.open("rb"), name, pixel_format=pixel_format)
    name = f"image {number}"
    with decoding_errors(name):
        if isinstance(image, Image.Image):
            return getattr(image, "filename", "") or name, as_picture(ImageOps.exif_transpose(image), pixel_format)
        if isinstance(image, Tensor):
            image = image.detach().cpu().movedim(0, -1).numpy() if image.ndim == 3 else image.detach().cpu().numpy()
        if pixel_format.channels not in (1, 3):
            return name, as_channels(np.asarray(image), pixel_format.channels)
        return name, _from_array(np.asarray(image), pixel_format.background)


def open_images(
    images: Iterable[Any], first: int, pixel_format: PixelFormat = RGB
) -> list[tuple[str, Picture] | Unreadable]:
    """`open_image` of each; what cannot be read gives an `Unreadable`. Numbers begin at `first`."""
    opened: list[tuple[str, Picture] | Unreadable] = []
    for number, image in enumerate(images, first):
        try:
            opened.append(open_image(image, number, pixel_format))
        except UserError as error:
            source = str(image) if isinstance(image, str | Path) else f"image {number}"
            opened.append(Unreadable(source, str(error)))
    return opened


def _from_array(array: np.ndarray, background: tuple[int, int, int]) -> Image.Image:
    """An RGB image of an array [H, W], [H, W, 1], [H, W, 3] or, with opacity, [H, W, 4]."""
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (1, 3, 4)):
        raise ValueError(f"its shape is {list(array.shape)}; an array is [H, W, 3], a tensor [3, H, W]")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("its floats are not all in 0..1; give the image before normalization")
        array = (array * 255).round().astype(np.uint8)
    array = np.ascontiguousarray(array)
    transparent = array.shape[2:] == (4,) and array.dtype == np.uint8
    return as_rgb(Image.fromarray(array) if transparent else image_of_array(array), background)


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _download(url: str) -> bytes:
    try:
        with urlopen(Request(url, headers={"User-Agent": "tessel"}), timeout=_TIMEOUT) as reply:
            return reply.read()
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"image {url} cannot be downloaded ({error})") from error


def image_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] in 0..1."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255
