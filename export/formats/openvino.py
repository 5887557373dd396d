"""OpenVINO, converted from a program of torch.export: a file .xml and one .bin beside it."""

import importlib
import operator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import METADATA_KEY, Format, Recording, Run


def write(recording: Recording, path: Path) -> None:
    openvino: Any = importlib.import_module("openvino")

    with recording.oblivious():
        model = openvino.convert_model(recording.program(), extension=_size_operators())
    # the front end leaves all axes of the input open
    sides = [-1 if axis in recording.open_axes else side for axis, side in enumerate(recording.example.shape)]
    model.reshape(openvino.PartialShape(sides))
    _separate_transposes(model)
    model.set_rt_info(recording.metadata, METADATA_KEY)
    # the default stores weights in half precision
    openvino.save_model(model, path, compress_to_fp16=False)


def _size_operators() -> list[Any]:
    """Rules for operators of open sizes that the front end has none for; it knows operators by how they print."""
    pytorch: Any = importlib.import_module("openvino.frontend.pytorch")
    operators: Any = importlib.import_module("openvino.opset13")

    def rule(function: Any, name: str) -> Any:
        def convert(node: Any) -> Any:
            return getattr(operators, name)(node.get_input(0), node.get_input(1)).outputs()

        return pytorch.ConversionExtension(str(function), convert)

    names = {torch.sym_max: "maximum", torch.sym_min: "minimum", operator.le: "less_equal"}
    return [rule(*pair) for pair in names.items()]


def _separate_transposes(model: Any) -> None:
    """Keep attention and the transpose of heads and tokens behind it from being fused into one operation.

    OpenVINO computes wrong values in it where there are as many heads as tokens (docs/upstream.md). It does not fuse a
    transpose of 5 axes.
    """
    operators: Any = importlib.import_module("openvino.opset13")

    for node in model.get_ops():
        if node.get_type_name() != "Transpose":
            continue
        attended, order = node.input_value(0), node.input_value(1).get_node()
        if attended.get_node().get_type_name() == "ScaledDotProductAttention" and list(order.data) == [0, 2, 1, 3]:
            axis = operators.constant([1])
            wide = operators.transpose(operators.unsqueeze(attended, axis), operators.constant([0, 1, 3, 2, 4]))
            node.output(0).replace(operators.squeeze(wide, axis).output(0))


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
    install="tessel[openvino]",
    dynamic=("batch", "size"),
    detectors=False,
    write=write,
    read=read,
)
