"""Image classification: one class an image."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy
from torch import nn

from .... import zoo as zoo  # registers the models with timm
from ...data.loader import Loader
from ...data.sources.build import build_dataset
from ...distributed.parallel import memory_format
from ...distributed.world import World
from ...errors import UserError
from ...recipe.plan import Plan
from ...recipe.schema import Recipe
from ..base import SupervisedTask
from ..export import export
from ..models import check_name, create_model, load_initial_weights
from .augment import erasing, eval_transform, input_config, mixing, of_image, train_transform
from .distillation import Teacher
from .metrics import ClassificationMetrics
from .probe import probe

BATCH_NORM_SIZE_ERROR = (
    "a batch norm of the model sees an image of data.size as one pixel, and has nothing to compare that with in a "
    "micro-batch of {}; raise data.micro_batch (data.batch) or data.size"
)


RESERVED_KWARGS = {  # keys that model.kwargs does not take
    "num_classes": "they are the data's, and task.num_classes checks them",
    "pretrained": "it is model.pretrained",
    "features_only": "a classifier needs its logits",
}


class ClassifyTask(SupervisedTask):
    """One class an image."""

    metric = "top1"

    def __init__(self, recipe: Recipe, world: World):
        check_name(recipe.model.name)
        check_name(recipe.model.init_from, "model.init_from")
        check_name(recipe.task.distill.teacher, "task.distill.teacher")
        super().__init__(recipe, world, partial(build_dataset, recipe.data))
        wanted = recipe.task.num_classes
        if wanted not in (None, len(self.classes)):
            raise UserError(
                f"task.num_classes={wanted}, but data.source={recipe.data.source} has {len(self.classes)} classes; "
                f"use {len(self.classes)} or leave it out"
            )
        self.erasing = erasing(recipe.data.aug, world.device)
        self.mixing = mixing(recipe.data.aug, recipe.task, len(self.classes))
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixing else recipe.task.smoothing)
        if recipe.task.loss == "bce":
            self.criterion = BinaryCrossEntropy(smoothing=recipe.task.smoothing)
        self.teacher: Teacher | None = None

    def build_model(self) -> nn.Module:
        model = build_classifier(self.recipe, len(self.classes))
        self.pretrained_cfg, data = model.pretrained_cfg, self.recipe.data
        self.train_transform = partial(of_image, train_transform(data, self.pretrained_cfg))
        self.eval_transform = partial(of_image, eval_transform(data, self.pretrained_cfg))
        return model

    def train_batches(self, plan: Plan, step: int) -> Loader:
        data, distill = self.recipe.data, self.recipe.task.distill
        if distill.teacher:
            config = input_config(data, self.pretrained_cfg)
            device = self.world.device
            with self.world.raise_on_all_ranks():
                self.teacher = Teacher(distill, classes=self.classes, size=data.size, config=config, device=device)
        return super().train_batches(plan, step)

    def forward(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """images: [B, 3, H, W] -> logits [B, classes]. Raises UserError for a batch too small to be normalised."""
        try:
            return model(images).float()
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(BATCH_NORM_SIZE_ERROR.format(len(images))) from error

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        images, targets = self.placed(batch)
        if self.erasing:
            images = self.erasing(images)
        if self.mixing:
            images, targets = self.mixing(images, targets)
        if self.recipe.task.probe:
            model.eval()  # what is frozen holds still: batch statistics, drop path
        logits = self.forward(model, images)
        loss = self.criterion(logits, targets)
        if self.teacher is None:
            return {"loss": loss}
        share = self.recipe.task.distill.weight
        return {"label_loss": (1 - share) * loss, "distill_loss": share * self.teacher.loss(images, logits)}

    def scores(self, *, keep: bool = False) -> "ClassificationMetrics":
        return ClassificationMetrics(self, keep)

    def example(self) -> tuple[Any, ...]:
        size = self.recipe.data.size
        return (torch.zeros(1, 3, size, size, device=self.world.device),)

    def export(self, model: nn.Module, path: Path, state: Mapping[str, Any]) -> None:
        config = input_config(self.recipe.data, self.pretrained_cfg)
        export(model, path, classes=self.classes, data_config=config, state=state)

    def placed(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images = batch[0].to(self.world.device, non_blocking=True, memory_format=memory_format(self.recipe.parallel))
        return images, batch[1].to(self.world.device, non_blocking=True)


def build_classifier(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's model with a new classifier. Raises UserError where timm cannot build it."""
    wanted, size = recipe.model, recipe.data.size
    if foreign := next(iter(wanted.kwargs.keys() & RESERVED_KWARGS.keys()), None):
        raise UserError(f"model.kwargs does not take {foreign}: {RESERVED_KWARGS[foreign]}; remove it there")
    options: dict[str, Any] = {"drop_path_rate": wanted.drop_path, **wanted.kwargs}
    model = create_model(
        wanted.name, size, key="model.name", pretrained=wanted.pretrained, num_classes=num_classes, **options
    )
    if wanted.init_from:
        load_initial_weights(model, wanted, size)
    return probe(model, recipe.task.probe) if recipe.task.probe else model
