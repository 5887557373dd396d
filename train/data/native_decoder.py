"""Decoding JPEG files by torchcodec instead of Pillow, for `data.decoder=torchcodec`."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import ExifTags
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..errors import UserError, one_line
from .external import require_package
from .image_io import decoding_errors, open_image, read_image


def require_decoder() -> None:
    """Raises UserError if torchcodec is not installed, or not the version made for the installed torch."""
    setting = "data.decoder=torchcodec"
    require_package(setting, "torchcodec", "torchcodec")
    try:
        from torchcodec.decoders import decode_jpeg as decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"{setting}: the installed torchcodec cannot be loaded ({one_line(error)}); install a version made for "
            f"torch {torch.__version__}, or use data.decoder=pil"
        ) from error


def read_pixels(open_file: Callable[[], Any], name: str, **options: Any) -> Tensor:
    """The pixels of `image_io.read_image`, which takes `options`, as uint8 [3, H, W] with channels last in memory.

    torchcodec decodes RGB and gray JPEG files. Pillow decodes all others, and files with an EXIF orientation, which
    torchcodec would apply always. Both give the same values. Raises UserError with `name` if the file is damaged.
    """
    from torchcodec.decoders import decode_jpeg

    with decoding_errors(f"image {name}"), open_file() as file:
        content = file.read()
        with open_image(io.BytesIO(content)) as image:
            upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            native = image.format == "JPEG" and image.mode in ("RGB", "L") and upright
        if native:
            return decode_jpeg(content)  # type: ignore[return-value]
    return pil_to_tensor(read_image(partial(io.BytesIO, content), name, **options))
