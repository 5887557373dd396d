"""`tessel weights reproduce` of segmenters and detectors, and the conversion of mmdetection's weights."""

import re

import detection
import openmm
import pytest
import scenery
import torch
import yaml
from safetensors.torch import save_file

from tessel.cli import main
from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.schema import Dense, Model
from tessel.train.reproduce import evaluate_published, expectation
from tessel.train.tasks.detect.detectors import build_detector
from tessel.train.tasks.detect.options import DetectOptions

CLASSES = 3


def perturbed_detector(**keys):
    options = DetectOptions(channels=64, max_size=120, anchor=8, **keys)
    torch.manual_seed(0)
    detector = build_detector(Model(name="van_atto"), options, dense=Dense(), size=64, classes=CLASSES).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return detector


def mask_rcnn():
    kwargs = {"box_score_thresh": 0.0, "box_detections_per_img": 5}
    return perturbed_detector(detector="mask_rcnn", kwargs=kwargs)


def retinanet(last_level="mmdetection", **keys):
    kwargs = {"score_thresh": 0.0, "detections_per_img": 5}
    return perturbed_detector(detector="retinanet", last_level=last_level, kwargs=kwargs, **keys)


def in_mmdetection(detector):
    """The weights as mmdetection names them, with its order of classes."""
    own = detector.state_dict()
    layers, state = retinanet_layers(), {}
    if hasattr(detector, "roi_heads"):
        layers, state = mask_rcnn_layers(), mask_rcnn_outputs(own)
    state |= {f"{name}.{p}": own[f"{ours}.{p}"] for name, ours in layers.items() for p in ("weight", "bias")}
    return state | openmm.published_backbone(own, "backbone.body.")


def pyramid_layers(levels):
    layers = {}
    for level in range(levels):
        layers[f"neck.lateral_convs.{level}.conv"] = f"backbone.fpn.inner_blocks.{level}.0"
        layers[f"neck.fpn_convs.{level}.conv"] = f"backbone.fpn.layer_blocks.{level}.0"
    return layers


def retinanet_layers():
    layers = pyramid_layers(3) | {
        "neck.fpn_convs.3.conv": "backbone.fpn.extra_blocks.p6",
        "neck.fpn_convs.4.conv": "backbone.fpn.extra_blocks.p7",
        "bbox_head.retina_cls": "head.classification_head.cls_logits",
        "bbox_head.retina_reg": "head.regression_head.bbox_reg",
    }
    for number in range(4):
        layers[f"bbox_head.cls_convs.{number}.conv"] = f"head.classification_head.conv.{number}.0"
        layers[f"bbox_head.reg_convs.{number}.conv"] = f"head.regression_head.conv.{number}.0"
    return layers


def mask_rcnn_layers():
    layers = pyramid_layers(4) | {
        "rpn_head.rpn_conv": "rpn.head.conv.0.0",
        "rpn_head.rpn_cls": "rpn.head.cls_logits",
        "rpn_head.rpn_reg": "rpn.head.bbox_pred",
        "roi_head.bbox_head.shared_fcs.0": "roi_heads.box_head.fc6",
        "roi_head.bbox_head.shared_fcs.1": "roi_heads.box_head.fc7",
        "roi_head.mask_head.upsample": "roi_heads.mask_predictor.conv5_mask",
    }
    for number in range(4):
        layers[f"roi_head.mask_head.convs.{number}.conv"] = f"roi_heads.mask_head.{number}.0"
    return layers


def mask_rcnn_outputs(own):
    """The layers that predict; `own` gets zeros where mmdetection has no background."""
    box, mask, state = "roi_heads.box_predictor.", "roi_heads.mask_predictor.", {}
    own[f"{box}bbox_pred.weight"][:4] = own[f"{box}bbox_pred.bias"][:4] = 0
    own[f"{mask}mask_fcn_logits.weight"][:1] = own[f"{mask}mask_fcn_logits.bias"][:1] = 0
    for p in ("weight", "bias"):
        scores = own[f"{box}cls_score.{p}"]
        state[f"roi_head.bbox_head.fc_cls.{p}"] = torch.cat([scores[1:], scores[:1]])
        state[f"roi_head.bbox_head.fc_reg.{p}"] = own[f"{box}bbox_pred.{p}"][4:]
        state[f"roi_head.mask_head.conv_logits.{p}"] = own[f"{mask}mask_fcn_logits.{p}"][1:]
    return state


@pytest.mark.slow
def test_weights_of_mmdetection_give_the_same_detections():
    detector = mask_rcnn()
    state = in_mmdetection(detector)
    other = mask_rcnn()
    torch.nn.init.normal_(other.roi_heads.box_predictor.cls_score.weight)
    other.load_published(state)
    images = [torch.rand(3, 64, 90)]
    with torch.no_grad():
        (found,), (expected,) = other(images), detector(images)
    assert len(found["boxes"]) == 5
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    with pytest.raises(ValueError, match=r"has 1 weights that the model does not have: bbox_head\.extra"):
        other.load_published(state | {"bbox_head.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="lacks 1 weights of the model: rpn.head.cls_logits.bias"):
        other.load_published({key: tensor for key, tensor in state.items() if key != "rpn_head.rpn_cls.bias"})
    with pytest.raises(ValueError, match=r"cls_score.bias has the shape \[9\], in the model \[4\]"):
        other.load_published(state | {"roi_head.bbox_head.fc_cls.bias": torch.zeros(9)})
    fcos = build_detector(Model(name="van_atto"), DetectOptions(channels=64), dense=Dense(), size=64, classes=CLASSES)
    with pytest.raises(ValueError, match="published weights of FCOS are not read, only those of R-CNNs and RetinaNet"):
        fcos.load_published(state)


@pytest.mark.slow
def test_weights_of_mmdetections_retinanet_give_the_same_detections():
    detector, other = retinanet(), retinanet(loss_average="batch")
    state = in_mmdetection(detector)
    for layer in (other.head.classification_head.cls_logits, other.backbone.fpn.extra_blocks.p7):
        torch.nn.init.normal_(layer.weight)
    other.load_published(state)
    images = [torch.rand(3, 64, 90)]
    with torch.no_grad():
        (found,), (expected,) = other(images), detector(images)
    assert len(found["boxes"]) == 5
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    with pytest.raises(ValueError, match="lacks 1 weights of the model: backbone.fpn.extra_blocks.p7.bias"):
        other.load_published({key: tensor for key, tensor in state.items() if key != "neck.fpn_convs.4.conv.bias"})
    with pytest.raises(ValueError, match=r"no ReLU below their last level; .* task\.detect\.last_level=mmdetection"):
        retinanet(last_level="torchvision").load_published(state)


def write(path, sections, head):
    path.write_text(f"# expected:   {head}\n" + yaml.safe_dump(sections))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("build", [mask_rcnn, retinanet])
def test_a_published_detector_is_evaluated_by_its_recipe(build, tmp_path, capsys):
    root = detection.draw_coco(tmp_path / "coco")
    save_file({k: t.contiguous() for k, t in in_mmdetection(build()).items()}, tmp_path / "published.safetensors")
    detect = {"detector": build.__name__, "channels": 64, "max_size": 120, "anchor": 8}
    detect |= {"last_level": "mmdetection"} if build is retinanet else {}
    sections = {
        "model": {"name": "van_atto", "pretrained": True},
        "task": {"kind": "detect", "detect": detect},
        "data": {"source": "coco", "root": "elsewhere", "size": 64, "workers": 0},
        "sched": {"epochs": 1},
    }
    recipe = write(tmp_path / "recipe.yaml", sections, "box AP 61.0, mask AP 40.0 (published)")
    argv = ["weights", "reproduce", str(recipe), "--data", str(root), "run.device=cpu"]
    assert main(argv) == 1
    assert "recipe.yaml: give a file of them with --weights" in capsys.readouterr().err
    argv += ["--weights", str(tmp_path / "published.safetensors")]
    assert main(argv) == 1
    printed, error = capsys.readouterr()
    assert re.search(r"published.safetensors: box AP \d+\.\d+ on 6 images, published 61.000, difference -", printed)
    masks = "" if build is retinanet else r", mask AP \d\.\d"
    assert "# expected:   box AP 61.0, mask AP 40.0 (published)" in printed
    assert re.search(rf"# reproduced: box AP \d\.\d{masks}, with the weights published.safetensors", printed)
    assert "is not the published 61.0" in error
    assert main([*argv, "--published", "0", "--tolerance", "100"]) == 0


@pytest.mark.slow
def test_a_published_segmenter_is_evaluated_by_its_recipe(tmp_path):
    root = scenery.ade20k(tmp_path / "ade20k")
    sections = {
        "model": {"name": "van_atto"},
        "task": {"kind": "segment", "segment": {"decode_head": {"type": "FPNHead", "channels": 16}}},
        "data": {"source": "ade20k", "root": str(root), "size": 64, "workers": 0, "eval_batch": 1},
        "run": {"device": "cpu"},
        "sched": {"epochs": 1},
    }
    recipe = write(tmp_path / "recipe.yaml", sections, "mIoU 42.9 % (published;\n#             44.1 % with flips)")
    from tessel.train.tasks.segment.task import SegmentTask

    task = SegmentTask(load_recipe(recipe), World())
    model = task.build_model().eval()
    own = model.state_dict()
    heads = {k: t.contiguous() for k, t in own.items() if k.startswith("decode_head.")}
    file = tmp_path / "published.safetensors"
    save_file(heads | {k: t.contiguous() for k, t in openmm.published_backbone(own, "backbone.").items()}, file)
    found = evaluate_published(str(recipe), ["parallel.precision=fp32"], file)
    metrics = task.metrics()
    for batch in task.eval_batches():
        metrics.update(model, batch)
    assert found.metrics == pytest.approx(metrics.compute())
    assert found.published == 42.9 and found.expected == "mIoU 42.9 % (published; 44.1 % with flips)"
    assert list(found.names.items())[0] == ("miou", "mIoU")
    save_file({k: t for k, t in heads.items() if "conv_seg" not in k}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"part.safetensors does not fit the model of .*recipe.yaml: "):
        evaluate_published(str(recipe), [], tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="no such file"):
        evaluate_published(str(recipe), [], tmp_path / "nothing.pth")


def test_expectation_is_read_from_the_head():
    head = (
        "# A recipe.\n# expected:   box AP 50.8, mask AP 44.9 (published);\n#             not run\n# weights:    none\n"
    )
    assert expectation(head) == "box AP 50.8, mask AP 44.9 (published); not run"
    assert expectation("model: {}\n") == ""
