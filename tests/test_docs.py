"""README.md and docs/ are correct: Python blocks run, commands exist, recipes are valid, links have a target.

A block that cannot run here is marked in the page, with the reason: `<!-- skip: next "needs a downloaded file" -->`.
`make docs` checks the links between pages and the references into the API.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from doc_blocks import run_blocks
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

import tessel
from tessel.cli.application import tessel as tessel_command
from tessel.train.recipe.load import load_recipe

ROOT = Path(tessel.__file__).parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MODULES = {
    "kernels",
    "train",
    "train.evaluate",
    "train.check",
    "train.report",
    "checkpoints",
}  # `python -m tessel.MODULE`

# with OpenVINO's runtime in the process, a later test of the trainer ended with a segmentation fault
OWN_PROCESS = {ROOT / "docs/upstream.md"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    parser = CodeBlockParser(language=language, evaluator=lambda example: None)
    return [
        example.parsed for example in Sybil([parser], path=str(page.parent), pattern=page.name).parse(page).examples()
    ]


@pages
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page run from top to bottom in one session."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not re.search(r"<!-- skip: \w+\s*-->", page.read_text()), "say why the block cannot run"
    if page in OWN_PROCESS:
        command = [sys.executable, str(Path(__file__).with_name("doc_blocks.py")), str(page)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        run_blocks(page)


@pages
def test_commands_exist(page):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    scenes = {"demo-segment", "demo-detect", "demo-panoptic"}
    targets |= scenes | {f"{name}-scratch" for name in scenes}
    for line in "\n".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        if words[:1] == ["tessel"]:
            assert_command(words[1:], line)
        if "-m" in words and (module := words[words.index("-m") + 1]).startswith("tessel."):
            assert module.removeprefix("tessel.") in MODULES, line
        for word in words:
            if word.startswith(("examples/", "benchmarks/", "docs/", "configs/")):
                assert (ROOT / word).exists(), line


def assert_command(words: list[str], line: str) -> None:
    """Assert that `tessel WORDS` is a command, and that it has the options."""
    command: click.Command = tessel_command
    while isinstance(command, click.Group):
        assert words and words[0] in command.commands, line
        command, words = command.commands[words[0]], words[1:]
    options = {name for parameter in command.params for name in parameter.opts}
    forwarded = command.context_settings.get(
        "ignore_unknown_options", False
    )  # the trainer's commands know their options
    if not forwarded:
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options | {"--help"}, line


@pages
def test_recipes_are_valid(page, tmp_path, monkeypatch):
    """Checks the recipes that a page shows, and those that its commands name, with the overrides of the command."""
    monkeypatch.chdir(tmp_path)
    for name, recipe in re.findall(r"`([\w.]+\.yaml)`:\n\n```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        Path(name).write_text(recipe)
        load_recipe(name)
    for line in "\n".join(blocks(page, "sh")).splitlines():
        if found := re.search(
            r"(?:-m tessel\.train(?:\.check)?|tessel (?:train|check)) ([^-\s]\S*)((?: \S+=\S+)*)", line
        ):
            recipe, overrides = found.groups()
            if not recipe.isupper():  # RECIPE is a placeholder
                load_recipe(recipe, shlex.split(overrides))


@pages
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"
