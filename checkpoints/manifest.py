"""Reading and checking of the lists of published weights: `manifest.toml` of classifiers, `dense.toml` of whole
segmenters and detectors."""

import dataclasses
import difflib
import math
import re
import tomllib
from dataclasses import dataclass, field
from functools import cache
from inspect import formatannotation
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

MANIFEST = Path(__file__).with_name("manifest.toml")
DENSE_MANIFEST = Path(__file__).with_name("dense.toml")
_BOUNDS = {
    "size": (0, math.inf),
    "published_top1": (0, 100),
    "reproduced_top1": (0, 100),
    "published": (0, 100),
    "reproduced": (0, 100),
    "crop_pct": (0.1, 1),
    "num_classes": (1, math.inf),
}


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A published weight file: what the rows of both lists have. The comments at their tops explain the fields."""

    name: str
    url: str
    why_no_url: str = ""
    sha256: str
    size: int
    license: str
    source: str
    state_key: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Weight(WeightFile):
    """A row of `manifest.toml`: weights of a classifier."""

    published_top1: float | None = None
    reproduced_top1: float | None = None
    input_size: tuple[int, int, int]
    crop_pct: float
    crop_mode: str = "center"
    interpolation: str
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    num_classes: int
    options: dict[str, float | int] = field(default_factory=dict)

    @property
    def model(self) -> str:
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        return self.name.partition(".")[2]


@dataclass(frozen=True, kw_only=True)
class DenseWeight(WeightFile):
    """A row of `dense.toml`: weights of a whole segmenter or detector. It is named like the recipe that builds it."""

    metric: str
    published: float
    reproduced: float | None = None


Row = TypeVar("Row", bound=WeightFile)


def load_manifest(path: str | Path | None = None) -> dict[str, Weight]:
    """The rows of the manifest at `path` (default: the package's) by name, in the order of the file.

    Raises ValueError naming the row and the field if one is unknown, missing or wrong.
    """
    return dict(_read(Path(path or MANIFEST), Weight))


def load_dense_manifest(path: str | Path | None = None) -> dict[str, DenseWeight]:
    """The same of the segmenters and detectors."""
    return dict(_read(Path(path or DENSE_MANIFEST), DenseWeight))


def find_weight(name: str) -> Weight:
    """The row `name`; for the name of a model without a tag, its first row. Raises ValueError if there is none."""
    rows = load_manifest()
    for row in rows.values():
        if name in (row.name, row.model):
            return row
    close = difflib.get_close_matches(name, rows, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "`tessel weights list` lists them"
    raise ValueError(f"no published weights are named {name!r}; {hint}")


def find_dense_weight(recipe: str) -> DenseWeight:
    """The row of the segmenter or detector that `recipe` builds. Raises ValueError if there is none."""
    rows = load_dense_manifest()
    if recipe in rows:
        return rows[recipe]
    raise ValueError(
        f"the list has no published weights for {recipe}: give a file of them with --weights, or weights=... in "
        "Python; `tessel weights list '*/*'` shows the recipes that have some"
    )


@cache
def _read(path: Path, kind: type[Row]) -> dict[str, Row]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    return {name: _row(name, table, path, kind) for name, table in tables.items()}


def _row(name: str, table: Any, path: Path, kind: type[Row]) -> Row:
    where = f"{path}, row {name!r}"
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {table!r} is not a table")
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name != "name"}
    for key, value in table.items():
        if key not in fields:
            raise ValueError(f"{where}: unknown field {key!r}; known: {', '.join(fields)}")
        if not _fits(value, fields[key].type):
            raise ValueError(f"{where}: field {key!r} = {value!r} is not of type {formatannotation(fields[key].type)}")
    for key, f in fields.items():
        if key not in table and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: field {key!r} is missing")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    weight = kind(name=name, **values)
    if problem := _problem(weight):
        raise ValueError(f"{where}: {problem}")
    return weight


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is exactly of type `hint`: the integer 1 is no float, and true is no integer."""
    if get_origin(hint) is tuple:
        return isinstance(value, list) and [type(item) for item in value] == list(get_args(hint))
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(item, get_args(hint)[1]) for item in value.values())
    if isinstance(hint, UnionType):
        return type(value) in get_args(hint)
    return type(value) is hint


def _problem(weight: WeightFile) -> str | None:
    if isinstance(weight, Weight) and not (weight.model and weight.tag):
        return "the name must read model.tag"
    if weight.url and not weight.url.startswith("https://"):
        return f"field 'url' = {weight.url!r} must start with https:// or be empty"
    if bool(weight.url) == bool(weight.why_no_url):
        return "exactly one of the fields 'url' and 'why_no_url' must be filled"
    if weight.sha256 and not re.fullmatch("[0-9a-f]{64}", weight.sha256):
        return f"field 'sha256' = {weight.sha256!r} must be empty or 64 lower-case hex digits"
    if not weight.license or not weight.source:
        return "the fields 'license' and 'source' must be filled"
    for key, (low, high) in _BOUNDS.items():
        value = getattr(weight, key, None)
        if value is not None and not low <= value <= high:
            return f"field {key!r} = {value} must lie in [{low}, {high}]"
    return None
