"""What a format is, and the recording of a model by torch.export that most formats start from."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from torch.utils._pytree import tree_leaves

METADATA_KEY = "tessel"  # of the JSON text in files with named metadata
METADATA_FILE = "tessel.json"  # of the same text in files that are archives

# runs an exported model: images `[B, C, H, W]` to its outputs
Run = Callable[[Tensor], Sequence[Tensor]]


def runner(module: Callable[[Tensor], Any]) -> Run:
    """Runs a module of torch without gradients; its outputs become a flat list."""

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return tree_leaves(module(images))

    return run


def metadata_text(extra_files: Mapping[str, str | bytes]) -> str | None:
    """The metadata among the extra files that torch read from an archive; None if it has none."""
    text = extra_files[METADATA_FILE]
    return (text.decode() if isinstance(text, bytes) else text) or None


@dataclass(frozen=True)
class Recording:
    """What a format writes: a model on the CPU, an example of its input, and which axes of the input stay open."""

    model: nn.Module
    example: Tensor
    open_axes: tuple[int, ...]
    metadata: str  # JSON

    def oblivious(self) -> AbstractContextManager[Any]:
        """While open sizes are recorded or converted: that one is 1 in the example has no influence on the graph."""
        return fx_config.patch(backed_size_oblivious=bool(self.open_axes))  # type: ignore[attr-defined]

    def program(self) -> torch.export.ExportedProgram:
        """The model as recorded by torch.export."""
        dims: dict[int, Any] = dict.fromkeys(self.open_axes, torch.export.Dim.DYNAMIC)
        if 0 in dims and self.example.shape[0] > 1:
            # with a minimum of 2, which programs do not check, the batch has no conditions that tell 1 from other sizes
            dims[0] = torch.export.Dim("batch", min=2)
        shapes = (dims,) if dims else None
        with torch.no_grad(), self.oblivious():
            return torch.export.export(self.model, (self.example,), dynamic_shapes=shapes, strict=False)


@dataclass(frozen=True)
class Format:
    """A file format.

    name: as `export(format=)` takes it.
    suffix: of its files.
    about: one line on what runs the file.
    packages: modules that must be importable to write it.
    install: what installs them.
    dynamic: which of "batch" and "size" can be left open.
    detectors: whether it records how many boxes a detector finds, which depends on the image.
    write: `(recording, path)` writes the file.
    read: `(path)` returns a function that runs the file, and its metadata as JSON (None: there is none).
    """

    name: str
    suffix: str
    about: str
    packages: tuple[str, ...]
    install: str
    dynamic: tuple[str, ...]
    detectors: bool
    write: Callable[[Recording, Path], None]
    read: Callable[[Path], tuple[Run, str | None]]

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package in self.packages if importlib.util.find_spec(package) is None]
