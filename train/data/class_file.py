"""Files that name the classes of own data: one name a line, or a table with values and colors."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import UserError, one_line

DEFAULT_FILES = ("classes.csv", "classes.yaml", "classes.json", "classes.txt", "labelmap.txt")
# a line of a label map as CVAT exports it, name:r,g,b:parts:actions
LABEL_MAP_LINE = re.compile(r"(?P<name>[^:]+):(?P<color>\d+,\d+,\d+)(:.*)?")
Color = tuple[int, int, int]


class ClassEntry(NamedTuple):
    """A class; value: in mask files, None if the file gives none."""

    name: str
    value: int | None = None
    color: Color | None = None


def find_class_file(root: Path, given: str | None) -> Path | None:
    """The file that `data.class_map` gives (a path, or one below `root`), else a file of a default name in `root`."""
    if given is not None:
        return Path(given) if Path(given).is_file() else root / given
    return next((root / name for name in DEFAULT_FILES if (root / name).is_file()), None)


def read_class_file(file: Path) -> list[ClassEntry]:
    """The classes in a file, in the order of the model's outputs.

    .txt: one name a line, or CVAT's label map; .csv: columns name and, if needed, value and color (or r, g, b);
    .yaml and .json: a list of names or of mappings with these keys, or a mapping of value to name. Colors are written
    #rrggbb or "r g b". Raises UserError naming the file and what is wrong in it.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        match file.suffix.lower():
            case ".csv":
                entries = [_entry(row) for row in csv.DictReader(text.splitlines(), skipinitialspace=True)]
            case ".json":
                entries = list(_structured(json.loads(text)))
            case ".yaml" | ".yml":
                # every scalar stays text, so that a class may be called no, on or 1
                entries = list(_structured(yaml.load(text, yaml.BaseLoader)))
            case _:
                entries = list(_lines(text))
        _check(entries)
    except (OSError, ValueError, TypeError, AttributeError, csv.Error, yaml.YAMLError) as error:
        raise UserError(f"the class file {file} cannot be read: {one_line(error)}") from error
    return entries


def read_color(text: Any) -> Color:
    """A color written as #rrggbb, as "r g b" or as three numbers. Raises ValueError for anything else."""
    if isinstance(text, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", text.strip()):
        number = int(text.strip()[1:], 16)
        return number >> 16, number >> 8 & 255, number & 255
    parts = re.split(r"[\s,;]+", text.strip("[]() ")) if isinstance(text, str) else list(text)
    red, green, blue = (_whole(part) for part in parts)
    if not all(0 <= channel < 256 for channel in (red, green, blue)):
        raise ValueError(f"the color {text!r} must be #rrggbb or three numbers from 0 to 255")
    return red, green, blue


def hex_color(color: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def default_palette(count: int) -> list[Color]:
    """Distinct colors, black first: the color map of Pascal VOC."""
    return [
        tuple(sum((number >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3))  # type: ignore[misc]
        for number in range(count)
    ]


def _lines(text: str) -> Iterator[ClassEntry]:
    for number, line in enumerate(text.rstrip().splitlines(), 1):
        if line.startswith("# label:"):  # the first line of CVAT's label map
            continue
        if not line.strip():
            raise ValueError(f"line {number} is empty; the number of a line is the value in the masks")
        found = LABEL_MAP_LINE.fullmatch(line.strip())
        yield ClassEntry(found["name"], color=read_color(found["color"])) if found else ClassEntry(line.strip())


def _structured(content: Any) -> Iterator[ClassEntry]:
    if isinstance(content, Mapping):
        for value, name in sorted(content.items(), key=lambda pair: _whole(pair[0])):
            yield ClassEntry(str(name), _whole(value))
        return
    if not isinstance(content, list):
        raise ValueError("it must hold a list of classes, or a mapping of value to name")
    for one in content:
        yield _entry(one) if isinstance(one, Mapping) else ClassEntry(str(one))


def _entry(row: Mapping[str, Any]) -> ClassEntry:
    """A class from a row of a table."""
    fields = {str(key).strip().lower(): value for key, value in row.items() if value not in (None, "")}
    if "name" not in fields:
        raise ValueError(f"a class has no name; its columns are {', '.join(map(str, row))}")
    channels = [fields[channel] for channel in "rgb" if channel in fields]
    color = fields.get("color") if "color" in fields else channels or None
    value = fields.get("value")
    return ClassEntry(
        str(fields["name"]).strip(),
        None if value is None else _whole(value),
        None if color is None else read_color(color),
    )


def _check(entries: Sequence[ClassEntry]) -> None:
    if not entries:
        raise ValueError("it names no classes")
    for field in ClassEntry._fields:
        given = [value for value in (getattr(entry, field) for entry in entries) if value is not None]
        if twice := [value for value in given if given.count(value) > 1]:
            raise ValueError(f"two classes have the {field} {twice[0]}")
        if given and len(given) < len(entries):
            raise ValueError(f"{len(given)} of {len(entries)} classes have a {field}; give it for all or for none")


def _whole(value: Any) -> int:
    number = float(value)
    if number % 1 or number < 0:
        raise ValueError(f"{value!r} must be a whole number of at least 0")
    return int(number)
