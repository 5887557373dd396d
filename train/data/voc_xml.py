"""Annotation files of Pascal VOC: an XML file per image."""

from pathlib import Path
from xml.etree import ElementTree

from ..errors import UserError
from .annotations import MAX_COORDINATE, AnnotatedImage, AnnotatedObject


def read_voc_image(file: Path, image: Path, classes: list[str], *, offset: int) -> AnnotatedImage:
    """The objects of an annotation file; those marked difficult count as crowds, as in the evaluation of VOC.

    offset: of the first pixel's column and row. Raises UserError naming a file that is missing or is not in the format
    of VOC.
    """
    try:
        content = _parse(file)
        size = content.get("size") or {}
        height, width = (_number(size, key, "0") for key in ("height", "width"))
        if height % 1 or width % 1:
            raise ValueError(f"the size is {width:g} x {height:g}, but must be whole numbers")
        objects = [_read_object(one, classes, offset) for one in content.get("object", [])]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, ElementTree.ParseError) as error:
        raise _invalid(file, error) from error
    return AnnotatedImage(str(image), int(height), int(width), objects)


def object_names(file: Path) -> list[str]:
    """The names of the objects in an annotation file. Raises UserError like `read_voc_image`."""
    try:
        return [str(one["name"]) for one in _parse(file).get("object", [])]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, ElementTree.ParseError) as error:
        raise _invalid(file, error) from error


def _parse(file: Path) -> dict:
    from torchvision.datasets import VOCDetection

    return VOCDetection.parse_voc_xml(ElementTree.parse(file).getroot())["annotation"] or {}


def _invalid(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is not a valid Pascal VOC annotation ({type(error).__name__}: {error}); repair it")


def _read_object(one: dict, classes: list[str], offset: int) -> AnnotatedObject:
    kind, difficult = one["name"], _number(one, "difficult", "0")
    if kind not in classes:
        known = ", ".join(classes[:20]) + ", ..." * (len(classes) > 20)
        raise ValueError(f"the object name {kind!r} is not one of the classes {known}")
    if difficult not in (0, 1):
        raise ValueError(f"difficult is {one['difficult']!r}, but must be 0 or 1")
    # with an offset of 1, VOC's own, the last pixel is included: its right edge is its number
    x1, y1 = (_number(one["bndbox"], side) - offset for side in ("xmin", "ymin"))
    x2, y2 = (_number(one["bndbox"], side) for side in ("xmax", "ymax"))
    area = (x2 - x1) * (y2 - y1)
    return AnnotatedObject(f"a {kind}", (x1, y1, x2, y2), classes.index(kind), int(difficult), area, None)


def _number(part: dict[str, str], key: str, default: str | None = None) -> float:
    text = part[key] if default is None else part.get(key, default)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < MAX_COORDINATE:
        raise ValueError(f"{key} is {text!r}, but must be a number")
    return value
