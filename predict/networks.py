"""Where a network computes: a PyTorch module on a device, or an exported file in its runtime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.transforms.v2.functional import resize

from ..train.errors import UserError, one_line
from ..train.tasks.models import MODEL_ERRORS


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto": the accelerator that torch finds, else the CPU. Raises UserError if unusable."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} cannot be used ({one_line(error)}); use auto or cpu") from error
    return device


class TorchNetwork:
    """Runs `module` on `device`, in evaluation mode and without gradients."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device = module.to(device).eval(), device

    def __call__(self, inputs: Any) -> Any:
        """inputs: a tensor, or a list of them, moved to the device; outputs: on the device.

        Raises UserError for inputs that do not fit.
        """
        with torch.inference_mode():
            try:
                return self.module(tree_map_only(Tensor, lambda tensor: tensor.to(self.device), inputs))
            except torch.OutOfMemoryError as error:
                raise UserError("the device is out of memory; use smaller batches or the device cpu") from error
            except MODEL_ERRORS as error:
                shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else f"{len(inputs)} images"
                raise UserError(f"the model does not accept this input, {shape}: {one_line(error)}") from error


class ExportedNetwork:
    """A file that `tessel.export` reads: images [B, C, H, W] to one output, on the CPU.

    `metadata` is what the file says of itself; `size` is the (height, width) of its images, None if it is open.
    """

    def __init__(self, path: Path):
        from ..export import ExportError
        from ..export import load as load_export

        try:
            self.exported = load_export(path)
        except ExportError as error:
            raise UserError(str(error)) from error
        self.path, self.metadata, self.device = path, self.exported.metadata, torch.device("cpu")
        dynamic, example = self.metadata.get("dynamic", ()), self.metadata.get("example")
        self.batch = example[0] if example and "batch" not in dynamic else None
        self.size = (example[2], example[3]) if example and "size" not in dynamic else None

    def __call__(self, images: Tensor) -> Tensor:
        """The output; where the file has a fixed batch size, of one such batch after the other."""
        return torch.cat([self._part(part) for part in (images.split(self.batch) if self.batch else [images])])

    def _part(self, images: Tensor) -> Tensor:
        count = len(images)
        if self.batch and count < self.batch:
            images = torch.cat([images, images[-1:].expand(self.batch - count, *images.shape[1:])])
        output = self.run(images)
        if not isinstance(output, Tensor):
            raise UserError(f"{self.path} has several outputs; predictions are made from one")
        return output[:count]

    def run(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """The outputs of the file. Raises UserError for images that it does not accept."""
        try:
            return self.exported(images)
        except Exception as error:  # each runtime has errors of its own
            raise UserError(f"{self.path} does not accept images {list(images.shape)}: {one_line(error)}") from error


class ExportedDetector:
    """A detector in a file, for images of a fixed size: a list of images [3, H, W] in 0..1 to a list of dicts.

    An image is resized so that it fits, its ratio kept, and lies in the upper left corner; the rest has the color
    `padding`. Boxes and masks are those of the image as given. panoptic: the arguments things, min_score and
    min_overlap of `panoptic`, if a file with the logits of queries is to give segments that do not overlap.
    """

    def __init__(self, network: ExportedNetwork, padding: Sequence[float], panoptic: Mapping[str, Any] | None = None):
        if network.size is None:
            raise UserError(f"{network.path} has an open size; a detector is exported with a fixed one")
        self.network, self.size, self.device, self.panoptic = network, network.size, network.device, panoptic
        self.padding = torch.tensor(padding)[:, None, None]

    def __call__(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self._detect(image) for image in images]

    def _detect(self, image: Tensor) -> dict[str, Tensor]:
        sides = image.shape[1:]
        scale = min(whole / side for whole, side in zip(self.size, sides, strict=True))
        height, width = (max(1, round(side * scale)) for side in sides)
        canvas = self.padding.repeat(1, *self.size)
        canvas[:, :height, :width] = resize(image, [height, width], antialias=True)
        found = self.network.run(canvas[None])
        if not isinstance(found, dict):
            raise UserError(f"{self.network.path} has one output; those of a detector are boxes, labels and scores")
        if "classes" in found:
            return self._masks(found, (height, width), sides)
        if found["boxes"].dim() == 3:  # a detector with queries, whose tensors have an axis for the batch
            found = {name: tensor[0] for name, tensor in found.items()}
        ratio = torch.tensor([sides[1] / width, sides[0] / height]).repeat(2)
        limits = torch.tensor([sides[1], sides[0]]).repeat(2)
        placed = {**found, "boxes": (found["boxes"] * ratio).clamp_min(0).minimum(limits)}
        if "masks" in found:
            placed["masks"] = resize(found["masks"][..., :height, :width], list(sides), antialias=True)
        return placed

    def _masks(self, found: Mapping[str, Tensor], size: Sequence[int], sides: Sequence[int]) -> dict[str, Tensor]:
        """The objects of an image from the logits of its queries. size: of the image in the file's input."""
        from ..train.heads.mask_classifier import MaskOutputs
        from ..train.heads.mask_inference import instances, panoptic
        from ..train.tasks.detect.queries import DETECTIONS

        outputs = MaskOutputs([found["classes"]], [found["masks"]])
        places = {"canvas": [-(-side // 32) * 32 for side in self.size], "size": size, "wanted": sides}
        if self.panoptic is not None:
            return panoptic(outputs, 0, **places, **self.panoptic)
        return instances(outputs, 0, **places, count=DETECTIONS)
