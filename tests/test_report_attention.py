"""The pictures of what the mixers of a model attended to."""

import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import nn

from tessel.blocks import MIXERS, Channel, Explanation, TokenMixer
from tessel.train.data.sources.digits import load_digits
from tessel.train.errors import UserError
from tessel.train.report import attention_maps
from tessel.train.tasks.classify.options import ClassifyData


class DummyMixer(nn.Module):
    """A mixer that doubles its input, and says that the query takes everything from the position to its left."""

    def forward(self, x):
        return 2 * x

    def explain(self, x, query):
        values = torch.zeros(x.shape[2:])
        values[query[0], query[1] - 1] = 1
        return Explanation(values, "positions", "left")


class TwoStages(nn.Module):
    """Two stages: two dummy mixers at stride 2, none at stride 4."""

    feature_info = [{"module": "stages.0", "reduction": 2}, {"module": "stages.1", "reduction": 4}]

    def __init__(self):
        super().__init__()
        pool = nn.AvgPool2d(2, ceil_mode=True)
        self.stages = nn.Sequential(nn.Sequential(pool, DummyMixer(), DummyMixer()), nn.Sequential(pool))

    def forward(self, x):
        return self.stages(x)


@pytest.fixture
def model_with_mixers(monkeypatch):
    monkeypatch.setitem(MIXERS, "dummy", TokenMixer("dummy", DummyMixer, {}, {}, frozenset()))
    return TwoStages()


def test_the_last_mixer_of_a_stage_is_captured_with_its_input(model_with_mixers):
    images = torch.rand(2, 3, 18, 18)
    (captured,) = attention_maps.capture(model_with_mixers, images)
    assert (captured.stage, captured.stride) == (1, 2)
    assert captured.mixer is model_with_mixers.stages[0][2]
    torch.testing.assert_close(captured.x, 2 * nn.functional.avg_pool2d(images, 2))
    assert not captured.mixer._forward_pre_hooks


def test_models_without_drawable_mixers_are_not_captured():
    assert attention_maps.capture(TwoStages(), torch.rand(1, 3, 8, 8)) == []
    assert attention_maps.capture(nn.Identity(), torch.rand(1, 3, 8, 8)) == []


def test_a_model_without_drawable_mixers_is_an_error():
    model = timm.create_model("test_efficientnet", num_classes=10).eval()
    with pytest.raises(UserError, match="no token mixer of tessel, which could be drawn"):
        attention_maps.capture_examples(model, load_digits("val"), ClassifyData(source="digits", size=32))


def test_weights_and_the_query_are_drawn_at_their_pixels(model_with_mixers):
    picture = torch.zeros(18, 18, 3)
    picture[7:11, 13:17] = 1
    captures = attention_maps.capture(model_with_mixers, torch.rand(1, 3, 18, 18))
    figure = attention_maps.attention_figure([picture], captures)
    subject, background = (axes for axes in figure.axes if axes.patches)
    assert [patch.get_bbox().bounds for patch in subject.patches] == [(14, 6, 2, 2)]
    shade = subject.images[1]
    assert shade.get_extent() == [0, 18, 18, 0] and np.argwhere(shade.get_array()[..., 3]).tolist() == [[3, 6]]
    assert to_hex(shade.get_array()[3, 6, :3]) == to_hex("C0") and background.patches
    assert subject.get_title() == "stage 1\nleft"
    (asked,) = (axes for axes in attention_maps.attention_figure([picture], captures, (0, 3)).axes if axes.patches)
    assert [patch.get_bbox().bounds for patch in asked.patches] == [(2, 0, 2, 2)]


def test_pixels_beyond_the_map_belong_to_the_last_position():
    captured = attention_maps.CapturedMixer(1, 4, DummyMixer(), torch.zeros(1, 3, 4, 4))
    axes = Figure().subplots()
    attention_maps.draw(axes, torch.zeros(19, 19, 3), captured, 0, (18, 18))
    assert [patch.get_bbox().bounds for patch in axes.patches] == [(12, 12, 4, 4)] and axes.get_xlim() == (0, 19)


def test_gates_take_the_place_of_the_picture():
    captured = attention_maps.CapturedMixer(1, 4, Channel(8, num_heads=2), torch.randn(1, 8, 4, 5))
    axes = Figure().subplots()
    assert attention_maps.draw(axes, torch.zeros(16, 20, 3), captured, 0, (1, 1)) == "channel attention"
    assert axes.images[0].get_array().shape == (8, 8) and not axes.patches


@pytest.mark.parametrize("size", [64, 50])
def test_routed_regions_of_a_real_model(size):
    model = timm.create_model("biformer_atto", num_classes=10).eval()
    images = torch.rand(2, 3, size, size)
    captures = attention_maps.capture(model, images)
    assert [(captured.stage, type(captured.mixer).__name__) for captured in captures] == [
        *((stage, "BiLevelRouting") for stage in (1, 2, 3)), (4, "FullAttention")
    ]  # fmt: skip
    first = captures[0]
    axes = Figure().subplots()
    assert attention_maps.draw(axes, images[1].permute(1, 2, 0), first, 1, (0, 0)) == "1 of 16 regions"
    region, n_win = int(first.mixer.route(first.x)[1, 0]), first.mixer.n_win
    side = -(-first.x.shape[2] // n_win)
    rows, columns = np.nonzero(axes.images[0].get_array()[..., 3])
    assert {row // side for row in rows} == {region // n_win} and {column // side for column in columns} == {
        region % n_win
    }


def test_a_stage_with_two_classes_of_mixers_has_a_picture_of_each():
    captures = attention_maps.capture(timm.create_model("tessel_davit_atto").eval(), torch.rand(1, 3, 64, 64))
    assert [type(captured.mixer).__name__ for captured in captures] == ["Window", "Channel"] * 4
