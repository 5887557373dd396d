"""PLACEHOLDER train/data/class_map.py"""

from timm.data.readers.class_map import load_class_map

from ..errors import UserError, one_line
from ..recipe.schema import Data


def _classes(labels: list[str], data: Data) -> list[str]:
    """What data.class_map lists, else numbers up to the highest (WebDataset), else names by alphabet, as of folders."""
    if data.class_map:
        return _mapped(data)
    found = set(labels)
    if data.source == "wds" and all(label.isdecimal() for label in found):
        return [str(number) for number in range(1 + max(map(int, found)))]
    return sorted(found)


def _mapped(data: Data) -> list[str]:
    try:
        mapping = load_class_map(str(data.class_map), data.root or "")
    except (OSError, AssertionError, ValueError) as error:
        raise UserError(f"data.class_map={data.class_map} cannot be read: {one_line(error)}") from error
    return [name for name in sorted(mapping, key=mapping.__getitem__) if name]


def _number(label: str, number: dict[str, int], data: Data) -> int:
    """The index of a class given by its name, or as WebDataset has it by its number."""
    if label in number:
        return number[label]
    if data.source == "wds" and label.isdecimal() and int(label) < len(number):
        return int(label)
    raise UserError(f"class {label!r} is not in data.class_map={data.class_map}, which must list every class")
