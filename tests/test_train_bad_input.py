"""Wrong input and failures: one clear message on stderr, a nonzero exit code, and no saved data is lost."""

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


def error_message(capsys, code):
    """Assert that the command failed with a single message. Returns the message."""
    captured = capsys.readouterr()
    assert code == 1
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def empty_class(images):
    (images / "train/class_0/notes.txt").touch()
    for path in (images / "train/class_0").glob("*.png"):
        path.unlink()


def no_classes(images):
    shutil.rmtree(images / "train")
    (images / "train").mkdir()


def split_is_a_file(images):
    shutil.rmtree(images / "val")
    (images / "val").write_text("not a folder")


def renamed_class(images):
    (images / "val/class_0").rename(images / "val/class_9")


@pytest.mark.parametrize(
    ("overrides", "damage", "fragments"),
    [
        (["data.root=/nowhere"], None, ["/nowhere", "No such file", "data.root must contain"]),
        ([], split_is_a_file, ["images/val", "Not a directory"]),
        ([], empty_class, ["class class_0", "no images", ".jpg"]),
        ([], no_classes, ["no class folders", "data.root must contain"]),
        ([], renamed_class, ["different classes: class_0, class_9"]),
        (["data.batch=512"], None, ["data.batch=512", "12 training images", "data.batch=12"]),
        (["model.name=biformer_atom"], None, ["'biformer_atom'", "`tessel list`", "biformer_atto"]),
        (["model.name=local-dir:/nowhere"], None, ["model.name=local-dir:/nowhere"]),
        (["model.kwargs={depht: 3}"], None, ["test_efficientnet", "depht"]),
        (["task.num_classes=7"], None, ["task.num_classes=7", "3 classes"]),
        (["model.name=resnet18.nonsense"], None, ["model.name=resnet18.nonsense", "'nonsense'", "resnet18.a1_in1k"]),
        (["model.name=biformer_atto.in1k"], None, ["model.name=biformer_atto.in1k", "use one of biformer_atto\n"]),
        (["model.init_from=resnet18.nonsense"], None, ["model.init_from=resnet18.nonsense", "resnet18.a1_in1k"]),
        (["model.kwargs={num_classes: 7}"], None, ["model.kwargs", "num_classes", "task.num_classes"]),
        (["model.kwargs={pretrained: true}"], None, ["model.kwargs", "model.pretrained"]),
        (["model.kwargs={features_only: true}"], None, ["model.kwargs", "features_only"]),
        (["model.kwargs={in_chans: 1}"], None, ["model.kwargs", "in_chans", "model.in_chans"]),
        (["model.name=test_vit", "data.size=10"], None, ["model.name=test_vit", "3 x 10 x 10", "divisible"]),
        (["model.name=levit_128s", "data.size=50"], None, ["model.name=levit_128s", "3 x 50 x 50", "data.size"]),
        ([TINY_VIT, "model.kwargs={depth: 1, img_size: 64}"], None, [TINY_VIT, "3 x 32 x 32", "match model (64)"]),
        ([*PLAIN, TINY_VIT, "task.probe=attentive", "model.kwargs={img_size: 64}"], None, [TINY_VIT, "model (64)"]),
        (
            [*PLAIN, "model.name=dla34", "parallel.grad_checkpointing=true"],
            None,
            ["grad_checkpointing", "remove"],
        ),
        (["optim.name=adamm"], None, ["'adamm'", "adam"]),
        (["optim.kwargs={beta: 1}"], None, ["optim.kwargs={'beta': 1}"]),
        (["optim.kwargs={betas: [0.9]}"], None, ["optim.kwargs={'betas': [0.9]}"]),
        (["optim.name=fusedadam"], None, ["optim.name=fusedadam", "CUDA required"]),
        (["data.aug.auto_augment=rnd-9"], None, ["rnd-9", "auto_augment"]),
        (["parallel.precision=fp16"], None, ["fp16", "cuda", "bf16"]),
        (["run.device=cuda"], None, ["run.device=cuda", "run.device=cpu"]),
    ],
)
def test_wrong_input_is_an_error_before_anything_is_written(recipe, monkeypatch, capsys, overrides, damage, fragments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if damage:
        damage(recipe.parent / "images")
    message = error_message(capsys, trainer.train(recipe, *overrides))
    assert all(fragment in message for fragment in fragments), message
    assert not (recipe.parent / "runs").exists()


def test_batch_norm_over_a_single_value_is_an_error(recipe, capsys):
    message = error_message(capsys, trainer.train(recipe, *PLAIN, "model.name=resnet18", "data.micro_batch=1"))
    assert "micro-batch of 1" in message and "data.micro_batch" in message and "data.size" in message


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_error_names_the_corrupt_image(recipe, capsys, split, workers):
    corrupt = recipe.parent / f"images/{split}/class_1/2.png"
    corrupt.write_bytes(corrupt.read_bytes()[:60])
    message = error_message(capsys, trainer.train(recipe, f"data.workers={workers}", "guard.max_corrupt=0"))
    assert str(corrupt) in message and "cannot be decoded" in message and "repair or remove" in message


def test_corrupt_validation_image_loses_no_update_on_two_processes(recipe, capsys):
    """Only one process reads the image. Then one process resumes, and its batch norms see more images at once."""
    corrupt = recipe.parent / "images/val/class_1/2.png"
    content = corrupt.read_bytes()
    corrupt.write_bytes(content[:60])
    done = trainer.run_processes(2, [recipe, "ckpt.every=9"])
    assert trainer.exit_codes(done) == [[1, 1]] and str(corrupt) in done.stderr, done.stderr
    corrupt.write_bytes(content)
    assert trainer.train(recipe, "data.micro_batch=8", "ckpt.other_data=true") == 0
    out = capsys.readouterr().out
    assert "samples of val have other sizes or labels, processes was 2, now 1" in out
    assert "batch norms see 8 images at once instead of 4" in out
    assert [record["step"] for record in trainer.metrics(recipe.parent / "runs/tiny") if record["kind"] == "eval"] == [
        6
    ]


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_output_folder_below_a_file_is_an_error(recipe, capsys, options):
    (recipe.parent / "file").touch()
    message = error_message(capsys, trainer.train(recipe, f"run.out={recipe.parent}/file/runs", *options))
    for fragment in ("file/runs/tiny cannot be written", f"{recipe.parent}/file is a file", "set run.out"):
        assert fragment in message


def test_run_directory_with_other_files_is_refused(recipe, capsys):
    (other := recipe.parent / "runs/tiny").mkdir(parents=True)
    (other / "thesis.tex").touch()
    message = error_message(capsys, trainer.train(recipe))
    assert "has no recipe.yaml" in message and (other / "thesis.tex").exists()


def fail_without_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_half_and_fail(self, plan, planner):
    (self.path / "__0_0.distcp").write_bytes(b"half")
    fail_without_space()


@pytest.mark.parametrize("stage", ["tensors", "manifest", "rename"])
def test_full_disk_while_saving_keeps_the_last_checkpoint(recipe, monkeypatch, capsys, stage):
    path = recipe.parent / "runs/tiny/checkpoints"
    with monkeypatch.context() as patch:
        save = Engine.save

        def hooked(self):
            if self.progress.step == 4:
                if stage == "tensors":
                    patch.setattr(FileSystemWriter, "write_data", write_half_and_fail)
                elif stage == "manifest":
                    patch.setattr(checkpoint, "write_atomically", fail_without_space)
                else:
                    patch.setattr(checkpoint.os, "replace", fail_without_space)
            save(self)

        patch.setattr(Engine, "save", hooked)
        message = error_message(capsys, trainer.train(recipe))
    assert "step 4 cannot be written" in message and "No space left on device" in message and str(path) in message
    assert [entry.name for entry in path.iterdir()] == ["step-00000002"]
    assert checkpoint.find_damage(path / "step-00000002") is None
    assert trainer.train(recipe) == 0
    assert "at step 2 (exact)" in capsys.readouterr().out


def test_full_disk_while_logging_is_an_error(recipe, monkeypatch, capsys):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(loggers.JsonlLogger, "__init__", lambda self, path: setattr(self, "file", full))
        message = error_message(capsys, trainer.train(recipe))
    assert "/dev/full cannot be written (No space left on device)" in message


def make_loss_infinite(monkeypatch, *steps):
    """Make the loss of these updates infinite."""
    loss, step = classify.ClassifyTask.loss, Engine.step
    current = []

    def hooked(self):
        current[:] = [self.progress.step]
        return step(self)

    def infinite_loss(self, model, batch):
        return {
            name: value * (float("inf") if current[0] in steps else 1)
            for name, value in loss(self, model, batch).items()
        }

    monkeypatch.setattr(Engine, "step", hooked)
    monkeypatch.setattr(classify.ClassifyTask, "loss", infinite_loss)


def test_non_finite_loss_stops_the_run_and_names_step_and_images(recipe, monkeypatch, capsys):
    make_loss_infinite(monkeypatch, 3)
    message = error_message(capsys, trainer.train(recipe))
    run = recipe.parent / "runs/tiny"
    assert "loss inf" in message and "at step 3" in message and "up to step 2 are good" in message
    dump = json.loads((run / "nonfinite-00000003.json").read_text())
    assert dump["step"] == 3 and len(dump["samples (epoch, index)"]) == 8
    assert checkpoint.find_damage(run / "checkpoints/step-00000002") is None
    text = (run / "metrics.jsonl").read_text()
    assert not re.search("nan|inf", text, re.IGNORECASE)


def test_non_finite_updates_are_skipped_up_to_a_limit(recipe, monkeypatch, capsys):
    make_loss_infinite(monkeypatch, 1, 3, 4)
    message = error_message(capsys, trainer.train(recipe, "guard.max_skips=1"))
    assert "at step 4" in message
    assert trainer.train(recipe, "guard.max_skips=2", "run.name=skips") == 0
    out = capsys.readouterr().out
    assert [int(number) for number in re.findall(r"update (\d) skipped", out)] == [1, 3, 4]
    _, model = evaluate.load_run(recipe.parent / "runs/skips")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_evaluate_rejects_folders_without_a_finished_run(recipe, capsys):
    assert "neither a run directory" in error_message(capsys, evaluate.main([str(recipe.parent)]))
    assert "`tessel predict RUN " in error_message(capsys, evaluate.main([str(recipe)]))
    (run := recipe.parent / "runs/begun").mkdir(parents=True)
    shutil.copy(recipe, run / "recipe.yaml")
    assert "not finished" in error_message(capsys, evaluate.main([str(run)]))
    assert "data.sise" in error_message(capsys, evaluate.main([str(run), "--data", "sise=3"]))


@pytest.mark.slow
def test_torchrun_prints_one_message(recipe):
    """Both processes reject the unknown model; only the second one reads the corrupt image."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    corrupt = recipe.parent / "images/train/class_1/2.png"
    corrupt.write_bytes(b"")
    for override, fragment in (("model.name=nonsense", "'nonsense'"), ("data.batch=4", str(corrupt))):
        arguments = ["-m", "tessel.train", str(recipe), "data.micro_batch=2", "guard.max_corrupt=0", override]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
        messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode != 0 and len(messages) == 1 and fragment in messages[0], done.stderr


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory left"), MemoryError()])
def test_lack_of_memory_in_an_evaluation_loses_no_update(recipe, monkeypatch, capsys, error):
    """The evaluation after step 6 is the first; no checkpoint is due before it."""

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("tessel.train.tasks.classify.metrics.ClassificationMetrics.update", fail)
        message = error_message(capsys, trainer.train(recipe, "ckpt.every=9"))
    assert "out of memory in an evaluation" in message and "data.eval_batch" in message
    assert trainer.train(recipe, "ckpt.every=9") == 0
    assert "at step 6 (exact)" in capsys.readouterr().out
