"""Predictions with exported files, in Python and by `tessel predict`."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from predictors import RUNS, picture
from safetensors.torch import load_file, save_file

import tessel
import tessel.train.segment
from tessel.cli import main
from tessel.cli.export import FORMATS
from tessel.export import OneImageDetector
from tessel.predict.networks import ExportedDetector, ExportedNetwork
from tessel.predict.tasks import Detector
from tessel.train.errors import UserError


@pytest.fixture(scope="module")
def classifier():
    return tessel.load(RUNS / "classify", device="cpu")


@pytest.fixture(scope="module")
def segmenter():
    return tessel.load(RUNS / "segment", device="cpu")


@pytest.fixture(scope="module")
def detector():
    return tessel.load(RUNS / "detect", device="cpu")


class Exported:
    """What `tessel.export.load` returns, over a network of PyTorch; refuses images of another shape than the file's."""

    def __init__(self, network: torch.nn.Module, metadata: dict):
        self.network, self.metadata = network, metadata

    def __call__(self, images):
        for axis, name in enumerate(("batch", "chans", "size", "size")):
            if name not in self.metadata["dynamic"] and images.shape[axis] != self.metadata["example"][axis]:
                raise RuntimeError(f"invalid dimension {axis}\nof the input")
        with torch.no_grad():
            return self.network(images)


@pytest.fixture
def exported_file(tmp_path, monkeypatch):
    """Make a file that holds the network and the metadata of a predictor."""

    def make(predictor, dynamic, example=(2, 3, 32, 32), **changes):
        facts = {"input_size": [3, 32, 32], "dynamic": dynamic, "example": list(example)}
        metadata = json.loads(json.dumps({**facts, **predictor.model.metadata(), **changes}))
        module = predictor.model.network.module
        exported = Exported(OneImageDetector(module) if predictor.task == "detect" else module, metadata)
        room = types.ModuleType("tessel.export")
        room.__dict__.update(load=lambda path: exported, ExportError=RuntimeError)
        monkeypatch.setitem(sys.modules, "tessel.export", room)
        (tmp_path / "model.onnx").touch()
        return tmp_path / "model.onnx"

    return make


@pytest.mark.parametrize("task", ["classify", "segment", "detect"])
def test_transparent_pixels_have_the_background_of_the_training(task, tmp_path, exported_file):
    run = shutil.copytree(RUNS / task, tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text().replace("\ndata:\n", "\ndata:\n  background: [0, 128, 255]\n")
    (run / "recipe.yaml").write_text(recipe)
    config = json.loads((run / "export/config.json").read_text())
    (run / "export/config.json").write_text(json.dumps(config | {"background": [0, 0, 0]}))
    clear = np.zeros((32, 32, 4), np.uint8)
    predictor = tessel.load(run, device="cpu")
    file = exported_file(predictor, [], example=(1, 3, 32, 32))
    models = {predictor: (0, 128, 255), tessel.load(run / "export", device="cpu"): (0, 0, 0)}
    models[tessel.load(file)] = (0, 128, 255)
    models[tessel.load(RUNS / task, device="cpu")] = (255, 255, 255)
    for model, background in models.items():
        (found,) = model.predict(clear)
        assert np.unique(np.asarray(found.image).reshape(-1, 3), axis=0).tolist() == [list(background)]


@pytest.mark.parametrize("dynamic", [["batch", "size"], ["batch"], ["size"], []])
def test_exported_classifier_predicts_as_the_run(dynamic, classifier, exported_file):
    model = tessel.load(exported_file(classifier, dynamic))
    images = [picture(seed) for seed in range(3)]
    for found, wanted in zip(model.predict(images), classifier.predict(images), strict=True):
        assert found.labels == wanted.labels and found.probabilities == pytest.approx(wanted.probabilities, abs=1e-5)


def test_exported_classifier_without_names_numbers_its_classes(classifier, exported_file):
    assert tessel.load(exported_file(classifier, [], class_names=None)).classes == [f"class {i}" for i in range(10)]


def test_exported_classifier_of_several_labels(classifier, exported_file):
    thresholds = {str(index): 0.0 if index == 3 else 1.0 for index in range(10)}
    model = tessel.load(exported_file(classifier, [], task="multilabel", thresholds=thresholds))
    assert model.predict(picture())[0].labels == ["3"]


def test_exported_segmenter_predicts_as_the_run(segmenter, exported_file):
    image = picture(size=(80, 50))
    found = tessel.load(exported_file(segmenter, ["batch", "size"])).predict(image)[0]
    assert np.array_equal(found.mask, segmenter.predict(image)[0].mask) and found.palette == segmenter.model.palette
    assert tessel.load(exported_file(segmenter, ["batch"])).predict(image)[0].mask.shape == (50, 80)


def test_exported_detector_predicts_as_the_run(detector, exported_file):
    model = tessel.load(exported_file(detector, [], example=(1, 3, 48, 64)))
    image = picture(size=(64, 48))
    (found,), (wanted,) = (one.predict(image, min_score=0.0) for one in (model, detector))
    assert len(found) == len(wanted) > 0 and found.labels == wanted.labels
    np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-3)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)


class Fixed(torch.nn.Module):
    """A detector that finds the part of the image which is not gray."""

    def forward(self, images):
        rows, columns = (images[0] - 0.5).abs().amax(0).gt(0.2).nonzero().unbind(1)
        box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        mask = torch.zeros(1, 1, *images.shape[2:])
        mask[:, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = 1
        return {"boxes": box[None], "labels": torch.tensor([0]), "scores": torch.tensor([0.9]), "masks": mask}


@pytest.mark.parametrize("size", [(160, 80), (40, 120), (20, 16)])
def test_boxes_of_an_exported_detector_are_those_of_the_image(size):
    network = ExportedNetwork.__new__(ExportedNetwork)
    network.path, network.size, network.device, network.exported = "x.onnx", (48, 64), torch.device("cpu"), Fixed()
    detector = Detector(ExportedDetector(network, [0.5] * 3), ["part"], size=48, padding=[0.5] * 3)
    width, height = size
    pixels = np.full((height, width, 3), 128, np.uint8)
    left, top, right, bottom = wanted = [width // 4, height // 4, 3 * width // 4, 3 * height // 4]
    pixels[top:bottom, left:right] = 255
    (found,) = detector.predict([("x", Image.fromarray(pixels))])
    tolerance = max(width / 64, height / 48, 1)
    np.testing.assert_allclose(found.boxes[0], wanted, atol=1.5 * tolerance)
    assert found.masks.shape == (1, height, width)
    area = np.zeros((height, width), bool)
    area[top:bottom, left:right] = True
    assert (found.masks[0] & area).sum() > 0.85 * (found.masks[0] | area).sum()


def test_exported_files_that_do_not_fit_are_errors(classifier, detector, exported_file, monkeypatch):
    with pytest.raises(UserError, match="accepts images of 32 x 32 pixels only"):
        tessel.load(exported_file(classifier, ["batch"]), size=64)
    with pytest.raises(UserError, match="does not say what it predicts"):
        tessel.load(exported_file(classifier, [], task=None))
    with pytest.raises(UserError, match="does not say how its images are prepared"):
        tessel.load(exported_file(classifier, [], task="segment", class_names=None))
    with pytest.raises(UserError, match="of task 'depth' are not supported"):
        tessel.load(exported_file(classifier, [], task="depth"))
    with pytest.raises(UserError, match="does not say how its images are prepared"):
        tessel.load(exported_file(detector, [], class_names=None))
    model = tessel.load(exported_file(classifier, ["batch"]))
    model.model.network.exported.metadata["example"] = [1, 3, 16, 16]
    with pytest.raises(UserError, match=r"does not accept images \[1, 3, 32, 32\]: invalid dimension 2 of the input"):
        model.predict(picture())


@pytest.mark.slow
@pytest.mark.parametrize(
    "run, format, options",
    [
        ("classify", "torch-export", ["--size", "32", "--dynamic", "batch"]),
        ("segment", "torch-export", ["--size", "32", "--dynamic", "none"]),
        ("classify", "onnx", []),
        ("segment", "onnx", []),
        ("detect", "onnx", ["--size", "32"]),
        ("detect", "torchscript-trace", ["--size", "32"]),
    ],
)
def test_export_and_predict_on_the_command_line(run, format, options, tmp_path, capsys):
    room = pytest.importorskip("tessel.export")
    assert set(FORMATS) == set(room.formats())
    if missing := room.formats()[format].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    file = tmp_path / f"model{room.formats()[format].suffix}"
    source = shutil.copytree(RUNS / run, tmp_path / run)
    if run == "detect":  # in the run, which trained for some steps, all scores are equal
        state = load_file(source / "export/model.safetensors")
        noise = {name: 0.05 * torch.randn_like(tensor) for name, tensor in state.items() if tensor.is_floating_point()}
        save_file(
            {name: tensor + noise.get(name, 0) for name, tensor in state.items()}, source / "export/model.safetensors"
        )
    assert main(["export", str(source), "--format", format, "--out", str(file), *options]) == 0
    assert "differs from PyTorch by at most" in capsys.readouterr().out
    picture(size=(32, 32)).save(tmp_path / "x.png")
    least = ["--min-score", "0"] if run == "detect" else []
    for model in (file, source):
        assert main(["predict", str(model), str(tmp_path / "x.png"), "--device", "cpu", *least]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1] and (least or "%" in lines[0]) and "nothing" not in lines[0]
    assert main(["export", str(file)]) == 1
    assert "is an exported file" in capsys.readouterr().err
