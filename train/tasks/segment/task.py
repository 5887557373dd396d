"""Semantic segmentation as a task of the trainer."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import default_collate

from .... import zoo as zoo  # registers the models with timm
from ...data.sources.build_masks import build_dataset
from ...distributed.parallel import memory_format
from ...distributed.world import World
from ...errors import UserError
from ...recipe.schema import Recipe
from ..base import SupervisedTask
from ..dense_backbone import try_backbone
from ..export import export_parts
from .augment import aligned, eval_transform, normalisation, train_transform
from .metrics import SegmentationMetrics
from .model import Segmenter, assemble, begin
from .overlay import pictures

BATCH_NORM_SIZE_ERROR = (
    "a head or the backbone comes to one pixel of the image, and its batch norm has nothing to compare that with in a "
    "micro-batch of {}; give each process two images at once or more (data.batch, data.micro_batch), or do without "
    "batch statistics: norm_cfg: {{type: GN, num_groups: 32}} in the heads of task.segment, and "
    "task.dense.batch_norm=eval for the backbone"
)


class SegmentTask(SupervisedTask):
    """A class for each pixel."""

    metric = "miou"

    def __init__(self, recipe: Recipe, world: World):
        super().__init__(recipe, world, partial(build_dataset, recipe.data))
        self.palette = self.val.palette
        self.window = recipe.task.segment.test.crop or recipe.data.size
        self.kept = 16  # validation images whose predictions are kept

    @staticmethod
    def collate(samples: list[Any]) -> Any:
        """Training crops in one tensor; images to be judged have sizes of their own."""
        return samples if isinstance(samples[0][0], list) else default_collate(samples)

    def build_model(self) -> Segmenter:
        recipe = self.recipe
        known = {"dense": recipe.task.dense, "classes": self.classes, "size": recipe.data.size}
        model = assemble(recipe.model, recipe.task.segment, **known)
        self.try_unlike_training(model)
        begin(model, recipe)
        self.pretrained_cfg = model.pretrained_cfg
        self.train_transform = train_transform(recipe.data, self.pretrained_cfg)
        self.eval_transform = eval_transform(recipe.data, recipe.task.segment.test, self.pretrained_cfg)
        return model

    def try_unlike_training(self, model: Segmenter) -> None:
        """Let the backbone see a size as evaluation has them and training does not."""
        data, test = self.recipe.data, self.recipe.task.segment.test
        if test.mode == "slide":
            size = (self.window, self.window)
        else:
            size = (data.size, data.size + (data.source != "digit_scenes"))
            size = aligned(size, test.divisor) if test.divisor else size
        if size != (data.size, data.size):
            remedy = (
                "evaluation has images of any size: give it model.kwargs.strict_img_size=false, multiples of its "
                "windows by task.segment.test.divisor=32, or windows of data.size by task.segment.test.mode=slide"
            )
            try_backbone(model.backbone, self.recipe.model, size, remedy)

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        device = self.world.device
        images = batch[0].to(device, non_blocking=True, memory_format=memory_format(self.recipe.parallel))
        try:
            return model(images, batch[1].to(device, non_blocking=True))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(BATCH_NORM_SIZE_ERROR.format(len(images))) from error

    def scores(self, *, keep: bool = False) -> SegmentationMetrics:
        return SegmentationMetrics(self, keep)

    def example(self) -> tuple[Any, ...]:
        size = self.recipe.data.size
        return (torch.zeros(1, 3, size, size, device=self.world.device),)

    def export(self, model: nn.Module, path: Path, state: Mapping[str, Any]) -> None:
        mean, std = normalisation(self.pretrained_cfg)
        task = self.recipe.task
        segment = dataclasses.replace(task.segment, load_from=None)
        parts = {"model": self.recipe.model, "dense": task.dense, "segment": segment}
        facts = {"classes": self.classes, "palette": self.palette, "mean": mean, "std": std}
        export_parts(path, state, task="segment", **parts, **facts)

    def pictures(self, predictions: dict[str, np.ndarray], count: int) -> Iterator[tuple[int, Image.Image]]:
        """(index, picture) of the first `count` predictions: truth beside prediction."""
        return pictures(self, predictions, count)
