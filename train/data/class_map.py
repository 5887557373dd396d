"""Class names and indices of archives and external data sets."""

from typing import Protocol

from ..errors import UserError, one_line


class ClassMapOptions(Protocol):
    """Keys of a data source whose classes a file may name."""

    @property
    def class_map(self) -> str | None: ...

    @property
    def root(self) -> str | None: ...


def class_names(labels: list[str], data: ClassMapOptions, *, numbered: bool = False) -> list[str]:
    """Class names in the order of the model's outputs.

    They are those in `data.class_map` if given, else all numbers up to the highest label if `numbered` and all labels
    are numbers, else the labels in alphabetical order.
    """
    if data.class_map:
        return read_class_map(data)
    found = set(labels)
    if numbered and all(label.isdecimal() for label in found):
        if (highest := max(found, key=lambda label: (len(label), label))) and len(highest) > 6:
            raise UserError(f"the class number {highest:.20} is more than a million; give names by data.class_map")
        return [str(number) for number in range(1 + max(map(int, found)))]
    return sorted(found)


def read_class_map(data: ClassMapOptions) -> list[str]:
    """The class names in the file `data.class_map`. Raises UserError if it cannot be read."""
    from timm.data.readers.class_map import load_class_map

    try:
        mapping = load_class_map(str(data.class_map), data.root or "")
        return [name for name in sorted(mapping, key=mapping.__getitem__) if name]
    except Exception as error:  # timm reads pickles of names too, which can fail in any way
        raise UserError(f"data.class_map={data.class_map} cannot be read: {one_line(error)}") from error


def class_index(label: str, index: dict[str, int], data: ClassMapOptions, *, numbered: bool = False) -> int:
    """The index of a class given by its name, or with `numbered` by its number."""
    if label in index:
        return index[label]
    if numbered and label.isdecimal() and int(label) < len(index):
        return int(label)
    raise UserError(f"class {label!r} is not in data.class_map={data.class_map}, which must list every class")
