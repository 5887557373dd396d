"""Reading of exported files."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ExportError, first_line
from .formats import Format, formats
from .formats.base import Run
from .metadata import decode


class ExportedModel:
    """An exported file, ready to run on the CPU. Made by `load`.

    format: the name of its format. metadata: see `tessel.export.metadata`; empty for files that another program wrote.
    """

    def __init__(self, format: str, run: Run, metadata: Mapping[str, Any]):
        self.format, self.metadata, self._run = format, dict(metadata), run

    def __call__(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """Preprocessed images `[B, C, H, W]` to the output; to a dict by name if the model has several."""
        dtype = getattr(torch, self.metadata.get("dtype", "float32"))
        outputs = self._run(images.detach().cpu().to(dtype).contiguous())
        if len(outputs) == 1:
            return outputs[0]
        names = self.metadata.get("outputs") or [f"output_{i}" for i in range(len(outputs))]
        return dict(zip(names, outputs, strict=True))


def load(path: str | Path) -> ExportedModel:
    """Read an exported file of any format; which one follows from its suffix and its content.

    Raises ExportError if it is not there, is damaged, or if a package that runs it is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path} is not a file; give one that tessel.export.export wrote")
    format = format_of(path)
    require(format)
    try:
        run, text = format.read(path)
        metadata = decode(text)
    except Exception as error:
        raise ExportError(f"{path} cannot be read as {format.name}: {first_line(error)}") from error
    return ExportedModel(format.name, run, metadata)


def format_of(path: Path) -> Format:
    """The format of a file. Raises ExportError if it is none of ours."""
    candidates = [format for format in formats().values() if path.name.endswith(format.suffix)]
    if not candidates:
        suffixes = ", ".join(sorted({format.suffix for format in formats().values()}))
        raise ExportError(f"{path} has no suffix of an exported model; those are {suffixes}")
    if len(candidates) == 1:
        return candidates[0]
    # both formats of torch are archives with the same suffix
    try:
        with zipfile.ZipFile(path) as archive:
            compiled = any("aotinductor" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise ExportError(f"{path} cannot be read: {first_line(error)}") from error
    return formats()["aoti" if compiled else "torch-export"]


def require(format: Format) -> None:
    """Raise ExportError if packages that the format needs are not installed."""
    if missing := format.missing():
        raise ExportError(
            f"format {format.name} needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}: "
            f"pip install '{format.install}'"
        )
