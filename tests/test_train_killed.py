"""A run that is killed with SIGKILL at any instant loses only the steps since its last checkpoint."""

import json
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import trainer
from killing import INSTANTS, PLACES

from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.recipe.load import load_recipe, make_recipe
from tessel.train.run.checkpoint import Checkpoints, find_damage
from tessel.train.run.directory import RunDirectory

DIGITS = {"model": {"name": "test_resnet", "drop_path_rate": None}, "data": {"source": "digits"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "strategy", "number"),
    [("classify", "ddp", 25), ("classify", "fsdp", 8), ("segment", "ddp", 8), ("detect", "ddp", 8)],
)
def test_killed_runs_resume_with_the_same_result(tmp_path, task, strategy, number):
    """8 kills cover every instant once; 25 cover it with foreground and with background saving."""
    steps = number + 5
    recipe = trainer.write_recipe(
        tmp_path / "tiny.yaml",
        **trainer.SCENES.get(task, DIGITS),
        sched={"steps": steps},
        ckpt={"every": 1},
        eval={"every": steps},
        parallel={"strategy": strategy},
    )
    done = trainer.run_processes(2, [recipe, "run.name=straight", f"ckpt.every={steps}"])
    assert trainer.exit_codes(done) == [[0, 0]], done.stderr
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), str(number), str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    kills = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert kills.pop() == {"codes": [0, 0], "step": steps, "broken": []}
    assert len(kills) == number and {kill["instant"] for kill in kills} == set(INSTANTS)
    ways = {(kill["instant"], kill["background"]) for kill in kills}
    assert len(ways) == min(number, 2 * len(INSTANTS))
    for kill in kills:
        # the process that was not killed notices and exits with 1
        assert kill["codes"] == [-signal.SIGKILL if rank in kill["killed"] else 1 for rank in range(2)], kill
        assert not kill["broken"] and kill["before"] <= kill["step"] <= kill["before"] + 2, kill
        if kill["instant"] in PLACES[:3]:
            # rank 0, if it was not killed, removes the partial checkpoint
            assert kill["step"] == kill["before"] and kill["partial"] == (0 in kill["killed"]), kill
        elif kill["instant"] == "prune":
            assert kill["step"] == kill["before"] + 1, kill
    assert all(one["step"] == other["before"] for one, other in pairwise(kills))
    resumed = [int(step) for step in re.findall(r"resuming \S+ at step (\d+) \(exact\)", done.stdout)]
    assert resumed == sorted(resumed) and resumed[-1] == kills[-1]["step"] and "is broken" not in done.stdout
    runs = tmp_path / "runs"
    assert not list((runs / "tiny/checkpoints").glob(".tmp-*"))
    paths = (runs / f"{name}/checkpoints/step-{steps:08d}" for name in ("straight", "tiny"))
    trainer.assert_same_checkpoint(*paths)
    # the metrics of a step do not depend on the start that logged them
    assert trainer.stable_metrics(runs / "tiny") == trainer.stable_metrics(runs / "straight")


RECIPE = {"model": {"name": "test_resnet"}, "data": {"source": "digits"}, "sched": {"steps": 9}}


def save(checkpoints, step, last):
    checkpoints.save({"weight": torch.full((2,), float(step))}, {"step": step, "recipe": RECIPE}, best=0, last=last)


def newest(checkpoints):
    return checkpoints.newest(make_recipe(RECIPE, source="test"))


def test_damaged_newer_checkpoint_is_pruned_before_a_good_one(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, World(), print)
    for step in (3, 6):
        save(checkpoints, step, last=2)
    (tmp_path / "step-00000006/manifest.json").unlink()
    resumed = Checkpoints(tmp_path, World(), print)
    assert newest(resumed) == tmp_path / "step-00000003"
    save(resumed, 4, last=1)
    assert newest(resumed) == tmp_path / "step-00000004" and "using the one before" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004"]


def test_failed_rename_leaves_no_partial_checkpoint(tmp_path, monkeypatch):
    rename = os.replace

    def fail_for_folders(source, target):
        if Path(source).is_dir():
            raise OSError("not today")
        rename(source, target)

    save(Checkpoints(tmp_path, World(), print), 1, last=2)
    monkeypatch.setattr(os, "replace", fail_for_folders)
    with pytest.raises(UserError, match="step 2 cannot be written.*not today"):
        save(Checkpoints(tmp_path, World(), print), 2, last=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] and not find_damage(
        tmp_path / "step-00000001"
    )


def test_files_and_links_in_the_checkpoint_folder_do_not_block_saving(tmp_path):
    for step in (1, 9):
        (tmp_path / f"step-0000000{step}").touch()
    (tmp_path / ".tmp-left").symlink_to(tmp_path)
    save(Checkpoints(tmp_path, World(), print), 1, last=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] and not find_damage(
        tmp_path / "step-00000001"
    )


def test_files_of_a_killed_start_are_not_used(tmp_path):
    """Each start saves to its own temporary directory, in case a process of an earlier start still runs."""
    old, new = (Checkpoints(tmp_path, World(), print) for _ in range(2))
    assert old.temporary(1) != new.temporary(1) and old.at(1) == new.at(1)
    old.temporary(1).mkdir()
    (old.temporary(1) / "__1_0.distcp").write_bytes(b"half")
    save(new, 1, last=2)
    assert not find_damage(new.at(1)) and not old.temporary(1).exists()


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".recipe.yaml.part"]])
def test_directory_of_a_start_killed_early_can_be_used(tmp_path, left):
    """A start that was killed before it wrote its recipe leaves a directory that a new start uses."""
    recipe = load_recipe(trainer.write_recipe(tmp_path / "tiny.yaml", data={"source": "digits"}))
    (run := tmp_path / "runs/tiny").mkdir(parents=True)
    for name in left:
        (run / name).touch()
    assert not RunDirectory(recipe).check()


def test_recipe_is_written_before_anything_else(tmp_path, monkeypatch):
    recipe = load_recipe(trainer.write_recipe(tmp_path / "tiny.yaml", data={"source": "digits"}))
    monkeypatch.setattr("tessel.train.run.directory.write_atomically", lambda path, text: 1 / 0)
    with RunDirectory(recipe).held() as run, pytest.raises(ZeroDivisionError):
        run.open()
    assert not run.check() and not run.checkpoints.exists()
