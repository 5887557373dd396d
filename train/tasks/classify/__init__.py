"""Image classification: one class per image."""

from ...recipe.registry import Metric, TaskSpec
from .options import Classify, ClassifyData, conflicts

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
    report="tessel.train.report.classify",
)
