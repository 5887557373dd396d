"""Augmentation of an image together with its mask, on torchvision's tensors that know what they are."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_data_config
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ...data.loader import Transform
from ...data.segmentation import IGNORE_INDEX
from .options import SegmentData, SegmentTest

Pair = tuple[Tensor, Tensor]  # an image [3, H, W] and its mask [H, W], as tv_tensors


CROPS = 10  # most often that a crop is drawn again


def train_transform(data: SegmentData, pretrained_cfg: Any) -> Transform:
    """Resize, crop, flips, colours, normalisation, and padding to data.size with the mean colour and ignored pixels.

    (image, mask [H, W]) -> ([3, size, size], int64 [size, size])
    """
    aug, (mean, std) = data.aug, normalisation(pretrained_cfg)
    colours = photometric if aug.photometric else v2.Identity()
    flips = v2.Compose([v2.RandomHorizontalFlip(aug.hflip), v2.RandomVerticalFlip(aug.vflip)])

    def transform(image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        pair = tv_tensors.Image(F.pil_to_tensor(image)), tv_tensors.Mask(torch.from_numpy(mask))
        pair = flips(*random_crop(*random_resize(*pair, data), data.size, aug.cat_max_ratio))
        pixels = F.normalize(F.to_dtype(colours(pair[0]), torch.float32, scale=True), mean, std)
        return padded(pixels, pair[1], data.size)

    return transform


def eval_transform(data: SegmentData, test: SegmentTest, pretrained_cfg: Any) -> Transform:
    """(image, mask [H, W]) -> (the normalised image at each of `test.scales`, int64 [H, W] as it was)"""
    mean, std = normalisation(pretrained_cfg)

    def transform(image: Image.Image, mask: np.ndarray) -> tuple[list[Tensor], Tensor]:
        pixels, views = F.pil_to_tensor(image), []
        for scale in test.scales:
            size = fitted(mask.shape, data.img_scale, scale)
            if test.divisor:
                size = aligned(size, test.divisor)
            view = F.to_dtype(resized(pixels, size), torch.float32, scale=True)
            views.append(F.normalize(view, mean, std))
        return views, torch.from_numpy(mask).long()

    return transform


def normalisation(pretrained_cfg: Any) -> tuple[list[float], list[float]]:
    """Mean and std of the model's input, for values in 0..1."""
    cfg = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else pretrained_cfg.to_dict()
    config = resolve_data_config({}, pretrained_cfg=dict(cfg))
    return list(config["mean"]), list(config["std"])


def fitted(shape: tuple[int, ...], box: tuple[int, int] | None, factor: float) -> tuple[int, int]:
    """(height, width) of the largest image of this ratio in `box` (longer and shorter side) times `factor`."""
    height, width = shape[-2:]
    if box is not None:
        long, short = max(box), min(box)
        factor *= min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def aligned(size: tuple[int, int], divisor: int) -> tuple[int, int]:
    """The next multiples of `divisor`."""
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return image if tuple(image.shape[-2:]) == size else F.resize(image, list(size), antialias=True)


def random_resize(image: Tensor, mask: Tensor, data: SegmentData) -> Pair:
    """Both fitted into data.img_scale times a random factor of data.aug.resize."""
    low, high = data.aug.resize
    factor = low if low == high else float(torch.empty(()).uniform_(low, high))
    size = fitted(tuple(image.shape), data.img_scale, factor)
    if tuple(image.shape[-2:]) == size:
        return image, mask
    return F.resize(image, list(size), antialias=True), F.resize(mask, list(size))


def random_crop(image: Tensor, mask: Tensor, size: int, share: float) -> Pair:
    """A window of at most `size` pixels a side; one with more than `share` of a class is drawn again, at most 10 times.

    A window of a single class is one of those (mmsegmentation's `cat_max_ratio`).
    """
    height, width = mask.shape[-2:]
    rows, columns = min(size, height), min(size, width)
    for attempt in range(CROPS + 1):
        top, left = (int(torch.randint(space + 1, ())) for space in (height - rows, width - columns))
        window = F.crop(mask, top, left, rows, columns)
        if share >= 1 or attempt == CROPS:
            break
        counts = torch.bincount(window.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        if (counts > 0).sum() > 1 and counts.max() < share * counts.sum():
            break
    return F.crop(image, top, left, rows, columns), window


def photometric(image: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of a uint8 image [3, H, W], each distorted with probability 1/2.

    mmsegmentation's `PhotoMetricDistortion`: brightness is added, contrast multiplies the pixels themselves, before or
    after saturation and hue, and what leaves 0..255 is cut off at each step.
    """
    pixels = image.as_subclass(Tensor).float()
    if _perhaps():
        pixels = (pixels + _between(-32, 32)).clamp(0, 255)
    contrast, last = _between(0.5, 1.5) if _perhaps() else 1.0, _perhaps()
    if not last:
        pixels = (pixels * contrast).clamp(0, 255)
    if _perhaps():
        pixels = saturated(pixels, _between(0.5, 1.5))
    if _perhaps():
        pixels = F.adjust_hue(pixels / 255, _between(-0.1, 0.1)) * 255  # 36 degrees of 360
    if last:
        pixels = (pixels * contrast).clamp(0, 255)
    return pixels.round().to(torch.uint8)


def saturated(pixels: Tensor, factor: float) -> Tensor:
    """The saturation of HSV times `factor`, at most 1; hue and value stay."""
    value = pixels.amax(0, keepdim=True)
    span = (value - pixels.amin(0, keepdim=True)).clamp(min=1e-6)
    return value - (value - pixels) * (value / span).clamp(max=factor)


def _perhaps() -> bool:
    return bool(torch.rand(()) < 0.5)


def _between(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


def padded(pixels: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """At the right and the bottom: a normalised image by its mean, a mask by what is ignored."""
    right, bottom = size - pixels.shape[-1], size - pixels.shape[-2]
    plain, classes = pixels.as_subclass(Tensor), mask.as_subclass(Tensor).long()
    edges = [0, right, 0, bottom]
    return torch.nn.functional.pad(plain, edges), torch.nn.functional.pad(classes, edges, value=IGNORE_INDEX)
