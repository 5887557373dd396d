"""Object detection and instance segmentation as a task of the trainer."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...data.detection import DetectionDataset
from ...distributed.world import World
from ...recipe.schema import Recipe
from ..base import DatasetTask
from ..export import export_model
from ..models import batch_norm_errors, check_name
from .augment import EvalTransform, TrainTransform, to_float
from .detectors import build_detector
from .metrics import DetectionMetrics, image_predictions
from .options import WITH_MASKS, Detect, DetectData
from .overlay import side_by_side

BATCH_NORM_REMEDY = (
    "use micro-batches of at least two images (data.batch, data.micro_batch), larger images (data.size, "
    "task.detect.min_size), or task.dense.batch_norm=eval"
)


Batch = tuple[list[Tensor], list[dict[str, Tensor]], list[int]]


def collate_lists(samples: list[Any]) -> Batch:
    """A batch as lists, because images differ in size."""
    images, targets, indices = zip(*samples, strict=True)
    return list(images), list(targets), list(indices)


class DetectTask(DatasetTask[Detect, DetectData]):
    """Boxes with classes, and with some detectors also instance masks."""

    classes: list[str]
    collate = staticmethod(collate_lists)

    def __init__(self, recipe: Recipe[Detect, DetectData], world: World):
        check_name(recipe.model.name)
        check_name(recipe.model.init_from, "model.init_from")
        super().__init__(recipe, world)
        self.kept = 16  # number of validation images whose masks are kept with the predictions
        self.masks = recipe.task.detect.detector in WITH_MASKS
        self.train_transform, self.eval_transform = TrainTransform(recipe), EvalTransform()

    def build_model(self) -> nn.Module:
        recipe = self.recipe
        return build_detector(
            recipe.model,
            recipe.task.detect,
            dense=recipe.task.dense,
            size=recipe.data.size,
            classes=len(self.classes),
        )

    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        images, targets = self.to_device(batch)
        with batch_norm_errors(len(images), BATCH_NORM_REMEDY):
            losses: dict[str, Tensor] = model(images, targets)
        return {name if "loss" in name else f"loss_{name}": value for name, value in losses.items()}

    def metrics(self, *, keep: bool = False) -> DetectionMetrics:
        # average precision needs all detections, so they are kept with or without `keep`
        return DetectionMetrics(self)

    def example(self) -> tuple[Any, ...]:
        """One image with the aspect ratio of 1280 x 800 pixels, for which papers give the FLOPs of detectors."""
        height, max_size = self.recipe.data.size, self.recipe.task.detect.max_size
        return ([torch.zeros(3, height, min(max_size, height * 8 // 5), device=self.world.device)],)

    def export(self, model: nn.Module, path: Path, state: Mapping[str, Any]) -> None:
        recipe = self.recipe
        sections = {"dense": recipe.task.dense, "detect": recipe.task.detect}
        facts = {"size": recipe.data.size, "classes": self.classes, "background": recipe.data.background}
        export_model(path, state, task="detect", model=recipe.model, sections=sections, **facts)

    def open_train(self) -> Any:
        train = super().open_train()
        if isinstance(train, DetectionDataset) and not self.recipe.task.detect.empty:
            return train.with_objects()
        return train

    def keep_pictures(self, count: int) -> None:
        self.kept = max(self.kept, count)

    def pictures(self, predictions: Mapping[str, np.ndarray], count: int) -> Iterator[tuple[int, Image.Image]]:
        """(index, picture) of the first `count` validation images: ground truth beside prediction."""
        for index in predictions["image"][:count].tolist():
            image, target = self.eval_transform(*self.val[index])
            yield index, side_by_side(image, target, image_predictions(predictions, index), self.classes)

    def to_device(self, batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        device = self.world.device
        # uint8 is a quarter of the bytes to pass between processes and to copy
        images = [to_float(image.to(device, non_blocking=True)) for image in batch[0]]
        return images, [{k: tensor.to(device, non_blocking=True) for k, tensor in t.items()} for t in batch[1]]
