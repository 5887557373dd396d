"""The backbone of a dense task: built as the recipe says, on published weights or a classifier's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..zoo.dense import DenseBackbone
from .errors import UserError, one_line
from .exports import exported_backbone
from .schema import Dense, Model
from .transfer import REFUSALS, create


def build_backbone(model: Model, dense: Dense, levels: Sequence[int]) -> DenseBackbone:
    """`model` as a backbone that hands out its maps of `levels`. Raises UserError for what timm refuses."""
    options: dict[str, Any] = dict(model.kwargs)
    if model.drop_path is not None:
        options["drop_path_rate"] = model.drop_path
    try:
        return DenseBackbone(
            model.name,
            pretrained=model.pretrained,
            out_indices=levels,
            norms=dense.norms,
            batch_norm=dense.batch_norm,
            **options,
        )
    except REFUSALS as error:
        raise UserError(
            f"model.name={model.name} with {options} and pretrained={model.pretrained}: {one_line(error)}"
        ) from error


def try_backbone(backbone: DenseBackbone, model: Model, size: tuple[int, int], remedy: str) -> list[Tensor]:
    """The maps of one image of `size` (height, width). Raises UserError, ending in `remedy`, where there are none."""
    training = backbone.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return backbone.eval()(torch.zeros(1, 3, *size))
    except REFUSALS as error:
        pixels = f"{size[0]} x {size[1]} pixels"
        raise UserError(
            f"model.name={model.name} does not run on images of {pixels} ({one_line(error)}); {remedy}"
        ) from error
    finally:
        backbone.train(training)


def begin_backbone(backbone: DenseBackbone, model: Model, size: int) -> None:
    """Give `backbone` the weights that `model.init_from` names, if any: of a classifier, or below heads of ours."""
    if not model.init_from:
        return
    folder = model.init_from.removeprefix("local-dir:")
    state = exported_backbone(Path(folder)) if folder != model.init_from else None
    if state is None:
        source = create(model.init_from, size, key="model.init_from", pretrained=True, num_classes=None)
        state = source.state_dict()
    try:
        backbone.load_classifier(state)
    except ValueError as error:
        raise UserError(
            f"model.init_from={model.init_from} does not fit model.name={model.name}: {error}; "
            "take a model with the same parameters"
        ) from error
