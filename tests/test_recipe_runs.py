"""Every packaged recipe from its start to its evaluation, at 64 pixels; `make recipes` adds size and the report."""

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_runner


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipe_runner.write_data(tmp_path_factory.mktemp("data"))


def recipes():
    """CI runs the first recipe of each family and head, with the shorter of two schedules.

    `make recipes` and `pytest -m large` run the others.
    """
    variants, seen = recipe_runner.smallest_variants(), set()
    for name in recipe_runner.RECIPES:
        model = max((model for model in variants if model in name), key=len)
        kind = (variants[model], re.sub("_[13]x", "", name.replace(model, "")))
        yield pytest.param(name, marks=pytest.mark.large if kind in seen else pytest.mark.slow)
        seen.add(kind)


@pytest.mark.parametrize("name", list(recipes()))
def test_recipe_runs_to_its_evaluation(name, data, tmp_path):
    assert recipe_runner.run_recipe(name, data, tmp_path, short=True).startswith("loss ")


def test_there_are_recipes_for_every_task():
    counts = {folder: len(fnmatch.filter(recipe_runner.RECIPES, f"{folder}/*")) for folder in recipe_runner.COLLECTIONS}
    assert counts["imagenet"] >= 42 and counts["ade20k"] >= 28 and counts["coco"] >= 38


def run_script(*arguments):
    return subprocess.run([sys.executable, recipe_runner.__file__, *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_runner_reports_what_failed(tmp_path, monkeypatch, capsys):
    good, bad = "imagenet/biformer_tiny", "imagenet/biformer_small"
    run = recipe_runner.run_recipe

    def run_or_fail(name, *arguments, **options):
        assert name != bad, "the loss is not finite"
        return run(name, *arguments, **options)

    monkeypatch.setattr(recipe_runner, "run_recipe", run_or_fail)
    assert recipe_runner.main([good, bad, "--short", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"\[  2/2\] {good} +\d+\.\d s  loss \d", printed)
    assert re.search(rf"\[  1/2\] {bad} +\d+\.\d s  FAILED AssertionError: the loss is not finite", printed)
    assert "1 of 2 recipes ran in" in printed and f"== {bad}" in printed
    assert not (tmp_path / "runs").exists() and (tmp_path / "imagenet_biformer_tiny.log").stat().st_size > 100


def test_pattern_without_a_recipe_is_an_error():
    done = run_script("imagenet/nosuch_*")
    assert done.returncode == 2 and "no recipe matches imagenet/nosuch_*" in done.stderr


def test_makefile_passes_patterns_on():
    root = Path(recipe_runner.__file__).parent.parent
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", "recipes", "RECIPES=imagenet/cswin_* coco/*"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "tests/recipe_runner.py 'imagenet/cswin_*' 'coco/*'" in done.stdout
