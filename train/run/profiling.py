"""How fast: images a second, the share of time spent waiting for data, what a model costs."""

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode

from ..distributed.world import World
from ..files import writing
from ..recipe.schema import Parallel
from ..tasks.models import first_forward

# dense bf16 tensor-core TFLOP/s by the makers' data sheets, by a part of the device's name; the first that fits holds
PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.2,
}


class ThroughputMeter:
    """Speed since the last reading."""

    def __init__(self, images_per_step: int, gflops: float, peak: float | None, device: torch.device):
        """gflops: of the forward of one image; peak: TFLOP/s of all devices together, where they are known."""
        self.images_per_step, self.gflops, self.peak, self.device = images_per_step, gflops, peak, device
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
        """Figures over all processes since the last reading; starts the next one.

        images_per_second, data_wait in 0..1, step_seconds, tflops (per second; a backward counts as two forwards,
        what is recomputed does not count), memory_gb, the `peak_memory` of this process alone, and, on known devices,
        mfu: tflops as a share of their peak.
        """
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        steps, waited = self.steps, self.waited
        self.restart()
        images = steps * self.images_per_step / elapsed
        tflops = 3 * self.gflops * images / 1e3
        figures = {
            "images_per_second": round(images, 2),
            "data_wait": round(waited / elapsed, 4),
            "step_seconds": round(elapsed / max(steps, 1), 5),
            "tflops": float(f"{tflops:.4g}"),
            "memory_gb": round(peak_memory(self.device), 3),
        }
        return figures | ({"mfu": round(tflops / self.peak, 4)} if self.peak else {})


class StepProfiler:
    """torch's profiler over the updates 3 to 12 of a start, written to `profile/` for chrome://tracing or perfetto."""

    SKIPPED, TRACED = 3, 10

    def __init__(self, path: Path, rank: int, *, enabled: bool):
        self.file, self.profiler = path / "profile" / f"rank{rank}.json", None
        if enabled:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            plan = schedule(wait=self.SKIPPED - 1, warmup=1, active=self.TRACED, repeat=1)
            self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
            self.profiler.start()

    def step(self) -> None:
        """At the end of each update."""
        if self.profiler:
            self.profiler.step()

    def close(self) -> None:
        if self.profiler:
            self.profiler.stop()

    def _write(self, profiler: profile) -> None:
        with writing(self.file):
            self.file.parent.mkdir(exist_ok=True)
            part = self.file.with_name(f".{self.file.name}")
            profiler.export_chrome_trace(str(part))
            os.replace(part, self.file)


def peak_tflops(parallel: Parallel, world: World) -> float | None:
    """Of all devices together in the recipe's precision, where it is known: in bf16 or fp16 on the GPUs of `PEAKS`."""
    if world.device.type != "cuda" or parallel.precision == "fp32":
        return None
    name = torch.cuda.get_device_name(world.device)
    return next((world.size * peak for part, peak in PEAKS.items() if part in name), None)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def forward_gflops(model: nn.Module, example: tuple[Any, ...]) -> float:
    """Floating-point operations of `model(*example)` in evaluation mode, two per multiply-add, in 1e9.

    Raises UserError where the model does not take the images of the example.
    """
    # the innermost is the one that the recipe names: a probe, a segmenter or a detector is built around it
    configs: list[Any] = [module.pretrained_cfg for module in model.modules() if hasattr(module, "pretrained_cfg")]
    name = configs[-1]["architecture"] if configs else type(model).__name__
    training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    try:
        # the counter's hooks fail on a parameter that wants gradients and goes straight into a module
        for parameter in trained:
            parameter.requires_grad_(False)
        eager = torch.compiler.set_stance("force_eager")
        counter = FlopCounterMode(display=False)
        with first_forward(f"model.name={name}", example[0][0]), torch.no_grad(), eager, counter:
            model.eval()(*example)
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter.get_total_flops() / 1e9


def peak_memory(device: torch.device) -> float:
    """The most memory held so far, GB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
