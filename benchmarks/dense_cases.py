"""Heads for dense tasks on a backbone, with inputs and targets of natural size. See dense.py."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from tessel import zoo
from tessel.train.recipe.schema import Dense, Model
from tessel.train.tasks.detect.detectors import build_detector
from tessel.train.tasks.detect.options import DetectOptions
from tessel.train.tasks.segment.model import Segmenter, build_segmenter
from tessel.train.tasks.segment.options import SegmentOptions


class Case(NamedTuple):
    """A head at one image size.

    min_batch: for training; some heads have a batch norm on maps of one pixel. meta: its multiply-adds can be counted
    without computing; heads of transformers make tensors on the CPU.
    """

    task: str
    height: int
    width: int
    build: Callable[[str, int, int], Any]
    classes: int
    min_batch: int = 1
    segments: bool = True
    meta: bool = False


def options(name: str, height: int, width: int) -> tuple[dict[str, Any], tuple[bool, ...] | None]:
    """(kwargs, dense.norms) of a backbone: the norms of the paper, or for a model of timm one on each output."""
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size
    norms = None if name in zoo.list_models() else (True,) * 4
    return ({"img_size": (height, -(-width // 32) * 32)} if fixed else {}), norms


def segmenter(name: str, height: int, width: int, *, classes: int = 150, **heads: dict[str, Any]) -> Segmenter:
    """heads: decode_head, auxiliary_head and neck, as in a recipe."""
    arguments, norms = options(name, height, width)
    names = [str(number) for number in range(classes)]
    model = Model(name=name, kwargs=arguments)
    return build_segmenter(model, SegmentOptions(**heads), dense=Dense(norms=norms), classes=names)


def upernet(name: str, height: int, width: int, *, channels: int = 512) -> Segmenter:
    auxiliary = {"type": "FCNHead", "channels": channels // 2, "num_convs": 1, "concat_input": False}
    auxiliary |= {"loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 0.4}}
    head = {"type": "UPerHead", "channels": channels}
    return segmenter(name, height, width, decode_head=head, auxiliary_head=auxiliary)


def detector(
    name: str, height: int, width: int, *, kind: str, classes: int = 90, channels: int = 256, **kwargs: Any
) -> Any:
    """kwargs: task.detect.kwargs of a recipe."""
    arguments, norms = options(name, height, width)
    if kind != "mask_rcnn":  # the others read three maps
        norms = norms and norms[1:]
    detect = DetectOptions(detector=kind, max_size=width, channels=channels, kwargs=kwargs)
    model = Model(name=name, kwargs=arguments)
    return build_detector(model, detect, dense=Dense(norms=norms), size=height, classes=classes)


def mask_rcnn(name: str, height: int, width: int, **kwargs: int) -> Any:
    found = detector(name, height, width, kind="mask_rcnn", **kwargs)
    # a high bias makes every proposal an object of the first class, so that the mask head gets as many as possible
    nn.init.constant_(found.roi_heads.box_predictor.cls_score.bias[1:2], 10)
    return found


def segment_case(task: str, side: int, **heads: dict[str, Any]) -> Case:
    return Case(task, side, side, partial(segmenter, **heads), 150, 2)


def detect_case(task: str, side: int, **arguments: Any) -> Case:
    return Case(task, side, side, partial(detector, kind=task, **arguments), 90, 1, segments=False)


FPN: dict[str, Any] = {"type": "FPNHead", "channels": 128}
CASES = {
    "upernet": Case("upernet", 512, 512, upernet, 150, 2, meta=True),
    "mask_rcnn": Case("mask_rcnn", 800, 1333, mask_rcnn, 90, segments=False, meta=True),
    "fpn": segment_case("fpn", 512, decode_head=FPN),
    "freqfusion": segment_case("freqfusion", 512, neck={"type": "FreqFusion"}, decode_head=FPN),
    "pem": segment_case("pem", 512, decode_head={"type": "PEM"}),
    "mask2former": segment_case("mask2former", 512, decode_head={"type": "Mask2Former"}),
    **{kind: detect_case(kind, 640) for kind in ("fcos", "rtdetrv2", "d_fine", "deformable_detr")},
}

SMALL_BATCHES = {"rpn_post_nms_top_n_train": 32, "rpn_post_nms_top_n_test": 32, "box_batch_size_per_image": 8}
SMALL_MASKS = {"num_queries": 8, "hidden_dim": 32, "mask_feature_size": 32, "dim_feedforward": 32}
SMALL_MASKS |= {"decoder_layers": 4, "train_num_points": 64}
SMALL_BOXES = {"channels": 64, "num_queries": 20, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SMALL_FPN = {**FPN, "channels": 16}
DRY_CASES = {
    "upernet": CASES["upernet"]._replace(height=64, width=64, build=partial(upernet, channels=16)),
    "mask_rcnn": CASES["mask_rcnn"]._replace(
        height=64, width=96, build=partial(mask_rcnn, box_detections_per_img=4, **SMALL_BATCHES)
    ),
    "fpn": segment_case("fpn", 64, decode_head=SMALL_FPN),
    "freqfusion": segment_case(
        "freqfusion", 64, neck={"type": "FreqFusion", "out_channels": 16}, decode_head=SMALL_FPN
    ),
    "pem": segment_case("pem", 64, decode_head={"type": "PEM", "feature_size": 16, **SMALL_MASKS}),
    "mask2former": segment_case(
        "mask2former", 64, decode_head={"type": "Mask2Former", "feature_size": 64, "encoder_layers": 1, **SMALL_MASKS}
    ),
    "fcos": detect_case("fcos", 64, channels=64),
    "rtdetrv2": detect_case("rtdetrv2", 64, num_denoising=10, **SMALL_BOXES),
    "d_fine": detect_case("d_fine", 64, num_denoising=10, **SMALL_BOXES),
    "deformable_detr": detect_case("deformable_detr", 64, encoder_layers=1, **SMALL_BOXES),
}
# the cases of `dense.py --heads`; the others compare backbones
HEADS = ("fpn", "freqfusion", "pem", "mask2former", "fcos", "rtdetrv2", "d_fine", "deformable_detr")


def masks(case: Case, batch: int, device: str) -> Tensor:
    """Random semantic masks [B, H, W]: of pixels, or for heads that match objects of 16 rectangles in an image."""
    if case.task not in ("pem", "mask2former"):
        return torch.randint(case.classes, (batch, case.height, case.width), device=device)
    parts = torch.randint(case.classes, (batch, 1, 4, 4), device=device)
    return nn.functional.interpolate(parts.float(), (case.height, case.width))[:, 0].long()


def objects(case: Case, batch: int, device: str) -> list[dict[str, Tensor]]:
    """Targets with eight random boxes per image, and the filled boxes as masks."""
    sides = torch.tensor([case.width, case.height])
    found = []
    for _ in range(batch):
        corners = torch.rand(8, 2) * sides / 2
        boxes = torch.cat([corners, corners + sides / 4], -1).round()
        filled = torch.zeros(8, case.height, case.width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(filled, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        target = {"boxes": boxes, "labels": torch.randint(case.classes, (8,)), "masks": filled}
        found.append({key: tensor.to(device) for key, tensor in target.items()})
    return found


def criterion(model: Any) -> tuple[Any, str] | None:
    """The object and the name of its attribute that matches queries with objects and computes the losses, if any."""
    head = getattr(model, "decode_head", None) or getattr(model, "head", None)
    if hasattr(head, "criterion"):
        return head, "criterion"
    if hasattr(head, "library"):
        return head.library, "loss_function"
    return None
