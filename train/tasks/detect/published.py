"""Weights of published detectors, with mmdetection's names, for torchvision's R-CNNs and RetinaNet."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet

from .cascade import BOX_WEIGHTS
from .mmdetection import LastLevels

# mmdetection's names (a pattern for the whole name) and torchvision's, without the number of a stage; a head with
# convolutions has another name for its linear layer than one without
NAMES = (
    (r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.(\d+)\.conv\.(\w+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.3\.conv\.(\w+)", r"backbone.fpn.extra_blocks.p6.\1"),
    (r"neck\.fpn_convs\.4\.conv\.(\w+)", r"backbone.fpn.extra_blocks.p7.\1"),
    (r"bbox_head\.cls_convs\.(\d+)\.conv\.(\w+)", r"head.classification_head.conv.\1.0.\2"),
    (r"bbox_head\.reg_convs\.(\d+)\.conv\.(\w+)", r"head.regression_head.conv.\1.0.\2"),
    (r"bbox_head\.retina_cls\.(\w+)", r"head.classification_head.cls_logits.\1"),
    (r"bbox_head\.retina_reg\.(\w+)", r"head.regression_head.bbox_reg.\1"),
    (r"rpn_head\.rpn_conv\.(\w+)", r"rpn.head.conv.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(\w+)", r"rpn.head.cls_logits.\1"),
    (r"rpn_head\.rpn_reg\.(\w+)", r"rpn.head.bbox_pred.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.(\w+)", r"roi_heads.box_head.fc6.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.(\w+)", r"roi_heads.box_head.fc7.\1"),
    (r"roi_head\.bbox_head\.shared_convs\.(\d+)\.conv\.(\w+)", r"roi_heads.box_head.\1.0.\2"),
    (r"roi_head\.bbox_head\.shared_convs\.(\d+)\.bn\.(\w+)", r"roi_heads.box_head.\1.1.\2"),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.(\w+)", r"roi_heads.box_head.5.\1"),
    (r"roi_head\.bbox_head\.fc_cls\.(\w+)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(\w+)", r"roi_heads.box_predictor.bbox_pred.\1"),
    (r"roi_head\.mask_head\.convs\.(\d+)\.conv\.(\w+)", r"roi_heads.mask_head.\1.0.\2"),
    (r"roi_head\.mask_head\.upsample\.(\w+)", r"roi_heads.mask_predictor.conv5_mask.\1"),
    (r"roi_head\.mask_head\.conv_logits\.(\w+)", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
)

# rows of zeros that the background has in torchvision's layers and not in mmdetection's
BACKGROUND_ROWS = {"box_predictor.bbox_pred": 4, "mask_predictor.mask_fcn_logits": 1}
# mmdetection's factors of decoded boxes in the last stage of a cascade; in the other stages, they are 1 / BOX_WEIGHTS
LAST_DEVIATIONS = (0.033, 0.033, 0.067, 0.067)


def load_published(detector: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the weights of a published RetinaNet or R-CNN (Faster, Mask, Cascade Mask), with the paper's backbone names.

    The last class of mmdetection's R-CNNs is the background, torchvision's first. Anchors stay torchvision's, rounded
    to whole pixels. The last stage of a cascade predicts the same boxes, though mmdetection encodes them a little
    differently.

    Raises ValueError naming weights that are missing, unknown or of another shape, for a RetinaNet with torchvision's
    last level, and for the other detectors. mmdetection's FCOS, for one, scales the boxes of each level by a weight
    that torchvision's does not have.
    """
    retinanet = isinstance(detector, RetinaNet)
    if not retinanet and not hasattr(detector, "roi_heads"):
        raise ValueError(
            f"published weights of {type(detector).__name__} are not read, only those of R-CNNs and RetinaNet"
        )
    if retinanet and not any(isinstance(module, LastLevels) for module in detector.modules()):
        raise ValueError(
            "published RetinaNets have no ReLU below their last level; add the argument "
            "task.detect.last_level=mmdetection"
        )
    body: Any = detector.get_submodule("backbone.body")
    own = {key: tensor for key, tensor in detector.state_dict().items() if not key.startswith("backbone.body.")}
    heads, unknown = {}, []
    for key, tensor in body.load_published(state).items():
        name = next((name for name in torchvision_names(key.removeprefix("module.")) if name in own), None)
        if name is None:
            unknown.append(key)
            continue
        layer = ".".join(name.split(".")[-3:-1])
        if layer == "box_predictor.cls_score":
            tensor = tensor.roll(1, 0)
        if name.startswith("roi_heads.stages.2.") and layer == "box_predictor.bbox_pred":
            factors = tensor.new_tensor(BOX_WEIGHTS[2]) * tensor.new_tensor(LAST_DEVIATIONS)
            tensor = tensor * factors.repeat(len(tensor) // 4).view(-1, *[1] * (tensor.ndim - 1))
        rows = BACKGROUND_ROWS.get(layer, 0)
        # a layer that predicts one box for all classes has none for the background
        if rows and len(own[name]) > rows:
            tensor = torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor])
        heads[name] = tensor
    if unknown:
        raise ValueError(
            f"it has {len(unknown)} weights that the model does not have: {', '.join(sorted(unknown)[:5])}"
        )
    if missing := sorted(own.keys() - heads.keys()):
        raise ValueError(f"it lacks {len(missing)} weights of the model: {', '.join(missing[:5])}")
    for key, tensor in heads.items():
        if tensor.shape != own[key].shape:
            raise ValueError(f"{key} has the shape {list(tensor.shape)}, in the model {list(own[key].shape)}")
    detector.load_state_dict(detector.state_dict() | heads)


def torchvision_names(key: str) -> list[str]:
    """torchvision's names of a weight, of which a detector has one at most."""
    # mmdetection numbers the heads of a cascade, here its stages are numbered
    prefix, number = "roi_heads.", re.match(r"roi_head\.(?:bbox|mask)_head\.(\d+)\.", key)
    if number:
        prefix = f"roi_heads.stages.{number[1]}."
        key = key[: number.start(1)] + key[number.end() :]
    found = [match.expand(name) for pattern, name in NAMES if (match := re.fullmatch(pattern, key))]
    return [name.replace("roi_heads.", prefix) for name in found]
