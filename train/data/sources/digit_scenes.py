"""`data.source=digit_scenes`: scenes of real handwritten digits on textured canvases, without a download.

A scene has a few digits, which may overlap in part, among strokes that belong to no class. It is drawn from
(split, index) whenever it is requested, so a data set needs no storage and is the same on every machine.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pydantic.dataclasses
from PIL import Image
from pydantic import PositiveInt

from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, Source
from ..detection import Target
from ..panoptic import panoptic_target
from .digits import Digits, load_digits

INK_THRESHOLD = 0.4  # of a digit's ink, from which a pixel belongs to the digit
MAX_HIDDEN = 0.2  # largest fraction of a digit that later digits may cover
MAX_VAL_SCENES = 200
# height of a digit as a fraction of the side; for masks, strokes must span several cells of the finest feature map
MASK_HEIGHTS, BOX_HEIGHTS = (0.4, 0.7), (0.25, 0.5)
PALETTE = [
    *([230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48]),
    *([145, 30, 180], [70, 240, 240], [240, 50, 230], [210, 245, 60], [170, 110, 40]),
]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Scenes(Source):
    scenes: PositiveInt = 1000
    """number of training scenes; a fifth as many, at most 200, are for validation"""


class ScenesData(Protocol):
    """The keys that a data set of scenes reads."""

    @property
    def scenes(self) -> int: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Scene:
    """image: RGB; instances: [H, W], 0 for background, else 1 + index of the visible digit; labels: [N] classes."""

    image: Image.Image
    instances: np.ndarray
    labels: np.ndarray


class DigitScenes:
    """`length` scenes of `side` x `side` pixels. Training and validation scenes use different digits."""

    def __init__(self, split: str, *, length: int, side: int = 96, heights: tuple[float, float] = BOX_HEIGHTS):
        """heights: of the smallest and the largest digit, as fractions of the side."""
        self.digits, self.split, self.length, self.side = load_digits(split), split, length, side
        self.heights = int(heights[0] * side), int(heights[1] * side)
        self.classes = self.digits.classes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        rng = np.random.default_rng([("train", "val").index(self.split), index])
        return draw(rng, self.digits, self.side, self.heights)


class SceneMasks:
    """(image, semantic mask): class 0 is background, class 1 + d the digit d."""

    def __init__(self, scenes: DigitScenes):
        self.scenes = scenes
        self.classes = ["background", *scenes.classes]
        self.palette = [[0, 0, 0], *PALETTE]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        scene = self.scenes[index]
        return scene.image, np.concatenate([[0], 1 + scene.labels])[scene.instances].astype(np.uint8)


class SceneBoxes:
    """(image, target) with the boxes of the visible part of each digit."""

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


class SceneSegments:
    """(image, target) with a segment for each digit, a thing, and one for the background, stuff."""

    def __init__(self, scenes: DigitScenes):
        self.scenes = scenes
        self.classes = ["background", *scenes.classes]
        self.things = [False, *(True for _ in scenes.classes)]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        scene = self.scenes[index]
        masks = scene.instances == np.arange(len(scene.labels) + 1)[:, None, None]
        labels = np.concatenate([[0], 1 + scene.labels])
        return scene.image, panoptic_target(masks, labels, np.zeros_like(labels))


def open_segments(data: ScenesData, split: str) -> SceneSegments:
    return SceneSegments(_scenes(data, split, MASK_HEIGHTS))


def open_masks(data: ScenesData, split: str) -> SceneMasks:
    return SceneMasks(_scenes(data, split, MASK_HEIGHTS))


def open_boxes(data: ScenesData, split: str) -> SceneBoxes:
    return SceneBoxes(_scenes(data, split, BOX_HEIGHTS), masks=False)


def open_instance_masks(data: ScenesData, split: str) -> SceneBoxes:
    return SceneBoxes(_scenes(data, split, BOX_HEIGHTS), masks=True)


def _scenes(data: ScenesData, split: str, heights: tuple[float, float]) -> DigitScenes:
    length = data.scenes if split == "train" else min(MAX_VAL_SCENES, -(-data.scenes // 5))
    return DigitScenes(split, length=length, side=data.size, heights=heights)


def draw(rng: np.random.Generator, ink: Digits, side: int, heights: tuple[int, int]) -> Scene:
    """A scene of two or three digits, `heights` pixels high, among two to four strokes that belong to no class."""
    canvas = texture(rng, side)
    for _ in range(rng.integers(2, 5)):
        draw_stroke(rng, canvas)
    instances, labels = np.zeros((side, side), np.int32), []
    for _ in range(rng.integers(2, 4)):
        chosen = int(rng.integers(len(ink)))
        height = int(rng.integers(heights[0], heights[1] + 1))
        top, left = rng.integers(0, side - height + 1, 2)
        part = np.s_[top : top + height, left : left + height]
        alpha = np.asarray(ink[chosen][0].convert("L").resize((height, height), Image.Resampling.BILINEAR)) / 255
        visible = instances.copy()
        visible[part][alpha > INK_THRESHOLD] = len(labels) + 1
        if covered(instances, visible):
            continue
        instances, color = visible, rng.uniform(0.55, 1.0, 3)
        canvas[part] += alpha[..., None] * (color - canvas[part])
        labels.append(ink.targets[chosen])
    image = Image.fromarray((255 * canvas.clip(0, 1)).round().astype(np.uint8))
    return Scene(image, instances, np.array(labels, np.int64))


def covered(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether a digit of `before` loses more than MAX_HIDDEN of its pixels in `after`."""
    was = np.bincount(before.ravel())
    left = np.bincount(after.ravel(), minlength=len(was))[: len(was)]
    return bool((left[1:] < (1 - MAX_HIDDEN) * was[1:]).any())


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """A dark canvas `[side, side, 3]` in 0..0.5: the sum of three sine waves per channel, and noise."""
    place = np.arange(side) / side
    fx, fy, phase = rng.uniform(-6, 6, (3, 3)), rng.uniform(-6, 6, (3, 3)), rng.uniform(0, 2 * np.pi, (3, 3))
    # sin(a + b) is the imaginary part of e^ia e^ib: two rows of exponentials are cheaper than a plane of sines
    across = np.exp(1j * (2 * np.pi * np.multiply.outer(place, fx) + phase))
    down = np.exp(2j * np.pi * np.multiply.outer(place, fy))
    waves = np.einsum("yck,xck->yxc", down, across).imag / 3
    return (0.25 + 0.2 * waves + rng.normal(0, 0.04, (side, side, 3))).clip(0, 0.5)


def draw_stroke(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Draw a straight stroke as bright as a digit, as a distractor."""
    side = len(canvas)
    y, x = np.mgrid[:side, :side]
    (y0, x0), angle = rng.uniform(0, side, 2), rng.uniform(0, np.pi)
    along = (x - x0) * np.cos(angle) + (y - y0) * np.sin(angle)
    across = (y - y0) * np.cos(angle) - (x - x0) * np.sin(angle)
    stroke = (np.abs(along) < rng.uniform(side / 16, side / 6)) & (np.abs(across) < rng.uniform(0.5, side / 40))
    canvas[stroke] = rng.uniform(0.55, 1.0, 3)


SPEC = SourceSpec(
    name="digit_scenes",
    summary="drawn scenes of handwritten digits, without a download",
    options=Scenes,
    datasets={
        "semantic masks": open_masks,
        "boxes": open_boxes,
        "instance masks": open_instance_masks,
        "panoptic masks": open_segments,
    },
)
