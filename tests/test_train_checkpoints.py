"""Damaged checkpoints: every damage is detected, the file is named, and the previous checkpoint is used."""

import dataclasses
import gc
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import trainer

from tessel.train import evaluate
from tessel.train.distributed.world import World
from tessel.train.engine import Engine
from tessel.train.errors import UserError
from tessel.train.recipe.load import as_dict, load_recipe
from tessel.train.recipe.schema import Recipe
from tessel.train.run import checkpoint
from tessel.train.run.checkpoint import Checkpoints, find_damage

TINY = {"model": {"name": "test_resnet", "drop_path_rate": None}, "data": {"source": "digits", "micro_batch": 8}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with checkpoints of steps 2 and 3."""
    recipe = trainer.write_recipe(
        tmp_path_factory.mktemp("run") / "tiny.yaml", **TINY, sched={"steps": 3, "warmup": 0}, eval={"every": 3}
    )
    assert trainer.train(recipe, "ckpt.every=1") == 0
    return recipe.parent / "runs/tiny"


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the checkpoints that may be damaged: their folder, the newest one, and their recipe."""
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    choose_newest = tmp_path / "checkpoints/step-00000003"
    return tmp_path / "checkpoints", choose_newest, load_recipe(run / "recipe.yaml")


def choose_newest(path: Path, recipe: Recipe) -> tuple[Path | None, str]:
    """The checkpoint that a resume uses, and what is logged about the others."""
    logged: list[str] = []
    return Checkpoints(path, World(), logged.append).newest(recipe), "\n".join(logged)


def damage(file: Path, other: Path, rng: random.Random) -> str:
    """Damage `file` in a random way, as disks and people do. Returns the kind of damage."""
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    kind = rng.choice(["cut", "bit", "zeros", "longer", "gone", "foreign", "folder", "swapped"])
    if kind == "cut":
        del content[at:]
    elif kind == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    elif kind == "longer":
        content += b"\0" * rng.randrange(1, 99)
    elif kind == "foreign":
        content = bytearray(other.read_bytes())
    elif kind == "swapped":
        content[at : at + 8] = reversed(content[at : at + 8])
    if kind in ("gone", "folder"):
        file.unlink()
    else:
        file.write_bytes(content)
    if kind == "folder":
        file.mkdir()
    return kind


@pytest.mark.slow
def test_every_kind_of_damage_is_detected(copied):
    """200 random damages. A change that keeps every byte of a file, or the content of the manifest, is no damage."""
    path, latest, recipe = copied
    other, rng, seen = path / "step-00000002", random.Random(0), set()
    keep = path.parent / "kept"
    shutil.copytree(latest, keep)
    facts = checkpoint.read_manifest(latest)
    for number in range(200):
        file = rng.choice(sorted(latest.iterdir()))
        before = file.read_bytes()
        kind = damage(file, other / file.name, rng)
        unchanged = file.is_file() and file.read_bytes() == before
        if not unchanged and file.name == checkpoint.MANIFEST and file.is_file():
            unchanged = find_damage(latest) is None and checkpoint.read_manifest(latest) == facts
        problem = find_damage(latest)
        assert unchanged == (problem is None), (number, kind, file.name, problem)
        if not unchanged:
            found, logged = choose_newest(path, recipe)
            # with the manifest of another step, the error names a file of tensors
            assert found == other and str(latest) in logged, (number, kind, logged)
            assert file.name in logged or kind == "foreign", (number, kind, logged)
            seen.add((kind, file.name))
        shutil.rmtree(latest)
        shutil.copytree(keep, latest)
    assert {kind for kind, _ in seen} == {"cut", "bit", "zeros", "longer", "gone", "foreign", "folder", "swapped"}
    assert {name for _, name in seen} == {file.name for file in latest.iterdir()}


def test_checkpoints_of_another_step_or_recipe_are_skipped(copied):
    path, latest, recipe = copied
    shutil.copytree(latest, path / "step-00000009")  # a good checkpoint under the name of another step
    found, logged = choose_newest(path, recipe)
    assert found == latest and "it is the checkpoint of step 3" in logged
    other = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, lr=0.5))
    shutil.rmtree(path / "step-00000009")
    with pytest.raises(UserError, match="none of the checkpoints"):
        choose_newest(path, other)
    found, logged = choose_newest(path, recipe)
    assert (found, logged) == (latest, "")
    trainer.rewrite_manifest(latest, recipe=as_dict(other))
    found, logged = choose_newest(path, recipe)
    assert found == path / "step-00000002" and f"{latest} is of another recipe (optim.lr" in logged
    assert find_damage(latest) is None  # the user may still start another run from it


def test_changed_or_invalid_manifest_is_detected(copied):
    _, latest, _ = copied
    text = (latest / "manifest.json").read_text()
    for changed in (text.replace('"step": 3', '"step": 4'), "[]", "{}", "[" * 10**5, text[:-3], "\udcff"):
        (latest / "manifest.json").write_text(changed, errors="surrogateescape")
        assert "manifest.json" in str(find_damage(latest))
    (latest / "manifest.json").write_text(text)
    assert find_damage(latest) is None


def test_errors_suggest_a_good_checkpoint(copied, run, tmp_path, capsys):
    path, latest, _ = copied
    next(latest.glob("*.distcp")).write_bytes(b"")
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", **TINY)
    for place in (latest, path, path.parent):
        assert trainer.train(recipe, f"ckpt.resume={place}") == 1
        assert f"{path / 'step-00000002'} is good" in capsys.readouterr().err
    shutil.copy(run / "recipe.yaml", tmp_path)
    assert evaluate.main([str(latest)]) == 1
    assert f"{path / 'step-00000002'} is good" in capsys.readouterr().err
    shutil.rmtree(path / "step-00000002")
    assert evaluate.main([str(latest)]) == 1
    assert f"no other checkpoint in {path} is good" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_killed_loader_worker_is_reported(tmp_path, monkeypatch, capsys):
    step = Engine.step

    def hooked(self):
        if self.progress.step == 2:
            os.kill(self.batches.workers[0].pid, signal.SIGKILL)
        return step(self)

    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", **TINY)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", hooked)
        assert trainer.train(recipe, "ckpt.every=1", "data.workers=1", "sched.steps=40") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: a loader process died") and error.count("\n") == 1, error
    assert "data.workers" in error and "The same command continues" in error
    kept = sorted((tmp_path / "runs/tiny/checkpoints").iterdir())
    assert kept and all(path.name.startswith("step-") and find_damage(path) is None for path in kept)
    # torch raises the worker's death at any point, which may leave a file open: collect it here, not in another test
    gc.collect()


def test_killed_process_is_reported_by_the_other(tmp_path):
    """The second of two processes is killed at step 2."""
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", **TINY)
    done = trainer.run_processes(2, ["@1:2", recipe, "ckpt.every=1", "data.micro_batch=4"])
    assert trainer.exit_codes(done) == [[1, -signal.SIGKILL]]
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and "another process of this run is gone" in messages[0], done.stderr
    assert find_damage(tmp_path / "runs/tiny/checkpoints/step-00000002") is None
