"""Objects in images, as annotation files describe them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from ..errors import FaultsError, UserError
from .split import held_out

MAX_COORDINATE = 2**20  # sanity limit in pixels; also rejects infinity and NaN
NO_SEGMENTATION = "has no segmentation, from which masks are drawn (task.kind=segment, task.detect.detector=mask_rcnn)"

FileT = TypeVar("FileT")


class AnnotatedObject(NamedTuple):
    name: str  # for messages
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
    label: int  # -1: its category is not listed
    crowd: int
    area: float
    segmentation: Any


@dataclass
class AnnotatedImage:
    """One image; height and width are 0 if the annotation file does not give them."""

    path: str
    height: int = 0
    width: int = 0
    objects: list[AnnotatedObject] = field(default_factory=list)


@dataclass
class Annotations:
    """All images of an annotation file."""

    source: str
    classes: list[str]
    images: list[AnnotatedImage]

    def part(self, split: str, fraction: float, names: Sequence[str]) -> "Annotations":
        """The split "train" or "val" of annotations that have none: by a hash of the images' `names`."""
        held = held_out(names, fraction)
        images = [image for image, chosen in zip(self.images, held, strict=True) if chosen == (split == "val")]
        return replace(self, images=images)


def are_numbers(values: Any, count: int, limit: float = MAX_COORDINATE) -> bool:
    """Whether `values` is a list of `count` numbers below the limit."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and abs(value) < limit for value in values)
    )


def read_all(files: Iterable[FileT], read: Callable[[FileT], AnnotatedImage]) -> list[AnnotatedImage]:
    """`read(file)` of each annotation file. Raises FaultsError with the faults of all files, not of the first alone."""
    images, faults = [], []
    for file in files:
        try:
            images.append(read(file))
        except UserError as error:
            faults.append(str(error))
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if faults[1:] else ""
        raise FaultsError(f"{faults[0]}{more}", faults)
    return images
