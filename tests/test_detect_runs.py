"""Detection through the trainer: exact resume, equal results on any number of processes, evaluation, export."""

import json
import subprocess
import sys

import detection
import numpy as np
import pytest
import torch
import trainer
from PIL import Image

from tessel.train import evaluate
from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.registry import task_spec
from tessel.train.report.__main__ import main as report
from tessel.train.tasks import detect
from tessel.train.trainer import build

SHORT = {"sched": {"steps": 4, "warmup": 1}, "log": {"every": 1}, "ckpt": {"every": 2}, "eval": {"every": 4}}
# without batch statistics and random sampling of proposals, the result does not depend on the number of processes
SHARED = ["model.name=litv2_atto", "task.dense.batch_norm=frozen", "ema.decay=null"]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return detection.draw_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, coco):
    """A run of 4 steps without interruption."""
    recipe = detection.write_recipe(tmp_path_factory.mktemp("straight") / "tiny.yaml", coco, **SHORT)
    assert trainer.train(recipe) == 0
    return recipe.parent / "runs" / "tiny"


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_after_a_signal_is_exact(tmp_path, coco, straight, capsys, workers):
    recipe = detection.write_recipe(tmp_path / "tiny.yaml", coco, **SHORT)
    with trainer.before_step(3):
        assert trainer.train(recipe, f"data.workers={workers}") == 0
    assert trainer.train(recipe, f"data.workers={workers}") == 0
    assert "at step 3 (exact)" in capsys.readouterr().out
    run = tmp_path / "runs/tiny"
    trainer.assert_same_checkpoint(run / "checkpoints/step-00000004", straight / "checkpoints/step-00000004")
    assert trainer.stable_metrics(run) == trainer.stable_metrics(straight)


def test_the_parts_of_the_loss_are_logged(straight):
    lines = [record for record in trainer.stable_metrics(straight) if record["kind"] == "train"]
    assert lines
    for line in lines:
        parts = [line[f"loss_{name}"] for name in ("classification", "bbox_regression", "bbox_ctrness")]
        assert line["loss"] == pytest.approx(sum(parts))


def test_run_is_evaluated_drawn_and_loaded(straight, coco, capsys):
    last = [record for record in trainer.metrics(straight) if record["kind"] == "eval"][-1]
    assert {"box_ap", "box_ap50", "box_ap75", "box_ar", "count"} <= last.keys() and last["count"] == 6
    for target in (straight, straight / "checkpoints/step-00000004"):
        assert evaluate.main([str(target), "--overlays", "2", "--data", "eval_batch=4"]) == 0
        assert f"box_ap {last['box_ap']:.2f}" in capsys.readouterr().out
        values = json.loads((straight / "evaluation/evaluation.json").read_text())
        assert values["box_ap"] == pytest.approx(last["box_ap"], abs=1e-6) and values["step"] == 4
        assert set(values["classes"]["box_ap"]) == {"person", "dog", "bottle"}
        drawn = sorted((straight / "evaluation/overlays").iterdir())
        assert [path.name for path in drawn] == ["000000.png", "000001.png"]
        with Image.open(drawn[0]) as picture:
            assert picture.width > 2 * 60
    assert np.load(straight / "evaluation/predictions.npz")["image"].tolist() == list(range(6))
    assert report([str(straight)]) == 0
    page = (straight / "report/index.html").read_text()
    assert "Predictions" in page and "AP by class" in page
    assert evaluate.main([str(straight), "--sets", f"v2={coco}"]) == 1
    assert "--sets has no effect with task.kind=detect" in capsys.readouterr().err

    model = detect.load(straight / "export")
    state = trainer.tensors(straight / "checkpoints/step-00000004")
    assert all(torch.equal(tensor, state[f"ema.{name}"]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert set(model([torch.rand(3, 40, 50)])[0]) == {"boxes", "labels", "scores"}


def test_dry_run_and_accumulation_and_precision(tmp_path, coco, capsys):
    recipe = detection.write_recipe(tmp_path / "tiny.yaml", coco, **SHORT)
    assert trainer.train(recipe, "--dry-run", "task.detect.detector=retinanet", "data.micro_batch=1") == 0
    out = capsys.readouterr().out
    for fragment in ("M parameters", "GFLOP", "6 images, 4 steps of 4 = 1 x 4 x 1", "loss"):
        assert fragment in out
    switches = ["parallel.precision=bf16", "parallel.channels_last=true", "parallel.grad_checkpointing=true"]
    keys = ["task.detect.detector=mask_rcnn", "task.detect.anchor=8", "task.detect.empty=true", "data.micro_batch=1"]
    assert trainer.train(recipe, "--dry-run", *switches, *keys) == 0
    assert not (tmp_path / "runs").exists()


def test_unreadable_data_stops_with_a_message(tmp_path, capsys):
    root = detection.draw_coco(tmp_path / "coco")
    recipe = detection.write_recipe(tmp_path / "tiny.yaml", root, **SHORT)
    (root / "train2017/000000000004.jpg").write_bytes(b"")
    assert trainer.train(recipe, "data.workers=1", "guard.max_corrupt=0") == 1
    assert "000000000004.jpg cannot be decoded" in capsys.readouterr().err
    assert trainer.train(recipe, "data.root=/nowhere", "run.name=other") == 1
    assert "instances_val2017.json cannot be read" in capsys.readouterr().err


def test_results_do_not_depend_on_the_number_of_processes(tmp_path, coco):
    """DDP and FSDP, on images of different sizes, some without objects."""
    sections = {**SHORT, "sched": {"steps": 3}, "ckpt": {"every": 3}, "eval": {"every": 3}}
    recipe = detection.write_recipe(tmp_path / "tiny.yaml", coco, **sections)
    shared = [*SHARED, "task.detect.empty=true", "data.micro_batch=1", "model.drop_path_rate=0"]
    assert trainer.train(recipe, *shared, "run.name=one") == 0
    ways = {"ddp": [], "fsdp": ["parallel.strategy=fsdp"]}
    runs = [[recipe, *shared, *way, f"run.name={name}"] for name, way in ways.items()]
    done = trainer.run_processes(2, *runs)
    assert trainer.exit_codes(done) == [[0, 0]] * 2, done.stdout + done.stderr
    for way in ways:
        one = trainer.stable_metrics(tmp_path / "runs/one")
        for left, right in zip(one, trainer.stable_metrics(tmp_path / "runs" / way), strict=True):
            assert left.pop("kind") == right.pop("kind")
            assert right == pytest.approx(left, abs=1e-3, rel=1e-4)
        left, right = (np.load(tmp_path / "runs" / run / "evaluation/predictions.npz") for run in ("one", way))
        for name in left:
            if not name.startswith("prediction"):
                assert np.array_equal(left[name], right[name]), name
        assert (tmp_path / "runs" / way / "export/model.safetensors").is_file()


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_losses_are_summed(tmp_path, coco, detector):
    recipe = load_recipe(detection.write_recipe(tmp_path / "tiny.yaml", coco), [f"task.detect.detector={detector}"])
    task, schedule, built = build(recipe, World())
    batches = task.train_batches(schedule, 0)
    try:
        parts = task.loss(built.model, batch := next(batches))
    finally:
        batches.close()
    assert len(parts) == {"faster_rcnn": 4, "retinanet": 2}[detector] and all("loss" in name for name in parts)
    assert len(batch[0]) == 2 and all(64 not in image.shape or image.shape[0] == 3 for image in batch[0])


def test_one_small_image_is_too_small_for_batch_norm(tmp_path, coco):
    recipe = load_recipe(detection.write_recipe(tmp_path / "tiny.yaml", coco))
    task = task_spec(recipe).build(recipe, World())
    model = task.build_model().train()
    target = {"boxes": torch.tensor([[1.0, 1, 20, 20]]), "labels": torch.tensor([0])}
    with pytest.raises(UserError, match=r"micro-batch of 1, .*task.dense.batch_norm=eval$"):
        task.loss(model, ([torch.rand(3, 32, 32)], [target], [0]))


def test_classification_imports_no_detection():
    code = (
        "import sys, tessel.train.engine, tessel.train.tasks.classify.task, tessel.train.evaluate; print(*sys.modules)"
    )
    names = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    heavy = ("tessel.train.tasks.detect.task", "faster_coco_eval", "pycocotools")
    assert not {name for name in names if name.startswith(heavy)}


def test_classes_of_both_splits_must_agree(tmp_path, capsys):
    root = detection.draw_coco(tmp_path / "coco")
    detection.change(root, "val", lambda c: c["categories"][0].update(name="cat"))
    recipe = detection.write_recipe(tmp_path / "r.yaml", root)
    assert trainer.train(recipe) == 1
    assert "different classes: cat, dog" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
