"""From the classes and masks of queries to a prediction at the size of an image."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes

from .mask_classifier import MaskOutputs


def upsampled(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Mask logits [..., Q, h, w] in float32, resized to [..., Q, *size]."""
    single = masks.dim() == 3
    found = F.interpolate(masks[None] if single else masks, tuple(size), mode="bilinear", align_corners=False)
    return found[0].float() if single else found.float()


def semantic_scores(outputs: MaskOutputs, size: Sequence[int]) -> Tensor:
    """Scores [B, classes, *size] of each pixel: the sum over queries of class probability times mask probability.

    Mask2Former, section 3.1 of MaskFormer (arXiv 2107.06278): "no object" is left out, so scores do not sum to 1.
    """
    classes = outputs.classes[-1].float().softmax(-1)[..., :-1]
    # one image after the other, since all masks of a batch at full size would fill the memory
    return torch.stack(
        [
            torch.einsum("qc,qhw->chw", one, upsampled(masks, size).sigmoid())
            for one, masks in zip(classes, outputs.masks[-1], strict=True)
        ]
    )


def instances(
    outputs: MaskOutputs, image: int, *, canvas: Sequence[int], size: Sequence[int], wanted: Sequence[int], count: int
) -> dict[str, Tensor]:
    """The `count` best (query, class) pairs of an image: boxes [N, 4], labels, scores and masks [N, 1, *wanted].

    Mask2Former: a score is the class probability times the mean mask probability inside the mask; a query may appear
    with several classes. canvas: height and width of the padded image; size: without padding. Masks are 0 or 1; those
    without a pixel are left out.
    """
    probabilities = outputs.classes[-1][image].float().softmax(-1)[:, :-1]
    scores, order = probabilities.flatten().topk(min(count, probabilities.numel()))
    queries, labels = order // probabilities.shape[-1], order % probabilities.shape[-1]
    chosen, place = queries.unique(return_inverse=True)
    logits = upsampled(outputs.masks[-1][image, chosen], canvas)[:, : size[0], : size[1]]
    if tuple(size) != tuple(wanted):
        logits = upsampled(logits, wanted)
    masks = logits > 0
    pixels = masks.sum((1, 2))
    inside = (logits.sigmoid() * masks).sum((1, 2)) / pixels.clamp(min=1)
    kept = pixels[place] > 0
    place, labels, scores = place[kept], labels[kept], (scores * inside[place])[kept]
    boxes = masks_to_boxes(masks[pixels > 0]) + masks.new_tensor([0, 0, 1, 1], dtype=torch.float32)
    position = (pixels > 0).cumsum(0) - 1
    return {"boxes": boxes[position[place]], "labels": labels, "scores": scores, "masks": masks[place, None]}
