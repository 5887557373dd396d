"""Recipes: read from YAML, overridden by `key=value`, checked against the schema, and what they come to in steps."""

import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ..errors import UserError
from .schema import Recipe, leaves
from .validation import contradictions

PACKAGED = Path(__file__).resolve().parents[2] / "configs"


# keys that may change between two starts of one run: they steer where and how it runs, not what it learns
NON_SEMANTIC_KEYS = re.compile(
    r"(ckpt|log|eval|guard)\..*|run\.(out|fresh|device)|data\.(workers|micro_batch|eval_batch)"
    r"|parallel\.(strategy|shard|compile|channels_last|grad_checkpointing)"
)


class _Dumper(yaml.SafeDumper):
    """Quotes the words that `_Loader` would take for something else."""

    yaml_implicit_resolvers = {}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core types and no repeated keys: 1e-3 is a number, `off` is a word."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"line {node.start_mark.line + 1}: key {key!r} occurs twice in one section")
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


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` (or below the packaged `tessel.configs`), with `key=value` overrides applied.

    Raises UserError naming the file or override, the dotted key, what is allowed there and the nearest valid key.
    """
    file = find_recipe(path)
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, UserError) as error:
        raise UserError(f"recipe {file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"recipe {file} holds no sections; it needs at least model.name, data.source and sched.epochs")
    recipe = make_recipe(data, overrides, source=f"recipe {file}")
    if recipe.run.name:
        return recipe
    try:
        return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, name=file.stem))
    except ValidationError as error:
        raise UserError(
            f"recipe {file}: no run can be called {file.stem!r}; give it another name with run.name=, of letters, "
            "digits, _ . + and -"
        ) from error


def make_recipe(data: dict[str, Any], overrides: Sequence[str], *, source: str) -> Recipe:
    """The recipe whose sections `data` holds, with `key=value` overrides applied; `source` is named in errors."""
    for override in overrides:
        _override(data, override)
    recipe = _validate(data, source)
    if problems := [*contradictions(recipe)]:
        raise UserError(f"{source}: " + "; ".join(problems))
    return recipe


def find_recipe(path: str | Path) -> Path:
    """The file a recipe's name means: as given, else below the packaged recipes, with or without `.yaml`."""
    candidates = [base / f"{path}{end}" for base in (Path(), PACKAGED) for end in ("", ".yaml")]
    for candidate in candidates:
        with suppress(OSError):  # a name that is too long
            if candidate.is_file():
                return candidate
    known = sorted(str(file.relative_to(PACKAGED)) for file in PACKAGED.rglob("*.yaml"))
    wanted = f"{str(path).removesuffix('.yaml')}.yaml"
    near = [name for name in known if Path(name).name == Path(wanted).name] or difflib.get_close_matches(wanted, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"packaged are {', '.join(known)}"
    raise UserError(f"no recipe {str(path)!r}: neither a file here nor one of the packaged ones; {hint}")


def flatten(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, over all sections."""
    flat = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        nested = (
            flatten(value, f"{prefix}{field.name}.")
            if dataclasses.is_dataclass(value)
            else {prefix + field.name: value}
        )
        flat |= nested
    return flat


def semantic_keys(recipe: Recipe) -> dict[str, Any]:
    """The dotted keys that decide what is learned."""
    return {key: value for key, value in flatten(recipe).items() if not NON_SEMANTIC_KEYS.fullmatch(key)}


def recipe_hash(recipe: Recipe) -> str:
    """A digest of `semantic_keys(recipe)`."""
    return hashlib.sha256(json.dumps(semantic_keys(recipe), sort_keys=True).encode()).hexdigest()


def dump(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.dump(json.loads(json.dumps(dataclasses.asdict(recipe))), Dumper=_Dumper, sort_keys=False)


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"override {text!r} is not of the form key=value")
    hints = {name: hint for name, hint, *_ in leaves()}
    owner = next((name for name in hints if key == name or key.startswith(f"{name}.")), None)
    if owner is None or (key != owner and typing.get_origin(hints[owner]) is not dict):
        raise UserError(f"override {text!r}: {_unknown(key)}")
    section = data
    for part in (parts := key.split("."))[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise UserError(f"override {text!r}: {part!r} is not a section in the recipe")
    section[parts[-1]] = _typed(value, hints[owner] if key == owner else Any, text)


def _typed(value: str, hint: Any, text: str) -> Any:
    options = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}
    if str in options:
        return None if value in ("null", "~", "") and type(None) in options else value
    try:
        return yaml.load(value, _Loader)
    except (yaml.YAMLError, UserError) as error:
        raise UserError(f"override {text!r}: the value is not valid YAML") from error


def _validate(data: Mapping[str, Any], source: str) -> Recipe:
    try:
        # through JSON, so that strict mode still takes lists for tuples and mappings for sections
        return TypeAdapter(Recipe).validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(map(_explain, error.errors()))) from error


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        return _unknown(key)
    if error["type"].startswith("missing"):
        return f"{key} is missing"
    if error["type"] == "dataclass_type":
        return f"{key} is a section: it takes key: value lines, not {error['input']!r}"
    return f"{key}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _unknown(key: str) -> str:
    known = [name for name, *_ in leaves()]
    last = {name: name.rpartition(".")[2] for name in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    near = near or [name for name in known if last[name] == key.rpartition(".")[2]][:1]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "python -m tessel.train --help lists the keys"
    return f"unknown key {key}; {hint}"
