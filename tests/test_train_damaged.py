"""Damaged files of a run other than checkpoints: each is told in one line, and none changes a result unseen."""

import random
import shutil
from pathlib import Path

import pytest
import trainer

from tessel.train import evaluate
from tessel.train.errors import UserError
from tessel.train.evaluation import load_run, read_done
from tessel.train.report.__main__ import main as report
from tessel.train.tasks.export import read_classes

TINY = {"model": {"name": "test_resnet", "drop_path_rate": None}, "data": {"source": "digits", "micro_batch": 8}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    recipe = trainer.write_recipe(
        tmp_path_factory.mktemp("finished") / "tiny.yaml", **TINY, sched={"steps": 4, "warmup": 0}, log={"every": 1}
    )
    with trainer.before_step(2):
        assert trainer.train(recipe) == 0
    shutil.copytree(recipe.parent / "runs/tiny", recipe.parent / "stopped")
    assert trainer.train(recipe) == 0
    return recipe.parent


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished / "runs/tiny", tmp_path / "runs/tiny")


def refused(capsys, code: int) -> str:
    error = capsys.readouterr().err
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
def test_every_changed_byte_of_an_export_is_noticed(finished, run, name, capsys):
    export, rng = run / "export", random.Random(name)
    assert not {*(line.split()[1] for line in (export / "SHA256SUMS").read_text().splitlines())} ^ {
        "config.json",
        "model.safetensors",
    }
    before = (export / name).read_bytes()
    for _ in range(20):
        flip(export / name, rng)
        with pytest.raises(UserError, match=r"SHA256SUMS"):
            load_run(run)
        (export / name).write_bytes(before)
    load_run(run)
    flip(export / name, rng)
    assert "SHA256SUMS" in refused(capsys, evaluate.main([str(run)]))
    for source in (f"model.init_from=local-dir:{export}", f"model.name=local-dir:{export}"):
        code = trainer.train(finished / "tiny.yaml", source, f"run.out={run.parent}/new")
        assert "SHA256SUMS" in refused(capsys, code)


def test_an_export_without_checksums_loads(run):
    """As those of 0.1, and those whose config was changed on purpose."""
    (run / "export/SHA256SUMS").unlink()
    load_run(run)
    assert read_classes(run / "export") == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{}", b'{"step": "x"}', b"[" * 10**5])
def test_damaged_markers_are_one_message(run, content, capsys):
    (run / "DONE").write_bytes(content)
    assert f"{run / 'DONE'} is damaged" in refused(capsys, evaluate.main([str(run)]))
    with pytest.raises(UserError, match="delete it"):
        read_done(run)
    (run / "evaluation/evaluation.json").write_bytes(content)
    (run / "DONE").unlink()
    assert "evaluation cannot be read" in refused(capsys, report([str(run)]))


def test_damaged_sets_file_is_one_message(tmp_path):
    (tmp_path / "sets.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"sets.json is damaged .*; delete it, and evaluate again"):
        evaluate.known_sets(tmp_path / "sets.json")
    (tmp_path / "sets.json").write_text('{"val": {"top1": 1}}')
    assert evaluate.known_sets(tmp_path / "sets.json") == {"val": {"top1": 1}}
    assert evaluate.known_sets(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda lines: [lines[0][: len(lines[0]) // 2], lines[1]], "has 1 of its 2 lines"),
        (lambda lines: [lines[0].replace('"step": 1,', '"step": 0,'), lines[1]], "has other text in its 2 lines"),
        (lambda lines: [*lines, '{"kind": "tra'], None),
    ],
)
def test_resume_says_what_the_metrics_lost(finished, tmp_path, damage, told, capsys):
    run = shutil.copytree(finished / "stopped", tmp_path / "runs/tiny")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(damage(lines)))
    assert trainer.train(finished / "tiny.yaml", f"run.out={tmp_path}/runs", "eval.every=9", "sched.steps=4") == 0
    out = capsys.readouterr().out
    assert "at step 2 (exact)" in out and ("warning: " in out) == (told is not None) and (told or "") in out, out
