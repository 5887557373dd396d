"""`data.source=coco`: annotations in the format of COCO's instances files."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from ...errors import FaultsError, UserError
from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath
from ..annotations import MAX_COORDINATE, NO_SEGMENTATION, AnnotatedImage, AnnotatedObject, Annotations, are_numbers
from ..detection import DetectionDataset
from ..semantic_masks import ObjectMasks, SemanticMasks
from ..split import SplitOptions

Part = tuple[FilePath, FilePath]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class COCO(ObjectMasks, SplitOptions):
    root: FilePath
    """folder of the annotation files and images"""
    train: Part = ("annotations/instances_train2017.json", "train2017")
    """annotation file and image folder of the training split, absolute or below root"""
    val: Part | None = ("annotations/instances_val2017.json", "val2017")
    """annotation file and image folder of the validation split; null: the part data.split of the training split"""


def open_boxes(data: COCO, split: str) -> DetectionDataset:
    """Boxes and classes. Raises UserError if the annotation file is invalid."""
    return _open(data, split, masks=False)


def open_instance_masks(data: COCO, split: str) -> DetectionDataset:
    """Boxes, classes and instance masks. Raises UserError if the annotation file is invalid."""
    return _open(data, split, masks=True)


def open_semantic_masks(data: COCO, split: str) -> SemanticMasks:
    """The class of each pixel, drawn from the instance masks. Raises UserError if the annotation file is invalid."""
    return SemanticMasks(open_instance_masks(data, split), data.background_class)


def _open(data: COCO, split: str, *, masks: bool) -> DetectionDataset:
    annotations, images = data.val if split == "val" and data.val is not None else data.train
    root = Path(data.root)
    found = read_instances(root / annotations, root / images, masks)
    if data.val is None:
        names = [os.path.relpath(image.path, root / images) for image in found.images]
        found = found.part(split, data.split, names)
    return DetectionDataset(found, masks=masks)


def read_instances(file: Path, folder: Path, masks: bool) -> Annotations:
    """The instances in an annotation file; classes are its categories in the order of their ids.

    Raises UserError naming the first invalid image or annotation and the number of further ones.
    """
    try:
        content = json.loads(file.read_bytes())
        faults = [*_repeated_ids(content), *_image_faults(content["images"])]
        categories, images = (sorted(content[key], key=lambda one: one["id"]) for key in ("categories", "images"))
        labels = {category["id"]: number for number, category in enumerate(categories)}
        classes = [str(category["name"]) for category in categories]
        entries = {} if faults else {image["id"]: _image(image, folder) for image in images}
        for place, one in enumerate(() if faults else content.get("annotations", ()), 1):
            name = f"annotation {one['id']!r}" if "id" in one else f"annotation number {place}"
            if fault := _annotation_fault(one, entries, masks):
                faults.append(f"{name} {fault}")
            else:
                entries[one["image_id"]].objects.append(_object(name, one, labels))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); {_other_files(file)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not an instances file of COCO ({type(error).__name__}: {error})") from error
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if faults[1:] else ""
        raise FaultsError(f"{file}: {faults[0]}{more}", [f"{file}: {fault}" for fault in faults])
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; it must hold the images of {file.name}")
    return Annotations(str(file), classes, list(entries.values()))


def _other_files(file: Path) -> str:
    """What to write for an annotation file that is not there."""
    root = next((folder for folder in file.parents if folder.is_dir()), file.parent)
    near = sorted(path for pattern in ("*.json", "*/*.json") for path in root.glob(pattern))[:5]
    found = f" (there is {', '.join(map(str, near))})" if near else ""
    return (
        f"data.train=[FILE.json, FOLDER] and data.val=[FILE.json, FOLDER] name other files{found}; data.val=null holds "
        "out a part of the training images; data.source=yolo and data.source=voc read other formats"
    )


def _repeated_ids(content: dict[str, Any]) -> Iterator[str]:
    for key in ("categories", "images", "annotations"):
        counts = Counter(one["id"] for one in content.get(key, ()) if "id" in one)
        yield from (
            f"{count} {key} have the id {one!r}; each needs its own" for one, count in counts.items() if count > 1
        )


def _image_faults(images: list[dict[str, Any]]) -> Iterator[str]:
    for image in images:
        if not isinstance(image["file_name"], str):
            yield f"image {image['id']!r} has the file_name {image['file_name']!r:.80}, which must be a string"
        for key in ("height", "width"):
            side = image.get(key, 0)
            if not are_numbers([side], 1) or side < 0 or side % 1:
                yield f"image {image['id']!r} has the {key} {side!r:.80}; it must be a whole number or be left out"


def _annotation_fault(one: dict[str, Any], images: dict[Any, AnnotatedImage], masks: bool) -> str | None:
    """What is invalid in an annotation, or None. Unknown categories are valid here; `check` lists them."""
    for key in ("image_id", "category_id"):
        if not isinstance(one.get(key), int | float | str):
            return f"has the {key} {one.get(key)!r:.80}, which must be a number"
    if one["image_id"] not in images:
        return f"has the image_id {one['image_id']!r:.80}, which no image has"
    if not are_numbers(one.get("bbox"), 4):
        return f"has the bbox {one.get('bbox')!r:.80}, which must be four numbers: x, y, width, height"
    if one.get("iscrowd", 0) not in (0, 1):
        return f"has the iscrowd {one['iscrowd']!r:.80}, which must be 0 or 1"
    if not are_numbers([one.get("area", 0)], 1, MAX_COORDINATE**2):
        return f"has the area {one['area']!r:.80}, which must be a number"
    if masks and not one.get("segmentation"):
        return NO_SEGMENTATION
    return None


def _image(image: dict[str, Any], folder: Path) -> AnnotatedImage:
    return AnnotatedImage(str(folder / image["file_name"]), int(image.get("height", 0)), int(image.get("width", 0)))


def _object(name: str, one: dict[str, Any], labels: dict[Any, int]) -> AnnotatedObject:
    x, y, w, h = one["bbox"]
    label, crowd, area = labels.get(one["category_id"], -1), int(one.get("iscrowd", 0)), one.get("area", w * h)
    return AnnotatedObject(name, (x, y, x + w, y + h), label, crowd, area, one.get("segmentation"))


SPEC = SourceSpec(
    name="coco",
    summary="COCO, or own images annotated in its format",
    options=COCO,
    datasets={
        "boxes": open_boxes,
        "instance masks": open_instance_masks,
        "semantic masks": open_semantic_masks,
    },
)
