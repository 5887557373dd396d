"""Images with boxes, classes and masks: COCO, Pascal VOC, and digit scenes.

A sample is (image, target). Target: boxes `[N, 4]` float32 (x1, y1, x2, y2 in pixels), labels `[N]`, iscrowd `[N]`
(1: not to be learned, and no mistake to miss), area `[N]`, and masks `[N, H, W]` in 0..1 where they are asked for.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.datasets import VOCDetection

from ..data import as_rgb, decoding
from ..demo_scenes import DigitScenes, split_length
from ..errors import UserError
from ..schema import Recipe

VOC_CLASSES: str = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
)
Target = dict[str, np.ndarray]


def build_dataset(recipe: Recipe, split: str) -> Any:
    """The "train" or "val" split with `classes: list[str]`. Raises UserError naming what is missing or unreadable.

    Images without objects to learn are left out of "train" unless `task.detect.empty` is on; "val" has all images.
    """
    data, detect = recipe.data, recipe.task.detect
    masks, all_images = detect.detector == "mask_rcnn", split == "val" or detect.empty
    if data.source == "digit_scenes":
        try:
            return Scenes(DigitScenes(split, length=split_length(split, data.scenes), side=data.size), masks=masks)
        except ImportError as error:
            raise UserError(str(error)) from error
    root = Path(str(data.root))
    if data.source == "voc2012":
        return Annotated(read_voc(root, split), masks=False, all_images=all_images)
    annotations, images = detect.train if split == "train" else detect.val
    return Annotated(read_coco(root / annotations, root / images, masks), masks=masks, all_images=all_images)


@dataclass
class Entry:
    """One image as its annotation file describes it; height and width 0 where that does not say."""

    path: str
    height: int = 0
    width: int = 0
    objects: list[tuple[Any, ...]] = field(default_factory=list)  # x1, y1, x2, y2, label, iscrowd, area, segmentation


@dataclass
class Entries:
    source: str
    classes: list[str]
    images: list[Entry]


class Annotated(Dataset[tuple[Image.Image, Target]]):
    """Annotated image files. All annotations lie in a few arrays, so that loader processes share their memory."""

    def __init__(self, entries: Entries, *, masks: bool, all_images: bool):
        """masks: hand out masks too; all_images: also those without an object to learn."""
        self.classes, self.masks, images = entries.classes, masks, entries.images
        objects = [found for image in images for found in image.objects]
        table = np.array([found[:7] for found in objects], np.float64).reshape(-1, 7)
        self.boxes, self.labels = table[:, :4].astype(np.float32), table[:, 4].astype(np.int64)
        self.crowd, self.area = table[:, 5].astype(np.int64), table[:, 6].astype(np.float32)
        self.starts = np.cumsum([0, *(len(image.objects) for image in images)])
        self.paths: Any = np.array([image.path.encode() for image in images])
        self.sizes = np.array([(image.height, image.width) for image in images], np.int64).reshape(-1, 2)
        texts = [json.dumps(found[7]).encode() if masks else b"" for found in objects]
        self.segmentations = np.frombuffer(b"".join(texts), np.uint8)
        self.cuts = np.cumsum([0, *map(len, texts)])
        learned = np.add.reduceat(np.append(learnable(self.boxes, self.crowd), 0), self.starts[:-1]) if images else []
        empty = np.diff(self.starts) == 0
        self.rows = np.flatnonzero(all_images | ((np.asarray(learned) > 0) & ~empty))
        if not len(self.rows):
            raise UserError(f"{entries.source} has no images{'' if all_images else ' with objects'} to take")

    @property
    def targets(self) -> np.ndarray:
        """The class of every object, crowds included."""
        return self.labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        path, (height, width), part = self.place(index)
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

    def place(self, index: int) -> tuple[str, tuple[int, int], slice]:
        """Path, height and width of an image, and where its objects stand in the arrays."""
        row = self.rows[index]
        height, width = map(int, self.sizes[row])
        return self.paths[row].decode(), (height, width), slice(int(self.starts[row]), int(self.starts[row + 1]))

    def mask(self, number: int, height: int, width: int) -> np.ndarray:
        from faster_coco_eval.core import mask as coder

        segmentation = json.loads(self.segmentations[self.cuts[number] : self.cuts[number + 1]].tobytes())
        try:
            if isinstance(segmentation, list):
                coded = coder.merge(cast(Any, coder.frPyObjects(segmentation, height, width)))
            elif isinstance(segmentation["counts"], list):
                coded = coder.frPyObjects(segmentation, *segmentation["size"])
            else:
                coded = segmentation
            decoded = coder.decode(coded)
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise UserError(f"object {number} has a segmentation that is neither polygons nor RLE ({error})") from error
        if decoded.shape != (height, width):
            raise UserError(f"object {number} has a mask of {decoded.shape}, its image is {(height, width)}")
        return decoded

    def problems(self, index: int) -> list[str]:
        """What is wrong with one image and its annotations, in words; for `tessel.train.check`."""
        path, (height, width), part = self.place(index)
        try:
            image = read_image(path, height, width)
        except UserError as error:
            return [str(error)]
        found, (boxes, labels) = [], (self.boxes[part], self.labels[part])
        for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            name = f"{path}: object {number}, box {[round(float(x), 2) for x in box]}"
            if label < 0:
                found.append(f"{name} is of a category that the annotations do not list")
            if (box[2:] <= box[:2]).any():
                found.append(f"{name} has no area")
            elif (box[:2] < -1).any() or (box[2:] > np.array(image.size) + 1).any():
                found.append(f"{name} reaches out of the image of {image.width} x {image.height}")
            if self.masks:
                try:
                    self.mask(part.start + number, image.height, image.width)
                except UserError as error:
                    found.append(f"{path}: {error}")
        return found


class Scenes(Dataset[tuple[Image.Image, Target]]):
    """Digit scenes with the boxes of what is seen of each digit."""

    def __init__(self, scenes: DigitScenes, *, masks: bool):
        self.scenes, self.masks, self.classes = scenes, masks, scenes.classes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        scene = self.scenes[index]
        masks = (scene.instances == np.arange(1, len(scene.labels) + 1)[:, None, None]).astype(np.uint8)
        boxes = [(*np.argwhere(mask).min(0)[::-1], *np.argwhere(mask).max(0)[::-1] + 1) for mask in masks]
        target = {
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "labels": scene.labels,
            "iscrowd": np.zeros_like(scene.labels),
            "area": masks.sum((1, 2)).astype(np.float32),
        }
        return scene.image, target | ({"masks": masks} if self.masks else {})


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


def read_coco(file: Path, folder: Path, masks: bool) -> Entries:
    """An annotation file of COCO's instances; classes are its categories by rising id."""
    try:
        content = json.loads(file.read_bytes())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        labels = {category["id"]: number for number, category in enumerate(categories)}
        images = {
            image["id"]: Entry(str(folder / image["file_name"]), image.get("height", 0), image.get("width", 0))
            for image in sorted(content["images"], key=lambda image: image["id"])
        }
        for one in content.get("annotations", ()):
            x, y, w, h = one["bbox"]
            numbers = labels.get(one["category_id"], -1), one.get("iscrowd", 0), one.get("area", w * h)
            images[one["image_id"]].objects.append((x, y, x + w, y + h, *numbers, one.get("segmentation")))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); data.source=coco needs it below data.root, or "
            "task.detect.train and task.detect.val name other files"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} holds no instances as COCO does ({type(error).__name__}: {error})") from error
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; the images of {file.name} belong there")
    missing = next((one for image in images.values() for one in image.objects if masks and not one[7]), None)
    if missing:
        raise UserError(f"{file} has objects without segmentation; task.detect.detector=mask_rcnn learns from them")
    return Entries(str(file), [category["name"] for category in categories], list(images.values()))


def read_voc(root: Path, split: str) -> Entries:
    """Pascal VOC 2012 in the folder `root`; objects marked difficult are judged as crowds are."""
    classes = [str(name) for name in VOC_CLASSES.split()]
    entries = []
    try:
        for name in (root / "ImageSets/Main" / f"{split}.txt").read_text().split():
            annotation = str(root / "Annotations" / f"{name}.xml")
            content = VOCDetection.parse_voc_xml(ElementTree.parse(annotation).getroot())["annotation"]
            size, found = content.get("size", {}), content.get("object", [])
            objects = [_voc_object(one, classes, annotation) for one in found]
            path = str(root / "JPEGImages" / f"{name}.jpg")
            entries.append(Entry(path, int(size.get("height", 0)), int(size.get("width", 0)), objects))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); data.source=voc2012 needs it") from error
    except (ValueError, KeyError, TypeError, ElementTree.ParseError) as error:
        raise UserError(f"{root} cannot be read as Pascal VOC ({type(error).__name__}: {error})") from error
    return Entries(str(root), classes, entries)


def _voc_object(one: dict[str, Any], classes: Sequence[str], annotation: str) -> tuple[Any, ...]:
    if one["name"] not in classes:
        raise UserError(f"{annotation} names {one['name']!r}, which is none of the classes of Pascal VOC")
    # pixels count from 1 there, the last one included
    x1, y1, x2, y2 = (float(one["bndbox"][side]) - (side[1:] == "min") for side in ("xmin", "ymin", "xmax", "ymax"))
    crowd = int(one.get("difficult", 0))
    return x1, y1, x2, y2, list(classes).index(one["name"]), crowd, (x2 - x1) * (y2 - y1), None
