"""Files that earlier versions wrote still work: runs resume, exports load, recipes read.

`artefacts/COMMIT` was written by that commit: recipes, an unfinished run, a finished run of each task, and what their
exports answer. A change that breaks one of these tests needs a migration and a line in UPGRADING.md.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from trainer import stable_metrics, train

import tessel
import tessel.train.detect
import tessel.train.segment
from tessel.train import evaluate
from tessel.train.errors import NewerFormatError, UserError
from tessel.train.evaluation import load_run
from tessel.train.recipe.load import differences, dump, load_recipe
from tessel.train.recipe.migrate import FORMAT, RENAMED
from tessel.train.report.__main__ import main as report
from tessel.train.run import checkpoint

VERSIONS = sorted(path for path in Path(__file__).with_name("artefacts").iterdir() if path.is_dir())
TASKS = ("classify", "segment", "detect")


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def artifacts(request, tmp_path, monkeypatch):
    """A copy of a version's files with the runs in `runs/`; it is the current directory."""
    shutil.copytree(request.param, tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs").mkdir()
    for name in ("digits_unfinished", *TASKS):
        (tmp_path / name).rename(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same_metrics():
    """Assert that the resumed run logged the same metrics as the uninterrupted run of the earlier version."""
    records, expected = stable_metrics(Path("runs/digits_unfinished")), stable_metrics(Path("runs/classify"))
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    for record, wanted in zip(records, expected, strict=True):
        assert record.pop("kind") == wanted.pop("kind") and record == pytest.approx(wanted, rel=1e-5)


def test_unfinished_run_of_an_earlier_version_resumes_with_the_same_metrics(artifacts, capsys):
    assert train(Path("digits.yaml"), "run.name=digits_unfinished") == 0
    assert "resuming runs/digits_unfinished at step 6 (exact)" in capsys.readouterr().out
    run = Path("runs/digits_unfinished")
    assert_same_metrics()
    # the resumed run writes its files in the current format
    manifest = checkpoint.read_manifest(run / "checkpoints" / "step-00000012")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    export = json.loads((run / "export" / "config.json").read_text())
    assert manifest["format"] == checkpoint.FORMAT and recipe["format"] == FORMAT and export["format"]
    assert manifest["tessel"] == recipe["tessel"] == export["tessel"]


def test_checkpoint_of_an_earlier_version_can_start_another_run(artifacts, capsys):
    path = "runs/digits_unfinished/checkpoints/step-00000006"
    assert train(Path("digits.yaml"), "run.name=other", "optim.lr=1e-3", f"ckpt.resume={path}") == 0
    assert f"at step 6 from {path} (with another recipe" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["digits", "segment", "detect"])
def test_recipes_of_an_earlier_version_load_unchanged(artifacts, task):
    from_run = load_recipe(f"runs/{'classify' if task == 'digits' else task}/recipe.yaml")
    from_file = load_recipe(f"{task}.yaml", [f"run.name={from_run.run.name}"])
    assert differences(from_file, from_run) == []
    Path("again.yaml").write_text(dump(from_run))
    assert load_recipe("again.yaml") == from_run


def test_exports_of_an_earlier_version_give_the_same_outputs(artifacts):
    torch.manual_seed(0)
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).sin()
    answers = json.loads(Path("answers.json").read_text())
    segmenter = tessel.train.segment.load("runs/segment/export")
    detector = tessel.train.detect.load("runs/detect/export")
    with torch.no_grad():
        found = {
            "classify": timm.create_model("local-dir:runs/classify/export", pretrained=True).eval()(images)[0],
            "segment": segmenter(images)[0].mean((1, 2)),
            "detect": detector([images[0].abs()])[0]["scores"][:8],
        }
    for task, tensor in found.items():
        torch.testing.assert_close(tensor, torch.tensor(answers[task]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_finished_runs_of_an_earlier_version_are_evaluated_and_reported(artifacts, task):
    before = json.loads(Path(f"runs/{task}/evaluation/evaluation.json").read_text())
    recipe, model = load_run(f"runs/{task}")
    assert recipe.task.kind == task and not model.training
    assert evaluate.main([f"runs/{task}"]) == 0
    after = json.loads(Path(f"runs/{task}/evaluation/evaluation.json").read_text())
    assert after.keys() >= before.keys()
    metrics = [key for key, value in before.items() if isinstance(value, float)]
    assert metrics and np.allclose([after[key] for key in metrics], [before[key] for key in metrics], atol=0.5)
    assert report([f"runs/{task}"]) == 0


def test_every_renamed_key_is_read_under_its_old_name(tmp_path):
    values = {"model.drop_path": "0.1", "data.aug.repeats": "2"}
    segment = {"data.fit": "[64, 32]", "data.aug.crop_share": "0.75"}
    detect = {"task.detect.short": "[32]", "task.detect.longest": "64"}
    coco = {"task.detect.train": "[a.json, a]", "task.detect.val": "[b.json, b]"}
    assert {*values, *segment, *detect, *coco} == {*RENAMED}
    for kind, source, old in (
        ("classify", "digits", values),
        ("segment", "digit_scenes", segment),
        ("detect", "coco", detect | coco),
    ):
        lines = [f"task.kind={kind}", f"data.source={source}", "task.segment.decode_head={type: FPNHead}"]
        lines += ["data.root=x"] if source == "coco" else []
        lines = lines if kind == "segment" else [line for line in lines if "segment.decode" not in line]
        path = tmp_path / f"{kind}.yaml"
        path.write_text("model: {name: test_resnet}\ndata: {source: digits}\nsched: {epochs: 1}\n")
        renamed = load_recipe(path, [*lines, *(f"{key}={value}" for key, value in old.items())])
        assert renamed == load_recipe(path, [*lines, *(f"{RENAMED[key]}={value}" for key, value in old.items())])
        assert renamed != load_recipe(path, lines)


def test_keys_that_had_no_effect_in_format_1_are_dropped(tmp_path):
    path = tmp_path / "scenes.yaml"
    path.write_text(
        "model: {name: test_resnet}\ndata: {source: digits, scenes: 300, root: null}\n"
        "task: {kind: classify, detect: {}}\nsched: {steps: 1}\n"
    )
    assert load_recipe(path).data.source == "digits"
    path.write_text(f"format: 2\n{path.read_text()}")
    with pytest.raises(UserError, match="data.scenes has no effect here"):
        load_recipe(path)


def resume_with_changed_schema(folder, change, *overrides):
    """Resume the unfinished run with a copy of the trainer whose schema is replaced by `change(schema)`."""
    package, later = Path(tessel.__file__).parent, folder / "later" / "tessel"
    later.mkdir(parents=True)
    for entry in ("__init__.py", "kernels", "blocks", "zoo", "checkpoints", "configs"):
        (later / entry).symlink_to(package / entry)
    shutil.copytree(package / "train", later / "train", ignore=shutil.ignore_patterns("__pycache__"))
    file = later / "train" / "recipe" / "schema.py"
    assert (changed := change(text := file.read_text())) != text
    file.write_text(changed)
    command = [sys.executable, "-m", "tessel.train", "digits.yaml", "run.name=digits_unfinished", *overrides]
    # one thread, as in the original run, so that the arithmetic is the same
    env = os.environ | {"PYTHONPATH": str(later.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_run_resumes_after_a_new_key_with_a_neutral_default(artifacts):
    key = (
        'decay_norms: bool = False\n    """d"""\n    foreach: bool = False\n    """a new key"""\n    old_text: str = ""'
    )
    done = resume_with_changed_schema(artifacts, lambda text: text.replace("decay_norms: bool = False", key))
    assert done.returncode == 0 and "at step 6 (exact)" in done.stdout, done.stdout + done.stderr
    assert_same_metrics()


def test_resume_after_a_changed_default_needs_the_old_value(artifacts):
    def change(text):
        return text.replace("warmup: bool = True", "warmup: bool = False")

    done = resume_with_changed_schema(artifacts, change)
    assert done.returncode == 1 and "ema.warmup (there True, now False)" in done.stderr, done.stdout + done.stderr
    shutil.rmtree("later")
    done = resume_with_changed_schema(artifacts, change, "ema.warmup=true")
    assert done.returncode == 0 and "at step 6 (exact)" in done.stdout, done.stdout + done.stderr


def test_files_of_a_later_version_are_refused(artifacts, capsys):
    run = Path("runs/segment")
    config = json.loads((run / "export/config.json").read_text())
    (run / "export/config.json").write_text(json.dumps(config | {"format": 99, "tessel": "9.9"}))
    with pytest.raises(UserError, match="written by tessel 9.9"):
        tessel.train.segment.load(run / "export")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(f"format: 99\ntessel: 9.9.1\n{recipe}")
    with pytest.raises(UserError, match="upgrade tessel"):
        load_recipe(run / "recipe.yaml")


def test_checkpoint_of_a_later_version_is_not_called_damaged(artifacts, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "FORMAT", 0)
    path = max(Path("runs/digits_unfinished/checkpoints").glob("step-*"))
    with pytest.raises(NewerFormatError, match=f"checkpoint {path} has format 1, written by tessel .*: upgrade tessel"):
        checkpoint.find_damage(path)
    assert train(Path("digits.yaml"), "run.name=digits_unfinished") == 1
    output = "".join(capsys.readouterr())
    assert "upgrade tessel" in output and "damaged" not in output
