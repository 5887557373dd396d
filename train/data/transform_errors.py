"""An exception within a transform, as an error that names the sample and the operation."""

import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserError, one_line


@contextmanager
def transform_errors(dataset: Any, index: int) -> Iterator[None]:
    """Turn any exception of a transform of `dataset[index]` into a UserError."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:  # the operations are those of Pillow, timm, torchvision and of plug-ins
        raise UserError(
            f"{sample_name(dataset, index)} cannot be transformed: {failed_operation(error)} failed "
            f"({one_line(error)}); change or leave out the key of data.aug (or of data) that asks for this operation, "
            "or remove the image"
        ) from error


def sample_name(dataset: Any, index: int) -> str:
    """The sample in words: by its file if the data set has `image_path(index)`, else by its number."""
    path = getattr(dataset, "image_path", None)
    return f"image {path(index)}" if path else f"sample {index}"


def failed_operation(error: BaseException) -> str:
    """The innermost transform that was running, with its settings; else the function that raised."""
    name = "the transform"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_name
    running = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    transforms = [found for found in running if callable(found)]
    return textwrap.shorten(repr(transforms[-1]) if transforms else name, 120, placeholder=" ...")
