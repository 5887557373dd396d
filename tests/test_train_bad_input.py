"""Mistakes and failures: one clear message on stderr, a non-zero exit code, and nothing that was saved is lost."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import trainer
from torch.distributed.checkpoint import FileSystemWriter

from tessel.train import evaluate
from tessel.train.engine import Engine
from tessel.train.run import checkpoint, loggers
from tessel.train.tasks.classify import task as classify

PLAIN = ["model.drop_path_rate=null", "optim.layer_decay=null"]
TINY_VIT = "model.name=vit_tiny_patch16_224"


@pytest.fixture
def recipe(tmp_path):
    images = trainer.draw_folder(tmp_path / "images", train=4, val=3)
    data = {"root": str(images), "aug": {}}
    return trainer.write_recipe(
        tmp_path / "tiny.yaml", data=data, sched={"steps": 6, "warmup": 0}, ckpt={"every": 2}, eval={"every": 6}
    )


def refusal(capsys, code):
    """The one message of a command that failed."""
    captured = capsys.readouterr()
    assert code == 1
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def empty_class(images):
    (images / "train/class_0/notes.txt").touch()
    for path in (images / "train/class_0").glob("*.png"):
        path.unlink()


def no_samples(images):
    shutil.rmtree(images / "train")
    (images / "train").mkdir()


def one_file(images):
    shutil.rmtree(images / "val")
    (images / "val").write_text("not a folder")


def odd_class(images):
    (images / "val/class_0").rename(images / "val/class_9")


@pytest.mark.parametrize(
    ("overrides", "harm", "fragments"),
    [
        (["data.root=/nowhere"], None, ["/nowhere/val", "No such file", "data.root must contain"]),
        ([], one_file, ["images/val", "Not a directory"]),
        ([], empty_class, ["class class_0", "no images", ".jpg"]),
        ([], no_samples, ["no class folders", "data.root must contain"]),
        ([], odd_class, ["different classes: class_0, class_9"]),
        (["data.batch=512"], None, ["data.batch=512", "12 training images", "data.batch=12"]),
        (["model.name=biformer_atom"], None, ["'biformer_atom'", "import tessel.zoo", "biformer_atto"]),
        (["model.name=local-dir:/nowhere"], None, ["model.name=local-dir:/nowhere"]),
        (["model.kwargs={depht: 3}"], None, ["test_efficientnet", "depht"]),
        (["task.num_classes=7"], None, ["task.num_classes=7", "3 classes"]),
        (["model.name=resnet18.nonsense"], None, ["model.name=resnet18.nonsense", "'nonsense'", "resnet18.a1_in1k"]),
        (["model.name=biformer_atto.in1k"], None, ["model.name=biformer_atto.in1k", "use one of biformer_atto\n"]),
        (["model.init_from=resnet18.nonsense"], None, ["model.init_from=resnet18.nonsense", "resnet18.a1_in1k"]),
        (["model.kwargs={num_classes: 7}"], None, ["model.kwargs", "num_classes", "task.num_classes"]),
        (["model.kwargs={pretrained: true}"], None, ["model.kwargs", "model.pretrained"]),
        (["model.kwargs={features_only: true}"], None, ["model.kwargs", "features_only"]),
        (["model.kwargs={in_chans: 1}"], None, ["model.name=test_efficientnet", "3 x 32 x 32", "1 channels", "kwargs"]),
        (["model.name=test_vit", "data.size=10"], None, ["model.name=test_vit", "3 x 10 x 10", "divisible"]),
        (["model.name=levit_128s", "data.size=50"], None, ["model.name=levit_128s", "3 x 50 x 50", "data.size"]),
        ([TINY_VIT, "model.kwargs={depth: 1, img_size: 64}"], None, [TINY_VIT, "3 x 32 x 32", "match model (64)"]),
        ([*PLAIN, TINY_VIT, "task.probe=attentive", "model.kwargs={img_size: 64}"], None, [TINY_VIT, "model (64)"]),
        (
            [*PLAIN, "model.name=dla34", "parallel.grad_checkpointing=true"],
            None,
            ["grad_checkpointing", "remove the key"],
        ),
        (["optim.name=adamm"], None, ["'adamm'", "adam"]),
        (["optim.kwargs={beta: 1}"], None, ["optim.kwargs={'beta': 1}"]),
        (["optim.kwargs={betas: [0.9]}"], None, ["optim.kwargs={'betas': [0.9]}"]),
        (["optim.name=fusedadam"], None, ["optim.name=fusedadam", "CUDA required"]),
        (["data.aug.auto_augment=rnd-9"], None, ["rnd-9", "auto_augment"]),
        (["parallel.precision=fp16"], None, ["fp16", "GPU", "bf16"]),
        (["run.device=cuda"], None, ["run.device=cuda", "run.device=cpu"]),
    ],
)
def test_mistake_is_named_before_anything_is_written(recipe, monkeypatch, capsys, overrides, harm, fragments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if harm:
        harm(recipe.parent / "images")
    message = refusal(capsys, trainer.train(recipe, *overrides))
    assert all(fragment in message for fragment in fragments), message
    assert not (recipe.parent / "runs").exists()


def test_batch_norm_of_one_pixel(recipe, capsys):
    message = refusal(capsys, trainer.train(recipe, *PLAIN, "model.name=resnet18", "data.micro_batch=1"))
    assert "micro-batch of 1" in message and "data.micro_batch" in message and "data.size" in message


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_corrupt_image_is_named(recipe, capsys, split, workers):
    victim = recipe.parent / f"images/{split}/class_1/2.png"
    victim.write_bytes(victim.read_bytes()[:60])
    message = refusal(capsys, trainer.train(recipe, f"data.workers={workers}"))
    assert str(victim) in message and "cannot be decoded" in message and "repair or remove" in message


def test_broken_validation_image_costs_no_update_on_two_processes(recipe, capsys):
    """Though one process alone meets it; resumed by one process, whose batch norms see more images at once."""
    victim = recipe.parent / "images/val/class_1/2.png"
    content = victim.read_bytes()
    victim.write_bytes(content[:60])
    done = trainer.run_processes(2, [recipe, "ckpt.every=9"])
    assert trainer.exit_codes(done) == [[1, 1]] and str(victim) in done.stderr, done.stderr
    victim.write_bytes(content)
    assert trainer.train(recipe, "data.micro_batch=8") == 0
    out = capsys.readouterr().out
    assert "at step 6 (not bitwise: processes was 2, now 1" in out
    assert "batch norms see 8 images at once instead of 4" in out
    assert [record["step"] for record in trainer.metrics(recipe.parent / "runs/tiny") if record["kind"] == "eval"] == [
        6
    ]


def test_unwritable_output(recipe, capsys):
    (recipe.parent / "file").touch()
    message = refusal(capsys, trainer.train(recipe, f"run.out={recipe.parent}/file/runs"))
    assert "file/runs/tiny cannot be written" in message and "run.out" in message


def test_directory_of_something_else(recipe, capsys):
    (other := recipe.parent / "runs/tiny").mkdir(parents=True)
    (other / "thesis.tex").touch()
    message = refusal(capsys, trainer.train(recipe))
    assert "has no recipe.yaml" in message and (other / "thesis.tex").exists()


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(self, plan, planner):
    (self.path / "__0_0.distcp").write_bytes(b"half")
    no_space()


@pytest.mark.parametrize("stage", ["tensors", "manifest", "rename"])
def test_full_disk_while_saving_loses_nothing(recipe, monkeypatch, capsys, stage):
    path = recipe.parent / "runs/tiny/checkpoints"
    with monkeypatch.context() as patch:
        save = Engine.save

        def hooked(self):
            if self.progress.step == 4:
                if stage == "tensors":
                    patch.setattr(FileSystemWriter, "write_data", half_written)
                elif stage == "manifest":
                    patch.setattr(checkpoint, "write_atomically", no_space)
                else:
                    patch.setattr(checkpoint.os, "replace", no_space)
            save(self)

        patch.setattr(Engine, "save", hooked)
        message = refusal(capsys, trainer.train(recipe))
    assert "step 4 cannot be written" in message and "No space left on device" in message and str(path) in message
    assert [entry.name for entry in path.iterdir()] == ["step-00000002"]
    assert checkpoint.find_damage(path / "step-00000002") is None
    assert trainer.train(recipe) == 0
    assert "at step 2 (exact)" in capsys.readouterr().out


def test_full_disk_while_logging(recipe, monkeypatch, capsys):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(loggers.JsonlLogger, "__init__", lambda self, path: setattr(self, "file", full))
        message = refusal(capsys, trainer.train(recipe))
    assert "/dev/full cannot be written (No space left on device)" in message


def spoil(monkeypatch, *steps):
    """Make the loss of these updates infinite."""
    loss, step = classify.ClassifyTask.loss, Engine.step
    current = []

    def hooked(self):
        current[:] = [self.progress.step]
        return step(self)

    def spoiled(self, model, batch):
        return {
            name: value * (float("inf") if current[0] in steps else 1)
            for name, value in loss(self, model, batch).items()
        }

    monkeypatch.setattr(Engine, "step", hooked)
    monkeypatch.setattr(classify.ClassifyTask, "loss", spoiled)


def test_non_finite_loss_stops_with_step_and_images(recipe, monkeypatch, capsys):
    spoil(monkeypatch, 3)
    message = refusal(capsys, trainer.train(recipe))
    run = recipe.parent / "runs/tiny"
    assert "loss inf" in message and "at step 3" in message and "up to step 2 are good" in message
    dump = json.loads((run / "nonfinite-00000003.json").read_text())
    assert dump["step"] == 3 and len(dump["samples (epoch, index)"]) == 8
    assert checkpoint.find_damage(run / "checkpoints/step-00000002") is None
    text = (run / "metrics.jsonl").read_text()
    assert not re.search("nan|inf", text, re.IGNORECASE)


def test_non_finite_updates_are_skipped_up_to_a_limit(recipe, monkeypatch, capsys):
    spoil(monkeypatch, 1, 3, 4)
    message = refusal(capsys, trainer.train(recipe, "guard.max_skips=1"))
    assert "at step 4" in message
    assert trainer.train(recipe, "guard.max_skips=2", "run.name=skips") == 0
    out = capsys.readouterr().out
    assert [int(number) for number in re.findall(r"update (\d) skipped", out)] == [1, 3, 4]
    _, model = evaluate.load_run(recipe.parent / "runs/skips")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_evaluate_refuses_what_is_no_run(recipe, capsys):
    assert "neither a run directory" in refusal(capsys, evaluate.main([str(recipe.parent)]))
    (run := recipe.parent / "runs/begun").mkdir(parents=True)
    shutil.copy(recipe, run / "recipe.yaml")
    assert "not finished" in refusal(capsys, evaluate.main([str(run)]))
    assert "data.sise" in refusal(capsys, evaluate.main([str(run), "--data", "sise=3"]))


@pytest.mark.slow
def test_torchrun_prints_one_message(recipe):
    """Though only the second process meets the broken image, and both meet the unknown model."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    victim = recipe.parent / "images/train/class_1/2.png"
    victim.write_bytes(b"")
    for override, fragment in (("model.name=nonsense", "'nonsense'"), ("data.batch=4", str(victim))):
        arguments = ["-m", "tessel.train", str(recipe), "data.micro_batch=2", override]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
        messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode != 0 and len(messages) == 1 and fragment in messages[0], done.stderr
