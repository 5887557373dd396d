"""Write small segmentation data sets in the layouts of the published ones."""

from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def picture(path: Path, height: int, width: int, *, turn: int = 1, seed: int = 0) -> np.ndarray:
    """Write a smooth image with the EXIF orientation `turn`. Returns its pixels as stored, before any rotation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = np.linspace(0, 255, height * width * 3).reshape(height, width, 3) / 2 + rng.uniform(0, 120, 3)
    image = Image.fromarray(pixels.round().astype(np.uint8))
    exif = Image.Exif()
    if turn != 1:
        exif[ORIENTATION] = turn
    image.save(path, exif=exif)
    with Image.open(path) as stored:
        return np.asarray(stored.convert("RGB"))


def mask(path: Path, values: np.ndarray, *, palette: bool = False) -> None:
    """Write class indices with the 8 or 16 bits of the dtype of `values`, or with 8 bits and a color palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        image = image.convert("P")
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
        image.frombytes(values.tobytes())
    image.save(path)


def ade20k(root: Path, *, train: int = 4, val: int = 2, height: int = 40, width: int = 48) -> Path:
    """Write `root/ADEChallengeData2016`: the right half is class 1, the left half class 0, the first row is ignored."""
    root = root / "ADEChallengeData2016"
    for part, short, count in (("training", "train", train), ("validation", "val", val)):
        for number in range(count):
            name = f"ADE_{short}_{number:08d}"
            picture(root / "images" / part / f"{name}.jpg", height, width + number, seed=number)
            values = np.ones((height, width + number), np.uint8)
            values[:, width // 2 :] = 2
            values[0] = 0
            mask(root / "annotations" / part / f"{name}.png", values)
    return root


def cityscapes(root: Path) -> Path:
    for split in ("train", "val"):
        for city in ("aachen", "bonn"):
            stem = f"{city}_000000_000019"
            picture(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", 20, 40)
            values = np.full((20, 40), 7, np.uint8)  # road
            values[:5], values[5:8], values[8], values[9] = 23, 33, 0, 255  # sky, bicycle, unlabeled, license plate
            mask(root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", values)
            mask(root / "gtFine" / split / city / f"{stem}_gtFine_color.png", values)
    return root


def voc2012(root: Path) -> Path:
    """Write `root/VOCdevkit/VOC2012`."""
    inner = root / "VOCdevkit" / "VOC2012"
    names = {
        "train": ["2007_000032"],
        "val": ["2007_000033", "2007_000042"],
        "trainaug": ["2007_000032", "2008_000008"],
    }
    for name in sorted({name for listed in names.values() for name in listed}):
        picture(inner / "JPEGImages" / f"{name}.jpg", 30, 26)
        values = np.zeros((30, 26), np.uint8)
        values[4:20, 4:20], values[4:20, 4] = 15, 255  # a person and its border
        mask(inner / "SegmentationClass" / f"{name}.png", values, palette=True)
        mask(inner / "SegmentationClassAug" / f"{name}.png", values)
    for name, listed in names.items():
        path = inner / "ImageSets" / "Segmentation" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{entry}\n" for entry in listed))
    return root
