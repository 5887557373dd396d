"""Own data of every kind, from the check to the report: names and colors of the classes are those of the data."""

import json
import re

import numpy as np
import own_data
import pytest
import torch
import trainer

from tessel.train import check, detect, evaluate, segment
from tessel.train.report.__main__ import main as report

FPN = {"type": "FPNHead", "channels": 8, "norm_cfg": {"type": "GN", "num_groups": 2}}
SEGMENT = {"model": {"name": "test_convnext", "drop_path_rate": 0.0}, "task": {"kind": "segment"}}
DETECT = {"model": {"name": "litv2_atto", "drop_path_rate": 0.0}, "task": {"kind": "detect"}}
COCO = {"source": "coco", "train": ["shapes.json", "photos"], "val": None}


def write_recipe(path, data, **task):
    """A recipe of 4 steps for own data; task: the section `task.segment` or `task.detect`."""
    kind = next(iter(task))
    sections = {"segment": SEGMENT, "detect": DETECT}[kind]
    dense = {"batch_norm": "frozen"}
    return trainer.write_recipe(
        path,
        model=sections["model"],
        task={"kind": kind, "dense": dense, **task},
        data={"size": 64, "batch": 4, "micro_batch": 4, "eval_batch": 2, "aug": {"hflip": 0.5}, **data},
        optim={"layer_decay": None},
        sched={"steps": 4, "warmup": 1},
        eval={"every": 4},
    )


def walk(path, capsys, root, data, **task):
    """Check, train, evaluate and report. Returns the directory of the run."""
    recipe = write_recipe(path / "own.yaml", {"root": str(root), **data}, **task)
    assert check.main([str(recipe)]) == 0, capsys.readouterr().out
    assert trainer.train(recipe) == 0, capsys.readouterr().err
    run = path / "runs/tiny"
    assert evaluate.main([str(run), "--overlays", "2"]) == 0
    assert report([str(run)]) == 0
    assert len(list((run / "evaluation/overlays").iterdir())) == 2
    return run


def check_segmenter(run, classes, palette):
    values = json.loads((run / "evaluation/evaluation.json").read_text())
    assert list(values["classes"]["iou"]) == classes and values["count"] > 0
    config = json.loads((run / "export/config.json").read_text())
    assert (config["classes"], config["palette"]) == (classes, palette)
    model = segment.load(run / "export")
    assert (model.classes, model.palette) == (classes, palette)
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, len(classes), 64, 64)
    best_and_worst = re.search(r"best for (\w+), worst for (\w+)", (run / "report/index.html").read_text())
    assert best_and_worst and set(best_and_worst.groups()) <= set(classes)


def test_own_masks(tmp_path, capsys):
    root = own_data.write_masks(tmp_path / "shapes")
    own_data.write(root / "classes.csv", "name,color\nground,#101010\ncircle,#dc143c\nsquare,#0080ff\n")
    run = walk(
        tmp_path, capsys, root, {"source": "masks"}, segment={"decode_head": FPN, "class_weight": {"ground": 0.2}}
    )
    check_segmenter(run, ["ground", "circle", "square"], [[16, 16, 16], [220, 20, 60], [0, 128, 255]])
    # a class file that was changed afterwards is told, not read as other names of the same outputs
    own_data.write(root / "classes.csv", "name,value\nground,0\nsquare,1\ncircle,2\n")
    assert evaluate.main([str(run)]) == 1
    assert "class 1 is square, in training circle" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_classes(tmp_path, capsys):
    root = own_data.write_masks(tmp_path / "shapes")
    recipe = write_recipe(tmp_path / "own.yaml", {"root": str(root), "source": "masks"}, segment={"decode_head": FPN})
    with trainer.before_step(2):
        assert trainer.train(recipe) == 0
    own_data.write(root / "classes.txt", "background\nsquare\ncircle\n")
    assert trainer.train(recipe) == 1
    assert "class 1 is square, in training circle" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "data"), [(own_data.write_coco, COCO), (own_data.write_yolo, {"source": "yolo"})], ids=["coco", "yolo"]
)
def test_masks_drawn_from_objects(tmp_path, capsys, draw, data):
    run = walk(tmp_path, capsys, draw(tmp_path / "shapes"), data, segment={"decode_head": FPN})
    check_segmenter(run, ["background", "circle", "square"], [[0, 0, 0], [128, 0, 0], [0, 128, 0]])


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn"])
@pytest.mark.parametrize(
    ("draw", "data"),
    [
        (own_data.write_coco, COCO),
        (own_data.write_yolo, {"source": "yolo"}),
        (own_data.write_voc, {"source": "voc"}),
    ],
    ids=["coco", "yolo", "voc"],
)
def test_own_objects(tmp_path, capsys, draw, data, detector):
    if (draw, detector) == (own_data.write_voc, "mask_rcnn"):
        pytest.skip("XML files of Pascal VOC have no masks")
    detect_options = {"detector": detector, "channels": 16, "empty": True}
    run = walk(tmp_path, capsys, draw(tmp_path / "shapes"), data, detect=detect_options)
    values = json.loads((run / "evaluation/evaluation.json").read_text())
    assert set(values["classes"]["box_ap"]) <= {"circle", "square"} and ("mask_ap" in values) == ("mask" in detector)
    assert np.load(run / "evaluation/predictions.npz")["class_names"].tolist() == ["circle", "square"]
    model = detect.load(run / "export")
    assert model.classes == ["circle", "square"]
    with torch.inference_mode():
        (found,) = model([torch.rand(3, 90, 120)])
    assert {"boxes", "labels", "scores"} <= found.keys()
