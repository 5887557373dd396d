"""Detection and instance segmentation: torchvision's detectors on any backbone, COCO-style data and figures."""

from .detectors import load

__all__ = ["load"]
