"""Image files with a class each, or with a set of labels each.

The paths are one array, so that data loader workers share its memory.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .image_io import RGB, open_regular, read_image


class ImageFiles:
    """Pictures of a list of files; a subclass adds what is known of them."""

    pixel_format = RGB
    decode: Any = staticmethod(read_image)

    def __init__(self, paths: Sequence[str]):
        self.paths = np.array([path.encode("utf-8", "surrogateescape") for path in paths])

    def __len__(self) -> int:
        return len(self.paths)

    def image_path(self, index: int) -> str:
        return self.paths[index].decode("utf-8", "surrogateescape")

    def picture(self, index: int) -> Any:
        """The picture of a sample. Raises UserError if its file cannot be read."""
        path = self.image_path(index)
        return self.decode(partial(open_regular, path), path, pixel_format=self.pixel_format)


class LabeledFiles(ImageFiles):
    """(RGB image, class index)."""

    def __init__(self, paths: Sequence[str], targets: Sequence[int] | np.ndarray, classes: list[str]):
        super().__init__(paths)
        self.targets, self.classes = np.asarray(targets, np.int64), classes

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.picture(index), int(self.targets[index])


class LabelSetFiles(ImageFiles):
    """(RGB image, float32 [classes]): 1 for each label of the picture, else 0."""

    def __init__(self, paths: Sequence[str], label_sets: np.ndarray, classes: list[str]):
        """label_sets: bool [N, classes]"""
        super().__init__(paths)
        self.label_sets, self.classes = label_sets, classes

    @property
    def targets(self) -> np.ndarray:
        """The class of every label of every picture."""
        return np.nonzero(self.label_sets)[1]

    def contents(self) -> list[np.ndarray]:
        """What a run records of the samples beside their files; see `fingerprint`."""
        return [self.label_sets]

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray]:
        return self.picture(index), self.label_sets[index].astype(np.float32)
