"""Semantic segmentation: one class a pixel, by a backbone of timm or tessel under mmsegmentation's heads.

`load(path)` reads what a finished run exported.
"""

import typing
from pathlib import Path

if typing.TYPE_CHECKING:
    from .model import Segmenter


def load(path: str | Path) -> "Segmenter":
    """The segmenter in the folder `RUN/export`, in evaluation mode on the CPU.

    It takes normalised images [B, 3, H, W] (`pretrained_cfg` has mean and std) and returns logits
    [B, classes, H, W]; `classes` and `palette` name and colour them. Raises UserError where it cannot be read.
    """
    from ..export import load_weights, read_parts
    from .model import assemble

    path = Path(path)
    parts = read_parts(path, "segment")
    model = assemble(parts["model"], parts["segment"], dense=parts["dense"], classes=parts["classes"])
    load_weights(model, path)
    model.pretrained_cfg = {**dict(model.pretrained_cfg), "mean": parts["mean"], "std": parts["std"]}
    model.classes, model.palette = parts["classes"], parts["palette"]
    return model.eval()
