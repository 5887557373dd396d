"""Who hangs is not waited for without end: one message with what to do, and the last checkpoint is good."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import trainer
from torch import distributed as dist

from tessel.train.data.loader import Loader, SeededDataset
from tessel.train.distributed.world import translate_error
from tessel.train.errors import LocalRankError, UserError
from tessel.train.run.checkpoint import find_damage
from tessel.train.tasks import base as tasks

TINY = {"model": {"name": "test_resnet", "drop_path_rate": None}, "data": {"source": "digits", "micro_batch": 4}}


class Slow:
    """Images of which number `hung` never comes."""

    def __init__(self, hung):
        self.hung = hung

    def __getitem__(self, index):
        while index == self.hung:
            time.sleep(60)
        return torch.full((1,), float(index)), 0


def messages(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_process_is_told_by_the_one_left(tmp_path, rank):
    """One of two processes is stopped in step 2; it holds the lock of the run until it is killed."""
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", **TINY)
    options = [recipe, "ckpt.every=1", f"ckpt.background={str(rank == 1).lower()}", "guard.timeout=5"]
    done = trainer.on_processes(2, [f"@{rank}:2:SIGSTOP", *options])
    codes = [1, 1]
    codes[rank] = -signal.SIGKILL
    assert trainer.exit_codes(done) == [codes], done.stdout + done.stderr
    told = messages(done.stderr)
    assert len(told) == 1 and "has not answered for 10 s" in told[0] and "guard.timeout" in told[0], done.stderr
    assert "the same command goes on" in told[0] and "Traceback" not in done.stderr
    kept = sorted((tmp_path / "runs/tiny/checkpoints").glob("step-*"))
    # in the background, that of step 2 was still being written
    assert kept[-1].name == f"step-0000000{2 - rank}" and not any(map(find_damage, kept))


def test_missing_process_is_not_waited_for(monkeypatch, tmp_path, capsys):
    """Of two processes only the first has started."""
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", **TINY)
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert trainer.train(recipe, "guard.timeout=0.5") == 1
    (told,) = messages(capsys.readouterr().err)
    assert "another process of this run has not answered for 1 s" in told and not dist.is_initialized()


def test_hung_loader_process_is_told(tmp_path, monkeypatch, capsys):
    """Its processes are gone at the end, and the run goes on with others."""
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", **TINY)
    image, parent, victims = SeededDataset.__getitem__, os.getpid(), []

    def hooked(self, key):
        while os.getpid() != parent and key in victims:
            time.sleep(60)
        return image(self, key)

    task = tasks.DatasetTask.train_batches

    def choose(self, plan, step):
        victims[:] = [self.sample_keys(plan, 3)[0]]
        return task(self, plan, step)

    with monkeypatch.context() as patch:
        patch.setattr(SeededDataset, "__getitem__", hooked)
        patch.setattr(tasks.DatasetTask, "train_batches", choose)
        assert trainer.train(recipe, "ckpt.every=1", "data.workers=2", "guard.timeout=5") == 1
    (told,) = messages(capsys.readouterr().err)
    assert "no batch came within 5 s" in told and "data.root" in told and "guard.timeout" in told
    assert find_damage(tmp_path / "runs/tiny/checkpoints/step-00000003") is None
    assert trainer.train(recipe, "ckpt.every=9") == 0
    assert "at step 3 (exact)" in capsys.readouterr().out


def test_close_ends_processes_that_hang():
    loader = Loader(
        SeededDataset(Slow(2), lambda image, target: (image, target), 0),
        [[(0, 1)], [(0, 2)]],
        workers=2,
        prefetch=2,
        pin=False,
        timeout=3,
    )
    assert next(loader)[0].item() == 1
    workers = loader.batches._workers
    os.kill(workers[0].pid, signal.SIGSTOP)
    with pytest.raises(UserError, match="no batch came within 3 s"):
        next(loader)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 10 and not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 8000ms for recv operation to complete", "8 s"),
        ("[gloo/transport/tcp/pair.cc:534] Application timeout caused pair closure", "has not answered for 8 s"),
        ("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1", "is gone"),
    ],
)
def test_what_torch_says_is_told_in_words(text, fragment):
    found = translate_error(RuntimeError(text), timedelta(seconds=8))
    assert isinstance(found, LocalRankError) and fragment in str(found)
    assert translate_error(RuntimeError("shape mismatch"), timedelta(seconds=8)) is None
