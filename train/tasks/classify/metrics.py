"""Metrics of classification."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...distributed.device import sum_dtype
from ...distributed.world import World

LEAST_FOR_TOP5 = 6  # classes; of five or fewer, the five most probable always contain the true one


class ClassificationMetrics:
    """Top-1 and top-5 accuracy in percent, and cross entropy; with `keep`, every prediction too.

    Below six classes there is no top-5.

    The sums are in float64 (`sum_dtype`) on the device, so that no batch waits for them and any number of processes
    gives the same.
    torchmetrics' accuracy would need three metrics and a process group of its own.
    """

    def __init__(
        self, world: World, to_device: Callable[[Any], tuple[Tensor, Tensor]], *, classes: int, keep: bool = False
    ):
        """to_device: batch -> images and targets on the device."""
        self.world, self.to_device, self.classes, self.keep = world, to_device, classes, keep
        self.sums = torch.zeros(4, dtype=sum_dtype(world.device), device=world.device)
        self.rows: list[list[np.ndarray]] = []

    def update(self, model: nn.Module, batch: Any) -> None:
        images, targets = self.to_device(batch)
        logits = model(images).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="none").to(self.sums.dtype)
        count = torch.tensor(len(targets), device=loss.device)
        self.sums += torch.stack([hits[:, 0].sum(), hits.any(1).sum(), loss.sum(), count])
        if self.keep:
            columns = batch[2], targets, logits.argmax(1), logits.softmax(1)
            self.rows.append([column.cpu().numpy() for column in columns])

    def compute(self) -> dict[str, float]:
        top1, top5, loss, count = self.world.sum(self.sums).tolist()
        ranked = {"top5": 100 * top5 / count} if self.classes >= LEAST_FOR_TOP5 else {}
        return {"top1": 100 * top1 / count, **ranked, "loss": loss / count, "count": int(count)}

    def predictions(self) -> dict[str, np.ndarray]:
        rows = [row for part in self.world.gather(self.rows) for row in part]
        index, target, prediction, probability = (np.concatenate(column) for column in zip(*rows, strict=True))
        order = index.argsort()
        return {"target": target[order], "prediction": prediction[order], "probability": probability[order]}

    def details(self) -> dict[str, Any]:
        return {}
