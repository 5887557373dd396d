"""The first seconds of `tessel train`: the list of recipes, a line at once, and misspelt models."""

import os
import signal
import subprocess
import sys

import pytest
import timm

from tessel.train.__main__ import main
from tessel.train.errors import UserError
from tessel.train.recipe.load import PACKAGED
from tessel.train.tasks import names


def without_imports(*arguments):
    """What the command prints, and whether it imported torch, where importing torch ends it."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from tessel.train.__main__ import main\n"
        f"raise SystemExit(main({list(arguments)!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", ["train.evaluate", "train.report", "train.check", "checkpoints", "kernels"])
def test_ctrl_c_while_a_command_imports_is_one_line(module, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", f"tessel.{module}", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": path})
    assert done.stderr == "interrupted\n" and done.returncode in (130, -signal.SIGINT)


def test_ctrl_c_in_a_program_that_imports_tessel_is_pythons_own():
    code = "import tessel; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("KeyboardInterrupt\n") and "Traceback" in done.stderr


def test_recipes_are_listed(capsys):
    assert main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "/" in line.split()[0]]
    packaged = {path.relative_to(PACKAGED).with_suffix("").as_posix() for path in PACKAGED.rglob("*.yaml")}
    assert set(listed) == packaged and listed[0] == "demo/digit_detect" and "finetune/classify" in listed[:6]


def test_command_without_a_recipe_lists_them_and_fails(capsys):
    assert main([]) == 2
    text = capsys.readouterr().out
    assert "demo/digits" in text and "usage: tessel train RECIPE" in text


def test_first_line_comes_before_the_heavy_imports():
    done = without_imports("demo/digits")
    assert done.stdout.startswith("tessel ") and "recipe demo/digits: loading" in done.stdout
    assert "torch" in done.stderr  # what followed was the import that this test forbids


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["model.name=biformer_ato"], ["model.name='biformer_ato'", "did you mean biformer_atto"]),
        (["model.name=resnet180.a1_in1k"], ["'resnet180.a1_in1k'", "did you mean resnet"]),
        (["model.init_from=biformr_atto"], ["model.init_from='biformr_atto'", "biformer_atto"]),
    ],
)
def test_misspelt_model_is_told_without_importing_torch(arguments, fragments):
    done = without_imports("demo/digits", *arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert all(fragment in done.stderr for fragment in fragments), done.stderr


def test_names_in_the_sources_are_those_of_the_registry():
    registered = {name for name in timm.list_models() if not name.startswith("attentive_probe")}
    # other test modules may register models of their own
    packages = ("timm.", "tessel.")
    registered = {n for n in registered if timm.models.model_entrypoint(n).__module__.startswith(packages)}
    assert registered <= set(names.names_in_sources())
    missing = [name for name in names.names_in_sources() if not timm.is_model(name)]
    assert missing == []


def test_old_names_and_files_pass(monkeypatch):
    monkeypatch.delitem(sys.modules, "timm")
    for name in ("tv_resnet50", "vit_base_patch16_224_in21k", "local-dir:runs/x", "weights.pth", None):
        names.check_spelling(name, "model.name")
    with pytest.raises(UserError, match="did you mean cswin_tiny"):
        names.check_spelling("cswin_tyni", "model.name")
