"""Semantic segmentation as a task of the trainer."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import default_collate

from ...distributed.parallel import memory_format
from ...distributed.world import World
from ...recipe.schema import Recipe
from ..base import DatasetTask
from ..dense_backbone import check_backbone
from ..export import export_model
from ..models import batch_norm_errors, check_name
from .augment import Normalizer, eval_transform, input_mean_std, round_up, train_transform
from .metrics import SegmentationMetrics
from .model import Segmenter, build_segmenter, load_initial_weights
from .options import Segment, SegmentData
from .overlay import classes_in, pictures

BATCH_NORM_REMEDY = (
    "use micro-batches of at least two images (data.batch, data.micro_batch), or no batch statistics: "
    "task.dense.batch_norm=eval for the backbone, and norm_cfg: {type: GN, num_groups: 32} in the heads"
)


class SegmentTask(DatasetTask[Segment, SegmentData]):
    """Semantic segmentation: a class for every pixel."""

    classes: list[str]

    def __init__(self, recipe: Recipe[Segment, SegmentData], world: World):
        check_name(recipe.model.name)
        check_name(recipe.model.init_from, "model.init_from")
        super().__init__(recipe, world)
        self.palette = self.val.palette
        self.window = recipe.task.segment.test.crop or recipe.data.size  # side of sliding windows
        self.kept = 16  # number of validation images whose masks are kept with the predictions

    @staticmethod
    def collate(samples: list[Any]) -> Any:
        """Stack training crops. Validation images differ in size, so they stay a list of samples."""
        return samples if isinstance(samples[0][0], list) else default_collate(samples)

    def build_model(self) -> Segmenter:
        recipe = self.recipe
        model = build_segmenter(
            recipe.model,
            recipe.task.segment,
            dense=recipe.task.dense,
            classes=self.classes,
            size=recipe.data.size,
            layout=memory_format(recipe.parallel),
        )
        self.check_eval_size(model)
        load_initial_weights(model, recipe)
        self.pretrained_cfg = model.pretrained_cfg
        self.train_transform = train_transform(recipe.data)
        self.eval_transform = eval_transform(recipe.data, recipe.task.segment.test)
        self.normalize = Normalizer(self.pretrained_cfg, self.world.device)
        return model

    def check_eval_size(self, model: Segmenter) -> None:
        """Raises UserError if the backbone accepts the training crops, but not the images of the evaluation."""
        data, test = self.recipe.data, self.recipe.task.segment.test
        if test.mode == "slide":
            size = (self.window, self.window)
        else:
            # photos have any size, so try a width that is not data.size; digit scenes are squares of data.size
            size = (data.size, data.size + (data.source != "digit_scenes"))
            size = round_up(size, test.divisor) if test.divisor else size
        if size != (data.size, data.size):
            remedy = (
                "evaluation has images of any size: set model.kwargs.strict_img_size=false, "
                "task.segment.test.divisor=32 to resize them to multiples of 32, or task.segment.test.mode=slide to "
                "predict windows of data.size"
            )
            check_backbone(model.backbone, self.recipe.model, size, remedy)

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        device = self.world.device
        pixels, sizes = batch[0]
        images = self.normalize(pixels.to(device, non_blocking=True), sizes)
        images = images.contiguous(memory_format=memory_format(self.recipe.parallel))
        with batch_norm_errors(len(images), BATCH_NORM_REMEDY):
            return model(images, batch[1].to(device, non_blocking=True))

    def metrics(self, *, keep: bool = False) -> SegmentationMetrics:
        return SegmentationMetrics(self, keep)

    def example(self) -> tuple[Any, ...]:
        size = self.recipe.data.size
        return (torch.zeros(1, 3, size, size, device=self.world.device),)

    def export(self, model: nn.Module, path: Path, state: Mapping[str, Any]) -> None:
        mean, std = input_mean_std(self.pretrained_cfg)
        task = self.recipe.task
        segment = dataclasses.replace(task.segment, load_from=None)
        sections = {"dense": task.dense, "segment": segment}
        # how images are resized and cut into windows, for predictions
        data = {"img_scale": self.recipe.data.img_scale, "size": self.recipe.data.size}
        facts = {"classes": self.classes, "palette": self.palette, "mean": mean, "std": std, "data": data}
        facts["background"] = self.recipe.data.background
        export_model(path, state, task="segment", model=self.recipe.model, sections=sections, **facts)

    def pictures(self, predictions: Mapping[str, np.ndarray], count: int) -> Iterator[tuple[int, Image.Image]]:
        """(index, picture) of the first `count` predictions: ground truth beside prediction."""
        return pictures(self.val, predictions, count)

    def legend(self, predictions: Mapping[str, np.ndarray], count: int) -> dict[str, list[int]]:
        """Name and color of each class in the first `count` pictures, in the order of the classes."""
        return {self.classes[label]: self.palette[label] for label in classes_in(predictions, count)}

    def keep_pictures(self, count: int) -> None:
        self.kept = max(self.kept, count)
