"""A program of torch.export: runs in torch, without tessel."""

from pathlib import Path

import torch

from .base import METADATA_FILE, Format, Recording, Run, metadata_text, runner


def write(recording: Recording, path: Path) -> None:
    torch.export.save(recording.program(), path, extra_files={METADATA_FILE: recording.metadata})


def read(path: Path) -> tuple[Run, str | None]:
    extra_files = {METADATA_FILE: ""}
    module = torch.export.load(path, extra_files=extra_files).module()

    return runner(module), metadata_text(extra_files)


FORMAT = Format(
    name="torch-export",
    suffix=".pt2",
    about="torch, without tessel",
    packages=(),
    install="",
    dynamic=("batch", "size"),
    detectors=False,
    write=write,
    read=read,
)
