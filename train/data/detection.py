"""Images with boxes, classes and masks: COCO, Pascal VOC, and digit scenes.

A sample is (image, target). Target: boxes `[N, 4]` float32 (x1, y1, x2, y2 in pixels), labels `[N]`, iscrowd `[N]`
(1: not to be learned, and no mistake to miss), area `[N]`, and masks `[N, H, W]` in 0..1 where they are asked for.
"""

import copy
import json
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ..errors import UserError
from .annotations import Entries
from .image_io import as_rgb, decoding
from .instance_masks import decoded, is_polygon

Target = dict[str, np.ndarray]


class DetectionDataset(Dataset[tuple[Image.Image, Target]]):
    """Annotated image files. All annotations lie in a few arrays, so that loader processes share their memory."""

    def __init__(self, entries: Entries, *, masks: bool, all_images: bool):
        """masks: hand out masks too; all_images: also those without an object to learn."""
        self.classes, self.masks, images = entries.classes, masks, entries.images
        objects = [found for image in images for found in image.objects]
        self.source, self.names = entries.source, np.array([found.name.encode() for found in objects], np.bytes_)
        self.boxes = np.array([found.box for found in objects], np.float64).reshape(-1, 4).astype(np.float32)
        self.labels = np.array([found.label for found in objects], np.int64)
        self.crowd = np.array([found.crowd for found in objects], np.int64)
        self.area = np.array([found.area for found in objects], np.float32)
        self.starts = np.cumsum([0, *(len(image.objects) for image in images)])
        self.paths: Any = np.array([image.path.encode() for image in images])
        self.sizes = np.array([(image.height, image.width) for image in images], np.int64).reshape(-1, 2)
        texts = [json.dumps(found.segmentation).encode() if masks else b"" for found in objects]
        self.segmentations = np.frombuffer(b"".join(texts), np.uint8)
        self.cuts = np.cumsum([0, *map(len, texts)])
        learned = np.add.reduceat(np.append(learnable(self.boxes, self.crowd), 0), self.starts[:-1]) if images else []
        empty = np.diff(self.starts) == 0
        self.rows = np.flatnonzero(all_images | ((np.asarray(learned) > 0) & ~empty))
        if not len(self.rows):
            raise UserError(f"{entries.source} has no images{'' if all_images else ' with objects'} to take")

    def whole(self) -> "DetectionDataset":
        """The same with all images, also those that are not trained on."""
        everything = copy.copy(self)
        everything.rows = np.arange(len(self.paths))
        return everything

    @property
    def targets(self) -> np.ndarray:
        """The class of every object, crowds included."""
        return self.labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        path, (height, width), part = self.location(index)
        if (self.labels[part] < 0).any():
            raise UserError(f"image {path} has an object of a category that its annotations do not list; add it there")
        image = read_image(path, height, width)
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

    def location(self, index: int) -> tuple[str, tuple[int, int], slice]:
        """Path, height and width of an image, and where its objects stand in the arrays."""
        row = self.rows[index]
        height, width = map(int, self.sizes[row])
        return self.paths[row].decode(), (height, width), slice(int(self.starts[row]), int(self.starts[row + 1]))

    def mask(self, number: int, height: int, width: int) -> np.ndarray:
        try:
            return decoded(self.segmentation(number), height, width)
        except ValueError as error:
            raise UserError(f"{self.names[number].decode()} of {self.source} {error}; mend or remove it") from error

    def segmentation(self, number: int) -> Any:
        return json.loads(self.segmentations[self.cuts[number] : self.cuts[number + 1]].tobytes())

    def problems(self, index: int) -> list[str]:
        """What is wrong with one image and its annotations, in words; for `tessel.train.check`."""
        path, (height, width), part = self.location(index)
        try:
            image = read_image(path, height, width)
        except UserError as error:
            return [str(error)]
        found: list[str] = []
        for number in range(part.start, part.stop):
            box = self.boxes[number]
            name = f"{path}: {self.names[number].decode()}, box {[round(float(x), 2) for x in box]}"
            if self.labels[number] < 0:
                found.append(f"{name} is of a category that the annotations do not list")
            if not (box[2:] > box[:2]).all():
                found.append(f"{name} has no area")
            elif (box[:2] < -1).any() or (box[2:] > np.array(image.size) + 1).any():
                found.append(f"{name} reaches out of the image of {image.width} x {image.height}")
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
            f"{self.names[number].decode()} has a polygon that is not x and y of three points or more; it is left out"
        ]


def learnable(boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """[N]: which objects a detector can learn: single ones whose box has an area."""
    return (crowd == 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)


def read_image(path: str, height: int, width: int) -> Image.Image:
    """The image as RGB, turned as its EXIF says unless the annotated height and width fit only the unturned one.

    Raises UserError naming the file where it cannot be decoded or has another size.
    """
    with decoding(f"image {path}"), Image.open(path) as stored:
        upright = ImageOps.exif_transpose(stored)
        fits = not height or upright.size == (width, height)
        image = as_rgb(upright if fits else stored)
    if height and image.size != (width, height):
        raise UserError(f"image {path} is {image.width} x {image.height}, its annotations are for {width} x {height}")
    return image
