"""Semantic segmentation: one class per pixel, with mmsegmentation's heads on a backbone of timm or tessel.

`load(path)` reads an exported segmenter.
"""

import typing
from pathlib import Path

from ...recipe.registry import Auto, Metric, TaskSpec
from .options import Segment, SegmentData, conflicts, img_scale

if typing.TYPE_CHECKING:
    from .model import Segmenter


def load(path: str | Path) -> "Segmenter":
    """The segmenter in the folder `RUN/export`, in evaluation mode on the CPU.

    It maps images [B, 3, H, W], normalized with the mean and std in `pretrained_cfg`, to logits [B, classes, H, W]. Its
    attributes `classes` and `palette` are the names and colors of the classes. Raises UserError if the export cannot be
    read.
    """
    from .export import load

    return load(Path(path))


USAGE = """\
import tessel

model = tessel.load("{path}")  # resizes images as the evaluation did
(result,) = model.predict("image.jpg")
print(result.summary())  # share of the pixels of each class
print(result.mask.shape)  # [H, W], indices into result.classes
result.save("overlay.png")  # the image under the colors of its classes
"""

SPEC = TaskSpec(
    kind="segment",
    summary="semantic segmentation",
    options=Segment,
    data=SegmentData,
    sample="semantic masks",
    task="tessel.train.tasks.segment.task:SegmentTask",
    metric=Metric("miou", "mIoU"),
    metric_names={"iou": "IoU", "acc": "accuracy"},
    conflicts=conflicts,
    load="tessel.train.segment:load",
    load_hint="import tessel.train.segment; tessel.train.segment.load('{path}')",
    predicts=True,
    usage=USAGE,
    report="tessel.train.report.dense",
    eval_keys=("task.segment.test.",),
    init_keys=("task.segment.load_from",),
    backbone_prefix="backbone.body.",
    auto=Auto(batch=(4, 16), epochs=(12, 100), keys={"data.img_scale": img_scale}),
    models_of_timm=True,
)
