"""Detectors of transformers with the interface of torchvision's: boxes or masks as a set, without suppression."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_convert

from ....zoo.dense import DenseBackbone
from ...heads.box_detector import KINDS, BoxDetector
from ...heads.mask_classifier import MaskClassifier
from ...heads.mask_inference import instances
from ...heads.mask_kinds import mask2former, pem
from ...heads.mask_loss import MaskTarget
from .options import DetectOptions

DETECTIONS = 100  # of an image, as COCO's evaluation counts
MASK_DETECTORS = {"mask2former": mask2former, "pem": pem}
QUERY_DETECTORS = (*MASK_DETECTORS, *KINDS)


class Body(nn.Module):
    """A dense backbone under the name that the weights of backbones have in every detector."""

    def __init__(self, body: DenseBackbone):
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.body(images)


class QueryDetector(nn.Module):
    """Images are normalized, resized in evaluation, and padded to multiples of 32 pixels, as torchvision does."""

    def __init__(self, body: DenseBackbone, *, size: int, max_size: int):
        super().__init__()
        self.backbone = Body(body)
        cfg = body.pretrained_cfg
        self.transform = GeneralizedRCNNTransform(size, max_size, cfg["mean"], cfg["std"], _skip_resize=True)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """See `DetectorMixin.forward`."""
        batch, targets = self.transform(images, targets)
        if self.training:
            assert targets is not None
            return self.losses(batch.tensors, batch.image_sizes, targets)
        sizes = [tuple(image.shape[-2:]) for image in images]
        return self.predictions(batch.tensors, batch.image_sizes, sizes)

    def batched(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] in 0..1, which are not resized, to tensors of a fixed shape: what an export computes.

        Boxes [B, N, 4] in pixels, labels and scores [B, N]; of Mask2Former and PEM the logits `classes`
        [B, Q, classes + 1] and `masks` [B, Q, h, w] at a quarter of the size of the padded image.
        """
        transform: Any = self.transform
        mean, std = (images.new_tensor(values)[:, None, None] for values in (transform.image_mean, transform.image_std))
        height, width = images.shape[-2:]
        padded = F.pad((images - mean) / std, (0, -width % 32, 0, -height % 32))
        return self.fixed_predictions(padded, height, width)

    def fixed_predictions(self, images: Tensor, height: int, width: int) -> dict[str, Tensor]:
        """images: [B, 3, H, W], normalized and padded; height, width: without padding. See `batched`."""
        raise NotImplementedError

    def losses(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """images: [B, 3, H, W], padded; sizes: height and width of each without padding; targets: in their pixels."""
        raise NotImplementedError

    def predictions(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, ...]]
    ) -> list[dict[str, Tensor]]:
        """wanted: height and width in which the boxes and masks of each image are given."""
        raise NotImplementedError

    def head_no_weight_decay(self) -> set[str]:
        head: Any = self.head
        return {f"head.{name}" for name in head.no_weight_decay()}


class BoxQueries(QueryDetector):
    """RT-DETRv2, D-FINE and Deformable DETR."""

    def __init__(self, body: DenseBackbone, detect: DetectOptions, classes: int, *, size: int):
        super().__init__(body, size=size, max_size=detect.max_size)
        self.head = BoxDetector(
            detect.detector, self.backbone, body.channels, classes, width=detect.channels, **detect.kwargs
        )

    def losses(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        scale = images.new_tensor([width, height, width, height])
        relative = [
            {"class_labels": one["labels"], "boxes": box_convert(one["boxes"], "xyxy", "cxcywh") / scale}
            for one in targets
        ]
        return self.head.losses(images, pixel_mask(images, sizes), relative)

    def predictions(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, ...]]
    ) -> list[dict[str, Tensor]]:
        boxes, labels, scores = best_queries(*self.head(images, pixel_mask(images, sizes)))
        found = []
        for number, (size, to) in enumerate(zip(sizes, wanted, strict=True)):
            # from shares of the padded image to pixels of the given one
            factors = [images.shape[side] * to[side - 2] / size[side - 2] for side in (3, 2)]
            corners = boxes[number] * boxes.new_tensor(factors * 2)
            corners = corners.clamp(min=0).minimum(corners.new_tensor([to[1], to[0]] * 2))
            found.append({"boxes": corners, "labels": labels[number], "scores": scores[number]})
        return found

    def fixed_predictions(self, images: Tensor, height: int, width: int) -> dict[str, Tensor]:
        whole = images.shape[-2:]
        mask = F.pad(torch.ones_like(images[:, 0, :height, :width]), (0, whole[1] - width, 0, whole[0] - height))
        boxes, labels, scores = best_queries(*self.head(images, mask))
        corners = (boxes * boxes.new_tensor([whole[1], whole[0]] * 2)).clamp(min=0)
        return {"boxes": corners.minimum(corners.new_tensor([width, height] * 2)), "labels": labels, "scores": scores}


class MaskQueries(QueryDetector):
    """Mask2Former and PEM: instance masks, and the boxes around them."""

    def __init__(self, body: DenseBackbone, detect: DetectOptions, classes: int, *, size: int):
        super().__init__(body, size=size, max_size=detect.max_size)
        widths = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), detect.channels)
        maps: dict[str, Any] = {"channels": body.channels, "strides": body.strides, "classes": classes}
        build = MASK_DETECTORS[detect.detector]
        parts = build({**widths, **detect.kwargs}, "task.detect.kwargs", **maps)
        self.head = MaskClassifier(parts.pixel_decoder, parts.decoder, width=parts.width, classes=classes)
        self.criterion = parts.criterion

    def losses(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        objects = [MaskTarget(one["labels"], pad_to(one["masks"], images.shape[-2:])) for one in targets]
        return self.criterion(self.head(self.backbone(images)), objects)

    def predictions(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, ...]]
    ) -> list[dict[str, Tensor]]:
        outputs = self.head(self.backbone(images))
        return [
            instances(outputs, number, canvas=images.shape[-2:], size=size, wanted=to, count=DETECTIONS)
            for number, (size, to) in enumerate(zip(sizes, wanted, strict=True))
        ]

    def fixed_predictions(self, images: Tensor, height: int, width: int) -> dict[str, Tensor]:
        outputs = self.head(self.backbone(images))
        return {"classes": outputs.classes[-1], "masks": outputs.masks[-1]}


def best_queries(logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of a query and a class: boxes [B, N, 4] as corners, labels and scores [B, N], the best first.

    logits: [B, Q, classes]; boxes: [B, Q, 4] as center, width and height.
    """
    queries, classes = logits.shape[1:]
    scores, order = logits.sigmoid().flatten(1).topk(min(DETECTIONS, queries * classes))
    chosen = boxes.gather(1, (order // classes)[..., None].expand(-1, -1, 4))
    return box_convert(chosen, "cxcywh", "xyxy"), order % classes, scores


def pixel_mask(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """[B, H, W]: 1 on the images, whose heights and widths are `sizes`, 0 on the padding."""
    mask = images.new_zeros(len(images), *images.shape[-2:])
    for one, (height, width) in zip(mask, sizes, strict=True):
        one[:height, :width] = 1
    return mask


def pad_to(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks [N, h, w] with zeros on the right and at the bottom, [N, *size]."""
    return F.pad(masks, (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2]))
