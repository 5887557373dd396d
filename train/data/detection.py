"""Images with boxes, classes and instance masks.

A sample is (RGB image, target). Target: boxes `[N, 4]` float32 (x1, y1, x2, y2 in pixels), labels `[N]`, iscrowd `[N]`
(1: neither learned nor counted as a miss), area `[N]`, and masks `[N, H, W]` in 0..1 if they are requested.
"""

import copy
import json
import os
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from .annotations import Annotations
from .image_io import RGB, read_file
from .instance_masks import decode_mask, is_polygon

Target = dict[str, np.ndarray]


class DetectionDataset:
    """Annotated image files. All annotations are in a few arrays, so that data loader workers share their memory."""

    pixel_format = RGB

    def __init__(self, annotations: Annotations, *, masks: bool):
        """masks: samples contain instance masks. Raises UserError if there are no images."""
        images = annotations.images
        objects = [found for image in images for found in image.objects]
        self.classes, self.masks, self.source = annotations.classes, masks, annotations.source
        self.names = np.array([found.name.encode() for found in objects], np.bytes_)
        self.boxes = np.array([found.box for found in objects], np.float64).reshape(-1, 4).astype(np.float32)
        self.labels = np.array([found.label for found in objects], np.int64)
        self.crowd = np.array([found.crowd for found in objects], np.int64)
        self.area = np.array([found.area for found in objects], np.float32)
        # objects of image i are starts[i] to starts[i + 1]
        self.starts = np.cumsum([0, *(len(image.objects) for image in images)])
        self.paths: Any = np.array([os.fsencode(image.path) for image in images])
        self.sizes = np.array([(image.height, image.width) for image in images], np.int64).reshape(-1, 2)
        texts = [json.dumps(found.segmentation).encode() if masks else b"" for found in objects]
        self.segmentations = np.frombuffer(b"".join(texts), np.uint8)
        self.cuts = np.cumsum([0, *map(len, texts)])
        self.rows = np.arange(len(images))
        if not len(images):
            raise UserError(f"{self.source} has no images")

    def with_objects(self) -> "DetectionDataset":
        """The images that have an object to learn. Raises UserError if there are none."""
        learned = learnable(self.boxes, self.crowd)
        chosen = copy.copy(self)
        chosen.rows = np.array(
            [row for row in self.rows if learned[self.starts[row] : self.starts[row + 1]].any()], np.int64
        )
        if not len(chosen.rows):
            raise UserError(f"{self.source} has no images with objects; task.detect.empty=true trains on the others")
        return chosen

    @property
    def targets(self) -> np.ndarray:
        """The class of every object, crowds included."""
        return self.labels

    def __len__(self) -> int:
        return len(self.rows)

    def contents(self) -> list[np.ndarray]:
        """What a run records of the samples beside their images; see `fingerprint`."""
        return [self.rows, self.boxes, self.labels, self.crowd, self.segmentations]

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        path, (height, width), part = self.location(index)
        if (self.labels[part] < 0).any():
            raise UserError(
                f"image {path} has an object of a category that the annotation file does not list; add the category"
            )
        image = read_file(path, pixel_format=self.pixel_format, size=(width, height) if height else None)
        target = {
            "boxes": self.boxes[part],
            "labels": self.labels[part],
            "iscrowd": self.crowd[part],
            "area": self.area[part],
        }
        if self.masks:
            found = [self.mask(number, image.height, image.width) for number in range(part.start, part.stop)]
            target["masks"] = np.stack(found) if found else np.zeros((0, image.height, image.width), np.uint8)
        return image, target

    def image_path(self, index: int) -> str:
        return self.location(index)[0]

    def location(self, index: int) -> tuple[str, tuple[int, int], slice]:
        """Path, (height, width) and the range of object indices of an image."""
        row = self.rows[index]
        height, width = map(int, self.sizes[row])
        return os.fsdecode(self.paths[row]), (height, width), slice(int(self.starts[row]), int(self.starts[row + 1]))

    def mask(self, number: int, height: int, width: int) -> np.ndarray:
        try:
            return decode_mask(self.segmentation(number), height, width)
        except ValueError as error:
            raise UserError(f"{self.names[number].decode()} of {self.source} {error}; repair or remove it") from error

    def segmentation(self, number: int) -> Any:
        return json.loads(self.segmentations[self.cuts[number] : self.cuts[number + 1]].tobytes())

    def problems(self, index: int) -> list[str]:
        """One sentence for each fault of an image and its annotations, for `tessel check`."""
        path, (height, width), part = self.location(index)
        try:
            image = read_file(path, pixel_format=self.pixel_format, size=(width, height) if height else None)
        except UserError as error:
            return [str(error)]
        found: list[str] = []
        for number in range(part.start, part.stop):
            box = self.boxes[number]
            name = f"{path}: {self.names[number].decode()}, box {[round(float(x), 2) for x in box]}"
            if self.labels[number] < 0:
                found.append(f"{name} has a category that the annotation file does not list")
            if not (box[2:] > box[:2]).all():
                found.append(f"{name} has no area")
            elif (box[:2] < -1).any() or (box[2:] > np.array(image.size) + 1).any():
                found.append(f"{name} extends beyond the image of {image.width} x {image.height} pixels")
            if self.masks:
                found += (f"{path}: {problem}" for problem in self.mask_problems(number, image))
        return found

    def mask_problems(self, number: int, image: Image.Image) -> list[str]:
        try:
            self.mask(number, image.height, image.width)
        except UserError as error:
            return [str(error)]
        polygons = self.segmentation(number)
        if isinstance(polygons, dict) or all(map(is_polygon, polygons)):
            return []
        return [
            f"{self.names[number].decode()} has a polygon that is not x and y of at least three points; it is skipped"
        ]


def learnable(boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """[N] bool: objects that a detector can learn from, which are not crowds and have a box with an area."""
    return (crowd == 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
