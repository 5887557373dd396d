"""The lock of a run directory: a second trainer is refused with the process id of the first, until that ends."""

import os
import subprocess
import sys

import pytest
import trainer

from tessel.train.errors import UserError
from tessel.train.recipe.load import load_recipe
from tessel.train.run.directory import RunDirectory

HOLD = """
import sys
from tessel.train.recipe.load import load_recipe
from tessel.train.run.directory import RunDirectory
with RunDirectory(load_recipe(sys.argv[1])).held() as run:
    run.open()
    if not (child := __import__("os").fork()):
        __import__("time").sleep(60)
    print(child, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def recipe(tmp_path):
    return trainer.write_recipe(tmp_path / "tiny.yaml", data={"source": "digits"})


@pytest.fixture
def holder(recipe):
    """Another process that holds the lock of the run, and the id of its child, which stands for a loader worker."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(recipe)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        os.kill(child, 9)  # first, because it keeps the pipe open
        process.kill()
        process.communicate()


def test_second_trainer_is_refused_until_the_first_is_killed(recipe, holder, capsys):
    process, child = holder
    before = sorted((recipe.parent / "runs/tiny").rglob("*"))
    for override in ("run.seed=0", "run.fresh=true"):
        assert trainer.train(recipe, override) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"is being trained by process {process.pid} on " in error, error
        assert "another run.name" in error
    assert sorted((recipe.parent / "runs/tiny").rglob("*")) == before

    process.kill()
    process.wait()
    os.kill(child, 0)  # the worker still runs and does not keep the lock
    with RunDirectory(load_recipe(recipe)).held() as run:
        run.open()


def test_lock_is_released_at_the_end_and_moves_with_a_fresh_run(recipe):
    for _ in range(2):
        with RunDirectory(load_recipe(recipe, ["run.fresh=true"])).held() as run:
            run.open()
            assert f"process {os.getpid()} on " in (run.path / ".lock").read_text()
            assert not run.check()
    assert sorted(path.name for path in run.path.parent.iterdir()) == ["tiny", "tiny.old-1"]


def test_a_run_started_by_another_process_is_detected(recipe):
    late = RunDirectory(load_recipe(recipe, ["optim.lr=1"]))
    assert not late.check()
    with RunDirectory(load_recipe(recipe)).held() as run:
        run.open()
        (run.checkpoints / "step-00000001").mkdir()
    with late.held(), pytest.raises(UserError, match="started with another recipe: optim.lr"):
        late.open()
