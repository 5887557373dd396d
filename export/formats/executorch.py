"""ExecuTorch with XNNPACK, for phones and other small devices. All sizes are fixed."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import METADATA_KEY, Format, Recording, Run


def write(recording: Recording, path: Path) -> None:
    exir: Any = importlib.import_module("executorch.exir")
    xnnpack: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")

    # a method without arguments that returns the metadata as bytes: methods return no text
    metadata = torch.tensor(list(recording.metadata.encode()), dtype=torch.uint8)
    with torch.no_grad():
        edge = exir.to_edge_transform_and_lower(
            recording.program(), partitioner=[xnnpack.XnnpackPartitioner()], constant_methods={METADATA_KEY: metadata}
        )
        path.write_bytes(edge.to_executorch().buffer)


def read(path: Path) -> tuple[Run, str | None]:
    runtime: Any = importlib.import_module("executorch.runtime")
    program = runtime.Runtime.get().load_program(path)
    text = None
    if METADATA_KEY in program.method_names:
        text = bytes(program.load_method(METADATA_KEY).execute([])[0].tolist()).decode()
    method = program.load_method("forward")

    def run(images: Tensor) -> list[Tensor]:
        # the runtime reuses the memory of its outputs
        return [output.clone() for output in method.execute([images.contiguous()])]

    return run, text


FORMAT = Format(
    name="executorch",
    suffix=".pte",
    about="ExecuTorch with XNNPACK, on phones and other small devices",
    packages=("executorch",),
    install="tessel[executorch]",
    dynamic=(),
    detectors=False,
    write=write,
    read=read,
)
