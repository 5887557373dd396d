"""Write a small data set of circles and squares in each format in which users keep their own."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ["circle", "square"]
COLORS = [(0, 0, 0), (220, 20, 60), (0, 128, 255)]  # background, circle, square


@dataclass
class Drawing:
    """An image; mask: 0 background, 1 circle, 2 square; objects: (class, polygon [N, 2] in pixels)."""

    name: str
    image: Image.Image
    mask: np.ndarray
    objects: list[tuple[int, np.ndarray]]


def drawings(count: int, *, first: int = 0) -> Iterable[Drawing]:
    """Images of several sizes with none to two objects: number 0 has a circle and a square, number 2 has no object."""
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        width, height = 120 + 8 * (number % 3), 90 + 10 * (number % 2)
        image = Image.fromarray(rng.integers(60, 120, (height, width, 3), dtype=np.uint8))
        mask, objects = Image.new("L", image.size), []
        for label in [[0, 1], [0], [], [1]][number % 4]:
            side = int(rng.integers(25, 40))
            left, top = int(rng.integers(0, 50 - side)) + 60 * label, int(rng.integers(0, height - side))
            turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            circle = (np.stack([np.cos(turn), np.sin(turn)], 1) + 1) / 2
            corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
            polygon = (corners if label else circle) * side + [left, top]
            points = [tuple(point) for point in polygon]
            ImageDraw.Draw(image).polygon(points, fill=(250, 250, 90) if label else (90, 250, 250))
            ImageDraw.Draw(mask).polygon(points, fill=1 + label)
            objects.append((label, polygon))
        yield Drawing(f"photo_{number:03d}", image, np.asarray(mask), objects)


def write_masks(root: Path, count: int = 8, *, images: str = "images", masks: str = "masks", first: int = 0) -> Path:
    """`root/images/*.jpg` beside `root/masks/*.png` with class indices, and classes.txt."""
    for one in drawings(count, first=first):
        save(one.image, root / images / f"{one.name}.jpg")
        save(Image.fromarray(one.mask), root / masks / f"{one.name}.png")
    (root / "classes.txt").write_text("background\ncircle\nsquare\n")
    return root


def write_coco(root: Path, count: int = 8) -> Path:
    """`root/shapes.json` with polygons, and `root/photos/*.jpg`."""
    images, annotations = [], []
    for number, one in enumerate(drawings(count)):
        save(one.image, root / "photos" / f"{one.name}.jpg")
        size = {"width": one.image.width, "height": one.image.height}
        images.append({"id": number, "file_name": f"{one.name}.jpg", **size})
        for label, polygon in one.objects:
            (x, y), (w, h) = polygon.min(0).tolist(), np.ptp(polygon, 0).tolist()
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 3 + 4 * label,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [polygon.ravel().tolist()],
                }
            )
    categories = [{"id": 3 + 4 * label, "name": name} for label, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "shapes.json").write_text(json.dumps(content))
    return root


def write_yolo(root: Path, count: int = 8, *, polygons: bool = True) -> Path:
    """`root/images/*.jpg`, data.yaml, and `root/labels/*.txt` with polygons or boxes for images with objects."""
    for one in drawings(count):
        save(one.image, root / "images" / f"{one.name}.jpg")
        lines = [yolo_line(label, polygon / one.image.size, polygons) for label, polygon in one.objects]
        if lines:
            write(root / "labels" / f"{one.name}.txt", "\n".join(lines))
    write(root / "data.yaml", "train: images\nnames:\n  0: circle\n  1: square\n")
    return root


def yolo_line(label: int, points: np.ndarray, polygon: bool) -> str:
    """A line of a label file. points: [N, 2] as fractions of the image."""
    numbers = points.ravel() if polygon else [*(points.min(0) + points.max(0)) / 2, *np.ptp(points, 0)]
    return f"{label} " + " ".join(f"{number:.6f}" for number in numbers)


def write_voc(root: Path, count: int = 8, *, images: str = "images", annotations: str = "annotations") -> Path:
    """`root/images/*.jpg` and `root/annotations/*.xml`; the image without objects has no XML file."""
    for one in drawings(count):
        save(one.image, root / images / f"{one.name}.jpg")
        found = "".join(voc_object(CLASSES[label], *polygon.min(0), *polygon.max(0)) for label, polygon in one.objects)
        size = f"<size><width>{one.image.width}</width><height>{one.image.height}</height></size>"
        if found:
            write(root / annotations / f"{one.name}.xml", f"<annotation>{size}{found}</annotation>")
    return root


def voc_object(name: str, *box: float) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    return f"<object><name>{name}</name><bndbox>{''.join(f'<{s}>{v}</{s}>' for s, v in sides)}</bndbox></object>"


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
