"""The measures of a comparison, each of one model at one size of square images."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..blocks import receptive_field
from ..zoo import cost_of
from .subjects import Subject
from .timing import side_by_side


def costs(subject: Subject, size: int) -> dict[str, float]:
    """Parameters, multiply-adds and activation memory of one image, and the growth of the multiply-adds.

    growth: e in multiply-adds ~ tokens**e, between images of `size` and of twice that side. None for models that do not
    accept the larger images.
    """
    found = cost_of(_meta(subject, size), size)
    row: dict[str, Any] = {
        "parameters": found.parameters,
        "macs": found.macs,
        "activation_bytes": found.activation_bytes,
        "growth": None,
    }
    try:
        larger = cost_of(_meta(subject, 2 * size), 2 * size)
    except (RuntimeError, AssertionError, ValueError):
        return row
    return {**row, "growth": math.log(larger.macs / found.macs, 4)}


def _meta(subject: Subject, size: int) -> nn.Module:
    with torch.device("meta"):
        return subject.make(size)


def field(subject: Subject, size: int) -> dict[str, float]:
    """Side of the smallest square around the center with 99 % of the receptive field, over the image's side.

    The field is that of the center of the last feature map, of a model with random weights on noise.
    """
    torch.manual_seed(0)
    model: Any = subject.make(size).eval()
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        height, width = _last_map(model, x).shape[2:]
    share = receptive_field(_Map(model), x, (height // 2, width // 2)).values
    row, column = (
        (2 * index + 1) * size // (2 * count) for index, count in ((height // 2, height), (width // 2, width))
    )
    distance = torch.maximum(
        (torch.arange(size) - row).abs()[:, None].expand(size, size),
        (torch.arange(size) - column).abs().expand(size, size),
    )
    within = torch.zeros(size).scatter_add_(0, distance.flatten(), share.flatten()).cumsum(0)
    return {"receptive_field": (2 * int((within < 0.99).sum()) + 1) / size}


class _Map(nn.Module):
    """A model that returns its last feature map."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _last_map(self.model, x)


def _last_map(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.forward_intermediates(x, indices=1, intermediates_only=True)[0]


def speeds(
    subjects: Sequence[Subject], size: int, *, batch: int, seconds: float, device: str
) -> dict[str, dict[str, float]]:
    """Images per second of inference and training, by the model's label; all run in turns in one process."""
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    found: dict[str, dict[str, float]] = {subject.label: {} for subject in subjects}
    for key, call in (("inference", _infer), ("training", _train)):
        runs = {s.label: call(s.make(size).to(device).to(memory_format=torch.channels_last), x) for s in subjects}
        for label, times in side_by_side(runs, seconds=seconds, device=device).items():
            found[label][key] = batch / statistics.median(times)
    return found


def _infer(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    model.eval()

    def run() -> None:
        with torch.inference_mode():
            model(x)

    return run


def _train(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    model.train()

    def run() -> None:
        model(x).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run
