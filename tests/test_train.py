"""Whole runs of the trainer: exact resume, equal results on two processes, evaluation, logs, no accidental restart."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import trainer

from tessel.train import engine, evaluate
from tessel.train.errors import UserError
from tessel.train.recipe.load import load_recipe
from tessel.train.run import checkpoint, loggers

TRAIN = Path(engine.__file__).parent


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return trainer.draw_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, images):
    """A run of 9 steps without interruption."""
    recipe = trainer.write_recipe(tmp_path_factory.mktemp("straight") / "tiny.yaml", data={"root": str(images)})
    assert trainer.train(recipe) == 0
    return recipe.parent / "runs" / "tiny"


@pytest.fixture
def recipe(tmp_path, images):
    return trainer.write_recipe(tmp_path / "tiny.yaml", data={"root": str(images)})


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_after_a_signal_is_exact(recipe, straight, capsys, workers):
    run = recipe.parent / "runs" / "tiny"
    with trainer.before_step(5):
        assert trainer.train(recipe, f"data.workers={workers}") == 0
    assert json.loads((run / "PREEMPTED").read_text()) == {"step": 5} and not (run / "DONE").exists()
    assert "The same command continues" in capsys.readouterr().out

    assert trainer.train(recipe, f"data.workers={workers}") == 0
    assert f"resuming {run} at step 5 (exact); run.fresh=true starts from scratch" in capsys.readouterr().out
    assert (run / "DONE").exists() and not (run / "PREEMPTED").exists()
    trainer.assert_same_checkpoint(run / "checkpoints/step-00000009", straight / "checkpoints/step-00000009")
    assert trainer.stable_metrics(run) == trainer.stable_metrics(straight)


def test_resume_after_a_crash_skips_a_damaged_checkpoint(recipe, straight, capsys):
    run = recipe.parent / "runs" / "tiny"

    def crash():
        raise RuntimeError("power cut")

    with trainer.before_step(8, crash), pytest.raises(RuntimeError, match="power cut"):
        trainer.train(recipe)
    newest = run / "checkpoints/step-00000006"
    weights = next(newest.glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (run / "checkpoints/.tmp-step-00000009").mkdir()

    assert trainer.train(recipe) == 0
    out = capsys.readouterr().out
    assert f"checkpoint {newest} is damaged ({weights.name} does not match its sha256)" in out
    assert "at step 3 (exact)" in out
    trainer.assert_same_checkpoint(run / "checkpoints/step-00000009", straight / "checkpoints/step-00000009")
    assert trainer.stable_metrics(run) == trainer.stable_metrics(straight)
    assert not list((run / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("damage", ["cut", "file", "manifest"])
def test_find_damage_names_the_incomplete_file(straight, tmp_path, damage):
    copy = tmp_path / "step-00000009"
    subprocess.run(["cp", "-r", straight / "checkpoints/step-00000009", copy], check=True)
    assert checkpoint.find_damage(copy) is None
    damaged = copy / "manifest.json" if damage == "manifest" else next(copy.glob("*.distcp"))
    if damage == "cut":
        damaged.write_bytes(damaged.read_bytes()[:-1])
    else:
        damaged.unlink()
    assert damaged.name in str(checkpoint.find_damage(copy))


def test_run_without_a_good_checkpoint_is_an_error(recipe, capsys):
    with trainer.before_step(3, lambda: os.kill(os.getpid(), signal.SIGUSR1)):
        assert trainer.train(recipe) == 0
    for manifest in (recipe.parent / "runs/tiny/checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    assert trainer.train(recipe) == 1
    assert "none of the checkpoints" in capsys.readouterr().err


def test_finished_run_is_not_trained_again(straight, capsys):
    before = trainer.metrics(straight)
    recipe = straight.parent.parent / "tiny.yaml"
    assert trainer.train(recipe, "data.workers=1", "log.every=1") == 0
    out = capsys.readouterr().out
    assert "is finished: top1" in out and "tessel evaluate" in out and "run.fresh=true" in out
    assert "  import tessel.zoo, timm; timm.create_model('local-dir:" in out
    assert trainer.metrics(straight) == before


def test_resume_with_another_recipe_is_an_error(straight, capsys):
    recipe = straight.parent.parent / "tiny.yaml"
    assert trainer.train(recipe, "optim.lr=1e-4", "data.size=48") == 1
    error = capsys.readouterr().err
    for fragment in (
        "optim.lr (there 0.002, now 0.0001)",
        "data.size (there 32, now 48)",
        "run.fresh=true",
        "run.name",
    ):
        assert fragment in error


def test_fresh_moves_the_old_run_aside(recipe, capsys):
    runs = recipe.parent / "runs"
    for _ in range(3):
        with trainer.before_step(1):
            assert trainer.train(recipe, "run.fresh=true", "optim.lr=1e-4") == 0
    assert sorted(path.name for path in runs.iterdir()) == ["tiny", "tiny.old-1", "tiny.old-2"]
    assert all((run / "checkpoints/step-00000001/manifest.json").exists() for run in runs.iterdir())
    assert f"moved the old run to {runs / 'tiny.old-2'}" in capsys.readouterr().out


@pytest.mark.parametrize("background", ["false", "true"])
def test_failed_evaluation_loses_no_update(recipe, straight, monkeypatch, capsys, background):
    """The checkpoint is saved although its evaluation fails; the next start evaluates it once."""
    run, option = recipe.parent / "runs/tiny", f"ckpt.background={background}"

    def fail(*_, **__):
        raise UserError("images/val/0.png cannot be decoded")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "run_evaluation", fail)
        assert trainer.train(recipe, option) == 1
    assert "val/0.png" in capsys.readouterr().err
    assert checkpoint.find_damage(run / "checkpoints/step-00000003") is None
    for _ in range(2):
        with trainer.before_step(4, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
            trainer.train(recipe, option)
        assert f"resuming {run} at step 3 (exact)" in capsys.readouterr().out
        with open(run / "metrics.jsonl", "ab") as file:
            file.write(b"\xff\n{}\n")
    (run / "DONE").write_text("[1]")
    assert trainer.train(recipe, option) == 0
    trainer.assert_same_checkpoint(run / "checkpoints/step-00000009", straight / "checkpoints/step-00000009")
    assert trainer.stable_metrics(run) == trainer.stable_metrics(straight)


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_restart_by_torchrun_or_slurm_resumes_a_fresh_run(recipe, monkeypatch, capsys, count):
    """A restart has the same arguments, run.fresh=true too. The recipe in the run directory has run.fresh=false."""
    run = recipe.parent / "runs/tiny"
    for value, step in (("", 1), ("0", 1), ("1", 2)):
        monkeypatch.setenv(count, value)
        with trainer.before_step(step):
            assert trainer.train(recipe, "run.fresh=true", "ckpt.resume=never", "sched.steps=3") == 0
    assert f"resuming {run} at step 1 (exact)" in capsys.readouterr().out
    monkeypatch.delenv(count)
    assert not load_recipe(run / "recipe.yaml").run.fresh
    assert trainer.train(run / "recipe.yaml", "ckpt.resume=auto") == 0
    assert f"resuming {run} at step 2 (exact)" in capsys.readouterr().out
    assert sorted(path.name for path in run.parent.iterdir()) == ["tiny", "tiny.old-1"]


def test_resume_never_and_from_a_path(recipe, straight, capsys):
    source = straight / "checkpoints/step-00000009"
    assert trainer.train(recipe, "run.name=longer", f"ckpt.resume={source}", "sched.steps=10") == 0
    assert "at step 9" in (out := capsys.readouterr().out) and "with another recipe than that of the checkpoint" in out
    assert [record["step"] for record in trainer.metrics(recipe.parent / "runs/longer")] == [10, 10]

    assert trainer.train(recipe, "run.name=none", f"ckpt.resume={source}") == 1
    assert "is of step 9, but this run ends at step 9" in capsys.readouterr().err
    assert trainer.train(recipe, "run.name=none", f"ckpt.resume={recipe.parent}", "sched.steps=10") == 1
    assert "cannot be used" in capsys.readouterr().err
    with trainer.before_step(1):
        assert trainer.train(recipe, "ckpt.resume=never") == 0
    assert trainer.train(recipe, "ckpt.resume=never") == 1
    assert "ckpt.resume=never" in capsys.readouterr().err


def test_kept_checkpoints_are_the_last_and_the_best(straight):
    evaluations = [record for record in trainer.metrics(straight) if record["kind"] == "eval"]
    best = max(evaluations, key=lambda record: record["top1"])["step"]
    kept = {int(path.name.split("-")[1]) for path in (straight / "checkpoints").glob("step-*")}
    assert kept == {best, 6, 9}


def test_metrics_have_the_documented_fields(straight):
    steps = {"train": [2, 4, 6, 8, 9], "eval": [3, 6, 9]}
    fields = {
        "train": "epoch loss lr grad_norm images_per_second data_wait step_seconds tflops memory_gb",
        "eval": "epoch top1 loss count",  # three classes, hence no top5
    }
    for kind in steps:
        records = [record for record in trainer.metrics(straight) if record["kind"] == kind]
        assert [record["step"] for record in records] == steps[kind]
        assert all(set(record) == {"kind", "step", "time", *fields[kind].split()} for record in records)
    assert all(record["images_per_second"] > 0 for record in trainer.metrics(straight) if record["kind"] == "train")


def test_finished_run_can_be_loaded(straight):
    recipe, model = evaluate.load_run(straight)
    assert recipe == load_recipe(straight / "recipe.yaml") and not model.training
    done = json.loads((straight / "DONE").read_text())
    metrics = json.loads((straight / "evaluation/evaluation.json").read_text())
    assert done == metrics and done["step"] == 9 and done["count"] == 15
    state = trainer.tensors(straight / "checkpoints/step-00000009")
    for name, tensor in model.state_dict().items():  # the export holds the averaged weights
        assert torch.equal(tensor, state[f"ema.{name}"]), name
    assert model.pretrained_cfg["label_names"] == ["class_0", "class_1", "class_2"]


def test_evaluation_of_run_and_checkpoint(straight, capsys):
    last = [record for record in trainer.metrics(straight) if record["kind"] == "eval"][-1]
    for target in (straight, straight / "checkpoints/step-00000009"):
        assert evaluate.main([str(target), "--data", "eval_batch=4"]) == 0
        assert f"top1 {last['top1']:.2f}" in capsys.readouterr().out
        metrics = json.loads((straight / "evaluation/evaluation.json").read_text())
        assert metrics["loss"] == pytest.approx(last["loss"], abs=1e-6) and metrics["step"] == 9
        arrays = np.load(straight / "evaluation/predictions.npz")
        assert arrays["target"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
        assert arrays["probability"].shape == (15, 3) and np.allclose(arrays["probability"].sum(1), 1)
        assert (arrays["prediction"] == arrays["probability"].argmax(1)).all()
        assert 100 * (arrays["prediction"] == arrays["target"]).mean() == pytest.approx(last["top1"])


def test_evaluation_records_overrides_and_refuses_other_classes(straight, tmp_path, capsys):
    run = shutil.copytree(straight, tmp_path / "run")
    other = trainer.draw_folder(tmp_path / "other", train=2, val=3)
    shutil.rmtree(other / "train")  # an evaluation needs no training data
    assert evaluate.main([str(run), f"data.root={other}", "data.eval_batch=4"]) == 0
    metrics = json.loads((run / "evaluation/evaluation.json").read_text())
    assert metrics["count"] == 9 and metrics["overrides"] == [f"data.root={other}"]
    assert evaluate.main([str(run), "--weights", "some.pth"]) == 1
    assert "--weights has no effect" in capsys.readouterr().err
    (other / "val/class_1").rename(other / "val/class_1b")
    for target in (run, run / "checkpoints/step-00000009"):
        assert evaluate.main([str(target), "--data", f"root={other}"]) == 1
        error = capsys.readouterr().err
        assert "class 1 is class_1b, in training class_1" in error and error.count("\n") == 1
    shutil.rmtree(other / "val/class_1b")
    assert evaluate.main([str(run), "--data", f"root={other}"]) == 1
    assert "class 1 is class_2, in training class_1" in capsys.readouterr().err
    assert json.loads((run / "evaluation/evaluation.json").read_text()) == metrics


def test_splits_with_different_classes_are_an_error(recipe, tmp_path, capsys):
    other = trainer.draw_folder(tmp_path / "other", train=8, val=3)
    (other / "val/class_1").rename(other / "val/class_1b")
    assert trainer.train(recipe, f"data.root={other}") == 1
    assert f"splits of {other} have different classes: class_1, class_1b" in capsys.readouterr().err
    assert not (recipe.parent / "runs").exists()


def test_dry_run_writes_nothing(recipe, capsys):
    assert trainer.train(recipe, "--dry-run") == 0
    out = capsys.readouterr().out
    for fragment in ("0.10 M parameters", "GFLOP", "36 images, 9 steps of 8", "lr 0.002, rule none", "loss"):
        assert fragment in out
    assert not (recipe.parent / "runs").exists()


def test_bf16_grad_checkpointing_and_channels_last_train(recipe):
    switches = ["parallel.precision=bf16", "parallel.channels_last=true", "parallel.grad_checkpointing=true"]
    losses = ["task.loss=bce", "task.smoothing=0.1", "optim.name=lamb", "optim.clip_mode=agc", "sched.name=poly"]
    assert trainer.train(recipe, "sched.steps=3", *switches, *losses) == 0
    timm.create_model(f"local-dir:{recipe.parent / 'runs/tiny/export'}", pretrained=True)


def torchrun(recipe: Path, *overrides: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "tessel.train", str(recipe), *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_two_processes_learn_the_same(recipe):
    """The model has no batch statistics; drop path, mixing and augmentation depend on the micro-batch, not the rank."""
    shared = ["model.name=test_convnext", "sched.steps=4", "ckpt.every=4", "eval.every=2", "log.every=1"]
    done = torchrun(recipe, *shared, "run.name=two")
    assert done.returncode == 0, done.stderr
    assert "Grad strides" not in done.stderr
    assert trainer.train(recipe, *shared, "run.name=one") == 0
    one, two = (trainer.metrics(recipe.parent / "runs" / name) for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for left, right in zip(one, two, strict=True):
        assert left["kind"] == right["kind"] and left.get("count") == right.get("count")
        for key in left.keys() & {"loss", "grad_norm", "top1", "top5"}:
            assert right[key] == pytest.approx(left[key], abs=1e-5, rel=1e-5), key
    states = [trainer.tensors(recipe.parent / f"runs/{name}/checkpoints/step-00000004") for name in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_signal_to_torchrun_and_resume_on_another_number_of_processes(recipe):
    """Two processes are preempted, one resumes. The signal reaches the whole process group, loader workers included."""
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tessel.train"]
    overrides = ["sched.steps=2000", "data.workers=1", "log.every=1"]
    command = [sys.executable, *arguments, str(recipe), *overrides]
    run = recipe.parent / "runs/tiny"
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step 4/"):
            os.killpg(process.pid, signal.SIGTERM)
            break
    process.communicate(timeout=120)
    stopped = json.loads((run / "PREEMPTED").read_text())["step"]
    assert 4 <= stopped < 2000 and checkpoint.find_damage(run / f"checkpoints/step-{stopped:08d}") is None
    single = subprocess.Popen(
        [sys.executable, "-m", "tessel.train", str(recipe), *overrides], stdout=subprocess.PIPE, text=True
    )
    assert single.stdout
    lines = []
    for line in single.stdout:
        lines.append(line)
        if line.startswith(f"step {stopped + 2}/"):
            single.send_signal(signal.SIGINT)
            break
    single.communicate(timeout=120)
    assert single.returncode == 0 and "not bitwise: processes was 2, now 1" in "".join(lines)
    assert json.loads((run / "PREEMPTED").read_text())["step"] >= stopped + 2


@pytest.mark.slow
def test_resume_is_exact_on_two_processes(recipe, images):
    shared = ["ckpt.every=3", "model.name=test_efficientnet"]
    assert torchrun(recipe, *shared, "run.name=straight").returncode == 0
    assert torchrun(recipe, *shared, "run.name=broken").returncode == 0
    runs = recipe.parent / "runs"
    for marker in ("DONE", "checkpoints/step-00000009/manifest.json"):
        (runs / "broken" / marker).unlink()
    done = torchrun(recipe, *shared, "run.name=broken")
    assert done.returncode == 0 and "at step 6 (exact)" in done.stdout, done.stderr
    trainer.assert_same_checkpoint(*(runs / name / "checkpoints/step-00000009" for name in ("straight", "broken")))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_model_trains_and_exports(recipe, monkeypatch):
    """With the backend "eager", because compiling with inductor takes minutes and only tests torch."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled(self, backend="eager"))
    overrides = ["parallel.compile=true", "sched.steps=3", "model.name=test_resnet", "model.drop_path_rate=null"]
    assert trainer.train(recipe, *overrides) == 0
    timm.create_model(f"local-dir:{recipe.parent / 'runs/tiny/export'}", pretrained=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", ["offline", "auto"])
def test_tensorboard_and_offline_wandb(recipe, monkeypatch, capsys, mode):
    """Without account and network. Both starts of the run get the same wandb id, so that a later sync merges them."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "NETRC", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(recipe.parent / "nobody"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    options = ["log.every=1", "log.tensorboard=true", f"log.wandb={mode}"]
    with trainer.before_step(2):
        assert trainer.train(recipe, *options) == 0
    assert trainer.train(recipe, *options) == 0
    out, run = capsys.readouterr().out, recipe.parent / "runs/tiny"
    assert "at step 2 (exact)" in out and "warning" not in out
    assert list(run.glob("tensorboard/events.*"))
    name = (run / "wandb-id").read_text()
    records = sorted(run.glob(f"wandb/offline-run-*-{name}*/run-{name}.wandb"))
    assert len(records) == len(list(run.glob("wandb/offline-run-*"))) == 2


def test_non_finite_metrics_are_null_in_json_and_do_not_stop_tensorboard(tmp_path):
    """Such values occur when half precision skips an update because its gradients overflow."""
    record = {"kind": "train", "step": 3, "loss": 0.5, "grad_norm": math.inf, "loss_box": math.nan}
    for sink in (loggers.JsonlLogger(tmp_path / "metrics.jsonl"), loggers.TensorBoardLogger(tmp_path / "tensorboard")):
        sink.log(record)
        sink.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record | {"grad_norm": None, "loss_box": None}


def test_logger_that_fails_to_start_is_a_warning(recipe, monkeypatch, capsys):
    def fail(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(loggers, "WandbLogger", fail)
    assert trainer.train(recipe, "sched.steps=3", "log.wandb=auto") == 0
    assert "warning: log.wandb is left out, it did not start: no network" in capsys.readouterr().out


def test_progress_bar(recipe, capsys):
    assert trainer.train(recipe, "sched.steps=4", "log.progress=bar") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("4/4", "images/s", "s a step", "data wait", "GB", "top1"))
    # evaluations stay above the bar
    assert "step 3/4  evaluation: top1" in out and "step 4/4  evaluation: top1" in out
