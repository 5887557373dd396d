"""Segmentation metrics against a count pixel by pixel, sliding windows, test-time augmentation, and the pictures."""

import errno
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.evaluation import save_pictures
from tessel.train.recipe.schema import Parallel
from tessel.train.tasks.segment.metrics import (
    SegmentationMetrics,
    confusion_matrix,
    group_by_shape,
    predict,
    sliding_window,
    subsample,
    window_starts,
)
from tessel.train.tasks.segment.options import SegmentTest
from tessel.train.tasks.segment.overlay import GAP, overlay, pictures


class Lookup(nn.Module):
    """Logits that are a fixed function of a pixel and its 3x3 neighborhood."""

    def forward(self, x):
        return x + 0.1 * nn.functional.avg_pool2d(x, 3, 1, 1)


class Middle(nn.Module):
    """Logits that depend on the position of a pixel in the input."""

    def forward(self, x):
        rows = torch.linspace(0, 1, x.shape[-2]).view(1, 1, -1, 1)
        return x * (1 + rows)


def fake_task(classes=4, world: Any = None, test: SegmentTest | None = None, kept=16):
    segment = SimpleNamespace(test=test or SegmentTest())
    recipe = SimpleNamespace(task=SimpleNamespace(segment=segment), parallel=Parallel())
    names = [f"c{number}" for number in range(classes)]
    return SimpleNamespace(
        classes=names, world=world or World(), recipe=recipe, window=16, kept=kept, normalize=lambda x: x
    )


def by_hand(pairs, classes):
    """mIoU, mean accuracy and pixel accuracy in percent, counted pixel by pixel."""
    inter, union, hits, totals, right, known = ([0] * classes for _ in range(4)), None, None, None, 0, 0
    inter, union, hits, totals = inter
    for target, guess in pairs:
        for t, g in zip(target.flatten().tolist(), guess.flatten().tolist(), strict=True):
            if t == 255:
                continue
            known, right = known + 1, right + (t == g)
            totals[t] += 1
            hits[t] += t == g
            for c in range(classes):
                inter[c] += t == c and g == c
                union[c] += t == c or g == c
    iou = [i / u for i, u in zip(inter, union, strict=True) if u]
    acc = [h / t for h, t in zip(hits, totals, strict=True) if t]
    return 100 * sum(iou) / len(iou), 100 * sum(acc) / len(acc), 100 * right / known


def samples(sizes, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, (height, width) in enumerate(sizes):
        logits = torch.randn(classes, height, width, generator=generator)
        mask = torch.randint(0, classes - 1, (height, width), generator=generator)  # the last class never occurs
        mask[0] = 255
        found.append(([logits], mask, index))
    return found


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(2, 9), st.integers(1, 9)), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_metrics_equal_a_count_pixel_by_pixel(sizes, seed):
    metrics, batch = SegmentationMetrics(fake_task(), keep=True), samples(sizes, seed=seed)  # type: ignore[arg-type]
    for start in range(0, len(batch), 2):
        metrics.update(nn.Identity(), batch[start : start + 2])
    pairs = [(mask, views[0].argmax(0)) for views, mask, _ in batch]
    values = metrics.compute()
    assert (values["miou"], values["macc"], values["aacc"]) == pytest.approx(by_hand(pairs, 4))
    assert values["count"] == len(sizes)
    kept = metrics.predictions()
    for number, (target, guess) in enumerate(pairs):
        height, width = kept["size"][number]
        assert np.array_equal(kept["target"][number, :height, :width], target)
        assert np.array_equal(kept["prediction"][number, :height, :width], guess)
        assert (kept["target"][number, height:] == 255).all() and (kept["target"][number, :, width:] == 255).all()
    assert kept["confusion"].sum() == sum((mask != 255).sum() for _, mask, _ in batch)


def test_classes_by_name():
    metrics = SegmentationMetrics(fake_task(3), keep=False)  # type: ignore[arg-type]
    mask = torch.tensor([[0, 0, 1, 255]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 1, 2]]), 3).permute(2, 0, 1).float()
    metrics.update(nn.Identity(), [([logits], mask, 0)])
    assert metrics.details() == {
        "classes": {
            "iou": {"c0": 50.0, "c1": 50.0, "c2": None},
            "acc": {"c0": 50.0, "c1": 100.0, "c2": None},
        }
    }
    assert metrics.compute() == pytest.approx({"miou": 50.0, "macc": 75.0, "aacc": 100 * 2 / 3, "count": 1})


def test_sums_of_all_processes_count():
    """Each process has a part of the images, and some classes only in one part."""

    class Other(World):
        def sum(self, values):
            return values + other[values.shape]

        def gather(self, value):
            return [value, rows]

    batch = samples([(5, 6), (4, 7), (6, 3)])
    whole, half = (SegmentationMetrics(fake_task(), keep=True) for _ in range(2))  # type: ignore[arg-type]
    whole.update(nn.Identity(), batch)
    half.update(nn.Identity(), batch[1:2])
    other, rows = {half.confusion.shape: half.confusion, half.count.shape: half.count}, half.kept
    mine = SegmentationMetrics(fake_task(world=Other(size=2)), keep=True)  # type: ignore[arg-type]
    mine.update(nn.Identity(), [batch[0], batch[2]])
    assert mine.compute() == whole.compute() and mine.details() == whole.details()
    assert all(np.array_equal(value, whole.predictions()[key]) for key, value in mine.predictions().items())


def test_only_the_first_predictions_are_kept_and_large_ones_subsampled():
    metrics = SegmentationMetrics(fake_task(kept=2), keep=True)  # type: ignore[arg-type]
    metrics.update(nn.Identity(), samples([(3, 3)] * 4))
    assert metrics.predictions()["index"].tolist() == [0, 1]
    mask = torch.arange(1100)[None].expand(3, -1) % 200
    assert subsample(mask).shape == (1, 367) and np.array_equal(subsample(mask)[0], mask[0, ::3])


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (10, 16, 8, [0]),
        (16, 16, 8, [0]),
        (17, 16, 8, [0, 1]),
        (33, 16, 8, [0, 8, 16, 17]),
        (1000, 512, 341, [0, 341, 488]),
    ],
)
def test_windows_cover_the_image(length, window, stride, expected):
    assert window_starts(length, window, stride) == expected


@pytest.mark.parametrize("size", [(16, 16), (16, 9), (5, 12)])
def test_one_window_is_the_whole_image(size):
    x = torch.randn(2, 4, *size)
    assert torch.equal(sliding_window(Lookup(), 16, 8)(x), Lookup()(x))
    whole, slide = (predict(Lookup(), [x], (20, 30), SegmentTest(mode=mode), 16) for mode in ("whole", "slide"))
    assert torch.equal(whole, slide)


def test_windows_are_averaged():
    x = torch.randn(1, 2, 20, 27)
    total, counts = torch.zeros_like(x), torch.zeros(20, 27)
    for top in (0, 4, 8):
        for left in (0, 4, 8, 12, 15):
            total[..., top : top + 12, left : left + 12] += Middle()(x[..., top : top + 12, left : left + 12])
            counts[top : top + 12, left : left + 12] += 1
    torch.testing.assert_close(sliding_window(Middle(), 12, 4)(x), total / counts)
    test = SegmentTest(mode="slide", stride=4)
    assert torch.equal(predict(Middle(), [x], (20, 27), test, 12), (total / counts).argmax(1))


def test_views_are_averaged_as_probabilities():
    class Lopsided(nn.Module):
        def forward(self, x):
            return x * torch.linspace(0, 3, x.shape[-1])

    views = [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 12, 12)]
    total = torch.zeros(1, 3, 10, 10)
    for view in views:
        for flip in (False, True):
            logits = Lopsided()(view.flip(-1)).flip(-1) if flip else Lopsided()(view)
            total += nn.functional.interpolate(logits, (10, 10), mode="bilinear").softmax(1)
    test = SegmentTest(flip=True, scales=(1.0, 1.5))
    assert torch.equal(predict(Lopsided(), views, (10, 10), test, 8), total.argmax(1))
    plain = predict(Lopsided(), views[:1], (10, 10), SegmentTest(), 8)
    assert not torch.equal(plain, total.argmax(1))


def test_logits_are_resized_before_argmax():
    logits = torch.randn(1, 3, 4, 4)
    smooth = nn.functional.interpolate(logits, (32, 32), mode="bilinear", align_corners=False).argmax(1)
    coarse = logits.argmax(1).repeat_interleave(8, 1).repeat_interleave(8, 2)
    found = predict(nn.Identity(), [logits], (32, 32), SegmentTest(), 16)
    assert torch.equal(found, smooth) and not torch.equal(found, coarse)


def test_equal_sizes_share_a_forward():
    sizes = [(3, 3), (3, 3), (3, 4), (3, 3)]
    assert [len(group) for group in group_by_shape(samples(sizes))] == [2, 1, 1]


def test_confusion_matrix_without_labeled_pixels():
    assert confusion_matrix(torch.full((2, 2), 255), torch.zeros(2, 2), 3).sum() == 0


class Images(list):
    """A data set with the attribute `palette`."""

    palette: list[list[int]]


def full(*_):
    yield 0, Image.new("RGB", (4, 4))
    raise OSError(errno.ENOSPC, "No space left on device")


def test_overlay_shows_truth_beside_prediction(tmp_path):
    target, guess = np.array([[0, 1], [255, 1]], np.uint8), np.array([[1, 1], [0, 0]], np.uint8)
    image = Image.new("RGB", (4, 4), (100, 100, 100))
    drawn = np.asarray(overlay(image, [target, guess], [[0, 0, 0], [200, 100, 0]]))
    assert drawn.shape == (2, 4 + GAP, 3) and (drawn[:, 2 : 2 + GAP] == 255).all()
    black, orange = pytest.approx([45, 45, 45], abs=1), pytest.approx([155, 100, 45], abs=1)
    assert drawn[0, 0].tolist() == black and drawn[0, 1].tolist() == orange
    assert drawn[1, 0].tolist() == [100, 100, 100], "ignored pixels show the image"
    assert drawn[0, 2 + GAP].tolist() == orange and drawn[1, 3 + GAP].tolist() == black
    arrays = {"index": np.array([3, 5]), "size": np.array([[2, 2], [1, 2]])}
    arrays |= {"target": np.stack([target] * 2), "prediction": np.stack([guess] * 2)}
    dataset = Images([(image, None)] * 6)
    dataset.palette = [[0, 0, 0], [200, 100, 0]]
    task: Any = SimpleNamespace(pictures=partial(pictures, dataset))
    for count, names in ((2, ["000003.png", "000005.png"]), (1, ["000003.png"])):
        save_pictures(task, arrays, tmp_path / "overlays", count)
        assert sorted(path.name for path in (tmp_path / "overlays").iterdir()) == names
    with pytest.raises(UserError, match="overlays cannot be written"):
        save_pictures(SimpleNamespace(pictures=full), arrays, tmp_path / "overlays", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["overlays"], (
        "a failure keeps the old pictures and leaves no partial ones"
    )
    with Image.open(tmp_path / "overlays/000003.png") as picture:
        assert np.array_equal(np.asarray(picture), drawn)


def test_masks_without_a_known_pixel_are_an_error():
    metrics = SegmentationMetrics(fake_task(), keep=False)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no pixel of the validation split has a class"):
        metrics.compute()
