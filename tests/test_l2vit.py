"""L2ViT: sizes of the published models, the stem's padding, and files in the published layout."""

import argparse
from typing import Any

import golden
import pytest
import timm
import torch
import torch.nn.functional as F

import tessel.zoo


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("l2vit_tiny", 28_596_781, 4.688),
        ("l2vit_small", 50_199_157, 8.980),
        ("l2vit_base", 88_577_188, 15.808),
        ("l2vit_base_384", 88_577_188, 47.322),
    ],
)
def test_cost_of_the_published_models(name, parameters, gmacs):
    cost = tessel.zoo.model_cost(name)
    assert cost.parameters == parameters and cost.macs / 1e9 == pytest.approx(gmacs, rel=2e-3)


def test_blocks_alternate_between_windows_and_linear_attention():
    model: Any = timm.create_model("l2vit_base_384", device="meta")
    for stage in model.stages:
        kinds = [type(block.mixer.fn).__name__ for block in stage.blocks]
        assert kinds == ["Window", "LinearGlobal"] * (len(kinds) // 2)
        assert stage.blocks[0].mixer.fn.window == (12, 12)


def test_images_are_padded_to_multiples_of_four_before_the_stem():
    model: Any = timm.create_model("l2vit_atto").double().eval()
    x = torch.randn(1, 3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(model.stem(x), model.stem(F.pad(x, (0, 1, 0, 3))), rtol=1e-12, atol=1e-12)


def test_a_file_in_the_published_layout_loads(tmp_path):
    record = golden.load("l2vit_tiny")
    state = {key: value.float() for key, value in golden.published_state(record).items()}
    counters = {key: torch.zeros(shape, dtype=torch.int64) for key, shape, _ in record["index_buffers"]}
    averaged = {key: torch.zeros_like(value) for key, value in state.items()}
    settings = {"args": argparse.Namespace(model="l2vit_tiny"), "epoch": 299, "scaler": {}, "optimizer": {}}
    torch.save({"model": {**state, **counters}, "model_ema": averaged, **settings}, tmp_path / "best-ema.pth")
    overlay = {"file": str(tmp_path / "best-ema.pth")}
    model = timm.create_model("l2vit_tiny.in1k", pretrained=True, pretrained_cfg_overlay=overlay)
    for key, value in tessel.zoo.from_published("l2vit_tiny", state).items():
        assert torch.equal(model.state_dict()[key], value), key
