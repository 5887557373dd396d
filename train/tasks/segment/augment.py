"""Joint augmentation of an image and its mask, with torchvision's transforms v2 and tv_tensors."""

from collections.abc import Callable, Mapping
from functools import partial
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
from ...data.photometric import photometric, uniform
from ...data.segmentation import IGNORE_INDEX
from .options import SegmentAug, SegmentData, SegmentTest

MAX_CROP_RETRIES = 10  # as in mmsegmentation's RandomCrop


def train_transform(data: SegmentData) -> Transform:
    """The training transform: (PIL image, uint8 mask [H, W]) -> ((image, its size), int64 mask [size, size]).

    Resizes, crops, flips, distorts the colors, and pads to data.size with 0 and IGNORE_INDEX. The image is uint8
    [3, size, size]; its size is an int64 tensor of height and width without the padding, for `Normalizer`.
    """
    aug = data.aug
    distort = photometric if aug.photometric else v2.Identity()
    flip = v2.Compose([v2.RandomHorizontalFlip(aug.hflip), v2.RandomVerticalFlip(aug.vflip)])

    return partial(_augmented, size=data.size, img_scale=data.img_scale, aug=aug, flip=flip, distort=distort)


def _augmented(
    image: Image.Image,
    mask: np.ndarray,
    *,
    size: int,
    img_scale: Any,
    aug: SegmentAug,
    flip: v2.Compose,
    distort: Callable[[Tensor], Tensor],
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    pixels: Tensor = tv_tensors.Image(F.pil_to_tensor(image))
    labels: Tensor = tv_tensors.Mask(torch.from_numpy(mask))
    pixels, labels = random_resize(pixels, labels, img_scale, aug.resize)
    pixels, labels = flip(*random_crop(pixels, labels, size, aug.cat_max_ratio))
    pixels = distort(pixels)
    filled = torch.tensor(pixels.shape[-2:])
    pixels, labels = pad_to_size(pixels, labels, size)
    return (pixels, filled), labels


def eval_transform(data: SegmentData, test: SegmentTest) -> Transform:
    """The evaluation transform: (PIL image, mask [H, W]) -> (list of uint8 [3, h, w], int64 mask [H, W]).

    The list holds the image resized to each of `test.scales`. The mask is not resized.
    """
    return partial(_at_each_scale, img_scale=data.img_scale, test=test)


def _at_each_scale(
    image: Image.Image, mask: np.ndarray, *, img_scale: Any, test: SegmentTest
) -> tuple[list[Tensor], Tensor]:
    pixels, views = F.pil_to_tensor(image), []
    for scale in test.scales:
        size = rescaled_size(mask.shape, img_scale, scale)
        if test.divisor:
            size = round_up(size, test.divisor)
        views.append(resize_image(pixels, size))
    return views, torch.from_numpy(mask).long()


class Normalizer:
    """uint8 images [B, 3, H, W] to (image / 255 - mean) / std in float32, on the device of the batch.

    Workers hand out uint8, a quarter of the bytes to pass between processes and to copy to the device.
    """

    def __init__(self, pretrained_cfg: Any, device: torch.device):
        self.mean, self.std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in input_mean_std(pretrained_cfg))

    def __call__(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """sizes: height and width [B, 2] of each image without its padding, which becomes 0, the mean color."""
        pixels = F.to_dtype(images.contiguous(), torch.float32, scale=True).sub_(self.mean).div_(self.std)
        if sizes is not None:
            for image, (height, width) in zip(pixels, sizes.tolist(), strict=True):
                image[:, height:] = 0
                image[:, :, width:] = 0
        return pixels


def input_mean_std(pretrained_cfg: Any) -> tuple[list[float], list[float]]:
    """Mean and std per channel of the model's input, for pixel values in 0..1."""
    cfg = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else pretrained_cfg.to_dict()
    config = resolve_data_config({}, pretrained_cfg=dict(cfg))
    return list(config["mean"]), list(config["std"])


def rescaled_size(shape: tuple[int, ...], img_scale: tuple[int, int] | None, factor: float) -> tuple[int, int]:
    """(height, width) of an image [..., H, W] that is resized to fit into `img_scale` times `factor`.

    img_scale: limits of the long and the short side; None: the size of the image. The aspect ratio is kept.
    """
    height, width = shape[-2:]
    if img_scale is not None:
        long, short = max(img_scale), min(img_scale)
        factor *= min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def round_up(size: tuple[int, int], divisor: int) -> tuple[int, int]:
    """`size` with both sides rounded up to a multiple of `divisor`."""
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    return image if tuple(image.shape[-2:]) == size else F.resize(image, list(size), antialias=True)


def random_resize(
    image: Tensor, mask: Tensor, img_scale: tuple[int, int] | None, factors: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Image [3, H, W] and mask [H, W] resized to `img_scale` times a random factor from the range `factors`."""
    low, high = factors
    factor = low if low == high else uniform(low, high)
    size = rescaled_size(tuple(image.shape), img_scale, factor)
    if tuple(image.shape[-2:]) == size:
        return image, mask
    return resize_image(image, size), F.resize(mask, list(size))


def random_crop(image: Tensor, mask: Tensor, size: int, cat_max_ratio: float) -> tuple[Tensor, Tensor]:
    """Image [3, H, W] and mask [H, W] cropped to a random window of at most `size` pixels a side.

    As in mmsegmentation, a window is drawn again, at most 10 times, if it has a single class or if one class covers
    `cat_max_ratio` of its labelled pixels or more.
    """
    height, width = mask.shape[-2:]
    rows, columns = min(size, height), min(size, width)
    for attempt in range(MAX_CROP_RETRIES + 1):
        top, left = (int(torch.randint(space + 1, ())) for space in (height - rows, width - columns))
        window = F.crop(mask, top, left, rows, columns)
        if cat_max_ratio >= 1 or attempt == MAX_CROP_RETRIES:
            break
        counts = torch.bincount(window.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        if (counts > 0).sum() > 1 and counts.max() < cat_max_ratio * counts.sum():
            break
    return F.crop(image, top, left, rows, columns), window


def pad_to_size(pixels: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pad an image [3, h, w] with 0, and its mask [h, w] with IGNORE_INDEX.

    Padding is on the right and at the bottom. Returns plain tensors, [3, size, size] and int64 [size, size].
    """
    edges = [0, size - pixels.shape[-1], 0, size - pixels.shape[-2]]
    image, labels = pixels.as_subclass(Tensor), mask.as_subclass(Tensor).long()
    return torch.nn.functional.pad(image, edges), torch.nn.functional.pad(labels, edges, value=IGNORE_INDEX)
