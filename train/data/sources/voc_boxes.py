"""PLACEHOLDER train/data/sources/voc_boxes.py"""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from torchvision.datasets import VOCDetection

from ...errors import UserError
from ..annotations import LIMIT, Entries, Entry, Object
from ..layout import inside

VOC_CLASSES: str = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
)


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
