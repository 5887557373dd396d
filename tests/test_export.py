"""tessel.export: files agree with PyTorch at other batches and sizes, carry their metadata, and errors say what to do.

Which model exports to which format is recorded in docs/export.json by docs/export_table.py; every cell that is recorded
as working is tested here.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import tessel
import tessel.export.formats.torch_export
import tessel.zoo
from tessel.blocks import (
    FlooredBiLevelRouting,
    Halo,
    Hierarchical,
    LongShortDistance,
    NeighborhoodAttention,
    ShiftedWindow,
    Window,
)
from tessel.export import ExportError, OneImageDetector, export, formats, load
from tessel.export.comparison import difference
from tessel.export.detectors import detection_difference
from tessel.train.recipe.schema import Dense, Model
from tessel.train.tasks.detect.detectors import build_detector
from tessel.train.tasks.detect.options import DetectOptions
from tessel.train.tasks.segment.model import build_segmenter
from tessel.train.tasks.segment.options import SegmentOptions

DOCS = Path(tessel.__file__).parent / "docs"
sys.path.insert(0, str(DOCS))
import export_table  # noqa: E402

sys.path.remove(str(DOCS))

pytestmark = pytest.mark.filterwarnings("ignore")  # exporters warn about their own code


ATTOS = [name for name in tessel.zoo.list_models() if name.endswith("_atto")]
FIRST = {f"{name}_atto" for name in ("affnet", "biformer", "cswin", "litv2", "s2aformer", "van")}

# the cells that CI runs; the others take many minutes
IN_CI = {
    "ONNX, batch and size": FIRST,
    "torch.export, batch and size": FIRST,
    "TorchScript, batch": set(ATTOS),
    "AOTInductor, batch and size": {"van_atto"},
    "OpenVINO": {"attnet_atto", "crossformer_atto", "s2aformer_atto"},
    "ExecuTorch": {"s2aformer_atto"},
}
BY_DEFAULT = ("s2aformer_atto", "ONNX, batch and size")


def cells():
    """The working cells of the table: one runs by default, CI runs some, the rest is run by hand."""
    for name, row in json.loads(export_table.RECORD.read_text())["cells"].items():
        for title, cell in row.items():
            if "error" in cell:
                marks = [pytest.mark.slow] if name in IN_CI.get(title, ()) else [pytest.mark.large]
                if (name, title) == BY_DEFAULT:
                    marks = []
                yield pytest.param(name, title, id=f"{name}-{title}", marks=marks)


@pytest.mark.parametrize(("name", "title"), list(cells()))
def test_cells_of_the_table_work(name, title, tmp_path):
    if missing := formats()[export_table.CELLS[title].format].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    assert export_table.measure(name, title, tmp_path)["error"] <= 1e-4


def test_the_table_has_every_family_and_format():
    record = json.loads(export_table.RECORD.read_text())["cells"]
    assert list(record) == ATTOS
    for row in record.values():
        assert list(row) == [title for title in export_table.CELLS if title in row]
    assert {cell.format for cell in export_table.CELLS.values()} == set(formats())


class Doubled(nn.Module):
    """A model with several outputs, and with a size that it refuses."""

    in_chans = 3

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return {"map": y, "mean": y.mean((2, 3))}


SLOW = [pytest.param(format, marks=pytest.mark.slow) for format in ("openvino", "executorch")]


@pytest.mark.parametrize("format", ["onnx", "torch-export", "torchscript-trace", *SLOW])
def test_file_carries_preprocessing_and_class_names(tmp_path, format):
    if missing := formats()[format].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    model = timm.create_model("resnet18", num_classes=3).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    names = ["chat", "chien", "réservé"]
    report = export(model, tmp_path / "model", format, size=64, class_names=names, metadata={"source": "a test"})
    assert report.path == (tmp_path / "model").with_suffix(formats()[format].suffix)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert report.size == sum(path.stat().st_size for path in tmp_path.iterdir()) and report.error <= 1e-4
    assert files == (["model.bin", "model.xml"] if format == "openvino" else [report.path.name]), "nothing else is left"
    assert model.training and all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    loaded = load(report.path)
    assert loaded.format == format
    found = loaded.metadata
    assert found["class_names"] == names and found["source"] == "a test" and found["tessel"] == tessel.__version__
    assert found["mean"] == pytest.approx(timm.data.IMAGENET_DEFAULT_MEAN) and found["crop_pct"] == 0.95
    assert found["input_size"] == [3, 64, 64]
    assert found["interpolation"] == "bicubic" and found["task"] == "classify" and found["outputs"] == ["output"]
    x = torch.randn(1, 3, 64, 64)
    assert difference(loaded(x), model.eval()(x).detach()) < 1e-4


class Heads(nn.Module):
    """Attention of 4 heads."""

    def forward(self, x):
        q, k, v = x.flatten(2).transpose(1, 2).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.slow
def test_openvino_attends_with_as_many_heads_as_tokens(tmp_path):
    if missing := formats()["openvino"].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    import openvino

    report = export(Heads(), tmp_path / "model", "openvino", example=torch.randn(3, 192, 2, 2), dynamic=())
    assert report.path.with_suffix(".bin").is_file()
    model = openvino.Core().read_model(report.path)
    assert list(model.inputs[0].get_partial_shape().to_shape()) == [3, 192, 2, 2], "fixed axes have their length"
    export(Heads(), tmp_path / "open", "openvino", example=torch.randn(3, 192, 3, 2), dynamic=("batch",))
    model = openvino.Core().read_model(tmp_path / "open.xml")
    assert str(model.inputs[0].get_partial_shape()) == "[?,192,3,2]"


def test_several_outputs_have_names(tmp_path):
    model = Doubled()
    report = export(model, tmp_path / "model.pt2", "torch-export", size=16)
    outputs, x = load(report.path)(x := torch.randn(1, 3, 20, 24)), x
    expected = model(x)
    assert outputs.keys() == expected.keys() == {"map", "mean"}
    for key, value in expected.items():
        torch.testing.assert_close(outputs[key], value, rtol=1e-4, atol=1e-5)
    assert {shape[0] for shape in report.errors} >= {1, 2, 3} and len({shape[2:] for shape in report.errors}) > 2


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_an_example_of_one_image_leaves_the_batch_open(format, tmp_path):
    if missing := formats()[format].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    report = export(Doubled(), tmp_path / "model", format, example=torch.randn(1, 3, 12, 16), dynamic=("batch", "size"))
    assert {shape[0] for shape in report.errors} == {1, 3}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch-export", "openvino"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_neighborhoods_grow_from_one_tile(dilation, format, tmp_path):
    if missing := formats()[format].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    block = NeighborhoodAttention(8, num_heads=2, kernel_size=3, dilation=dilation).eval()
    report = export(block, tmp_path / "model", format, example=torch.randn(2, 8, 3 * dilation, 8))
    assert max(shape[2:] for shape in report.errors) > (35, 22) and report.error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "format"), [(3, "onnx"), (8, "onnx"), (3, "torch-export"), (8, "torch-export"), (3, "openvino")]
)
def test_groups_of_long_distance_leave_sizes_open(side, format, tmp_path):
    """Recorded with a map that is a single group, and with one that groups divide."""
    if missing := formats()[format].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    block = LongShortDistance(8, num_heads=2, group=4, interval=2).eval()
    report = export(block, tmp_path / "model", format, example=torch.randn(2, 8, side, 16))
    assert max(shape[2:] for shape in report.errors) > (35, 22) and report.error < 1e-5


def test_adaptive_pooling_stays_open(tmp_path):
    if missing := formats()["onnx"].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d((3, None)), nn.AdaptiveAvgPool2d(2))
    report = export(model, tmp_path / "model.onnx", size=16)
    assert len(report.errors) > 3 and isinstance(model[1], nn.AdaptiveAvgPool2d), "the model itself is not changed"


SLOW_BLOCKS = [pytest.param(Hierarchical, "torch-export", marks=pytest.mark.slow)]
SLOW_BLOCKS += [pytest.param(Window, "openvino", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "format"), [(Window, "torch-export"), *SLOW_BLOCKS])
def test_graphs_of_one_window_run_with_several(kind, format, tmp_path):
    if missing := formats()[format].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    block = kind(16, num_heads=2, window=4).eval()
    report = export(block, tmp_path / "model", format, example=torch.randn(2, 16, 3, 4))
    sizes = {shape[2:] for shape in report.errors}
    assert (3, 4) in sizes and max(sizes) > (35, 22) and {shape[0] for shape in report.errors} == {1, 2, 3}


@pytest.mark.slow
def test_programs_of_regions_of_one_pixel_run_with_larger_ones(tmp_path):
    block = FlooredBiLevelRouting(16, num_heads=2, n_win=4, topk=2).eval()
    report = export(block, tmp_path / "model", "torch-export", example=torch.randn(2, 16, 5, 5))
    assert max(shape[2:] for shape in report.errors) > (35, 22) and {shape[0] for shape in report.errors} == {1, 2, 3}


@pytest.mark.slow
def test_shifted_windows_export_to_onnx_with_open_sizes(tmp_path):
    if missing := formats()["onnx"].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    block = ShiftedWindow(16, num_heads=2, window=4, shift=2).eval()
    report = export(block, tmp_path / "model", "onnx", example=torch.randn(2, 16, 6, 9), dynamic=("batch", "size"))
    assert max(shape[2:] for shape in report.errors) > (35, 22) and report.error < 1e-5


def test_programs_of_halos_take_other_sizes(tmp_path):
    """A halo map alone cannot be recorded for one block at batch 1, so the example has several blocks."""
    block = Halo(16, num_heads=2, block_size=4, halo_size=1).eval()
    report = export(block, tmp_path / "model", "torch-export", example=torch.randn(2, 16, 5, 9))
    assert len({shape[2:] for shape in report.errors}) > 2 and {shape[0] for shape in report.errors} == {1, 2, 3}


@pytest.mark.slow
def test_halos_in_onnx_have_the_bias_of_their_own_position(tmp_path):
    if missing := formats()["onnx"].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    block = Halo(16, num_heads=2, block_size=4, halo_size=1).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    report = export(block, tmp_path / "model", "onnx", example=torch.randn(2, 16, 8, 12), dynamic=())
    assert report.error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("head", ["UPerHead", "FPNHead"])
def test_segmenters_export_with_open_size(head, tmp_path):
    if missing := formats()["onnx"].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    options = SegmentOptions(decode_head={"type": head, "channels": 16})
    model = build_segmenter(Model(name="s2aformer_atto"), options, dense=Dense(), classes=["road", "sky", "tree"])
    model.classes = ["road", "sky", "tree"]
    report = export(model, tmp_path / "model.onnx", example=torch.randn(2, 3, 96, 128))
    run = load(report.path)
    assert run.metadata["class_names"] == model.classes and run.metadata["mean"]
    assert run(torch.randn(1, 3, 97, 147)).shape == (1, 3, 97, 147)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torchscript-trace"])
@pytest.mark.parametrize("name", ["fcos", "retinanet", "faster_rcnn", "mask_rcnn"])
def test_detectors_export_for_one_image(tmp_path, name, format):
    if missing := formats()[format].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    kwargs = {"box_score_thresh": 0.0, "box_detections_per_img": 7}
    if "rcnn" not in name:
        kwargs = {"score_thresh": 0.0, "detections_per_img": 7}
    anchor = {} if name == "fcos" else {"anchor": 8}
    options = DetectOptions(detector=name, channels=64, max_size=200, kwargs=kwargs, **anchor)
    detector = build_detector(Model(name="s2aformer_atto"), options, dense=Dense(), size=64, classes=3).eval()
    model = OneImageDetector(detector)
    report = export(model, tmp_path / "model", format, size=(64, 80))
    images = torch.rand(1, 3, 64, 80)
    found, expected = load(report.path)(images), model(images)
    assert found.keys() == expected.keys() and len(found["boxes"]) == 7
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="format aoti cannot record how many boxes .* choose one of onnx, torchscript"):
        export(model, tmp_path / "model", "aoti")


def test_detections_are_compared_in_any_order_of_equal_scores():
    boxes = torch.tensor([[0.0, 0, 9, 9], [5, 5, 20, 20], [1, 2, 3, 4], [7, 7, 8, 8]])
    scores, labels = torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([0, 1, 1, 2])
    expected = {"boxes": boxes, "scores": scores, "labels": labels, "masks": torch.zeros(4, 1, 2, 2)}
    swapped = {name: tensor[[0, 2, 1, 3]] for name, tensor in expected.items()}
    last = {**expected, "boxes": boxes + torch.tensor([0, 0, 0, 3.0])[:, None]}
    assert detection_difference(swapped, expected) == detection_difference(last, expected) == 0
    moved = {**expected, "boxes": boxes + torch.tensor([0, 2.0, 0, 0])[:, None]}
    assert detection_difference(moved, expected) == pytest.approx(2 / 20)
    masked = {**expected, "masks": expected["masks"] + torch.tensor([0.5, 0, 0, 0])[:, None, None, None]}
    assert detection_difference(masked, expected) == 0.5
    renamed = {**expected, "labels": torch.tensor([1, 1, 1, 2])}
    assert detection_difference(renamed, expected) == float("inf")
    assert detection_difference({name: tensor[:3] for name, tensor in expected.items()}, expected) == float("inf")
    assert detection_difference({**expected, "scores": scores * 1.1}, expected) == pytest.approx(0.1)
    nothing = {name: tensor[:0] for name, tensor in expected.items()}
    assert detection_difference(nothing, nothing) == 0


def test_imagenet_names_come_with_imagenet_models(tmp_path):
    model = timm.create_model("s2aformer_atto").eval()
    names = tessel.export.metadata.describe(model)["class_names"]
    assert len(names) == 1000 and names[0].startswith("tench")
    assert tessel.export.metadata.describe(timm.create_model("s2aformer_atto", num_classes=7))["class_names"] is None


def test_half_precision(tmp_path):
    model = timm.create_model("s2aformer_atto", num_classes=5)
    report = export(model, tmp_path / "model.pt2", "torch-export", size=64, dynamic=(), half=True)
    loaded = load(report.path)
    assert loaded.metadata["dtype"] == report.dtype == "float16" and 0 < report.error < 0.05
    assert loaded(torch.randn(1, 3, 64, 64)).dtype == torch.float16


class Counting(nn.Module):
    """Gives another result at each call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


def test_a_file_that_differs_is_not_written(tmp_path):
    (tmp_path / "model.pt2").write_text("an older export")
    with pytest.raises(ExportError, match=r"differs from PyTorch by .* on images of .*tolerance=0.0001; nothing"):
        export(Counting(), tmp_path / "model.pt2", "torch-export", size=8)
    assert (tmp_path / "model.pt2").read_text() == "an older export" and len(list(tmp_path.iterdir())) == 1


def test_a_model_that_cannot_be_recorded_is_named(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="the model cannot be exported to torch-export: "):
        export(Branch(), tmp_path / "model.pt2", "torch-export", size=8)
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked(tmp_path):
    model = Doubled()
    with pytest.raises(ValueError, match="format='onxx' is unknown; choose one of onnx, torch-export"):
        export(model, tmp_path / "m", "onxx")
    with pytest.raises(ValueError, match="dynamic='width' is unknown; choose from batch, size"):
        export(model, tmp_path / "m", "torch-export", dynamic=("width",))
    with pytest.raises(ValueError, match="format torchscript-trace cannot leave 'size' open, only batch"):
        export(model, tmp_path / "m", "torchscript-trace", dynamic=("size",))
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        export(model, tmp_path / "m", "torch-export", size=0)
    with pytest.raises(ValueError, match=r"example must be images \[B, C, H, W\]"):
        export(model, tmp_path / "m", "torch-export", example=torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="class_names has 2 names for 5 outputs"):
        export(timm.create_model("s2aformer_atto", num_classes=5), tmp_path / "m", size=64, class_names=["a", "b"])
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else find_spec(name))
    with pytest.raises(ExportError, match=r"needs the packages onnx, onnxscript, onnxruntime: pip install 'tessel\[ex"):
        export(Doubled(), tmp_path / "m.onnx")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ExportError, match="no.onnx is not a file"):
        load(tmp_path / "no.onnx")
    for name in ("model.pt2", "model.pt"):
        (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(ExportError, match=f"{name} cannot be read"):
            load(tmp_path / name)
    (tmp_path / "model.h5").touch()
    with pytest.raises(ExportError, match="model.h5 has no suffix of an exported model"):
        load(tmp_path / "model.h5")


def test_metadata_of_a_later_layout_is_refused():
    with pytest.raises(ValueError, match="has format 99; this version of tessel reads up to 1"):
        tessel.export.metadata.decode(json.dumps({"format": 99}))
