"""What the annotation files of COCO and Pascal VOC say of images and the objects in them."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from torchvision.datasets import VOCDetection

from ..errors import UserError
from ..segment.data import inside

VOC_CLASSES: str = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
)
LIMIT = 2**20  # pixels of a side; what is not finite is beyond it too


class Object(NamedTuple):
    name: str  # by which messages call it
    box: tuple[float, float, float, float]  # x1, y1, x2, y2
    label: int  # -1: of a category that is not listed
    crowd: int
    area: float
    segmentation: Any


@dataclass
class Entry:
    """One image as its annotation file describes it; height and width 0 where that does not say."""

    path: str
    height: int = 0
    width: int = 0
    objects: list[Object] = field(default_factory=list)


@dataclass
class Entries:
    source: str
    classes: list[str]
    images: list[Entry]


def read_coco(file: Path, folder: Path, masks: bool) -> Entries:
    """An annotation file of COCO's instances; classes are its categories by rising id.

    Raises UserError naming the first image or annotation with a value that cannot be, and how many more have one.
    """
    try:
        content = json.loads(file.read_bytes())
        faults = [*_repeated_ids(content), *_image_faults(content["images"])]
        categories, images = (sorted(content[key], key=lambda one: one["id"]) for key in ("categories", "images"))
        labels = {category["id"]: number for number, category in enumerate(categories)}
        classes = [str(category["name"]) for category in categories]
        entries = {} if faults else {image["id"]: _coco_entry(image, folder) for image in images}
        for place, one in enumerate(() if faults else content.get("annotations", ()), 1):
            name = f"annotation {one['id']!r}" if "id" in one else f"annotation number {place}"
            if fault := _annotation_fault(one, entries, masks):
                faults.append(f"{name} {fault}")
            else:
                entries[one["image_id"]].objects.append(_coco_object(name, one, labels))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); data.source=coco needs it below data.root, or "
            "task.detect.train and task.detect.val name other files"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} holds no instances as COCO does ({type(error).__name__}: {error})") from error
    if faults:
        raise UserError(f"{file}: {faults[0]}" + (f" (and {len(faults) - 1} more faults)" if faults[1:] else ""))
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; the images of {file.name} belong there")
    return Entries(str(file), classes, list(entries.values()))


def _repeated_ids(content: dict[str, Any]) -> Iterator[str]:
    for key in ("categories", "images", "annotations"):
        counts = Counter(one["id"] for one in content.get(key, ()) if "id" in one)
        yield from (
            f"{count} {key} have the id {one!r}; each needs its own" for one, count in counts.items() if count > 1
        )


def _image_faults(images: list[dict[str, Any]]) -> Iterator[str]:
    for image in images:
        if not isinstance(image["file_name"], str):
            yield f"image {image['id']!r} has the file_name {image['file_name']!r:.80}, which must be a text"
        for key in ("height", "width"):
            side = image.get(key, 0)
            if not are_numbers([side], 1) or side < 0 or side % 1:
                yield f"image {image['id']!r} has the {key} {side!r:.80}; it must be a whole number, or not be there"


def _annotation_fault(one: dict[str, Any], images: dict[Any, Entry], masks: bool) -> str | None:
    """What is wrong with an annotation of COCO's, if anything. An odd category is not: `check` lists these."""
    for key in ("image_id", "category_id"):
        if not isinstance(one.get(key), int | float | str):
            return f"has the {key} {one.get(key)!r:.80}, which must be a number"
    if one["image_id"] not in images:
        return f"has the image_id {one['image_id']!r:.80}, which is the id of no image"
    if not are_numbers(one.get("bbox"), 4):
        return f"has the bbox {one.get('bbox')!r:.80}, which must be four numbers: x, y, width, height"
    if one.get("iscrowd", 0) not in (0, 1):
        return f"has the iscrowd {one['iscrowd']!r:.80}, which must be 0 or 1"
    if not are_numbers([one.get("area", 0)], 1, LIMIT**2):
        return f"has the area {one['area']!r:.80}, which must be a number"
    if masks and not one.get("segmentation"):
        return "is without segmentation; task.detect.detector=mask_rcnn learns from it"
    return None


def are_numbers(values: Any, count: int, limit: float = LIMIT) -> bool:
    """Whether this is a list of so many numbers of pixels."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and abs(value) < limit for value in values)
    )


def _coco_entry(image: dict[str, Any], folder: Path) -> Entry:
    return Entry(str(folder / image["file_name"]), int(image.get("height", 0)), int(image.get("width", 0)))


def _coco_object(name: str, one: dict[str, Any], labels: dict[Any, int]) -> Object:
    x, y, w, h = one["bbox"]
    label, crowd, area = labels.get(one["category_id"], -1), int(one.get("iscrowd", 0)), one.get("area", w * h)
    return Object(name, (x, y, x + w, y + h), label, crowd, area, one.get("segmentation"))


def read_voc(root: Path, split: str) -> Entries:
    """Pascal VOC 2012 in the folder `root`; objects marked difficult are judged as crowds are."""
    for inner in ("VOCdevkit/VOC2012", "VOC2012"):
        root = inside(root, inner, "JPEGImages")
    classes = [str(name) for name in VOC_CLASSES.split()]
    try:
        names = (root / "ImageSets/Main" / f"{split}.txt").read_text(errors="replace").split()
        entries = [_voc_entry(root, name, classes) for name in names]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); data.source=voc2012 needs it") from error
    return Entries(str(root), classes, entries)


def _voc_entry(root: Path, name: str, classes: list[str]) -> Entry:
    file = root / "Annotations" / f"{name}.xml"
    try:
        content = VOCDetection.parse_voc_xml(ElementTree.parse(file).getroot())["annotation"]
        size = content.get("size", {})
        height, width = (_voc_number(size, key, "0") for key in ("height", "width"))
        if height % 1 or width % 1:
            raise ValueError(f"the size is {width:g} x {height:g}, which must be whole numbers")
        objects = [_voc_object(one, classes) for one in content.get("object", [])]
    except (ValueError, KeyError, TypeError, AttributeError, ElementTree.ParseError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{file} cannot be read as Pascal VOC ({said}); mend it") from error
    return Entry(str(root / "JPEGImages" / f"{name}.jpg"), int(height), int(width), objects)


def _voc_object(one: dict[str, Any], classes: list[str]) -> Object:
    kind, crowd = one["name"], _voc_number(one, "difficult", "0")
    if kind not in classes:
        raise ValueError(f"an object is {kind!r}, which is none of the classes of Pascal VOC")
    if crowd not in (0, 1):
        raise ValueError(f"difficult is {one['difficult']!r}, which must be 0 or 1")
    # pixels count from 1 there, the last one included
    x1, y1 = (_voc_number(one["bndbox"], side) - 1 for side in ("xmin", "ymin"))
    x2, y2 = (_voc_number(one["bndbox"], side) for side in ("xmax", "ymax"))
    return Object(f"a {kind}", (x1, y1, x2, y2), classes.index(kind), int(crowd), (x2 - x1) * (y2 - y1), None)


def _voc_number(part: dict[str, str], key: str, default: str | None = None) -> float:
    text = part[key] if default is None else part.get(key, default)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < LIMIT:
        raise ValueError(f"{key} is {text!r}, which must be a number")
    return value
