"""A program of torch.export: runs in torch, without tessel."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .base import METADATA_FILE, Format, Recording, Run


def write(recording: Recording, path: Path) -> None:
    torch.export.save(recording.program(), path, extra_files={METADATA_FILE: recording.metadata})


def read(path: Path) -> tuple[Run, str | None]:
    extra_files = {METADATA_FILE: ""}
    module = torch.export.load(path, extra_files=extra_files).module()

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return tree_leaves(module(images))

    text = extra_files[METADATA_FILE]
    return run, (text.decode() if isinstance(text, bytes) else text) or None


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
