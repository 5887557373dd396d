"""The keys of a segmentation recipe, and the rules between them."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from ...recipe.schema import STRICT, Aug, AutoPair, Data, Dense, FilePath, Recipe, Task
from ...recipe.validation import check_range


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SegmentTest:
    mode: Literal["whole", "slide"] = "whole"
    """predict the whole image at once, or overlapping windows whose logits are averaged"""
    crop: PositiveInt | None = None
    """side of a window in pixels; null: data.size"""
    stride: PositiveInt | None = None
    """distance between windows in pixels; null: two thirds of a window"""
    flip: bool = False
    """average with the prediction of the flipped image"""
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    """average the predictions of the image resized by these factors"""
    divisor: PositiveInt | None = None
    """enlarge an image until its sides are multiples of this, for example 32"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SegmentOptions:
    decode_head: dict[str, Any] = dataclasses.field(default_factory=dict)
    """config of an mmsegmentation head, for example {type: UPerHead, channels: 512}; omit in_channels, num_classes. Or
    {type: Mask2Former}, of transformers"""
    auxiliary_head: dict[str, Any] = dataclasses.field(default_factory=dict)
    """config of a second head with its own loss, for example {type: FCNHead, channels: 256}; empty: none"""
    neck: dict[str, Any] = dataclasses.field(default_factory=dict)
    """config of a neck between backbone and heads, for example {type: FPN, out_channels: 256}; empty: none"""
    class_weight: dict[str, NonNegativeFloat] = dataclasses.field(default_factory=dict)
    """class name -> weight in the loss, for example {background: 0.2}; 1 for classes that are not listed"""
    avg_non_ignore: bool = True
    """average the cross entropy over labelled pixels; false: over all, mmsegmentation's default"""
    load_from: FilePath | None = None
    """start from the file of a published segmenter, with mmsegmentation's parameter names"""
    test: SegmentTest = SegmentTest()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Segment(Task):
    kind: str = "segment"
    """the task"""
    dense: Dense = Dense()
    segment: SegmentOptions = SegmentOptions()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SegmentAug(Aug):
    resize: tuple[float, float] = (1.0, 1.0)
    """range of the random factor on data.img_scale, before the crop"""
    cat_max_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """maximum fraction of one class in a crop; a crop with more is drawn again, up to ten times"""
    photometric: bool = False
    """random brightness, contrast, saturation and hue (mmsegmentation's PhotoMetricDistortion)"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SegmentData(Data):
    img_scale: AutoPair | None = None
    """long and short side that an image is resized to fit into, keeping its ratio; null: the size of the image; auto:
    [4 * data.size, data.size]"""
    aug: SegmentAug = SegmentAug()


def img_scale(recipe: Recipe[Segment, SegmentData]) -> tuple[int, int]:
    """The value that replaces `data.img_scale=auto`: the short side becomes `data.size`."""
    return 4 * recipe.data.size, recipe.data.size


def conflicts(recipe: Recipe[Segment, SegmentData]) -> Iterator[str]:
    """One sentence for each conflict between keys."""
    segment, test, model = recipe.task.segment, recipe.task.segment.test, recipe.model
    yield from check_range("data.aug.resize", recipe.data.aug.resize)
    for key in ("decode_head", "auxiliary_head", "neck"):
        part = getattr(segment, key)
        if (part or key == "decode_head") and not isinstance(part.get("type"), str):
            yield f"task.segment.{key} needs a type, as in {{type: {'FPN' if key == 'neck' else 'UPerHead'}, ...}}"
    if test.mode == "whole":
        for key in ("crop", "stride"):
            if getattr(test, key) is not None:
                yield f"task.segment.test.{key} has no effect with task.segment.test.mode=whole; remove it"
    elif (test.stride or 0) > (test.crop or recipe.data.size):
        yield f"task.segment.test.stride={test.stride} leaves gaps between windows; use at most the side of a window"
    if segment.load_from and (model.init_from or model.pretrained is True):
        yield (
            "task.segment.load_from includes the weights of the backbone; remove it, or model.init_from and "
            "model.pretrained"
        )
