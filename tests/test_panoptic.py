"""Panoptic segmentation: the quality by the official rule on worked examples, segments, data, runs."""

import json

import numpy as np
import pytest
import recipe_runner
import torch
import trainer
import yaml
from PIL import Image

import tessel
from tessel.train import evaluate
from tessel.train.check import main as check_main
from tessel.train.data.panoptic import panoptic_target
from tessel.train.data.sources.coco_panoptic import COCOPanoptic, open_panoptic
from tessel.train.data.sources.digit_scenes import Scenes
from tessel.train.errors import UserError
from tessel.train.heads.mask_classifier import MaskOutputs
from tessel.train.heads.mask_inference import panoptic
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.registry import open_dataset
from tessel.train.report.__main__ import main as report
from tessel.train.tasks.panoptic import load
from tessel.train.tasks.panoptic.quality import panoptic_counts, panoptic_quality


def row(*runs):
    """One row of pixels: (segment, length) pairs."""
    return np.concatenate([np.full(length, number) for number, length in runs])[None]


def counts(truth, labels, found, found_labels, *, crowd=None, classes=2):
    crowd = np.zeros(len(labels), np.int64) if crowd is None else np.array(crowd)
    return panoptic_counts(truth, np.array(labels), crowd, found, np.array(found_labels), classes).tolist()


@pytest.mark.parametrize(
    "truth, labels, crowd, found, found_labels, expected",
    [
        pytest.param(row((1, 10)), [0], [0], row((1, 10)), [0], [[1, 1, 0, 0], [0] * 4], id="equal"),
        # 8 of 10 pixels, 2 without a prediction: the union has 10
        pytest.param(row((1, 10)), [0], [0], row((1, 8), (0, 2)), [0], [[0.8, 1, 0, 0], [0] * 4], id="part"),
        # an IoU of exactly a half is no match
        pytest.param(row((1, 10)), [0], [0], row((1, 5), (0, 5)), [0], [[0, 0, 1, 1], [0] * 4], id="tie"),
        pytest.param(row((1, 11)), [0], [0], row((1, 6), (0, 5)), [0], [[6 / 11, 1, 0, 0], [0] * 4], id="above"),
        pytest.param(row((1, 10)), [0], [0], row((1, 10)), [1], [[0, 0, 0, 1], [0, 0, 1, 0]], id="other class"),
        pytest.param(row((1, 10)), [0], [0], row((0, 10)), [], [[0, 0, 0, 1], [0] * 4], id="missed"),
        # 4 of the 10 found pixels are unlabelled: they are taken off the union, 6 / (8 + 10 - 6 - 4)
        pytest.param(
            row((1, 8), (0, 4)), [0], [0], row((0, 2), (1, 10)), [0], [[6 / 8, 1, 0, 0], [0] * 4], id="unlabelled"
        ),
        # more than half on unlabelled pixels is no false positive, exactly half is one
        pytest.param(row((0, 6), (1, 10)), [0], [0], row((1, 6), (0, 10)), [1], [[0, 0, 0, 1], [0] * 4], id="void"),
        pytest.param(
            row((0, 5), (1, 10)), [0], [0], row((1, 10), (0, 5)), [1], [[0, 0, 0, 1], [0, 0, 1, 0]], id="half void"
        ),
        # a crowd is not missed, and takes found segments of its class, but of no other class
        pytest.param(row((1, 10)), [0], [1], row((1, 10)), [0], [[0] * 4, [0] * 4], id="crowd"),
        pytest.param(row((1, 10)), [0], [1], row((1, 10)), [1], [[0] * 4, [0, 0, 1, 0]], id="crowd of another class"),
        # unlabelled pixels and the crowd count together: 3 + 3 of 10
        pytest.param(
            row((0, 3), (1, 3), (2, 14)), [0, 1], [1, 0], row((1, 10), (0, 10)), [0], [[0] * 4, [0, 0, 0, 1]],
            id="crowd and unlabelled",
        ),
        pytest.param(
            row((1, 10), (2, 10)), [0, 0], [0, 0], row((1, 10), (2, 4), (3, 6)), [0, 0, 0],
            [[1.6, 2, 1, 0], [0] * 4], id="two and a rest",
        ),
        pytest.param(row((0, 10)), [], [], row((0, 10)), [], [[0] * 4, [0] * 4], id="nothing"),
    ],
)  # fmt: skip
def test_counts_of_worked_examples(truth, labels, crowd, found, found_labels, expected):
    labels, crowd = np.array(labels, np.int64), np.array(crowd, np.int64)
    ours = panoptic_counts(truth, labels, crowd, found, np.array(found_labels, np.int64), 2)
    np.testing.assert_allclose(ours, expected)


def test_a_listed_segment_without_pixels_is_not_missed():
    assert counts(row((1, 10)), [0, 1], row((1, 10)), [0]) == [[1, 1, 0, 0], [0] * 4]


def test_quality_is_the_product_of_both_parts():
    quality = panoptic_quality(np.array([[1.6, 2, 1, 1], [0, 0, 2, 0], [0, 0, 0, 0]]))
    np.testing.assert_allclose(quality[0], [0.8 * 2 / 3, 0.8, 2 / 3])
    np.testing.assert_allclose(quality[1], [0, 0, 0])
    assert np.isnan(quality[2]).all()


def outputs():
    """Queries: a digit on the left, the same class on the right, two halves of stuff, nothing, and a covered digit."""
    masks = torch.full((1, 6, 8, 8), -9.0)
    masks[0, 0, :4, :4], masks[0, 1, :4, 4:] = 9.0, 9.0
    masks[0, 2, 4:, :4], masks[0, 3, 4:, 4:] = 9.0, 9.0
    masks[0, 4] = 9.0
    masks[0, 5, :4, :5] = 4.0  # 4 of its 20 pixels are left
    classes = torch.full((1, 6, 4), -9.0)
    for query, label in enumerate((1, 1, 0, 0, 3, 2)):
        classes[0, query, label] = 9.0
    return MaskOutputs([classes], [masks])


def test_segments_do_not_overlap_and_stuff_is_merged():
    rules = {"canvas": (8, 8), "size": (8, 8), "wanted": (8, 8), "things": [False, True, True]}
    found = panoptic(outputs(), 0, **rules, min_score=0.8, min_overlap=0.8)
    assert sorted(found["labels"].tolist()) == [0, 1, 1] and (found["scores"] > 0.99).all()
    assert (found["masks"].sum(0) == 1).all()
    stuff = found["labels"].tolist().index(0)
    assert found["boxes"][stuff].tolist() == [0, 4, 8, 8] and found["masks"][stuff].sum() == 32
    nothing = MaskOutputs([torch.zeros(1, 6, 4)], outputs().masks)
    empty = panoptic(nothing, 0, **rules, min_score=0.8, min_overlap=0.8)
    assert {name: len(value) for name, value in empty.items()} == dict.fromkeys(found, 0)
    # without padding and at another size
    rules |= {"size": (8, 4), "wanted": (16, 8)}
    half = panoptic(outputs(), 0, **rules, min_score=0.8, min_overlap=0.8)
    assert sorted(half["labels"].tolist()) == [0, 1] and half["masks"].shape == (2, 1, 16, 8)


def test_boxes_of_masks():
    masks = np.zeros((2, 5, 6), bool)
    masks[0, 1:3, 2:5], masks[1, 4, 0] = True, True
    target = panoptic_target(masks, np.array([3, 1]), np.array([0, 1]))
    assert target["boxes"].tolist() == [[2, 1, 5, 3], [0, 4, 1, 5]] and target["area"].tolist() == [6, 1]


def test_digit_scenes_cover_every_pixel_once():
    recipe = load_recipe("demo/digit_panoptic", ["data.size=48"])
    assert isinstance(recipe.data, Scenes)
    dataset = open_dataset(recipe, "val")
    _, target = dataset[3]
    assert (target["masks"].sum(0) == 1).all() and target["labels"][0] == 0 and (target["labels"][1:] > 0).all()
    assert dataset.classes[0] == "background" and dataset.things == [False] + [True] * 10


def write_coco(root, *, images=4):
    """COCO's layout: sky above, two things below, a row without a label; ids above 255, one listed without a pixel."""
    for split in ("train", "val"):
        folder, pngs, found = root / f"{split}2017", root / f"annotations/panoptic_{split}2017", []
        folder.mkdir(parents=True)
        pngs.mkdir(parents=True)
        for number in range(images):
            ids = np.zeros((40, 48), np.int64)
            ids[:20], ids[20:38, :20], ids[20:38, 20:] = 70_000, 300, 7
            colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
            Image.fromarray(colors).save(pngs / f"{number:012d}.png")
            pixels = (
                np.random.default_rng((split == "val", number)).integers(0, 99, (40, 48, 3))
                + (ids > 300)[..., None] * 150
            )
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:012d}.jpg")
            parts = [(70_000, 187, 0), (300, 1, 0), (7, 18, int(number == 1)), (9, 18, 0)]
            info = [{"id": one, "category_id": kind, "iscrowd": crowd} for one, kind, crowd in parts]
            found.append({"image_id": number, "file_name": f"{number:012d}.png", "segments_info": info})
        categories = [
            {"id": 187, "name": "sky", "isthing": 0},
            {"id": 1, "name": "person", "isthing": 1},
            {"id": 18, "name": "dog", "isthing": 1},
        ]
        named = [
            {"id": number, "file_name": f"{number:012d}.jpg", "height": 40, "width": 48} for number in range(images)
        ]
        content = {"images": named, "annotations": found, "categories": categories}
        (root / f"annotations/panoptic_{split}2017.json").write_text(json.dumps(content))
    return root


def test_coco_is_read_as_published(tmp_path):
    dataset = open_panoptic(COCOPanoptic(root=str(write_coco(tmp_path))), "val")
    assert len(dataset) == 4 and dataset.classes == ["person", "dog", "sky"] and dataset.things == [True, True, False]
    image, target = dataset[1]
    assert image.size == (48, 40) and target["labels"].tolist() == [2, 0, 1] and target["iscrowd"].tolist() == [0, 0, 1]
    assert target["boxes"].tolist() == [[0, 0, 48, 20], [0, 20, 20, 38], [20, 20, 48, 38]]
    assert target["masks"].sum(0)[38:].sum() == 0 and target["masks"][:, :38].sum() == 38 * 48
    assert dataset.problems(0) == []
    colors = np.asarray(Image.open(tmp_path / "annotations/panoptic_val2017/000000000000.png")).copy()
    colors[0, 0] = (1, 1, 0)
    Image.fromarray(colors).save(tmp_path / "annotations/panoptic_val2017/000000000000.png")
    assert "has the segment 257, which" in dataset.problems(0)[0]


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda content: content.pop("categories"), "is not a panoptic file of COCO"),
        (lambda content: content["categories"].pop(), "has a segment of category 18, which the file does not list"),
        (lambda content: content["images"].pop(), "has the image_id 3, which no image has"),
    ],
)
def test_faults_of_the_annotation_file_are_named(tmp_path, edit, message):
    root = write_coco(tmp_path)
    file = root / "annotations/panoptic_val2017.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        open_panoptic(COCOPanoptic(root=str(root)), "val")
    with pytest.raises(UserError, match=r"cannot be read .*data.train=\[FILE.json, IMAGES, PNGS\]"):
        open_panoptic(COCOPanoptic(root=str(root), val=("none.json", "a", "b")), "val")


def test_another_detector_is_refused(capsys):
    with pytest.raises(UserError, match="task.kind=panoptic needs task.detect.detector=mask2former or pem, not fcos"):
        load_recipe("demo/digit_panoptic", ["task.detect.detector=fcos", "task.detect.kwargs={}"])
    with pytest.raises(UserError, match="task.detect.channels=12: task.detect.detector=pem needs a multiple of 8"):
        load_recipe("demo/digit_panoptic", ["task.detect.detector=pem", "task.detect.channels=12"])


def write_recipe(path, root, kind="mask2former"):
    path.parent.mkdir(exist_ok=True)
    options = {"detector": kind, "channels": 64, "max_size": 120, "min_size": [40, 48]}
    kwargs = recipe_runner.NARROW_QUERIES[kind]
    recipe = {
        "run": {"name": "tiny", "out": str(path.parent / "runs"), "device": "cpu"},
        "model": {"name": "test_convnext", "drop_path_rate": 0.1},
        "task": {
            "kind": "panoptic",
            "detect": {**options, "kwargs": kwargs},
            "panoptic": {"min_score": 0.0, "min_overlap": 0.0},
        },
        "data": {"source": "coco_panoptic", "root": str(root), "size": 40, "batch": 4, "micro_batch": 2}
        | {"aug": {"hflip": 0.5}},
        "optim": {"lr": 2e-3, "clip": 1.0, "layer_decay": 0.9},
        "sched": {"steps": 3, "warmup": 1},
        "ema": {"decay": 0.9},
        "log": {"every": 1},
        "ckpt": {"every": 1},
        "eval": {"every": 3},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize(
    "kind", [pytest.param("mask2former", marks=pytest.mark.slow), pytest.param("pem", marks=pytest.mark.large)]
)
def test_resume_is_exact_and_the_run_is_evaluated_drawn_and_predicts(kind, tmp_path, capsys):
    root = write_coco(tmp_path / "coco")
    straight, recipe = (write_recipe(tmp_path / name / "tiny.yaml", root, kind) for name in ("straight", "resumed"))
    assert check_main([str(straight)]) == 0
    assert trainer.train(straight) == 0
    with trainer.before_step(2):
        assert trainer.train(recipe) == 0
    assert trainer.train(recipe) == 0
    assert "at step 2 (exact)" in capsys.readouterr().out
    one, other = (path.parent / "runs/tiny" for path in (straight, recipe))
    trainer.assert_same_checkpoint(*(run / "checkpoints/step-00000003" for run in (one, other)))
    last = [record for record in trainer.metrics(one) if record["kind"] == "eval"][-1]
    assert last["count"] == 4 and {"pq", "sq", "rq", "pq_things", "pq_stuff"} <= last.keys()
    assert evaluate.main([str(one), "--overlays", "2"]) == 0
    assert f"pq {last['pq']:.2f}" in capsys.readouterr().out
    values = json.loads((one / "evaluation/evaluation.json").read_text())
    assert set(values["classes"]) == {"pq", "sq", "rq"} and set(values["classes"]["pq"]) == {"person", "dog", "sky"}
    assert report([str(one)]) == 0 and "PQ by class" in (one / "report/index.html").read_text()
    model = load(one / "export")
    assert model.things == [True, True, False] and model.classes == ["person", "dog", "sky"]
    (result,) = tessel.load(one).predict(root / "val2017/000000000000.jpg", min_score=0.0)
    assert len(result.labels) and result.masks.sum(0).max() == 1 and result.save(tmp_path / "drawn.png").is_file()


@pytest.mark.slow
def test_a_run_in_bfloat16(tmp_path):
    recipe = write_recipe(tmp_path / "run" / "tiny.yaml", write_coco(tmp_path / "coco"))
    assert trainer.train(recipe, "parallel.precision=bf16", "sched.steps=2", "eval.every=2") == 0
    assert all(tensor.isfinite().all() for tensor in load(recipe.parent / "runs/tiny/export").state_dict().values())


@pytest.mark.large
def test_two_processes_learn_the_same(tmp_path):
    recipe = write_recipe(tmp_path / "run" / "tiny.yaml", write_coco(tmp_path / "coco"))
    shared = ["ema.decay=null", "model.drop_path_rate=0"]
    assert trainer.train(recipe, *shared, "run.name=one") == 0
    done = trainer.run_processes(
        2, *([recipe, *shared, f"parallel.strategy={way}", f"run.name={way}"] for way in ("ddp", "fsdp"))
    )
    assert trainer.exit_codes(done) == [[0, 0]] * 2, done.stdout + done.stderr
    for way in ("ddp", "fsdp"):
        runs = [trainer.stable_metrics(recipe.parent / "runs" / name) for name in ("one", way)]
        for left, right in zip(*runs, strict=True):
            for key in left.keys() & {"loss", "count"}:
                assert right[key] == pytest.approx(left[key], rel=2e-3)
