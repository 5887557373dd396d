"""Semantic masks drawn from instance masks: the class of each pixel, where annotations are objects."""

import numpy as np
from PIL import Image
from pydantic.dataclasses import dataclass

from ..errors import UserError
from ..recipe.schema import STRICT, PixelFormat, Source
from .class_file import default_palette
from .detection import DetectionDataset
from .segmentation import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ObjectMasks(Source):
    """Keys of a source that draws semantic masks from objects."""

    background_class: str | None = "background"
    """segmentation: name of the class of the pixels without an object; null: they are ignored"""


class SemanticMasks:
    """(RGB image, uint8 mask [H, W]). Smaller objects are drawn over larger ones; crowds count like any object."""

    def __init__(self, objects: DetectionDataset, background: str | None):
        """objects: a data set whose samples have instance masks.

        Raises UserError if it has more classes than a mask can hold.
        """
        self.objects, classes = objects, objects.classes
        # the annotations may have a category for the background, like class 0 of some tools
        self.classes = classes if background is None or background in classes else [background, *classes]
        self.shift = len(self.classes) - len(classes)
        self.empty = IGNORE_INDEX if background is None else self.classes.index(background)
        if not 2 <= len(self.classes) < IGNORE_INDEX:
            raise UserError(
                f"{objects.source} has {len(self.classes)} classes ({', '.join(self.classes[:5])}); a segmentation "
                f"needs 2 to {IGNORE_INDEX - 1}"
            )
        self.palette = [list(color) for color in default_palette(len(self.classes))]

    @property
    def targets(self) -> np.ndarray:
        """The class of every object, and the background."""
        background = [] if self.empty == IGNORE_INDEX else [self.empty]
        return np.concatenate([self.objects.targets + self.shift, np.array(background, np.int64)])

    @property
    def pixel_format(self) -> PixelFormat:
        """How image files are read."""
        return self.objects.pixel_format

    @pixel_format.setter
    def pixel_format(self, value: PixelFormat) -> None:
        self.objects.pixel_format = value

    def __len__(self) -> int:
        return len(self.objects)

    def contents(self) -> list[np.ndarray]:
        """What a run records of the samples beside their images; see `fingerprint`."""
        return self.objects.contents()

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image, target = self.objects[index]
        drawn = np.full(target["masks"].shape[1:], self.empty, np.uint8)
        for number in np.argsort(-target["masks"].sum((1, 2), dtype=np.int64), kind="stable"):
            drawn[target["masks"][number] > 0] = target["labels"][number] + self.shift
        return image, drawn

    def image_path(self, index: int) -> str:
        return self.objects.image_path(index)

    def problems(self, index: int) -> list[str]:
        """One sentence for each fault of an image and its annotations, for `tessel check`."""
        return self.objects.problems(index)
