"""torchvision's detectors as modules from images to tensors, and the comparison of what two of them found."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .comparison import difference

EQUAL = 1e-3  # relative difference below which the order of two scores is chance


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


class BatchDetector(nn.Module):
    """A detector of transformers: images `[B, 3, H, W]` in 0..1, of a fixed size, to a dict of tensors.

    How many objects it finds is fixed, so that torch.export records it. See `QueryDetector.batched` of the trainer.
    """

    in_chans = 3

    def __init__(self, detector: Any):
        super().__init__()
        self.detector = detector
        self.classes = getattr(detector, "classes", None)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.detector.batched(images)


def detections_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest `detection_difference` of the images of a batch."""
    images = zip(*found.values(), strict=True), zip(*expected.values(), strict=True)
    pairs = zip(*images, strict=True)
    return max(
        detection_difference(dict(zip(found, a, strict=True)), dict(zip(expected, b, strict=True))) for a, b in pairs
    )


def detection_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of scores and masks, and of boxes relative to the largest; infinite if one is missing.

    An object is compared with the nearest one of its label and score, because equal scores come in any order. Objects
    with the lowest score are left out: which of equals are among the best is chance.
    """
    error = difference(found["scores"], expected["scores"])
    if not error < EQUAL or not len(found["scores"]):
        return error
    least = found["scores"].min() * (1 + EQUAL)
    for number in (found["scores"] > least).nonzero()[:, 0].tolist():
        near = (expected["scores"] - found["scores"][number]).abs() <= EQUAL * found["scores"][number]
        rivals = (near & (expected["labels"] == found["labels"][number])).nonzero()[:, 0]
        if not len(rivals):
            return float("inf")
        distances = (expected["boxes"][rivals] - found["boxes"][number]).abs().amax(1)
        error = max(error, (distances.min() / expected["boxes"].abs().max().clamp_min(1e-12)).item())
        if "masks" in found:
            nearest = rivals[distances.argmin()]
            error = max(error, (expected["masks"][nearest] - found["masks"][number]).abs().max().item())
    return error
