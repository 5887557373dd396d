"""What a recipe must not say: keys that contradict one another, or that have no effect beside another.

A key without effect is refused rather than ignored: whoever wrote it expects something of it. Let pass are those that
say how a thing is done which another key switches off (`sched.warmup_lr` beside `sched.warmup=0`), as one does on the
command line with a recipe that says how.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from .schema import Aug, Data, Dense, Detect, Distill, Recipe, Segment

# what a schedule reads beside its length, warm-up and end
SCHED_KEYS = {"step": {"decay_rate", "decay_steps"}, "multistep": {"decay_rate", "milestones"}, "poly": {"decay_rate"}}


SCHED_KEYS |= {"wsd": {"decay_steps"}, "rsqrt": {"decay_steps"}}


# timm's optimizers that mix whole tensors with shards, or change them by operations that shards do not have
UNSHARDED = ("adafactor", "adamp", "sgdp")


SOURCES = {  # of each task
    "classify": ("digits", "folder", "tar", "wds", "hfds", "tfds"),
    "segment": ("ade20k", "cityscapes", "voc2012", "voc2012_aug", "digit_scenes"),
    "detect": ("coco", "voc2012", "digit_scenes"),
}


# augmentations of each task
SEGMENT_AUG = {"resize", "crop_share", "photometric"}


TASK_AUG = {
    "classify": {field.name for field in dataclasses.fields(Aug)} - SEGMENT_AUG,
    "segment": SEGMENT_AUG | {"hflip", "vflip", "repeats"},
    "detect": {"hflip", "vflip", "color_jitter", "repeats"},
}


def contradictions(recipe: Recipe) -> Iterator[str]:
    """What is wrong with a recipe, a sentence each."""
    for check in (_general, _idle_keys, _foreign_keys):
        yield from check(recipe)
    yield from _sources(recipe.data)


def _general(recipe: Recipe) -> Iterator[str]:
    aug, optim, sched, parallel = recipe.data.aug, recipe.optim, recipe.sched, recipe.parallel
    if (sched.epochs is None) == (sched.steps is None):
        yield "give one of sched.epochs and sched.steps"
    for key in ("decay_rate", "decay_steps", "milestones"):
        if getattr(sched, key) is not None and key not in SCHED_KEYS.get(sched.name, ()):
            yield f"sched.{key} has no effect with sched.name={sched.name}; remove it"
    for name, key in (("multistep", "milestones"), ("step", "decay_steps")):
        if sched.name == name and not getattr(sched, key):
            yield f"sched.name={name} needs sched.{key}"
    if aug.auto_augment and aug.color_jitter:
        yield "data.aug.color_jitter has no effect beside data.aug.auto_augment; remove one"
    if parallel.shard and parallel.strategy != "hsdp":
        yield f"parallel.shard has no effect with parallel.strategy={parallel.strategy}; remove it"
    if parallel.precision == "fp16" and parallel.strategy != "ddp":
        yield f"parallel.precision=fp16 cannot scale the loss of parallel.strategy={parallel.strategy}; use bf16"
    if parallel.strategy != "ddp" and optim.name in UNSHARDED:
        yield f"optim.name={optim.name} cannot update shards; take adamw, or parallel.strategy=ddp"
    for key, pair in (("scale", aug.scale), ("ratio", aug.ratio), ("resize", aug.resize)):
        if not 0 < pair[0] <= pair[1]:
            yield f"data.aug.{key}={list(pair)} is no rising range above 0"
    if optim.name.startswith("lookahead"):
        yield f"optim.name={optim.name} keeps weights that no checkpoint holds; use {optim.name.partition('_')[2]}"
    if optim.name == "adahessian":
        yield "optim.name=adahessian needs second derivatives, which this trainer does not take; use adamw"


def _sources(data: Data) -> Iterator[str]:
    """What a source of data needs and what it does not look at."""
    places = {
        "folder": "train/CLASS/ and val/CLASS/",
        "tar": "train/*.tar and val/*.tar",
        "wds": "train/*.tar and val/*.tar",
        "ade20k": "images/ and annotations/",
        "cityscapes": "leftImg8bit/ and gtFine/",
        "coco": "annotations/, train2017/ and val2017/",
        "voc2012": "JPEGImages/, SegmentationClass/ or Annotations/, and ImageSets/",
        "voc2012_aug": "JPEGImages/, SegmentationClassAug/ and ImageSets/",
    }
    if data.source in places and not data.root:
        yield f"data.source={data.source} needs data.root, a folder with {places[data.source]}"
    if data.source in ("hfds", "tfds") and not data.name:
        yield f"data.source={data.source} needs data.name"
    dense = {*SOURCES["segment"], *SOURCES["detect"]}
    idle = {"name": ("digits", "folder", "tar", "wds", *dense), "class_map": ("digits", "folder", *dense)}
    idle |= {"root": ("digits", "digit_scenes")}
    idle |= dict.fromkeys(("input_key", "target_key"), ("digits", "folder", "tar", *dense))
    idle |= dict.fromkeys(("train_split", "val_split"), ("digits", *dense))
    for key, sources in idle.items():
        if getattr(data, key) is not None and data.source in sources:
            yield f"data.{key} has no effect with data.source={data.source}; remove it"


def _idle_keys(recipe: Recipe) -> Iterator[str]:
    """Keys of transfer and schedule that another key switches off."""
    model, task, distill, sched = recipe.model, recipe.task, recipe.task.distill, recipe.sched
    if model.init_from and model.pretrained:
        yield "model.pretrained has no effect beside model.init_from; remove one"
    if task.probe:
        for key, value in (("optim.layer_decay", recipe.optim.layer_decay), ("model.drop_path", model.drop_path)):
            if value is not None:
                yield f"{key} has no effect with task.probe={task.probe}, which freezes the model; remove it"
    if not distill.teacher and distill != Distill():
        yield "task.distill has no effect without task.distill.teacher"
    if distill.kind == "hard" and distill.temperature != 1:
        yield "task.distill.temperature has no effect with task.distill.kind=hard; remove it"
    if sched.cooldown and sched.name not in ("cosine", "poly", "tanh"):
        yield f"sched.cooldown has no effect with sched.name={sched.name}; remove it"


def _foreign_keys(recipe: Recipe) -> Iterator[str]:
    """Keys of another task than the recipe's."""
    task, data, kind = recipe.task, recipe.data, recipe.task.kind
    if data.source not in SOURCES[kind]:
        yield f"data.source={data.source} is not for task.kind={kind}, which takes {', '.join(SOURCES[kind])}"
    changed = ((key, value) for key, value in _changed(data.aug, Aug()) if key not in TASK_AUG[kind])
    idle: dict[str, Any] = {f"data.aug.{key}": value for key, value in changed}
    if kind != "segment":
        idle |= {"data.fit": data.fit}
    if kind != "classify":
        idle |= {"data.interpolation": data.interpolation, "data.crop_pct": data.crop_pct}
        others = ("num_classes", "loss", "smoothing", "probe", "distill")
        idle |= {f"task.{key}": value for key, value in _changed(task, type(task)()) if key in others}
    for key, value in idle.items():
        if value is not None:
            yield f"{key} has no effect with task.kind={kind}; remove it"
    if kind == "classify" and task.dense != Dense():
        yield "task.dense has no effect with task.kind=classify; remove it"
    if kind != "segment" and task.segment != Segment():
        yield f"task.segment has no effect with task.kind={kind}; remove it"
    if kind != "detect" and task.detect != Detect():
        yield f"task.detect has no effect with task.kind={kind}; remove it"
    if kind == "segment":
        yield from _segment_problems(recipe)
    if kind == "detect":
        yield from _detect_problems(recipe)


def _segment_problems(recipe: Recipe) -> Iterator[str]:
    segment = recipe.task.segment
    for key in ("decode_head", "auxiliary_head", "neck"):
        part = getattr(segment, key)
        if (part or key == "decode_head") and not isinstance(part.get("type"), str):
            yield f"task.segment.{key} needs a type, as in {{type: {'FPN' if key == 'neck' else 'UPerHead'}, ...}}"
    if segment.test.mode == "whole":
        for key in ("crop", "stride"):
            if getattr(segment.test, key) is not None:
                yield f"task.segment.test.{key} has no effect with task.segment.test.mode=whole; remove it"
    elif (segment.test.stride or 0) > (segment.test.crop or recipe.data.size):
        yield f"task.segment.test.stride={segment.test.stride} leaves gaps between windows; make it the window or less"
    if segment.load_from and (recipe.model.init_from or recipe.model.pretrained):
        yield "task.segment.load_from has the backbone's weights too; remove it or model.init_from and model.pretrained"


def _detect_problems(recipe: Recipe) -> Iterator[str]:
    detect, source = recipe.task.detect, recipe.data.source
    if detect.detector == "fcos" and detect.anchor:
        yield "task.detect.anchor has no effect with task.detect.detector=fcos; remove it"
    if detect.detector == "fcos" and (detect.channels % 32 or detect.channels < 64):
        # its group norms have 32 groups, and one value in each would be nothing to compare on a map of one pixel
        yield f"task.detect.channels={detect.channels}: task.detect.detector=fcos takes multiples of 32 from 64 on"
    if detect.detector == "mask_rcnn" and source == "voc2012":
        yield "task.detect.detector=mask_rcnn needs masks, which data.source=voc2012 has not; use faster_rcnn"
    if detect.crop and detect.crop[0] > detect.crop[1]:
        yield f"task.detect.crop={list(detect.crop)} is no rising range"
    for key in ("train", "val"):
        if source != "coco" and getattr(detect, key) != getattr(Detect(), key):
            yield f"task.detect.{key} has no effect with data.source={source}; remove it"
    if source == "digit_scenes" and detect.empty:
        yield "task.detect.empty has no effect with data.source=digit_scenes, of which none is empty; remove it"


def _changed(section: Any, default: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) where a section is not as by default."""
    for field in dataclasses.fields(section):
        if (value := getattr(section, field.name)) != getattr(default, field.name):
            yield field.name, value
