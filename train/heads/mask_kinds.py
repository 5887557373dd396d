"""The mask-classification heads by name: the parts of each, and its loss, from the options of a recipe."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..errors import UserError
from .library import parse_options
from .mask_classifier import mask2former_parts
from .mask_loss import MaskLoss
from .mask_options import Mask2FormerOptions, MaskOptions, PemOptions
from .pem import pem_parts


class MaskParts(NamedTuple):
    """What a `MaskClassifier` is made of, and the loss of what it predicts."""

    pixel_decoder: nn.Module
    decoder: nn.Module
    width: int
    """channels of the queries"""
    criterion: MaskLoss


def mask2former(
    given: Mapping[str, Any], key: str, *, channels: Sequence[int], strides: Sequence[int], classes: int
) -> MaskParts:
    """Mask2Former on four maps, from fine to coarse. Raises UserError naming `key` for invalid options in `given`."""
    options = parse_options(Mask2FormerOptions, given, key)
    parts = mask2former_parts(options, classes, channels, strides)
    return MaskParts(*parts, options.hidden_dim, MaskLoss(options, classes))


def pem(
    given: Mapping[str, Any], key: str, *, channels: Sequence[int], strides: Sequence[int], classes: int
) -> MaskParts:
    """PEM on four maps, from fine to coarse. Raises UserError naming `key` for invalid options in `given`."""
    options = parse_options(PemOptions, given, key)
    if options.hidden_dim % options.num_attention_heads:
        raise UserError(
            f"{key}: num_attention_heads={options.num_attention_heads} do not divide hidden_dim={options.hidden_dim}"
        )
    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(MaskOptions)}
    criterion = MaskLoss(Mask2FormerOptions(**shared), classes)
    return MaskParts(*pem_parts(options, channels), options.hidden_dim, criterion)
