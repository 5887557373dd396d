"""Scenes for segmentation and detection that need no download: real handwritten digits on textured canvases.

A scene holds a few digits that may cover one another in part, among clutter that belongs to no class. It is drawn anew
from (split, index) whenever it is asked for, so a data set costs nothing to keep and is the same on every machine.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .sources.digits import Digits, digits

INK = 0.4  # what of a digit's ink counts as digit


HIDDEN = 0.2  # the largest share of a digit that later ones may cover


HELD_OUT = 200  # most scenes to judge by


@dataclass(frozen=True)
class Scene:
    """`image`: RGB; `instances [H, W]`: 0 for background, else 1 + the index of the digit seen there; `labels [N]`."""

    image: Image.Image
    instances: np.ndarray
    labels: np.ndarray


class DigitScenes:
    """`length` scenes of `side` pixels; those to train on and those to judge by are made of different digits."""

    def __init__(self, split: str, *, length: int, side: int = 96, heights: tuple[float, float] = (0.25, 0.5)):
        """heights: of the smallest and the largest digit, as shares of the side."""
        self.digits, self.split, self.length, self.side = digits(split), split, length, side
        self.heights = int(heights[0] * side), int(heights[1] * side)
        self.classes = self.digits.classes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        rng = np.random.default_rng([("train", "val").index(self.split), index])
        return draw(rng, self.digits, self.side, self.heights)


def split_length(split: str, scenes: int) -> int:
    """The number of scenes of a split, of which `scenes` are to train on."""
    return scenes if split == "train" else min(HELD_OUT, -(-scenes // 5))


def draw(rng: np.random.Generator, ink: Digits, side: int, heights: tuple[int, int]) -> Scene:
    """One scene of two or three digits between `heights` pixels high among two to four pieces of clutter."""
    canvas = texture(rng, side)
    for _ in range(rng.integers(2, 5)):
        scratch(rng, canvas)
    instances, labels = np.zeros((side, side), np.int32), []
    for _ in range(rng.integers(2, 4)):
        chosen = int(rng.integers(len(ink)))
        height = int(rng.integers(heights[0], heights[1] + 1))
        top, left = rng.integers(0, side - height + 1, 2)
        part = np.s_[top : top + height, left : left + height]
        alpha = np.asarray(ink[chosen][0].convert("L").resize((height, height), Image.Resampling.BILINEAR)) / 255
        seen = instances.copy()
        seen[part][alpha > INK] = len(labels) + 1
        if covered(instances, seen):
            continue
        instances, colour = seen, rng.uniform(0.55, 1.0, 3)
        canvas[part] += alpha[..., None] * (colour - canvas[part])
        labels.append(ink.targets[chosen])
    image = Image.fromarray((255 * canvas.clip(0, 1)).round().astype(np.uint8))
    return Scene(image, instances, np.array(labels, np.int64))


def covered(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether a digit of `before` loses more than its share of pixels in `after`."""
    was = np.bincount(before.ravel())
    left = np.bincount(after.ravel(), minlength=len(was))[: len(was)]
    return bool((left[1:] < (1 - HIDDEN) * was[1:]).any())


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """A dark canvas `[side, side, 3]` in 0..0.5: three waves in each channel, and noise."""
    place = np.arange(side) / side
    fx, fy, phase = rng.uniform(-6, 6, (3, 3)), rng.uniform(-6, 6, (3, 3)), rng.uniform(0, 2 * np.pi, (3, 3))
    # sin(a + b) as the imaginary part of a product, which costs two rows of exponentials instead of a plane of sines
    across = np.exp(1j * (2 * np.pi * np.multiply.outer(place, fx) + phase))
    down = np.exp(2j * np.pi * np.multiply.outer(place, fy))
    waves = np.einsum("yck,xck->yxc", down, across).imag / 3
    return (0.25 + 0.2 * waves + rng.normal(0, 0.04, (side, side, 3))).clip(0, 0.5)


def scratch(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Draw a straight stroke as bright as a digit's, which is none."""
    side = len(canvas)
    y, x = np.mgrid[:side, :side]
    (y0, x0), angle = rng.uniform(0, side, 2), rng.uniform(0, np.pi)
    along = (x - x0) * np.cos(angle) + (y - y0) * np.sin(angle)
    across = (y - y0) * np.cos(angle) - (x - x0) * np.sin(angle)
    stroke = (np.abs(along) < rng.uniform(side / 16, side / 6)) & (np.abs(across) < rng.uniform(0.5, side / 40))
    canvas[stroke] = rng.uniform(0.55, 1.0, 3)
