"""AOTInductor: a program of torch.export compiled to a library, for this kind of processor."""

from pathlib import Path

import torch

from .base import METADATA_KEY, Format, Recording, Run, runner


def write(recording: Recording, path: Path) -> None:
    with torch.no_grad(), recording.oblivious():
        torch._inductor.aoti_compile_and_package(
            recording.program(),
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": {METADATA_KEY: recording.metadata}},
        )


def read(path: Path) -> tuple[Run, str | None]:
    model = torch._inductor.aoti_load_package(str(path))

    return runner(model), model.get_metadata().get(METADATA_KEY)


FORMAT = Format(
    name="aoti",
    suffix=".pt2",
    about="torch and its C++ library, compiled for this kind of processor",
    packages=(),
    install="",
    dynamic=("batch", "size"),
    detectors=False,
    write=write,
    read=read,
)
