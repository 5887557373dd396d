"""What a finished run hands out: the folder `export/` with weights, and how the model is built again."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from ..errors import UserError, one_line
from ..files import replacing
from ..recipe.schema import Dense, Detect, Model, Segment

WEIGHTS, CONFIG = "model.safetensors", "config.json"


BODIES = {"segment": "backbone.body.", "detect": "backbone.body.body."}  # where a classifier's part lies


SECTIONS = {"model": Model, "dense": Dense, "segment": Segment, "detect": Detect}


def export(
    model: nn.Module,
    path: Path,
    *,
    classes: list[str],
    data_config: dict[str, Any],
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write a classifier as `timm.create_model("local-dir:PATH", pretrained=True)` reads it.

    state: the weights, where the model holds but a share of them.
    """
    plain: Any = _Whole(model, _plain(model.state_dict() if state is None else state))
    with _exporting(path) as part:
        save_for_hf(
            plain,
            str(part),
            model_config={"label_names": classes},
            safe_serialization=True,
            data_config=data_config,
        )


def export_parts(path: Path, state: Mapping[str, Any], *, task: str, model: Model, **parts: Any) -> None:
    """Write a model that timm cannot make: its weights, and sections of the recipe and facts as `read_parts` has them.

    task: the room that builds it again, `segment` or `detect`.
    """
    parts["model"] = dataclasses.replace(model, pretrained=False, init_from=None)
    plain = {key: dataclasses.asdict(part) if key in SECTIONS else part for key, part in parts.items()}
    config = {"task": task, "read_with": f"tessel.train.{task}.load", "tessel": version("tessel"), **plain}
    with _exporting(path) as part:
        save_file(_plain(state), part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def read_parts(path: Path, task: str) -> dict[str, Any]:
    """What `export_parts` was given. Raises UserError where the folder holds no export of this task."""
    try:
        config = json.loads((path / CONFIG).read_text())
        if not isinstance(config, dict) or config.get("task") != task:
            raise ValueError(f"its {CONFIG} is not of task.kind={task}; timm.create_model reads a classifier")
        sections = {key: json.dumps(config[key]) for key in ("model", "dense", task)}
        return config | {key: TypeAdapter(SECTIONS[key]).validate_json(text) for key, text in sections.items()}
    except (OSError, ValueError, KeyError, ValidationError) as error:
        raise UserError(
            f"{path} holds no export that can be read ({one_line(error)}); give the export/ of a run"
        ) from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` with the weights in the folder. Raises UserError where they are not its own."""
    try:
        model.load_state_dict(exported(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the weights in {path} are not of the model in its {CONFIG}: {reason}") from error


def exported(path: Path) -> dict[str, Tensor]:
    """The weights of an export, under the names of the model in training."""
    try:
        return load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"export {path} cannot be read ({error}); evaluate one of the run's checkpoints") from error


def exported_classes(path: Path) -> list[str]:
    """Names of what the exported model tells apart, in the order of its outputs."""
    try:
        config = json.loads((path / CONFIG).read_text())
        return list(config["classes"] if "classes" in config else config["label_names"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"export {path} cannot be read ({error}); evaluate one of the run's checkpoints") from error


def exported_backbone(path: Path) -> dict[str, Tensor] | None:
    """An exported segmenter's or detector's backbone, by the names of a classifier; None of any other export."""
    try:
        config = json.loads((path / CONFIG).read_text())
        place = BODIES[config["task"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {key.removeprefix(place): tensor for key, tensor in exported(path).items() if key.startswith(place)}


@contextmanager
def _exporting(path: Path) -> Iterator[Path]:
    """The folder of an export, complete or not at all."""
    try:
        with replacing(path) as part:
            yield part
    except (OSError, SafetensorError) as error:
        raise UserError(f"export {path} cannot be written ({error}); free space there, then start again") from error


def _plain(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


class _Whole:
    """A model as timm saves it, with other weights than it holds: a sharded one cannot be copied."""

    def __init__(self, model: nn.Module, state: dict[str, Any]):
        self.model, self.state = model, state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
