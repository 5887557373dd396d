"""Timing of the implementations of one problem side by side.

A time is the median of triton.testing.do_bench, which flushes the L2 cache. `forward` runs without gradients. The floor
is the largest of three lower bounds: bytes, FLOPs and exponentials (problems.py counts them), each over its rate on
this device: that of a large copy, of a large product in bfloat16, and of the multiprocessors.
"""

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .correctness import one_line
from .problems import Cost, Problem, Run, compiled

FORWARD, BOTH = "forward", "forward+backward"
OURS, EAGER, COMPILED, REPLAY = "triton", "eager", "compiled", "triton, CUDA graph"

EXPONENTIALS_PER_SECOND = 16 * 1.755e9  # of one multiprocessor
QUANTILES = [0.5, 0.2, 0.8]
MAX_DIFFERENCE = 5e-2  # relative, between the output of a baseline and ours

# (implementation, call, lower bounds, seconds) -> what a row says of its time; `gpu_clock` is one
Clock = Callable[[str, Callable, list[Cost], float], dict[str, Any]]


def forward(run: Run, problem: Problem) -> Callable[[], Tensor]:
    """The call that is timed: a forward pass."""
    tensors = [x.detach() for x in problem.tensors]

    def call() -> Tensor:
        with torch.no_grad():
            return run(*tensors)

    return call


def both(run: Run, problem: Problem) -> Callable[[], Tensor]:
    """The call that is timed: a forward pass and the gradients of all inputs."""
    grad = torch.randn_like(run(*problem.tensors).detach())

    def call() -> Tensor:
        y = run(*problem.tensors)
        torch.autograd.grad(y, problem.tensors, grad)
        return y.detach()

    return call


DIRECTIONS: dict[str, Callable] = {FORWARD: forward, BOTH: both}


def implementations(problem: Problem, *, baselines: bool) -> dict[str, Callable[[], Run]]:
    """Name -> function that builds the implementation: our kernels, eager and compiled PyTorch, the baselines."""
    return {
        OURS: lambda: problem.triton,
        EAGER: lambda: problem.plain,
        COMPILED: lambda: compiled(problem.eager, problem.device),
        **(problem.baselines() if baselines else {}),
    }


def time_case(
    kind: type[Problem],
    case: tuple,
    *,
    dtype: torch.dtype,
    device: str,
    clock: Clock | None,
    seconds: float,
    until: float,
    baselines: bool,
) -> Iterator[dict]:
    """Yield a row for each implementation and direction; after `until` only for ours and eager PyTorch.

    Without a clock the implementations are run and compared, but not timed.
    """
    torch.manual_seed(0)
    problem = kind(case, dtype, device)
    want = forward(problem.triton, problem)().float()  # our kernels have passed the check

    def metrics(name: str, make: Callable, prepare: Callable, passes: list[Cost]) -> dict:
        try:
            call = prepare(make(), problem)
            difference = _difference(call(), want)
            return {"difference": difference, **(clock(name, call, passes, seconds) if clock else {})}
        except Exception as error:  # whatever the error: report it in the row and measure the others
            return {"reason": one_line(error)}

    for name, make in implementations(problem, baselines=baselines).items():
        once = cache(make)
        for direction, prepare in DIRECTIONS.items():
            passes = list(problem.costs())[: 1 + (direction == BOTH)]
            row = {"shape": case, "dtype": str(dtype).removeprefix("torch."), "direction": direction}
            row |= {"shape_class": problem.workload(training=direction == BOTH).shape_class}
            row |= {"least_bytes": sum(c.bytes for c in passes), "flop": sum(c.flop for c in passes)}
            in_time = time.time() < until or name in (OURS, EAGER)
            found = metrics(name, once, prepare, passes) if in_time else {"reason": "no time was left"}
            yield row | {"implementation": name} | found
            if name == OURS and clock is gpu_clock and "median_us" in found:
                yield row | {"implementation": REPLAY} | _replayed(prepare(problem.triton, problem), seconds)
            if device == "cuda":
                torch.cuda.synchronize()  # raises pending CUDA errors here


def gpu_clock(name: str, call: Callable, costs: list[Cost], seconds: float) -> dict[str, float]:
    """Measure a call that has run once: time, host time, peak memory, share of the floor."""
    peak, host = _peak_mib(call), _host_us(call)
    times = triton.testing.do_bench(
        call, warmup=max(1, int(250 * seconds)), rep=int(1000 * seconds), quantiles=QUANTILES
    )
    floor, found = _floor_us(costs), _in_microseconds(times)
    return {
        **found,
        "host_us": host,
        "peak_mib": peak,
        "floor_us": floor,
        "floor_percent": 100 * floor / found["median_us"],
    }


def _replayed(call: Callable, seconds: float) -> dict[str, float | str]:
    """Time a call in a CUDA graph, that is, without the host. The L2 cache is not flushed."""
    try:
        times = triton.testing.do_bench_cudagraph(call, rep=int(max(5, 100 * seconds)), quantiles=QUANTILES)
    except Exception as error:
        return {"reason": one_line(error)}
    return {**_in_microseconds(times)}


def _floor_us(costs: list[Cost]) -> float:
    """Return a lower bound of the time of consecutive passes, in microseconds."""
    bytes_rate, flop_rate, exponential_rate = _rates()
    bounds = [(c.bytes / bytes_rate, c.flop / flop_rate, c.exponentials / exponential_rate) for c in costs]
    return 1e6 * sum(map(max, bounds))


@cache
def _rates() -> tuple[float, float, float]:
    """Bytes, FLOPs and exponentials per second of this device."""
    source, target = (torch.empty(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = _seconds(lambda: target.copy_(source))
    side = 8192
    square = torch.randn(side, side, dtype=torch.bfloat16, device="cuda")
    product = _seconds(lambda: square @ square)
    processors = torch.cuda.get_device_properties().multi_processor_count
    return 2 * source.numel() / copy, 2 * side**3 / product, processors * EXPONENTIALS_PER_SECOND


def _seconds(call: Callable) -> float:
    median: Any = triton.testing.do_bench(call, return_mode="median")
    return 1e-3 * median


def _host_us(call: Callable) -> float:
    """Return the microseconds until a call returns, while the GPU's queue has room."""
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            call()
        best = min(best, time.perf_counter() - start)
    torch.cuda.synchronize()
    return best / 10 * 1e6


def _peak_mib(call: Callable) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _in_microseconds(milliseconds: Any) -> dict[str, float]:
    """Name the quantiles that Triton's timers return."""
    return dict(zip(("median_us", "p20_us", "p80_us"), (1e3 * t for t in milliseconds), strict=True))


def _difference(got: Tensor, want: Tensor) -> float:
    difference = ((got.float() - want).norm() / want.norm()).item()
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(f"its output differs from ours by {difference:.1e}")
    return difference
