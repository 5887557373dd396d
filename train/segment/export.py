"""What a finished run hands out: weights, and a description from which the segmenter is built again."""

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import exported
from ..schema import UserError
from .model import Segmenter, assemble

DESCRIPTION = "config.json"
KIND = "tessel segmenter"


def write_export(path: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the weights and `facts` (specification, classes, palette, mean, std) into the folder `path`."""
    part = path.with_name(f".tmp-{path.name}")
    content = {"kind": KIND, "read_with": "tessel.train.segment.load", "tessel": version("tessel"), **facts}
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        (part / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"export {path} cannot be written ({error}); free space there, then start again") from error


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
