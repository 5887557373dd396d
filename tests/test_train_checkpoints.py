"""What may become of a checkpoint on its disk: whatever it is, it is seen, named, and the one before is taken."""

import dataclasses
import gc
import hashlib
import json
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
    """The checkpoints, the newest of them, and their recipe; to be harmed."""
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints/step-00000003"
    return tmp_path / "checkpoints", newest, load_recipe(run / "recipe.yaml")


def newest(path: Path, recipe: Recipe) -> tuple[Path | None, str]:
    said: list[str] = []
    return Checkpoints(path, World(), said.append).newest(recipe), "\n".join(said)


def rewrite_manifest(path: Path, **facts: object) -> None:
    """Save the checkpoint's manifest with other facts, as if it had been written with them."""
    content = checkpoint.read_manifest(path) | facts
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(content | {"sha256": digest}))


def harm(file: Path, other: Path, rng: random.Random) -> str:
    """Change `file` in one of the ways of disks and people; which one."""
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
def test_no_harm_goes_unseen(copied):
    """Two hundred of them; a change that leaves every byte, or what the manifest says, as it was is none."""
    path, victim, recipe = copied
    other, rng, seen = path / "step-00000002", random.Random(0), set()
    keep = path.parent / "kept"
    shutil.copytree(victim, keep)
    facts = checkpoint.read_manifest(victim)
    for number in range(200):
        file = rng.choice(sorted(victim.iterdir()))
        before = file.read_bytes()
        kind = harm(file, other / file.name, rng)
        same = file.is_file() and file.read_bytes() == before
        if not same and file.name == checkpoint.MANIFEST and file.is_file():
            same = find_damage(victim) is None and checkpoint.read_manifest(victim) == facts
        problem = find_damage(victim)
        assert same == (problem is None), (number, kind, file.name, problem)
        if not same:
            found, said = newest(path, recipe)
            # beside another step's manifest, it is the tensors that seem wrong
            assert found == other and str(victim) in said, (number, kind, said)
            assert file.name in said or kind == "foreign", (number, kind, said)
            seen.add((kind, file.name))
        shutil.rmtree(victim)
        shutil.copytree(keep, victim)
    assert {kind for kind, _ in seen} == {"cut", "bit", "zeros", "longer", "gone", "foreign", "folder", "swapped"}
    assert {name for _, name in seen} == {file.name for file in victim.iterdir()}


def test_foreign_checkpoints_are_passed_over(copied):
    path, victim, recipe = copied
    shutil.copytree(victim, path / "step-00000009")  # a good one under another name
    found, said = newest(path, recipe)
    assert found == victim and "it is the checkpoint of step 3" in said
    other = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, lr=0.5))
    shutil.rmtree(path / "step-00000009")
    with pytest.raises(UserError, match="none of the checkpoints"):
        newest(path, other)
    found, said = newest(path, recipe)
    assert (found, said) == (victim, "")
    rewrite_manifest(victim, recipe=as_dict(other))
    found, said = newest(path, recipe)
    assert found == path / "step-00000002" and f"{victim} is of another recipe (optim.lr" in said
    assert find_damage(victim) is None  # to begin another run with it is the user's to say


def test_manifest_is_believed_only_whole(copied):
    _, victim, _ = copied
    text = (victim / "manifest.json").read_text()
    for changed in (text.replace('"step": 3', '"step": 4'), "[]", "{}", "[" * 10**5, text[:-3], "\udcff"):
        (victim / "manifest.json").write_text(changed, errors="surrogateescape")
        assert "manifest.json" in str(find_damage(victim))
    (victim / "manifest.json").write_text(text)
    assert find_damage(victim) is None


def test_the_good_one_is_offered(copied, run, tmp_path, capsys):
    path, victim, _ = copied
    next(victim.glob("*.distcp")).write_bytes(b"")
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", **TINY)
    for place in (victim, path, path.parent):
        assert trainer.train(recipe, f"ckpt.resume={place}") == 1
        assert f"{path / 'step-00000002'} is good" in capsys.readouterr().err
    shutil.copy(run / "recipe.yaml", tmp_path)
    assert evaluate.main([str(victim)]) == 1
    assert f"{path / 'step-00000002'} is good" in capsys.readouterr().err
    shutil.rmtree(path / "step-00000002")
    assert evaluate.main([str(victim)]) == 1
    assert f"no other checkpoint in {path} is good" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_dead_loader_process_is_told(tmp_path, monkeypatch, capsys):
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
    # torch raises the death amid whatever goes on, which may leave a file open: let that not come up in another test
    gc.collect()


def test_lost_process_is_told_by_the_one_left(tmp_path):
    """The second of two processes is killed in step 2."""
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", **TINY)
    done = trainer.run_processes(2, ["@1:2", recipe, "ckpt.every=1", "data.micro_batch=4"])
    assert trainer.exit_codes(done) == [[1, -signal.SIGKILL]]
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and "another process of this run is gone" in messages[0], done.stderr
    assert find_damage(tmp_path / "runs/tiny/checkpoints/step-00000002") is None
