"""Detection metrics: equal to COCO's own on any number of processes, and the kept predictions."""

import json
import warnings
from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import cast

import detection
import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coder
from PIL import Image

from tessel.train.distributed.world import World
from tessel.train.evaluation import save_pictures
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.registry import open_dataset
from tessel.train.tasks.detect.augment import EvalTransform
from tessel.train.tasks.detect.metrics import DetectionMetrics
from tessel.train.tasks.detect.overlay import draw_objects, write_names
from tessel.train.tasks.detect.task import DetectTask, collate_lists

NAMES = [
    "ap",
    "ap50",
    "ap75",
    "ap_s",
    "ap_m",
    "ap_l",
    "ar1",
    "ar10",
    "ar",
    "ar_s",
    "ar_m",
    "ar_l",
]  # the order of COCO's summary
SIDE = 150


def draw(root, rng):
    """COCO's layout with objects of every size: of 12 images one is empty and two hold crowds."""
    images, found = [], []
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (SIDE, SIDE)).save(root / f"val2017/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE})
        for _ in range(number % 5):
            side = float(rng.choice([12.0, 50.0, 110.0]))
            box = [*rng.uniform(0, SIDE - side, 2).round(1).tolist(), side, round(side * rng.uniform(0.5, 1), 1)]
            found.append(detection.annotation(len(found) + 1, number, int(rng.choice([1, 18, 44])), box))
        if number in (4, 7):
            mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
            mask[20:90, 30:120] = 1
            coded = coder.encode(mask)
            coded = {"size": coded["size"], "counts": coded["counts"].decode()}
            crowd = {"iscrowd": 1, "segmentation": coded, "area": float(mask.sum())}
            found.append(detection.annotation(len(found) + 1, number, 1, [30, 20, 90, 70], **crowd))
    content = {"images": images, "annotations": found, "categories": detection.CATEGORIES}
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return root


def guesses(target, rng):
    """The objects with noise; some are doubled, missed or of another class, and some boxes are random."""
    boxes = [box for box in target["boxes"].numpy() if rng.random() < 0.85 for _ in range(rng.integers(1, 3))]
    boxes = [box + rng.normal(0, 4, 4) for box in boxes] + [rng.uniform(0, 70, 4) + [0, 0, 70, 70] for _ in range(3)]
    boxes = np.array(boxes, np.float32).clip(0, SIDE)
    masks = np.zeros((len(boxes), 1, SIDE, SIDE), np.float32)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().astype(int), strict=True):
        mask[0, y1:y2, x1:x2] = 0.9
    labels = rng.integers(0, 3, len(boxes)) if rng.random() < 0.3 else np.resize(target["labels"].numpy(), len(boxes))
    found = {
        "boxes": boxes,
        "labels": labels,
        "scores": rng.permutation(len(boxes)) / len(boxes) * 0.7 + rng.random() / 51 + 0.2,
    }
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in {**found, "masks": masks}.items()}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The data set, a task on it, its samples and made-up predictions for them."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("coco")
    recipe = load_recipe(detection.write_recipe(root / "r.yaml", draw(root, rng)), ["task.detect.detector=mask_rcnn"])
    task = DetectTask(recipe, World())
    samples = [(*EvalTransform()(*task.val[index]), index) for index in range(len(task.val))]
    return root, task, samples, [guesses(sample[1], rng) for sample in samples]


def summed(task, samples, found):
    metrics = DetectionMetrics(task)
    for at in range(0, len(samples), 5):
        metrics.update(detection.Oracle(found[at : at + 5]), collate_lists(samples[at : at + 5]))
    return metrics


def reference(root, found, kind):
    """The summary and the AP by category in percent, from COCOeval of pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was made for numpy 1
        truth, rows = COCO(root / "annotations/instances_val2017.json"), []
        for number, one in enumerate(found):
            for box, label, score, mask in zip(*(one[k] for k in ("boxes", "labels", "scores", "masks")), strict=True):
                x1, y1, x2, y2 = map(float, box)
                row = {"image_id": number, "category_id": [1, 18, 44][int(label)], "score": float(score)}
                if kind == "segm":
                    rows.append(row | {"segmentation": coder.encode(np.asfortranarray(mask[0].numpy() > 0.5))})
                else:
                    rows.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
        evaluation = COCOeval(truth, truth.loadRes(rows), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    names = [truth.cats[key]["name"] for key in evaluation.params.catIds]
    return 100 * evaluation.stats, {name: 100 * precision[:, :, k].mean() for k, name in enumerate(names)}


@pytest.mark.parametrize(("kind", "ours"), [("bbox", "box"), ("segm", "mask")])
def test_metrics_equal_those_of_pycocotools(evaluated, kind, ours):
    root, task, samples, found = evaluated
    metrics = summed(task, samples, found)
    values, (stats, classes) = metrics.compute(), reference(root, found, kind)
    for name, expected in zip(NAMES, stats, strict=True):
        assert values[f"{ours}_{name}"] == pytest.approx(expected, abs=1e-4), name
    assert 5 < values[f"{ours}_ap"] < values[f"{ours}_ap50"] < 90 and values["count"] == 12
    assert metrics.details()["classes"][f"{ours}_ap"] == pytest.approx(classes, abs=1e-4)
    assert list(classes) == task.classes


def test_metrics_do_not_depend_on_the_number_of_processes(evaluated):
    """Images are distributed unevenly and in another order."""
    _, task, samples, found = evaluated
    alone = summed(task, samples, found)
    expected, parts = alone.compute(), [[0, 3, 6, 9], [1, 2], [11, 10, 8, 7, 5, 4]]
    states = []
    for part in parts:
        metrics = summed(task, [samples[i] for i in part], [found[i] for i in part])
        states.append(metrics.images)
    world = SimpleNamespace(main=True, gather=lambda value: states, broadcast_object=lambda value: value)
    spread = summed(SimpleNamespace(**vars(task) | {"world": world, "kept": 16, "to_device": task.to_device}), [], [])
    assert spread.compute() == expected and spread.details() == alone.details()
    for name, rows in alone.predictions().items():
        assert np.array_equal(rows, spread.predictions()[name]), name


def test_predictions_are_those_of_each_image(evaluated, tmp_path):
    _, task, samples, found = evaluated
    rows = summed(task, samples, found).predictions()
    assert rows["image"].tolist() == list(range(12)) and rows["class_names"].tolist() == task.classes
    for index, (_, target, _) in enumerate(samples):
        here, there = rows["prediction_image"] == index, rows["target_image"] == index
        order = found[index]["scores"].argsort(descending=True)
        assert rows["prediction_box"][here] == pytest.approx(found[index]["boxes"][order].numpy(), abs=1e-4)
        assert (rows["prediction_label"][here] == found[index]["labels"][order].numpy()).all()
        assert rows["target_box"][there] == pytest.approx(target["boxes"].numpy(), abs=1e-4)
        assert (rows["target_crowd"][there] == target["iscrowd"].numpy()).all()
    first = {"size": rows["prediction_mask_size"][0].tolist(), "counts": bytes(rows["prediction_mask"][0])}
    best = int(found[0]["scores"].argmax())
    assert (coder.decode(first) == (found[0]["masks"][best, 0] > 0.5).numpy()).all()

    np.savez(tmp_path / "p.npz", **rows)  # type: ignore[arg-type]
    save_pictures(task, np.load(tmp_path / "p.npz"), tmp_path / "overlays", 5)
    drawn = sorted((tmp_path / "overlays").iterdir())
    assert [path.name for path in drawn] == [f"{index:06d}.png" for index in range(5)]
    left, right = (np.asarray(Image.open(drawn[4]))[:, part] for part in (slice(0, 300), slice(304, 604)))
    assert left.any() and right.any() and (left != right).any()
    assert not np.asarray(Image.open(drawn[0]))[:, :300].any()  # the first image is black and has no object


def test_no_predictions_and_no_objects(evaluated):
    _, task, samples, _ = evaluated
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    none["masks"] = torch.zeros(0, 1, SIDE, SIDE)
    values = summed(task, samples, [none] * 12).compute()
    assert values["box_ap"] == values["mask_ap"] == values["box_ar"] == 0
    empty = summed(task, samples[:1], [none]).compute()
    assert empty == {"box_ap": 0.0, "mask_ap": 0.0, "count": 1}


def test_half_precision_and_many_detections(evaluated):
    """The 100 highest scores count, in float32."""
    _, task, samples, found = evaluated
    many = {key: tensor.repeat(60, *[1] * (tensor.ndim - 1)) for key, tensor in found[4].items()}
    many["scores"] = many["scores"] * torch.linspace(0.2, 1, len(many["scores"]))
    metrics = summed(task, samples[4:5], [{k: t.bfloat16() if t.is_floating_point() else t for k, t in many.items()}])
    assert 0 < metrics.compute()["box_ap"] <= 100
    assert len(metrics.predictions()["prediction_box"]) == 100
    assert metrics.predictions()["prediction_box"].dtype == np.float32


def test_the_data_set_of_the_task(evaluated):
    assert len(cast(DetectTask, evaluated[1]).train) == 9 and len(open_dataset(evaluated[1].recipe, "val")) == 12


def test_names_hide_no_object():
    """A name is beside its box where it covers no other, inside if the box is large, else it is left out."""
    canvas = torch.full((3, 320, 320), 9, dtype=torch.uint8)
    boxes = [[10.0, 8, 300, 300], [50, 60, 62, 70], [64, 60, 76, 70], [40, 100, 50, 300]]
    drawn = write_names(
        canvas, boxes, ["large", "small", "other", "narrow"], ["#00ff00", "#ff0000", "#ff0000", "#ff00ff"]
    )
    changed = (drawn != canvas).any(0)
    assert changed[8:24, 12:40].any(), "the name of the large box is in its corner"
    for left, top, right, bottom in boxes[1:]:
        assert not changed[int(top) : int(bottom), int(left) : int(right)].any()
    red = (drawn == torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]).all(0)
    assert red.any(), "the names of small boxes are beside them"
    crowded = [[x, y, x + 8.0, y + 8] for x in range(0, 320, 10) for y in range(0, 320, 10)]
    assert torch.equal(write_names(canvas, crowded, ["name"] * 1024, ["red"] * 1024), canvas)
    edge = write_names(canvas, [[0.0, 0, 320, 320], [318, 318, 320, 320]], ["all", "corner"], ["red", "blue"])
    assert (edge != canvas).any()


def test_overlapping_predictions_are_suppressed_over_all_classes():
    image = torch.zeros(3, 96, 96, dtype=torch.uint8)
    found = {
        "boxes": torch.tensor([[4.0, 4, 60, 60], [5, 4, 60, 61], [40, 40, 90, 90], [0, 60, 30, 90], [9, 9, 9, 30]]),
        "labels": torch.tensor([1, 0, 2, 0, 0]),
        "scores": torch.tensor([0.4, 0.9, 0.31, 0.29, 0.8]),
    }
    picture = draw_objects(image, found, ["a", "b", "c"])
    kept = {
        key: tensor[[2, 1]] for key, tensor in found.items()
    }  # the others overlap, have a low score, or have no area
    assert torch.equal(picture, draw_objects(image, kept, ["a", "b", "c"])) and picture.any()
    elsewhere = kept | {"boxes": found["boxes"][[2, 0]]}
    assert not torch.equal(picture, draw_objects(image, elsewhere, ["a", "b", "c"]))
    nothing = {key: tensor[3:] for key, tensor in found.items()}
    assert not draw_objects(image, nothing, ["a", "b", "c"]).any()
