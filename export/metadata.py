"""What a file says about its model: the preprocessing of images, the class names, and how it was exported.

A JSON object with these keys. Readers ignore keys that they do not know.

    format          number of this layout, 1
    tessel          version that wrote the file
    model           name of the model, or null
    task            "classify", "segment" or "detect", or null
    input_size      [C, H, W] of the images that the model was made for
    dynamic         which of "batch" and "size" are open; the others are those of `example`
    example         shape of the images that the graph was recorded with, [B, C, H, W]
    dtype           of the images, "float32" or "float16"
    outputs         names of the outputs, in order
    mean, std       per channel, of images in [0, 1]: the input is (image - mean) / std
    interpolation   of resizing: "bicubic", "bilinear", ...
    crop_pct        the center crop as a fraction of the resized image
    crop_mode       "center", "squash" or "border", as in timm
    class_names     in the order of the outputs, or null
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from torch import nn

from .. import __version__

LAYOUT = 1


def describe(model: nn.Module) -> dict[str, Any]:
    """The keys of the metadata that follow from the model: for models of timm all that its configuration states.

    Segmenters and detectors of the trainer have an attribute `classes` with the names.
    """
    cfg, classes = getattr(model, "pretrained_cfg", None) or {}, getattr(model, "classes", None)
    if not cfg:
        return {"model": type(model).__name__, "task": None, "class_names": list(classes) if classes else None}
    data = resolve_data_config(pretrained_cfg=cfg, model=model)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {
        "model": cfg.get("architecture"),
        "task": "classify" if getattr(model, "num_classes", 0) else None,
        **{key: list(data[key]) if isinstance(data[key], tuple) else data[key] for key in keys},
        "class_names": list(classes) if classes else _class_names(model, cfg),
    }


def _class_names(model: nn.Module, cfg: Mapping[str, Any]) -> list[str] | None:
    """The names that the configuration has, or ImageNet's if it is a model for one of its sets of classes."""
    count, names = getattr(model, "num_classes", 0), cfg.get("label_names")
    if not count:
        return None
    if names is not None:
        descriptions = cfg.get("label_descriptions") or {}
        names = [descriptions.get(name, name) if isinstance(descriptions, Mapping) else name for name in names]
        return list(names) if len(names) == count else None
    if cfg.get("num_classes") != count:
        return None
    subset = infer_imagenet_subset(model)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(info.num_classes())]


def encode(metadata: Mapping[str, Any]) -> str:
    """As JSON, in ASCII: not every format keeps other characters."""
    return json.dumps({"format": LAYOUT, "tessel": __version__, **metadata})


def decode(text: str | None) -> dict[str, Any]:
    """The metadata from JSON; empty if there is none. Raises ValueError for a layout of a later version."""
    metadata = {} if text is None else json.loads(text)
    if metadata.get("format", LAYOUT) > LAYOUT:
        raise ValueError(f"its metadata has format {metadata['format']}; this version of tessel reads up to {LAYOUT}")
    return metadata


def check_class_names(names: Sequence[str] | None, outputs: int | None) -> None:
    """Raise ValueError unless there is one name for each output."""
    if names is not None and outputs is not None and len(names) != outputs:
        raise ValueError(f"class_names has {len(names)} names for {outputs} outputs; give one for each")
