"""torchvision's detectors as modules from images to tensors."""

from typing import Any

from torch import Tensor, nn


class OneImageDetector(nn.Module):
    """A detector of torchvision or of the trainer for one image: `[1, 3, H, W]` in 0..1 to its dict of tensors.

    Detectors take lists of images, and how many boxes they return depends on the image, which torch.export does not
    record. Tracing does: `export(OneImageDetector(detector), path, size=(H, W))`, for the formats `onnx` and
    `torchscript-trace`.
    """

    in_chans = 3

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector
        self.classes = getattr(detector, "classes", None)

    def forward(self, images: Tensor) -> dict[str, Any]:
        return self.detector([images[0]])[0]
