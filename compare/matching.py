"""Models of the lab at equal cost: width and depth are changed until the cost is that of another model."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from ..train.errors import UserError
from ..zoo import cost_of
from ..zoo.lab import VARIANTS, LabConfig
from .subjects import Subject

TOLERANCE = 0.02
MOST = 3  # the largest width over the default one


def cost(subject: Subject, size: int, by: str) -> float:
    """Multiply-adds (`gmacs`) of an image of this side, or the number of parameters."""
    with torch.device("meta"):
        model = subject.make(size)
        if by == "parameters":
            return sum(p.numel() for p in model.parameters())
        return cost_of(model, size).macs


def matched(subject: Subject, target: float, size: int, by: str) -> Subject:
    """The subject with the width, nearest to its own, and the depth of stage 3 at which its cost is `target`, by 2 %.

    Subjects that are not of the lab stay as they are. Raises UserError if there is no such width.
    """
    if subject.name not in VARIANTS or abs(cost(subject, size, by) / target - 1) <= TOLERANCE:
        return subject
    default = VARIANTS[subject.name]
    for width in _widths(default):
        candidate = None
        with suppress(ValueError):  # a width that the mixers' heads do not divide
            candidate = _at_width(subject, default, width, target, size, by)
        if candidate is not None and abs(cost(candidate, size, by) / target - 1) <= TOLERANCE:
            return candidate
    raise UserError(f"no width and depth of {subject.label!r} has {by} within {TOLERANCE:.0%} of {target:,.0f}")


def _widths(default: LabConfig) -> Iterator[int]:
    """Multiples of 4, or of 1 in a small model, the nearest to the default width first."""
    step = 4 if default.width >= 64 else 1
    widths = range(step, default.width * MOST + 1, step)
    yield from sorted(widths, key=lambda width: abs(width - default.width))


def _at_width(subject: Subject, default: LabConfig, width: int, target: float, size: int, by: str) -> Subject | None:
    """The subject of this width with the depth of stage 3 whose cost is nearest to `target`; None if that is too far.

    The cost is linear in the depth, up to the alternation of mixers.
    """

    def with_depth(depth: int) -> Subject:
        options: dict[str, Any] = {"width": width, "depth": (*default.depth[:2], depth, default.depth[3])}
        return subject.changed(**options)

    least = default.depth[2]
    first, second = cost(with_depth(least), size, by), cost(with_depth(2 * least), size, by)
    depth = round(least + least * (target - first) / (second - first))
    return with_depth(depth) if least / 2 <= depth <= 4 * least else None
