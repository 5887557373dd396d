"""Detectors of torchvision and transformers on any backbone of timm or tessel, and reading an exported detector."""

import inspect
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from .... import zoo as zoo  # registers the models with timm
from ....zoo.dense import DenseBackbone, prefix_patterns
from ...errors import UserError
from ...heads.freqfusion import build_freqfusion
from ...recipe.schema import Dense, Model, Probability
from ..dense_backbone import build_backbone, load_initial_backbone
from ..export import load_weights, read_export
from . import cascade
from .mmdetection import AlignedRoIAlign, BatchAveragedHead, LastLevels
from .options import WITH_MASKS, DetectOptions
from .published import load_published
from .queries import MASK_DETECTORS, QUERY_DETECTORS, BoxQueries, MaskQueries, QueryDetector

RATIOS = ((0.5, 1.0, 2.0),) * 5  # height / width of the anchors of each level
BACKBONE_PREFIX = "backbone.body."  # of the parameters of the DenseBackbone


class BackboneWithFPN(nn.Module):
    """A dense backbone with a feature pyramid, in the form that torchvision's detectors take."""

    def __init__(self, body: DenseBackbone, channels: int, extra: ExtraFPNBlock, neck: Mapping[str, Any]):
        """neck: the recipe's task.detect.neck."""
        super().__init__()
        self.body, self.out_channels = body, channels
        self.fpn: nn.Module = FeaturePyramidNetwork(body.channels, channels, extra)
        if neck:
            # the published pyramid has a convolution, which is fused too, in the place of a max pooling
            fused = isinstance(extra, LastLevelMaxPool)
            options = {**neck, "out_channels": channels}
            pyramid = build_freqfusion("task.detect.neck", options, body.channels, extra=fused)
            self.fpn = FusionPyramid(pyramid, None if fused else extra)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> maps [B, out_channels, H / stride, W / stride] by name, from fine to coarse."""
        return self.fpn(OrderedDict((str(number), feature) for number, feature in enumerate(self.body(x))))


class FusionPyramid(nn.Module):
    """FreqFusion's pyramid in the form of torchvision's: maps by name. extra: torchvision's further levels, if any."""

    def __init__(self, pyramid: nn.Module, extra: ExtraFPNBlock | None):
        super().__init__()
        self.pyramid, self.extra = pyramid, extra

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        inputs = list(maps.values())
        found = self.pyramid(inputs)
        names = [str(number) for number in range(len(found))]
        if self.extra is not None:
            found, names = self.extra(found, inputs, names)
        return OrderedDict(zip(names, found, strict=True))


class DetectorMixin(nn.Module):
    """Mixin: answers the trainer's questions by the backbone, with its prefix, and lets labels start at 0.

    torchvision's R-CNNs have the background as class 0; the other detectors have no background class.
    """

    first_label = 0
    """torchvision's label of our class 0"""
    backbone: Any

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """A dict of losses in training, else a list with a dict for each image.

        images: [3, H, W] in 0..1 each; targets: boxes [N, 4] (x1, y1, x2, y2), labels [N] and masks [N, H, W] for each
        image. Predictions are boxes, labels, scores and masks [N, 1, H, W] in 0..1, in pixels of the given images.
        """
        first = self.first_label
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + first} for target in targets]
        outputs = super().forward(images, targets)
        return outputs if self.training else [{**one, "labels": one["labels"] - first} for one in outputs]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        groups = self.backbone.body.group_matcher(coarse=coarse)
        return {key: prefix_patterns(spec, BACKBONE_PREFIX) for key, spec in groups.items()}

    def no_weight_decay(self) -> set[str]:
        names = {BACKBONE_PREFIX + name for name in self.backbone.body.no_weight_decay()}
        return names | (self.head_no_weight_decay() if isinstance(self, QueryDetector) else set())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.body.set_grad_checkpointing(enable)

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Load published weights with mmdetection's names, as `load_published` of `published` does."""
        load_published(self, state)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the backbone only: the shapes after it depend on the number of proposals."""
        self.backbone.compile(*args, **kwargs)


class FasterRCNN(DetectorMixin, detection.FasterRCNN):
    first_label = 1


class MaskRCNN(DetectorMixin, detection.MaskRCNN):
    first_label = 1


class CascadeMaskRCNN(DetectorMixin, cascade.CascadeMaskRCNN):
    first_label = 1


class RetinaNet(DetectorMixin, detection.RetinaNet):
    pass


class FCOS(DetectorMixin, detection.FCOS):
    pass


class BoxQueryDetector(DetectorMixin, BoxQueries):
    pass


class MaskQueryDetector(DetectorMixin, MaskQueries):
    pass


DETECTORS: dict[str, Any] = {
    **{"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN, "cascade_mask_rcnn": CascadeMaskRCNN},
    **{"retinanet": RetinaNet, "fcos": FCOS},
}
# arguments that other keys of a recipe set
RESERVED_KWARGS = {"num_classes", "min_size", "max_size"}
# and those that are different in each stage of a cascade
BY_STAGE = {"box_fg_iou_thresh", "box_bg_iou_thresh", "bbox_reg_weights"}


def build_detector(model: Model, detect: DetectOptions, *, dense: Dense, size: int, classes: int) -> nn.Module:
    """The detector of a recipe, with the initial weights of its backbone. Raises UserError if it cannot be built.

    The pyramid has five levels. R-CNNs: strides 4 to 32 of the backbone, and 64 by max pooling. RetinaNet and FCOS:
    strides 8 to 32, and 64 and 128 by convolutions of the last map, of the backbone in RetinaNet and of the pyramid in
    FCOS. Training images come resized; in evaluation the short side is resized to `size`. Batches are padded to
    multiples of 32 pixels. With FreqFusion the level of stride 64 of an R-CNN is a convolution, which is fused too.
    Detectors with queries read the maps of the backbone itself: Mask2Former and PEM all four, the others those of
    strides 8 to 32.
    """
    if detect.detector in QUERY_DETECTORS:
        masks = detect.detector in MASK_DETECTORS
        body = build_backbone(model, dense, (0, 1, 2, 3) if masks else (1, 2, 3))
        load_initial_backbone(body, model, size)
        return (MaskQueryDetector if masks else BoxQueryDetector)(body, detect, classes, size=size)
    detector_type, two_stage = DETECTORS[detect.detector], "rcnn" in detect.detector
    body = build_backbone(model, dense, (0, 1, 2, 3) if two_stage else (1, 2, 3))
    load_initial_backbone(body, model, size)
    extra: ExtraFPNBlock = LastLevelMaxPool()
    if not two_stage:
        from_backbone = detect.detector == "retinanet"
        levels = LastLevels if detect.last_level == "mmdetection" else LastLevelP6P7
        extra = levels(body.channels[-1] if from_backbone else detect.channels, detect.channels)
        # torchvision compares the numbers of channels, which can be equal by chance
        extra.use_P5 = not from_backbone
    check_kwargs(detector_type, detect)
    options = {"image_mean": body.pretrained_cfg["mean"], "image_std": body.pretrained_cfg["std"]}
    options |= {"min_size": size, "max_size": detect.max_size, "_skip_resize": True}
    options |= {**anchor_generator(detect), **detect.kwargs}
    backbone = BackboneWithFPN(body, detect.channels, extra, detect.neck)
    if detect.roi_align == "mmdetection":
        options["box_roi_pool"] = AlignedRoIAlign(body.strides, output_size=7)
        if detect.detector in WITH_MASKS:
            options["mask_roi_pool"] = AlignedRoIAlign(body.strides, output_size=14)
    if detect.loss_average == "batch":
        generator = options.setdefault("anchor_generator", _retinanet_anchors(32))
        options["head"] = BatchAveragedHead(detect.channels, generator.num_anchors_per_location()[0], classes)
    if detect.detector == "cascade_mask_rcnn":
        options["convolutions"] = detect.box_head == "convolutions"
    try:
        detector = detector_type(backbone, num_classes=classes + detector_type.first_label, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"task.detect.detector={detect.detector} cannot be built with task.detect.channels={detect.channels} and "
            f"task.detect.kwargs={detect.kwargs}: {error}"
        ) from error
    heads = [detector.head] if not two_stage else [detector.rpn.head]
    for stage in getattr(detector.roi_heads, "stages", [detector.roi_heads]) if two_stage else ():
        heads += filter(None, (stage.box_predictor, stage.mask_predictor))
    for head in heads:
        # boxes are decoded in the dtype of the head's outputs; in bfloat16 they would be off by pixels
        head.register_forward_hook(lambda module, args, out: tree_map_only(Tensor, Tensor.float, out))
    return detector


def check_kwargs(detector: type[nn.Module], detect: DetectOptions) -> None:
    """Raises UserError for unknown or invalid task.detect.kwargs.

    torchvision does not check most values; a wrong one would fail in the first evaluation, or silently do nothing.
    """
    torchvision_type = next(base for base in detector.__mro__ if base.__module__.startswith("torchvision."))
    reserved = RESERVED_KWARGS | (BY_STAGE if detect.detector == "cascade_mask_rcnn" else set())
    types = {
        name: _kwarg_type(name, parameter.default)
        for name, parameter in inspect.signature(torchvision_type.__init__).parameters.items()
        if name not in reserved and (name == "bbox_reg_weights" or type(parameter.default) in (int, float))
    }
    for key, value in detect.kwargs.items():
        if key not in types:
            raise UserError(
                f"task.detect.kwargs: {key} is not an argument of {detect.detector}, which takes "
                f"{', '.join(sorted(types))}"
            )
        try:
            adapter = TypeAdapter(types[key], config=ConfigDict(strict=True, allow_inf_nan=False))
            adapter.validate_json(json.dumps(value, default=str))  # in JSON a list is valid for a tuple
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"task.detect.kwargs: {key}={value!r} with {detect.detector}: {reason}") from error


def _kwarg_type(name: str, default: Any) -> Any:
    """The type of a numeric argument of a detector, by its default value and name."""
    if name == "bbox_reg_weights":
        return tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] | None
    if type(default) is int:
        return PositiveInt
    return Probability if name.endswith(("_thresh", "_fraction")) else PositiveFloat


def anchor_generator(detect: DetectOptions) -> dict[str, Any]:
    """The detector's argument for anchors whose smallest side is `detect.anchor`; empty for torchvision's default."""
    if detect.anchor is None:
        return {}
    if detect.detector == "retinanet":
        return {"anchor_generator": _retinanet_anchors(detect.anchor)}
    return {"rpn_anchor_generator": AnchorGenerator(tuple((detect.anchor * 2**level,) for level in range(5)), RATIOS)}


def _retinanet_anchors(smallest: int) -> AnchorGenerator:
    """Three sizes per level, at thirds of an octave; with 32, torchvision's default."""
    sizes = tuple(tuple(int(smallest * 2**level * 2 ** (third / 3)) for third in range(3)) for level in range(5))
    return AnchorGenerator(sizes, RATIOS)


def load(path: str | Path) -> nn.Module:
    """The detector in the folder `path` that a run exported, in evaluation mode on the CPU.

    See `tessel.train.tasks.detect.load`. Raises UserError if the folder has no readable export of a detector.
    """
    path = Path(path)
    parts = read_export(path, "detect", {"dense": Dense, "detect": DetectOptions})
    size, classes = parts["size"], parts["classes"]
    detector: Any = build_detector(
        parts["model"], parts["detect"], dense=parts["dense"], size=size, classes=len(classes)
    )
    load_weights(detector, path)
    detector.classes = classes
    return detector.eval()
