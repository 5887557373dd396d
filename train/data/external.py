"""Samples that another library reads."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from PIL import Image

from ..errors import UserError
from .image_io import RGB, read_image

# what timm's reader and the data set libraries raise for data they cannot read
READER_ERRORS = (ImportError, OSError, ValueError, KeyError, RuntimeError, AssertionError, NotImplementedError)


class ExternalDataset:
    """(image, class index) samples; `fetch(index)` returns a binary file of the image, and the class index."""

    pixel_format = RGB
    decode: Any = staticmethod(read_image)

    def __init__(self, fetch: Callable[[int], tuple[Any, Any]], length: int, classes: list[str], name: str):
        self.fetch, self.length, self.classes, self.name = fetch, length, classes, name

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        target = -1

        def open_file() -> Any:
            nonlocal target
            file, label = self.fetch(index)
            target = int(label)
            return file

        return self.decode(open_file, f"{index} of {self.name}", pixel_format=self.pixel_format), target


def require_package(setting: str, package: str, distribution: str) -> None:
    """Raises UserError if the package that a setting of the recipe needs is not installed."""
    if find_spec(package) is None:
        raise UserError(f"{setting} needs the package {package}: pip install {distribution}")
