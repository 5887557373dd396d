"""ONNX, by torch's exporters; read by ONNX Runtime."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..detectors import OneImageDetector
from .base import METADATA_KEY, Format, Recording, Run

_MOST_BYTES = 1 << 30  # of weights within the file itself: a protobuf holds 2 GB


def write(recording: Recording, path: Path) -> None:
    if isinstance(recording.model, OneImageDetector):
        _write_traced(recording, path)
        return
    # recorded here, since torch.onnx's own recording takes a map of one pixel or one window in the example for fixed
    recorded = recording.program()
    program = _converted(recorded, optimize=True)
    if not _complete(program.model):
        # onnxscript's optimizer removed a node that another one reads, as it does in Deformable DETR
        program = _converted(recorded, optimize=False)
    program.model.metadata_props[METADATA_KEY] = recording.metadata
    weights = sum(tensor.nbytes for tensor in recording.model.state_dict().values())
    program.save(path, external_data=weights > _MOST_BYTES)


def _converted(recorded: torch.export.ExportedProgram, *, optimize: bool) -> Any:
    """The ONNX program of torch's exporter."""
    with torch.no_grad():
        return torch.onnx.export(recorded, dynamo=True, input_names=["images"], verbose=False, optimize=optimize)


def _complete(model: Any) -> bool:
    """Whether every value that a node of the graph reads comes from another node, an input or a weight."""
    known = {*model.graph.inputs, *model.graph.initializers.values(), None}
    for node in model.graph:
        if not known.issuperset(node.inputs):
            return False
        known.update(node.outputs)
    return True


def _write_traced(recording: Recording, path: Path) -> None:
    """By the exporter that traces: torch.export does not record sizes that depend on the image."""
    import onnx

    names = list(recording.model(recording.example))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is deprecated, and warns for each size that is fixed
        torch.onnx.export(
            recording.model, (recording.example,), path, dynamo=False, input_names=["images"], output_names=names
        )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {METADATA_KEY: recording.metadata})
    onnx.save(model, path)


def read(path: Path) -> tuple[Run, str | None]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]

    return run, session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)


FORMAT = Format(
    name="onnx",
    suffix=".onnx",
    about="ONNX Runtime, TensorRT and others",
    packages=("onnx", "onnxscript", "onnxruntime"),
    install="tessel[export]",
    dynamic=("batch", "size"),
    detectors=True,
    write=write,
    read=read,
)
