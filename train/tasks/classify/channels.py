"""Pictures of other than three channels: their conversion to tensors, and the statistics of their channels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import UserError

MEASURED = 200  # images whose mean and standard deviation are measured

Step = Callable[[Any], Any]


def channel_steps(channels: int) -> tuple[list[Step], list[Step]]:
    """What a model of so many channels needs before and after the augmentation of an image.

    Gray images are augmented as RGB images. Arrays are augmented as float tensors by flips, crops and affine maps.
    """
    if channels == 3:
        return [], []
    return ([gray], [first_channel]) if channels == 1 else ([array_to_tensor], [])


def gray(image: Image.Image) -> Image.Image:
    """The RGB image in gray levels, in three equal channels."""
    return image.convert("L").convert("RGB")


def first_channel(image: Tensor) -> Tensor:
    """[C, H, W] -> [1, H, W]"""
    return image[:1]


def array_to_tensor(array: np.ndarray) -> Tensor:
    """[H, W, C] -> float32 [C, H, W]; integers are divided by the highest value of their type."""
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, 2, 0).astype(np.float32)))
    return pixels / float(np.iinfo(array.dtype).max) if array.dtype.kind in "ui" else pixels


def measure(dataset: Any, count: int = MEASURED) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over up to `count` evenly spaced images of a data set of arrays.

    Images that cannot be read are left out. Raises UserError if none can.
    """
    sums, found = [], None
    for index in np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)):
        try:
            pixels = array_to_tensor(dataset[int(index)][0]).double().flatten(1)
        except UserError as error:
            found = error
            continue
        ones = torch.full_like(pixels[:, 0], pixels.shape[1])
        sums.append(torch.stack([ones, pixels.sum(1), pixels.square().sum(1)]))
    if not sums:
        raise found or UserError("the data set has no images")
    number, total, squares = torch.stack(sums).sum(0)
    mean = total / number
    return mean.tolist(), (squares / number - mean.square()).clamp(min=0).sqrt().tolist()


def missing_statistics(dataset: Any, channels: int) -> UserError:
    """The error for a model of other channels without data.mean and data.std; it holds the measured values."""
    mean, std = ([float(f"{value:.4g}") for value in values] for values in measure(dataset))
    if not all(std):
        constant = std.index(0) + 1
        return UserError(
            f"channel {constant} of {channels} has the same value in all images; remove it from the images"
        )
    mean_text, std_text = (",".join(f"{value:g}" for value in values) for values in (mean, std))
    return UserError(
        f"model.in_chans={channels} needs the mean and standard deviation of each channel; those of up to {MEASURED} "
        f"training images are data.mean=[{mean_text}] data.std=[{std_text}]"
    )
