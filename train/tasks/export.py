"""The folder `export/` of a finished run: weights, and a config from which the model is built again.

A classifier is written in the format of timm. A model that timm cannot create is written as `model.safetensors` and a
`config.json` with the sections of its recipe. Both configs carry the format number of the export and the version of
tessel. A reader knows every older format; a test loads exports of earlier versions (tests/artefacts).

`SHA256SUMS` beside them has the sha256 of both files, in the format of `sha256sum -c`. Readers compare; exports of 0.1
have none.

Format 2 (0.2): the sections of a dense export have the key names of recipe format 2.
Format 1 (0.1): no format number.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from ... import __version__
from ...checkpoints import sha256_of
from ..errors import UserError, one_line
from ..files import check_format, damaged_file, replacing
from ..recipe.migrate import rename_keys
from ..recipe.registry import TASKS
from ..recipe.schema import Model

FORMAT = 2
WEIGHTS, CONFIG, SUMS = "model.safetensors", "config.json", "SHA256SUMS"


def export_classifier(
    model: nn.Module,
    path: Path,
    *,
    classes: list[str],
    data_config: dict[str, Any],
    state: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a classifier so that `timm.create_model("local-dir:PATH", pretrained=True)` reads it.

    data_config: of the input (timm's resolve_data_config); state: the weights, if the model has only shards of them;
    facts: further JSON data of the config.
    """
    saved: Any = _WithState(model, _to_plain(model.state_dict() if state is None else state))
    with _writing(path) as part:
        save_for_hf(
            saved,
            str(part),
            model_config={"label_names": classes, "format": FORMAT, "tessel": __version__, **(facts or {})},
            safe_serialization=True,
            data_config=data_config,
        )


def export_model(
    path: Path, state: Mapping[str, Any], *, task: str, model: Model, sections: Mapping[str, Any], **facts: Any
) -> None:
    """Write a model that timm cannot create.

    task: its kind; model, sections: sections of the recipe that build it, by name; facts: further JSON data.
    """
    model = dataclasses.replace(model, pretrained=False, init_from=None, freeze=None)
    plain = {name: dataclasses.asdict(section) for name, section in {"model": model, **sections}.items()}
    header = {
        "format": FORMAT,
        "tessel": __version__,
        "task": task,
        "read_with": TASKS[task].load.replace(":", "."),
    }
    with _writing(path) as part:
        save_file(_to_plain(state), part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(json.dumps({**header, **plain, **facts}, indent=1) + "\n")


def read_export(path: Path, task: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `export_model`, by name. sections: name -> class.

    Raises UserError if the folder has no export of this task, or one of a later version of tessel.
    """
    try:
        config = _read_config(path)
        if not isinstance(config, dict) or config.get("task") != task:
            raise ValueError(f"its {CONFIG} is not of task.kind={task}; timm.create_model reads a classifier")
        check_format(config, FORMAT, f"export {path}")
        _migrate(config, task)
        classes = {"model": Model, **sections}
        return config | {
            name: TypeAdapter(section).validate_json(json.dumps(config[name])) for name, section in classes.items()
        }
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RecursionError, ValidationError) as error:
        raise UserError(f"{path} has no readable export ({one_line(error)}); give the export/ of a run") from error


def _migrate(config: dict[str, Any], task: str) -> None:
    """Bring the sections of an older export to the present key names."""
    recipe = {"model": config["model"], "task": {task: config.get(task, {}), "dense": config.get("dense", {})}}
    # format 1 has the file names of COCO in `detect`, which no model needs
    for key in ("train", "val"):
        recipe["task"][task].pop(key, None)
    rename_keys(recipe)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights in the folder into `model`. Raises UserError if they do not fit."""
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the weights in {path} do not fit the model in its {CONFIG}: {reason}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of an export, by the parameter names of the model."""
    verify(path, WEIGHTS)
    try:
        return load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"export {path} cannot be read ({error}); evaluate one of the run's checkpoints") from error


def read_classes(path: Path) -> list[str] | None:
    """Names of the outputs of an exported model, in their order; None if they are not classes."""
    try:
        config = _read_config(path)
        check_format(config, FORMAT, f"export {path}")
        names = config["classes"] if "classes" in config else config["label_names"]
        return None if names is None else list(names)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"export {path} cannot be read ({error}); evaluate one of the run's checkpoints") from error


def read_backbone(path: Path) -> dict[str, Tensor] | None:
    """The backbone's weights of an exported dense model, by the names of a classifier; None for other exports."""
    try:
        prefix = TASKS[_read_config(path)["task"]].backbone_prefix
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if prefix is None:
        return None
    return {key.removeprefix(prefix): tensor for key, tensor in read_weights(path).items() if key.startswith(prefix)}


def verify(path: Path, *names: str) -> None:
    """Compare files of an export with their sha256. Raises UserError naming one that differs.

    An export of 0.1 has none to compare with.
    """
    file = path / SUMS
    if not file.is_file():
        return
    with damaged_file(file, "copy the export again, or evaluate one of the run's checkpoints"):
        lines = file.read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in names:
        if not (path / name).is_file() or sha256_of(path / name) != sums.get(name):
            raise UserError(
                f"{path / name} does not match its sha256 in {SUMS}: it is damaged, or was changed. Copy the export "
                f"again, or evaluate one of the run's checkpoints; if the change is meant, delete {SUMS}"
            )


def _read_config(path: Path) -> Any:
    verify(path, CONFIG)
    return json.loads((path / CONFIG).read_text())


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A temporary folder that replaces `path` once it is complete."""
    try:
        with replacing(path) as part:
            yield part
            sums = "".join(f"{sha256_of(file)}  {file.name}\n" for file in sorted(part.iterdir()))
            (part / SUMS).write_text(sums, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"export {path} cannot be written ({error}); free space there, then start again") from error


def _to_plain(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


class _WithState:
    """A model whose state dict is replaced: a sharded model cannot be copied to hold its whole state."""

    def __init__(self, model: nn.Module, state: dict[str, Any]):
        self.model, self.state = model, state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
