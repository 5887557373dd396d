"""Pictures of segmentations: the image under the colors of its classes, ground truth beside prediction."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

from ...data.segmentation import IGNORE_INDEX

OPACITY = 0.55
GAP = 4  # white pixels between the two panels


def pictures(dataset: Any, predictions: Mapping[str, np.ndarray], count: int) -> Iterator[tuple[int, Image.Image]]:
    """(index, picture) of the first `count` images in `SegmentationMetrics.predictions` of a data set."""
    for number, index in enumerate(predictions["index"][:count].tolist()):
        height, width = predictions["size"][number]
        masks = [predictions[kind][number, :height, :width] for kind in ("target", "prediction")]
        yield index, overlay(dataset[index][0], masks, dataset.palette)


def classes_in(predictions: Mapping[str, np.ndarray], count: int) -> list[int]:
    """The classes in the first `count` pairs of masks in `SegmentationMetrics.predictions`, in ascending order."""
    masks = [predictions[kind][:count] for kind in ("target", "prediction")]
    return [label for label in np.unique(masks).tolist() if label != IGNORE_INDEX]


def overlay(image: Image.Image, masks: list[np.ndarray], palette: list[list[int]]) -> Image.Image:
    """A panel for each mask [H, W], side by side: the image, resized to H x W, under the colors of the classes.

    Pixels with IGNORE_INDEX show the image.
    """
    height, width = masks[0].shape
    pixels = pil_to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
    gap = torch.full((3, height, GAP), 255, dtype=torch.uint8)
    panels = []
    for mask in masks:
        labels, panel = torch.from_numpy(mask), pixels
        if classes := [label for label in labels.unique().tolist() if label != IGNORE_INDEX]:
            regions = labels == torch.tensor(classes)[:, None, None]
            colors: list[Any] = [tuple(palette[label]) for label in classes]
            panel = draw_segmentation_masks(pixels, regions, alpha=OPACITY, colors=colors)
        panels += [panel, gap]
    return to_pil_image(torch.cat(panels[:-1], 2))
