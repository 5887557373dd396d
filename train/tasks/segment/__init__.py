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
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import normalize, pil_to_tensor

import tessel.train.segment

model = tessel.train.segment.load("{path}")
image = pil_to_tensor(ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")) / 255
with torch.inference_mode():
    logits = model(normalize(image, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])[None])
mask = logits[0].argmax(0)  # [H, W], indices into model.classes
print([model.classes[index] for index in mask.unique()])
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
    usage=USAGE,
    report="tessel.train.report.dense",
    eval_keys=("task.segment.test.",),
    init_keys=("task.segment.load_from",),
    backbone_prefix="backbone.body.",
    auto=Auto(batch=(4, 16), epochs=(12, 100), keys={"data.img_scale": img_scale}),
    models_of_timm=True,
)
