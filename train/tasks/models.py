"""Creating models through timm, and loading their initial weights."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ... import zoo as zoo  # registers the models with timm
from ...checkpoints import load_manifest
from ..errors import UserError, one_line
from ..recipe.schema import Model, Recipe
from ..recipe.sizing import replaced, starts_from_weights
from .export import CONFIG, WEIGHTS, verify
from .names import is_weights_file, unknown_model

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
    if name.startswith("local-dir:"):
        verify(Path(name.removeprefix("local-dir:")), CONFIG, WEIGHTS)
    try:
        known = timm.models.get_pretrained_cfg(name) if ":" not in name else None
        if known is not None and known.fixed_input_size:
            options.setdefault("img_size", size)
        return timm.create_model(name, pretrained=pretrained, **options)
    except CREATE_ERRORS as error:
        hint = "; local-dir: takes the export/ of a classifier" if name.startswith("local-dir:") else ""
        hint = hint or (weights_hint(key, error) if pretrained else "")
        reason = one_line(error, 600) + hint
        raise UserError(f"{key}={name} with {options} and pretrained={pretrained}: {reason}") from error


def weights_hint(key: str, error: Exception) -> str:
    """What else to begin with, if the weights of the model that `key` names are missing or cannot be downloaded."""
    if not isinstance(error, OSError | RuntimeError):
        return ""
    hints = {
        "model.name": ". model.init_from=FILE starts from a file of weights, model.pretrained=false from random ones",
        "model.init_from": ". It can also be a file of weights",
        "the model": ". weights=FILE (--weights FILE) takes them from a file",
    }
    return hints.get(key, "")


def resolve_pretrained(recipe: Recipe) -> Recipe:
    """The recipe with true or false for `model.pretrained=auto`: whether the model has weights for download.

    It is false if the recipe names other initial weights.
    """
    model = recipe.model
    if model.pretrained != "auto":
        return recipe
    recipe = replaced(recipe, {"model.pretrained": False})
    if starts_from_weights(recipe) or ":" in model.name:
        return recipe
    return replaced(recipe, {"model.pretrained": zoo.has_weights(model.name)})


def no_weights(name: str) -> str:
    """Why a model has no weights that can be downloaded, and what to do."""
    architecture = name.partition(".")[0]
    row = next((row for row in load_manifest().values() if architecture in (row.model, row.name)), None)
    text = f"{name} starts from random weights: "
    if row is None or row.url:
        return (
            text + "its authors published none; model.init_from takes those of a run (local-dir:RUN/export) or a file"
        )
    return text + (
        f"its file {row.name} cannot be downloaded by a program ({row.why_no_url}). Download it by hand "
        f"from {row.source}, and keep it with `tessel weights import {row.name} FILE` or set model.init_from=FILE"
    )


def create_source(options: Model, size: int, num_classes: int | None) -> Any:
    """The model with the weights that `model.init_from` names. Raises UserError if they cannot be read."""
    source = str(options.init_from)
    if not is_weights_file(source):
        channels = {"in_chans": options.in_chans} if options.in_chans else {}
        return create_model(source, size, key="model.init_from", pretrained=True, num_classes=num_classes, **channels)
    file = os.path.expanduser(source)
    if not os.path.isfile(file):
        raise UserError(f"model.init_from={source}: there is no such file")
    kwargs = {**({"in_chans": options.in_chans} if options.in_chans else {}), **options.arguments}
    given = kwargs.pop("pretrained_cfg_overlay", {})
    # published weights have the classes of the model's own, weights from elsewhere may have those of the data
    mismatch: UserError | None = None
    for overlay in ({}, {"num_classes": num_classes}):
        kwargs["pretrained_cfg_overlay"] = {**overlay, **given, "file": file}
        create = partial(create_model, options.name, size, key="model.name", num_classes=num_classes, **kwargs)
        generator = torch.get_rng_state()
        try:
            model = create(pretrained=True)
        except UserError as error:
            mismatch = error
            if num_classes is None or "num_classes" in given:
                break
            continue
        # timm loads what fits, if the classes differ, and that may be nothing
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator)
            if equal_weights(model, create(pretrained=False)):
                raise weights_mismatch(options, "the file has no weight of this model")
        return model
    assert mismatch is not None
    raise weights_mismatch(options, one_line(mismatch.__cause__ or mismatch)) from mismatch


def equal_weights(model: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters of two models of one architecture are the same."""
    return all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


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

    Position embeddings and biases of another image or window size are resized. Raises UserError if the weights do not
    fit.
    """
    source = create_source(options, size, model.num_classes)
    try:
        model.load_state_dict(zoo.resized_weights(model, source.state_dict()))
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
    if name is None or ":" in name or (key == "model.init_from" and is_weights_file(name)):
        return
    architecture, _, tag = name.partition(".")
    if timm.is_model(name):
        known = ", ".join(timm.models.get_arch_pretrained_cfgs(name))
        if tag and name not in known.split(", "):
            raise UserError(f"{key}={name}: {architecture} has no weights {tag!r}; use one of {known}")
        return
    raise unknown_model(name, key, timm.list_models())
