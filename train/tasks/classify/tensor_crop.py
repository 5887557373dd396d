"""The random resized crop of a uint8 tensor, for `data.decoder=torchcodec`."""

import random

from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn import functional as F


class TensorCrop:
    """uint8 [3, H, W] -> PIL image: timm's random resized crop with the same boxes, computed by torch.

    The values differ from those of Pillow by one or two levels in less than one of 20 pixels. What follows the crop, a
    policy of timm for example, is fastest on PIL images.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        """crop: of timm, with the size, the ranges and the interpolation."""
        self.crop = crop

    def __call__(self, pixels: Tensor) -> Image.Image:
        crop = self.crop
        top, left, height, width = crop.get_params(pixels, crop.scale, crop.ratio)
        modes = crop.interpolation
        mode = random.choice(modes) if isinstance(modes, tuple) else modes
        # torch computes in channels_last only if the strides of the batch dimension say so too
        batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        window = batch[..., top : top + height, left : left + width]
        # torchvision's resize computes in floating point or in bytes, depending on the CPU; this always in bytes
        resized = F.interpolate(window, crop.size, mode=mode.value, antialias=True)
        return Image.fromarray(resized[0].permute(1, 2, 0).numpy())
