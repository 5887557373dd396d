"""The keys of a classification recipe, and the rules between them."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from ...recipe.schema import STRICT, Aug, Data, Probability, Recipe, Task
from ...recipe.validation import check_range


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Distill:
    teacher: str | None = None
    """also learn from this model: a timm name with weights, or local-dir:RUN/export; null: no distillation"""
    kind: Literal["soft", "hard"] = "soft"
    """match the probabilities of the teacher, or its most probable class"""
    weight: Probability = 0.5
    """weight of the teacher's loss; the loss of the labels has 1 - weight"""
    temperature: PositiveFloat = 1.0
    """divides the logits of teacher and student, with kind=soft"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Probing:
    """How a probe with a pooling reads the features; see docs/probing.md."""

    maps: tuple[int, ...] | None = None
    """feature maps that the probe reads, as timm numbers them, -1: the last; null: the features, with the final norm"""
    class_tokens: bool = False
    """also read the mean of the class tokens, for models that have some"""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """arguments of the pooling, for example {queries: 16}"""


PROBES = Literal[
    "linear", "attentive", "ep", "abmilp", "aim", "cae", "cait", "cbam", "clip", "coca", "dinovit", "dolg", "esimpool",
    "jepa", "siglip", "simpool",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Classifier(Task):
    """The keys that classification with one class and with several labels per image share."""

    num_classes: Annotated[int, Field(ge=2)] | None = None
    """checked against the data; null: the number of classes in the data"""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """label smoothing"""
    probe: PROBES | None = None
    """freeze the model and train its classifier (linear), or a new one with this attention pooling of feature maps"""
    probing: Probing = Probing()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Classify(Classifier):
    kind: str = "classify"
    """the task"""
    loss: Literal["ce", "bce"] = "ce"
    """softmax cross entropy, or binary cross entropy per class"""
    distill: Distill = Distill()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MultiLabel(Classifier):
    kind: str = "multilabel"
    """the task"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClassifyAug(Aug):
    scale: tuple[float, float] = (1.0, 1.0)
    """area range of the random resized crop; [1, 1]: no crop"""
    ratio: tuple[float, float] = (1.0, 1.0)
    """aspect ratio range of the crop"""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """random rotation, up to +- degrees"""
    translate: Probability = 0.0
    """random translation, up to +- this fraction of the side"""
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """random scale in 1 +- this"""
    shear: Annotated[float, Field(ge=0, lt=90)] = 0.0
    """random shear, up to +- degrees"""
    color_jitter: NonNegativeFloat = 0.0
    """strength of random brightness, contrast and saturation; not together with auto_augment"""
    auto_augment: str | None = None
    """timm policy, for example rand-m9-mstd0.5-inc1"""
    erasing: Probability = 0.0
    """probability of random erasing, done on the device"""
    erase_after_mixing: bool = False
    """erase after mixup and cutmix instead of before, so that an erased region holds noise only"""
    mixup: NonNegativeFloat = 0.0
    """alpha of mixup, done on the device; 0: off"""
    cutmix: NonNegativeFloat = 0.0
    """alpha of cutmix, done on the device; 0: off"""
    mix_prob: Probability = 1.0
    """probability that a micro-batch is mixed"""
    switch_prob: Probability = 0.5
    """probability of cutmix instead of mixup if both are on"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClassifyData(Data):
    decoder: Literal["pil", "torchcodec"] = "pil"
    """what decodes and crops training images; torchcodec (to be installed) is faster, its crops differ by a level"""
    interpolation: Literal["bilinear", "bicubic", "random"] | None = None
    """null: that of the model"""
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    """center crop in evaluation, as a fraction of the resized image; null: that of the model"""
    mean: tuple[float, ...] | None = None
    """mean of each channel, where the highest value of the files' type counts as 1; null: that of the model"""
    std: tuple[PositiveFloat, ...] | None = None
    """standard deviation of each channel, in the same unit; null: that of the model"""
    aug: ClassifyAug = ClassifyAug()


def classifier_conflicts(recipe: Recipe[Any, ClassifyData]) -> Iterator[str]:
    """One sentence for each conflict between keys, with one class or several labels per image."""
    data, aug, task, channels = recipe.data, recipe.data.aug, recipe.task, recipe.model.in_chans or 3
    if aug.auto_augment and aug.color_jitter:
        yield "data.aug.color_jitter has no effect together with data.aug.auto_augment; remove one of them"
    yield from check_range("data.aug.scale", aug.scale)
    yield from check_range("data.aug.ratio", aug.ratio)
    if channels != 3 and data.decoder == "torchcodec":
        yield f"data.decoder=torchcodec reads 3 channels, not model.in_chans={channels}; use data.decoder=pil"
    if channels not in (1, 3):
        for key, off in (("auto_augment", "null"), ("color_jitter", "0")):
            if getattr(aug, key):
                yield (
                    f"data.aug.{key} changes colors, which images of model.in_chans={channels} have not; set "
                    f"data.aug.{key}={off}"
                )
    if (data.mean is None) != (data.std is None):
        yield "give both data.mean and data.std, or none of them"
    for key, values in (("mean", data.mean), ("std", data.std)):
        if values is not None and len(values) not in (1, channels):
            yield f"data.{key} has {len(values)} values, but the images have {channels} channels; give one for each"
    if task.probe in (None, "linear", "attentive") and task.probing != Probing():
        yield f"task.probing has no effect with task.probe={task.probe or 'null'}; set task.probe=ep, or remove it"
    if task.probing.maps is not None and not task.probing.maps:
        yield "task.probing.maps=[] reads nothing; give at least one map, or null"
    if task.probe:
        frozen = {
            "model.drop_path_rate": recipe.model.drop_path_rate,
            "model.freeze": recipe.model.freeze,
            "sched.freeze": recipe.sched.freeze or None,
        }
        for key, value in frozen.items():
            if value is not None:
                yield f"{key} has no effect with task.probe={task.probe}, which freezes the model; remove it"


def conflicts(recipe: Recipe[Classify, ClassifyData]) -> Iterator[str]:
    """One sentence for each conflict between keys."""
    yield from classifier_conflicts(recipe)
    distill = recipe.task.distill
    if not distill.teacher and distill != Distill():
        yield "task.distill has no effect without task.distill.teacher"
    if distill.kind == "hard" and distill.temperature != 1:
        yield "task.distill.temperature has no effect with task.distill.kind=hard; remove it"
