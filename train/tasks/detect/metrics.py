"""COCO's average precision and recall, of boxes and of instance masks, in percent."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...distributed.world import World
from ...errors import UserError

# suffixes of our names, in the order of the summary of COCO's evaluation
SUMMARY = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", "ar1", "ar10", "ar", "ar_s", "ar_m", "ar_l")
MAX_DETECTIONS = 100  # per image, as in COCO's evaluation
Objects = dict[str, Any]  # of one image: boxes [N, 4] (x1, y1, x2, y2), labels [N], ..., and masks as a list of RLE


class EvaluatedTask(Protocol):
    """What the metrics need of the task."""

    world: World
    classes: list[str]
    masks: bool
    kept: int

    def to_device(self, batch: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]: ...


class EvaluatedImage(NamedTuple):
    index: int  # in the data set
    height: int
    width: int
    target: Objects
    prediction: Objects


class DetectionMetrics:
    """AP over IoU 0.5 to 0.95 and the other metrics of COCO's summary; metrics without a defined value are left out.

    AP is not a sum over images. Each process keeps the objects of its images; rank 0 evaluates all of them, in the
    order of the data set, so that the result does not depend on the number of processes. faster_coco_eval is called
    directly, because the synchronization of torchmetrics' MeanAveragePrecision needs as many images on every process.
    `box_ap` chooses the best checkpoint, also for instance segmentation.
    """

    def __init__(self, task: EvaluatedTask):
        self.task = task
        self.coco = coco_tools()
        self.images: list[EvaluatedImage] = []
        self.class_ap: dict[str, dict[str, float]] = {}

    def update(self, model: nn.Module, batch: Any) -> None:
        images, targets = self.task.to_device(batch)
        for image, target, prediction, index in zip(images, targets, model(images), batch[2], strict=True):
            height, width = image.shape[-2:]
            found = self._encoded(self._top_detections(prediction))
            self.images.append(EvaluatedImage(int(index), height, width, self._encoded(target), found))

    def compute(self) -> dict[str, float]:
        images, metrics = self._all_images(), None
        if self.task.world.main:
            metrics = self._evaluate(images)
        values, self.class_ap = self.task.world.broadcast_object(metrics)
        return values

    def details(self) -> dict[str, Any]:
        """AP of each class that has objects, as the last call of `compute` found it."""
        return {"classes": self.class_ap}

    def predictions(self) -> dict[str, np.ndarray]:
        """The objects of all images, concatenated: `target_*` and `prediction_*`; `*_image` is the index of the image.

        Masks are kept for the first images only, as COCO's compressed RLE, in the order of the objects.
        """
        images = self._all_images()
        rows: dict[str, np.ndarray] = {
            "image": np.array([image.index for image in images], np.int64),
            "class_names": np.array(self.task.classes),
        }
        for name in ("target", "prediction"):
            objects = [getattr(image, name) for image in images]
            counts = [len(one["labels"]) for one in objects]
            rows[f"{name}_image"] = np.repeat(rows["image"], counts)
            rows[f"{name}_box"] = _concatenate(objects, "boxes", np.float32).reshape(-1, 4)
            rows[f"{name}_label"] = _concatenate(objects, "labels", np.int64)
            if self.task.masks:
                masks = [mask for one in objects[: self.task.kept] for mask in one["masks"]]
                rows[f"{name}_mask"] = np.array([mask["counts"] for mask in masks])
                rows[f"{name}_mask_size"] = np.array([mask["size"] for mask in masks], np.int64).reshape(-1, 2)
        rows["prediction_score"] = _concatenate([image.prediction for image in images], "scores", np.float32)
        rows["target_crowd"] = _concatenate([image.target for image in images], "iscrowd", np.int64)
        return rows

    def _all_images(self) -> list[EvaluatedImage]:
        """The images of all processes in the order of the data set."""
        return sorted((image for part in self.task.world.gather(self.images) for image in part), key=lambda i: i.index)

    def _top_detections(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The 100 detections with the highest scores, with masks [N, H, W] in 0 and 1."""
        best = found["scores"].float().argsort(descending=True, stable=True)[:MAX_DETECTIONS]
        found = {name: tensor[best] for name, tensor in found.items()}
        return found | {"masks": found["masks"][:, 0] > 0.5} if self.task.masks else found

    def _encoded(self, objects: dict[str, Tensor]) -> Objects:
        """Tensors as arrays on the CPU, and masks [N, H, W] as RLE."""
        arrays: Objects = {
            name: (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
            for name, tensor in objects.items()
        }
        if self.task.masks:
            arrays["masks"] = [
                self.coco.mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in arrays["masks"]
            ]
        return arrays

    def _evaluate(self, images: list[EvaluatedImage]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """The metrics by name, and the AP of each class: {box_ap or mask_ap: {class: AP}}."""
        values: dict[str, float] = {}
        class_ap: dict[str, dict[str, float]] = {}
        for name, iou_type in (("box", "bbox"), *([("mask", "segm")] if self.task.masks else [])):
            target, prediction = (self._to_coco(images, side, iou_type) for side in ("target", "prediction"))
            evaluation = self.coco.COCOeval_faster(target, prediction, iou_type, print_function=lambda *args: None)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            summary = zip(SUMMARY, evaluation.stats[: len(SUMMARY)].tolist(), strict=True)
            values |= {f"{name}_{suffix}": 100 * value for suffix, value in summary if value >= 0}  # -1: undefined
            values.setdefault(f"{name}_ap", 0.0)
            class_ap[f"{name}_ap"] = self._class_ap(evaluation.eval["precision"])
        return values | {"count": len(images)}, class_ap

    def _to_coco(self, images: list[EvaluatedImage], name: str, iou_type: str) -> Any:
        """The targets or predictions of all images as faster_coco_eval's data set; category ids are our labels."""
        annotations: list[dict[str, Any]] = []
        for image in images:
            objects = getattr(image, name)
            for number, (x1, y1, x2, y2) in enumerate(objects["boxes"].tolist()):
                row = {"id": len(annotations) + 1, "image_id": image.index, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                row["category_id"] = int(objects["labels"][number])
                if iou_type == "segm":
                    row["segmentation"] = objects["masks"][number]
                if name == "target":
                    row |= {"area": float(objects["area"][number]), "iscrowd": int(objects["iscrowd"][number])}
                else:
                    # the area of a prediction decides whether it counts as small, medium or large
                    area = self.coco.mask.area(row["segmentation"]) if iou_type == "segm" else (x2 - x1) * (y2 - y1)
                    row |= {"area": float(area), "iscrowd": 0, "score": float(objects["scores"][number])}
                annotations.append(row)
        return self.coco.COCO(
            {
                "images": [{"id": image.index, "height": image.height, "width": image.width} for image in images],
                "annotations": annotations,
                "categories": [{"id": label, "name": name} for label, name in enumerate(self.task.classes)],
            }
        )

    def _class_ap(self, precision: np.ndarray) -> dict[str, float]:
        """AP by class, without classes that have no objects. precision: [IoU, recall, class, area, detections]."""
        values = {}
        for label, name in enumerate(self.task.classes):
            defined = precision[:, :, label, 0, -1]  # all areas, 100 detections; -1: undefined
            if (defined := defined[defined > -1]).size:
                values[name] = 100 * float(defined.mean())
        return values


def coco_tools() -> Any:
    """The package faster_coco_eval. Raises UserError if it is not installed."""
    try:
        import faster_coco_eval
    except ImportError as error:
        raise UserError(
            f"average precision needs a package that cannot be imported ({error}): pip install 'tessel[dense]'"
        ) from error
    return faster_coco_eval


def image_predictions(predictions: Mapping[str, np.ndarray], index: int) -> dict[str, Tensor]:
    """The predictions for one image: boxes, labels, scores and, if they were kept, masks [N, H, W].

    predictions: from `DetectionMetrics.predictions`; index: of the image in the data set.
    """
    here = predictions["prediction_image"] == index
    found = {
        "boxes": torch.from_numpy(predictions["prediction_box"][here]),
        "labels": torch.from_numpy(predictions["prediction_label"][here]),
        "scores": torch.from_numpy(predictions["prediction_score"][here]),
    }
    if "prediction_mask" in predictions and here.any():
        counts, sizes = predictions["prediction_mask"], predictions["prediction_mask_size"]
        masks = [
            coco_tools().mask.decode({"size": sizes[i].tolist(), "counts": bytes(counts[i])})
            for i in np.flatnonzero(here)
        ]
        found["masks"] = torch.from_numpy(np.stack(masks))
    return found


def _concatenate(objects: Sequence[Objects], name: str, dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(one[name].ravel().astype(dtype) for one in objects)])
