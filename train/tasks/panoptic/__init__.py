"""Panoptic segmentation: each pixel is of an object of a thing class, or of a stuff class. With Mask2Former or PEM.

`load(path)` reads an exported model.
"""

import typing
from pathlib import Path

from ...recipe.registry import Auto, Metric, TaskSpec
from ..detect.options import DetectData
from .options import Panoptic, conflicts

if typing.TYPE_CHECKING:
    from torch import nn


def load(path: str | Path) -> "nn.Module":
    """The model in the folder `RUN/export`, in evaluation mode on the CPU.

    It maps a list of images [3, H, W] in 0..1 to a list of segments without overlap: boxes, labels, scores and masks.
    `classes` names the labels, and `things` says which of them are objects. Raises UserError if the export cannot be
    read.
    """
    from .model import load

    return load(Path(path))


USAGE = """\
import tessel

model = tessel.load("{path}")
(result,) = model.predict("image.jpg")
print(result.summary())
for label, mask in zip(result.labels, result.masks):  # masks do not overlap
    print(f"{label}: {mask.sum()} pixels")
result.save("segments.png")
"""

SPEC = TaskSpec(
    kind="panoptic",
    summary="panoptic segmentation: objects of things, and stuff",
    options=Panoptic,
    data=DetectData,
    sample="panoptic masks",
    task="tessel.train.tasks.panoptic.task:PanopticTask",
    metric=Metric("pq", "PQ"),
    metric_names={"sq": "segmentation quality", "rq": "recognition quality"},
    conflicts=conflicts,
    load="tessel.train.tasks.panoptic:load",
    load_hint="import tessel.train.tasks.panoptic; tessel.train.tasks.panoptic.load('{path}')",
    predicts=True,
    usage=USAGE,
    report="tessel.train.report.dense",
    eval_keys=("task.detect.max_size", "task.panoptic."),
    backbone_prefix="backbone.body.body.",
    auto=Auto(batch=(4, 16), epochs=(12, 100)),
    models_of_timm=True,
)
