"""Segmentation through the trainer: exact resume, equal results on any number of processes, evaluation, export."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenery
import timm
import torch
import trainer
import yaml
from PIL import Image
from safetensors.torch import save_file

from tessel.train import evaluate
from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.recipe.load import dump, load_recipe
from tessel.train.tasks.segment import load
from tessel.train.tasks.segment.task import SegmentTask

STEPS = 6
# without batch statistics, the result does not depend on the number of processes
HEAD = {"type": "FPNHead", "channels": 8, "norm_cfg": {"type": "GN", "num_groups": 2}}
AUX = {"type": "FCNHead", "channels": 8, "num_convs": 1, "norm_cfg": {"type": "GN", "num_groups": 2}}


def write_recipe(path: Path, root: Path, **task: Any) -> Path:
    """A recipe of 6 steps of 4 crops, with augmentation, drop path, dropout, weights and moving average on."""
    segment = {"decode_head": HEAD, "auxiliary_head": AUX, "class_weight": {"wall": 0.5}, **task}
    aug = {"hflip": 0.5, "resize": [0.5, 2.0], "cat_max_ratio": 0.75, "photometric": True}
    recipe = {
        "run": {"name": "tiny", "out": str(path.parent / "runs"), "device": "cpu"},
        "model": {"name": "test_convnext", "drop_path_rate": 0.1},
        "task": {"kind": "segment", "segment": segment},
        "data": {"source": "ade20k", "root": str(root), "size": 32, "img_scale": [64, 36], "batch": 4, "micro_batch": 2}
        | {"aug": aug},
        "optim": {"lr": 2e-3, "clip": 1.0, "layer_decay": 0.9},
        "sched": {"steps": STEPS, "warmup": 1},
        "ema": {"decay": 0.9},
        "log": {"every": 1},
        "ckpt": {"every": 2},
        "eval": {"every": 3},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return scenery.ade20k(tmp_path_factory.mktemp("scenery"), train=8, val=3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, images):
    """A run without interruption."""
    recipe = write_recipe(tmp_path_factory.mktemp("straight") / "tiny.yaml", images)
    assert trainer.train(recipe) == 0
    return recipe.parent / "runs" / "tiny"


@pytest.fixture
def recipe(tmp_path, images):
    return write_recipe(tmp_path / "tiny.yaml", images)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_after_a_signal_is_exact(recipe, straight, capsys, workers):
    run = recipe.parent / "runs/tiny"
    with trainer.before_step(3):
        assert trainer.train(recipe, f"data.workers={workers}") == 0
    assert json.loads((run / "PREEMPTED").read_text()) == {"step": 3}
    assert trainer.train(recipe, f"data.workers={workers}") == 0
    assert f"resuming {run} at step 3 (exact)" in capsys.readouterr().out
    trainer.assert_same_checkpoint(*(r / "checkpoints/step-00000006" for r in (run, straight)))
    assert trainer.stable_metrics(run) == trainer.stable_metrics(straight)


def test_the_parts_of_the_loss_are_logged(straight):
    parts = {f"{head}.{key}" for head in ("decode", "auxiliary") for key in ("loss_ce", "acc_seg")}
    lines = [record for record in trainer.stable_metrics(straight) if record["kind"] == "train"]
    assert len(lines) == STEPS
    for line in lines:
        assert parts < set(line) and line["loss"] == pytest.approx(line["decode.loss_ce"] + line["auxiliary.loss_ce"])


def test_ddp_and_fsdp_learn_the_same(recipe, straight):
    runs = [
        [recipe, f"run.name={way}", f"parallel.strategy={way}", "ckpt.every=6", "eval.every=6"]
        for way in ("ddp", "fsdp")
    ]
    done = trainer.run_processes(2, *runs)
    assert trainer.exit_codes(done) == [[0, 0]] * 2, done.stdout + done.stderr
    one = {(record["kind"], record["step"]): record for record in trainer.stable_metrics(straight)}
    for way in ("ddp", "fsdp"):
        other = trainer.stable_metrics(recipe.parent / "runs" / way)
        assert [record["kind"] for record in other] == ["train"] * STEPS + ["eval"]
        for right in other:
            left = one[right["kind"], right["step"]]
            for key in left.keys() & {"loss", "grad_norm", "aacc", "count"}:
                assert right[key] == pytest.approx(left[key], rel=1e-4), (way, key, left["step"])
        state = load(recipe.parent / f"runs/{way}/export").state_dict()
        for name, tensor in load(straight / "export").state_dict().items():
            torch.testing.assert_close(state[name], tensor, atol=1e-4, rtol=1e-3)


def test_files_of_a_run(straight):
    values = json.loads((straight / "evaluation/evaluation.json").read_text())
    assert values["count"] == 3 and values["step"] == STEPS and set(values["classes"]) == {"iou", "acc"}
    assert list(values["classes"]["iou"])[:2] == ["wall", "building"] and len(values["classes"]["iou"]) == 150
    assert values["classes"]["iou"]["wall"] is not None and values["classes"]["acc"]["sky"] is None
    arrays = np.load(straight / "evaluation/predictions.npz")
    assert arrays["index"].tolist() == [0, 1, 2] and arrays["target"].shape == (3, 40, 50)
    assert arrays["size"].tolist() == [[40, 48], [40, 49], [40, 50]] and arrays["confusion"].shape == (150, 150)
    last = [record for record in trainer.metrics(straight) if record["kind"] == "eval"][-1]
    assert last["aacc"] == pytest.approx(values["aacc"]) == pytest.approx(
        100 * arrays["confusion"].trace() / arrays["confusion"].sum()
    )  # fmt: skip
    recipe = load_recipe(straight / "recipe.yaml")
    assert recipe.task.segment.decode_head == HEAD
    (again := straight.parent / "again.yaml").write_text(dump(recipe))
    assert load_recipe(again) == recipe


def test_export_reads_back(straight, tmp_path):
    model: Any = evaluate.load_run(straight)[1]
    assert model.state_dict().keys() == load(straight / "export").state_dict().keys()
    state = trainer.tensors(straight / "checkpoints/step-00000006")
    assert not model.training and model.classes[0] == "wall" and model.palette[0] == [120, 120, 120]
    for name, tensor in model.state_dict().items():  # the export holds the averaged weights
        assert torch.equal(tensor, state[f"ema.{name}"]), name
    assert model(torch.zeros(2, 3, 41, 57)).shape == (2, 150, 41, 57)
    facts = json.loads((straight / "export/config.json").read_text())
    assert facts["read_with"] == "tessel.train.segment.load" and facts["model"]["name"] == "test_convnext"
    with torch.inference_mode():
        assert load(straight / "export").classes == model.classes
    with pytest.raises(UserError, match="no readable export .*config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(UserError, match="not of task.kind=segment"):
        load(tmp_path)


def test_evaluation_of_run_and_checkpoint(straight, capsys):
    last = [record for record in trainer.metrics(straight) if record["kind"] == "eval"][-1]
    for target, arguments in ((straight, ["--overlays", "2"]), (straight / "checkpoints/step-00000006", [])):
        assert evaluate.main([str(target), "--data", "eval_batch=2", *arguments]) == 0
        assert f"miou {last['miou']:.2f}" in capsys.readouterr().out
        overlays = sorted(path.name for path in (straight / "evaluation").glob("overlays/*"))
        assert overlays == (["000000.png", "000001.png"] if arguments else [])
        if arguments:
            with Image.open(straight / "evaluation/overlays/000001.png") as picture:
                assert picture.size == (2 * 49 + 4, 40)
    assert evaluate.main([str(straight), "--sets", f"v2={straight}"]) == 1
    assert "--sets has no effect with task.kind=segment" in capsys.readouterr().err


def test_a_finished_run_is_evaluated_with_other_test_keys(straight, tmp_path, capsys):
    run = shutil.copytree(straight, tmp_path / "run")
    trained = json.loads((run / "DONE").read_text())
    assert evaluate.main([str(run), "task.segment.test.flip=true", "task.segment.test.scales=[1.0, 1.5]"]) == 0
    evaluated = json.loads((run / "evaluation/evaluation.json").read_text())
    assert evaluated["aacc"] != trained["aacc"] and evaluated["overrides"][0] == "task.segment.test.flip=true"
    assert evaluate.main([str(run), "task.segment.neck.type=FPN"]) == 1
    assert "task.segment.neck.type=FPN has no effect on an evaluation" in capsys.readouterr().err


def test_windows_and_views_change_the_evaluation(recipe, images):
    values = {}
    for name, test in {"whole": {}, "views": {"flip": True, "scales": [0.5, 1.0], "divisor": 32}}.items():
        path = write_recipe(recipe.parent / f"{name}.yaml", images, test=test)
        assert trainer.train(path, f"run.name={name}", "sched.steps=1", "sched.warmup=0", "data.workers=1") == 0
        values[name] = json.loads((recipe.parent / f"runs/{name}/DONE").read_text())["aacc"]
    assert values["whole"] != values["views"]
    slide = {"mode": "slide", "crop": 64, "stride": 20}
    assert trainer.train(write_recipe(recipe, images, test=slide), "sched.steps=1", "sched.warmup=0") == 0
    done = json.loads((recipe.parent / "runs/tiny/DONE").read_text())
    assert done["aacc"] == values["whole"], "one window covers the image"


def test_a_backbone_is_checked_on_the_sizes_of_the_evaluation(recipe):
    overrides = ["model.name=swin_tiny_patch4_window7_224", "model.drop_path_rate=null", "model.kwargs.img_size=32"]
    loose = ["model.kwargs.strict_img_size=false", "task.segment.test.divisor=32"]
    for more in ([], loose[:1]):
        with pytest.raises(UserError, match="does not accept images of 32 x 33 .*task.segment.test.divisor=32"):
            SegmentTask(load_recipe(recipe, overrides + more), World()).build_model()
    for more in (loose, ["task.segment.test.mode=slide"]):
        SegmentTask(load_recipe(recipe, overrides + more), World()).build_model()


def test_dry_run_writes_nothing(recipe, capsys):
    assert trainer.train(recipe, "--dry-run", "parallel.precision=bf16", "parallel.grad_checkpointing=true") == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("test_convnext", "GFLOP", "8 images, 6 steps of 4", "one micro-batch: loss"))
    assert not (recipe.parent / "runs").exists()


def test_starts_from_a_classifier_or_a_published_segmenter(recipe, tmp_path, images):
    classifier = timm.create_model("test_convnext", num_classes=7)
    folder = tmp_path / "classifier"
    timm.models.save_for_hf(classifier, str(folder), safe_serialization=True)
    task = SegmentTask(load_recipe(recipe, [f"model.init_from=local-dir:{folder}"]), World())
    body = task.build_model().backbone.body.state_dict()
    assert all(torch.equal(tensor, classifier.state_dict()[key]) for key, tensor in body.items())

    path = write_recipe(tmp_path / "cswin.yaml", images)
    model = SegmentTask(load_recipe(path, ["model.name=cswin_atto"]), World()).build_model()
    file = tmp_path / "published.safetensors"
    save_file({"decode_head.conv_seg.bias": model.decode_head.conv_seg.bias.detach()}, file)
    task = SegmentTask(load_recipe(path, ["model.name=cswin_atto", f"task.segment.load_from={file}"]), World())
    with pytest.raises(
        UserError, match=r"task.segment.load_from=.*published.safetensors does not fit model.name=cswin"
    ):
        task.build_model()
    other = tmp_path / "other"
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(other), safe_serialization=True)
    task = SegmentTask(load_recipe(recipe, [f"model.init_from=local-dir:{other}"]), World())
    with pytest.raises(UserError, match="model.init_from=local-dir:.* does not fit model.name=test_convnext"):
        task.build_model()


def test_a_damaged_image_is_named(recipe, tmp_path, capsys):
    root = scenery.ade20k(tmp_path)
    path = root / "images/training/ADE_train_00000002.jpg"
    path.write_bytes(b"\xff\xd8 no picture")
    assert trainer.train(recipe, f"data.root={root}", "data.workers=1", "guard.max_corrupt=0") == 1
    error = capsys.readouterr().err
    assert f"image {path} cannot be decoded" in error and "Traceback" not in error


def test_some_heads_need_two_images(tmp_path, images, capsys):
    head = {"type": "UPerHead", "channels": 8}
    recipe = write_recipe(tmp_path / "tiny.yaml", images, decode_head=head, auxiliary_head={})
    assert trainer.train(recipe, "data.micro_batch=1", "--dry-run") == 1
    error = capsys.readouterr().err
    assert "micro-batch of 1" in error and "data.micro_batch" in error and "Traceback" not in error
    assert trainer.train(recipe, "--dry-run") == 0
    group = head | {"norm_cfg": {"type": "GN", "num_groups": 2}}
    recipe = write_recipe(recipe, images, decode_head=group, auxiliary_head={})
    assert trainer.train(recipe, "data.micro_batch=1", "--dry-run") == 0
    alone = [recipe, "data.micro_batch=1", "model.name=resnet18", "optim.layer_decay=null", "--dry-run"]
    alone.append("model.drop_path_rate=null")
    capsys.readouterr()
    assert trainer.train(*alone) == 1
    error = capsys.readouterr().err
    assert "micro-batch of 1" in error and "task.dense.batch_norm=eval" in error
    assert trainer.train(*alone, "task.dense.batch_norm=eval") == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.segment.decode_head=null"], "task.segment.decode_head"),
        (["task.segment.decode_head={channels: 3}"], "task.segment.decode_head needs a type"),
        (["task.segment.neck={out_channels: 3}"], "task.segment.neck needs a type, as in {type: FPN"),
        (["data.aug.mixup=0.2"], "data.aug.mixup has no effect"),
        (["data.aug.auto_augment=rand-m9"], "data.aug.auto_augment has no effect"),
        (["task.smoothing=0.1"], "task.smoothing has no effect"),
        (["task.num_classes=4"], "task.num_classes has no effect"),
        (["data.crop_pct=0.9"], "data.crop_pct has no effect"),
        (["data.source=folder"], "data.source=folder has no semantic masks, which task.kind=segment reads"),
        (["data.root=null"], "data.root"),
        (["data.source=digit_scenes"], "data.root has no effect"),
        (["task.segment.test.stride=4"], "task.segment.test.stride has no effect with task.segment.test.mode=whole"),
        (["task.segment.test.mode=slide", "task.segment.test.stride=40"], "leaves gaps between windows"),
        (
            ["task.segment.load_from=x.pth", "model.pretrained=true"],
            "task.segment.load_from includes the weights of the backbone",
        ),
        (["task.kind=classify"], "task.segment has no effect"),
        (["task.kind=classify", "task.dense.batch_norm=eval"], "task.dense.batch_norm has no effect"),
        (["task.kind=classify"], "data.aug.photometric has no effect"),
        (["data.aug.resize=[2, 1]"], "data.aug.resize=[2.0, 1.0] must be"),
        (["task.segment.class_weight.wal=1.0"], "task.segment.class_weight names wal, but the classes of the data are"),
        (["task.segment.load_from=nowhere.pth"], "task.segment.load_from=nowhere.pth does not fit"),
    ],
)
def test_errors_name_the_key(recipe, capsys, overrides, message):
    assert trainer.train(recipe, *overrides) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (recipe.parent / "runs").exists()


def test_overlays_are_not_for_classification(tmp_path, capsys):
    root = trainer.draw_folder(tmp_path / "images", train=4, val=2)
    path = trainer.write_recipe(tmp_path / "tiny.yaml", data={"root": str(root)}, sched={"steps": 1, "warmup": 0})
    assert trainer.train(path) == 0
    assert evaluate.main([str(tmp_path / "runs/tiny"), "--overlays", "1"]) == 1
    assert "--overlays has no effect with task.kind=classify" in capsys.readouterr().err


def test_classification_imports_no_segmentation():
    code = (
        "import sys, tessel.train.engine, tessel.train.tasks.classify.task, tessel.train.evaluate; print(*sys.modules)"
    )
    names = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {
        name for name in names if name.startswith(("mmseg", "mmengine", "mmcv", "tessel.train.tasks.segment.task"))
    }
