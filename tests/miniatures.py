"""Miniature data sets in the layouts of ImageNet, ADE20K and COCO, whose images have the sizes of photos."""

import json
from pathlib import Path

import numpy as np
from detection import CATEGORIES, annotation
from PIL import Image

SIZES = [(500, 375), (375, 500), (500, 333), (640, 480), (427, 640), (500, 500), (120, 90), (1024, 683)]
CLASSES = ["n01440764", "n02084071", "n03445777", "n07753592"]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with structure at several scales, as a photo has."""
    rng, pixels = np.random.default_rng(seed), np.zeros((height, width, 3))
    for cells in (3, 12, 48):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 3
    return Image.fromarray(pixels.astype(np.uint8))


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="JPEG", quality=90)


def imagenet(root: Path, *, train: int = 6, val: int = 2) -> Path:
    """Write `root/{train,val}/CLASS/*.JPEG`, so many for each class; one image is gray and one CMYK, as in ImageNet."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                image = photo(*SIZES[(number + label) % len(SIZES)], seed=100 * label + number)
                image = image.convert({(0, 0): "L", (1, 0): "CMYK"}.get((label, number), "RGB"))
                save(root / split / name / f"{name}_{number}.JPEG", image)
    return root


def ade20k(root: Path, *, train: int = 6, val: int = 2) -> Path:
    """Write ADE20K's layout, with four to six classes and unlabeled pixels in each mask, and its panoptic files."""
    for part, short, count in (("training", "train", train), ("validation", "val", val)):
        images, annotations = [], []
        for number in range(count):
            width, height = SIZES[number % len(SIZES)]
            name = f"ADE_{short}_{number:08d}"
            save(root / "images" / part / f"{name}.jpg", photo(width, height, seed=number))
            rng = np.random.default_rng(number)
            blocks = Image.fromarray(rng.choice([0, 1, 2, 3, 40, 150], (4, 6)).astype(np.uint8))
            mask = blocks.resize((width, height), Image.Resampling.NEAREST)
            # a segment for each class, whose id is 257 times the class: equal red and green
            segments = Image.merge("RGB", (mask, mask, Image.new("L", mask.size)))
            for folder, picture in (("annotations/" + part, mask), (f"ade20k_panoptic_{short}", segments)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                picture.save(root / folder / f"{name}.png")
            images.append({"id": name, "file_name": f"{name}.jpg", "height": height, "width": width})
            present = sorted({*np.unique(np.asarray(mask)).tolist()} - {0})
            info = [{"id": 257 * value, "category_id": value - 1, "iscrowd": 0} for value in present]
            annotations.append({"image_id": name, "file_name": f"{name}.png", "segments_info": info})
        categories = [{"id": value, "name": f"class {value}", "isthing": int(value < 100)} for value in range(150)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"ade20k_panoptic_{short}.json").write_text(json.dumps(content))
    return root


def coco(root: Path, *, train: int = 6, val: int = 2) -> Path:
    """Write COCO's layout: large, small and crowded objects; the second image has none."""
    for split, count in (("train", train), ("val", val)):
        images, found = [], []
        for number in range(count):
            width, height = SIZES[number % len(SIZES)]
            name = f"{number:012d}.jpg"
            save(root / f"{split}2017" / name, photo(width, height, seed=number))
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            rng = np.random.default_rng(number)
            for category in () if number == 1 else rng.choice([row["id"] for row in CATEGORIES], 5).tolist():
                w, h = rng.uniform(8, [width / 2, height / 2]).tolist()
                box = [rng.uniform(0, width - w), rng.uniform(0, height - h), w, h]
                found.append(annotation(len(found), number, category, box))
            if number % 3 == 0:
                counts = [5 * height, 20 * height, (width - 25) * height]  # columns 5 to 24
                crowd = {"iscrowd": 1, "segmentation": {"counts": counts, "size": [height, width]}}
                found.append(annotation(len(found), number, 1, [5, 0, 20, height], **crowd))
        file = root / "annotations" / f"instances_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": images, "annotations": found, "categories": CATEGORIES}))
    return root
