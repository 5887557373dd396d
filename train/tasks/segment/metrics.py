"""What a segmenter predicts, from whole images or windows, averaged over views; and how good that is."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.segmentation import IGNORE_INDEX
from ...distributed.parallel import memory_format
from .options import SegmentTest

if TYPE_CHECKING:
    from .task import SegmentTask


LONGEST = 512  # pixels of a side of what is kept to be shown


Sample = tuple[list[Tensor], Tensor, int]  # the views of an image, its mask, its index


class SegmentationMetrics:
    """mIoU, mAcc, aAcc (percent) over a data set; with `keep`, the first predictions too."""

    def __init__(self, task: "SegmentTask", keep: bool):
        self.task, self.keep = task, keep
        classes = len(task.classes)
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.seen = torch.zeros((), dtype=torch.int64)
        self.rows: list[tuple[int, np.ndarray, np.ndarray]] = []

    def update(self, model: nn.Module, batch: Sequence[Sample]) -> None:
        layout = memory_format(self.task.recipe.parallel)
        for samples in alike(batch):
            views = [
                torch.stack(images).to(self.task.world.device, memory_format=layout)
                for images in zip(*(s[0] for s in samples), strict=True)
            ]
            guesses = predict(
                model, views, samples[0][1].shape[-2:], self.task.recipe.task.segment.test, self.task.window
            )
            for (_, target, index), guess in zip(samples, guesses.cpu(), strict=True):
                self.confusion += confusion(target, guess, len(self.confusion))
                self.seen += 1
                if self.keep and index < self.task.kept:
                    self.rows.append((int(index), thinned(target), thinned(guess)))

    def compute(self) -> dict[str, float]:
        iou, recall, total = self._per_class()
        known = int(self.world_sum(self.seen))
        return {
            "miou": 100 * float(iou.nanmean()),
            "macc": 100 * float(recall.nanmean()),
            "aacc": 100 * float(total.diag().sum() / total.sum()),
            "count": known,
        }

    def details(self) -> dict[str, Any]:
        """IoU and accuracy of each class in percent; null for one that the data does not have."""
        figures = dict(zip(("iou", "acc"), self._per_class()[:2], strict=True))
        named = {key: zip(self.task.classes, values.tolist(), strict=True) for key, values in figures.items()}
        return {"classes": {key: {name: _percent(share) for name, share in rows} for key, rows in named.items()}}

    def predictions(self) -> dict[str, np.ndarray]:
        """The first images: index [N], height and width of what is kept [N, 2], target and prediction [N, H, W].

        Of an image of more than 512 pixels a side only every second, third, ... row and column is kept; the arrays
        are padded with 255, as ignored pixels are. Beside them the confusion matrix [class, predicted].
        """
        total = self.world_sum(self.confusion).numpy()
        rows = sorted((row for part in self.task.world.gather(self.rows) for row in part), key=lambda row: row[0])
        shapes = np.array([target.shape for _, target, _ in rows], np.int64).reshape(-1, 2)
        height, width = shapes.max(0, initial=0)
        masks = np.full((2, len(rows), height, width), IGNORE_INDEX, np.uint8)
        for number, (_, *pair) in enumerate(rows):
            for kind, mask in enumerate(pair):
                masks[kind, number, : mask.shape[0], : mask.shape[1]] = mask
        index = np.array([row[0] for row in rows], np.int64)
        return {"index": index, "size": shapes, "target": masks[0], "prediction": masks[1], "confusion": total}

    def world_sum(self, counts: Tensor) -> Tensor:
        return self.task.world.sum(counts)

    def _per_class(self) -> tuple[Tensor, Tensor, Tensor]:
        """IoU [C] and recall [C], nan where a class neither occurs nor is predicted; the confusion matrix [C, C]."""
        total = self.world_sum(self.confusion).double()
        hits, targets, guesses = total.diag(), total.sum(1), total.sum(0)
        return hits / (targets + guesses - hits), hits / targets, total


def confusion(target: Tensor, guess: Tensor, classes: int) -> Tensor:
    """Counts [class, predicted] over the known pixels of masks [H, W]."""
    known = target != IGNORE_INDEX
    pairs = target[known].long() * classes + guess[known].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def predict(model: nn.Module, views: list[Tensor], size: Sequence[int], test: SegmentTest, window: int) -> Tensor:
    """The class [B, *size] of each pixel; views: the images [B, 3, h, w] at each scale; window: its side, for slide.

    One view: the largest logit after resizing to `size`. Several, or flipped ones: of the mean probability.
    """
    run = sliding(model, window, test.stride or max(1, window * 2 // 3)) if test.mode == "slide" else model
    flips = (False, True) if test.flip else (False,)
    if len(views) * len(flips) == 1:
        return enlarged(run(views[0]), size).argmax(1)
    total: Any = 0
    for view in views:
        for flip in flips:
            logits = run(view.flip(-1)).flip(-1) if flip else run(view)
            total = total + enlarged(logits, size).softmax(1)
    return total.argmax(1)


def sliding(model: nn.Module, window: int, stride: int) -> Callable[[Tensor], Tensor]:
    """`model` over windows of an image, at most `stride` apart; where windows overlap their logits are averaged."""

    def run(images: Tensor) -> Tensor:
        total: Any = 0
        counts = images.new_zeros(1, 1, *images.shape[-2:])
        for top in starts(images.shape[-2], window, stride):
            for left in starts(images.shape[-1], window, stride):
                place = (..., slice(top, top + window), slice(left, left + window))
                logits = model(images[place].contiguous()).float()
                if isinstance(total, int):
                    total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
                total[place] += logits
                counts[place] += 1
        return total / counts

    return run


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin: every `stride`, the last one at the end of what is covered."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    logits = logits.float()
    same = tuple(logits.shape[-2:]) == tuple(size)
    return logits if same else F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def alike(batch: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Runs of samples that fit into one tensor."""

    def shapes(sample: Sample) -> list[torch.Size]:
        return [*(view.shape for view in sample[0]), sample[1].shape]

    return (list(samples) for _, samples in groupby(batch, shapes))


def thinned(mask: Tensor) -> np.ndarray:
    """Every n-th row and column, so that at most 512 pixels a side are left."""
    step = -(-max(mask.shape) // LONGEST)
    return mask[::step, ::step].to(torch.uint8).numpy()


def _percent(share: float) -> float | None:
    return None if share != share else 100 * share
