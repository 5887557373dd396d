"""Panoptic quality of a model over the validation split."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UserError
from ..detect.metrics import DetectionMetrics, EvaluatedImage
from .quality import panoptic_counts, panoptic_quality

NAMES = ("pq", "sq", "rq")


class PanopticMetrics(DetectionMetrics):
    """PQ, SQ and RQ in percent: means over all classes, over things (`pq_things`) and over stuff (`pq_stuff`).

    Sums of each class are added over all processes. The segments of the first images are kept for pictures.
    """

    def __init__(self, task: Any):
        super().__init__(task)
        self.sums = torch.zeros(len(task.classes), 4, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.int64)

    def update(self, model: nn.Module, batch: Any) -> None:
        images, targets = self.task.to_device(batch)
        for image, target, prediction, index in zip(images, targets, model(images), batch[2], strict=True):
            height, width = image.shape[-2:]
            crowd = target["iscrowd"].cpu().numpy()
            truth, found = (segments(objects, height, width) for objects in (target, prediction))
            self.sums += torch.from_numpy(panoptic_counts(*truth, crowd, *found, classes=len(self.sums)))
            self.count += 1
            if index < self.task.kept:
                kept = self._encoded(self._top_detections(prediction))
                self.images.append(EvaluatedImage(int(index), height, width, self._encoded(target), kept))

    def compute(self) -> dict[str, float]:
        """Raises UserError if no image has a segment."""
        quality, task = self.quality(), self.task
        things = np.array(task.things)  # type: ignore[attr-defined]
        values: dict[str, float] = {}
        for suffix, rows in (("", np.ones_like(things)), ("_things", things), ("_stuff", ~things)):
            chosen = quality[rows]
            if (chosen := chosen[~np.isnan(chosen[:, 0])]).size:
                values |= {f"{name}{suffix}": 100 * float(v) for name, v in zip(NAMES, chosen.mean(0), strict=True)}
        if "pq" not in values:
            raise UserError("no image of the validation split has a segment, so there is nothing to evaluate")
        return values | {"count": int(task.world.sum(self.count))}

    def details(self) -> dict[str, Any]:
        """PQ, SQ and RQ of each class in percent; None for a class without segments."""
        rows = zip(self.task.classes, self.quality(), strict=True)
        known = {name: None if np.isnan(values[0]) else (100 * values).tolist() for name, values in rows}
        return {
            "classes": {
                key: {name: values and values[number] for name, values in known.items()}
                for number, key in enumerate(NAMES)
            }
        }

    def quality(self) -> np.ndarray:
        """PQ, SQ and RQ [classes, 3] in 0..1 over all processes."""
        return panoptic_quality(self.task.world.sum(self.sums).numpy())


def segments(objects: dict[str, Tensor], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The map [H, W] of masks that do not overlap, 0 for pixels in none, else 1 + the index of the mask; and labels."""
    masks = objects["masks"].reshape(-1, height, width)
    numbers = torch.arange(1, len(masks) + 1, device=masks.device)
    found = (masks.long() * numbers[:, None, None]).sum(0)
    return found.cpu().numpy(), objects["labels"].cpu().numpy()
