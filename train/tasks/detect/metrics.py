"""COCO's average precision and recall, of boxes and of masks, in percent."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UserError

if TYPE_CHECKING:
    from .task import DetectTask


FIGURES = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_s",
    "map_medium": "ap_m",
    "map_large": "ap_l",
    "mar_1": "ar1",
    "mar_10": "ar10",
    "mar_100": "ar",
    "mar_small": "ar_s",
    "mar_medium": "ar_m",
    "mar_large": "ar_l",
}


class DetectionMetrics:
    """AP over IoU 0.5 to 0.95 and the rest of COCO's summary; a figure of which nothing is defined is left out.

    Each process keeps what it has seen; the figures are computed by rank 0, of everything in data-set order. box_ap
    decides which checkpoint is the best, for instance segmentation too.
    """

    def __init__(self, task: "DetectTask"):
        self.task = task
        self.kinds = ("bbox", "segm") if task.masks else ("bbox",)
        self.metric, self.indices = self._metric(), []
        self.classes: dict[str, dict[str, float]] = {}

    def update(self, model: nn.Module, batch: Any) -> None:
        images, targets = self.task.to_device(batch)
        found = [self._judged(one) for one in model(images)]
        targets = [{name: tensor.cpu() for name, tensor in target.items()} for target in targets]
        self.metric.update(found, targets)
        self.indices += [int(index) for index in batch[2]]

    def compute(self) -> dict[str, float]:
        whole, order = self._whole()
        found = self._figures(whole, len(order)) if self.task.world.main else None
        figures, self.classes = self.task.world.broadcast_object(found)
        return figures

    def details(self) -> dict[str, Any]:
        """The figures of each class that is there, as `compute` found them."""
        return {"classes": self.classes}

    def predictions(self) -> dict[str, np.ndarray]:
        """Objects there and found, of all images one after the other: `*_image` has the image of each.

        Masks are kept of the first images, as COCO's compressed RLE, in the order of these images' objects.
        """
        whole, order = self._whole()
        rows: dict[str, np.ndarray] = {"image": np.array(order), "class_names": np.array(self.task.classes)}
        for side, ours in (("groundtruth", "target"), ("detection", "prediction")):
            counts = [len(labels) for labels in whole[f"{side}_labels"]]
            rows[f"{ours}_image"] = np.repeat(np.array(order, np.int64), counts)
            rows[f"{ours}_box"] = _xyxy(_joined(whole[f"{side}_box"]).reshape(-1, 4))
            rows[f"{ours}_label"] = _joined(whole[f"{side}_labels"]).astype(np.int64)
            if self.task.masks:
                coded = [mask for image in whole[f"{side}_mask"][: self.task.kept] for mask in image]
                rows[f"{ours}_mask"] = np.array([bytes(counts) for _, counts in coded])
                rows[f"{ours}_mask_size"] = np.array([size for size, _ in coded], np.int64).reshape(-1, 2)
        rows["prediction_score"] = _joined(whole["detection_scores"]).astype(np.float32)
        rows["target_crowd"] = _joined(whole["groundtruth_crowds"]).astype(np.int64)
        return rows

    def _metric(self) -> Any:
        try:
            from torchmetrics.detection import MeanAveragePrecision

            metric = MeanAveragePrecision(
                iou_type=self.kinds,  # type: ignore[arg-type]
                backend="faster_coco_eval",
                extended_summary=True,
                sync_on_compute=False,
            )
        except ImportError as error:
            raise UserError(
                f"average precision needs packages that are missing ({error}): pip install 'tessel[dense]'"
            ) from error
        metric.warn_on_many_detections = False  # as in COCO's summary, the 100 best count
        return metric

    def _judged(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The 100 best of an image, on the CPU."""
        best = found["scores"].float().argsort(descending=True, stable=True)[:100]
        kept = {name: tensor[best].cpu() for name, tensor in found.items()}
        kept = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in kept.items()}
        if self.task.masks:
            kept["masks"] = kept["masks"][:, 0] > 0.5
        return kept

    def _whole(self) -> tuple[dict[str, list[Any]], list[int]]:
        """What all processes have seen, by the names of torchmetrics' state, in data-set order."""
        parts = self.task.world.gather((dict(self.metric.metric_state), self.indices))
        order = np.argsort([index for _, indices in parts for index in indices], kind="stable")
        whole = {}
        for name in parts[0][0]:
            rows = [row for state, _ in parts for row in state[name]]
            whole[name] = [rows[place] for place in order] if rows else []
        return whole, sorted(index for _, indices in parts for index in indices)

    def _figures(self, whole: dict[str, list[Any]], count: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        metric = self._metric()
        for name, rows in whole.items():
            setattr(metric, name, rows)
        metric._update_count = 1  # torchmetrics warns of figures without an update
        found = metric.compute()
        figures: dict[str, float] = {}
        classes: dict[str, dict[str, float]] = {}
        for kind, ours in zip(self.kinds, ("box", "mask"), strict=False):
            prefix = f"{kind}_" if len(self.kinds) > 1 else ""
            values = {f"{ours}_{name}": 100 * float(found[prefix + theirs]) for theirs, name in FIGURES.items()}
            figures |= {name: value for name, value in values.items() if value >= 0}
            figures.setdefault(f"{ours}_ap", 0.0)
            classes[f"{ours}_ap"] = self._of_classes(found[f"{prefix}precision"], found["classes"].reshape(-1).tolist())
        return figures | {"count": count}, classes

    def _of_classes(self, precision: Tensor, labels: list[int]) -> dict[str, float]:
        """precision: [IoU, recall, class, area, detections], -1 where nothing is defined."""
        values = {}
        for place, label in enumerate(labels):
            defined = precision[:, :, place, 0, -1]
            if (defined := defined[defined > -1]).numel():
                values[self.task.classes[label]] = 100 * float(defined.double().mean())
        return values


def of_image(predictions: Mapping[str, np.ndarray], index: int) -> dict[str, Tensor]:
    """What was found in one image, out of `DetectionMetrics.predictions`."""
    here = predictions["prediction_image"] == index
    found = {
        "boxes": torch.from_numpy(predictions["prediction_box"][here]),
        "labels": torch.from_numpy(predictions["prediction_label"][here]),
        "scores": torch.from_numpy(predictions["prediction_score"][here]),
    }
    if "prediction_mask" in predictions and here.any():
        from faster_coco_eval.core import mask as coder

        coded, sizes = predictions["prediction_mask"], predictions["prediction_mask_size"]
        masks = [coder.decode({"size": sizes[i].tolist(), "counts": bytes(coded[i])}) for i in np.flatnonzero(here)]
        found["masks"] = torch.from_numpy(np.stack(masks))
    return found


def _joined(rows: list[Tensor]) -> np.ndarray:
    return torch.cat([row.flatten() for row in rows]).numpy() if rows else np.zeros(0, np.float32)


def _xyxy(boxes: np.ndarray) -> np.ndarray:
    """torchmetrics keeps x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
