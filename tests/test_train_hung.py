"""A process or loader worker that hangs ends the run: one message with the remedy, and the last checkpoint is good."""

import multiprocessing
import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
import trainer
from torch import distributed as dist

from tessel.train.data.loader import Loader, SeededDataset
from tessel.train.data.mask_files import read_mask_file
from tessel.train.data.segmentation import read_mask
from tessel.train.data.sources.folder import ImageFolder
from tessel.train.distributed.world import translate_error
from tessel.train.errors import LocalRankError, UserError
from tessel.train.run.checkpoint import find_damage
from tessel.train.tasks import base as tasks

TINY = {"model": {"name": "test_resnet", "drop_path_rate": None}, "data": {"source": "digits", "micro_batch": 4}}


class Slow:
    """A dataset whose sample number `hung` never returns."""

    def __init__(self, hung):
        self.hung = hung

    def __getitem__(self, index):
        while index == self.hung:
            time.sleep(60)
        return torch.full((1,), float(index)), 0


def messages(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_process_is_reported_by_the_other(tmp_path, rank):
    """One of two processes is stopped in step 2; it holds the lock of the run until it is killed."""
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", **TINY)
    options = [recipe, "ckpt.every=1", f"ckpt.background={str(rank == 1).lower()}", "guard.timeout=5"]
    done = trainer.run_processes(2, [f"@{rank}:2:SIGSTOP", *options])
    codes = [1, 1]
    codes[rank] = -signal.SIGKILL
    assert trainer.exit_codes(done) == [codes], done.stdout + done.stderr
    printed = messages(done.stderr)
    assert len(printed) == 1 and "has not answered for 10 s" in printed[0] and "guard.timeout" in printed[0], (
        done.stderr
    )
    assert "the same command continues" in printed[0] and "Traceback" not in done.stderr
    kept = sorted((tmp_path / "runs/tiny/checkpoints").glob("step-*"))
    # with background saving, the checkpoint of step 2 was still being written
    assert kept[-1].name == f"step-0000000{2 - rank}" and not any(map(find_damage, kept))


def test_waiting_for_a_missing_process_times_out(monkeypatch, tmp_path, capsys):
    """Only the first of two processes has started."""
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", **TINY)
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert trainer.train(recipe, "guard.timeout=0.5") == 1
    (message,) = messages(capsys.readouterr().err)
    assert "another process of this run has not answered for 1 s" in message and not dist.is_initialized()


def test_hung_loader_worker_is_reported(tmp_path, monkeypatch, capsys):
    """The same command then continues the run."""
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
    (message,) = messages(capsys.readouterr().err)
    assert "within 5 s" in message and "data.root" in message and "guard.timeout" in message
    assert find_damage(tmp_path / "runs/tiny/checkpoints/step-00000003") is None
    assert trainer.train(recipe, "ckpt.every=9") == 0
    assert "at step 3 (exact)" in capsys.readouterr().out


def test_close_ends_hung_workers():
    loader = Loader(
        SeededDataset(Slow(2), lambda image, target: (image, target), 0),
        [[(0, 1)], [(0, 2)]],
        workers=2,
        prefetch=2,
        pin=False,
        timeout=3,
    )
    assert next(loader)[0].item() == 1
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    with pytest.raises(UserError, match="no batch .* within 3 s"):
        next(loader)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 10 and not any(worker.is_alive() for worker in workers)


class Bulky:
    """Samples whose tensors a worker passes by file descriptors, which it must hand over itself."""

    def __getitem__(self, index):
        return torch.zeros(1000), 0


def test_frozen_worker_is_reported():
    """SIGSTOP in the transfer of a batch, which torch's own timeout does not cover."""
    dataset = SeededDataset(Bulky(), lambda image, target: (image, target), 0)
    loader = Loader(dataset, [[(0, n)] for n in range(99)], workers=1, prefetch=4, pin=False, timeout=2)
    next(loader)
    (worker,) = loader.workers
    time.sleep(0.5)  # the next batches wait in the queue
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match="no batch .* within 2 s"):
        list(loader)
    loader.close()
    assert not worker.is_alive()


def test_killed_worker_raises_only_where_a_batch_is_awaited():
    """And not while a checkpoint is written, which would be told as a full disk."""
    dataset = SeededDataset(Bulky(), lambda image, target: (image, target), 0)
    loader = Loader(dataset, [[(0, n)] for n in range(99)], workers=1, prefetch=2, pin=False)
    next(loader)
    os.kill(loader.workers[0].pid, signal.SIGKILL)
    for _ in range(20):
        time.sleep(0.02)  # torch's handler of SIGCHLD would raise here
    with pytest.raises(UserError, match="a loader process died"):
        list(loader)
    loader.close()


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_files_that_never_answer_are_refused(tmp_path, kind, monkeypatch):
    root = trainer.draw_folder(tmp_path / "images")
    file = root / "train/class_0/0.png"
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as own:
            monkeypatch.chdir(file.parent)  # the path of a socket has at most 108 letters
            own.bind(file.name)
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"0.png cannot be decoded \(it is no regular file\)"):
        ImageFolder(root / "train")[0]
    for read in (read_mask, read_mask_file):
        with pytest.raises(UserError, match="no regular file"):
            read(str(file))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 8000ms for recv operation to complete", "8 s"),
        ("[gloo/transport/tcp/pair.cc:534] Application timeout caused pair closure", "has not answered for 8 s"),
        ("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1", "is gone"),
    ],
)
def test_errors_of_torch_are_translated(text, fragment):
    found = translate_error(RuntimeError(text), timedelta(seconds=8))
    assert isinstance(found, LocalRankError) and fragment in str(found)
    assert translate_error(RuntimeError("shape mismatch"), timedelta(seconds=8)) is None
