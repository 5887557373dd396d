"""Recipes: files and overrides get the schema's types, errors name the key, and a dumped recipe loads unchanged."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import trainer
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tessel.train.errors import UserError
from tessel.train.recipe.explain import MEANT, SYNONYMS
from tessel.train.recipe.load import differences, dump, find_recipe, flatten, load_recipe, make_recipe, semantic_keys
from tessel.train.recipe.plan import plan
from tessel.train.recipe.registry import SOURCES, TASKS, key_groups, recipe_keys
from tessel.train.recipe.schema import Recipe

MINIMAL = {"model": {"name": "test_resnet"}, "data": {"source": "digits"}, "sched": {"epochs": 2}}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_synonyms_stand_for_keys():
    known = {key.name for _, keys in key_groups() for key in keys}
    assert set(SYNONYMS) <= known
    assert not {word for word in MEANT if any(name.rpartition(".")[2] == word for name in known)}


def test_defaults_and_run_name(recipe):
    loaded = load_recipe(recipe)
    assert (loaded.run.name, loaded.model.name) == ("small", "test_resnet")
    assert (loaded.optim.lr, loaded.sched.epochs) == (1e-3, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.run.seed = 1  # type: ignore[misc]


def test_dumped_recipe_loads_equal(tmp_path):
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml")
    loaded = load_recipe(recipe, ["data.root=x", "optim.kwargs={betas: [0.9, 0.99]}"])
    (tmp_path / "again.yaml").write_text(dump(loaded))
    assert load_recipe(tmp_path / "again.yaml") == loaded


@given(st.text(), st.from_regex(r"[-+.0-9a-fox_:e]{1,8}", fullmatch=True), st.floats(0.5, 1e300), st.text(min_size=1))
@example("null", "1e-3", 1e16, "on")
@example("a: b #c", "09", 5e5, "<<")
def test_dump_and_load_keep_every_string_and_number(text, word, number, key):
    recipe = make_recipe({**MINIMAL, "model": {"name": text}}, [], source="test")
    model, optim = (
        dataclasses.replace(recipe.model, init_from=word, kwargs={key: [text, word, number], word: key}),
        dataclasses.replace(recipe.optim, lr=number),
    )
    recipe = dataclasses.replace(recipe, model=model, optim=optim)
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder, "recipe.yaml")).write_text(dump(recipe), encoding="utf-8")
        assert dataclasses.replace(load_recipe(file), run=recipe.run) == recipe


@pytest.mark.parametrize("name", ["1e-3", "09", "5e-4", "null", "true", "0x1f", "1_000"])
def test_run_names_that_look_like_numbers_stay_strings(recipe, name):
    loaded = load_recipe(recipe, [f"run.name={name}"])
    (recipe.parent / "again.yaml").write_text(dump(loaded))
    assert load_recipe(recipe.parent / "again.yaml") == loaded


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("optim.lr=1", "optim.lr", 1.0),
        ("run.name=007", "run.name", "007"),
        ("log.wandb=off", "log.wandb", "off"),
        ("run.out=~/runs", "run.out", os.path.expanduser("~/runs")),
        ("ckpt.resume=~/runs/a~b", "ckpt.resume", os.path.expanduser("~") + "/runs/a~b"),
        ("data.micro_batch=null", "data.micro_batch", None),
        ("optim.clip=null", "optim.clip", None),
        ("data.aug.scale=[0.5, 1]", "data.aug.scale", (0.5, 1.0)),
        ("model.kwargs.depth=3", "model.kwargs", {"depth": 3}),
        ("run.fresh=true", "run.fresh", True),
    ],
)
def test_override_gets_the_type_of_the_schema(recipe, text, key, value):
    found = flatten(load_recipe(recipe, [text]))[key]
    assert found == value and type(found) is type(value)


def test_yaml_value_gets_the_type_of_the_schema(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: no}\ndata: {source: digits}\nsched: {epochs: 1e1}\noptim: {lr: 5e-4}\n")
    loaded = load_recipe(path)
    assert (loaded.model.name, loaded.sched.epochs, loaded.optim.lr) == ("no", 10.0, 5e-4)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean optim.lr?"]),
        ("lr=1", ["unknown key lr", "optim.lr?"]),
        ("optim.lr=fast", ["optim.lr='fast'", "number"]),
        ("optim.lr=-1", ["optim.lr=-1", "greater than 0"]),
        ("optim.lr=.nan", ["optim.lr=nan", "finite"]),
        ("data.size=2.5", ["data.size=2.5", "integer"]),
        ("run.fresh=yes", ["run.fresh='yes'", "boolean"]),
        ("data.source=imgs", ["data.source='imgs'", "digits, digit_scenes, folder"]),
        ("run.name=a/b", ["run.name='a/b'"]),
        ("optim.lr.x=3", ["optim.lr.x"]),
        ("optim.learning_rate=1", ["did you mean optim.lr?"]),
        ("train.batch_size=4", ["did you mean data.batch?"]),
        ("warmup-epochs=4", ["did you mean sched.warmup?"]),
        ("data.imgsz=64", ["did you mean data.size?"]),
        ("data.aug.scale=0.5", ["data.aug.scale=0.5", "a list of two numbers, for example data.aug.scale=[0.5, 1.0]"]),
        ("data.aug.scale=[0.5]", ["data.aug.scale must be a list of two numbers"]),
        ("sched.milestones=3", ["sched.milestones=3 must be a list of numbers, for example", "(when multistep decays"]),
        ("data.batch=many", ["data.batch='many'", "integer, or auto"]),
        ("model.freeze=head", ["model.freeze='head'", "integer, or backbone"]),
        ("task.segment.test.flip=true", ["no effect", "task.kind=segment"]),
        ("task.kind=segmen", ["task.kind='segmen'", "did you mean segment?"]),
        ("data.source=ade20k", ["data.root is missing"]),
        ("data=4", ["unknown key data", "section"]),
        ("nonsense", ["'nonsense'", "key=value"]),
        ("sched.steps=5", ["one of sched.epochs and sched.steps"]),
        ("sched.decay_rate=0.5", ["sched.decay_rate", "no effect", "cosine"]),
        ("sched.name=step", ["sched.decay_steps"]),
        ("data.root=x", ["data.root has no effect", "data.source=folder"]),
        ("data.source=folder", ["data.root is missing", "train/CLASS/*.jpg"]),
        ("data.aug.scale=[1, 0.5]", ["data.aug.scale=[1.0, 0.5]", "smaller one first"]),
        ("optim.name=lookahead_adamw", ["lookahead_adamw", "use adamw"]),
        ("optim.name=adahessian", ["adahessian", "use adamw"]),
    ],
)
def test_wrong_override_is_an_error_that_names_the_key(recipe, text, fragments):
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, [text])
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_optimizers_that_cannot_update_shards_are_refused_with_fsdp(recipe, strategy):
    assert load_recipe(recipe, ["optim.name=adamp"]).optim.name == "adamp"
    with pytest.raises(UserError, match="adamp cannot update sharded parameters; use adamw, or parallel.strategy=ddp"):
        load_recipe(recipe, ["optim.name=adamp", f"parallel.strategy={strategy}"])


def test_keys_of_a_disabled_feature_are_allowed():
    """A recipe may keep the keys that only parametrize a disabled feature."""
    off = ["sched.warmup=0", "data.aug.mixup=0", "data.aug.cutmix=0", "optim.clip=null", "ema.decay=null"]
    assert load_recipe("imagenet/transnext_tiny", ["data.root=x", *off]).sched.warmup == 0


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("optimizer: {lr: 1}", ["unknown key optimizer"]),
        ("optim: {lr: 1, lr: 2}", ["'lr' occurs twice"]),
        ("optim: 3", ["optim is a section"]),
        ("optim: [", ["cannot be read"]),
        ("data: {source: digits, aug: {mixup: much}}", ["data.aug.mixup='much'"]),
        ("data: {aug: {mixup: 1}}", ["data.source is missing", "digits, digit_scenes"]),
    ],
)
def test_wrong_recipe_file_is_an_error_that_names_it(tmp_path, text, fragments):
    path = tmp_path / "bad.yaml"
    sections = [f"{name}: {yaml.safe_dump(body, default_flow_style=True)}" for name, body in MINIMAL.items()]
    path.write_text("\n".join([line for line in sections if not text.startswith(line.split(":")[0])] + [text]))
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert all(fragment in str(caught.value) for fragment in [*fragments, str(path)]), str(caught.value)


def test_missing_keys_and_files_are_errors(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "part.yaml").write_text("run: {seed: 1}")
    for name, fragment in [("empty", "model.name"), ("part", "data.source is missing"), ("none", "train --list")]:
        with pytest.raises(UserError, match=fragment):
            load_recipe(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("demo/digit", "did you mean demo/digits?"),
        ("finetune/clasify", "did you mean finetune/classify?"),
        ("biformer_tiny", "did you mean imagenet/biformer_tiny?"),
        ("imagenet/cswin_tinny.yaml", "did you mean imagenet/cswin_tiny"),
        ("x" * 300, "`tessel train --list`"),
    ],
)
def test_misspelled_recipe_name_gets_a_suggestion(name, fragment):
    with pytest.raises(UserError) as caught:
        load_recipe(name)
    assert fragment in str(caught.value), str(caught.value)


def test_file_name_that_is_no_valid_run_name_is_an_error(recipe):
    file = recipe.rename(recipe.with_name("my first.yaml"))
    with pytest.raises(UserError, match="'my first' is not a valid run name; set run.name="):
        load_recipe(file)
    assert load_recipe(file, ["run.name=first"]).run.name == "first"


def test_packaged_recipe_is_found_without_its_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo/digits") == find_recipe("demo/digits.yaml")
    assert load_recipe("demo/digits").run.name == "digits"


@pytest.mark.parametrize("path", sorted(str(p) for p in find_recipe("demo/digits").parent.parent.rglob("*.yaml")))
def test_packaged_recipes_load_and_document_command_and_cost(path):
    load_recipe(path, ["data.root=PATH"] if Path(path).parent.name == "finetune" else [])
    with open(path) as file:
        head = [line for line in file if line.startswith("#")]
    for word in ("command", "hardware", "time", "expect"):
        assert any(word in line.lower() for line in head), f"{path} does not open with its {word}"


def test_warmup_longer_than_the_training_says_what_to_change(recipe):
    loaded = load_recipe(recipe, ["sched.epochs=1", "sched.warmup=1"])
    with pytest.raises(UserError, match=r"sched\.warmup=1 \(10 steps\).*sched\.warmup=0\.05, or train for longer"):
        plan(loaded, samples=2560, world_size=1)


def test_only_keys_that_change_the_training_are_differences(recipe):
    base = load_recipe(recipe)
    neutral = ["run.out=x", "data.workers=4", "ckpt.every=7", "log.every=3", "eval.every=2", "parallel.compile=true"]
    assert differences(base, load_recipe(recipe, neutral)) == []
    for text in ("run.seed=1", "optim.lr=0.1", "data.batch=8", "ema.decay=0.9", "parallel.precision=bf16"):
        changed = load_recipe(recipe, [text])
        assert len(differences(base, changed)) == 1
        assert [key for key in semantic_keys(base) if semantic_keys(base)[key] != semantic_keys(changed)[key]] == [
            text.split("=")[0]
        ]


def test_plan_computes_steps_warmup_and_accumulation(recipe):
    loaded = load_recipe(recipe, ["data.batch=32", "sched.epochs=1.5", "sched.warmup=0.5", "data.micro_batch=4"])
    counted = plan(loaded, samples=100, world_size=2)
    assert (counted.steps, counted.warmup, counted.epoch_steps, counted.accumulate) == (5, 2, 3, 4)


@pytest.mark.parametrize(("rule", "lr"), [("none", 1e-3), ("linear", 5e-4), ("sqrt", 1e-3 * 0.5**0.5)])
def test_lr_rule_is_applied_and_printed(recipe, rule, lr):
    loaded = load_recipe(recipe, [f"optim.lr_rule={rule}", "data.batch=128"])
    counted = plan(loaded, samples=1000, world_size=1)
    assert counted.lr == pytest.approx(lr)
    assert f"rule {rule}" in counted.lr_text and "global batch 128" in counted.lr_text


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["data.batch=101"], "data.batch=101 is larger than the 100"),
        (["data.batch=10", "data.micro_batch=4"], "not a multiple"),
        (["data.batch=10", "data.micro_batch=5"], "multiple of 2 images"),
        (["data.batch=10", "sched.warmup=2"], "sched.warmup=2"),
    ],
)
def test_plan_rejects_batches_and_warmup_that_do_not_fit(recipe, overrides, fragment):
    with pytest.raises(UserError, match=fragment):
        plan(load_recipe(recipe, overrides), samples=100, world_size=1, micro_batch_multiple=2)


def test_every_key_is_documented():
    groups = dict(key_groups())
    assert all(key.description for keys in groups.values() for key in keys)
    sections = {field.name for field in dataclasses.fields(Recipe)}
    assert {key.name.split(".")[0] for key in groups["every recipe"]} == sections
    listed = {key.name for keys in groups.values() for key in keys}
    for task in TASKS:
        for source in SOURCES:
            keys = [key.name for key in recipe_keys(task, source)]
            assert len(keys) == len({*keys}) and {*keys} <= listed


def test_help_lists_keys_without_loading_torch():
    code = "import sys, tessel.train.__main__ as m\ntry: m.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "optim.lr: 0.001" in done.stdout and "examples" in done.stdout


@pytest.mark.parametrize(("length", "wanted"), [("epochs=2", (100, 150)), ("steps=200", (2, 3))])
def test_milestones_have_the_unit_of_the_training_length(recipe, length, wanted):
    other = "steps=null" if length.startswith("epochs") else "epochs=null"
    marks = "[1, 1.5]" if length.startswith("epochs") else "[2, 3]"
    keys = [f"sched.{length}", f"sched.{other}", "sched.name=multistep", f"sched.milestones={marks}", "data.batch=10"]
    assert plan(load_recipe(recipe, keys), samples=1000, world_size=1).milestones == wanted
