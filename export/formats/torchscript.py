"""TorchScript by tracing, for programs that cannot load anything newer. torch has deprecated it."""

import warnings
from pathlib import Path

import torch

from .base import METADATA_FILE, Format, Recording, Run, metadata_text, runner


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

    return runner(model), metadata_text(extra_files)


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
