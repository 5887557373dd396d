"""Heads and necks are tried out on the maps of a small image as soon as they are built: what cannot run names its key.

The tried ones are copies, and the random numbers are given back: a trial leaves no trace.
"""

import copy
import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...data.segmentation import IGNORE_INDEX
from ...errors import UserError, one_line

# what goes wrong inside a constructor or a forward that is given other arguments than it takes
REFUSED = (
    *(TypeError, ValueError, AssertionError, LookupError, AttributeError),
    *(ImportError, RuntimeError, OSError, ArithmeticError),
)


SMALL, LARGE = 64, 1024  # sides of an image; some heads pool windows that only a large one fills


NECK = 128  # the fifth and sixth map of a pyramid are still of 2 pixels and 1


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """What is known of a map before there is one."""

    channels: int
    stride: int
    layout: torch.memory_format = torch.contiguous_format  # of the tensor; some heads cannot read channels_last
    passed: bool = False  # by a neck that hands it out as it came in

    def drawn(self, side: int) -> Tensor:
        """Such maps of two images of `side` pixels: one alone can be viewed in ways that several cannot."""
        length = -(-side // self.stride)
        return torch.randn(2, self.channels, length, length).to(memory_format=self.layout)


FeatureSpecs = Sequence[FeatureSpec | None]


def layout(found: Tensor) -> torch.memory_format:
    return torch.contiguous_format if found.is_contiguous() else torch.channels_last


def try_neck(key: str, neck: nn.Module, maps: FeatureSpecs) -> list[FeatureSpec]:
    """The maps that `neck` makes of `maps`. Raises UserError where it makes none."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        given = [m and m.drawn(NECK) for m in maps]
        try:
            outs = copy.deepcopy(neck).eval()(given)
        except REFUSED as error:
            raise UserError(f"{key} does not run on the maps of this backbone: {one_line(error)}") from error
    return [
        FeatureSpec(out.shape[1], round(NECK / out.shape[-1]), layout(out), passed=any(out is one for one in given))
        for out in outs
    ]


def try_head(key: str, head: Any, maps: FeatureSpecs, *, losses: str, size: int | None) -> None:
    """Let `head` predict from maps and learn on them. Raises UserError naming it, or `losses`, where it cannot.

    size: of the training images, taken where a small image is too small.
    """
    head, side = copy.deepcopy(head), SMALL
    with torch.random.fork_rng(devices=[]):
        try:
            try:
                _predict(head, maps, side)
            except REFUSED:
                side = size or LARGE
                _predict(head, maps, side)
        except REFUSED as error:
            raise UserError(f"{key} does not run on the maps of this backbone: {one_line(error)}") from error
        try:
            found = _learn(head, maps, side)
        except REFUSED as error:
            raise UserError(f"{losses} cannot be computed: {one_line(error)}") from error
    for name, value in found.items():
        if "loss" in name and not (value.numel() == 1 and value.requires_grad):
            raise UserError(f"{losses}: {name} is no single number that depends on the weights; is reduction left out?")


def _predict(head: Any, maps: FeatureSpecs, side: int) -> None:
    with torch.no_grad():
        head.eval().predict([m and m.drawn(side) for m in maps], [{"img_shape": torch.Size((side, side))}], None)


def _learn(head: Any, maps: FeatureSpecs, side: int) -> dict[str, Tensor]:
    masks = torch.randint(0, head.num_classes, (2, 1, side, side))
    masks[..., : side // 4, :] = IGNORE_INDEX
    samples = [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=mask)) for mask in masks]
    return head.train().loss([m and m.drawn(side) for m in maps], samples, None)
