"""Panoptic quality by the rule of the COCO challenge (Kirillov et al., CVPR 2019, arXiv 1801.00868, section 4).

torchmetrics' metric of this name follows another rule where pixels have no prediction, and knows no crowds.
"""

import numpy as np


def panoptic_counts(
    truth: np.ndarray,
    labels: np.ndarray,
    crowd: np.ndarray,
    found: np.ndarray,
    found_labels: np.ndarray,
    classes: int,
) -> np.ndarray:
    """Sums [classes, 4] of one image: of the IoU of matches, and numbers of matches, false positives, false negatives.

    truth, found: [H, W], 0 for pixels without a segment, else 1 + the index of the segment in `labels` [N] or
    `found_labels` [M]; crowd: [N], 1 for regions of many objects, which are no misses.

    A segment of the truth and a found one of the same class match if their IoU exceeds 0.5, where pixels of unlabelled
    truth do not count. A found segment without a match is no false positive if more than half of it lies on unlabelled
    pixels and crowds of its class.
    """
    shape = (len(labels) + 1, len(found_labels) + 1)
    pairs = truth.astype(np.int64).ravel() * shape[1] + found.ravel()
    common = np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)
    areas, found_areas = common.sum(1)[1:], common.sum(0)[1:]
    inside, unlabelled = common[1:, 1:], common[0, 1:]
    union = areas[:, None] + found_areas - inside - unlabelled
    iou = inside / np.maximum(union, 1)
    same, crowd = labels[:, None] == found_labels, crowd.astype(bool)
    match = same & ~crowd[:, None] & (iou > 0.5)  # above a half, a segment has at most one match
    ignored = unlabelled + (inside * (same & crowd[:, None])).sum(0)
    present = (areas > 0) & ~crowd
    missed = present & ~match.any(1)
    wrong = (found_areas > 0) & ~match.any(0) & ~(ignored > 0.5 * found_areas)
    sums = np.zeros((classes, 4))
    rows, columns = np.nonzero(match)
    np.add.at(sums[:, 0], labels[rows], iou[rows, columns])
    np.add.at(sums[:, 1], labels[rows], 1)
    np.add.at(sums[:, 2], found_labels[wrong], 1)
    np.add.at(sums[:, 3], labels[missed], 1)
    return sums


def panoptic_quality(sums: np.ndarray) -> np.ndarray:
    """PQ, SQ and RQ [classes, 3] in 0..1 from the sums [classes, 4] of all images; nan for classes without segments.

    SQ is the mean IoU of the matches (0 without one), RQ the F1 score of the segments, PQ their product.
    """
    iou, matches, wrong, missed = sums.T
    total = matches + 0.5 * wrong + 0.5 * missed
    undefined = total == 0
    sq, rq = iou / np.maximum(matches, 1), matches / np.where(undefined, 1, total)
    return np.where(undefined, np.nan, np.stack([sq * rq, sq, rq])).T
