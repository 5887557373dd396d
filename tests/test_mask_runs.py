"""Segmentation with Mask2Former through the trainer: exact resume, any number of processes, evaluation, prediction."""

import json
from pathlib import Path

import pytest
import recipe_runner
import scenery
import torch
import trainer
import yaml
from PIL import Image

import tessel
from tessel.cli.application import main
from tessel.train import evaluate
from tessel.train.report.__main__ import main as report
from tessel.train.tasks.segment import load

STEPS = 4
HEAD = {"type": "Mask2Former", **recipe_runner.NARROW_MASK2FORMER}

pytestmark = pytest.mark.slow


def write_recipe(path: Path, root: Path) -> Path:
    """A recipe of 4 steps of 4 crops, in micro-batches of 2, with layer decay, drop path and moving average."""
    aug = {"hflip": 0.5, "resize": [0.5, 2.0], "cat_max_ratio": 0.75, "photometric": True}
    recipe = {
        "run": {"name": "tiny", "out": str(path.parent / "runs"), "device": "cpu"},
        "model": {"name": "test_convnext", "drop_path_rate": 0.1},
        "task": {"kind": "segment", "segment": {"decode_head": HEAD}},
        "data": {"source": "ade20k", "root": str(root), "size": 32, "img_scale": [64, 36], "batch": 4, "micro_batch": 2}
        | {"aug": aug},
        "optim": {"lr": 2e-3, "clip": 1.0, "layer_decay": 0.9, "lr_factors": {r"^backbone\.": 0.1}},
        "sched": {"steps": STEPS, "warmup": 1},
        "ema": {"decay": 0.9},
        "log": {"every": 1},
        "ckpt": {"every": 2},
        "eval": {"every": STEPS},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return scenery.ade20k(tmp_path_factory.mktemp("scenery"), train=8, val=2)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, images):
    """A run without interruption."""
    recipe = write_recipe(tmp_path_factory.mktemp("straight") / "tiny.yaml", images)
    assert trainer.train(recipe) == 0
    return recipe.parent / "runs" / "tiny"


@pytest.fixture
def recipe(tmp_path, images):
    return write_recipe(tmp_path / "tiny.yaml", images)


def test_resume_after_a_signal_is_exact(recipe, straight, capsys):
    run = recipe.parent / "runs/tiny"
    with trainer.before_step(3):
        assert trainer.train(recipe) == 0
    assert json.loads((run / "PREEMPTED").read_text()) == {"step": 3}
    assert trainer.train(recipe) == 0
    assert f"resuming {run} at step 3 (exact)" in capsys.readouterr().out
    trainer.assert_same_checkpoint(*(r / "checkpoints/step-00000004" for r in (run, straight)))


def test_ddp_and_fsdp_learn_the_same(recipe, straight):
    """A chunk of the batch draws the same points and has the same divisor on any number of processes."""
    runs = [
        [recipe, f"run.name={way}", f"parallel.strategy={way}", "ckpt.every=4", "eval.every=4"]
        for way in ("ddp", "fsdp")
    ]
    done = trainer.run_processes(2, *runs)
    assert trainer.exit_codes(done) == [[0, 0]] * 2, done.stdout + done.stderr
    one = [record for record in trainer.stable_metrics(straight) if record["kind"] == "train"]
    for way in ("ddp", "fsdp"):
        other = [record for record in trainer.stable_metrics(recipe.parent / "runs" / way) if record["kind"] == "train"]
        for left, right in zip(one, other, strict=True):
            assert right["loss"] == pytest.approx(left["loss"], rel=1e-3), (way, left["step"])
        assert (
            load(recipe.parent / f"runs/{way}/export").state_dict().keys()
            == load(straight / "export").state_dict().keys()
        )


def test_the_parts_of_the_loss_are_logged(straight):
    for line in (record for record in trainer.stable_metrics(straight) if record["kind"] == "train"):
        parts = [line[f"decode.loss_{name}"] for name in ("class", "mask", "dice")]
        assert all(part > 0 for part in parts) and line["loss"] == pytest.approx(sum(parts))


def test_a_run_is_evaluated_drawn_and_predicts(straight, tmp_path, capsys):
    last = [record for record in trainer.metrics(straight) if record["kind"] == "eval"][-1]
    assert evaluate.main([str(straight), "--overlays", "1"]) == 0
    assert f"miou {last['miou']:.2f}" in capsys.readouterr().out
    assert report([str(straight)]) == 0 and "IoU by class" in (straight / "report/index.html").read_text()
    for keys in (
        ["task.segment.test.mode=slide"],
        ["task.segment.test.flip=true", "task.segment.test.scales=[1.0, 1.5]"],
    ):
        assert evaluate.main([str(straight), *keys]) == 0
    Image.new("RGB", (50, 37), "gray").save(tmp_path / "image.png")
    (result,) = tessel.load(straight).predict(tmp_path / "image.png")
    assert result.mask.shape == (37, 50)


@pytest.mark.filterwarnings("ignore")  # the exporter warns about its own code
def test_an_exported_run_predicts_the_same(straight, tmp_path):
    file, image = tmp_path / "model.pt2", tmp_path / "image.png"
    argv = ["export", str(straight), "--format", "torch-export", "--size", "36", "--dynamic", "batch"]
    assert main([*argv, "--out", str(file)]) == 0
    Image.effect_noise((36, 36), 80).convert("RGB").save(image)
    found, wanted = (tessel.load(model).predict(image)[0].mask for model in (file, straight))
    assert (found == wanted).mean() > 0.99


def test_bfloat16_and_another_backbone(recipe):
    name = "biformer_atto"
    more = ["parallel.precision=bf16", f"model.name={name}", f"run.name={name}", "sched.steps=2", "eval.every=2"]
    assert trainer.train(recipe, *more) == 0
    assert torch.isfinite(next(load(recipe.parent / f"runs/{name}/export").parameters())).all()
