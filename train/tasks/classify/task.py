"""Image classification as a task of the trainer."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.loss import BinaryCrossEntropy
from torch import nn

from ...data.loader import Loader
from ...distributed.parallel import memory_format
from ...distributed.world import World
from ...errors import UserError
from ...recipe.plan import Plan
from ...recipe.schema import Recipe
from ..base import DatasetTask
from ..export import export_classifier
from ..models import batch_norm_errors, check_name, create_model, load_initial_weights
from .augment import erasing, eval_transform, image_only, input_config, mixing, train_transform
from .distillation import Teacher
from .metrics import ClassificationMetrics
from .options import Classify, ClassifyData
from .probe import freeze_for_probe

RESERVED_KWARGS = {  # keys that model.kwargs does not take
    "num_classes": "it follows from the data, and task.num_classes checks it",
    "pretrained": "use model.pretrained",
    "features_only": "a classifier needs its logits",
}


class ClassifyTask(DatasetTask[Classify, ClassifyData]):
    """One class per image."""

    classes: list[str]

    def __init__(self, recipe: Recipe[Classify, ClassifyData], world: World):
        check_name(recipe.model.name)
        check_name(recipe.model.init_from, "model.init_from")
        check_name(recipe.task.distill.teacher, "task.distill.teacher")
        super().__init__(recipe, world)
        wanted = recipe.task.num_classes
        if wanted not in (None, len(self.classes)):
            raise UserError(
                f"task.num_classes={wanted}, but data.source={recipe.data.source} has {len(self.classes)} classes; "
                f"use {len(self.classes)} or remove the key"
            )
        self.erasing = erasing(recipe.data.aug, world.device)
        self.mixing = mixing(recipe.data.aug, recipe.task, len(self.classes))
        self.micro_batch_multiple = 2 if self.mixing else 1  # mixup and cutmix pair the images of a micro-batch
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixing else recipe.task.smoothing)
        if recipe.task.loss == "bce":
            self.criterion = BinaryCrossEntropy(smoothing=recipe.task.smoothing)
        self.teacher: Teacher | None = None

    def build_model(self) -> nn.Module:
        model = build_classifier(self.recipe, len(self.classes))
        self.pretrained_cfg, data = model.pretrained_cfg, self.recipe.data
        self.train_transform = partial(image_only, train_transform(data, self.pretrained_cfg))
        self.eval_transform = partial(image_only, eval_transform(data, self.pretrained_cfg))
        return model

    def train_batches(self, plan: Plan, step: int) -> Loader:
        data, distill = self.recipe.data, self.recipe.task.distill
        if distill.teacher:
            config = input_config(data, self.pretrained_cfg)
            device = self.world.device
            with self.world.raise_on_all_ranks():
                self.teacher = Teacher(distill, classes=self.classes, size=data.size, config=config, device=device)
        return super().train_batches(plan, step)

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        images, targets = self.to_device(batch)
        if self.erasing:
            images = self.erasing(images)
        if self.mixing:
            images, targets = self.mixing(images, targets)
        if self.recipe.task.probe:
            model.eval()  # the frozen part must not update batch statistics or drop paths
        with batch_norm_errors(len(images), "raise data.micro_batch (data.batch) or data.size"):
            logits = model(images).float()
        loss = self.criterion(logits, targets)
        if self.teacher is None:
            return {"loss": loss}
        weight = self.recipe.task.distill.weight
        return {"label_loss": (1 - weight) * loss, "distill_loss": weight * self.teacher.loss(images, logits)}

    def metrics(self, *, keep: bool = False) -> ClassificationMetrics:
        return ClassificationMetrics(self.world, self.to_device, classes=len(self.classes), keep=keep)

    def example(self) -> tuple[Any, ...]:
        size = self.recipe.data.size
        return (torch.zeros(1, 3, size, size, device=self.world.device),)

    def export(self, model: nn.Module, path: Path, state: Mapping[str, Any]) -> None:
        config = input_config(self.recipe.data, self.pretrained_cfg)
        export_classifier(model, path, classes=self.classes, data_config=config, state=state)

    def to_device(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and targets of a batch, on the device."""
        images = batch[0].to(self.world.device, non_blocking=True, memory_format=memory_format(self.recipe.parallel))
        return images, batch[1].to(self.world.device, non_blocking=True)


def build_classifier(recipe: Recipe[Classify, Any], num_classes: int) -> nn.Module:
    """The recipe's model with a new classifier. Raises UserError if timm cannot create it."""
    options, size = recipe.model, recipe.data.size
    if reserved := next(iter(options.kwargs.keys() & RESERVED_KWARGS.keys()), None):
        raise UserError(f"model.kwargs does not take {reserved}: {RESERVED_KWARGS[reserved]}; remove it")
    kwargs: dict[str, Any] = {"drop_path_rate": options.drop_path_rate, **options.kwargs}
    model = create_model(
        options.name, size, key="model.name", pretrained=options.pretrained, num_classes=num_classes, **kwargs
    )
    if options.init_from:
        load_initial_weights(model, options, size)
    return freeze_for_probe(model, recipe.task.probe) if recipe.task.probe else model


def load(path: Path) -> nn.Module:
    """The classifier in the folder `RUN/export`, in evaluation mode on the CPU."""
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()
