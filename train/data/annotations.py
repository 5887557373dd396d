"""PLACEHOLDER train/data/annotations.py"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

LIMIT = 2**20  # pixels of a side; what is not finite is beyond it too


class Object(NamedTuple):
    name: str  # by which messages call it
    box: tuple[float, float, float, float]  # x1, y1, x2, y2
    label: int  # -1: of a category that is not listed
    crowd: int
    area: float
    segmentation: Any


@dataclass
class Entry:
    """One image as its annotation file describes it; height and width 0 where that does not say."""

    path: str
    height: int = 0
    width: int = 0
    objects: list[Object] = field(default_factory=list)


@dataclass
class Entries:
    source: str
    classes: list[str]
    images: list[Entry]


def are_numbers(values: Any, count: int, limit: float = LIMIT) -> bool:
    """Whether this is a list of so many numbers of pixels."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and abs(value) < limit for value in values)
    )
