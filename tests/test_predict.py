"""Predictions with models, runs and exports, in Python and by `tessel predict`."""

import functools
import http.server
import importlib
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from predictors import RUNS, opened, picture

import tessel
import tessel.train.segment
from tessel.cli import main
from tessel.predict import Classification, Detection, Segmentation, Unreadable, find_images, load
from tessel.predict.results import run_lengths
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


@pytest.fixture
def folder(tmp_path):
    """Three images in two folders, and a damaged one."""
    for seed, name in enumerate(["a.png", "b.jpg", "below/c.webp"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    (tmp_path / "images" / "b2.jpg").write_bytes(b"no image")
    return tmp_path / "images"


def test_load_is_the_only_lazy_attribute():
    assert tessel.load is load and tessel.__all__ == ["load"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tessel.nothing  # noqa: B018


def test_classes_are_those_of_timm(classifier, tmp_path):
    model = timm.create_model(f"local-dir:{RUNS / 'classify' / 'export'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        wanted = model(transform(picture())[None]).softmax(1)[0]
    (found,) = classifier.predict(picture())
    assert isinstance(found, Classification) and classifier.task == "classify"
    assert found.probabilities == pytest.approx(wanted.topk(5).values.tolist())
    assert found.indices == wanted.topk(5).indices.tolist()
    assert found.labels == [str(index) for index in found.indices] and found.label == found.labels[0]
    assert len(classifier.predict(picture(), topk=100)[0].labels) == 10
    assert found.to_dict()["classes"][0] == {
        "label": found.label,
        "index": found.indices[0],
        "probability": found.probabilities[0],
    }
    json.dumps(found.to_dict())


def test_all_forms_of_one_image_give_one_result(classifier, tmp_path):
    image = picture()
    image.save(tmp_path / "x.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
    deep = array.astype(np.uint16) * 256
    forms = [str(tmp_path / "x.png"), tmp_path / "x.png", image, array, tensor, tensor / 255, array / 255.0, deep]
    results = classifier.predict(forms, batch_size=3)
    assert len(results) == len(forms)
    for result in results:
        assert result.probabilities == pytest.approx(results[0].probabilities)
        assert np.array_equal(np.asarray(result.image), array)
    assert [result.source for result in results[:4]] == [str(tmp_path / "x.png")] * 2 + ["image 3", "image 4"]
    assert len(classifier.predict(torch.stack([tensor, tensor]))) == 2
    gray = classifier.predict([array[..., 0], array[..., :1], Image.fromarray(array[..., 0])])
    assert all(result.probabilities == pytest.approx(gray[0].probabilities) for result in gray)


def test_model_of_gray_images(tmp_path):
    network = timm.create_model("biformer_atto", in_chans=1, num_classes=2).eval()
    config = {"input_size": (1, 32, 32), "mean": (0.4,), "std": (0.2,), "crop_pct": 1.0, "interpolation": "bilinear"}
    timm.models.save_for_hf(network, str(tmp_path), safe_serialization=True, data_config=config)
    (found,) = tessel.load(tmp_path, device="cpu").predict(picture(size=(32, 32)))
    gray = torch.from_numpy(np.asarray(picture(size=(32, 32)).convert("L")).copy())[None, None] / 255
    with torch.no_grad():
        wanted = network((gray - 0.4) / 0.2).softmax(1)[0]
    assert found.probabilities == pytest.approx(wanted.sort(descending=True).values.tolist(), abs=1e-5)


@pytest.fixture
def four_channels(tmp_path):
    """A classifier of four channels, an image, and the probabilities that the network itself gives it."""
    network = timm.create_model("biformer_atto", in_chans=4, num_classes=2).eval()
    config = {"input_size": (4, 32, 32), "mean": (0.4,) * 4, "std": (0.2,) * 4, "crop_pct": 1.0}
    timm.models.save_for_hf(network, str(tmp_path / "model"), safe_serialization=True, data_config=config)
    image = np.random.default_rng(0).integers(0, 65536, (32, 32, 4)).astype(np.uint16)
    with torch.no_grad():
        pixels = torch.from_numpy(image.astype(np.float32)).movedim(-1, 0) / 65535
        return tessel.load(tmp_path / "model", device="cpu"), image, network(((pixels - 0.4) / 0.2)[None]).softmax(1)[0]


def test_model_of_four_channels(four_channels, tmp_path):
    model, image, wanted = four_channels
    np.save(tmp_path / "x.npy", image)
    np.savez(tmp_path / "x.npz", np.moveaxis(image, 2, 0))
    tensor = torch.from_numpy(image.astype(np.float32) / 65535).movedim(-1, 0)
    forms = [tmp_path / "x.npy", tmp_path / "x.npz", image, tensor]
    if importlib.util.find_spec("tifffile"):
        importlib.import_module("tifffile").imwrite(tmp_path / "x.tif", image)
        forms.append(tmp_path / "x.tif")
    for result in model.predict(forms):
        assert result.probabilities == pytest.approx(wanted.sort(descending=True).values.tolist(), abs=1e-5)
        assert result.image.mode == "RGB" and result.plot().size == (32, 32)
    four_bands = Image.fromarray((image // 256).astype(np.uint8), "CMYK")
    assert model.predict(four_bands)[0].probabilities == pytest.approx(wanted.sort(descending=True).values, abs=0.02)
    for other in (image[..., :3], picture()):
        with pytest.raises(UserError, match=r"image 1 cannot be decoded .*model.in_chans=4"):
            model.predict(other)


def test_a_folder_of_arrays(four_channels, tmp_path):
    model, image, _ = four_channels
    (tmp_path / "arrays").mkdir()
    for name in "ba":
        np.save(tmp_path / "arrays" / f"{name}.npy", image)
    sources = find_images([tmp_path / "arrays"])
    assert [Path(source).name for source in sources] == ["a.npy", "b.npy"] and len(model.predict(sources)) == 2
    picture().save(tmp_path / "arrays" / "c.png")
    assert [Path(source).name for source in find_images([tmp_path / "arrays"])] == ["c.png"]


def test_rotated_and_transparent_images_are_read_as_they_are_seen(classifier, tmp_path):
    upright = picture(size=(60, 40))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    clear = np.zeros((40, 60, 4), np.uint8)
    results = classifier.predict([tmp_path / "turned.png", opened(tmp_path / "turned.png"), clear])
    for result in results[:2]:
        assert np.array_equal(np.asarray(result.image), np.asarray(upright))
    assert np.unique(np.asarray(results[2].image)).tolist() == [255]


def test_results_do_not_depend_on_the_batch(classifier):
    images = [picture(seed, (30 + seed, 40)) for seed in range(5)]
    together, alone = classifier.predict(images), classifier.predict(images, batch_size=1)
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5) and one.source == other.source


@pytest.mark.parametrize(
    "image, words",
    [
        ("nowhere.png", "image nowhere.png: no such file"),
        (np.full((4, 4, 3), 2.0), "image 1 .*floats are not all in 0..1"),
        (np.zeros((4, 4, 2), np.uint8), r"image 1 .*shape is \[4, 4, 2\]"),
        (np.zeros((4, 4, 3), np.int32), "image 1 .*type int32"),
        (torch.full((3, 4, 4), float("nan")), "image 1 .*0..1"),
    ],
)
def test_images_that_cannot_be_read_are_named(classifier, image, words):
    with pytest.raises(UserError, match=words):
        classifier.predict(image)
    (skipped,) = classifier.stream([image])
    assert isinstance(skipped, Unreadable) and "\n" not in skipped.reason


def test_other_types_and_options_are_refused(classifier):
    with pytest.raises(TypeError, match="images of type dict"):
        classifier.predict({})
    with pytest.raises(TypeError, match="min_score"):
        classifier.predict(picture(), min_score=0.5)
    with pytest.raises(UserError, match="topk=0"):
        classifier.predict(picture(), topk=0)
    with pytest.raises(UserError, match="batch_size=0"):
        classifier.predict(picture(), batch_size=0)


def test_plot_and_save(classifier, segmenter, detector, tmp_path):
    for name, predictor, options in (
        ("classify", classifier, {}),
        ("segment", segmenter, {}),
        ("detect", detector, {"min_score": 0.0}),
    ):
        (result,) = predictor.predict(picture(size=(120, 90)), **options)
        drawn = result.plot()
        assert drawn.width >= 120 and drawn.height >= 90
        assert not np.array_equal(np.asarray(drawn)[:90, :120], np.asarray(result.image))
        assert opened(result.save(tmp_path / "new" / f"{name}.png")).size == drawn.size
        assert json.loads(result.save(tmp_path / f"{name}.json").read_text()) == json.loads(
            json.dumps(result.to_dict())
        )
        with pytest.raises(UserError, match="cannot be written"):
            result.save(tmp_path / "picture.unknown")


def test_pictures_have_a_legend_of_the_classes_in_them():
    mask = np.zeros((60, 200), np.uint8)
    mask[:20], mask[20:30] = 2, 1
    palette = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]
    names = ["road", "a class with a long name, longer than the picture", "sky", "nowhere"]
    image = picture(size=(200, 60))
    segmented = Segmentation(source="x", image=image, mask=mask, classes=names, palette=palette)
    boxes, scores = np.array([[2, 1, 30, 30], [40, 9, 90, 50]], np.float32), np.array([0.5, 0.4], np.float32)
    found = {"labels": ["cat", "owl"], "indices": [0, 3], "boxes": boxes, "scores": scores}
    for result, wanted in (
        (segmented, [tuple(color) for color in palette[:3]]),
        (Detection(source="x", image=image, **found), [(0xE6, 0x9F, 0), (0xF0, 0xE4, 0x42)]),
    ):
        bare, drawn = result.plot(legend=False), result.plot()
        assert bare.size == (200, 60) and np.array_equal(np.asarray(drawn)[:60, :200], np.asarray(bare))
        strip = np.asarray(drawn)[60:].reshape(-1, 3)
        colors, counts = np.unique(strip, axis=0, return_counts=True)
        shown = {tuple(color) for color in colors[counts >= 100].tolist()}
        assert shown >= {(255, 255, 255), *wanted} and (9, 9, 9) not in shown
    assert segmented.plot().width > 200, "the longest name is not cut off"


def test_masks_are_those_of_the_evaluation(segmenter):
    """The run of this artefact evaluates windows of 32 pixels."""
    from tessel.train.tasks.segment.metrics import predict
    from tessel.train.tasks.segment.options import SegmentTest

    image = picture(size=(80, 50))
    (found,) = segmenter.predict(image)
    assert isinstance(found, Segmentation) and found.mask.shape == (50, 80) and found.mask.dtype == np.uint8
    model = tessel.train.segment.load(RUNS / "segment" / "export")
    pixels = torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0)[None] / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        wanted = predict(model, [(pixels - mean) / std], (50, 80), SegmentTest(mode="slide", crop=32), 32)
    assert np.array_equal(found.mask, wanted[0].numpy())
    assert sum(found.shares().values()) == pytest.approx(1)
    assert list(found.shares().values()) == sorted(found.shares().values(), reverse=True)
    mask = found.mask_image()
    assert mask.mode == "P" and np.array_equal(np.asarray(mask), found.mask)
    colors = np.asarray(mask.convert("RGB"))
    assert np.array_equal(colors[0, 0], found.palette[found.mask[0, 0]])


def test_images_of_several_sizes_keep_their_order(segmenter):
    sizes = [(40, 32), (40, 32), (33, 47), (40, 32)]
    results = segmenter.predict([picture(seed, size) for seed, size in enumerate(sizes)])
    assert [result.mask.shape[::-1] for result in results] == sizes
    for seed, result in enumerate(results):
        assert np.array_equal(result.mask, segmenter.predict(picture(seed, sizes[seed]))[0].mask)


def test_an_export_without_its_run_predicts_the_same(segmenter, tmp_path):
    shutil.copytree(RUNS / "segment" / "export", tmp_path / "moved")
    image = picture(size=(32, 32))
    moved = tessel.load(tmp_path / "moved", device="cpu").predict(image)[0]
    assert np.array_equal(moved.mask, segmenter.predict(image)[0].mask)


def test_boxes_are_those_of_the_model(detector):
    image = picture(size=(64, 48))
    (found,) = detector.predict(image, min_score=0.0)
    model = tessel.train.detect.load(RUNS / "detect" / "export")
    with torch.no_grad():
        (wanted,) = model([torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0) / 255])
    assert isinstance(found, Detection) and len(found) == len(wanted["scores"]) > 0
    order = wanted["scores"].argsort(descending=True, stable=True)
    np.testing.assert_allclose(found.boxes, wanted["boxes"][order], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.scores, wanted["scores"][order], rtol=1e-4)
    assert found.labels == [detector.classes[index] for index in wanted["labels"][order].tolist()]
    best = float(found.scores[0])
    assert len(detector.predict(image, min_score=best)[0]) >= 1
    nothing = detector.predict(image, min_score=1.0)[0]
    assert len(nothing) == 0 and nothing.summary() == "nothing found" and nothing.plot().size == (64, 48)


@given(arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
def test_run_lengths_give_the_mask_back(mask):
    counts = run_lengths(mask)
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    assert np.array_equal(values.reshape(mask.shape[::-1]).T, mask)


def test_masks_of_objects_are_written_as_run_lengths():
    mask = np.zeros((1, 4, 5), bool)
    mask[0, 1:3, 2] = True
    result = Detection(
        source="x",
        image=picture(size=(5, 4)),
        boxes=np.array([[2, 1, 3, 3]], np.float32),
        labels=["cat"],
        indices=[7],
        scores=np.array([0.5], np.float32),
        masks=mask,
    )
    (row,) = result.to_dict()["objects"]
    assert row["mask"] == {"size": [4, 5], "counts": [9, 2, 9]} and row["label"] == "cat"
    assert result.plot(legend=False).size == (5, 4)


def test_names_of_imagenet_come_from_timm():
    model = tessel.load("biformer_atto", pretrained=False, device="cpu", size=64)
    assert len(model.classes) == 1000 and model.classes[281] == "tabby, tabby cat"
    assert model.predict(picture())[0].indices != []
    assert "classify, 1000 classes" in repr(model)


def test_weights_of_a_file(tmp_path):
    torch.manual_seed(1)
    network = timm.create_model("biformer_atto").eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = tessel.load("biformer_atto", weights=tmp_path / "weights.pth", device="cpu", size=64)
    loaded = model.model.network.module.state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in network.state_dict().items())


def test_a_folder_named_like_a_model_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("biformer_atto").mkdir()
    assert tessel.load("biformer_atto", pretrained=False, device="cpu").task == "classify"


@pytest.mark.parametrize(
    "source, options, words",
    [
        ("cswin_tny", {}, "did you mean cswin_tiny"),
        ("runs/none", {}, "no such run, export or file"),
        ("biformer_atto", {}, "No pretrained weights exist.*--weights FILE"),
        ("biformer_atto", {"weights": "none.pth"}, "weights=none.pth: no such file"),
        (RUNS / "classify", {"weights": "x.pth"}, "has its own weights"),
        (RUNS, {}, "neither a run nor an export"),
        (RUNS / "digits_unfinished", {}, "is not finished"),
        (RUNS / "detect", {"size": 64}, "size=64 has no effect"),
        (RUNS / "classify", {"device": "nonsense"}, "device 'nonsense' cannot be used"),
    ],
)
def test_what_cannot_be_loaded_is_an_error(source, options, words):
    with pytest.raises(UserError, match=words):
        tessel.load(source, **options)


def test_find_images(folder, monkeypatch):
    names = [Path(path).name for path in find_images([folder])]
    assert names == ["a.png", "b.jpg", "b2.jpg", "c.webp"]
    assert [Path(path).name for path in find_images([folder / "*.jpg"])] == ["b.jpg", "b2.jpg"]
    assert [Path(path).name for path in find_images([folder / "**" / "*.webp"])] == ["c.webp"]
    assert find_images(["https://example.org/x.png", "none.png"]) == ["https://example.org/x.png", "none.png"]
    (folder / "odd[1].png").touch()
    assert find_images([folder / "odd[1].png"]) == [str(folder / "odd[1].png")]
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no images in this folder"):
        find_images([folder / "empty"])
    with pytest.raises(UserError, match="no file matches"):
        find_images([folder / "*.bmp"])


def test_an_image_from_a_url(classifier, folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        good, missing = classifier.stream([f"{address}/a.png", f"{address}/none.png"])
        server.shutdown()
    assert good.probabilities == pytest.approx(classifier.predict(folder / "a.png")[0].probabilities)
    assert isinstance(missing, Unreadable) and "404" in missing.reason and missing.source == f"{address}/none.png"


def test_command_skips_and_names_unreadable_files(folder, capsys, tmp_path):
    argv = ["predict", str(RUNS / "classify"), str(folder), "--device", "cpu", "--topk", "2"]
    assert main(argv) == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3 and printed.out.count("%") == 6
    assert "skipped: image " in printed.err and "b2.jpg" in printed.err
    assert "error: 1 of 4 images could not be read" in printed.err
    (folder / "b2.jpg").unlink()
    assert main([*argv, "--json", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [Path(row["source"]).name for row in rows] == ["a.png", "b.jpg", "c.webp"] and not printed.err
    assert all(len(row["classes"]) == 2 for row in rows)
    written = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row.pop("picture") for row in written] == ["a.png", "b.png", "c.png"] and written == rows
    assert opened(tmp_path / "out" / "c.png").size == (48, 40)


def test_command_writes_masks_and_tells_equal_names_apart(folder, tmp_path, capsys):
    shutil.copy(folder / "a.png", folder / "below" / "a.png")
    images = [str(folder / "a.png"), str(folder / "below")]
    assert main(["predict", str(RUNS / "segment"), *images, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "background" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"a.png", "a_mask.png", "a-2.png", "a-2_mask.png", "c.png", "c_mask.png"}
    assert names == pictures | {"predictions.jsonl"}
    assert opened(tmp_path / "out" / "a_mask.png").mode == "P"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["classify", "--min-score", "0.5"], "--min-score has no effect with task classify"),
        (["detect", "--topk", "2"], "--topk has no effect with task detect"),
    ],
)
def test_command_refuses_options_of_another_task(argv, words, folder, capsys):
    run, *options = argv
    assert main(["predict", str(RUNS / run), str(folder / "a.png"), *options, "--device", "cpu"]) == 1
    assert words in capsys.readouterr().err
