"""How fast: images a second, the share of time spent waiting for data, what a model costs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Meter:
    """Speed since the last reading."""

    def __init__(self, images_per_step: int):
        self.images_per_step = images_per_step
        self.restart()

    def restart(self) -> None:
        self.since, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time within counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within does not count."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """images_per_second over all processes, data_wait in 0..1, step_seconds; starts the next reading."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        steps, waited = self.steps, self.waited
        self.restart()
        return {
            "images_per_second": round(steps * self.images_per_step / elapsed, 2),
            "data_wait": round(waited / elapsed, 4),
            "step_seconds": round(elapsed / max(steps, 1), 5),
        }


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def forward_flops(model: nn.Module, example: torch.Tensor) -> int:
    """Floating-point operations of one forward in evaluation mode, two per multiply-add."""
    training = model.training
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(example)
    finally:
        model.train(training)
    return counter.get_total_flops()
