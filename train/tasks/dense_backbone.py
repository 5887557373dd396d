"""The backbone of a dense task: created from the recipe, with published weights or those of another model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...zoo.dense import DenseBackbone
from ..errors import UserError, one_line
from ..recipe.schema import Dense, Model
from .export import read_backbone
from .models import CREATE_ERRORS, create_source, weights_hint, weights_mismatch


def build_backbone(model: Model, dense: Dense, levels: Sequence[int]) -> DenseBackbone:
    """`model` as a backbone that returns the feature maps of the stages `levels`. Raises UserError if timm refuses."""
    options: dict[str, Any] = model.arguments
    if model.drop_path_rate is not None:
        options["drop_path_rate"] = model.drop_path_rate
    try:
        backbone = DenseBackbone(
            model.name,
            pretrained=bool(model.pretrained),
            out_indices=levels,
            norms=dense.norms,
            batch_norm=dense.batch_norm,
            **options,
        )
    except CREATE_ERRORS as error:
        hint = weights_hint("model.name", error) if model.pretrained else ""
        raise UserError(
            f"model.name={model.name} with {options} and pretrained={model.pretrained}: {one_line(error, 600)}{hint}"
        ) from error
    backbone.local_batch_norm = not dense.sync_batch_norm  # type: ignore[assignment]
    return backbone


def check_backbone(backbone: DenseBackbone, model: Model, size: tuple[int, int], remedy: str) -> list[Tensor]:
    """The feature maps of one zero image of `size` (height, width).

    Raises UserError, ending in `remedy`, if the backbone does not accept it.
    """
    training = backbone.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return backbone.eval()(torch.zeros(1, 3, *size))
    except CREATE_ERRORS as error:
        pixels = f"{size[0]} x {size[1]} pixels"
        raise UserError(
            f"model.name={model.name} does not accept images of {pixels} ({one_line(error)}); {remedy}"
        ) from error
    finally:
        backbone.train(training)


def load_initial_backbone(backbone: DenseBackbone, model: Model, size: int) -> None:
    """Load the weights that `model.init_from` names, if any: of a classifier, or of an exported dense model."""
    if not model.init_from:
        return
    folder = model.init_from.removeprefix("local-dir:")
    state = read_backbone(Path(folder)) if folder != model.init_from else None
    if state is None:
        state = create_source(model, size, None).state_dict()
    try:
        backbone.load_classifier(state)
    except ValueError as error:
        raise weights_mismatch(model, error) from error
