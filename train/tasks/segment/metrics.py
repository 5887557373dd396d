"""Prediction with a segmenter (whole images or sliding windows, averaged over scales and flips), and its metrics."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.segmentation import IGNORE_INDEX
from ...distributed.parallel import memory_format
from ...distributed.world import World
from ...errors import UserError
from ...recipe.schema import Recipe
from .options import SegmentTest

MAX_KEPT_SIDE = 512  # pixels of a side of a kept mask; larger ones are subsampled
Sample = tuple[list[Tensor], Tensor, int]  # the image at each scale, its mask, its index in the data set


class EvaluatedTask(Protocol):
    """What the metrics need of the task."""

    recipe: Recipe[Any, Any]
    world: World
    classes: list[str]
    window: int
    kept: int

    @property
    def normalize(self) -> Callable[[Tensor], Tensor]: ...


class SegmentationMetrics:
    """mIoU, mean class accuracy and pixel accuracy in percent; with `keep`, also the first predictions.

    A confusion matrix of integers is summed over all processes, which is exact for any number of them and needs one
    collective; torchmetrics' JaccardIndex and Accuracy would each keep and synchronize a state of their own.
    """

    def __init__(self, task: EvaluatedTask, keep: bool):
        self.task, self.keep = task, keep
        classes = len(task.classes)
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.count = torch.zeros((), dtype=torch.int64)
        self.kept: list[tuple[int, np.ndarray, np.ndarray]] = []  # index, target, prediction

    def update(self, model: nn.Module, batch: Sequence[Sample]) -> None:
        task = self.task
        device, layout = task.world.device, memory_format(task.recipe.parallel)
        for samples in group_by_shape(batch):
            views = [
                task.normalize(torch.stack(images).to(device)).contiguous(memory_format=layout)
                for images in zip(*(sample[0] for sample in samples), strict=True)
            ]
            size = samples[0][1].shape[-2:]
            predictions = predict(model, views, size, task.recipe.task.segment.test, task.window).cpu()
            for (_, target, index), prediction in zip(samples, predictions, strict=True):
                self.confusion += confusion_matrix(target, prediction, len(self.confusion))
                self.count += 1
                if self.keep and index < task.kept:
                    self.kept.append((int(index), subsample(target), subsample(prediction)))

    def compute(self) -> dict[str, float]:
        confusion = self.task.world.sum(self.confusion).double()
        if not confusion.sum():
            raise UserError(
                "no pixel of the validation split has a class, so there is nothing to evaluate: all are ignored (255). "
                "Check the masks and the values of the classes; tessel check RECIPE counts them"
            )
        iou, accuracy = class_metrics(confusion)
        return {
            "miou": 100 * float(iou.nanmean()),
            "macc": 100 * float(accuracy.nanmean()),
            "aacc": 100 * float(confusion.diag().sum() / confusion.sum()),
            "count": int(self.task.world.sum(self.count)),
        }

    def details(self) -> dict[str, Any]:
        """IoU and accuracy of each class in percent; None for a class without pixels."""
        iou, accuracy = class_metrics(self.task.world.sum(self.confusion).double())
        return {"classes": {"iou": self._by_name(iou), "acc": self._by_name(accuracy)}}

    def predictions(self) -> dict[str, np.ndarray]:
        """The first images: index [N], size [N, 2], target and prediction uint8 [N, H, W]; and the confusion matrix.

        Masks are subsampled to at most 512 pixels a side, and padded with IGNORE_INDEX to a common size; `size` is
        their height and width without the padding. Row c of the confusion matrix counts the pixels of class c.
        """
        world = self.task.world
        confusion = world.sum(self.confusion).numpy()
        rows = sorted((row for part in world.gather(self.kept) for row in part), key=lambda row: row[0])
        sizes = np.array([target.shape for _, target, _ in rows], np.int64).reshape(-1, 2)
        height, width = sizes.max(0, initial=0)
        masks = np.full((2, len(rows), height, width), IGNORE_INDEX, np.uint8)
        for number, (_, *pair) in enumerate(rows):
            for kind, mask in enumerate(pair):
                masks[kind, number, : mask.shape[0], : mask.shape[1]] = mask
        index = np.array([row[0] for row in rows], np.int64)
        return {"index": index, "size": sizes, "target": masks[0], "prediction": masks[1], "confusion": confusion}

    def _by_name(self, values: Tensor) -> dict[str, float | None]:
        pairs = zip(self.task.classes, values.tolist(), strict=True)
        return {name: None if np.isnan(value) else 100 * value for name, value in pairs}


def confusion_matrix(target: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Counts [class, predicted class] over the labelled pixels of two masks [H, W]."""
    labelled = target != IGNORE_INDEX
    pairs = target[labelled].long() * classes + prediction[labelled].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_metrics(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """IoU [C] and accuracy (recall) [C] of each class; nan where the denominator is 0."""
    correct, targets, predictions = confusion.diag(), confusion.sum(1), confusion.sum(0)
    return correct / (targets + predictions - correct), correct / targets


def predict(model: nn.Module, views: list[Tensor], size: Sequence[int], test: SegmentTest, window: int) -> Tensor:
    """The class [B, *size] of each pixel.

    views: the images [B, 3, h, w] at each scale; window: side of the sliding windows. With one view, the argmax of the
    logits, resized to `size`; with several scales or flips, the argmax of their mean probabilities.
    """
    forward: Callable[[Tensor], Tensor] = model
    if test.mode == "slide":
        forward = sliding_window(model, window, test.stride or max(1, window * 2 // 3))
    flips = (False, True) if test.flip else (False,)
    if len(views) * len(flips) == 1:
        return resize_logits(forward(views[0]), size).argmax(1)
    total: Any = 0
    for view in views:
        for flip in flips:
            logits = forward(view.flip(-1)).flip(-1) if flip else forward(view)
            total = total + resize_logits(logits, size).softmax(1)
    return total.argmax(1)


def sliding_window(model: nn.Module, window: int, stride: int) -> Callable[[Tensor], Tensor]:
    """A function that applies `model` to overlapping windows of images [B, 3, H, W] and averages their logits.

    The windows are those of mmsegmentation's slide_inference, which is a method of its segmenters.
    """

    def forward(images: Tensor) -> Tensor:
        total: Any = None
        counts = images.new_zeros(1, 1, *images.shape[-2:])
        for top in window_starts(images.shape[-2], window, stride):
            for left in window_starts(images.shape[-1], window, stride):
                part = (..., slice(top, top + window), slice(left, left + window))
                logits = model(images[part].contiguous()).float()
                if total is None:
                    total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
                total[part] += logits
                counts[part] += 1
        return total / counts

    return forward


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side of `length` pixels: every `stride` pixels, and one that ends at the border."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [B, C, h, w] in float32, resized to [B, C, *size]."""
    logits = logits.float()
    same = tuple(logits.shape[-2:]) == tuple(size)
    return logits if same else F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def group_by_shape(batch: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Consecutive samples whose images and masks have equal shapes, so that they can be stacked."""

    def shapes(sample: Sample) -> list[torch.Size]:
        return [*(view.shape for view in sample[0]), sample[1].shape]

    return (list(samples) for _, samples in groupby(batch, shapes))


def subsample(mask: Tensor) -> np.ndarray:
    """Every n-th row and column of a mask [H, W] in uint8, with the smallest n that leaves at most 512 of each."""
    step = -(-max(mask.shape) // MAX_KEPT_SIDE)
    return mask[::step, ::step].to(torch.uint8).numpy()
