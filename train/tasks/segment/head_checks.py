"""Smoke tests of heads and necks on dummy feature maps, so that a head that cannot run fails at build time.

The error then names the recipe key of the head. The checks use deep copies and a forked random generator: neither the
weights of the head nor later random numbers change.
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

# what constructors and forwards of mmsegmentation raise for arguments that do not fit
HEAD_ERRORS = (
    *(TypeError, ValueError, AssertionError, LookupError, AttributeError),
    *(ImportError, RuntimeError, OSError, ArithmeticError),
)
# sides in pixels of the dummy image; some heads pool windows that only the maps of a large image fill
SMALL_SIDE, LARGE_SIDE = 64, 1024
NECK_SIDE = 128  # large enough that the sixth map of a pyramid still has a pixel


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Channels, stride and memory format of a feature map [B, C, H / stride, W / stride]."""

    channels: int
    stride: int
    memory_format: torch.memory_format = torch.contiguous_format  # some heads cannot read channels_last
    passed_through: bool = False  # an output of a neck that is one of its inputs

    def dummy(self, side: int) -> Tensor:
        """A random feature map of images of `side` x `side` pixels.

        The batch has two images, because some faulty views succeed with a single one.
        """
        length = -(-side // self.stride)
        return torch.randn(2, self.channels, length, length).to(memory_format=self.memory_format)


# by stage; None: a stage that nothing reads
FeatureSpecs = Sequence[FeatureSpec | None]


def memory_format_of(features: Tensor) -> torch.memory_format:
    return torch.contiguous_format if features.is_contiguous() else torch.channels_last


def check_neck(key: str, neck: nn.Module, features: FeatureSpecs) -> list[FeatureSpec]:
    """Run `neck` on dummy maps and return the specs of its outputs. Raises UserError naming `key` if it cannot run."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        inputs = _dummies(features, NECK_SIDE)
        try:
            outputs = copy.deepcopy(neck).eval()(inputs)
        except HEAD_ERRORS as error:
            raise UserError(f"{key} does not run on the feature maps of this backbone: {one_line(error)}") from error
    return [
        FeatureSpec(
            out.shape[1],
            stride=round(NECK_SIDE / out.shape[-1]),
            memory_format=memory_format_of(out),
            passed_through=any(out is one for one in inputs),
        )
        for out in outputs
    ]


def check_head(key: str, head: nn.Module, features: FeatureSpecs, *, losses: str, size: int | None) -> None:
    """Let `head` predict and compute its losses on dummy maps. Raises UserError naming `key` or `losses` if it cannot.

    losses: the recipe key of the losses; size: side of the training images, used if a small image is too small for the
    head. Works under torch.no_grad and torch.inference_mode too.
    """
    # inference_mode(False) enables gradients, under no_grad too; a copy made in inference mode could not have any
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        head, side = copy.deepcopy(head), SMALL_SIDE
        try:
            try:
                _predict(head, features, side)
            except HEAD_ERRORS:
                side = size or LARGE_SIDE
                _predict(head, features, side)
        except HEAD_ERRORS as error:
            raise UserError(f"{key} does not run on the feature maps of this backbone: {one_line(error)}") from error
        try:
            values = _compute_losses(head, features, side)
        except HEAD_ERRORS as error:
            raise UserError(f"{losses} cannot be computed: {one_line(error)}") from error
    for name, value in values.items():
        if "loss" in name and not (value.numel() == 1 and value.requires_grad):
            raise UserError(
                f"{losses}: {name} is not a scalar that depends on the weights; does the loss have a reduction?"
            )


def _predict(head: Any, features: FeatureSpecs, side: int) -> None:
    with torch.no_grad():
        head.eval().predict(_dummies(features, side), [{"img_shape": torch.Size((side, side))}], None)


def _compute_losses(head: Any, features: FeatureSpecs, side: int) -> dict[str, Tensor]:
    masks = torch.randint(0, head.num_classes, (2, 1, side, side))
    masks[..., : side // 4, :] = IGNORE_INDEX
    samples = [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=mask)) for mask in masks]
    return head.train().loss(_dummies(features, side), samples, None)


def _dummies(features: FeatureSpecs, side: int) -> list[Tensor | None]:
    return [spec.dummy(side) if spec else None for spec in features]
