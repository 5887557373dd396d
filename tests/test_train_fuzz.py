"""Random recipes and values: each is a recipe or one line that says what is wrong, in bounded time."""

import contextlib
import os
import random
import sys
import time

import pytest
import trainer
import yaml

from tessel.train.__main__ import main
from tessel.train.data.class_map import class_names
from tessel.train.data.sources.archives import Tar
from tessel.train.data.sources.folder import ImageFolder
from tessel.train.errors import UserError, report_errors
from tessel.train.recipe.load import PACKAGED, load_recipe, make_recipe, parse
from tessel.train.recipe.plan import plan
from tessel.train.recipe.sizing import sized

HOSTILE = [
    "!!int abc",
    "!!float x",
    "!!bool maybe",
    "!!timestamp x",
    "!!binary x",
    "!!python/object/apply:os.mkdir [ran]",
    "9" * 5000,
    "&a {x: *a}",
    "[" * 700,
    "[" * 5000,
    "{a: " * 1000,
    "&a [1, &b [*a, *a], *b]",
    "? [1]\n: 2",
    "'\\0'",
    "1e308",
    "-1e308",
    ".inf",
    ".nan",
    "99999999999999999999999",
    "x" * 5000,
    "[1, 2, 3]",
    "{a: {b: {c: 1}}}",
    "null",
    "true",
    "-1",
    "0",
    "''",
    "\x07\x1b[31m",
    "\ud800",
]


def test_messages_do_not_reach_the_terminal_raw(capsys):
    with report_errors() as outcome:
        raise UserError("image a\x1b[31mred\udcff.png")
    assert outcome.code == 1 and capsys.readouterr().err == "error: image a\\x1b[31mred\\udcff.png\n"


def test_ctrl_c_is_one_line(capsys):
    with report_errors() as outcome:
        raise KeyboardInterrupt
    assert outcome.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_utf8(tmp_path):
    """A file of any name is read; a class must have a name that can be written."""
    root = trainer.draw_folder(tmp_path / "images")
    folder = os.fsencode(root / "train")
    os.rename(folder + b"/class_0/0.png", folder + b"/class_0/\xff.png")
    images = ImageFolder(root / "train")
    assert [images[index] for index in range(len(images))]
    os.rename(folder + b"/class_0", folder + b"/\xff")
    with pytest.raises(UserError, match=r"class folder '\\udcff' in"):
        ImageFolder(root / "train")


def test_absurd_class_numbers_are_told():
    with pytest.raises(UserError, match="class number 99999999999 is more than a million"):
        class_names(["0", "99999999999"], Tar(root="."), numbered=True)


def assert_told(error: UserError) -> None:
    parts = str(error).split("; ")
    assert "\n" not in str(error) and max(map(len, parts)) <= 310, str(error)[:500]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_values_are_one_line_in_no_time(value):
    start = time.process_time()
    for key in ("optim.lr", "model.kwargs", "data.size", "run.name", "log.tensorboard", "data.aug.scale", "run.out"):
        try:
            load_recipe("demo/digits", [f"{key}={value}"])
        except UserError as error:
            assert_told(error)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("key", ["run.name", "run.out"])
def test_names_that_no_folder_can_have_are_told(key, tmp_path, capsys):
    arguments = ["demo/digits", f"run.out={tmp_path}", f"{key}={'n' * 300}", "--dry-run"]
    assert main(arguments) == 1
    assert (
        "File name too long" in (told := capsys.readouterr().err) and "run.out and run.name" in told and len(told) < 200
    )


def bomb() -> str:
    names = "abcdefghijk"
    lines = [f"{now}: &{now} [{', '.join([f'*{before}'] * 9)}]" for before, now in zip(names, names[1:], strict=False)]
    return "a: &a [x]\n" + "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(),
        "model:\n" + "".join(f"  key{number}: 1\n" for number in range(5_000)),
        "x: " + "y" * 300_000,
        "data: [\n",
        "a: 1\na: 2\n",
        "a\tb: {",
        "? {a: 1}\n: 2\n",
    ],
    ids=["aliases", "keys", "long", "syntax", "twice", "tab", "key"],
)
def test_recipes_of_unreasonable_size_are_one_line_in_no_time(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert_told(caught.value)
    assert time.process_time() - start < 5


def mutated(recipe: dict, rng: random.Random) -> dict:
    """The recipe with some keys replaced, moved, added or removed."""
    for _ in range(rng.randint(1, 3)):
        section = rng.choice([found for found in [recipe, *recipe.values()] if isinstance(found, dict) and found])
        key = rng.choice(list(section))
        match rng.randrange(4):
            case 0:
                value = rng.choice(HOSTILE)
                with contextlib.suppress(Exception):
                    value = yaml.safe_load(value)
                section[key] = value
            case 1:
                section[rng.choice(["name", "lr", "x" * 400, "steps", 7, None, "size", "kind", "source"])] = section[
                    key
                ]
            case 2:
                del section[key]
            case 3:
                section[key] = rng.choice([-1, 0, 1, 1e308, 2**70, "auto", [], {}, [[1]], {"a": [None]}, True, None])
    return recipe


def fuzz_recipes(count: int, seed: int) -> None:
    """Load, validate and plan `count` random recipes."""
    rng, accepted = random.Random(seed), 0
    files = sorted(PACKAGED.rglob("*.yaml"))
    for number in range(count):
        recipe = mutated(parse(rng.choice(files).read_text()), rng)
        try:
            found = make_recipe(recipe, source="recipe")
            plan(sized(found, samples=1000), samples=1000, world_size=1)
            accepted += 1
        except UserError as error:
            assert_told(error)
        except Exception as error:
            pytest.fail(f"recipe {number} of seed {seed}: {error!r}: {str(recipe)[:600]}")
    print(f"seed {seed}: {accepted} of {count} random recipes accepted, the others told in one line")


def test_random_recipes_are_accepted_or_told_in_one_line():
    fuzz_recipes(60, 0)


@pytest.mark.slow
def test_a_thousand_random_recipes():
    fuzz_recipes(1000, 1)
