"""Background saving: checkpoints equal those of the foreground, are complete or absent, are written one at a time."""

import errno
import os
import threading
import time

import pytest
import torch
import trainer
from torch.distributed.checkpoint.staging import DefaultStager

from tessel.train.distributed.world import World
from tessel.train.engine import Engine
from tessel.train.run import checkpoint
from tessel.train.run.checkpoint import Checkpoints, find_damage

TINY = {"model": {"name": "test_resnet", "drop_path_rate": None}, "data": {"source": "digits", "micro_batch": 8}}


@pytest.fixture
def recipe(tmp_path):
    return trainer.write_recipe(tmp_path / "tiny.yaml", **TINY, sched={"steps": 4}, ckpt={"every": 1, "keep_last": 4})


def test_background_and_foreground_checkpoints_are_equal(recipe):
    assert trainer.train(recipe, "run.name=fore") == 0
    assert trainer.train(recipe, "run.name=back", "ckpt.background=true") == 0
    runs = recipe.parent / "runs"
    for step in range(1, 5):
        trainer.assert_same_checkpoint(*(runs / f"{name}/checkpoints/step-{step:08d}" for name in ("fore", "back")))


def test_save_copies_at_once_and_waits_for_the_previous_write(tmp_path, monkeypatch):
    """The training continues while a checkpoint is written; the next save waits for that write."""
    may_write, save, writing = threading.Event(), checkpoint.dcp.save, []

    def slow(state, **kwargs):
        writing.append(kwargs["checkpoint_id"].name)
        assert may_write.wait(20) and len(writing) <= 2
        save(state, **kwargs)
        writing.pop(0)

    monkeypatch.setattr(checkpoint.dcp, "save", slow)
    checkpoints = Checkpoints(tmp_path, World(), print, background=True)
    weight = torch.zeros(3)
    checkpoints.save({"weight": weight}, {"step": 1}, best=0, last=2)
    weight += 1
    assert not list(tmp_path.glob("step-*"))
    threading.Timer(0.5, may_write.set).start()
    checkpoints.save({"weight": weight}, {"step": 2}, best=0, last=2)
    assert find_damage(tmp_path / "step-00000001") is None
    weight += 1
    checkpoints.wait()
    checkpoints.close()
    assert [trainer.tensors(tmp_path / f"step-0000000{step}")["weight"][0].item() for step in (1, 2)] == [0, 1]


def test_only_one_copy_of_the_state_exists_at_a_time(tmp_path, monkeypatch):
    """However slow the writing is, no copy is taken while another one waits to be written."""
    copies, counts = [], []
    write, stage = Checkpoints._write, DefaultStager.stage

    def counted(self, state):
        copies.append(state)
        counts.append(len(copies))
        return stage(self, state)

    def slow(self, *arguments):
        time.sleep(0.2)
        try:
            return write(self, *arguments)
        finally:
            copies.pop()

    monkeypatch.setattr(DefaultStager, "stage", counted)
    monkeypatch.setattr(Checkpoints, "_write", slow)
    checkpoints = Checkpoints(tmp_path, World(), print, background=True)
    for step in range(1, 6):
        checkpoints.save({"weight": torch.full((3,), float(step))}, {"step": step}, best=0, last=5)
    checkpoints.wait()
    checkpoints.close()
    assert counts == [1] * 5 and not copies
    for step in range(1, 6):
        path = tmp_path / f"step-{step:08d}"
        assert find_damage(path) is None and trainer.tensors(path)["weight"].tolist() == [step] * 3


def test_full_disk_in_the_background_is_an_error(recipe, monkeypatch, capsys):
    publish = Checkpoints._publish

    def full(self, part, facts):
        if facts["step"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(self, part, facts)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_publish", full)
        assert trainer.train(recipe, "ckpt.background=true") == 1
    error = capsys.readouterr().err
    assert "step 2 cannot be written" in error and "No space left on device" in error and error.count("\n") == 1
    path = recipe.parent / "runs/tiny/checkpoints"
    assert [entry.name for entry in path.iterdir()] == ["step-00000001"]
    assert trainer.train(recipe, "ckpt.background=true") == 0
    assert "at step 1 (exact)" in capsys.readouterr().out


def test_signal_waits_for_the_background_write(recipe, monkeypatch):
    step = Engine.step

    def hooked(self):
        self.signals.raised = self.progress.step == 2
        return step(self)

    monkeypatch.setattr(Engine, "step", hooked)
    assert trainer.train(recipe, "ckpt.background=true") == 0
    run = recipe.parent / "runs/tiny"
    assert (run / "PREEMPTED").exists() and find_damage(run / "checkpoints/step-00000002") is None


@pytest.mark.slow
def test_background_saving_with_ddp_and_fsdp(recipe):
    recipe = trainer.write_recipe(recipe, **TINY | {"data": {"source": "digits", "micro_batch": 4}})
    ways = {"ddp": [], "fsdp": ["parallel.strategy=fsdp"]}
    runs = [
        [
            recipe,
            *way,
            f"run.name={name}-{background}",
            f"ckpt.background={background}",
            "sched.steps=4",
            "ckpt.every=1",
        ]
        for name, way in ways.items()
        for background in ("true", "false")
    ]
    done = trainer.run_processes(2, *runs)
    assert trainer.exit_codes(done) == [[0, 0]] * 4, done.stdout + done.stderr
    for name in ways:
        paths = (recipe.parent / f"runs/{name}-{on}/checkpoints/step-00000004" for on in ("true", "false"))
        trainer.assert_same_checkpoint(*paths)
