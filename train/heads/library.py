"""Importing transformers, and reading the options of a head from a recipe."""

import json
import logging
import sys
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ..errors import UserError

OptionsT = TypeVar("OptionsT")


def library(name: str) -> Any:
    """The module `transformers.models.NAME`. Raises UserError naming the extra if it cannot be imported."""
    try:
        import_module("scipy.optimize")  # the matchers of transformers call it
        with without_this_folder():
            return import_module(f"transformers.models.{name}")
    except ImportError as error:
        raise UserError(
            f"this head needs packages that cannot be imported ({error}): pip install 'tessel[transformers]'"
        ) from error


@contextmanager
def without_this_folder() -> Iterator[None]:
    """Take the folder of the package tessel off the path for imports.

    A command that is started in it would give transformers our folder `kernels` for the package of that name.
    """
    here, before = Path(__file__).resolve().parents[2], sys.path
    sys.path = [entry for entry in before if Path(entry).resolve() != here]
    try:
        yield
    finally:
        sys.path = before


def parse_options(kind: type[OptionsT], given: Mapping[str, Any], key: str) -> OptionsT:
    """`given` as a dataclass of options. Raises UserError naming `key` for an unknown name or an invalid value."""
    try:
        # in JSON a list is valid for a tuple
        return TypeAdapter(kind).validate_json(json.dumps(dict(given), default=str))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = ", ".join(sorted(typing.get_type_hints(kind)))
            raise UserError(f"{key} has no option {name}; it takes {known}") from error
        raise UserError(f"{key}: {name}={first['input']!r}: {first['msg']}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log of transformers, which warns about backbones that it does not know."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
