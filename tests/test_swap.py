"""Swapped mixers: the other weights stay, checkpoints and exports load, and the recipe key does the same."""

import copy
import json

import pytest
import timm
import torch
import trainer
from safetensors.torch import load_file

import tessel
import tessel.zoo
from tessel.blocks import Channel, CrossShapedWindow, Halo, HiLo
from tessel.blocks.registry import token_mixers
from tessel.export import export
from tessel.export import load as load_export
from tessel.train.errors import UserError
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.schema import Dense, Model
from tessel.train.tasks.dense_backbone import build_backbone
from tessel.zoo._deit import TokenEmbed

HALO = {2: "halo(block=4, halo=1)"}


def mixers(model, kind):
    return [path for path, module in model.named_modules() if type(module) is kind]


def published(name):
    """A file in the published layout, and the model with these weights."""
    source = timm.create_model(name, num_classes=10)
    return source, tessel.zoo.to_published(name, source.state_dict())


def test_only_the_mixers_of_the_stages_change(model_name):
    model = timm.create_model(model_name, num_classes=10).eval()
    if isinstance(model.stem, TokenEmbed):  # mixers with a class token cannot be replaced
        with pytest.raises(ValueError, match=r"stages.3 has no token mixer; stages with mixers are none"):
            tessel.zoo.swap(model, {3: "halo"})
        return
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    last = max(int(path.split(".")[1]) for path in token_mixers(model))
    swap = {last: "halo(block=4, halo=1)"}
    assert tessel.zoo.swap(model, swap) is model
    assert any(path.startswith(f"stages.{last}.") for path in mixers(model, Halo))
    after = model.state_dict()
    kept = before.keys() & after.keys()
    assert all(torch.equal(after[key], before[key]) for key in kept if "mixer" not in key)
    assert all(key.startswith(f"stages.{last}.") for key in before.keys() ^ after.keys())
    model.init_weights()
    assert model(torch.randn(2, 3, 64, 48)).isfinite().all()
    again = timm.create_model(model_name, num_classes=10, swap=swap).eval()
    again.load_state_dict(after)
    assert copy.deepcopy(again).double()(torch.randn(1, 3, 33, 40).double()).dtype == torch.float64


def test_several_mixers_alternate_and_can_be_swapped_again():
    model = timm.create_model("cswin_atto", swap={2: "hilo, channel"})
    assert len(mixers(model, HiLo)) == len(mixers(model, Channel)) == 1 and len(mixers(model, CrossShapedWindow)) == 3
    tessel.zoo.swap(model, {2: "hilo(alpha=0.5)"})
    assert len(mixers(model, HiLo)) == 2 and model._model_args["swap"] == {"2": "hilo(alpha=0.5)"}
    halo = timm.create_model("tessel_halonet_atto", swap={3: "hilo"})  # its halo attention doubles the width
    x = torch.randn(1, 3, 64, 64)
    assert tessel.zoo.swap(halo, {3: "channel"}).eval()(x).shape == (1, 1000)
    assert mixers(halo, Channel) and not mixers(halo, HiLo)
    assert list(token_mixers(halo)) == list(token_mixers(timm.create_model("tessel_halonet_atto")))


def test_tables_of_the_new_mixers_take_no_weight_decay():
    model = timm.create_model("cswin_atto", swap={3: "aggregated"})
    assert any(name.endswith("mixer.fn.temperature") for name in model.no_weight_decay())


@pytest.mark.parametrize("name", ["cswin_atto", "tessel_davit_atto"])
def test_published_weights_are_kept_around_new_mixers(name, tmp_path):
    source, state = published(name)
    torch.save(state, tmp_path / "published.pth")
    overlay = {"file": str(tmp_path / "published.pth"), "num_classes": 10}
    model = timm.create_model(name, pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay, swap=HALO)
    ours, before = model.state_dict(), source.state_dict()
    assert len(mixers(model, Halo)) == 2 * (1 + (name == "tessel_davit_atto"))
    kept = [key for key in ours if not key.startswith("stages.2.") or "mixer.fn" not in key]
    assert len(kept) > 50 and all(torch.equal(ours[key], before[key]) for key in kept)
    features = timm.create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay, swap=HALO)
    assert len(features(torch.randn(1, 3, 64, 64))) == 4


@pytest.mark.parametrize("swap", [HALO, {2: "cross_shaped_window(stripe_width=3)"}], ids=["other", "same"])
def test_a_checkpoint_of_a_swapped_model_loads_whole(swap, tmp_path):
    model = timm.create_model("cswin_atto", num_classes=10, swap=swap)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    overlay = {"file": str(tmp_path / "own.pth"), "num_classes": 10}
    options = {"pretrained": True, "num_classes": 10, "pretrained_cfg_overlay": overlay}
    again = timm.create_model("cswin_atto", swap=swap, **options)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    torn = {key: t for key, t in model.state_dict().items() if not key.endswith("stages.2.blocks.1.mixer.fn.proj.bias")}
    torn = {key: t for key, t in torn.items() if not key.endswith("stages.2.blocks.1.mixer.fn.width_rel")}
    torch.save(torn, tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"lacks 1 keys: stages.2.blocks.1.mixer.fn.(proj.bias|width_rel)"):
        timm.create_model("cswin_atto", swap=swap, **options)
    left = "stages.2.blocks.0.mixer.fn.lepe.0.weight"  # of the mixer that was replaced
    if left not in model.state_dict():
        torch.save({**model.state_dict(), left: torch.zeros(1)}, tmp_path / "own.pth")
        with pytest.raises(ValueError, match=f"1 keys the model lacks: {left}"):
            timm.create_model("cswin_atto", swap=swap, **options)


@pytest.mark.parametrize(
    "stages, words",
    [
        ({7: "halo"}, "stages.7 has no token mixer; stages with mixers are 0, 1, 2, 3"),
        ({2: "helo"}, "no mixer is named 'helo' (did you mean 'hilo'?)"),
        ({3: "hilo, halo"}, "stages.3 has 1 mixers, fewer than the 2 in 'hilo, halo'"),
        ({1: "hilo", 2: "hilo(num_heads=5)"}, "stages.2: HiLo: dim=64 must be divisible by num_heads=5"),
    ],
)
def test_wrong_stages_and_mixers_leave_the_model_as_it_was(stages, words):
    model = timm.create_model("cswin_atto")
    with pytest.raises(ValueError) as caught:
        tessel.zoo.swap(model, stages)
    assert words in str(caught.value) and len(mixers(model, CrossShapedWindow)) == 5


def test_models_of_timm_are_refused():
    with pytest.raises(TypeError, match="ResNet is not a model of tessel"):
        tessel.zoo.swap(timm.create_model("test_resnet"), HALO)


def test_a_run_of_the_recipe_key_is_exported_and_predicts(tmp_path):
    data = {"source": "folder", "root": str(trainer.draw_folder(tmp_path / "images"))}
    model = {"name": "cswin_atto", "drop_path_rate": 0.0, "swap": {2: "halo(block=4, halo=1)"}}
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", model=model, data=data, sched={"steps": 3})
    assert trainer.train(recipe) == 0
    folder = tmp_path / "runs" / "tiny" / "export"
    assert json.loads((folder / "config.json").read_text())["model_args"]["swap"] == {"2": "halo(block=4, halo=1)"}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert len(mixers(model, Halo)) == 2
    state = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    assert tessel.load(folder.parent, device="cpu").predict(torch.rand(3, 32, 32))


def test_the_recipe_key_on_the_command_line_and_in_dense_models():
    recipe = load_recipe("demo/digits", ["model.name=cswin_atto", "model.swap.2=halo(block=4, halo=1)"])
    assert recipe.model.swap == HALO
    backbone = build_backbone(Model(name="cswin_atto", swap=HALO), Dense(), (0, 1, 2, 3))
    assert len(mixers(backbone, Halo)) == 2
    with pytest.raises(UserError, match="swap: stages.7 has no token mixer"):
        build_backbone(Model(name="cswin_atto", swap={7: "halo"}), Dense(), (0, 1, 2, 3))


@pytest.mark.slow
def test_a_swapped_model_exports_to_onnx(tmp_path):
    model = timm.create_model("cswin_atto", num_classes=10, swap=HALO).eval()
    report = export(model, tmp_path / "swapped.onnx", size=64)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_export(report.path)(x), model(x), rtol=1e-3, atol=1e-4)
