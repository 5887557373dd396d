"""PLACEHOLDER train/tasks/classify/metrics.py"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .... import zoo as zoo  # registers the models with timm
from .task import ClassifyTask


class ClassificationMetrics:
    """Top-1, top-5 (percent) and cross entropy over a data set; with `keep`, every prediction too."""

    def __init__(self, task: ClassifyTask, keep: bool):
        self.task, self.keep = task, keep
        self.sums = torch.zeros(4, dtype=torch.float64, device=task.world.device)
        self.rows: list[list[np.ndarray]] = []

    def update(self, model: nn.Module, batch: Any) -> None:
        images, targets = self.task.placed(batch)
        logits = model(images).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="none").double()
        count = torch.tensor(len(targets), device=loss.device)
        self.sums += torch.stack([hits[:, 0].sum(), hits.any(1).sum(), loss.sum(), count])
        if self.keep:
            columns = batch[2], targets, logits.argmax(1), logits.softmax(1)
            self.rows.append([column.cpu().numpy() for column in columns])

    def compute(self) -> dict[str, float]:
        top1, top5, loss, count = self.task.world.sum(self.sums).tolist()
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count, "count": int(count)}

    def predictions(self) -> dict[str, np.ndarray]:
        rows = [row for part in self.task.world.gather(self.rows) for row in part]
        index, target, prediction, probability = (np.concatenate(column) for column in zip(*rows, strict=True))
        order = index.argsort()
        return {"target": target[order], "prediction": prediction[order], "probability": probability[order]}

    def details(self) -> dict[str, Any]:
        return {}
