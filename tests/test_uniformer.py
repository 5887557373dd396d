"""UniFormer: sizes of the published models, windows and hybrid blocks, heads, files in the published layouts."""

from types import SimpleNamespace
from typing import Any

import golden
import pytest
import timm
import torch
from torch import nn

import tessel.zoo
from tessel.blocks import Selection
from tessel.train.tasks.classify.task import ClassifierTask
from tessel.zoo.dense import DenseBackbone


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("uniformer_xxsmall", 10_215_280, 1.299),
        ("uniformer_xsmall", 16_509_264, 1.931),
        ("uniformer_small", 21_545_256, 3.632),
        ("uniformer_small_plus", 24_032_552, 4.201),
        ("uniformer_small_plus_dim64", 24_032_552, 4.201),
        ("uniformer_base", 49_776_552, 8.249),
        ("uniformer_base_ls", 49_796_520, 8.249),
        ("uniformer_large_ls", 100_103_888, 19.714),
        ("uniformer_xxsmall.in1k_128", 10_215_280, 0.425),
    ],
)
def test_cost_of_the_published_models(name, parameters, gmacs):
    cost = tessel.zoo.model_cost(name)
    assert cost.parameters == parameters and cost.macs / 1e9 == pytest.approx(gmacs, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "heads", "labels"),
    [
        ("uniformer_small", (5, 8), False),
        ("uniformer_small_plus", (10, 16), False),
        ("uniformer_small_tl", (10, 16), True),
        ("uniformer_base_dim64_tl", (5, 8), True),
        ("uniformer_large_ls", (7, 10), True),
    ],
)
def test_number_of_heads_and_classifiers(name, heads, labels):
    model: Any = timm.create_model(name, device="meta")
    assert tuple(model.stages[i].blocks[0].mixer.fn.num_heads for i in (2, 3)) == heads
    assert hasattr(model.head, "aux") == labels


def test_every_fourth_block_of_a_hybrid_stage_is_global():
    def kinds(**options):
        model: Any = timm.create_model("uniformer_base", device="meta", **options)
        return [[type(block.mixer.fn).__name__ == "Window" for block in stage.blocks] for stage in model.stages[2:]]

    assert kinds() == [[False] * 20, [False] * 7]
    assert kinds(stage3="window") == [[True] * 20, [False] * 7]
    assert kinds(stage3="hybrid") == [[True, True, True, False] * 5, [False] * 7]


def test_windows_are_not_clipped_to_the_map():
    """A window of the map's size is global attention; a larger one has padding among its keys."""
    x = torch.randn(1, 3, 64, 64).double()
    outputs = {}
    choices: Any = ({"stage3": "global"}, {"stage3": "window", "window": 4}, {"stage3": "window", "window": 5})
    for options in choices:
        torch.manual_seed(0)
        model = timm.create_model("uniformer_atto", num_classes=0, **options).double().eval()
        outputs[options.get("window")] = model(x)
    torch.testing.assert_close(outputs[None], outputs[4], rtol=1e-10, atol=1e-10)
    assert (outputs[None] - outputs[5]).abs().max() > 1e-4


@pytest.mark.parametrize("options", [{"stage3": "local"}, {"layer_scale": (5,)}])
def test_bad_options_are_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        timm.create_model("uniformer_atto", **options)


def test_token_labels_add_half_of_the_maximum_over_pixels():
    model: Any = timm.create_model("uniformer_atto", num_classes=5).eval()
    features = model.forward_features(torch.randn(2, 3, 64, 96))
    tokens = model.head.aux(features.flatten(2).mT)
    expected = model.head.fc(features.mean((2, 3))) + 0.5 * tokens.amax(1)
    torch.testing.assert_close(model.forward_head(features), expected)


def test_light_models_return_both_logits_in_training_or_their_mean():
    model: Any = timm.create_model("uniformer_light_atto", num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    selection = model.norm(model.stages(model.stem(x)))
    assert isinstance(selection, Selection)
    first = model.head.fc(selection.map.mean((2, 3)))
    second = model.head.token_fc(nn.functional.layer_norm(selection.token, (64,)))
    torch.testing.assert_close(model(x), (first + second) / 2)
    separate = timm.create_model("uniformer_light_atto", num_classes=5, separate_logits=True)
    separate.load_state_dict(model.state_dict())
    got = separate(x)
    for found, expected in zip(got, (first, second), strict=True):
        torch.testing.assert_close(found, expected)
    assert separate.eval()(x).shape == model.eval()(x).shape == (2, 5)
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)))


def test_the_trainer_averages_the_losses_of_all_classifiers():
    logits = torch.randn(2, 4, 3)
    plain = SimpleNamespace(erase_after_mixing=False)
    task: Any = SimpleNamespace(
        to_device=lambda batch: batch,
        recipe=SimpleNamespace(data=SimpleNamespace(aug=plain), task=SimpleNamespace(probe=None)),
        erasing=None,
        mixing=None,
        criterion=nn.CrossEntropyLoss(),
    )
    batch = torch.zeros(4, 3, 8, 8), torch.tensor([0, 2, 1, 1])

    def loss(outputs):
        return ClassifierTask.forward(task, lambda images: outputs, batch)[1:]

    (main, both), (_, first), (_, second) = loss((logits[0], logits[1])), loss(logits[0]), loss(logits[1])
    assert torch.equal(main, logits[0]) and not torch.equal(first, second)
    torch.testing.assert_close(both, (first + second) / 2)


def test_scores_of_light_models_reach_the_dense_backbone():
    """Stage 4 selects by the scores of stage 3, also without classifier and final norm."""
    model: Any = DenseBackbone("uniformer_light_atto").eval()
    whole: Any = timm.create_model("uniformer_light_atto").eval()
    whole.load_state_dict({**whole.state_dict(), **model.body.state_dict()})
    x = torch.randn(1, 3, 64, 96)
    final, maps = whole.forward_intermediates(x)
    for stage, (got, raw) in enumerate(zip(model(x), maps, strict=True)):
        torch.testing.assert_close(got, model.norms[str(stage)](raw))
    torch.testing.assert_close(whole.forward_features(x), final)


@pytest.mark.parametrize("wrapper", ["", "model", "state_dict"])
def test_files_in_the_published_layouts_load(wrapper, tmp_path):
    """Bare weights, those of the authors' trainer, and those of the token labelling trainer with its prefix."""
    source = timm.create_model("uniformer_atto")
    nn.init.normal_(source.get_parameter("head.aux.weight"))
    state = tessel.zoo.to_published("uniformer_atto", source.state_dict())
    assert {"aux_head.weight", "patch_embed1.proj.4.bias", "blocks1.0.gamma_1", "blocks3.0.attn.qkv.bias"} <= set(state)
    assert state["blocks1.0.gamma_1"].dim() == 4 and state["blocks4.0.gamma_1"].dim() == 1
    prefix = "module." if wrapper == "state_dict" else ""
    state = {prefix + key: value for key, value in state.items()}
    torch.save({wrapper: state, "epoch": 299} if wrapper else state, tmp_path / "uniformer.pth")
    overlay = {"file": str(tmp_path / "uniformer.pth")}
    model = timm.create_model("uniformer_atto", pretrained=True, pretrained_cfg_overlay=overlay)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_file_of_a_light_model_loads_and_its_classifiers_are_replaced(tmp_path):
    record = golden.load("uniformer_xxsmall")
    state = {key: value.float() for key, value in golden.published_state(record).items()}
    counters = {key: torch.zeros(shape, dtype=torch.int64) for key, shape, _ in record["index_buffers"]}
    torch.save({"model": {**state, **counters}, "epoch": 599}, tmp_path / "xxs.pth")
    options: Any = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "xxs.pth")}}
    model = timm.create_model("uniformer_xxsmall.in1k_128", **options)
    for key, value in tessel.zoo.from_published("uniformer_xxsmall", state).items():
        assert torch.equal(model.state_dict()[key], value), key
    other: Any = timm.create_model("uniformer_xxsmall", num_classes=7, **options)
    assert other.head.token_fc.weight.shape == other.head.fc.weight.shape == (7, 448)
    assert torch.equal(other.stages[2].blocks[0].token, state["cls_token"])
