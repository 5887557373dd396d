"""Detectors of transformers with the interface of torchvision's: boxes or masks as a set, without suppression."""

from collections.abc import Sequence
from typing import Any

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
        logits, boxes = self.head(images, pixel_mask(images, sizes))
        classes = logits.shape[-1]
        scores, order = logits.sigmoid().flatten(1).topk(min(DETECTIONS, logits[0].numel()))
        found = []
        for number, (size, to) in enumerate(zip(sizes, wanted, strict=True)):
            queries, labels = order[number] // classes, order[number] % classes
            # from shares of the padded image to pixels of the given one
            factors = [images.shape[side] * to[side - 2] / size[side - 2] for side in (3, 2)]
            corners = box_convert(boxes[number, queries], "cxcywh", "xyxy") * boxes.new_tensor(factors * 2)
            corners = corners.clamp(min=0).minimum(corners.new_tensor([to[1], to[0]] * 2))
            found.append({"boxes": corners, "labels": labels, "scores": scores[number]})
        return found


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


def pixel_mask(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """[B, H, W]: 1 on the images, whose heights and widths are `sizes`, 0 on the padding."""
    mask = images.new_zeros(len(images), *images.shape[-2:])
    for one, (height, width) in zip(mask, sizes, strict=True):
        one[:height, :width] = 1
    return mask


def pad_to(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks [N, h, w] with zeros on the right and at the bottom, [N, *size]."""
    return F.pad(masks, (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2]))
