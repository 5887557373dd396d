"""The runs and the images of the tests of predictions."""

from pathlib import Path

import numpy as np
from PIL import Image

RUNS = Path(__file__).with_name("artefacts") / "5fab7a6"


def picture(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth RGB image of `size` (width, height)."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image
