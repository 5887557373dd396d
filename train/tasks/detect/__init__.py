"""Object detection and instance segmentation with detectors of torchvision and transformers on any backbone.

`load(path)` reads an exported detector.
"""

import typing
from pathlib import Path

from ...recipe.registry import Auto, Metric, TaskSpec
from .options import Detect, DetectData, conflicts, sample

if typing.TYPE_CHECKING:
    from torch import nn


def load(path: str | Path) -> "nn.Module":
    """The detector in the folder `RUN/export`, in evaluation mode on the CPU.

    It maps a list of images [3, H, W] in 0..1 to a list of boxes, labels, scores and, with mask_rcnn,
    cascade_mask_rcnn, mask2former or pem, masks; `classes` names the labels. Raises UserError if the export cannot
    be read.
    """
    from .detectors import load

    return load(Path(path))


USAGE = """\
import tessel

model = tessel.load("{path}")
(result,) = model.predict("image.jpg", min_score=0.3)
for label, score, box in zip(result.labels, result.scores, result.boxes):
    print(f"{label} {score:.2f} at {box.tolist()}")  # left, top, right, bottom in pixels
result.save("objects.png")  # the image with its boxes
"""

SPEC = TaskSpec(
    kind="detect",
    summary="object detection and instance segmentation",
    options=Detect,
    data=DetectData,
    sample=sample,
    task="tessel.train.tasks.detect.task:DetectTask",
    metric=Metric("box_ap", "box AP"),
    metric_names={"mask_ap": "mask AP"},
    conflicts=conflicts,
    load="tessel.train.detect:load",
    load_hint="import tessel.train.detect; tessel.train.detect.load('{path}')",
    predicts=True,
    usage=USAGE,
    report="tessel.train.report.dense",
    eval_keys=("task.detect.max_size", "task.detect.kwargs"),
    backbone_prefix="backbone.body.body.",
    auto=Auto(batch=(4, 16), epochs=(12, 100)),
    models_of_timm=True,
)
