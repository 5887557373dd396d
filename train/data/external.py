"""PLACEHOLDER train/data/external.py"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ..errors import UserError
from ..recipe.schema import Data
from .image_io import decoded
from .sources.archives import ArchiveDataset, open_tar, open_wds
from .sources.hfds import open_hfds
from .sources.tfds import open_tfds

REFUSALS = (ImportError, OSError, ValueError, KeyError, RuntimeError, AssertionError, NotImplementedError)


PACKAGES = {"hfds": ("datasets", "datasets"), "tfds": ("tensorflow_datasets", "tensorflow-datasets")}


class ExternalDataset(Dataset[tuple[Image.Image, int]]):
    """Samples that another library fetches: `fetch(index)` gives a binary file of the image, and the class."""

    def __init__(self, fetch: Callable[[int], tuple[Any, Any]], length: int, classes: list[str], name: str):
        self.fetch, self.length, self.classes, self.name = fetch, length, classes, name

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        target = -1

        def read() -> Any:
            nonlocal target
            file, label = self.fetch(index)
            target = int(label)
            return file

        return decoded(read, f"{index} of {self.name}"), target


def open_reader(data: Data, split: str) -> ArchiveDataset | ExternalDataset:
    """The split of `data.source`, one of tar, wds, hfds, tfds. Raises UserError, also for a package that is missing."""
    package, distribution = PACKAGES.get(data.source, (None, None))
    if package and find_spec(package) is None:
        raise UserError(f"data.source={data.source} needs the package {package}: pip install {distribution}")
    return {"tar": open_tar, "wds": open_wds, "hfds": open_hfds, "tfds": open_tfds}[data.source](data, split)
