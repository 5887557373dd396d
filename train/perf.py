"""How fast: images a second, the share of time spent waiting for data, what a model costs."""

import resource
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
        """Around the wait for the data of one step."""
        start = time.perf_counter()
        yield
        self.steps += 1
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


def forward_gflops(model: nn.Module, size: int, device: torch.device) -> float:
    """Floating-point operations of one image of `size` pixels in evaluation mode, two per multiply-add, in 1e9."""
    training = model.training
    try:
        eager = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eager, FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, 3, size, size, device=device))
    finally:
        model.train(training)
    return counter.get_total_flops() / 1e9


def peak_memory(device: torch.device) -> float:
    """The most memory held so far, GB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
