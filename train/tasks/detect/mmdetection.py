"""Where torchvision's detectors differ from mmdetection's, with which most published detectors were trained."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

FINEST_SIDE = 56  # boxes below twice this side are pooled from the finest map (Lin et al., arXiv 1612.03144)


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign as in mmdetection and Detectron2: `aligned=True`, and one sample for each pixel that a bin covers.

    torchvision samples half a pixel of the feature map further right and below, at two by two points of each bin.
    """

    def __init__(self, strides: Sequence[int], output_size: int):
        """strides: of the feature maps "0", "1", ... in pixels."""
        super().__init__([str(number) for number in range(len(strides))], output_size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        """Maps [B, C, H, W] by name and boxes [N, 4] of each image in pixels -> [sum of N, C, *output_size]"""
        corners = torch.cat(boxes)
        images = torch.cat([torch.full_like(found[:, :1], number) for number, found in enumerate(boxes)])
        rois = torch.cat([images, corners], dim=1)
        sides = ((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])).clamp(min=0).sqrt()
        levels = (sides / FINEST_SIDE + 1e-6).log2().floor().clamp(0, len(self.strides) - 1)
        first = x[self.featmap_names[0]]
        pooled = first.new_zeros((len(rois), first.shape[1], *self.output_size))
        for level, (name, stride) in enumerate(zip(self.featmap_names, self.strides, strict=True)):
            (chosen,) = torch.where(levels == level)
            found = roi_align(x[name], rois[chosen], self.output_size, 1 / stride, self.sampling_ratio, aligned=True)
            pooled[chosen] = found.to(pooled.dtype)
        return pooled


class LastLevels(LastLevelP6P7):
    """The maps of strides 64 and 128 as in mmdetection's RetinaNet: torchvision has a ReLU between the two."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Maps [B, C, H, W] of the pyramid `p` and of the backbone `c` -> those of the pyramid and two more."""
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class BatchAveragedHead(RetinaNetHead):
    """RetinaNet's head with losses averaged over the positive anchors of the whole micro-batch, as in mmdetection.

    torchvision averages over those of each image, and then over the images, so that an anchor of an image with few
    objects weighs more. An image without positive anchors counts as one.
    """

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        counts = [(matched >= 0).sum().clamp(min=1) for matched in matched_idxs]
        sums: dict[str, Tensor] = {}
        for number, count in enumerate(counts):
            one = slice(number, number + 1)
            outputs = {key: value[one] for key, value in head_outputs.items()}
            means = super().compute_loss(targets[one], outputs, anchors[one], matched_idxs[one])
            sums = {name: sums.get(name, 0) + mean * count for name, mean in means.items()}
        return {name: total / torch.stack(counts).sum() for name, total in sums.items()}
