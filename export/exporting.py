"""Export of a model, with the comparison of the exported file and PyTorch."""

import copy
import os
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from .comparison import difference
from .detectors import BatchDetector, OneImageDetector, detection_difference, detections_difference
from .errors import ExportError, first_line
from .formats import Format, Recording, formats
from .loading import load, require
from .metadata import check_class_names, describe, encode
from .rewriting import open_sizes

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2}

AXES = {"batch": (0,), "size": (2, 3)}

# side of the example where sizes are open: in a smaller one maps have sides of 1 pixel, which recorders fix
OPEN_SIDE = 96


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how exactly it agrees with PyTorch.

    errors: for each shape of the input that was tried, the largest difference of an output from that of the model in
    float32, relative to the largest output. seconds: of the export and of the comparison. size: of the files in bytes.
    """

    path: Path
    format: str
    dynamic: tuple[str, ...]
    dtype: str
    errors: Mapping[tuple[int, ...], float]
    seconds: float
    size: int
    metadata: Mapping[str, Any] = field(repr=False)

    @property
    def error(self) -> float:
        """The largest of `errors`."""
        return max(self.errors.values())

    def __str__(self) -> str:
        opened = " and ".join(self.dynamic) or "nothing"
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.errors)
        return (
            f"{self.path}: {self.format}, {self.dtype}, {self.size / 1e6:.1f} MB, {opened} dynamic; differs from "
            f"PyTorch by at most {self.error:.1e} at {shapes}"
        )


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "onnx",
    *,
    size: int | tuple[int, int] | None = None,
    example: Tensor | None = None,
    dynamic: Collection[str] | None = None,
    half: bool = False,
    class_names: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
) -> ExportReport:
    """Write `model` to `path`, run the file, and compare it with the model.

    The model itself is not changed: a copy in evaluation mode on the CPU is exported. The file appears under its name
    only when it has been found right.

    Args:
        model: a module that maps images `[B, C, H, W]` to a tensor, or to tuples, lists or dicts of tensors.
        path: the file; without a suffix the format's is appended.
        format: a key of `formats()`.
        size: side of the images, or (height, width). By default that of the model's configuration.
        example: images to record the graph with, instead of random ones of `size`.
        dynamic: which of "batch" and "size" stay open in the file; by default all that the format can leave open.
        half: export weights and inputs in float16.
        class_names: names of the outputs, by default those of the model's configuration.
        metadata: further keys, and replacements of those that `tessel.export.metadata` lists.
        tolerance: largest relative difference that is accepted, by default 1e-4, or 5e-2 with `half`.

    Raises:
        ValueError: an argument that is no choice of ours. ExportError: the format's packages are missing, the model
            cannot be recorded, or the file differs from the model.
    """
    if isinstance(model, OneImageDetector):
        dynamic = () if dynamic is None else dynamic
        _check_detector(format, dynamic)
    if isinstance(model, BatchDetector):
        dynamic = () if dynamic is None else dynamic
        if "size" in dynamic:
            raise ValueError(f"dynamic={tuple(dynamic)}: a detector is exported for a fixed size; use ('batch',) or ()")
    kind = _choose(format, dynamic)
    dynamic = tuple(axis for axis in AXES if axis in (kind.dynamic if dynamic is None else dynamic))
    require(kind)
    path = Path(path)
    path = path if path.name.endswith(kind.suffix) else path.with_name(path.name + kind.suffix)
    facts = describe(model)
    reference = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    images, input_size = _example(reference, facts, size, example, dynamic)
    names = facts["class_names"] if class_names is None else list(class_names)
    dtype = torch.float16 if half else torch.float32
    start = time.perf_counter()
    output_names, outputs = _outputs(reference, images)
    if class_names is not None and len(outputs) == 1:
        check_class_names(class_names, outputs[0].shape[1])
    facts |= {
        "input_size": input_size,
        "dynamic": list(dynamic),
        "example": list(images.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "outputs": output_names,
        "class_names": names,
        **(metadata or {}),
    }
    recorded = copy.deepcopy(reference)
    if half:
        recorded = recorded.half()
    if "size" in dynamic:
        recorded = open_sizes(recorded)
    axes = tuple(axis for name in dynamic for axis in AXES[name])
    recording = Recording(recorded, images.to(dtype), axes, encode(facts))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        part = Path(folder) / path.name
        try:
            kind.write(recording, part)
        except Exception as error:
            raise ExportError(_cannot(kind, dynamic, error)) from error
        limit = TOLERANCE[dtype] if tolerance is None else tolerance
        inputs = _inputs(images.to(dtype).float(), input_size, dynamic)
        errors = _compare(reference, part, kind, inputs, dynamic, limit)
        size_bytes = sum(file.stat().st_size for file in part.parent.iterdir())
        for file in part.parent.iterdir():
            os.replace(file, path.parent / file.name)
    seconds = time.perf_counter() - start
    return ExportReport(path, kind.name, dynamic, facts["dtype"], errors, seconds, size_bytes, facts)


def _choose(format: str, dynamic: Collection[str] | None) -> Format:
    if format not in formats():
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(formats())}")
    kind = formats()[format]
    for axis in dynamic or ():
        if axis not in AXES:
            raise ValueError(f"dynamic={axis!r} is unknown; choose from {', '.join(AXES)}")
        if axis not in kind.dynamic:
            able = f"only {kind.dynamic[0]}" if kind.dynamic else "nothing"
            raise ValueError(f"format {format} cannot leave {axis!r} open, {able}; take it out of dynamic")
    return kind


def _check_detector(format: str, dynamic: Collection[str]) -> None:
    able = [name for name, kind in formats().items() if kind.detectors]
    if format in formats() and format not in able:
        raise ValueError(
            f"format {format} cannot record how many boxes a detector finds, which depends on the image; choose one of "
            f"{', '.join(able)}"
        )
    if dynamic:
        raise ValueError(f"dynamic={tuple(dynamic)}: a detector is exported for one image of a fixed size; use ()")


def _example(
    model: nn.Module,
    facts: Mapping[str, Any],
    size: int | tuple[int, int] | None,
    example: Tensor | None,
    dynamic: Collection[str],
) -> tuple[Tensor, list[int]]:
    """Images to record with, and the [C, H, W] they stand for.

    Open axes have different lengths, so that the recorder takes none for another, and are not short (`OPEN_SIDE`).
    """
    if example is not None:
        if example.dim() != 4:
            raise ValueError(f"example must be images [B, C, H, W], got shape={tuple(example.shape)}")
        return example.detach().cpu().float(), list(example.shape[1:])
    chans, height, width = facts.get("input_size") or (3, 224, 224)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size={size} must be at least 1")
    chans = getattr(model, "in_chans", chans)
    input_size = [chans, height, width]
    if "size" in dynamic:
        height, width = max(height, OPEN_SIDE), max(width, OPEN_SIDE)
        width += 32 if height == width else 0
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 if "batch" in dynamic else 1, chans, height, width, generator=generator)
    return images, input_size


def _outputs(model: nn.Module, images: Tensor) -> tuple[list[str], list[Tensor]]:
    """The outputs of the model and their names, which are their places in its result."""
    with torch.no_grad():
        leaves, _ = tree_flatten_with_path(model(images))
    for _, leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ExportError(
                f"the model returns {type(leaf).__name__} besides tensors; export a module that returns tensors alone"
            )
    if len(leaves) == 1:
        return ["output"], [leaves[0][1]]
    names = ["_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in place) for place, _ in leaves]
    return [f"output_{name}" if name[:1].isdigit() else name for name in names], [leaf for _, leaf in leaves]


def _compare(
    model: nn.Module, path: Path, kind: Format, inputs: Iterable[Tensor], dynamic: Sequence[str], limit: float
) -> dict[tuple[int, ...], float]:
    """The error at each shape of `inputs`, the example first. Raises ExportError for the first above `limit`."""
    run, errors, example = load(path), {}, None
    for x in inputs:
        shape = tuple(x.shape)
        example = example or shape
        text = "x".join(map(str, shape))
        try:
            with torch.no_grad():
                expected = model(x)
        except Exception:
            if shape == example:
                raise
            continue  # a size that the model itself refuses
        try:
            found = run(x)
        except Exception as error:
            raise ExportError(
                f"the exported {kind.name} fails on images of {text}: {first_line(error)}{_remedy(dynamic)}"
            ) from error
        if isinstance(model, OneImageDetector) and isinstance(found, dict):
            error = detection_difference(found, expected)
        elif isinstance(model, BatchDetector) and isinstance(found, dict) and "scores" in found:
            error = detections_difference(found, expected)
        else:
            outputs = list(found.values()) if isinstance(found, dict) else [found]
            error = max(difference(a, b) for a, b in zip(outputs, tree_leaves(expected), strict=True))
        errors[shape] = max(error, errors.get(shape, 0.0))
        if not error <= limit:
            raise ExportError(
                f"the exported {kind.name} differs from PyTorch by {error:.1e} on images of {text}, more than "
                f"tolerance={limit:g}; nothing was written"
            )
    return errors


def _inputs(images: Tensor, input_size: Sequence[int], dynamic: Collection[str]) -> Iterator[Tensor]:
    """The example, other images of its shape, then other batches and sizes where they are open.

    The sizes are the model's own and others that blocks and windows do not divide.
    """
    yield images
    yield images.flip(-1) * 0.5
    (batch, chans, height, width), generator = images.shape, torch.Generator().manual_seed(1)
    sizes = [(height, width)]
    if "size" in dynamic:
        own = (input_size[1], input_size[2])
        sizes = [own, (height + 33, width + 19), (height - height // 4 + 1, width + 7), (height, height)]
    batches = (1, 3) if "batch" in dynamic else (batch,)
    shapes = {(batches[i % len(batches)], *sizes[i % len(sizes)]) for i in range(max(len(sizes), len(batches)))}
    for batch, height, width in sorted(shapes - {(images.shape[0], *images.shape[2:])}):
        yield torch.randn(batch, chans, height, width, generator=generator)


def _cannot(kind: Format, dynamic: Sequence[str], error: Exception) -> str:
    return f"the model cannot be exported to {kind.name}: {first_line(error)}{_remedy(dynamic)}"


def _remedy(dynamic: Sequence[str]) -> str:
    return "; export with fewer dynamic axes" if dynamic else ""
