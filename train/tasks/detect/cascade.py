"""Cascade Mask R-CNN (Cai and Vasconcelos, CVPR 2018, arXiv 1712.00726) of torchvision's R-CNN heads.

As in mmdetection's implementation, with which most published detectors were trained, each stage has a mask head.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss

# by stage: the overlap from which a box belongs to an object, the factors of the encoded boxes (x, y, width, height),
# and the weight of the losses (section 4.1 of the paper)
OVERLAPS = (0.5, 0.6, 0.7)
BOX_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
WIDTH, CONVOLUTIONS, MASK_LAYERS = 1024, 4, (256, 256, 256, 256)
GIOU_WEIGHT = 10.0


class BoxPredictor(nn.Module):
    """Logits of the classes and encoded boxes: `[N, width] -> [N, classes], [N, 4 * boxes]`.

    boxes: 1, one for all classes, or as many as classes.
    """

    def __init__(self, width: int, classes: int, boxes: int):
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(width, classes), nn.Linear(width, 4 * boxes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


class CascadeRoIHeads(nn.Module):
    """Stages of `RoIHeads`, each of which takes the boxes that the one before it has refined.

    giou: whether the loss of boxes is GIoU of decoded boxes with a weight of 10, or smooth L1 of encoded ones with
    beta 1. Class 0 is the background.
    """

    stages: Any

    def __init__(self, stages: Sequence[RoIHeads], *, giou: bool):
        super().__init__()
        self.stages, self.giou = nn.ModuleList(stages), giou

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image and no losses, or in training no detections and losses named by stage, from 1.

        features: maps by name; proposals: boxes [N, 4] of each image in pixels; image_shapes: (height, width).
        """
        if self.training:
            assert targets is not None
            return [], self.losses(features, proposals, image_shapes, targets)
        return self.detections(features, proposals, image_shapes), {}

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Every stage matches the boxes again, by its own overlap, and samples from them and the true boxes."""
        losses: dict[str, Tensor] = {}
        for number, (stage, weight) in enumerate(zip(self.stages, LOSS_WEIGHTS, strict=True), 1):
            chosen, matched, labels, encoded = stage.select_training_samples(proposals, targets)
            logits, deltas = predict(stage, features, chosen, image_shapes)
            found = {"loss_classifier": F.cross_entropy(logits, torch.cat(labels))}
            found["loss_box_reg"] = self.box_loss(stage, deltas, chosen, torch.cat(labels), torch.cat(encoded))
            found["loss_mask"] = mask_loss(stage, features, chosen, matched, labels, image_shapes, targets)
            losses |= {f"{name}_{number}": weight * loss for name, loss in found.items()}
            if number < len(self.stages):
                with torch.no_grad():
                    refined = refine(stage, logits, deltas, chosen, image_shapes, torch.cat(labels))
                # true boxes are added again by the next stage; their refined copies would be nearly the same boxes
                true = [is_any_of(*pair) for pair in zip(chosen, (t["boxes"] for t in targets), strict=True)]
                proposals = [boxes[~mask] for boxes, mask in zip(refined, true, strict=True)]
        return losses

    def box_loss(self, stage: Any, deltas: Tensor, boxes: list[Tensor], labels: Tensor, encoded: Tensor) -> Tensor:
        """The loss of the sampled boxes that belong to an object, summed and divided by the number of all samples."""
        objects = torch.where(labels > 0)[0]
        predicted = of_class(deltas, labels)[objects]
        if not self.giou:
            loss = F.smooth_l1_loss(predicted, encoded[objects], beta=1.0, reduction="sum")
        else:
            priors = torch.cat(boxes)[objects]
            decoded, true = (stage.box_coder.decode_single(codes, priors) for codes in (predicted, encoded[objects]))
            loss = GIOU_WEIGHT * generalized_box_iou_loss(decoded, true, reduction="sum")
        return loss / max(len(labels), 1)

    def detections(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Classes by the mean of the logits of all stages, boxes of the last one, the mean of the masks of all."""
        first, *others = self.stages
        logits, deltas = predict(first, features, proposals, image_shapes)
        every, before = [logits], first
        for stage in others:
            proposals = refine(before, logits, deltas, proposals, image_shapes)
            logits, deltas = predict(stage, features, proposals, image_shapes)
            every, before = [*every, logits], stage
        mean = torch.stack(every).mean(0)
        per_class = deltas.unflatten(1, (-1, 4)).expand(-1, mean.shape[1], -1).flatten(1)
        boxes, scores, labels = before.postprocess_detections(mean, per_class, proposals, image_shapes)
        masks = [maskrcnn_inference(mask_logits(stage, features, boxes, image_shapes), labels) for stage in self.stages]
        return [
            {"boxes": box, "labels": label, "scores": score, "masks": torch.stack(found).mean(0)}
            for box, label, score, found in zip(boxes, labels, scores, zip(*masks, strict=True), strict=True)
        ]


def predict(
    stage: Any, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Logits and encoded boxes that a stage has for the boxes of all images."""
    return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, boxes, image_shapes)))


def mask_logits(
    stage: Any, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
) -> Tensor:
    """`[N, classes, 28, 28]` for the boxes of all images."""
    return stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, boxes, image_shapes)))


def mask_loss(
    stage: Any,
    features: dict[str, Tensor],
    boxes: list[Tensor],
    matched: list[Tensor],
    labels: list[Tensor],
    image_shapes: list[tuple[int, int]],
    targets: list[dict[str, Tensor]],
) -> Tensor:
    """The loss of the masks in the sampled boxes that belong to an object."""
    objects = [torch.where(found > 0)[0] for found in labels]
    boxes, matched = ([t[rows] for t, rows in zip(ts, objects, strict=True)] for ts in (boxes, matched))
    logits = mask_logits(stage, features, boxes, image_shapes)
    masks, classes = ([target[key] for target in targets] for key in ("masks", "labels"))
    return maskrcnn_loss(logits, boxes, masks, classes, matched)


def refine(
    stage: Any,
    logits: Tensor,
    deltas: Tensor,
    boxes: list[Tensor],
    image_shapes: list[tuple[int, int]],
    labels: Tensor | None = None,
) -> list[Tensor]:
    """The boxes that a stage predicts, clipped to the image.

    Of boxes per class, that of the object's class, and for background or without labels that of the likeliest class.
    """
    likeliest = logits[:, 1:].argmax(1) + 1
    classes = likeliest if labels is None else torch.where(labels > 0, labels, likeliest)
    decoded = stage.box_coder.decode_single(of_class(deltas, classes), torch.cat(boxes))
    parts = decoded.split([found.shape[0] for found in boxes])
    return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, image_shapes, strict=True)]


def of_class(deltas: Tensor, classes: Tensor) -> Tensor:
    """The encoded boxes `[N, 4]` of the given classes `[N]`, from one for all classes or from one per class."""
    if deltas.shape[1] == 4:
        return deltas
    return deltas.unflatten(1, (-1, 4))[torch.arange(deltas.shape[0], device=deltas.device), classes]


def is_any_of(boxes: Tensor, others: Tensor) -> Tensor:
    """Which of the boxes `[N, 4]` are exactly one of the others `[M, 4]`: `[N]`."""
    return (boxes[:, None] == others.to(boxes.dtype)[None]).all(2).any(1)


class CascadeMaskRCNN(detection.MaskRCNN):
    """Mask R-CNN of torchvision with three stages of box and mask heads.

    convolutions: whether the box heads are those of mmdetection's configurations since Swin: four convolutions with
    batch norm and a linear layer, boxes per class and the GIoU loss. Otherwise they are those of the paper: two linear
    layers, one box for all classes and smooth L1.
    """

    def __init__(self, backbone: Any, num_classes: int, *, convolutions: bool, **options: Any):
        # those of the stages are built below
        none: Any = nn.Identity()
        heads = {"box_head": none, "box_predictor": none, "mask_head": none, "mask_predictor": none}
        super().__init__(backbone, **options, **heads)
        plain: Any = self.roi_heads
        channels: int = backbone.out_channels
        side = plain.box_roi_pool.output_size[0]
        sampling = (plain.fg_bg_sampler.batch_size_per_image, plain.fg_bg_sampler.positive_fraction)
        results = (plain.score_thresh, plain.nms_thresh, plain.detections_per_img)
        if convolutions:
            wide = [channels] * CONVOLUTIONS
            head = partial(FastRCNNConvFCHead, (channels, side, side), wide, [WIDTH], norm_layer=nn.BatchNorm2d)
        else:
            head = partial(TwoMLPHead, channels * side**2, WIDTH)
        stages = [
            RoIHeads(
                plain.box_roi_pool,
                head(),
                BoxPredictor(WIDTH, num_classes, num_classes if convolutions else 1),
                overlap,
                overlap,
                *sampling,
                weights,
                *results,
                plain.mask_roi_pool,
                MaskRCNNHeads(channels, MASK_LAYERS, dilation=1),
                MaskRCNNPredictor(MASK_LAYERS[-1], 256, num_classes),
            )
            for overlap, weights in zip(OVERLAPS, BOX_WEIGHTS, strict=True)
        ]
        self.roi_heads = CascadeRoIHeads(stages, giou=convolutions)
