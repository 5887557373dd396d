"""Recipes: read from YAML, changed by `key=value` overrides, validated, compared and written back.

Recipes are read by PyYAML with the types of YAML 1.2, by which 1e-3 is a number and `off` a string. OmegaConf would
bring a second language (interpolation) into every recipe.
"""

import copy
import dataclasses
import difflib
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ... import __version__
from ..errors import UserError, one_line
from .explain import unknown_key, wrong_values
from .migrate import FORMAT, changed_keys, drop_unused_keys, migrate, present_name
from .registry import SOURCES, TASKS, owners, recipe_keys, recipe_type
from .schema import Key, Recipe
from .validation import conflicts

PACKAGED = Path(__file__).resolve().parents[2] / "configs"

# keys that may change between two starts of one run: they say where and how it runs, not what it learns
NON_SEMANTIC_KEYS = re.compile(
    r"(ckpt|log|eval|guard)\..*|run\.(out|fresh|device)|data\.(workers|micro_batch|eval_batch)"
    r"|parallel\.(strategy|shard|compile|channels_last|grad_checkpointing)"
)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as another type."""

    yaml_implicit_resolvers = {}


class _Loader(yaml.SafeLoader):
    """The core types of YAML 1.2, and no repeated keys."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, str | int | float | None):
                raise UserError(f"line {node.start_mark.line + 1}: a key must be a text")
            if key in seen:
                raise UserError(f"line {node.start_mark.line + 1}: key {key!r:.80} occurs twice in one section")
            seen.add(key)
        return super().construct_mapping(node, deep)


for tag, pattern, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        list("-+.0123456789"),
    ),
):
    for kind in (_Loader, _Dumper):
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)


# of a recipe or a value: far above any recipe, and parsed at once
MAX_LETTERS, MAX_DEPTH = 200_000, 40
MAX_PARTS = 20  # of one message


def parse(text: str) -> Any:
    """The content of a YAML text. Raises UserError in one line if it is no plain data of reasonable size and depth."""
    if len(text) > MAX_LETTERS:
        raise UserError(f"it has {len(text)} letters, more than {MAX_LETTERS}")
    depth = 0
    try:
        for event in yaml.parse(text, _Loader):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"line {event.start_mark.line + 1}: aliases (*{event.anchor:.20}) are not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UserError(f"it is nested more than {MAX_DEPTH} deep")
        return yaml.load(text, _Loader)
    except UserError:
        raise
    except Exception as error:  # PyYAML's constructors raise all kinds of exceptions for tagged values
        raise UserError(f"no valid YAML: {one_line(error, 160)}") from error


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path`, or packaged under that name in `tessel.configs`, with `key=value` overrides applied.

    Raises UserError naming the file or override, the dotted key, the values it takes and the nearest valid key.
    """
    file = find_recipe(path)
    try:
        data = parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"recipe {file} cannot be read: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"recipe {file} has no sections; it needs at least model.name, data.source and sched.epochs")
    recipe = make_recipe(data, overrides, source=f"recipe {file}")
    if recipe.run.name:
        return recipe
    try:
        return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, name=file.stem))
    except ValidationError as error:
        raise UserError(
            f"recipe {file}: {file.stem!r} is not a valid run name; set run.name= to one made of letters, digits, "
            "_ . + and -"
        ) from error


def make_recipe(data: dict[str, Any], overrides: Sequence[str] = (), *, source: str) -> Recipe:
    """The recipe with the sections `data` and `key=value` overrides applied; `source` is named in errors."""
    try:
        return _make_recipe(data, overrides, source)
    except UserError as error:
        raise _shortened(error) from error


def _shortened(error: UserError) -> UserError:
    """The error in one line, each of its parts of at most 300 letters."""
    parts = [one_line(UserError(part)) for part in str(error).split("; ")]
    found = copy.copy(error)
    found.args = ("; ".join(parts[:MAX_PARTS]) + f"; and {len(parts) - MAX_PARTS} more" * (len(parts) > MAX_PARTS),)
    return found


def _make_recipe(data: dict[str, Any], overrides: Sequence[str], source: str) -> Recipe:
    data = copy.deepcopy(data)
    written = migrate(data, source)
    pairs = [_split(override) for override in overrides]
    # these two decide which other keys there are
    for key, value, text in pairs:
        if key in ("task.kind", "data.source"):
            _set(data, key, value, text)
    if written == 1:
        drop_unused_keys(data)
    task, origin = _chosen(data, source)
    known = {key.name: key for key in recipe_keys(task, origin)}
    for key, value, text in pairs:
        _override(data, known, key, value, text)
    recipe = _validate(data, known, source)
    if problems := [*conflicts(recipe)]:
        raise UserError(f"{source}: " + "; ".join(problems))
    return recipe


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe: `path` itself, else the packaged recipe of that name, with or without `.yaml`."""
    candidates = [base / f"{path}{end}" for base in (Path(), PACKAGED) for end in ("", ".yaml")]
    for candidate in candidates:
        with suppress(OSError):  # a name that is too long
            if candidate.is_file():
                return candidate
    known = sorted(str(file.relative_to(PACKAGED).with_suffix("")) for file in PACKAGED.rglob("*.yaml"))
    wanted = str(path).removesuffix(".yaml")
    near = [name for name in known if Path(name).name == Path(wanted).name]
    near = near or difflib.get_close_matches(wanted, known, cutoff=0.8)
    hint = f"did you mean {' or '.join(near)}?" if near else "`tessel train --list` lists the packaged recipes"
    raise UserError(f"there is no recipe {str(path)!r}, neither as a file nor among the packaged ones; {hint}")


def describe_packaged() -> Iterator[str]:
    """One line for each packaged recipe: its name, and what its first line says."""
    first = ("finetune", "demo")  # what most readers look for
    for file in sorted(PACKAGED.rglob("*.yaml"), key=lambda file: (file.parent.name not in first, file)):
        name = file.relative_to(PACKAGED).with_suffix("").as_posix()
        line = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        yield f"  {name:46s} {textwrap.shorten(line, 100, placeholder=' ...')}"


def flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, over a recipe or a section and all sections inside it."""
    flat = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        nested = (
            flatten(value, f"{prefix}{field.name}.")
            if dataclasses.is_dataclass(value)
            else {prefix + field.name: value}
        )
        flat |= nested
    return flat


def semantic_keys(recipe: Recipe) -> dict[str, Any]:
    """The dotted keys that decide what is learned, with values as JSON has them."""
    keys = {key: value for key, value in flatten(recipe).items() if not NON_SEMANTIC_KEYS.fullmatch(key)}
    return json.loads(json.dumps(keys))


def differences(before: Recipe, now: Recipe) -> list[str]:
    """One text for each key by which two recipes learn something else; empty if a run of one can go on with the other.

    Both recipes hold every key of the present schema. An older recipe has the default in keys that did not exist yet:
    a new key with a neutral default makes no difference, a changed default does.
    """
    return list(changed_keys(semantic_keys(before), semantic_keys(now)))


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON data, defaults included, with the format number and the version of tessel."""
    return {"format": FORMAT, "tessel": __version__, **json.loads(json.dumps(dataclasses.asdict(recipe)))}


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, defaults included; `load_recipe` reads it back to an equal recipe."""
    return yaml.dump(as_dict(recipe), Dumper=_Dumper, sort_keys=False)


def _split(override: str) -> tuple[str, str, str]:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r} is not of the form key=value")
    return present_name(key), value, override


def _chosen(data: dict[str, Any], source: str) -> tuple[str, str]:
    """The task and the data source of a recipe."""
    found = []
    for section, key, registry, default in (
        ("task", "kind", TASKS, "classify"),
        ("data", "source", SOURCES, None),
    ):
        keys = data.get(section) or {}
        if not isinstance(keys, dict):
            raise UserError(f"{source}: {section} is a section: it takes key: value lines, not {keys!r}")
        name = keys.get(key, default)
        if name is None:
            raise UserError(f"{source}: {section}.{key} is missing; it is one of {', '.join(registry)}")
        if not isinstance(name, str) or name not in registry:
            near = difflib.get_close_matches(str(name), registry, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"{source}: {section}.{key}={name!r} must be one of {', '.join(registry)}{hint}")
        found.append(name)
    return found[0], found[1]


def _override(data: dict[str, Any], known: dict[str, Key], key: str, value: str, text: str) -> None:
    owner = next((name for name in known if key == name or key.startswith(f"{name}.")), None)
    if owner is None or (key != owner and typing.get_origin(known[owner].hint) is not dict):
        if value == "null" and owners(key):
            _remove(data, key)
            return
        raise UserError(f"override {text!r}: {unknown_key(key, known)}")
    _set(data, key, _typed(value, known[owner].hint if key == owner else Any, text), text)


def _set(data: dict[str, Any], key: str, value: Any, text: str) -> None:
    """Set a dotted key, and make the sections on its way."""
    section: Any = data
    for part in (parts := key.split("."))[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise UserError(f"override {text!r}: {part!r} is not a section in the recipe")
    section[parts[-1]] = value


def _remove(data: dict[str, Any], key: str) -> None:
    """Remove a dotted key of another task or data source, with which `data.source=` was overridden."""
    section: Any = data
    for part in (parts := key.split("."))[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if isinstance(section, dict):
        section.pop(parts[-1], None)


def _typed(value: str, hint: Any, text: str) -> Any:
    options = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}
    if str in options:
        return None if value in ("null", "~", "") and type(None) in options else value
    try:
        return parse(value)
    except UserError as error:
        raise UserError(f"override {text!r:.80}: the value is not valid YAML ({one_line(error, 120)})") from error


def _validate(data: Mapping[str, Any], known: dict[str, Key], source: str) -> Recipe:
    task, origin = _chosen(dict(data), source)
    spec = TASKS[task]
    try:
        # through JSON, so that strict mode still takes lists for tuples and mappings for sections
        text = json.dumps({**data, "task": {**(data.get("task") or {}), "kind": task}}, default=str)
        return TypeAdapter(recipe_type(spec.options, spec.data, SOURCES[origin].options)).validate_json(text)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(wrong_values(error.errors(), known))) from error
    except (ValueError, TypeError, RecursionError) as error:  # of JSON
        raise UserError(f"{source} is no plain data: {one_line(error)}") from error
