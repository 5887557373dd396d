"""PLACEHOLDER train/tasks/models.py"""

import difflib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

from ... import zoo as zoo  # registers the models with timm
from ..errors import UserError, one_line
from ..recipe.schema import Model

# what timm raises for names and arguments it can't use, and with these what it raises for files that hold no weights
MISFITS = (AssertionError, LookupError, RuntimeError, TypeError, ValueError)


GARBAGE = (AttributeError, BadZipFile, EOFError, OSError, SafetensorError, UnpicklingError, struct.error)


REFUSALS = (*MISFITS, *GARBAGE)


def create_model(name: str, size: int, *, key: str, pretrained: bool, num_classes: int | None, **options: Any) -> Any:
    """timm.create_model, told the input size where the model needs it. Raises UserError with why not, in a line.

    key: of the recipe, that names the model; num_classes: None keeps the classifier of the pretrained weights.
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        known = timm.models.get_pretrained_cfg(name) if ":" not in name else None
        if known is not None and known.fixed_input_size:
            options.setdefault("img_size", size)
        return timm.create_model(name, pretrained=pretrained, **options)
    except REFUSALS as error:
        hint = "; local-dir: takes the export/ of a classifier" if name.startswith("local-dir:") else ""
        reason = one_line(error) + hint
        raise UserError(f"{key}={name} with {options} and pretrained={pretrained}: {reason}") from error


@contextmanager
def first_forward(culprit: str, image: Tensor) -> Iterator[None]:
    """Turn what a model raises within, given an `image: [3, H, W]` that it does not take, into one UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except MISFITS as error:
        size = " x ".join(map(str, image.shape))
        raise UserError(
            f"{culprit} does not take {size} images ({one_line(error)}); change data.size, the model or its kwargs"
        ) from error


def load_initial_weights(model: Any, wanted: Model, size: int) -> None:
    """Give `model` the weights of `wanted.init_from`; its classifier too, where that has as many classes."""
    source = create_model(
        str(wanted.init_from), size, key="model.init_from", pretrained=True, num_classes=model.num_classes
    )
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"model.init_from={wanted.init_from} does not fit model.name={wanted.name}: {reason}; "
            "take a model with the same parameters"
        ) from error


def check_name(name: str | None, key: str = "model.name") -> None:
    """Raises UserError with the nearest names for a model that neither timm nor tessel has, or with its weights."""
    if name is None or ":" in name:
        return
    architecture, _, tag = name.partition(".")
    if timm.is_model(name):
        known = ", ".join(timm.models.get_arch_pretrained_cfgs(name))
        if tag and name not in known.split(", "):
            raise UserError(f"{key}={name}: {architecture} has no weights {tag!r}; take one of {known}")
        return
    near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "is it spelled as there?"
    raise UserError(f"{key}={name!r} is unknown; `import tessel.zoo, timm; timm.list_models()` lists the names; {hint}")
