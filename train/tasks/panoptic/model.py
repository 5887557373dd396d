"""Mask2Former and PEM that predict segments without overlap, and reading an exported model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...heads.mask_inference import panoptic
from ...recipe.schema import Dense, Model
from ..dense_backbone import build_backbone, load_initial_backbone
from ..detect.detectors import MaskQueryDetector
from ..detect.options import DetectOptions
from ..export import load_weights, read_export
from .options import PanopticOptions


class PanopticSegmenter(MaskQueryDetector):
    """Like an instance detector, but the masks of an image do not overlap, and a stuff class has one mask."""

    things: list[bool]
    options: PanopticOptions

    def predictions(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, ...]]
    ) -> list[dict[str, Tensor]]:
        outputs = self.head(self.backbone(images))
        rules: dict[str, Any] = {"min_score": self.options.min_score, "min_overlap": self.options.min_overlap}
        return [
            panoptic(outputs, number, canvas=images.shape[-2:], size=size, wanted=to, things=self.things, **rules)
            for number, (size, to) in enumerate(zip(sizes, wanted, strict=True))
        ]


def build(
    model: Model, detect: DetectOptions, options: PanopticOptions, *, dense: Dense, size: int, things: list[bool]
) -> PanopticSegmenter:
    """The model of a recipe, with the initial weights of its backbone. things: for each class, whether it is a thing.

    Raises UserError if it cannot be built.
    """
    body = build_backbone(model, dense, (0, 1, 2, 3))
    load_initial_backbone(body, model, size)
    segmenter = PanopticSegmenter(body, detect, len(things), size=size)
    segmenter.things, segmenter.options = things, options
    return segmenter


def load(path: Path) -> PanopticSegmenter:
    """The model in the folder `path`, in evaluation mode on the CPU. Raises UserError if it cannot be read."""
    sections = {"dense": Dense, "detect": DetectOptions, "options": PanopticOptions}
    parts = read_export(path, "panoptic", sections)
    size, things = parts["size"], parts["things"]
    model: Any = build(
        parts["model"], parts["detect"], parts["options"], dense=parts["dense"], size=size, things=things
    )
    load_weights(model, path)
    model.classes = parts["classes"]
    return model.eval()
