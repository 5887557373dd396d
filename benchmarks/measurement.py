"""Shared by the scripts of this folder: side-by-side timing, peak memory, and the facts of a measurement."""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from tessel.compare.timing import side_by_side as side_by_side
from tessel.compare.timing import synchronize as synchronize
from tessel.train.distributed.device import accelerator, has_bf16

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DEVICES = ("cpu", "cuda", "mps", "xpu")
STATM = Path("/proc/self/statm")  # of Linux
# return freed memory to the system at once, so that the resident set equals the memory in use
RETURNING = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def facts(device: str = "cpu") -> dict[str, str | int]:
    """Return device, versions and commit, to be saved with a measurement."""
    name = getattr(torch.get_device_module(device), "get_device_name", cpu_name)()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a message if `args` names an unknown model or a device that is missing."""
    for name in [*args.models, *(args.peers or [])]:
        if not timm.is_model(name):
            parser.error(f"{name} is not a registered model; see timm.list_models() and tessel.zoo.list_models()")
    found = accelerator()
    if args.device != "cpu" and (found is None or found.type != args.device):
        parser.error(f"--device {args.device}: this torch sees {'no GPU' if found is None else f'only {found.type}'}")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def precision(device: str) -> torch.autocast:
    """bfloat16 on an accelerator that has it, else float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or has_bf16(torch.device(device)))


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """Return how many times faster `name` was than `to`: the median of the quotients of the rounds."""
    return statistics.median(b / a for a, b in zip(times[name], times[to], strict=True))


def resident() -> int:
    """Return the resident set of this process in bytes."""
    if STATM.exists():
        return int(STATM.read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return psutil.Process().memory_info().rss


def allocated(run: Callable) -> tuple[int, int]:
    """Return the memory of tensors on the accelerator before `run()`, and at its highest, in bytes.

    Where torch does not count it, as with mps, it is the resident set of this process.
    """
    try:
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        counted = bool(torch.accelerator.memory_stats())
    except RuntimeError:
        counted = False
    if not counted:
        before = resident()
        return before, before + peak_of(run)
    run()
    return before, torch.accelerator.max_memory_allocated()


def peak_of(run: Callable) -> int:
    """Return the increase of the resident set during `run()`, at its highest, in bytes. Sampled every millisecond."""
    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(highest, resident()) - before


def in_own_process(script: str, *arguments: str, returning: bool = True) -> str:
    """Run `script` in a new process and return its output; exit with its error output if it fails.

    returning: whether freed memory returns to the system at once, as `peak_of` needs it. Then each allocation of 64 KiB
    or more asks the system for new pages, so such a process must not measure time.
    """
    command, environment = [sys.executable, script, *arguments], RETURNING if returning else None
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    return run.stdout
