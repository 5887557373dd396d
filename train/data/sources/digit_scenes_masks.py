"""PLACEHOLDER train/data/sources/digit_scenes_masks.py"""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..digit_scenes import DigitScenes


class Scenes(Dataset[tuple[Image.Image, np.ndarray]]):
    """Scenes of handwritten digits: class 0 is background, class 1 + d the digit d."""

    def __init__(self, split: str, *, length: int, side: int):
        self.scenes = DigitScenes(split, length=length, side=side, heights=HEIGHTS)
        self.classes = ["background", *self.scenes.classes]
        self.palette = [[0, 0, 0], *DIGIT_COLOURS]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        scene = self.scenes[index]
        return scene.image, np.concatenate([[0], 1 + scene.labels])[scene.instances].astype(np.uint8)


HEIGHTS = (0.4, 0.7)  # of a digit, as shares of the scene: strokes of several cells of the finest map


DIGIT_COLOURS = [
    *([230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48]),
    *([145, 30, 180], [70, 240, 240], [240, 50, 230], [210, 245, 60], [170, 110, 40]),
]
