"""PLACEHOLDER train/data/sources/digit_scenes_boxes.py"""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..detection import Target
from ..digit_scenes import DigitScenes


class Scenes(Dataset[tuple[Image.Image, Target]]):
    """Digit scenes with the boxes of what is seen of each digit."""

    def __init__(self, scenes: DigitScenes, *, masks: bool):
        self.scenes, self.masks, self.classes = scenes, masks, scenes.classes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        scene = self.scenes[index]
        masks = (scene.instances == np.arange(1, len(scene.labels) + 1)[:, None, None]).astype(np.uint8)
        boxes = [(*np.argwhere(mask).min(0)[::-1], *np.argwhere(mask).max(0)[::-1] + 1) for mask in masks]
        target = {
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "labels": scene.labels,
            "iscrowd": np.zeros_like(scene.labels),
            "area": masks.sum((1, 2)).astype(np.float32),
        }
        return scene.image, target | ({"masks": masks} if self.masks else {})
