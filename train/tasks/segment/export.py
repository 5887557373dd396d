"""Reading an exported segmenter."""

from pathlib import Path

from ...recipe.schema import Dense
from ..export import load_weights, read_export
from .model import Segmenter, build_segmenter
from .options import SegmentOptions


def load(path: Path) -> Segmenter:
    """The segmenter in the folder `path`, in evaluation mode on the CPU. Raises UserError if it cannot be read."""
    parts = read_export(path, "segment", {"dense": Dense, "segment": SegmentOptions})
    model = build_segmenter(parts["model"], parts["segment"], dense=parts["dense"], classes=parts["classes"])
    load_weights(model, path)
    model.pretrained_cfg = {**dict(model.pretrained_cfg), "mean": parts["mean"], "std": parts["std"]}
    model.classes, model.palette = parts["classes"], parts["palette"]
    return model.eval()
