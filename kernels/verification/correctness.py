"""The correctness check that a kernel must pass before it is timed: accurate for its dtype, and bitwise repeatable."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .problems import Problem

# largest relative error per dtype: on a GPU, and in the interpreter (which truncates to bfloat16 instead of rounding)
MAX_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
MAX_ERROR_INTERPRETED = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}

MAX_PAIRS = 1 << 27  # of queries and keys in float64: one gigabyte per map of scores
MAX_ATTEMPTS = 5  # if parallel checks have taken the GPU's memory


def check_correctness(kind: type[Problem], case: tuple, dtype: torch.dtype, device: str) -> dict:
    """Check one case; return a record with `passed`, `reasons` and the errors against float64.

    The errors are relative, in the Frobenius norm, of the output and of every gradient, for our kernels and for the
    eager reference, both in `dtype`. `error_limit` says how large ours may be. The batch of this comparison is reduced
    until float64 fits into memory; the runs that must agree bit by bit use the whole batch.
    """
    batch = _batch_that_fits(kind, case)
    record: dict = {"dtype": str(dtype).removeprefix("torch."), "errors": {}, "passed": False, "reasons": []}
    for attempt in range(MAX_ATTEMPTS):
        record["batch"] = batch
        try:
            record["errors"] = _errors(kind((batch, *case[1:]), dtype, device))
            record["reasons"] = _errors_above_limit(record["errors"], dtype, device)
            if dtype == torch.bfloat16 or device == "cuda":
                record["reasons"] += _bitwise_differences(kind(case, dtype, device))
            record["passed"] = not record["reasons"]
            return record
        except torch.OutOfMemoryError as error:
            record["reasons"] = [one_line(error)]
            torch.cuda.empty_cache()
            time.sleep(2 * attempt)
            batch = max(1, batch // 2)
        except Exception as error:  # a kernel that does not run has failed the check
            record["reasons"] = [one_line(error)]
            return record
    return record


def one_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def _batch_that_fits(kind: type[Problem], case: tuple) -> int:
    one = kind((1, *case[1:]), torch.bfloat16, "meta")
    return max(1, min(case[0], MAX_PAIRS // (one.queries * one.keys)))


def _value_and_grads(run: Callable, tensors: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    y = run(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, weights.to(y.dtype))]


def _errors(problem: Problem) -> dict[str, tuple[float, float]]:
    """Name of the output or gradient -> (error of our kernels, error of the eager reference)."""
    shape = problem.eager(*problem.tensors).shape
    weights = torch.randn(shape, device=problem.device).to(problem.tensors[0].dtype)

    def named(run: Callable, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        y, *grads = _value_and_grads(run, tensors, weights)
        return {"y": y} | problem.parts(grads)

    with _poisoned_memory():
        ours = named(problem.triton, problem.tensors)
    eager = named(problem.eager, problem.tensors)
    exact = named(problem.eager, problem.in_float64())
    return {name: (_error(ours[name], want), _error(eager[name], want)) for name, want in exact.items()}


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Deterministic mode fills `torch.empty` with NaN, so that unwritten memory shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-12)).item()


def error_limit(eager: float, dtype: torch.dtype, device: str) -> float:
    """Return the largest error allowed for our kernels, given the error of the eager reference.

    On a GPU: 1.5 times the reference's error, or of one rounding of an operand if that is more, up to MAX_ERROR.
    """
    if device != "cuda":
        return MAX_ERROR_INTERPRETED[dtype]
    return min(MAX_ERROR[dtype], 1.5 * max(eager, torch.finfo(dtype).eps / 2))


def _errors_above_limit(errors: dict[str, tuple[float, float]], dtype: torch.dtype, device: str) -> list[str]:
    limits = {name: error_limit(eager, dtype, device) for name, (_, eager) in errors.items()}
    # `not <=` instead of `>` catches NaN
    return [
        f"{name}: error {ours:.1e} is above {limits[name]:.1e} (eager {eager:.1e})"
        for name, (ours, eager) in errors.items()
        if not ours <= limits[name]
    ]


def _bitwise_differences(problem: Problem) -> list[str]:
    """Compare three runs, and one whose output gradient is expanded from a scalar; return those with other bits."""
    y = problem.triton(*problem.tensors).detach()
    ones = torch.ones_like(y)
    first = _value_and_grads(problem.triton, problem.tensors, ones)
    expanded = torch.ones((), dtype=y.dtype, device=y.device).expand_as(y)
    weights = {"a second run": ones, "a third run": ones, "an expanded gradient": expanded}
    return [
        f"{name} gives other bits"
        for name, w in weights.items()
        if not all(map(torch.equal, first, _value_and_grads(problem.triton, problem.tensors, w)))
    ]
