"""Image classification: one class per image, or several labels."""

import dataclasses
from functools import partial

from ...recipe.registry import Metric, TaskSpec
from ...recipe.schema import Recipe
from .options import Classify, ClassifyData, MultiLabel, classifier_conflicts, conflicts

USAGE = """\
import tessel

model = tessel.load("{path}")  # prepares images as the evaluation did
(result,) = model.predict("image.jpg", topk=5)
for label, probability in zip(result.labels, result.probabilities):
    print(f"{probability:.1%} {label}")
"""

MULTI_LABEL_USAGE = """\
import tessel

model = tessel.load("{path}")  # prepares images as the evaluation did
(result,) = model.predict("image.jpg")
for label, probability in zip(result.labels, result.probabilities):  # those that reach the threshold of their label
    print(f"{probability:.1%} {label}")
"""


def usage(code: str, recipe: Recipe) -> str:
    """The code, with a file that has as many channels as the model of the recipe reads."""
    return code if recipe.model.in_chans in (None, 1, 3) else code.replace("image.jpg", "image.npy")


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
