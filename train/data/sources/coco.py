"""What the annotation files of COCO and Pascal VOC say of images and the objects in them."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..annotations import LIMIT, Entries, Entry, Object, are_numbers


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


def _coco_entry(image: dict[str, Any], folder: Path) -> Entry:
    return Entry(str(folder / image["file_name"]), int(image.get("height", 0)), int(image.get("width", 0)))


def _coco_object(name: str, one: dict[str, Any], labels: dict[Any, int]) -> Object:
    x, y, w, h = one["bbox"]
    label, crowd, area = labels.get(one["category_id"], -1), int(one.get("iscrowd", 0)), one.get("area", w * h)
    return Object(name, (x, y, x + w, y + h), label, crowd, area, one.get("segmentation"))
