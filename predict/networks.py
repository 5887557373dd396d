"""Where a network computes: a PyTorch module on a device, or an ONNX file in ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

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
    """Runs `module` on `device`, in evaluation mode and without gradients: CPU tensors in and out."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device = module.to(device).eval(), device

    def __call__(self, inputs: Any) -> Any:
        """inputs, outputs: a tensor, or lists and dicts of tensors. Raises UserError for inputs that do not fit."""
        with torch.inference_mode():
            try:
                outputs = self.module(tree_map_only(Tensor, lambda tensor: tensor.to(self.device), inputs))
            except torch.OutOfMemoryError as error:
                raise UserError("the device is out of memory; use smaller batches or the device cpu") from error
            except MODEL_ERRORS as error:
                shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else f"{len(inputs)} images"
                raise UserError(f"the model does not accept this input, {shape}: {one_line(error)}") from error
        return tree_map_only(Tensor, Tensor.cpu, outputs)


class OnnxNetwork:
    """An ONNX file with one input, images [B, 3, H, W], and one output, in ONNX Runtime.

    `metadata` is the text of each key that the file carries; `size` is the side lengths (H, W) of its input, None where
    they are free.
    """

    def __init__(self, path: Path, device: str = "auto"):
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise UserError("onnxruntime is not installed; pip install 'tessel[export]' installs it") from error
        known = onnxruntime.get_available_providers()
        wanted = ["CUDAExecutionProvider"] if device != "cpu" else []
        providers = [name for name in wanted if name in known] + ["CPUExecutionProvider"]
        try:
            self.session: Any = onnxruntime.InferenceSession(str(path), providers=providers)
        except Exception as error:  # onnxruntime has a class of its own for each cause
            raise UserError(f"{path} cannot be read by ONNX Runtime: {one_line(error)}") from error
        self.path, self.input = path, self.session.get_inputs()[0]
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        sides = [side if isinstance(side, int) else None for side in self.input.shape]
        self.batch, self.size = sides[0], (sides[2], sides[3])
        self.dtype = np.float16 if "float16" in self.input.type else np.float32

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the first output. Images go in one by one where the file has a fixed batch size."""
        parts = images.split(self.batch) if self.batch else [images]
        return torch.cat([self._run(part) for part in parts])

    def _run(self, images: Tensor) -> Tensor:
        count = len(images)
        if self.batch and count < self.batch:
            images = torch.cat([images, images[-1:].expand(self.batch - count, *images.shape[1:])])
        try:
            (output, *_) = self.session.run(None, {self.input.name: images.numpy().astype(self.dtype)})
        except Exception as error:  # as above
            raise UserError(f"{self.path} does not accept images {list(images.shape)}: {one_line(error)}") from error
        return torch.from_numpy(output)[:count]
