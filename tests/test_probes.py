"""Attentive probes in the trainer, and `tessel probe`, which puts models and probes side by side."""

import json
import re
from typing import Any, get_args

import pytest
import timm
import torch
import trainer
from torch import nn

from tessel.blocks import POOLINGS
from tessel.cli import main
from tessel.compare import probing
from tessel.train import transfer as transfer
from tessel.train.errors import UserError
from tessel.train.optim.optimizer import build_optimizer
from tessel.train.recipe.load import PACKAGED, load_recipe
from tessel.train.recipe.schema import Optim
from tessel.train.report.__main__ import main as report
from tessel.train.tasks.classify.options import PROBES, Probing
from tessel.train.tasks.classify.probe import freeze_for_probe


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return trainer.draw_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def recipe(tmp_path, images):
    data = {"source": "folder", "root": str(images)}
    return trainer.write_recipe(
        tmp_path / "tiny.yaml", data=data, model={"name": "test_resnet", "drop_path_rate": None}
    )


def probe(kind, name="test_resnet", probing=None, size=64, **options) -> Any:
    torch.manual_seed(0)
    return freeze_for_probe(timm.create_model(name, num_classes=5, **options), kind, probing, size)


def test_every_pooling_is_a_value_of_the_recipe():
    assert set(get_args(PROBES)) == {"linear", "attentive", *POOLINGS}


@pytest.mark.parametrize("kind", POOLINGS)
def test_a_probe_trains_its_pooling_and_classifier(kind):
    model = probe(kind)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    model.train()
    assert not any(module.training for module in model.backbone.modules()) and model.norm.training
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    attention = model.eval().attention(torch.randn(2, 3, 96, 64))
    assert [one.shape[2:] for one in attention] == [(3, 2)]


def test_several_maps_are_pooled_and_concatenated():
    model = probe("ep", probing=Probing(maps=(1, -1), kwargs={"queries": 8})).eval()
    x = torch.randn(2, 3, 64, 64)
    maps = model.backbone.forward_intermediates(x, indices=[1, 4], intermediates_only=True)
    pooled = torch.cat([pool(one) for pool, one in zip(model.pool, maps, strict=True)], dim=1)
    torch.testing.assert_close(model(x), model.fc(model.norm(pooled)))
    assert maps[0].shape[1] != maps[1].shape[1] and model.num_features == pooled.shape[1]


@pytest.mark.parametrize("maps", [None, (-1,)])
def test_class_tokens(maps):
    options = {"name": "test_vit", "img_size": 64}
    model = probe("simpool", probing=Probing(maps=maps, class_tokens=True), **options).eval()
    x = torch.randn(2, 3, 64, 64)
    tokens = model.backbone.forward_features(x)
    ((found, prefix),) = model.features(x)
    assert prefix.shape == (2, 1, 64) and found.shape == (2, 64, 4, 4)
    if maps is None:
        torch.testing.assert_close(torch.cat((prefix, found.flatten(2).transpose(1, 2)), dim=1), tokens)
    (_, without), *_ = probe("simpool", **options).features(x)
    assert without is None


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match="no class token; set task.probing.class_tokens=false"):
        probe("ep", probing=Probing(class_tokens=True))
    with pytest.raises(UserError, match=r"task\.probing\.kwargs=\{'queries': 7\}: queries=7 do not divide"):
        probe("ep", probing=Probing(kwargs={"queries": 7}))
    with pytest.raises(UserError, match=r"task\.probing\.maps=\[9\]"):
        probe("ep", probing=Probing(maps=(9,)))
    for override, fragment in (
        (["task.probe=linear", "task.probing.class_tokens=true"], "task.probing has no effect with task.probe=linear"),
        (["task.probe=ep", "task.probing.maps=[]"], "reads nothing"),
    ):
        with pytest.raises(UserError, match=re.escape(fragment)):
            load_recipe(PACKAGED / "demo/digits.yaml", override)


def test_lars_scales_the_updates_of_weights_only():
    optim = load_recipe(PACKAGED / "finetune/probe_imagenet.yaml").optim
    assert optim == Optim(
        name="lars", lr=0.1, lr_rule="linear", weight_decay=1e-12, kwargs={"momentum": 0.9, "trust_coeff": 0.001}
    )
    layer = nn.Linear(4, 3)
    weight, bias = (parameter.detach().clone() for parameter in (layer.weight, layer.bias))
    optimizer = build_optimizer(layer, optim, 1.6)
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for _ in range(3):
        x = torch.randn(5, 4)
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        for number, (mine, parameter) in enumerate(((weight, layer.weight), (bias, layer.bias))):
            gradient: Any = parameter.grad
            gradient = gradient * (0.001 * mine.norm() / gradient.norm() if number == 0 else 1)
            momentum[number] = 0.9 * momentum[number] + gradient
            mine -= 1.6 * momentum[number]
        optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), weight)
        torch.testing.assert_close(layer.bias.detach(), bias)


def test_a_run_leaves_the_backbone_and_reports_what_the_probe_reads(recipe, capsys):
    assert trainer.train(recipe, "task.probe=ep") == 0
    run = recipe.parent / "runs/tiny"
    model: Any = timm.create_model(f"local-dir:{run}/export", pretrained=True)
    start: Any = timm.create_model("test_resnet", num_classes=0)
    assert int(model.norm.num_batches_tracked) > 0
    counters = [b for name, b in model.backbone.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters and not any(int(counter) for counter in counters) and len(start.state_dict()) > len(counters)
    assert report([str(run)]) == 0
    page = (run / "report/index.html").read_text()
    assert "What the queries of the pooling (ep) take" in page and (run / "report/probe.png").is_file()


def test_models_and_probes_side_by_side(recipe, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["probe", "test_resnet", "--probes", "linear,ep", "--recipe", str(recipe), "--out", str(out)]
    arguments += ["--seeds", "2"]
    for override in ("model.pretrained=false", "sched.steps=2", "sched.warmup=0"):
        arguments += ["--set", override]
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["probe"] for row in rows] == ["linear", "ep"] and all(len(row["accuracies"]) == 2 for row in rows)
    model: Any = timm.create_model("test_resnet", num_classes=3)
    assert rows[0]["trained"] == sum(p.numel() for p in model.get_classifier().parameters())
    width = model.num_features
    assert rows[1]["trained"] == width * width + 32 * width + 3 * width + 3
    assert rows[0]["frozen"] == rows[1]["frozen"]
    assert (out / "probes.md").read_text().startswith("| model | probe | frozen, M | trained, M | accuracy |\n| --- |")
    page = (out / "index.html").read_text()
    assert "What the probes of test_resnet read" in page and "as the mean over the queries" in page
    assert not re.search(r'(src|href|srcset)="(?!data:)', page), "the page needs no other file"

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(probing, "train_run", fail)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "trained, M" in printed and "2 seeds" in printed and "index.html: written" in printed


def test_wrong_arguments_of_the_command(capsys):
    assert main(["probe", "test_resnet", "--probes", "simpol"]) == 2
    assert "'simpol' is no probe; did you mean simpool" in capsys.readouterr().err
    assert main(["probe", "test_resne"]) == 1 and "test_resnet" in capsys.readouterr().err
    assert main(["probe", "test_resnet", "--recipe", "demo/digit_segment"]) == 1
    assert "task.kind=segment has no probes" in capsys.readouterr().err
