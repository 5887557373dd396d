"""The formats: one file per format, each with `FORMAT`.

A format imports the packages that it needs only when it writes or reads a file.
"""

from collections.abc import Mapping

from . import aoti, executorch, onnx, openvino, torch_export, torchscript
from .base import Format, Recording

_FORMATS = {
    module.FORMAT.name: module.FORMAT for module in (onnx, torch_export, aoti, openvino, executorch, torchscript)
}


def formats() -> Mapping[str, Format]:
    """The formats by name: `onnx`, `torch-export`, `aoti`, `openvino`, `executorch`, `torchscript-trace`."""
    return dict(_FORMATS)


__all__ = ["Format", "Recording", "formats"]
