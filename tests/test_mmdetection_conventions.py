"""What torchvision's detectors have like mmdetection's, against definitions written out here."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign

from tessel.train.errors import UserError
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.schema import Dense, Model
from tessel.train.tasks.detect.detectors import build_detector
from tessel.train.tasks.detect.mmdetection import AlignedRoIAlign, BatchAveragedHead, LastLevels
from tessel.train.tasks.detect.options import DetectOptions

STRIDES = (4, 8, 16, 32)
NAMES = [str(number) for number in range(len(STRIDES))]


def pyramid(value, size=512, channels=2, images=2):
    """A map per stride; `value(x, y, level)` is evaluated at the centers of its pixels, in pixels of the image."""
    maps = {}
    for level, stride in enumerate(STRIDES):
        y, x = torch.meshgrid(*(2 * [torch.arange(size // stride).float()]), indexing="ij")
        plane = value((x + 0.5) * stride, (y + 0.5) * stride, level)
        maps[NAMES[level]] = plane.expand(images, channels, -1, -1).clone()
    return maps


def boxes():
    """Boxes of two images, away from the border, of sides that belong to every level."""
    one = [[100.3, 90.1, 130.7, 140.2], [64.0, 80.0, 240.5, 190.0], [40.0, 40.0, 290.0, 330.0], [50, 50, 460, 450]]
    return [torch.tensor(one), torch.tensor([[200.0, 150.0, 260.0, 250.0]])]


def test_pooled_coordinates_are_those_of_the_centers_of_the_bins():
    x, y = (pyramid(plane) for plane in (lambda x, y, level: x, lambda x, y, level: y))
    pool = AlignedRoIAlign(STRIDES, output_size=7)
    corners = torch.cat(boxes())
    left, top, right, bottom = corners.T
    steps = (torch.arange(7) + 0.5) / 7
    across = left[:, None] + steps * (right - left)[:, None]
    down = top[:, None] + steps * (bottom - top)[:, None]
    torch.testing.assert_close(pool(x, boxes(), None)[:, 0], across[:, None, :].expand(-1, 7, -1), atol=1e-3, rtol=0)
    torch.testing.assert_close(pool(y, boxes(), None)[:, 1], down[:, :, None].expand(-1, -1, 7), atol=1e-3, rtol=0)
    plain = MultiScaleRoIAlign(NAMES, 7, 2)(x, boxes(), [(512, 512)] * 2)
    assert (plain[:, 0] - across[:, None, :]).abs().min() > 1.9  # half a pixel of the finest map


def test_boxes_are_pooled_from_the_level_and_the_image_that_torchvision_chooses():
    maps = pyramid(lambda x, y, level: torch.full_like(x, float(level)))
    for found in maps.values():
        found[1] += 10
    sides = torch.tensor([0.0, 3, 111.9, 112.1, 223, 225, 300, 447, 449, 511])
    given = [torch.stack([sides * 0, sides * 0, sides, sides], 1), torch.tensor([[8.0, 8, 300, 300]])]
    expected = MultiScaleRoIAlign(NAMES, 1, 2)(maps, given, [(512, 512)] * 2)
    pooled = AlignedRoIAlign(STRIDES, output_size=1)(maps, given, None)
    torch.testing.assert_close(pooled[1:], expected[1:])  # a box without an area has no pixels to sample
    assert pooled[-1, 0] == 12


def test_without_boxes_every_map_still_gets_a_gradient():
    maps = {name: found.requires_grad_() for name, found in pyramid(lambda x, y, level: x, size=64).items()}
    pooled = AlignedRoIAlign(STRIDES, output_size=7)(maps, [torch.zeros(0, 4), torch.zeros(0, 4)], None)
    assert pooled.shape == (0, 2, 7, 7)
    pooled.sum().backward()
    assert all(found.grad is not None and not found.grad.any() for found in maps.values())


def test_the_last_level_has_no_relu_below():
    torch.manual_seed(0)
    levels = LastLevels(6, 4)
    p, c = [torch.randn(2, 4, 12, 10)], [torch.randn(2, 6, 12, 10)]
    found, names = levels(p, c, ["0"])
    conv = partial(F.conv2d, stride=2, padding=1)
    p6 = conv(c[0], levels.p6.weight, levels.p6.bias)
    p7 = conv(p6, levels.p7.weight, levels.p7.bias)
    assert (p6 < 0).any() and names == ["0", "p6", "p7"]
    torch.testing.assert_close(found, [*p, p6, p7])


def head_inputs():
    """Targets, anchors and matches of three images with 2, 0 and 5 positive anchors."""
    torch.manual_seed(3)
    anchors = [torch.rand(40, 4).cumsum(1) * 20 for _ in range(3)]
    targets = [{"boxes": torch.rand(3, 4).cumsum(1) * 20, "labels": torch.tensor([0, 1, 2])} for _ in range(3)]
    matched = [torch.full((40,), -1) for _ in range(3)]
    matched[0][[3, 7]] = torch.tensor([0, 2])
    matched[2][:5] = torch.tensor([0, 1, 1, 2, 0])
    outputs = {"cls_logits": torch.randn(3, 40, 3), "bbox_regression": torch.randn(3, 40, 4)}
    return targets, outputs, anchors, matched


def test_losses_are_averaged_over_the_positive_anchors_of_the_batch():
    heads = BatchAveragedHead(8, 1, 3), RetinaNetHead(8, 1, 3)
    targets, outputs, anchors, matched = head_inputs()
    found = heads[0].compute_loss(targets, outputs, anchors, matched)
    sums = {"classification": 0.0, "bbox_regression": 0.0}
    for number, positive in enumerate((2, 1, 5)):
        one = slice(number, number + 1)
        part = {key: value[one] for key, value in outputs.items()}
        means = heads[1].compute_loss(targets[one], part, anchors[one], matched[one])
        torch.testing.assert_close(heads[0].compute_loss(targets[one], part, anchors[one], matched[one]), means)
        sums = {name: total + means[name] * positive for name, total in sums.items()}
    torch.testing.assert_close(found, {name: total / 8 for name, total in sums.items()})
    torchvisions = heads[1].compute_loss(targets, outputs, anchors, matched)
    assert all(abs(found[name] - torchvisions[name]) > 1e-2 for name in sums)


def built(detector, **keys):
    options = DetectOptions(detector=detector, channels=32, max_size=100, **keys)
    torch.manual_seed(0)
    return build_detector(Model(name="litv2_atto"), options, dense=Dense(), size=64, classes=3)


@pytest.mark.parametrize(
    "detector, keys",
    [("mask_rcnn", {"roi_align": "mmdetection"}), ("faster_rcnn", {"roi_align": "mmdetection"})]
    + [
        ("retinanet", {"loss_average": "batch", "last_level": "mmdetection"}),
        ("retinanet", {"loss_average": "batch", "anchor": 16}),
    ],
)
def test_initial_weights_and_anchors_do_not_depend_on_the_conventions(detector, keys):
    anchor = {key: keys[key] for key in keys if key == "anchor"}
    plain, other = built(detector, **anchor), built(detector, **keys)
    torch.testing.assert_close(other.state_dict(), plain.state_dict(), atol=0, rtol=0)
    if detector == "retinanet":
        assert isinstance(other.head, BatchAveragedHead)
        pairs = zip(other.anchor_generator.cell_anchors, plain.anchor_generator.cell_anchors, strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    pools = [module for module in other.modules() if isinstance(module, MultiScaleRoIAlign)]
    assert all(isinstance(pool, AlignedRoIAlign) for pool in pools)
    assert sorted(pool.output_size[0] for pool in pools) == {"mask_rcnn": [7, 14], "faster_rcnn": [7]}.get(detector, [])
    image = torch.rand(3, 64, 80)
    target = {"boxes": torch.tensor([[3.0, 4, 40, 50]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 64, 80, dtype=torch.uint8)
    losses = other.train()([image], [target])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    "detector, key", [("retinanet", "roi_align"), ("mask_rcnn", "loss_average"), ("mask_rcnn", "last_level")]
)
def test_keys_of_another_detector_are_refused(detector, key):
    value = {"loss_average": "batch"}.get(key, "mmdetection")
    with pytest.raises(UserError, match=f"task.detect.{key} has no effect with task.detect.detector={detector}"):
        load_recipe(f"coco/{detector}_1x_litv2_small", [f"task.detect.{key}={value}"])
