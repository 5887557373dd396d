"""What a finished run hands out: weights, and a description from which the segmenter is built again."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import export_with, exported
from ..schema import UserError
from .model import Segmenter, assemble

DESCRIPTION = "config.json"
KIND = "tessel segmenter"


def write_export(path: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the weights and `facts` (specification, classes, palette, mean, std) into the folder `path`."""
    content = {"kind": KIND, "read_with": "tessel.train.segment.load", "tessel": version("tessel"), **facts}
    export_with(path, state, content)


def load_export(path: Path) -> Segmenter:
    """The segmenter that `write_export` wrote into the folder `path`."""
    try:
        facts = json.loads((path / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} holds no {DESCRIPTION} that can be read ({error}); give the export folder of a run"
        ) from error
    if not isinstance(facts, dict) or facts.get("kind") != KIND:
        raise UserError(f"{path} is no exported segmenter; timm.create_model('local-dir:{path}') reads a classifier")
    model = assemble(facts["specification"])
    try:
        model.load_state_dict(exported(path))
    except RuntimeError as error:
        raise UserError(f"the weights in {path} are not of the model in its {DESCRIPTION}: {error}") from error
    model.pretrained_cfg = {**dict(model.pretrained_cfg), "mean": facts["mean"], "std": facts["std"]}
    model.classes, model.palette = facts["classes"], facts["palette"]
    return model.eval()
