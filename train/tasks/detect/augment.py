"""What happens to an image and its objects before a detector sees them, by torchvision's transforms of both."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...data.detection import Target, learnable
from ...recipe.schema import Recipe

STEPS = [400, 500, 600]  # short sides before a crop, as in DETR's training (arXiv 2005.12872, section 4)


class Train:
    """Flips, colour, crop and scale of an image, its boxes and masks; only what can be learned stays in the target."""

    def __init__(self, recipe: Recipe):
        aug, detect = recipe.data.aug, recipe.task.detect
        scale: Any = _scaled(list(detect.min_size or (recipe.data.size,)), detect.max_size)
        if detect.crop:
            cropped = v2.Compose([_scaled(STEPS, detect.max_size), CropWithin(*detect.crop), scale])
            scale = v2.RandomChoice([scale, cropped])
        steps = [v2.RandomHorizontalFlip(aug.hflip), v2.RandomVerticalFlip(aug.vflip), scale]
        if jitter := aug.color_jitter:
            steps.append(v2.ColorJitter(jitter, jitter, jitter))
        steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1.0)]
        self.steps = v2.Compose(steps)

    def __call__(self, image: Image.Image, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        kept = learnable(target["boxes"], target["iscrowd"])
        size: Any = (image.height, image.width)
        boxes = torch.from_numpy(target["boxes"][kept])
        sample: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),  # type: ignore[call-overload]
            "labels": torch.from_numpy(target["labels"][kept]),
        }
        if "masks" in target:
            sample["masks"] = tv_tensors.Mask(torch.from_numpy(target["masks"][kept]))
        pixels, found = self.steps(v2.functional.to_image(image), sample)
        return as_input(pixels), {name: tensor.as_subclass(Tensor) for name, tensor in found.items()}


class Eval:
    """The image as it is, with all that is known about it."""

    def __call__(self, image: Image.Image, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        return as_input(v2.functional.to_image(image)), {
            name: torch.from_numpy(value.copy()) for name, value in target.items()
        }


class CropWithin(v2.Transform):
    """A crop whose sides are drawn from `least` to `most` pixels, or the image's where that is shorter."""

    def __init__(self, least: int, most: int):
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = v2.functional.get_size(flat_inputs[0])
        height, width = (_drawn(min(self.least, side), min(self.most, side)) for side in sides)
        top, left = _drawn(0, sides[0] - height), _drawn(0, sides[1] - width)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


def as_input(image: Tensor) -> Tensor:
    """uint8 [3, H, W] to float in 0..1: mean and std are the detector's own affair."""
    return v2.functional.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True)


def _scaled(sides: list[int], longest: int) -> v2.Transform:
    # without antialiasing, as the detector scales in evaluation
    return v2.RandomShortestSize(sides, max_size=longest, antialias=False)


def _drawn(least: int, most: int) -> int:
    return int(torch.randint(least, most + 1, ()))
