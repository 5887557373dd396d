"""torchvision's detectors on any backbone: gradients, labels, precision, parameter groups, errors and exports."""

import json
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn
from torchvision.models import detection

from tessel.train.errors import UserError
from tessel.train.optim.optimizer import build_optimizer
from tessel.train.recipe.schema import Dense, Model, Optim
from tessel.train.tasks import detect
from tessel.train.tasks.detect.detectors import DETECTORS, build_detector
from tessel.train.tasks.detect.options import DetectOptions
from tessel.train.tasks.export import export_model
from tessel.train.tasks.segment.model import build_segmenter
from tessel.train.tasks.segment.options import SegmentOptions

ATTO, PLAIN = Model(name="biformer_atto"), Dense()
SMALL = {"channels": 64, "max_size": 200}
IMAGES = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
CLASSES = ["a", "b", "c"]
# an untrained detector finds something with a threshold of 0; a mask head in bfloat16 is slow on a CPU
FEW_DETECTIONS = {
    name: {"box_score_thresh": 0.0, "box_detections_per_img": 5}
    if "rcnn" in name
    else {"score_thresh": 0.0, "detections_per_img": 20}
    for name in DETECTORS
}


def built(detector, model=ATTO, dense=PLAIN, **keys):
    side = {} if detector == "fcos" else {"anchor": 8}
    options = DetectOptions(detector=detector, **{**SMALL, **side, **keys})
    return build_detector(model, options, dense=dense, size=64, classes=3)


def targets():
    boxes = torch.tensor([[3.0, 4, 40, 50], [10, 10, 30, 33]])
    masks = torch.zeros(2, 64, 80, dtype=torch.uint8)
    masks[0, 4:50, 3:40] = masks[1, 10:33, 10:30] = 1
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return [
        {"boxes": boxes, "labels": torch.tensor([0, 2]), "masks": masks},
        {**none, "masks": torch.zeros(0, 70, 64, dtype=torch.uint8)},
    ]


@pytest.mark.parametrize("name", DETECTORS)
def test_every_parameter_has_a_gradient_even_from_empty_images(name):
    """DDP needs it on each process, whatever images the process has."""
    fewer = {"box_batch_size_per_image": 64} if "rcnn" in name else {}
    model = built(name, kwargs=fewer).train()
    for chosen in (slice(None), slice(1, None)):
        model.zero_grad(set_to_none=True)
        losses = model(IMAGES[chosen], targets()[chosen])
        sum(losses.values()).backward()
        assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
        assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_are_float32_pixels_of_the_given_image(name):
    model = built(name, kwargs=FEW_DETECTIONS[name]).eval()
    image = torch.rand(3, 90, 130)
    with torch.no_grad():
        plain = model([image])[0]
        with torch.autocast("cpu", torch.bfloat16):
            half = model([image])[0]
    assert plain["boxes"].dtype == half["boxes"].dtype == half["scores"].dtype == torch.float32
    assert len(plain["boxes"]) and set(plain["labels"].tolist()) <= {0, 1, 2}
    assert plain["boxes"][:, 2].max() > 65 and (plain["boxes"] <= torch.tensor([130.0, 90, 130, 90])).all()
    # coordinates that were rounded to bfloat16 would be multiples of 0.25 or 0.5
    assert (half["boxes"] != half["boxes"].bfloat16().float()).any()
    if name.endswith("mask_rcnn"):
        assert half["masks"].shape[1:] == (1, 90, 130) and half["masks"].dtype == torch.float32


@pytest.mark.parametrize("name", DETECTORS)
def test_labels_count_from_zero_in_every_detector(name, monkeypatch):
    """torchvision's R-CNNs have the background as class 0; the other detectors have no background class."""
    model, seen, first = built(name), [], int("rcnn" in name)

    def forward(self, images, targets=None):
        seen.append(targets)
        return {"loss": torch.ones(())} if self.training else [{"labels": torch.arange(3) + first}]

    for theirs in (detection.FCOS, detection.RetinaNet, detection.FasterRCNN):  # the base of Mask R-CNN is the last
        monkeypatch.setattr(theirs, "forward", forward)
    given = targets()
    assert model.train()(IMAGES, given) == {"loss": 1} and given[0]["labels"].tolist() == [0, 2]
    assert seen[0][0]["labels"].tolist() == [first, 2 + first]
    assert model.eval()(IMAGES)[0]["labels"].tolist() == [0, 1, 2]
    rois = getattr(model, "roi_heads", None)
    stages = getattr(rois, "stages", [rois])
    head = stages[0].box_predictor.cls_score if first else model.head.classification_head.cls_logits
    assert head.weight.shape[0] == {"retinanet": 9 * 3}.get(name, 3 + first)


def test_levels_follow_the_detector():
    assert [built(name).backbone.body.strides for name in ("faster_rcnn", "fcos")] == [[4, 8, 16, 32], [8, 16, 32]]
    for name, extra in (("retinanet", 128), ("fcos", 64)):  # RetinaNet's further maps come from the backbone
        assert built(name).backbone.fpn.extra_blocks.p6.in_channels == extra
    same = built("retinanet", channels=128)  # the width of the backbone's last map
    assert not same.backbone.fpn.extra_blocks.use_P5


def test_batch_norm_modes_of_the_backbone():
    for mode, trained in (("train", True), ("eval", True), ("frozen", False)):
        model = built("fcos", dense=Dense(batch_norm=mode)).train()
        norms = [module for module in model.backbone.body.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms and {norm.training for norm in norms} == {mode == "train"}
        assert {norm.weight.requires_grad for norm in norms} == {trained}


@pytest.mark.parametrize("name", ["biformer_atto", "litv2_atto", "transnext_atto"])
def test_layer_decay_and_no_decay_reach_the_backbone(name):
    model = built("fcos", model=Model(name=name))
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) > 4
    optimizer = build_optimizer(model, Optim(layer_decay=0.5), 1.0)
    scale = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert {scale[p] for key, p in named.items() if not key.startswith("backbone.body.body.")} == {1.0}
    assert min(scale[p] for key, p in named.items() if "stem" in key) < 0.2
    spared = model.no_weight_decay()
    assert spared <= named.keys() and all(decay[named[key]] == 0 for key in spared)
    assert bool(spared) == (name == "transnext_atto")


def test_backbone_starts_from_a_classifier():
    torch.manual_seed(5)
    source = timm.create_model("biformer_atto")
    body = built("fcos").backbone.body
    body.load_classifier(source.state_dict())
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in body.body.state_dict().items())


@pytest.mark.parametrize(
    ("keys", "model", "fragments"),
    [
        ({"kwargs": {"score_tresh": 1}}, ATTO, ["score_tresh", "score_thresh"]),
        ({"kwargs": {"num_classes": 1}}, ATTO, ["num_classes"]),
        ({"channels": 40}, ATTO, ["task.detect.channels=40", "task.detect.detector=fcos"]),
        ({"dense": Dense(norms=(True,))}, ATTO, ["norms=[True]", "3 entries"]),
        ({}, Model(name="vit_tiny_patch16_224"), ["vit_tiny_patch16_224", "hierarchical"]),
        ({}, Model(name="biformer_atto", kwargs={"n_winn": 3}), ["n_winn"]),
        ({}, Model(name="biformer_atto", init_from="test_resnet"), ["test_resnet"]),
    ],
)
def test_errors_name_what_cannot_be_built(keys, model, fragments, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    with pytest.raises(UserError) as caught:
        built("fcos", model=model, **keys)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kwargs", "fragment"),
    [
        (
            "faster_rcnn",
            {"box_score_thresh": "abc"},
            "box_score_thresh='abc' with faster_rcnn: Input should be a valid number",
        ),
        ("faster_rcnn", {"box_positive_fraction": 1.5}, "less than or equal to 1"),
        ("faster_rcnn", {"box_batch_size_per_image": "x"}, "box_batch_size_per_image='x'"),
        (
            "mask_rcnn",
            {"rpn_pre_nms_top_n_train": 1.5},
            "rpn_pre_nms_top_n_train=1.5 with mask_rcnn",
        ),
        ("mask_rcnn", {"bbox_reg_weights": [1, 2]}, "bbox_reg_weights=[1, 2] with mask_rcnn"),
        ("faster_rcnn", {"bbox_reg_weights": 3}, "bbox_reg_weights=3"),
        ("faster_rcnn", {"rpn_bg_iou_thresh": 0.8}, "rpn_bg_iou_thresh"),  # above rpn_fg_iou_thresh
        ("faster_rcnn", {"box_head": 3}, "box_head is not an argument"),
        ("mask_rcnn", {"rpn_head": 3}, "rpn_head is not an argument"),
        ("retinanet", {"proposal_matcher": 3}, "proposal_matcher is not an argument"),
        ("retinanet", {"score_thresh": None}, "score_thresh=None"),
        ("retinanet", {"detections_per_img": True}, "detections_per_img=True"),
        ("fcos", {"score_thresh": "abc"}, "score_thresh='abc' with fcos"),
        ("fcos", {"score_thresh": float("nan")}, "score_thresh=nan"),
        (
            "fcos",
            {"head": 3},
            "head is not an argument of fcos, which takes center_sampling_radius, detections_per_img, nms",
        ),
        ("fcos", {"center_sampling_radius": "x"}, "center_sampling_radius='x' with fcos: "),
        ("fcos", {"detections_per_img": "x"}, "detections_per_img='x'"),
        ("fcos", {"topk_candidates": 0}, "topk_candidates=0"),
    ],
)
def test_invalid_kwargs_are_errors(name, kwargs, fragment):
    with pytest.raises(UserError) as caught:
        built(name, kwargs=kwargs)
    assert "task.detect.kwargs" in str(caught.value) and fragment in str(caught.value), caught.value


def test_kwargs_reach_the_detector():
    rcnn = built("faster_rcnn", kwargs={"bbox_reg_weights": [1, 2, 3, 4], "box_nms_thresh": 0})
    assert tuple(rcnn.roi_heads.box_coder.weights) == (1, 2, 3, 4) and rcnn.roi_heads.nms_thresh == 0
    assert built("faster_rcnn", kwargs={"bbox_reg_weights": None}).roi_heads.box_coder.weights == (10, 10, 5, 5)
    assert built("fcos", kwargs={"center_sampling_radius": 2}).center_sampling_radius == 2


def export(folder, model, options):
    sections = {"dense": PLAIN, "detect": options}
    export_model(folder, model.state_dict(), task="detect", model=ATTO, sections=sections, size=64, classes=CLASSES)


@pytest.mark.parametrize("name", ["mask_rcnn", "fcos"])
def test_export_reads_back(tmp_path, name):
    keys = {**SMALL, "detector": name, "kwargs": FEW_DETECTIONS[name]}
    options = DetectOptions(**keys)
    model = build_detector(ATTO, options, dense=PLAIN, size=64, classes=3).eval()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").touch()
    export(tmp_path / "export", model, options)
    again = detect.load(tmp_path / "export")
    assert not again.training and again.classes == CLASSES and not (tmp_path / "export" / "old").exists()
    with torch.no_grad():
        one, other = model(IMAGES[:1])[0], again(IMAGES[:1])[0]
    assert len(one["boxes"]) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_a_detector_starts_from_the_backbone_of_an_exported_model(tmp_path, task):
    head, heads = {"type": "UPerHead", "channels": 8}, {"dense": PLAIN, "classes": CLASSES}
    if task == "segment":
        source: Any = build_segmenter(ATTO, SegmentOptions(decode_head=head), **heads)
        body, parts = source.backbone.body, {"segment": SegmentOptions(decode_head=head)}
    else:
        source = built("mask_rcnn")
        body, parts = source.backbone.body.body, {"detect": DetectOptions(**SMALL)}
    sections = {"dense": PLAIN, **parts}
    export_model(tmp_path / "export", source.state_dict(), task=task, model=ATTO, sections=sections)
    model = built("fcos", model=Model(name="biformer_atto", init_from=f"local-dir:{tmp_path}/export"))
    for key, tensor in model.backbone.body.body.state_dict().items():
        assert torch.equal(tensor, body.state_dict()[key]), key
    with pytest.raises(UserError, match="init_from=local-dir:.* does not fit model.name=cswin_atto"):
        built("fcos", model=Model(name="cswin_atto", init_from=f"local-dir:{tmp_path}/export"))


@pytest.mark.parametrize("damage", ["nothing", "classifier", "class"])
def test_a_folder_without_a_detector_is_an_error(tmp_path, damage):
    model = built("fcos")
    folder = tmp_path / "export"
    if damage != "nothing":
        export(folder, model, DetectOptions(**SMALL))
        config = json.loads((folder / "config.json").read_text())
        config = {"architecture": "resnet"} if damage == "classifier" else config | {"classes": ["a"]}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=str(folder)):
        detect.load(folder)
