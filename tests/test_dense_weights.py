"""Published weights of whole segmenters and detectors: the list of them, prediction and evaluation by recipe names."""

import re

import numpy as np
import openmm
import pytest
import scenery
import torch
from PIL import Image

import tessel
from tessel.checkpoints import cached_path, find_dense_weight, load_dense_manifest, manifest
from tessel.checkpoints.__main__ import main as weights_main
from tessel.cli import main
from tessel.train.errors import UserError
from tessel.train.recipe.load import find_recipe, load_recipe
from tessel.train.recipe.registry import task_spec
from tessel.train.reproduce import expectation

RECIPE = "ade20k/van_b0_fpn"
URL = "https://example.org/van_b0_fpn.pth"
ROW = f"""
["{RECIPE}"]
url = "{URL}"
sha256 = ""
size = 0
license = "MIT"
source = "https://example.org"
metric = "mIoU"
published = 38.5
state_key = "state_dict"
"""


@pytest.mark.parametrize("weight", load_dense_manifest().values(), ids=lambda weight: weight.name)
def test_a_row_agrees_with_the_recipe_of_its_name(weight):
    metric = task_spec(load_recipe(weight.name)).metric
    assert metric is not None and weight.metric == metric.name
    head = find_recipe(weight.name).read_text(encoding="utf-8")
    assert expectation(head).startswith(f"{weight.metric} {weight.published}")
    for url in re.findall(r"https://\S+\.pth", head):
        assert url == weight.url
    assert weight.url.startswith("https://") and weight.license in {"MIT", "Apache-2.0"}


def test_no_two_rows_share_a_file():
    urls = [weight.url for weight in load_dense_manifest().values()]
    assert len(urls) == len(set(urls)) >= 50


def test_a_recipe_without_published_weights_is_an_error():
    with pytest.raises(ValueError, match=r"no published weights for ade20k/van_b6_upernet: give a file of them with"):
        find_dense_weight("ade20k/van_b6_upernet")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A segmenter, and its weights as mmsegmentation would store them, in the cache of downloads."""
    monkeypatch.setenv("TESSEL_HOME", str(tmp_path / "home"))
    list_of_weights = tmp_path / "dense.toml"
    list_of_weights.write_text(ROW)
    monkeypatch.setattr(manifest, "DENSE_MANIFEST", list_of_weights)
    torch.manual_seed(0)
    model = tessel.load(RECIPE, pretrained=False, device="cpu").model.network.module
    own = model.state_dict()
    heads = {key: tensor for key, tensor in own.items() if not key.startswith("backbone.")}
    state = heads | openmm.published_backbone(own, "backbone.", "van_b0")
    file = cached_path(URL)
    assert file is not None
    file.parent.mkdir(parents=True)
    torch.save({"meta": {"CLASSES": ["wall"], "epoch": 7}, "state_dict": state}, file)
    return model, file


def test_predictions_by_the_name_of_a_recipe(published, tmp_path, capsys):
    model, file = published
    picture = tmp_path / "room.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(picture)
    predictor = tessel.load(RECIPE, device="cpu")
    assert predictor.task == "segment" and len(predictor.model.classes) == 150
    assert predictor.model.classes[:2] == ["wall", "building"]
    for key, tensor in predictor.model.network.module.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[key])
    assert main(["predict", RECIPE, str(picture), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert np.array(Image.open(tmp_path / "out" / "room_mask.png")).shape == (64, 96)
    capsys.readouterr()
    file.write_bytes(b"no weights")
    (file.parent / f".{file.name}.json").unlink()
    with pytest.raises(UserError, match=r"van_b0_fpn.pth.* does not fit the model of ade20k/van_b0_fpn: "):
        tessel.load(RECIPE)
    with pytest.raises(UserError, match="imagenet/cswin_tiny is a recipe with task.kind=classify; give the name of"):
        tessel.load("imagenet/cswin_tiny")


def test_the_list_shows_metric_and_value(published, capsys):
    assert weights_main(["list", "ade20k/*"]) == 0
    assert re.search(r"ade20k/van_b0_fpn +- +MIT +mIoU +38.50 +- +yes", capsys.readouterr().out)
    assert weights_main(["fetch", RECIPE]) == 0
    assert "weights ade20k/van_b0_fpn, whose sha256 is not in the manifest yet" in capsys.readouterr().out


@pytest.mark.slow
def test_published_weights_are_evaluated_without_naming_a_file(published, tmp_path, capsys):
    root = scenery.ade20k(tmp_path / "ade20k")
    keys = ["run.device=cpu", "data.workers=0", "data.size=64", "data.img_scale=[256,64]"]
    assert (
        main(["weights", "reproduce", RECIPE, "--data", str(root), "--published", "0", "--tolerance", "100", *keys])
        == 0
    )
    printed = capsys.readouterr().out
    assert re.search(r'in checkpoints/dense.toml, \["ade20k/van_b0_fpn"\]:\nreproduced = \d+\.\d+', printed)
