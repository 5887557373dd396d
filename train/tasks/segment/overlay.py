"""Pictures of what a segmenter sees: the image under the colours of its classes, truth beside prediction."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ...data.segmentation import IGNORE_INDEX

if TYPE_CHECKING:
    from .task import SegmentTask


OPACITY = 0.55


GAP = 4  # white pixels between truth and prediction


def pictures(
    task: "SegmentTask", predictions: Mapping[str, np.ndarray], count: int
) -> Iterator[tuple[int, Image.Image]]:
    """(index, picture) of the first `count` validation images that were kept: truth at the left, prediction beside."""
    for number, index in enumerate(predictions["index"][:count].tolist()):
        height, width = predictions["size"][number]
        pair = [predictions[kind][number, :height, :width] for kind in ("target", "prediction")]
        yield index, overlay(task.val[index][0], pair, task.palette)


def overlay(image: Image.Image, masks: list[np.ndarray], palette: list[list[int]]) -> Image.Image:
    """The image once for each mask [h, w], at their size, with the palette's colours over it; ignored pixels stay."""
    height, width = masks[0].shape
    colours = np.zeros((IGNORE_INDEX + 1, 3))
    colours[: len(palette)] = palette
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=float)
    panels = []
    for mask in masks:
        share = OPACITY * (mask != IGNORE_INDEX)[..., None]
        panels += [pixels + share * (colours[mask] - pixels), np.full((height, GAP, 3), 255.0)]
    return Image.fromarray(np.concatenate(panels[:-1], 1).round().astype(np.uint8))
