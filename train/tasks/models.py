"""Creating models through timm, and loading their initial weights."""

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

# what models raise for arguments or inputs that do not fit
MODEL_ERRORS = (AssertionError, LookupError, RuntimeError, TypeError, ValueError)
# and what timm raises besides for files that are not weights
CREATE_ERRORS = (
    *MODEL_ERRORS,
    *(AttributeError, BadZipFile, EOFError, OSError, SafetensorError, UnpicklingError, struct.error),
)


def create_model(name: str, size: int, *, key: str, pretrained: bool, num_classes: int | None, **options: Any) -> Any:
    """timm.create_model, with `img_size=size` for models with a fixed input size.

    key: the recipe key that names the model, for errors; num_classes: None keeps the classifier of the weights. Raises
    UserError with the reason in one line.
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        known = timm.models.get_pretrained_cfg(name) if ":" not in name else None
        if known is not None and known.fixed_input_size:
            options.setdefault("img_size", size)
        return timm.create_model(name, pretrained=pretrained, **options)
    except CREATE_ERRORS as error:
        hint = "; local-dir: takes the export/ of a classifier" if name.startswith("local-dir:") else ""
        reason = one_line(error) + hint
        raise UserError(f"{key}={name} with {options} and pretrained={pretrained}: {reason}") from error


@contextmanager
def input_errors(model: str, image: Tensor) -> Iterator[None]:
    """Turn what `model` raises for an `image: [C, H, W]` that it does not accept into one UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except MODEL_ERRORS as error:
        size = " x ".join(map(str, image.shape))
        raise UserError(
            f"{model} does not accept {size} images ({one_line(error)}); change data.size, model.in_chans, the model "
            "or its kwargs"
        ) from error


@contextmanager
def batch_norm_errors(images: int, remedy: str) -> Iterator[None]:
    """Turn torch's error for a batch norm with one value per channel into a UserError that ends in `remedy`."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"a batch norm gets one value per channel from a micro-batch of {images}, which has no variance; {remedy}"
        ) from error


def load_initial_weights(model: Any, options: Model, size: int) -> None:
    """Load the weights that `model.init_from` names, with the classifier if it has as many classes.

    Raises UserError if they do not fit.
    """
    channels = {"in_chans": options.in_chans} if options.in_chans else {}
    source = create_model(
        str(options.init_from), size, key="model.init_from", pretrained=True, num_classes=model.num_classes, **channels
    )
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise weights_mismatch(options, reason) from error


def weights_mismatch(options: Model, reason: object) -> UserError:
    """The error for initial weights of another architecture."""
    return UserError(
        f"model.init_from={options.init_from} does not fit model.name={options.name}: {reason}; use a model with the "
        "same parameters"
    )


def check_name(name: str | None, key: str = "model.name") -> None:
    """Raises UserError with the nearest names if neither timm nor tessel has a model of this name, or its weights."""
    if name is None or ":" in name:
        return
    architecture, _, tag = name.partition(".")
    if timm.is_model(name):
        known = ", ".join(timm.models.get_arch_pretrained_cfgs(name))
        if tag and name not in known.split(", "):
            raise UserError(f"{key}={name}: {architecture} has no weights {tag!r}; use one of {known}")
        return
    near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"{key}={name!r} is unknown; `import tessel.zoo, timm; timm.list_models()` lists the names{hint}")
