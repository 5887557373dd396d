"""The keys of a detection recipe, and the rules between them."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from ...recipe.schema import STRICT, Aug, Data, Dense, Recipe, Task

WITH_MASKS = ("mask_rcnn", "cascade_mask_rcnn", "mask2former", "pem")  # detectors that learn instance masks
WITHOUT_ANCHORS = ("fcos", "mask2former", "pem", "rtdetrv2", "d_fine", "deformable_detr")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DetectOptions:
    detector: Literal[
        "faster_rcnn",
        "mask_rcnn",
        "cascade_mask_rcnn",
        "retinanet",
        "fcos",
        "mask2former",
        "pem",
        "rtdetrv2",
        "d_fine",
        "deformable_detr",
    ] = "fcos"
    """detector of torchvision's parts (the first five), of transformers, or PEM; mask_rcnn, cascade_mask_rcnn,
    mask2former and pem also learn instance masks"""
    channels: PositiveInt = 256
    """channels of the feature pyramid and of the heads"""
    neck: dict[str, Any] = dataclasses.field(default_factory=dict)
    """{type: FreqFusion, ...}: fuse the levels of the pyramid by FreqFusion; empty: torchvision's pyramid"""
    anchor: PositiveInt | None = None
    """side of the smallest anchors in pixels, doubled from level to level; null: 32; fcos has no anchors"""
    min_size: tuple[PositiveInt, ...] | None = None
    """short sides to train with, one is drawn per image; null: data.size, which evaluation uses"""
    max_size: PositiveInt = 1333
    """maximum long side; an image that would exceed it is resized to it instead"""
    crop: tuple[PositiveInt, PositiveInt] | None = None
    """minimum and maximum side of a random crop before resizing, applied with probability 0.5"""
    empty: bool = False
    """also train on images without objects; crowds do not count as objects"""
    roi_align: Literal["torchvision", "mmdetection"] = "torchvision"
    """how an R-CNN pools boxes: torchvision's default, or aligned and with a sample per pixel as in mmdetection"""
    box_head: Literal["linear", "convolutions"] = "linear"
    """box heads of cascade_mask_rcnn: two linear layers, one box for all classes and smooth L1 as in its paper; or four
    convolutions with batch norm and a linear layer, a box per class and the GIoU loss as in papers since Swin"""
    loss_average: Literal["image", "batch"] = "image"
    """average RetinaNet's losses over the anchors of each image, or of the micro-batch as in mmdetection"""
    last_level: Literal["torchvision", "mmdetection"] = "torchvision"
    """RetinaNet's map of stride 128: a convolution of that of stride 64, after a ReLU as in torchvision, or without one
    as in mmdetection and in published weights"""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """further arguments of torchvision's detector, for example {score_thresh: 0.1}, or settings of transformers', for
    example {num_queries: 300}"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Detect(Task):
    kind: str = "detect"
    """the task"""
    dense: Dense = Dense()
    detect: DetectOptions = DetectOptions()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DetectAug(Aug):
    color_jitter: NonNegativeFloat = 0.0
    """strength of random brightness, contrast and saturation"""
    photometric: bool = False
    """random brightness, contrast, saturation and hue (mmsegmentation's PhotoMetricDistortion)"""
    crop: PositiveInt | None = None
    """side of a random square crop after resizing, in pixels; smaller images are padded at the right and the bottom"""
    scale_jitter: tuple[PositiveFloat, PositiveFloat] | None = None
    """large-scale jittering: an image is resized to fit into the crop, times a random factor between these two"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DetectData(Data):
    aug: DetectAug = DetectAug()


def sample(task: Detect) -> str:
    """The kind of sample that the detector learns from."""
    return "instance masks" if task.detect.detector in WITH_MASKS else "boxes"


def conflicts(recipe: Recipe[Detect, DetectData]) -> Iterator[str]:
    """One sentence for each conflict between keys."""
    detect = recipe.task.detect
    if detect.detector in WITHOUT_ANCHORS and detect.anchor:
        yield f"task.detect.anchor has no effect with task.detect.detector={detect.detector}; remove it"
    if detect.roi_align != "torchvision" and "rcnn" not in detect.detector:
        yield f"task.detect.roi_align has no effect with task.detect.detector={detect.detector}; remove it"
    if detect.box_head != "linear" and detect.detector != "cascade_mask_rcnn":
        yield f"task.detect.box_head has no effect with task.detect.detector={detect.detector}; remove it"
    if detect.loss_average != "image" and detect.detector != "retinanet":
        yield f"task.detect.loss_average has no effect with task.detect.detector={detect.detector}; remove it"
    if detect.last_level != "torchvision" and detect.detector != "retinanet":
        yield f"task.detect.last_level has no effect with task.detect.detector={detect.detector}; remove it"
    if detect.detector == "fcos" and (detect.channels % 32 or detect.channels < 64):
        # its group norms have 32 groups; groups of one value would be normalized to zero on a map of one pixel
        yield f"task.detect.channels={detect.channels}: task.detect.detector=fcos needs a multiple of 32, at least 64"
    if detect.detector == "pem" and detect.channels % 8:
        yield f"task.detect.channels={detect.channels}: task.detect.detector=pem needs a multiple of 8"
    if detect.detector in ("mask2former", "deformable_detr") and (detect.channels % 32 or detect.channels < 64):
        needs = f"task.detect.detector={detect.detector} needs a multiple of 32, at least 64"
        yield f"task.detect.channels={detect.channels}: {needs}"
    if detect.neck and detect.neck.get("type") != "FreqFusion":
        yield f"task.detect.neck={detect.neck}: there is one neck, {{type: FreqFusion}}; remove it for torchvision's"
    if detect.neck and detect.detector in WITHOUT_ANCHORS and detect.detector != "fcos":
        yield f"task.detect.neck has no effect with task.detect.detector={detect.detector}; remove it"
    if clash := sorted({"out_channels", "fuse"} & detect.neck.keys()):
        yield f"task.detect.neck does not take {clash[0]}; task.detect.channels are the channels of the pyramid"
    if detect.crop and detect.crop[0] > detect.crop[1]:
        yield f"task.detect.crop={list(detect.crop)} must be two numbers, the smaller one first"
    if jitter := recipe.data.aug.scale_jitter:
        if jitter[0] > jitter[1]:
            yield f"data.aug.scale_jitter={list(jitter)} must be two numbers, the smaller one first"
        if not recipe.data.aug.crop:
            yield "data.aug.scale_jitter needs data.aug.crop, for example 1024"
        for key in ("min_size", "crop"):
            if getattr(detect, key):
                yield f"task.detect.{key} has no effect with data.aug.scale_jitter; remove one of them"
