"""Whole walks on own images: train, resume, evaluate, export, report, for each kind of data."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import trainer
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from tessel.train import check, evaluate
from tessel.train.data.image_io import read_file
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.registry import task_spec
from tessel.train.recipe.schema import PixelFormat
from tessel.train.report import __main__ as report
from tessel.train.tasks.classify.channels import array_to_tensor

LABELS = ["red", "green", "blue"]
MODEL = {"name": "test_resnet", "drop_path_rate": None}


def stripes(rng: np.random.Generator, labels: list[int], channels: int = 3) -> np.ndarray:
    """A noisy picture whose stripes show its labels, one channel each."""
    pixels = rng.integers(0, 80, (trainer.SIZE, trainer.SIZE + 8, channels), dtype=np.uint8)
    for label in labels:
        pixels[:: label + 2, :, label] += 150
    return pixels


def plain_folder(root: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for label, name in enumerate(LABELS):
        (root / name).mkdir(parents=True)
        for number in range(16):
            Image.fromarray(stripes(rng, [label])).save(root / name / f"{number}.png")
    return {"source": "folder", "root": str(root)}


def listed(root: Path) -> dict[str, Any]:
    plain_folder(root / "images")
    files = sorted((root / "images").glob("*/*.png"))
    with open(root / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("path", "label"), *((f"images/{p.parent.name}/{p.name}", p.parent.name) for p in files)]
        )
    return {"source": "csv", "root": str(root / "list.csv")}


def label_sets(root: Path) -> dict[str, Any]:
    root.mkdir()
    rng, rows = np.random.default_rng(0), [("path", "label")]
    for number in range(48):
        labels = [label for label in range(3) if (number + 1) >> label & 1]
        Image.fromarray(stripes(rng, labels)).save(root / f"{number}.png")
        rows.append((f"{number}.png", ";".join(LABELS[label] for label in labels)))
    with open(root / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return {"source": "csv", "root": str(root / "list.csv")}


def arrays(root: Path) -> dict[str, Any]:
    """Four channels in .npy files, of which the last one decides."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(LABELS):
        (root / name).mkdir(parents=True)
        for number in range(16):
            pixels = stripes(rng, [], 4).astype(np.float32) / 100
            pixels[:: label + 2, :, 3] += 3
            np.save(root / name / f"{number}.npy", pixels)
    return {"source": "folder", "root": str(root)}


def tiffs(root: Path) -> dict[str, Any]:
    tifffile = pytest.importorskip("tifffile")
    data = arrays(root)
    for file in root.rglob("*.npy"):
        bands = (1000 * np.load(file)).astype(np.uint16)
        tifffile.imwrite(file.with_suffix(".tif"), bands, photometric="minisblack", planarconfig="contig")
        file.unlink()
    return data


GEOMETRY = {"scale": [0.7, 1.0], "ratio": [0.8, 1.2], "hflip": 0.5, "vflip": 0.5, "rotate": 10}
MIXED = {**GEOMETRY, "erasing": 0.2, "mixup": 0.2, "cutmix": 0.5}
STATISTICS = {"mean": [0.4] * 4, "std": [0.2] * 4}


def walk(tmp_path: Path, capsys: Any, metric: str, **sections: dict[str, Any]) -> Path:
    """Train with an interruption and without, and assert that both give the same weights, metrics and export.

    Then check the data, evaluate, and write the report. Returns the run directory.
    """
    sections["data"]["aug"] = sections["data"].pop("aug", MIXED)
    recipe = trainer.write_recipe(tmp_path / "own.yaml", optim={"layer_decay": None}, **sections)
    runs = tmp_path / "runs"
    assert trainer.train(recipe) == 0
    with trainer.before_step(5):
        assert trainer.train(recipe, "run.name=twice", "data.workers=1") == 0
    assert trainer.train(recipe, "run.name=twice") == 0
    assert "at step 5 (exact)" in capsys.readouterr().out
    run, twice = runs / "tiny", runs / "twice"
    trainer.assert_same_checkpoint(run / "checkpoints/step-00000009", twice / "checkpoints/step-00000009")
    assert trainer.stable_metrics(run) == trainer.stable_metrics(twice)
    for name in ("config.json", "model.safetensors"):
        assert (run / "export" / name).read_bytes() == (twice / "export" / name).read_bytes()
    assert check.main([str(recipe)]) == 0, capsys.readouterr().out
    done = json.loads((run / "DONE").read_text())
    assert evaluate.main([str(run)]) == 0
    assert json.loads((run / "evaluation/evaluation.json").read_text())[metric] == pytest.approx(done[metric], abs=1e-4)
    assert report.main([str(run)]) == 0
    capsys.readouterr()
    return run


def page(run: Path) -> str:
    return (run / "report/index.html").read_text()


def loaded(run: Path) -> Any:
    return timm.create_model(f"local-dir:{run}/export", pretrained=True).eval()


def assert_export_repeats_the_evaluation(run: Path, pictures: list[Any], chances: Any) -> None:
    """The exported model with timm's preprocessing gives the probabilities of the evaluation."""
    model = loaded(run)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        logits = model(torch.stack([transform(picture) for picture in pictures]))
    with np.load(run / "evaluation/predictions.npz") as arrays:
        assert np.abs(chances(logits).numpy() - arrays["probability"][: len(pictures)]).max() < 1e-4


def val(run: Path) -> Any:
    return report.read_run(run).held_out


@pytest.mark.slow
@pytest.mark.parametrize("write", [plain_folder, listed])
def test_own_images_with_a_class_each(tmp_path, capsys, write):
    run = walk(tmp_path, capsys, "top1", data=write(tmp_path / "data"), model=MODEL)
    assert loaded(run).pretrained_cfg["label_names"] == (sorted(LABELS) if write is plain_folder else sorted(LABELS))
    data = val(run)
    assert_export_repeats_the_evaluation(run, [data[i][0] for i in range(4)], lambda x: x.softmax(1))
    assert "Left out: the evaluation" not in page(run) and "confusion" in page(run).lower()


@pytest.mark.slow
def test_several_labels_per_image(tmp_path, capsys):
    run = walk(
        tmp_path,
        capsys,
        "map",
        data=label_sets(tmp_path / "data"),
        model=MODEL,
        task={"kind": "multilabel", "smoothing": 0.1},
    )
    config = json.loads((run / "export/config.json").read_text())
    evaluation = json.loads((run / "evaluation/evaluation.json").read_text())
    assert list(config["thresholds"]) == sorted(LABELS) == config["label_names"] and config["task"] == "multilabel"
    assert all(0 < threshold < 1 for threshold in config["thresholds"].values())
    assert evaluation["thresholds"] == pytest.approx(config["thresholds"], abs=1e-5)
    values = evaluation["classes"]["average_precision"]
    assert evaluation["map"] == pytest.approx(np.mean(list(values.values())))
    data = val(run)
    assert_export_repeats_the_evaluation(run, [data[i][0] for i in range(4)], lambda x: x.sigmoid())
    assert all(text in page(run) for text in ("Thresholds", "average precision", "Hardest images"))
    assert "Left out" not in page(run)


@pytest.mark.slow
@pytest.mark.parametrize("write", [arrays, tiffs])
def test_four_channels(tmp_path, capsys, write):
    data = write(tmp_path / "data")
    if write is tiffs:
        data |= STATISTICS
    else:
        # without them, the error has the measured ones
        recipe = trainer.write_recipe(tmp_path / "r.yaml", data=data | {"aug": GEOMETRY}, model=MODEL | {"in_chans": 4})
        assert trainer.train(recipe) == 1
        words = capsys.readouterr().err.split()
        measured = {
            word.split("=")[0][5:]: json.loads(word.split("=")[1]) for word in words if word.startswith("data.")
        }
        assert measured.keys() == {"mean", "std"}
        assert measured["mean"][0] == pytest.approx(0.4, abs=0.02) and measured["mean"][3] > 1
        data |= measured
    run = walk(tmp_path, capsys, "top1", data=data | {"aug": MIXED}, model=MODEL | {"in_chans": 4})
    config = json.loads((run / "export/config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [4, 32, 32] and config["pretrained_cfg"]["mean"] == data["mean"]
    kept = read_file(val(run).paths[0].decode(), pixel_format=PixelFormat(channels=4))
    assert kept.dtype == (np.uint16 if write is tiffs else np.float32)
    data_set = val(run)
    pictures = [array_to_tensor(data_set[i][0]) for i in range(4)]
    assert_export_repeats_the_evaluation(run, pictures, lambda x: x.softmax(1))
    assert "attention is drawn on images of 3 channels" in page(run) and "classified as" in page(run)


@pytest.mark.slow
def test_gray_images(tmp_path, capsys):
    run = walk(
        tmp_path,
        capsys,
        "top1",
        data=plain_folder(tmp_path / "data") | {"aug": {**MIXED, "auto_augment": "rand-m9-n2"}},
        model=MODEL | {"in_chans": 1},
    )
    config = json.loads((run / "export/config.json").read_text())["pretrained_cfg"]
    assert config["input_size"] == [1, 32, 32] and len(config["mean"]) == 1
    data = val(run)
    pictures = [data[i][0].convert("L") for i in range(4)]
    assert_export_repeats_the_evaluation(run, pictures, lambda x: x.softmax(1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multilabel", "four channels"])
def test_two_processes_evaluate_and_train_like_one(tmp_path, kind):
    plain = MODEL | {"name": "test_convnext"}  # without batch norms, whose running statistics are those of one process
    if kind == "multilabel":
        sections: dict[str, Any] = {
            "data": label_sets(tmp_path / "data"),
            "task": {"kind": "multilabel"},
            "model": plain,
        }
    else:
        sections = {"data": arrays(tmp_path / "data") | STATISTICS, "model": plain | {"in_chans": 4}}
    sections["data"]["aug"] = MIXED
    recipe = trainer.write_recipe(tmp_path / "own.yaml", optim={"layer_decay": None}, **sections)
    assert trainer.train(recipe, "data.micro_batch=4") == 0
    done = trainer.run_processes(2, [recipe, "run.name=two", "data.micro_batch=4"])
    assert trainer.exit_codes(done) == [[0, 0]], done.stderr
    runs = tmp_path / "runs"
    one, two = (json.loads((runs / name / "DONE").read_text()) for name in ("tiny", "two"))
    assert one.keys() == two.keys() and one["count"] == two["count"]
    metric = "map" if kind == "multilabel" else "top1"
    assert [one[key] for key in ("loss", metric)] == pytest.approx([two[key] for key in ("loss", metric)], abs=1e-3)
    for key, values in one.get("classes", {}).items():
        assert values == pytest.approx(two["classes"][key], abs=1e-3)


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["model.in_chans=4", "data.aug.auto_augment=rand-m5-n1"], "data.aug.auto_augment changes colors"),
        (
            ["model.in_chans=4", "data.aug.color_jitter=0.3", "data.aug.auto_augment=null"],
            "data.aug.color_jitter changes",
        ),
        (["data.mean=[0.5]"], "give both data.mean and data.std"),
        (["data.mean=[0.5,0.5]", "data.std=[0.5]"], "data.mean has 2 values, but the images have 3 channels"),
        (
            ["task.kind=multilabel"],
            "data.source=folder has no label sets, which task.kind=multilabel reads here; use one of csv",
        ),
        (["task.kind=segment", "model.in_chans=4"], "model.in_chans=4 does not work with task.kind=segment"),
    ],
)
def test_keys_that_do_not_fit_are_errors(tmp_path, capsys, overrides, fragment):
    recipe = trainer.write_recipe(tmp_path / "r.yaml", data={"root": "x", "aug": {"hflip": 0.5}})
    assert trainer.train(recipe, *overrides) == 1
    assert fragment in capsys.readouterr().err


def test_channels_and_classes_that_do_not_fit_the_files_are_errors(tmp_path, capsys):
    recipe = trainer.write_recipe(tmp_path / "r.yaml", data=arrays(tmp_path / "data") | {"aug": {}}, model=MODEL)
    assert trainer.train(recipe, "model.in_chans=5", "data.mean=[0.5]", "data.std=[0.5]") == 1
    assert "it has the shape [32, 40, 4], but model.in_chans=5" in capsys.readouterr().err
    assert trainer.train(recipe) == 1
    assert "it has values of type float32" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["multilabel", "four channels"])
def test_short_run(tmp_path, monkeypatch, kind):
    """Four updates and an export, which the code of the report uses."""
    if kind == "multilabel":
        data, model, task = label_sets(tmp_path / "data"), MODEL, {"kind": "multilabel"}
    else:
        data, model, task = arrays(tmp_path / "data") | STATISTICS, MODEL | {"in_chans": 4}, {}
    steps = {"steps": 4, "warmup": 1}
    options = {"optim": {"layer_decay": None}, "sched": steps, "ckpt": {"every": 4}, "eval": {"every": 4}}
    recipe = trainer.write_recipe(tmp_path / "r.yaml", data=data | {"aug": MIXED}, model=model, task=task, **options)
    assert trainer.train(recipe) == 0
    run = tmp_path / "runs/tiny"
    channels = 3 if kind == "multilabel" else 4
    assert loaded(run)(torch.zeros(1, channels, 32, 32)).shape == (1, 3)
    thresholds = json.loads((run / "export/config.json").read_text()).get("thresholds")
    assert list(thresholds or ()) == (sorted(LABELS) if kind == "multilabel" else [])
    Image.new("RGB", (40, 50)).save(tmp_path / "image.jpg")
    np.save(tmp_path / "image.npy", np.zeros((40, 50, 4), np.float32))
    monkeypatch.chdir(tmp_path)
    loaded_recipe = load_recipe(recipe)
    exec(task_spec(loaded_recipe).usage_code(loaded_recipe, str(run / "export")), {})
