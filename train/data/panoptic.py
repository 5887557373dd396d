"""Images whose pixels belong to segments: objects of thing classes, and stuff.

A sample is (RGB image, target) as in `detection`: each segment is an object with a mask, and masks do not overlap.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..errors import UserError
from .detection import Target
from .image_io import RGB, read_file


class Segment(NamedTuple):
    number: int  # its id, which the colors of the PNG file give
    label: int
    crowd: int


class PanopticImage(NamedTuple):
    path: str
    segments_path: str
    size: tuple[int, int]  # width and height, 0 if unknown
    segments: list[Segment]


class PanopticDataset:
    """Annotated image files. All segments are in a few arrays, so that data loader workers share their memory."""

    pixel_format = RGB

    def __init__(self, source: str, images: Sequence[PanopticImage], classes: list[str], things: list[bool]):
        """things: for each class, whether its segments are objects. Raises UserError if there are no images."""
        if not images:
            raise UserError(f"{source} has no images")
        self.source, self.classes, self.things = source, classes, things
        self.paths: Any = np.array([os.fsencode(image.path) for image in images])
        self.segment_paths: Any = np.array([os.fsencode(image.segments_path) for image in images])
        self.sizes = np.array([image.size for image in images], np.int64)
        rows = [segment for image in images for segment in image.segments]
        self.segments = np.array(rows, np.int64).reshape(-1, 3)
        self.starts = np.cumsum([0, *(len(image.segments) for image in images)])

    @property
    def targets(self) -> np.ndarray:
        """The class of every segment, crowds included."""
        return self.segments[:, 1]

    def __len__(self) -> int:
        return len(self.paths)

    def contents(self) -> list[np.ndarray]:
        """What a run records of the samples beside their images; see `fingerprint`."""
        return [self.segments, self.starts]

    def image_path(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        width, height = map(int, self.sizes[index])
        image = read_file(
            self.image_path(index), pixel_format=self.pixel_format, size=(width, height) if height else None
        )
        numbers = self.numbers(index)
        if numbers.shape != image.size[::-1]:
            sides = "{1} x {0} pixels, its image {2} x {3}".format(*numbers.shape, *image.size)
            raise UserError(f"{os.fsdecode(self.segment_paths[index])} has {sides}; both need the same")
        rows = self.segments[self.starts[index] : self.starts[index + 1]]
        masks = numbers == rows[:, 0, None, None]
        present = masks.any((1, 2))  # a listed segment may have no pixel
        return image, panoptic_target(masks[present], rows[present, 1], rows[present, 2])

    def numbers(self, index: int) -> np.ndarray:
        """The id of the segment of each pixel [H, W]; 0 for unlabelled ones."""
        path = os.fsdecode(self.segment_paths[index])
        colors = np.asarray(read_file(path), np.int64)
        return colors @ np.array([1, 256, 65536])

    def problems(self, index: int) -> list[str]:
        """One sentence for each fault of an image and its segments, for `tessel check`."""
        try:
            self[index]
        except UserError as error:
            return [str(error)]
        rows = self.segments[self.starts[index] : self.starts[index + 1], 0]
        unknown = np.setdiff1d(self.numbers(index), [0, *rows])
        path = os.fsdecode(self.segment_paths[index])
        return [f"{path} has the segment {number}, which {self.source} does not list" for number in unknown.tolist()]


def panoptic_target(masks: np.ndarray, labels: np.ndarray, crowd: np.ndarray) -> Target:
    """The target of masks [N, H, W] that each have a pixel, with the boxes around them."""
    rows: Any = masks.any(2)
    columns: Any = masks.any(1)
    height, width = masks.shape[-2:]
    boxes = [
        columns.argmax(1), rows.argmax(1),
        width - columns[:, ::-1].argmax(1), height - rows[:, ::-1].argmax(1),
    ]  # fmt: skip
    return {
        "boxes": np.stack(boxes, 1).astype(np.float32),
        "labels": labels.astype(np.int64),
        "iscrowd": crowd.astype(np.int64),
        "area": masks.sum((1, 2)).astype(np.float32),
        "masks": masks.astype(np.uint8),
    }
