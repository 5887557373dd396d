"""Pictures of any number of channels as arrays: .npy and .npz files, and TIFF files with more bands than PIL reads."""

from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError

ARRAY_EXTENSIONS = {".npy", ".npz"}
TIFF_EXTENSIONS = {".tif", ".tiff"}


def is_array_file(name: str) -> bool:
    """Whether a file of this name is read by `read_array` for a model of more channels."""
    return PurePath(name).suffix.lower() in ARRAY_EXTENSIONS | TIFF_EXTENSIONS


def read_array(file: Any, name: str) -> np.ndarray:
    """The array in a .npy, .npz or TIFF file: `[H, W]`, `[H, W, C]` or `[C, H, W]`.

    A .npz file must contain one array. Raises UserError without the package tifffile, ValueError for other shapes.
    """
    suffix = PurePath(name).suffix.lower()
    array = _read_tiff(file, name) if suffix in TIFF_EXTENSIONS else np.load(file, allow_pickle=False)
    if isinstance(array, np.lib.npyio.NpzFile):
        if len(array.files) != 1:
            raise ValueError(f"it holds {len(array.files)} arrays ({', '.join(array.files[:5])}); it must hold one")
        array = array[array.files[0]]
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"its array has the shape {list(array.shape)}; it must be [H, W] or [H, W, C]")
    return array


def as_channels(array: np.ndarray, channels: int) -> np.ndarray:
    """The array as `[H, W, channels]`. Raises ValueError if it has other channels or values that are not finite."""
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] != channels and array.shape[0] == channels:
        array = np.moveaxis(array, 0, 2)
    if array.shape[2] != channels:
        raise ValueError(f"it has the shape {list(array.shape)}, but model.in_chans={channels}")
    if array.dtype.kind not in "uif":
        raise ValueError(f"it has values of type {array.dtype}; they must be integers or floating-point numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("it has values that are not finite")
    return array


def viewable(picture: Any) -> Image.Image:
    """A picture to look at: an image as it is; of an array `[H, W, C]` the first three channels, or the first one.

    Each channel is stretched from its lowest to its highest value.
    """
    if isinstance(picture, Image.Image):
        return picture
    shown = picture[..., : 3 if picture.shape[2] >= 3 else 1].astype(np.float64)
    low, high = shown.min((0, 1)), shown.max((0, 1))
    levels = (255 * (shown - low) / np.maximum(high - low, np.finfo(np.float64).tiny)).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(levels, (*levels.shape[:2], 3)).copy())


def _read_tiff(file: Any, name: str) -> np.ndarray:
    try:
        from tifffile import imread
    except ImportError as error:
        raise UserError(
            f"image {name}: a TIFF file of other than 1 or 3 channels needs the package tifffile: pip install tifffile"
        ) from error
    return imread(file)
