"""Export of models to files that other programs run, and reading of such files.

    report = tessel.export.export(model, "model.onnx", format="onnx")
    run = tessel.export.load("model.onnx")
    logits = run(images)

`formats()` lists the formats. Every export is run at once and compared with PyTorch; a file that differs by more than a
tolerance is not written. Files carry the preprocessing and the class names (see `metadata`). docs/export.md has a table
of what works.
"""

from .detectors import BatchDetector, OneImageDetector
from .errors import ExportError
from .exporting import ExportReport, export
from .formats import Format, formats
from .loading import ExportedModel, load

__all__ = [
    "BatchDetector",
    "ExportError",
    "ExportReport",
    "ExportedModel",
    "Format",
    "OneImageDetector",
    "export",
    "formats",
    "load",
]
