"""From the classes and masks of queries to a prediction at the size of an image."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes

from ...kernels.recording import exporting
from .mask_classifier import MaskOutputs


def upsampled(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Mask logits [..., Q, h, w] in float32, resized to [..., Q, *size]."""
    if not masks.numel():  # which torch refuses
        return masks.new_zeros(*masks.shape[:-2], *size, dtype=torch.float32)
    single = masks.dim() == 3
    found = F.interpolate(masks[None] if single else masks, tuple(size), mode="bilinear", align_corners=False)
    return found[0].float() if single else found.float()


def semantic_scores(outputs: MaskOutputs, size: Sequence[int]) -> Tensor:
    """Scores [B, classes, *size] of each pixel: the sum over queries of class probability times mask probability.

    Mask2Former, section 3.1 of MaskFormer (arXiv 2107.06278): "no object" is left out, so scores do not sum to 1.
    """
    classes, masks = outputs.classes[-1].float().softmax(-1)[..., :-1], outputs.masks[-1]
    if exporting():  # a loop over images would fix their number in the graph
        return torch.einsum("bqc,bqhw->bchw", classes, upsampled(masks, size).sigmoid())
    # one image after the other, since all masks of a batch at full size would fill the memory
    return torch.stack(
        [
            torch.einsum("qc,qhw->chw", one, upsampled(mask, size).sigmoid())
            for one, mask in zip(classes, masks, strict=True)
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


def panoptic(
    outputs: MaskOutputs,
    image: int,
    *,
    canvas: Sequence[int],
    size: Sequence[int],
    wanted: Sequence[int],
    things: Sequence[bool],
    min_score: float,
    min_overlap: float,
) -> dict[str, Tensor]:
    """Segments of an image that do not overlap: boxes [N, 4], labels, scores and masks [N, 1, *wanted].

    Mask2Former, after MaskFormer (arXiv 2107.06278, section 3.4): a pixel goes to the query with the highest product of
    class and mask probability, among queries whose class is not "no object" and has at least `min_score`. A segment
    is left out if less than `min_overlap` of its own mask is left. Segments of one stuff class become one, with the
    highest score. canvas, size: see `instances`; things: for each class, whether it is a thing.
    """
    scores, labels = outputs.classes[-1][image].float().softmax(-1).max(-1)
    kept = (labels < len(things)) & (scores >= min_score)
    scores, labels = scores[kept], labels[kept]
    logits = upsampled(outputs.masks[-1][image, kept], canvas)[:, : size[0], : size[1]]
    if tuple(size) != tuple(wanted):
        logits = upsampled(logits, wanted)
    own = logits > 0
    number = torch.arange(len(scores), device=scores.device)
    best = (scores[:, None, None] * logits.sigmoid()).argmax(0) if len(scores) else number.new_zeros(tuple(wanted))
    masks = own & (best == number[:, None, None])
    left = masks.sum((1, 2))
    chosen = ((left > 0) & (left >= min_overlap * own.sum((1, 2)))).nonzero()[:, 0].tolist()
    places: list[list[int]] = []  # the queries of each segment
    stuff: dict[int, list[int]] = {}
    for query in chosen:
        label = int(labels[query])
        if not things[label] and label in stuff:
            stuff[label].append(query)
            continue
        places.append([query])
        if not things[label]:
            stuff[label] = places[-1]
    merged = torch.stack([masks[place].any(0) for place in places]) if places else masks[:0]
    first = torch.tensor([place[0] for place in places], dtype=torch.long, device=scores.device)
    best_scores = [scores[place].max() for place in places]
    return {
        "boxes": masks_to_boxes(merged) + scores.new_tensor([0, 0, 1, 1]),
        "labels": labels[first],
        "scores": torch.stack(best_scores) if best_scores else scores[:0],
        "masks": merged[:, None],
    }
