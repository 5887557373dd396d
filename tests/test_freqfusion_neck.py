"""FreqFusion as a neck of segmenters and as the pyramid of detectors."""

from typing import Any

import pytest
import torch

from tessel.train.errors import UserError
from tessel.train.heads.freqfusion import build_freqfusion
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.schema import Dense, Model
from tessel.train.tasks.detect.detectors import build_detector
from tessel.train.tasks.detect.options import DetectOptions
from tessel.train.tasks.segment.model import build_segmenter
from tessel.train.tasks.segment.options import SegmentOptions

MODEL, CLASSES = Model(name="biformer_atto"), ["a", "b", "c"]
ADD = {"type": "FreqFusion", "out_channels": 16, "compressed": 8}


def segmenter(neck: dict[str, Any], head: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    options = SegmentOptions(decode_head=head, neck=neck)
    return build_segmenter(MODEL, options, dense=Dense(), classes=CLASSES, size=64)


@pytest.mark.parametrize(
    ("neck", "head"),
    [
        (ADD, {"type": "FPNHead", "channels": 16}),
        (ADD | {"start_level": 1}, {"type": "FPNHead", "channels": 16, "in_index": [0, 1, 2]}),
        ({"type": "FreqFusion", "fuse": "concat"}, {"type": "FCNHead", "channels": 16, "in_index": 0}),
    ],
    ids=["pyramid", "three maps", "concatenation"],
)
def test_segmenters_train_and_predict_on_any_size(neck, head):
    model = segmenter(neck, head)
    images, masks = torch.randn(2, 3, 72, 90), torch.randint(0, 3, (2, 72, 90))
    losses = [value for name, value in model(images, masks).items() if "loss" in name]
    torch.stack(losses).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval()(images).shape == (2, 3, 72, 90)


@pytest.mark.parametrize(
    "name", ["faster_rcnn", "fcos", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mask_rcnn", "retinanet"))]
)
def test_detectors_train_and_predict(name):
    options = DetectOptions(detector=name, channels=64, max_size=200, neck={"type": "FreqFusion", "compressed": 8})
    model: Any = build_detector(MODEL, options, dense=Dense(), size=64, classes=3)
    masks = torch.zeros(1, 64, 80, dtype=torch.uint8)
    masks[0, 4:50, 3:40] = 1
    target = {"boxes": torch.tensor([[3.0, 4, 40, 50]]), "labels": torch.tensor([0]), "masks": masks}
    images = [torch.rand(3, 64, 80)]
    assert len(model.backbone(torch.rand(1, 3, 96, 96))) == 5
    torch.stack(list(model.train()(images, [target]).values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert len(model.eval()(images)) == 1


@pytest.mark.parametrize(
    ("neck", "fragment"),
    [
        ({"type": "FreqFusion", "width": 3}, "task.segment.neck has no option width; it takes compressed, direction"),
        ({"type": "FreqFusion", "start_level": 3}, "fuses at least two maps"),
        (ADD | {"groups": 5}, "groups=5 do not divide the 16 channels"),
    ],
)
def test_wrong_necks_are_named(neck, fragment):
    with pytest.raises(UserError, match=fragment):
        segmenter(neck, {"type": "FPNHead", "channels": 16})


def test_wrong_necks_of_detectors_are_named():
    for neck, fragment in (
        ("{type: FPN}", "there is one neck"),
        ("{type: FreqFusion, fuse: add}", "does not take fuse"),
    ):
        with pytest.raises(UserError, match=fragment):
            load_recipe("demo/digit_detect", [f"task.detect.neck={neck}"])


@pytest.mark.parametrize(("fuse", "window", "concat"), [("add", True, True), ("concat", False, False)])
def test_defaults_are_those_of_the_published_necks(fuse, window, concat):
    neck: Any = build_freqfusion("neck", {"fuse": fuse}, [32, 64])
    (fusion,) = neck.fusions
    assert bool((fusion.low_window != 1).any()) == window and fusion.resample.concat == concat
    assert fusion.low.in_channels == (64 if fuse == "add" else 24) and fusion.resample.groups == 4
