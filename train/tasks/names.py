"""Names of models, read from the sources of timm and tessel: importing them takes seconds, in which a user waits for
the news of a spelling mistake."""

import difflib
import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ..errors import UserError

ZOO = Path(__file__).resolve().parents[2] / "zoo"
WEIGHT_FILES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")  # endings of a `model.init_from` that is a file


def is_weights_file(source: str) -> bool:
    """Whether `model.init_from` names a file rather than a model."""
    return source.endswith(WEIGHT_FILES) and ":" not in source


@cache
def sources() -> str:
    """The text of all files that register models; empty if timm is not installed."""
    timm = find_spec("timm")
    if timm is None or timm.origin is None:
        return ""
    files = [*Path(timm.origin).with_name("models").glob("*.py"), *ZOO.glob("*.py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(files))


@cache
def names_in_sources() -> list[str]:
    """Names of the models of timm and tessel, sorted."""
    entry_points = re.findall(r"^@register_model\s+def (\w+)\(", sources(), re.MULTILINE)
    tables = re.findall(r"^(?:[A-Z]+_)?VARIANTS\b[^{\n]*\{\n(.*?)^\}", sources(), re.MULTILINE | re.DOTALL)
    variants = re.findall(r'^    "(\w+)":', "\n".join(tables), re.MULTILINE)
    return sorted({*entry_points, *variants})


def check_spelling(name: str | None, key: str) -> None:
    """Raises UserError with the nearest names if no source has the name of a model as a word.

    It says nothing once timm is imported: a plugin may have registered models, which `models.check_name` knows.
    """
    if name is None or ":" in name or is_weights_file(name) or "timm" in sys.modules or not sources():
        return
    architecture = name.partition(".")[0]
    if not re.search(rf"\b{re.escape(architecture)}\b", sources()):
        raise unknown_model(name, key, names_in_sources())


def unknown_model(name: str, key: str, known: list[str]) -> UserError:
    """The error for a model that neither timm nor tessel has, with the nearest of the `known` names."""
    near = difflib.get_close_matches(name.partition(".")[0], known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"{key}={name!r} is unknown; `tessel list` and timm.list_models() list the names{hint}")
