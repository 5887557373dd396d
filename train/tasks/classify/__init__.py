"""Image classification: one class per image, or several labels."""

import dataclasses
from functools import partial

from ...recipe.registry import Metric, TaskSpec
from ...recipe.schema import Recipe
from .options import Classify, ClassifyData, MultiLabel, classifier_conflicts, conflicts

ZOO = "import tessel.zoo  # registers the models with timm\n"
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

MULTI_LABEL_USAGE = """\
import json

import timm
import torch
from PIL import Image, ImageOps

import tessel.zoo  # registers the models with timm

model = timm.create_model("local-dir:{path}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB"))
with torch.inference_mode():
    probabilities = model(image[None]).sigmoid()[0]
with open("{path}/config.json") as file:
    thresholds = json.load(file)["thresholds"]  # label -> probability from which on it is predicted
for probability, (label, threshold) in zip(probabilities.tolist(), thresholds.items()):
    if probability >= threshold:
        print(f"{probability:.1%} {label}")
"""

READ_IMAGE = 'ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")'
READ_ARRAY = """\
from tessel.train.data.image_io import read_file
from tessel.train.recipe.schema import PixelFormat
from tessel.train.tasks.classify.channels import array_to_tensor
"""


def usage(code: str, recipe: Recipe) -> str:
    """The code for images of as many channels as the model of the recipe reads."""
    channels = recipe.model.in_chans or 3
    if channels in (1, 3):
        return code.replace('convert("RGB")', 'convert("L")') if channels == 1 else code
    read = f'array_to_tensor(read_file("image.npy", pixel_format=PixelFormat({channels})))'
    code = code.replace(READ_IMAGE, read).replace("from PIL import Image, ImageOps\n", "")
    return code.replace(ZOO, ZOO + READ_ARRAY)


SPEC = TaskSpec(
    kind="classify",
    summary="image classification",
    options=Classify,
    data=ClassifyData,
    sample="labels",
    task="tessel.train.tasks.classify.task:ClassifyTask",
    metric=Metric("top1", "top-1"),
    conflicts=conflicts,
    any_channels=True,
    load="tessel.train.tasks.classify.task:load",
    load_hint="import tessel.zoo, timm; timm.create_model('local-dir:{path}', pretrained=True)",
    predicts=True,
    usage=partial(usage, USAGE),
    report="tessel.train.report.classify",
    models_of_timm=True,
)

MULTI_LABEL = dataclasses.replace(
    SPEC,
    kind="multilabel",
    summary="image classification with any number of labels per image",
    options=MultiLabel,
    sample="label sets",
    task="tessel.train.tasks.classify.multi_label:MultiLabelTask",
    metric=Metric("map", "mean average precision"),
    metric_names={"average_precision": "average precision", "best_f1": "F1 at the threshold"},
    conflicts=classifier_conflicts,
    usage=partial(usage, MULTI_LABEL_USAGE),
    report="tessel.train.report.multi_label",
)
