"""Random distortion of the colors of an image, as mmsegmentation and Mask2Former have it."""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F


def photometric(image: Tensor) -> Tensor:
    """Distort brightness, contrast, saturation and hue of a uint8 image [3, H, W], each with probability 1/2.

    This is mmsegmentation's `PhotoMetricDistortion`, which differs from torchvision's ColorJitter: brightness is an
    offset, contrast multiplies the pixels (without their mean) before or after saturation and hue, and each step clips
    to 0..255.
    """
    pixels = image.as_subclass(Tensor).float()
    if coin_flip():
        pixels = (pixels + uniform(-32, 32)).clamp(0, 255)
    contrast, contrast_last = uniform(0.5, 1.5) if coin_flip() else 1.0, coin_flip()
    if not contrast_last:
        pixels = (pixels * contrast).clamp(0, 255)
    if coin_flip():
        pixels = scale_saturation(pixels, uniform(0.5, 1.5))
    if coin_flip():
        pixels = F.adjust_hue(pixels / 255, uniform(-0.1, 0.1)) * 255  # a tenth of the color circle: 36 degrees
    if contrast_last:
        pixels = (pixels * contrast).clamp(0, 255)
    return pixels.round().to(torch.uint8)


def scale_saturation(pixels: Tensor, factor: float) -> Tensor:
    """[3, H, W] with the HSV saturation multiplied by `factor` and clipped to 1; hue and value do not change."""
    value = pixels.amax(0, keepdim=True)
    chroma = (value - pixels.amin(0, keepdim=True)).clamp(min=1e-6)
    return value - (value - pixels) * (value / chroma).clamp(max=factor)


def coin_flip() -> bool:
    return bool(torch.rand(()) < 0.5)


def uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))
