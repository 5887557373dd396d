"""Throughput, FLOPs, memory, and traces of torch.profiler."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode

from ..distributed.device import accelerator, peak_allocated
from ..distributed.world import World
from ..files import writing
from ..recipe.schema import Parallel
from ..system import peak_resident

# dense bf16 tensor-core TFLOP/s from the manufacturers' data sheets; the first key found in the device's name applies
PEAK_TFLOPS = {
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


TRACED_ACCELERATORS = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}


class ThroughputMeter:
    """Measures speed and data waiting time between two calls of `read`."""

    def __init__(self, images_per_step: int, gflops: float, peak: float | None, device: torch.device):
        """images_per_step: over all processes; gflops: of one image's forward; peak: TFLOP/s of all devices, if known.

        device: whose memory `read` reports.
        """
        self.images_per_step, self.gflops, self.peak, self.device = images_per_step, gflops, peak, device
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self.since, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data, and count one step."""
        start = time.perf_counter()
        yield
        self.steps += 1
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the interval."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """The metrics of the interval since the last call; starts the next interval.

        images_per_second, tflops: over all processes. tflops counts a backward as two forwards and no recomputation.
        step_seconds; data_wait: fraction of the time; memory_gb: `peak_memory` of this process. mfu: model FLOPs
        utilization, tflops as a fraction of `peak`. memory_gb and mfu are left out if they are unknown.
        """
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        steps, waited = self.steps, self.waited
        self.restart()
        images = steps * self.images_per_step / elapsed
        tflops = 3 * self.gflops * images / 1e3
        metrics = {
            "images_per_second": round(images, 2),
            "data_wait": round(waited / elapsed, 4),
            "step_seconds": round(elapsed / max(steps, 1), 5),
            "tflops": float(f"{tflops:.4g}"),
        }
        if (memory := peak_memory(self.device)) is not None:
            metrics["memory_gb"] = round(memory, 3)
        return metrics | ({"mfu": round(tflops / self.peak, 4)} if self.peak else {})


class StepProfiler:
    """torch.profiler over ten steps of a start, 3 to 12 counted from 0; for chrome://tracing or Perfetto.

    The trace of each process is written to `profile/rankN.json` in the run directory.
    """

    SKIPPED, TRACED = 3, 10

    def __init__(self, path: Path, rank: int, *, enabled: bool):
        self.file, self.profiler = path / "profile" / f"rank{rank}.json", None
        if enabled:
            device = accelerator()
            traced = TRACED_ACCELERATORS.get(device.type) if device else None
            activities = [ProfilerActivity.CPU, *([traced] if traced else [])]
            window = schedule(wait=self.SKIPPED - 1, warmup=1, active=self.TRACED, repeat=1)
            self.profiler = profile(activities=activities, schedule=window, on_trace_ready=self._write)
            self.profiler.start()

    def step(self) -> None:
        """Call at the end of each training step."""
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
    """Peak TFLOP/s of all devices together; None for fp32, for the CPU and for a GPU that is not in `PEAK_TFLOPS`."""
    if world.device.type != "cuda" or parallel.precision == "fp32":
        return None
    name = torch.cuda.get_device_name(world.device)
    return next((world.size * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trainable or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def forward_gflops(model: nn.Module, example: tuple[Any, ...]) -> float:
    """Floating-point operations of `model(*example)` in evaluation mode, in 1e9. A multiply-add counts as two."""
    training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    try:
        # FlopCounterMode's module hooks fail if an input of a module is a parameter that requires gradients
        for parameter in trained:
            parameter.requires_grad_(False)
        eager = torch.compiler.set_stance("force_eager")
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), eager, counter:
            model.eval()(*example)
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter.get_total_flops() / 1e9


def peak_memory(device: torch.device) -> float | None:
    """Peak memory in GB (1e9 bytes): allocated on the accelerator, or else the resident set of this process.

    None if neither is known.
    """
    allocated = peak_allocated(device)
    peak = peak_resident() if allocated is None else allocated
    return None if peak is None else peak / 1e9
