"""Detection and instance segmentation: which objects are where in an image."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...data.sources.build_boxes import build_dataset
from ...distributed.world import World
from ...errors import UserError
from ...recipe.schema import Recipe
from ..base import SupervisedTask
from ..export import export_parts
from ..models import check_name
from .augment import Eval, Train
from .detectors import build_detector
from .metrics import DetectionMetrics, of_image
from .overlay import side_by_side

BATCH_NORM_SIZE_ERROR = (
    "a batch norm of the backbone {} has one value of each channel in a micro-batch of {}, and nothing to compare that "
    "with; give each process two images at once or more (data.batch, data.micro_batch), larger ones (data.size, "
    "task.detect.short), or task.dense.batch_norm=eval"
)


Batch = tuple[list[Tensor], list[dict[str, Tensor]], list[int]]


def collate_lists(samples: list[Any]) -> Batch:
    """A batch of images of different sizes."""
    images, targets, indices = zip(*samples, strict=True)
    return list(images), list(targets), list(indices)


class DetectTask(SupervisedTask):
    """Boxes with classes, and masks where the detector has them."""

    collate = staticmethod(collate_lists)
    metric = "box_ap"
    kept = 16  # validation images whose masks are kept with the predictions

    def __init__(self, recipe: Recipe, world: World):
        check_name(recipe.model.name)
        check_name(recipe.model.init_from, "model.init_from")
        super().__init__(recipe, world, partial(build_dataset, recipe))
        self.masks = recipe.task.detect.detector == "mask_rcnn"
        self.train_transform, self.eval_transform = Train(recipe), Eval()

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
        images, targets = self.placed(batch)
        try:
            losses: dict[str, Tensor] = model(images, targets)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(BATCH_NORM_SIZE_ERROR.format(self.recipe.model.name, len(images))) from error
        return {name if "loss" in name else f"loss_{name}": value for name, value in losses.items()}

    def scores(self, *, keep: bool = False) -> DetectionMetrics:
        # AP is no sum over batches: all that was found is kept in any case
        return DetectionMetrics(self)

    def example(self) -> tuple[Any, ...]:
        """One image of the aspect ratio that detectors' costs are told for, 1280 x 800."""
        height, longest = self.recipe.data.size, self.recipe.task.detect.longest
        return ([torch.zeros(3, height, min(longest, height * 8 // 5), device=self.world.device)],)

    def export(self, model: nn.Module, path: Path, state: Mapping[str, Any]) -> None:
        recipe = self.recipe
        parts = {"model": recipe.model, "dense": recipe.task.dense, "detect": recipe.task.detect}
        export_parts(path, state, task="detect", **parts, size=recipe.data.size, classes=self.classes)

    def pictures(self, predictions: Mapping[str, np.ndarray], count: int) -> Iterator[tuple[int, Image.Image]]:
        """(index, picture) of the first `count` validation images: what is there, and beside it what was found."""
        for index in predictions["image"][:count].tolist():
            image, target = self.eval_transform(*self.val[index])
            yield index, side_by_side(image, target, of_image(predictions, index), self.classes)

    def placed(self, batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        device = self.world.device
        images = [image.to(device, non_blocking=True) for image in batch[0]]
        return images, [{k: tensor.to(device, non_blocking=True) for k, tensor in t.items()} for t in batch[1]]
