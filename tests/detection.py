"""Helpers of the detection tests: small data sets, a small recipe, and a model that returns given predictions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import trainer
from PIL import Image
from torch import nn

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 44, "name": "bottle"}]
RECIPE: dict[str, dict[str, Any]] = {
    "model": {"name": "biformer_atto"},
    "task": {"kind": "detect", "detect": {"channels": 64, "max_size": 120, "min_size": [48, 64]}},
    "data": {"source": "coco", "size": 64, "batch": 4, "micro_batch": 2, "eval_batch": 3},
}


def polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(number: int, image: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    area = box[2] * box[3] * 0.9  # the area of the object, not that of its box
    given = {"bbox": box, "area": area, "iscrowd": 0, "segmentation": polygon(*box)}
    return {"id": number, "image_id": image, "category_id": category, **given, **more}


def draw_coco(root: Path, *, train: int = 8, val: int = 6) -> Path:
    """Write COCO's layout: images of several sizes with two objects each; one has no object, one has only a crowd."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        folder, images, found = root / f"{split}2017", [], []
        folder.mkdir(parents=True)
        for number in range(count):
            width, height = 60 + 8 * (number % 3), 50 + 10 * (number % 2)
            name = f"{number:012d}.jpg"
            Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
            images.append({"id": 100 + number, "file_name": name, "height": height, "width": width})
            if number == 1:
                continue  # an image without objects
            counts = [5 * height, 20 * height, (width - 25) * height]  # columns 5 to 24
            crowd = {"iscrowd": 1, "segmentation": {"counts": counts, "size": [height, width]}, "area": 20.0 * height}
            if number == 2:  # only a crowd
                found.append(annotation(len(found), 100 + number, 1, [5, 0, 20, height], **crowd))
                continue
            x, y = map(float, rng.uniform(1, 12, 2))
            found.append(annotation(len(found), 100 + number, 44, [x, y, 20.5, 30.0]))
            found.append(annotation(len(found), 100 + number, (18, 1)[number % 2], [x + 15, y + 4, 12.0, 9.0]))
            if number == 3:
                found.append(annotation(len(found), 100 + number, 18, [10, 10, 0, 5]))
                found.append(annotation(len(found), 100 + number, 18, [5, 0, 20, height], **crowd))
        file = root / "annotations" / f"instances_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": images[::-1], "annotations": found[::-1], "categories": CATEGORIES}))
    return root


def change(root: Path, split: str, edit: Any) -> None:
    """Apply `edit` to the content of an annotation file."""
    file = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def write_recipe(path: Path, root: Path | None, **sections: Any) -> Path:
    """Write a recipe for a detector on the data set in `root`, or on digit scenes if `root` is None."""
    recipe = {name: {**section} for name, section in RECIPE.items()}
    if root is None:
        recipe["data"] |= {"source": "digit_scenes", "scenes": 8}
    else:
        recipe["data"]["root"] = str(root)
    recipe["data"]["aug"] = {"hflip": 0.5, "color_jitter": 0.2}
    for name, section in sections.items():
        recipe.setdefault(name, {}).update(section)
    return trainer.write_recipe(path, **recipe)


class Oracle(nn.Module):
    """A model that returns the next of the given predictions for each image."""

    def __init__(self, found: list[dict[str, Any]]):
        super().__init__()
        self.found = iter(found)

    def forward(self, images: list[Any]) -> list[dict[str, Any]]:
        return [next(self.found) for _ in images]
