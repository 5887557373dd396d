"""What is compared: models of timm and tessel by name, and models of the lab by the specification of their mixers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from ..blocks import MIXERS
from ..train.errors import UserError
from ..train.tasks.models import check_name
from ..zoo._specification import parse_mixers

# well-known models of timm of about 25 million parameters, beside which ours are often put
PEERS = (
    "shvit_s4", "mambaout_tiny", "convit_small", "crossvit_small_240", "tnt_s_patch16_224",
    "swin_tiny_patch4_window7_224", "convnext_tiny", "davit_tiny",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that `timm.create_model(name, **options)` makes; `label` is how the user wrote it."""

    label: str
    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> list[Any]:
        """What tells it from others, as JSON data."""
        return [self.label, self.name, dict(self.options)]

    def make(self, size: int | None = None, **options: Any) -> nn.Module:
        """The model with random weights; models of a fixed input size are made for images of `size`."""
        known = timm.get_pretrained_cfg(self.name)
        if size is not None and known is not None and known.fixed_input_size and known.input_size[-1] != size:
            options["img_size"] = size
        return timm.create_model(self.name, **{**self.options, **options})

    def changed(self, **options: Any) -> "Subject":
        """The same with other options of the model."""
        return dataclasses.replace(self, options={**self.options, **options})


def parse_subject(text: str, lab: str) -> Subject:
    """A model's name, or the mixers of the model `lab` of the lab. Raises UserError that names what is wrong."""
    if text in MIXERS or set("(|,") & set(text):
        try:
            parse_mixers(text, 4)
        except ValueError as error:
            raise UserError(str(error)) from error
        return Subject(text, lab, {"mixers": text})
    check_name(text, "the model")
    return Subject(text, text)
