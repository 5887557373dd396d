"""Image classification: one class per image."""

from ...recipe.registry import Metric, TaskSpec
from .options import Classify, ClassifyData, conflicts

USAGE = """\
import timm
import torch
from PIL import Image, ImageOps

import tessel.zoo  # registers the models with timm

model = timm.create_model("local-dir:{path}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB"))
with torch.inference_mode():
    probabilities = model(image[None]).softmax(1)[0]
labels = model.pretrained_cfg["label_names"]
for probability, label in sorted(zip(probabilities.tolist(), labels), reverse=True)[:5]:
    print(f"{probability:.1%} {label}")
"""

SPEC = TaskSpec(
    kind="classify",
    summary="image classification",
    options=Classify,
    data=ClassifyData,
    sample="labels",
    task="tessel.train.tasks.classify.task:ClassifyTask",
    metric=Metric("top1", "top-1"),
    conflicts=conflicts,
    load="tessel.train.tasks.classify.task:load",
    load_hint="import tessel.zoo, timm; timm.create_model('local-dir:{path}', pretrained=True)",
    usage=USAGE,
    report="tessel.train.report.classify",
)
