"""OpenVINO, converted from a program of torch.export: a file .xml and one .bin beside it."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import METADATA_KEY, Format, Recording, Run


def write(recording: Recording, path: Path) -> None:
    openvino: Any = importlib.import_module("openvino")

    model = openvino.convert_model(recording.program())
    model.set_rt_info(recording.metadata, METADATA_KEY)
    # the default stores weights in half precision
    openvino.save_model(model, path, compress_to_fp16=False)


def read(path: Path) -> tuple[Run, str | None]:
    openvino: Any = importlib.import_module("openvino")

    model = openvino.Core().read_model(path)
    text = model.get_rt_info(METADATA_KEY).astype(str) if model.has_rt_info(METADATA_KEY) else None
    # some processors compute in bfloat16 by default
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(images: Tensor) -> list[Tensor]:
        outputs = compiled(images.numpy())
        return [torch.from_numpy(outputs[i].copy()) for i in range(len(compiled.outputs))]

    return run, text


FORMAT = Format(
    name="openvino",
    suffix=".xml",
    about="OpenVINO",
    packages=("openvino",),
    install="openvino",
    dynamic=("batch", "size"),
    detectors=False,
    write=write,
    read=read,
)
