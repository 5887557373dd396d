"""Timing of several functions in turns."""

import time
from collections.abc import Callable

import torch


def side_by_side(
    runs: dict[str, Callable],
    *,
    seconds: float,
    device: str = "cpu",
    least: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time the runs in turns, so that other load on the machine affects all of them; return the seconds of each call.

    After one round that is not counted there are at least `least` rounds, and as many as fit into `seconds` per run.
    clock: what is measured, in seconds; by default the time on the wall.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    first = sum(_timed(run, device, clock) for run in runs.values())
    rounds = max(least, int(seconds * len(runs) / max(first, 1e-6)))
    for _ in range(min(rounds, 200)):
        for name, run in runs.items():
            times[name].append(_timed(run, device, clock))
    return times


def synchronize(device: str) -> None:
    """Wait until the device has computed everything."""
    if device != "cpu":
        torch.accelerator.synchronize()


def _timed(run: Callable, device: str, clock: Callable[[], float]) -> float:
    synchronize(device)
    start = clock()
    run()
    synchronize(device)
    return clock() - start
