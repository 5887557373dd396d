"""Segmenters: mmsegmentation's heads on any backbone, their losses, their parameter names, published weights."""

import math
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import group_parameters
from torch import nn
from torch.nn import functional as F

from tessel import zoo
from tessel.train.distributed.parallel import fsdp_units
from tessel.train.errors import UserError
from tessel.train.openmmlab.compat import build
from tessel.train.recipe.schema import Dense, Model
from tessel.train.tasks.dense_backbone import build_backbone
from tessel.train.tasks.segment.head_checks import FeatureSpec, check_head
from tessel.train.tasks.segment.heads import HeadConfig, build_head, build_neck, cross_entropy
from tessel.train.tasks.segment.model import Segmenter, build_segmenter, feature_specs
from tessel.train.tasks.segment.options import SegmentOptions

HIERARCHICAL = sorted(
    name for f in zoo.list_families() for name in f.variants if name.endswith("_atto") and f.stride == 32
)
PLAIN, CLASSES = Dense(), ["a", "b", "c", "d", "e"]
UPER: dict[str, Any] = {"type": "UPerHead", "channels": 16}
FPN_NECK: dict[str, Any] = {"type": "FPN", "out_channels": 16}
HEADS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "uper": (UPER, {}, (0, 1, 2, 3)),
    "semantic fpn": ({"type": "FPNHead", "channels": 16}, FPN_NECK, (0, 1, 2, 3)),
    "fpn of three": (
        {"type": "FPNHead", "channels": 8, "in_index": [0, 1, 2]},
        FPN_NECK | {"start_level": 1},
        (1, 2, 3),
    ),
    "fpn of the finer two": (
        {"type": "FPNHead", "channels": 8, "in_index": [0, 1]},
        FPN_NECK | {"end_level": 2},
        (0, 1),
    ),
    "jpu": (
        {"type": "FCNHead", "channels": 8, "in_index": 2, "num_convs": 1},
        {"type": "JPU", "start_level": 1, "mid_channels": 8, "dilations": [1, 2]},
        (1, 2, 3),
    ),
    "multi-level": (UPER, {"type": "MultiLevelNeck", "out_channels": 8, "scales": [1, 1, 1, 1]}, (0, 1, 2, 3)),
    "segformer": ({"type": "SegformerHead", "channels": 8, "in_index": [0, 2]}, {}, (0, 2)),
    "aspp": ({"type": "ASPPHead", "channels": 8, "dilations": [1, 2]}, {}, (3,)),
    "deeplab v3+": (
        {"type": "DepthwiseSeparableASPPHead", "channels": 8, "c1_channels": 4, "dilations": [1, 2]},
        {},
        (0, 3),
    ),
    "fcn": ({"type": "FCNHead", "channels": 8, "in_index": 1, "num_convs": 1}, {}, (1,)),
    "psp": ({"type": "PSPHead", "channels": 8, "norm_cfg": {"type": "SyncBN"}}, {}, (3,)),
    "ann": ({"type": "ANNHead", "channels": 8, "project_channels": 8}, {}, (2, 3)),
    "ham": ({"type": "LightHamHead", "channels": 8, "ham_channels": 8, "ham_kwargs": {"MD_R": 4}}, {}, (1, 2, 3)),
    "enc": ({"type": "EncHead", "channels": 8, "num_codes": 4}, {}, (3,)),
    "enc of three": ({"type": "EncHead", "channels": 8, "num_codes": 4, "add_lateral": True}, {}, (1, 2, 3)),
    "concatenated": ({"type": "FCNHead", "channels": 8, "input_transform": "resize_concat"}, {}, (0, 1, 2, 3)),
}


def assembled(
    head: dict[str, Any] = UPER,
    name: str = "biformer_atto",
    dense: Dense = PLAIN,
    size: int | None = None,
    **parts: Any,
) -> Segmenter:
    return build_segmenter(
        Model(name=name), SegmentOptions(decode_head=head, **parts), dense=dense, classes=CLASSES, size=size
    )


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([value for key, value in losses.items() if "loss" in key]).sum()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 5, (2, 64, 64), generator=generator)
    masks[:, :20] = 255
    return torch.randn(2, 3, 64, 64, generator=generator), masks


@pytest.mark.parametrize("kind", HEADS)
def test_heads_train_every_weight_and_give_logits_at_any_size(kind, batch):
    head, neck, levels = HEADS[kind]
    aux = {"type": "FCNHead", "channels": 8, "num_convs": 1, "in_index": levels[-1]} if not neck else {}
    model = assembled(head, neck=neck, auxiliary_head=aux)
    assert model.backbone.out_indices == levels
    total(model(*batch)).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {
        "backbone", "decode_head", *(["neck"] if neck else ["auxiliary_head"])
    }  # fmt: skip
    for size in ((64, 64), (45, 70)):
        assert model.eval()(torch.randn(1, 3, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize("name", [*HIERARCHICAL, "resnet18"])
def test_every_family(name, batch):
    model = assembled(name=name)
    losses = model(*batch)
    total(losses).backward()
    assert float(total(losses).detach()) == pytest.approx(math.log(5), abs=0.4)
    assert [key for key, weight in model.named_parameters() if weight.grad is None] == []


def test_a_head_that_pools_large_windows_needs_large_images():
    head = {"type": "LRASPPHead", "channels": 8, "in_index": [0, 1, 2], "input_transform": "multiple_select"}
    assembled(head, size=784)  # the third map is of 49 pixels
    with pytest.raises(UserError, match="LRASPPHead does not run on the feature maps .*: .*Output size is too"):
        assembled(head, size=512)


def test_heads_are_checked_in_the_memory_format_of_the_backbone():
    head = {"type": "DMHead", "channels": 8, "filter_sizes": [1]}
    assembled(head, name="resnet18", size=64)
    with pytest.raises(UserError, match="decode_head.type=DMHead does not run on the feature maps .*: .*view"):
        assembled(head, size=64)


def test_a_backbone_with_a_fixed_input_size():
    name = "swin_tiny_patch4_window7_224"
    with pytest.raises(UserError, match=f"model.name={name} does not accept images of 96 x 96 .*strict_img_size=false"):
        assembled(name=name, size=96)


def test_a_neck_of_one_width():
    """No hierarchical backbone returns such maps. The specs of the outputs are measured by running the neck."""
    maps = [FeatureSpec(8, 4), FeatureSpec(8, 8), FeatureSpec(8, 16), FeatureSpec(4, 32)]
    outs = build_neck({"type": "Feature2Pyramid", "embed_dim": 8}, maps, [HeadConfig("decode_head", UPER)])[1]
    assert [(out.channels, out.stride) for out in outs] == [(8, 1), (8, 4), (8, 16), (4, 64)]


def test_unused_stages_are_not_built():
    """DDP stops at parameters without a gradient."""
    model = assembled({"type": "FCNHead", "channels": 8, "in_index": 1})
    whole = assembled()
    assert len(model.backbone.norms) == 1
    assert sum(p.numel() for p in model.backbone.parameters()) < sum(p.numel() for p in whole.backbone.parameters()) / 4


def test_loss_is_the_cross_entropy_of_the_resized_logits(batch):
    images, masks = batch
    weights = {"a": 0.2, "d": 2.0}
    model = assembled(class_weight=weights, auxiliary_head={"type": "FCNHead", "channels": 8}).eval()
    losses, logits = model(images, masks), model(images)
    expected = F.cross_entropy(logits, masks, torch.tensor([0.2, 1, 1, 2, 1]), ignore_index=255)
    torch.testing.assert_close(losses["decode.loss_ce"], expected)
    assert set(losses) == {f"{head}.{key}" for head in ("decode", "auxiliary") for key in ("loss_ce", "acc_seg")}
    light = {"type": "FCNHead", "channels": 8, "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 0.4}}
    lighter = assembled(class_weight=weights, auxiliary_head=light).eval()
    lighter.load_state_dict(model.state_dict())
    torch.testing.assert_close(lighter(images, masks)["auxiliary.loss_ce"], 0.4 * losses["auxiliary.loss_ce"])


def test_loss_of_a_crop_without_labeled_pixels_is_zero(batch):
    model = assembled(class_weight={"a": 0.2})
    loss = total(model(batch[0], torch.full_like(batch[1], 255)))
    loss.backward()
    assert float(loss.detach()) == 0 and all(p.grad.isfinite().all() for p in model.parameters())


@settings(max_examples=25, deadline=None)
@given(
    weighted=st.booleans(),
    known=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 99),
)
def test_cross_entropy_equals_mmsegmentations_where_that_works(weighted, known, reduction, seed):
    generator = torch.Generator().manual_seed(seed)
    pred, label = torch.randn(2, 4, 3, 5, generator=generator), torch.randint(0, 4, (2, 3, 5), generator=generator)
    if not weighted:
        label[0, 0] = 255  # with class weights, mmsegmentation would index them with 255
    pixels = torch.rand(2, 3, 5, generator=generator)
    class_weight = [0.5, 1.0, 2.0, 0.1] if weighted else None
    config = {"type": "CrossEntropyLoss", "avg_non_ignore": known, "class_weight": class_weight, "reduction": reduction}
    loss: Any = build(config)
    theirs = loss(pred, label, weight=pixels, ignore_index=255)
    loss.cls_criterion = cross_entropy
    torch.testing.assert_close(loss(pred, label, weight=pixels, ignore_index=255), theirs)


@pytest.mark.parametrize("given, average", [({}, None), ({"avg_non_ignore": True}, True)])
def test_average_over_all_pixels_as_mmsegmentation_does_by_default(batch, given, average):
    """`avg_non_ignore` of the loss itself, where it is given, comes first."""
    head = {"type": "FCNHead", "channels": 8, "in_index": 3, "num_convs": 1, "concat_input": False}
    head["loss_decode"] = {"type": "CrossEntropyLoss", **given}
    losses = {}
    for known in (True, False):
        torch.manual_seed(0)
        losses[known] = assembled(head, "litv2_atto", avg_non_ignore=known).eval()(*batch)["decode.loss_ce"]
    labelled = (batch[1] != 255).float().mean()
    torch.testing.assert_close(losses[False], losses[True] * (1 if average else labelled))


def test_several_losses_and_their_weights(batch):
    losses = [{"type": "CrossEntropyLoss"}, {"type": "DiceLoss", "loss_name": "loss_dice"}]
    found = assembled(UPER | {"loss_decode": losses}, class_weight=dict.fromkeys(CLASSES, 0.5))(*batch)
    assert {"decode.loss_ce", "decode.loss_dice"} < set(found)
    with pytest.raises(UserError, match="class_weight has no effect with .* DiceLoss"):
        assembled(UPER | {"loss_decode": losses[1]}, class_weight=dict.fromkeys(CLASSES, 0.5))


@pytest.mark.parametrize(
    ("head", "neck", "message"),
    [
        ({"type": "UperHead", "channels": 8}, {}, "UperHead is unknown to mmsegmentation; did you mean UPerHead"),
        ({"type": "Mask2FormerHead"}, {}, "Mask2FormerHead needs mmdetection"),
        ({"type": "PSAHead", "channels": 8, "mask_size": [2, 2]}, {}, "PSAHead does not run .* psamask"),
        ({"type": "PointHead", "channels": 8}, {}, "PointHead refines the output of another head"),
        ({"type": "UPerHead"}, {}, "UPerHead cannot be built with .*channels"),
        (UPER | {"chanels": 3}, {}, "chanels"),
        (UPER | {"num_classes": 7}, {}, "num_classes=7, but the data has 5 classes"),
        (UPER | {"in_index": 3}, {}, "in_index=3: UPerHead reads several maps"),
        (UPER | {"in_index": [0, 4]}, {}, "in_index=.0, 4.: the feature maps are numbered 0, 1, 2, 3"),
        ({"type": "CrossEntropyLoss"}, {}, "CrossEntropyLoss is not a decode head"),
        (UPER | {"in_index": [0, 1, 2]}, FPN_NECK, "returns 4 maps, but no head reads 3"),
        (UPER, {"type": "FPN"}, "neck.type=FPN cannot be built .*out_channels"),
        (UPER, FPN_NECK | {"start_level": "x"}, "neck.start_level=x: the feature maps are numbered"),
        (UPER, FPN_NECK | {"start_level": 1.5}, "neck.start_level=1.5: the feature maps are numbered"),
        (UPER, FPN_NECK | {"start_level": 4}, "neck.start_level=4: the feature maps are numbered"),
        (UPER, FPN_NECK | {"start_level": -1}, "neck.start_level=-1: the feature maps are numbered"),
        (UPER, FPN_NECK | {"end_level": 5}, "neck.end_level=5 must be -1 .* from 1 to 4"),
        (UPER, FPN_NECK | {"in_channels": [1, 2, 3, 4]}, "neck.type=FPN does not run on the feature maps"),
        (UPER, {"type": "MLANeck", "out_channels": 8}, "neck.type=MLANeck does not run on the feature maps"),
        (UPER, {"type": "Feature2Pyramid", "embed_dim": 8}, "type=Feature2Pyramid does not run on the feature maps"),
        ({"type": "SETRMLAHead", "channels": 32, "mla_channels": 8}, {}, "SETRMLAHead does not run .*[Ss]izes of"),
        (UPER, FPN_NECK | {"start_level": 1}, "the neck returns 3 maps"),
        (UPER | {"in_channels": [1, 2, 3, 4]}, {}, "does not run on the feature maps"),
        (UPER | {"norm_cfg": {"type": "GN"}}, {}, "UPerHead cannot be built .*: assert .num_groups. in cfg_"),
        (UPER, FPN_NECK | {"num_outs": 2}, "FPN cannot be built .*: assert num_outs >= self.num_ins - start_level"),
        ({"type": "DPTHead", "channels": 8}, {}, "DPTHead .*: assert "),
        (UPER | {"ignore_index": 0}, {}, "ignore_index=0, but .* 255; remove it"),
        (UPER | {"out_channels": 1}, {}, "out_channels=1, but the data has 5 classes; remove it"),
        (UPER | {"init_cfg": {"type": "Pretrained", "checkpoint": "nope.pth"}}, {}, "cannot be built .*nope.pth"),
    ],
)  # fmt: skip
def test_errors_name_the_head(head, neck, message):
    with pytest.raises(UserError, match=message) as caught:
        assembled(head, neck=neck)
    assert "task.segment." in str(caught.value) and "\n" not in str(caught.value)


CE = {"type": "CrossEntropyLoss"}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"type": "FocalLoss"}, "cannot be computed: "),
        ({"type": "OhemCrossEntropy"}, "cannot be computed: .*weight"),
        ({"type": "BoundaryLoss"}, "cannot be computed: "),
        ({"type": "SiLogLoss"}, "cannot be computed: "),
        (CE | {"use_mask": True}, "cannot be computed: "),
        (CE | {"class_weight": [1, 2]}, "cannot be computed: weight tensor"),
        (CE | {"class_weight": [1, 2], "use_sigmoid": True}, "cannot be computed: "),
        (CE | {"class_weight": "nope.npy"}, "cannot be built with .*nope.npy"),
        (CE | {"loss_weight": "x"}, "cannot be computed: "),
        (CE | {"reduction": "none"}, "loss_ce is not a scalar"),
        ([CE, CE | {"loss_name": "ce"}], "loss_name=ce must contain the word loss"),
        ({"type": "CrossEntropyLos"}, "CrossEntropyLos is unknown to mmsegmentation; did you mean CrossEntropyLoss"),
        ({"type": "Nope"}, "Nope is unknown to mmsegmentation; did you mean CrossEntropyLoss"),
        (UPER | {"in_channels": [4], "in_index": [0], "num_classes": 5}, "UPerHead is not a loss"),
        *(
            (loss, "must be a loss, as in .type: CrossEntropyLoss., or a list")
            for loss in ([], None, 3, [3], [[1]], {})
        ),
    ],
)
def test_errors_name_the_loss(loss, message):
    with pytest.raises(UserError, match=message) as caught:
        assembled({"type": "FCNHead", "channels": 4, "loss_decode": loss})
    assert "task.segment.decode_head.loss_decode" in str(caught.value) and "\n" not in str(caught.value)


def test_check_changes_neither_weights_nor_random_numbers():
    """A head built without the smoke test has the same weights, and the next random number is the same."""
    config = {"type": "EMAHead", "channels": 4, "ema_channels": 8, "num_bases": 2, "num_stages": 1, "momentum": 0.5}
    torch.manual_seed(0)
    checked = build_head(HeadConfig("decode_head", config), [None, None, None, FeatureSpec(8, 32)], 5, None).train()
    after = torch.rand(())
    torch.manual_seed(0)
    plain: Any = build(config | {"in_channels": 8, "num_classes": 5, "norm_cfg": {"type": "BN"}})
    plain.init_weights()
    assert torch.equal(after, torch.rand(()))
    for key, tensor in plain.state_dict().items():
        assert torch.equal(checked.state_dict()[key], tensor), key


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_segmenter_can_be_built_without_gradients(mode):
    with mode():
        model = assembled(size=64)
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5, 64, 64)


def test_parameter_groups_of_the_backbone_are_passed_on():
    model = assembled(name="transnext_atto", neck=FPN_NECK)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    inner = group_parameters(model.backbone.body, model.backbone.body.group_matcher(), reverse=True)
    body = {key: group for key, group in groups.items() if key.startswith("backbone.body.")}
    assert body == {f"backbone.body.{key}": group for key, group in inner.items()}
    assert all(group > max(body.values()) for key, group in groups.items() if key not in body)
    spared = model.no_weight_decay()
    assert spared and spared <= {name for name, _ in model.named_parameters()}
    assert len(fsdp_units(model)) == len(fsdp_units(model.backbone.body))


def test_batch_norm_and_norms_keys():
    model = assembled(dense=Dense(batch_norm="frozen", norms=(True, False, True, False))).train()
    assert set(model.backbone.norms) == {"0", "2"} and model.decode_head.training
    assert all(not m.training for m in model.backbone.body.modules() if isinstance(m, torch.nn.BatchNorm2d))
    with pytest.raises(UserError, match="model.name=biformer_atto.*norms"):
        assembled(dense=Dense(norms=(True,)))
    with pytest.raises(UserError, match="did you mean"):
        assembled(name="biformer_ato")
    with pytest.raises(UserError, match="hierarchical"):
        assembled(name="vit_tiny_patch16_224")


def published(model: Segmenter, name: str) -> dict[str, torch.Tensor]:
    """The weights of `model` under the names of a published segmenter."""
    classifier = timm.create_model(name)
    marked = {key: torch.full_like(tensor, -7) for key, tensor in classifier.state_dict().items()}
    marked.update(model.backbone.body.state_dict())
    body = {key: tensor for key, tensor in zoo.to_published(name, marked).items() if not (tensor == -7).all()}
    norms = {f"norm{int(key[0]) + 1}{key[1:]}": tensor for key, tensor in model.backbone.norms.state_dict().items()}
    rest = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("backbone.")}
    return {f"backbone.{key}": tensor for key, tensor in (body | norms).items()} | rest


def randomized(model: Segmenter) -> Segmenter:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1)
    return model


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_segmenter(prefix):
    one, other = (assembled(name="cswin_atto", auxiliary_head={"type": "FCNHead", "channels": 8}) for _ in range(2))
    randomized(one)
    state = {prefix + key: tensor for key, tensor in published(one, "cswin_atto").items()}
    assert f"{prefix}backbone.stage1.0.qkv.weight" in state and f"{prefix}decode_head.conv_seg.weight" in state
    other.load_published(state)
    loaded = other.state_dict()
    assert all(
        torch.equal(loaded[key], tensor) for key, tensor in one.state_dict().items() if tensor.is_floating_point()
    )


def test_a_published_segmenter_that_does_not_fit_is_an_error():
    model = assembled(name="cswin_atto")
    state = published(model, "cswin_atto")
    with pytest.raises(ValueError, match="lacks 1 weights of the model: decode_head.conv_seg.bias"):
        model.load_published({key: tensor for key, tensor in state.items() if key != "decode_head.conv_seg.bias"})
    with pytest.raises(ValueError, match="1 weights that the model does not have: auxiliary_head.x"):
        model.load_published(state | {"auxiliary_head.x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"conv_seg.bias has the shape \[7\], in the model \[5\]"):
        model.load_published(state | {"decode_head.conv_seg.bias": torch.zeros(7)})


class Flattening(nn.Module):
    """A head that cannot read channels_last maps; the rest of a head is not reached."""

    num_classes = len(CLASSES)

    def predict(self, maps, *_):
        return maps[0].view(maps[0].shape[0], -1)

    def loss(self, maps, *_):
        return {"loss": self.predict(maps).sum().requires_grad_()}


def test_head_that_cannot_read_the_memory_format_of_the_training_is_refused():
    """parallel.channels_last changes the maps that a head gets."""
    backbone = build_backbone(Model(name="test_resnet"), PLAIN, range(4))
    for layout in (torch.contiguous_format, torch.channels_last):
        specs = feature_specs(backbone, Model(name="test_resnet"), 64, layout)
        if layout == torch.contiguous_format:
            check_head("task.segment.decode_head", Flattening(), specs, losses="losses", size=64)
            continue
        with pytest.raises(UserError, match="task.segment.decode_head does not run on the feature maps"):
            check_head("task.segment.decode_head", Flattening(), specs, losses="losses", size=64)
