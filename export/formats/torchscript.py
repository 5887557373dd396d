"""TorchScript by tracing, for programs that cannot load anything newer. torch has deprecated it."""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .base import METADATA_FILE, Format, Recording, Run


def write(recording: Recording, path: Path) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        # the deprecation, and a warning for each size that is fixed; `strict=False` allows dicts as outputs
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(recording.model, recording.example, check_trace=False, strict=False)
        torch.jit.save(traced, path, _extra_files={METADATA_FILE: recording.metadata})


def read(path: Path) -> tuple[Run, str | None]:
    extra_files = {METADATA_FILE: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.load(path, _extra_files=extra_files)

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return tree_leaves(model(images))

    text = extra_files[METADATA_FILE]
    return run, (text.decode() if isinstance(text, bytes) else text) or None


FORMAT = Format(
    name="torchscript-trace",
    suffix=".pt",
    about="torch's old format, without tessel",
    packages=(),
    install="",
    dynamic=("batch",),
    detectors=True,
    write=write,
    read=read,
)
