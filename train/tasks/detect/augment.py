"""Joint augmentation of an image with its boxes and masks, with torchvision's transforms v2."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ...data.detection import Target, learnable
from ...data.photometric import photometric
from ...recipe.schema import Recipe

# gray, of images smaller than a crop of fixed size, as in Simple Copy-Paste (arXiv 2012.07177, section 3)
PADDING = 128
# short sides to which an image is resized before a random crop, as in DETR (arXiv 2005.12872, section 4)
SIDES_BEFORE_CROP = [400, 500, 600]


class TrainTransform:
    """(PIL image, target) -> (uint8 [3, H, W], boxes [N, 4], labels [N] and masks [N, H, W] in a dict).

    Flips, random colors, random crop and random resize. Crowds, boxes without an area and masks without a pixel are
    removed.
    """

    def __init__(self, recipe: Recipe):
        aug, detect = recipe.data.aug, recipe.task.detect
        resize: Any = _random_resize(list(detect.min_size or (recipe.data.size,)), detect.max_size)
        if aug.scale_jitter:
            # with antialiasing, since it shrinks images to a tenth
            resize = v2.ScaleJitter((aug.crop, aug.crop), aug.scale_jitter, antialias=True)
        if detect.crop:
            crop = v2.Compose(
                [_random_resize(SIDES_BEFORE_CROP, detect.max_size), RandomSizeCrop(*detect.crop), resize]
            )
            resize = v2.RandomChoice([resize, crop])
        steps = [v2.RandomHorizontalFlip(aug.hflip), v2.RandomVerticalFlip(aug.vflip), resize]
        if aug.crop:
            steps.append(RandomSizeCrop(aug.crop, aug.crop))
        if aug.photometric:
            steps.append(Photometric())
        if aug.crop:
            steps.append(PadToSize(aug.crop))
        if jitter := aug.color_jitter:
            steps.append(v2.ColorJitter(jitter, jitter, jitter))
        steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1.0)]
        self.steps = v2.Compose(steps)

    def __call__(self, image: Image.Image, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = learnable(target["boxes"], target["iscrowd"])
        size: Any = (image.height, image.width)
        boxes = torch.from_numpy(target["boxes"][chosen])
        objects: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),  # type: ignore[call-overload]
            "labels": torch.from_numpy(target["labels"][chosen]),
        }
        if "masks" in target:
            objects["masks"] = tv_tensors.Mask(torch.from_numpy(target["masks"][chosen]))
        pixels, objects = self.steps(F.to_image(image), objects)
        if "masks" in objects:  # of a box with an area, a crop may have left no pixel of the mask
            present = objects["masks"].flatten(1).any(1).bool()
            objects = {name: tensor[present] for name, tensor in objects.items()}
        return pixels.as_subclass(Tensor), {name: tensor.as_subclass(Tensor) for name, tensor in objects.items()}


class EvalTransform:
    """(PIL image, target) -> (uint8 [3, H, W], the whole target as tensors), without augmentation.

    The detector itself resizes images in evaluation.
    """

    def __call__(self, image: Image.Image, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        tensors = {name: torch.from_numpy(value.copy()) for name, value in target.items()}
        return F.to_image(image).as_subclass(Tensor), tensors


class RandomSizeCrop(v2.Transform):
    """Random crop with sides between `min_size` and `max_size` pixels, or the side of the image if it is shorter."""

    def __init__(self, min_size: int, max_size: int):
        super().__init__()
        self.min_size, self.max_size = min_size, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = F.get_size(flat_inputs[0])
        height, width = (_randint(min(self.min_size, side), min(self.max_size, side)) for side in sides)
        top, left = _randint(0, sides[0] - height), _randint(0, sides[1] - width)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class PadToSize(v2.Transform):
    """Pads to `size` x `size` pixels at the right and at the bottom: gray in images, zeros in masks."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = F.get_size(flat_inputs[0])
        return {"padding": [0, 0, max(0, self.size - width), max(0, self.size - height)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.pad, inpt, **params, fill=PADDING if isinstance(inpt, tv_tensors.Image) else 0)


class Photometric(v2.Transform):
    """Distorts the colors of the image, see `photometric`."""

    _transformed_types = (tv_tensors.Image,)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tv_tensors.Image(photometric(inpt))


def to_float(image: Tensor) -> Tensor:
    """uint8 [3, H, W] to float32 in 0..1, on the device of the batch; the detector normalizes it."""
    return F.to_dtype(image, torch.float32, scale=True)


def _random_resize(sides: list[int], max_size: int) -> v2.Transform:
    # without antialiasing, as the detector resizes in evaluation
    return v2.RandomShortestSize(sides, max_size=max_size, antialias=False)


def _randint(low: int, high: int) -> int:
    """A random integer from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()))
