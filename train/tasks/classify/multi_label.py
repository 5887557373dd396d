"""Classification with any number of labels per image, each judged by itself."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from ...distributed.device import sum_dtype
from ...distributed.world import World
from ...errors import UserError
from ...recipe.schema import Recipe
from ..base import MetricAccumulator
from .augment import mixing
from .options import ClassifyData, MultiLabel
from .task import ClassifierTask

DECISION = 0.5  # threshold of a label that no validation image has, and of the metric f1


class MultiLabelTask(ClassifierTask[MultiLabel]):
    """Any number of labels per image; binary cross entropy, averaged over images and labels.

    Smoothing moves the target of each label towards 1/2; mixup and cutmix mix the targets of each label.
    """

    def __init__(self, recipe: Recipe[MultiLabel, ClassifyData], world: World):
        super().__init__(recipe, world)
        # mixing smooths the targets itself
        smoothing = 0.0 if self.mixing else recipe.task.smoothing
        self.criterion = BinaryCrossEntropy(smoothing=smoothing, smooth_dense=True)
        self.thresholds: dict[str, float] = {}
        if not len(getattr(self.val, "targets", [0])):
            raise UserError(f"the validation images of {recipe.data.location} have no labels, so nothing can be judged")

    def build_mixing(self) -> Mixup | None:
        return mixing(self.recipe.data.aug, self.recipe.task.smoothing, len(self.classes), multi_label=True)

    def metrics(self, *, keep: bool = False) -> "MultiLabelMetrics":
        return MultiLabelMetrics(self.world, self.to_device, self.classes)

    def note_evaluation(self, metrics: MetricAccumulator) -> None:
        self.thresholds = metrics.details()["thresholds"]

    def export_facts(self) -> dict[str, Any]:
        """The thresholds of the last evaluation: label -> probability from which on it is predicted."""
        return {"task": "multilabel", "thresholds": self.thresholds}


class MultiLabelMetrics:
    """Mean average precision over the labels, and what is known of each label.

    Average precision needs the order of all images, so every process keeps its probabilities, 4 bytes for each image
    and label, and `compute` gathers them. torch has no such metric; scikit-learn's takes one label at a time and counts
    a label without images as 0.
    """

    def __init__(self, world: World, to_device: Callable[[Any], tuple[Tensor, Tensor]], classes: list[str]):
        """to_device: batch -> images and targets [B, classes] on the device."""
        self.world, self.to_device, self.classes = world, to_device, classes
        self.loss = torch.zeros(2, dtype=sum_dtype(world.device), device=world.device)
        self.rows: list[list[np.ndarray]] = []

    def update(self, model: nn.Module, batch: Any) -> None:
        images, targets = self.to_device(batch)
        logits = model(images).float()
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").to(self.loss.dtype).mean(1).sum()
        self.loss += torch.stack([loss, torch.tensor(len(targets), device=loss.device)])
        self.rows.append([column.cpu().numpy() for column in (batch[2], targets, logits.sigmoid())])

    def compute(self) -> dict[str, float]:
        """map: mean over the labels that an image has; f1: of all decisions at 1/2; both in percent."""
        loss, count = self.world.sum(self.loss).tolist()
        known = self.average_precision[~np.isnan(self.average_precision)]
        right, predicted = self.gathered["target"] > 0, self.gathered["probability"] >= DECISION
        f1 = 2 * (right & predicted).sum() / max(right.sum() + predicted.sum(), 1)
        return {
            "map": 100 * float(known.mean()) if len(known) else 0.0,
            "f1": 100 * float(f1),
            "loss": loss / count,
            "count": int(count),
        }

    def predictions(self) -> dict[str, np.ndarray]:
        """target and probability, [N, classes] each."""
        return self.gathered

    def details(self) -> dict[str, Any]:
        """Percent by label, null for labels that no image has, the thresholds, and the number of images by label."""
        pairs = [best_threshold(*column) for column in self._columns()]
        by_class = {
            "average_precision": [None if np.isnan(value) else 100 * float(value) for value in self.average_precision],
            "best_f1": [None if f1 is None else 100 * f1 for _, f1 in pairs],
        }
        images = (self.gathered["target"] > 0).sum(0).tolist()
        return {
            "classes": {key: dict(zip(self.classes, values, strict=True)) for key, values in by_class.items()},
            "thresholds": {name: threshold for name, (threshold, _) in zip(self.classes, pairs, strict=True)},
            "images": dict(zip(self.classes, images, strict=True)),
        }

    @cached_property
    def gathered(self) -> dict[str, np.ndarray]:
        """The predictions of all processes in the order of the data set. Collective."""
        rows = [row for part in self.world.gather(self.rows) for row in part]
        index, target, probability = (np.concatenate(column) for column in zip(*rows, strict=True))
        order = index.argsort()
        return {"target": target[order].astype(np.uint8), "probability": probability[order]}

    @cached_property
    def average_precision(self) -> np.ndarray:
        """Of each label, [classes] in 0..1; NaN for one that no image has."""
        return np.array([average_precision(*column) for column in self._columns()])

    def _columns(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(self.gathered["probability"].T, self.gathered["target"].T > 0, strict=True))


def average_precision(scores: np.ndarray, right: np.ndarray) -> float:
    """Sum over the thresholds of (recall - recall at the threshold above) x precision; NaN if nothing is right.

    scores, right: [N]. Equal scores are one threshold.
    """
    hits, predicted = _decisions(scores, right)[1:]
    if not right.any():
        return float("nan")
    return float((np.diff(hits, prepend=0) / right.sum() * hits / predicted).sum())


def best_threshold(scores: np.ndarray, right: np.ndarray) -> tuple[float, float | None]:
    """The threshold of the highest F1, and this F1 in 0..1; (1/2, None) if nothing is right.

    The threshold lies halfway between the lowest accepted score and the next lower one.
    """
    levels, hits, predicted = _decisions(scores, right)
    if not right.any():
        return DECISION, None
    f1 = 2 * hits / (predicted + right.sum())
    best = int(f1.argmax())
    below = levels[best + 1] if best + 1 < len(levels) else 0.0
    return float((levels[best] + below) / 2), float(f1[best])


def _decisions(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct scores, falling, and how many of those at least as high are right, and how many there are."""
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order].astype(np.float64), right[order].cumsum()
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))
    return scores[last], hits[last], last + 1
