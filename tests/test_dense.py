"""`DenseBackbone`: feature maps, norms, loading of weights, parameter groups."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import group_parameters
from torch import nn

from tessel import zoo
from tessel.zoo._keymap import KeyRule, Pattern
from tessel.zoo.dense import DenseBackbone

# the norms of each family's dense backbone, by the name of its smallest model; maps of one stride have no such backbone
NORMS = {
    name: family.dense_norm
    for family in zoo.list_families()
    for name in family.variants
    if name.endswith("_atto") and family.stride == 32
}
ATTO = sorted(NORMS)


@pytest.mark.parametrize(
    ("name", "eps", "key"),
    [
        ("agent_cswin_atto", 1e-5, "norm3.weight"),
        ("agent_swin_atto", 1e-5, "norm2.weight"),
        ("biformer_atto", 1e-6, "extra_norms.2.weight"),
        ("cswin_atto", 1e-5, "norm3.weight"),
        ("l2vit_atto", 1e-5, "norm2.weight"),
        ("litv2_atto", 1e-5, "norm2.weight"),
        ("s2aformer_atto", 1e-6, "norms.2.weight"),
        ("tessel_davit_atto", 1e-5, "norm2.weight"),
        ("uniformer_atto", 1e-6, "norm3.weight"),
        ("uniformer_light_atto", 1e-6, "norm3.weight"),
    ],
)
def test_norms_are_those_of_the_papers(name, eps, key):
    """Check the eps of the norms and the published key of the third norm."""
    assert {norm.eps for norm in DenseBackbone(name).norms.values()} == {eps}
    assert KeyRule(NORMS[name].keys, "norms.{s}.{p}").to_ours(key) == "norms.2.weight"


@pytest.mark.parametrize("name", ATTO)
def test_feature_maps_and_their_norms(name):
    model = DenseBackbone(name).eval()
    x = torch.randn(1, 3, 96, 131)
    maps = model(x)
    assert [m.shape[1] for m in maps] == model.channels
    assert model.strides == [4, 8, 16, 32]
    assert all(abs(m.shape[-1] - 131 / s) < 2 for m, s in zip(maps, model.strides, strict=True))
    assert len(model.norms) == (4 if NORMS[name] else 0)
    plain = timm.create_model(name, features_only=True, **model.options)
    plain.load_state_dict({f"model.{key}": tensor for key, tensor in model.body.state_dict().items()})
    for stage, (normed, raw) in enumerate(zip(maps, plain.eval()(x), strict=True)):
        norm = model.norms[str(stage)] if NORMS[name] else nn.Identity()
        torch.testing.assert_close(normed, norm(raw))


@pytest.mark.parametrize("name", ["biformer_atto", "litv2_atto"])
@settings(max_examples=4, deadline=None)
@given(height=st.integers(33, 90), width=st.integers(33, 90))
def test_images_of_any_size(name, height, width):
    maps = DenseBackbone(name, out_indices=(1, 3)).eval()(torch.zeros(1, 3, height, width))
    assert len(maps) == 2
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("name", ATTO)
def test_every_parameter_gets_a_gradient(name):
    model = DenseBackbone(name, out_indices=(1, 2, 3))
    sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def published_backbone(name: str, prefix: str) -> tuple[dict, dict, dict]:
    """The state dict of a published segmenter without its decoder; then its backbone and its norms with our keys."""
    state = timm.create_model(name).state_dict()
    ours = {key: tensor for key, tensor in state.items() if not key.startswith(("norm.", "head."))}
    marked = {key: tensor if key in ours else torch.full_like(tensor, -7) for key, tensor in state.items()}
    published = {k: t for k, t in zoo.to_published(name, marked).items() if not (t == -7).all()}
    norms = {}
    if NORMS[name]:
        pattern = Pattern(NORMS[name].keys)
        for stage, channels in enumerate(DenseBackbone(name).channels):
            for last in ("weight", "bias"):
                norms[f"{stage}.{last}"] = torch.randn(channels)
                published[pattern.fill({"s": str(stage), "p": last})] = norms[f"{stage}.{last}"]
    return {prefix + key: tensor for key, tensor in published.items()}, ours, norms


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone.", "encoder."])
@pytest.mark.parametrize("name", ATTO)
def test_published_segmenter_loads(name, prefix):
    state, body, norms = published_backbone(name, prefix)
    head = {"decode_head.conv_seg.weight": torch.zeros(3)} if prefix else {}
    model = DenseBackbone(name)
    assert model.load_published(state | head).keys() == head.keys()
    loaded = model.body.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in body.items() if tensor.is_floating_point())
    assert model.norms.state_dict().keys() == norms.keys()
    assert all(torch.equal(model.norms.state_dict()[key], tensor) for key, tensor in norms.items())


def test_incomplete_published_segmenter_is_an_error():
    state, *_ = published_backbone("cswin_atto", "backbone.")
    model = DenseBackbone("cswin_atto")
    with pytest.raises(ValueError, match=r"the checkpoint lacks norms that this backbone has: 2\.weight"):
        model.load_published({key: tensor for key, tensor in state.items() if key != "backbone.norm3.weight"})
    with pytest.raises(ValueError, match="stage1"):
        model.load_published({key: tensor for key, tensor in state.items() if "stage1.0.mlp" not in key})
    with pytest.raises(ValueError, match="backbone.rubbish|rubbish"):
        model.load_published(state | {"backbone.rubbish": torch.zeros(1)})
    with pytest.raises(ValueError, match="norms that this backbone lacks: 0"):
        DenseBackbone("cswin_atto", norms=[False, True, True, True]).load_published(state)


def test_classifier_loads():
    classifier, model = timm.create_model("litv2_atto", num_classes=10), DenseBackbone("litv2_atto")
    model.load_classifier(classifier.state_dict())
    assert torch.equal(model.body.stem.conv.weight, classifier.stem.conv.weight)
    with pytest.raises(ValueError, match="weights are missing"):
        model.load_classifier({"head.fc.weight": torch.zeros(1)})
    other = classifier.state_dict() | {"stem.conv.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"stem\.conv\.weight has shape \[3\]"):
        model.load_classifier(other)


@pytest.mark.parametrize("name", ["cswin_atto", "resnet18", "pvt_v2_b0"])
def test_layer_groups_are_those_of_the_body(name):
    model = DenseBackbone(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    inner = group_parameters(model.body, model.body.group_matcher(), reverse=True)
    body = {key: group for key, group in groups.items() if key.startswith("body.")}
    assert body == {f"body.{key}": group for key, group in inner.items()}
    assert all(group > max(body.values()) for key, group in groups.items() if key not in body)
    assert model.no_weight_decay() == {f"body.{key}" for key in getattr(model.body, "no_weight_decay", set)()}


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_batch_norm_modes(mode):
    with pytest.raises(ValueError, match="batch_norm='froze' is unknown; use one of train, eval, frozen"):
        DenseBackbone("biformer_atto", batch_norm="froze")
    model = DenseBackbone("biformer_atto", batch_norm=mode).train()
    stem = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    before = stem.running_mean.clone()
    sum(m.sum() for m in model(torch.randn(2, 3, 64, 64))).backward()
    assert torch.equal(before, stem.running_mean) == (mode != "train")
    assert (stem.weight.grad is None) == (mode == "frozen")
    assert model.norms.training


def test_timm_models_as_backbones():
    model = DenseBackbone("resnet18", norms=[True] * 4).eval()
    assert model.strides == [4, 8, 16, 32] and len(model.norms) == 4
    assert len(DenseBackbone("resnet18").norms) == 0
    with pytest.raises(ValueError, match="hierarchical"):
        DenseBackbone("vit_tiny_patch16_224")


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="out_indices=\\[3, 1\\] must be stages"):
        DenseBackbone("cswin_atto", out_indices=(3, 1))
    with pytest.raises(ValueError, match="norms"):
        DenseBackbone("cswin_atto", norms=[True])
