"""Exports of heads: of segmenters, and of detectors with queries, whose results have a fixed shape.

Every cell of the table of heads in docs/export.md is tested here.
"""

import json
from typing import Any

import numpy as np
import pytest
import recipe_runner
import torch
from PIL import Image

from tessel.cli.application import main
from tessel.export import BatchDetector, export, formats, load
from tessel.export.detectors import detections_difference
from tessel.predict.networks import ExportedDetector, ExportedNetwork
from tessel.train.recipe.schema import Dense, Model
from tessel.train.tasks.detect.detectors import build_detector
from tessel.train.tasks.detect.options import DetectOptions
from tessel.train.tasks.export import export_model
from tessel.train.tasks.panoptic.model import build as build_panoptic
from tessel.train.tasks.panoptic.options import PanopticOptions
from tessel.train.tasks.segment.model import build_segmenter
from tessel.train.tasks.segment.options import SegmentOptions

pytestmark = pytest.mark.filterwarnings("ignore")  # exporters warn about their own code

KINDS = list(recipe_runner.NARROW_QUERIES)
CLASSES = ["a", "b", "c", "d", "e"]


def options(kind):
    return DetectOptions(detector=kind, channels=64, max_size=128, kwargs=recipe_runner.NARROW_QUERIES[kind])


def disturbed(model):
    """Random weights in which no branch is zero, so that queries differ."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def detector(kind, name="test_convnext"):
    return disturbed(build_detector(Model(name=name), options(kind), dense=Dense(), size=64, classes=len(CLASSES)))


def as_file(model, height, width, **more):
    """The detector that reads an exported file, with the module itself in the place of the file."""
    network = ExportedNetwork.__new__(ExportedNetwork)
    network.path, network.size, network.device = "x.onnx", (height, width), torch.device("cpu")
    exported = BatchDetector(model).eval()
    network.exported = lambda images: exported(images)
    return ExportedDetector(network, model.transform.image_mean, **more)


@pytest.mark.parametrize("width", [96, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_finds_in_an_image_of_its_size_what_the_run_finds(kind, width):
    model, image = detector(kind), torch.rand(3, 64, width)
    with torch.inference_mode():
        (found,), (wanted,) = as_file(model, 64, width)([image]), model([image])
    assert found.keys() == wanted.keys() and len(found["boxes"]) > 0
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_a_file_of_a_panoptic_model_gives_segments_without_overlap():
    rules, things = PanopticOptions(min_score=0.0, min_overlap=0.0), [True, True, False, False, False]
    model = Model(name="test_convnext")
    segmenter = build_panoptic(model, options("mask2former"), rules, dense=Dense(), size=64, things=things)
    segmenter, image = disturbed(segmenter), torch.rand(3, 64, 96)
    panoptic = {"things": things, "min_score": 0.0, "min_overlap": 0.0}
    with torch.inference_mode():
        (found,), (wanted,) = as_file(segmenter, 64, 96, panoptic=panoptic)([image]), segmenter([image])
    assert len(found["labels"]) and found["masks"].sum(0).max() == 1
    assert all(torch.equal(found[name], wanted[name]) for name in ("labels", "masks"))


def test_detections_of_a_batch_are_compared_by_image():
    boxes = torch.rand(2, 4, 4) * 50
    one = {"boxes": boxes, "labels": torch.zeros(2, 4).long(), "scores": torch.rand(2, 4) + 0.1}
    assert detections_difference(one, one) == 0
    moved = {**one, "boxes": boxes.clone()}
    moved["boxes"][1, one["scores"][1].argmax()] += 7
    assert detections_difference(moved, one) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect", "panoptic"])
def test_commands_export_a_run_and_predict_with_the_file(task, tmp_path, capsys):
    kind = "mask2former" if task == "panoptic" else "rtdetrv2"
    facts = {"size": 64, "classes": CLASSES, "background": [0, 0, 0]}
    sections = {"dense": Dense(), "detect": options(kind)}
    if task == "panoptic":
        facts["things"] = [True, True, False, False, False]
        sections["options"] = PanopticOptions(min_score=0.0, min_overlap=0.0)
    run, file = tmp_path / "run", tmp_path / "model.pt2"
    state = detector(kind, "s2aformer_atto").state_dict()
    export_model(run, state, task=task, model=Model(name="s2aformer_atto"), sections=sections, **facts)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "image.png")
    assert main(["export", str(run), "--format", "torch-export", "--out", str(file)]) == 0
    assert "torch-export, float32" in capsys.readouterr().out
    results = []
    for model in (file, run):
        argv = [str(model), str(tmp_path / "image.png"), "--json", "--min-score", "0", "--device", "cpu"]
        assert main(["predict", *argv]) == 0
        results.append(json.loads(capsys.readouterr().out))
    found, wanted = (one["objects"] for one in results)
    assert [one["label"] for one in found] == [one["label"] for one in wanted] and found
    for one, other in zip(found, wanted, strict=True):
        assert one["box"] == pytest.approx(other["box"], abs=0.01) and one.get("mask") == other.get("mask")
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


# head, format and open axes of each cell
DETECTORS = [
    ("rtdetrv2", "torch-export", ("batch",)),
    ("deformable_detr", "onnx", ()),
    ("deformable_detr", "torch-export", ("batch",)),
    ("mask2former", "torch-export", ("batch",)),
    ("d_fine", "torch-export", ("batch",)),
    ("mask2former", "onnx", ()),
    ("mask2former", "onnx", ("batch",)),
    ("d_fine", "onnx", ("batch",)),
    ("deformable_detr", "openvino", ()),
    ("rtdetrv2", "onnx", ()),
    ("rtdetrv2", "onnx", ("batch",)),
    ("d_fine", "onnx", ()),
    ("mask2former", "openvino", ()),
    ("rtdetrv2", "openvino", ()),
    ("d_fine", "openvino", ()),
    ("rtdetrv2", "aoti", ("batch",)),
    ("d_fine", "aoti", ("batch",)),
    ("deformable_detr", "aoti", ("batch",)),
    ("deformable_detr", "onnx", ("batch",)),
    ("mask2former", "aoti", ("batch",)),
    *(("pem", format, ("batch",)) for format in ("onnx", "torch-export", "aoti")),
    *(("pem", format, ()) for format in ("onnx", "openvino")),
]
CONVOLUTIONS = ("FPNHead", "UPerHead", "FPNHead on FreqFusion")
SEGMENTERS = [
    ("Mask2Former", "torch-export", ("batch",)),
    ("PEM", "torch-export", ("batch", "size")),
    ("Mask2Former", "onnx", ()),
    ("Mask2Former", "onnx", ("batch",)),
    ("Mask2Former", "openvino", ()),
    ("PEM", "openvino", ()),
    ("PEM", "onnx", ("batch",)),
    ("PEM", "onnx", ("batch", "size")),
    ("Mask2Former", "aoti", ("batch",)),
    ("PEM", "aoti", ("batch", "size")),
    ("PEM", "onnx", ()),
    ("PEM", "torch-export", ("batch",)),
    ("PEM", "aoti", ("batch",)),
    *((head, format, ()) for head in CONVOLUTIONS for format in ("onnx", "openvino")),
    *((head, format, ("batch",)) for head in CONVOLUTIONS for format in ("onnx", "torch-export", "aoti")),
    *((head, format, ("batch", "size")) for head in CONVOLUTIONS for format in ("onnx", "torch-export")),
    *((head, "aoti", ("batch", "size")) for head in ("FPNHead", "UPerHead")),
]


IN_CI = [*DETECTORS[:2], *SEGMENTERS[:2], ("UPerHead", "torch-export", ("batch", "size"))]


def marked(cells):
    return [pytest.param(*cell, marks=pytest.mark.slow if cell in IN_CI else pytest.mark.large) for cell in cells]


@pytest.mark.parametrize(("kind", "format", "dynamic"), marked(DETECTORS))
def test_detectors_with_queries_export(kind, format, dynamic, tmp_path):
    if missing := formats()[format].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    model = BatchDetector(detector(kind, "s2aformer_atto"))
    example = torch.rand(2 if dynamic else 1, 3, 96, 128)
    report = export(model, tmp_path / "model", format, example=example, dynamic=dynamic)
    found = load(report.path)(example)
    assert report.error < 1e-4 and found.keys() == model.eval()(example).keys()
    with pytest.raises(ValueError, match="a detector is exported for a fixed size; use"):
        export(model, tmp_path / "model", format, example=example, dynamic=("size",))


SECTIONS: dict[str, dict[str, Any]] = {
    "Mask2Former": {"decode_head": {"type": "Mask2Former", **recipe_runner.NARROW_MASK2FORMER}},
    "PEM": {"decode_head": {"type": "PEM", **recipe_runner.NARROW_PEM}},
    "FPNHead": {"decode_head": {"type": "FPNHead", "channels": 16}, "neck": {"type": "FPN", "out_channels": 16}},
    "UPerHead": {"decode_head": {"type": "UPerHead", "channels": 16}},
    "FPNHead on FreqFusion": {
        "decode_head": {"type": "FPNHead", "channels": 16},
        "neck": {"type": "FreqFusion", "out_channels": 16, "compressed": 8},
    },
}


@pytest.mark.parametrize(("head", "format", "dynamic"), marked(SEGMENTERS))
def test_segmenters_export(head, format, dynamic, tmp_path):
    if missing := formats()[format].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    config = SegmentOptions(**SECTIONS[head])
    model = disturbed(build_segmenter(Model(name="s2aformer_atto"), config, dense=Dense(), classes=CLASSES))
    report = export(model, tmp_path / "model", format, example=torch.randn(2, 3, 96, 128), dynamic=dynamic)
    assert report.error < 1e-4 and {shape[0] for shape in report.errors} == ({1, 2, 3} if dynamic else {2})
    assert len({shape[2:] for shape in report.errors}) > 2 or "size" not in dynamic
