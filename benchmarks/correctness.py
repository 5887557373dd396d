"""What a kernel must pass before it is timed: it is right to the last digits of its type, and always the same."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from contenders import Problem
from torch import Tensor

CAPS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
# in the interpreter, which cuts off where a GPU rounds
INTERPRETED = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}

_MOST_PAIRS = 1 << 27  # of queries and keys in float64, a gigabyte for each map of scores
_PATIENCE = 5  # attempts where the memory of the GPU is taken by gates beside this one


def gate(kind: type[Problem], case: tuple, dtype: torch.dtype, device: str) -> dict:
    """Whether our kernels pass, and the errors of ours and of the eager reference, both in `dtype`, against float64.

    Relative errors, in the Frobenius norm, of the result and of every gradient. Ours may be half as large again as the
    reference's, which counts as no less than one rounding of an operand, and at most the cap of the type. The batch of
    the comparison is cut until float64 fits; the runs that must agree bit by bit are of the whole batch.
    """
    batch = _batch_that_fits(kind, case)
    record: dict = {"dtype": str(dtype).removeprefix("torch."), "errors": {}, "passed": False, "reasons": []}
    for attempt in range(_PATIENCE):
        record["batch"] = batch
        try:
            record["errors"] = _errors(kind((batch, *case[1:]), dtype, device))
            record["reasons"] = _too_large(record["errors"], dtype, device)
            if dtype == torch.bfloat16 or device == "cuda":
                record["reasons"] += _differences(kind(case, dtype, device))
            record["passed"] = not record["reasons"]
            return record
        except torch.OutOfMemoryError as error:
            record["reasons"] = [in_one_line(error)]
            torch.cuda.empty_cache()
            time.sleep(2 * attempt)
            batch = max(1, batch // 2)
        except Exception as error:  # a kernel that does not run is what the gate is for
            record["reasons"] = [in_one_line(error)]
            return record
    return record


def in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def _batch_that_fits(kind: type[Problem], case: tuple) -> int:
    one = kind((1, *case[1:]), torch.bfloat16, "meta")
    return max(1, min(case[0], _MOST_PAIRS // (one.queries * one.keys)))


def _value_and_grads(run: Callable, tensors: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    y = run(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, weights.to(y.dtype))]


def _errors(problem: Problem) -> dict[str, tuple[float, float]]:
    """Name of the result or gradient -> error of ours, error of the eager reference."""
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
    """Deterministic mode fills `torch.empty` with NaN, so that memory left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-12)).item()


def limit(eager: float, dtype: torch.dtype, device: str) -> float:
    """The largest error that ours may have where the eager reference has this one."""
    if device != "cuda":
        return INTERPRETED[dtype]
    return min(CAPS[dtype], 1.5 * max(eager, torch.finfo(dtype).eps / 2))


def _too_large(errors: dict[str, tuple[float, float]], dtype: torch.dtype, device: str) -> list[str]:
    limits = {name: limit(eager, dtype, device) for name, (_, eager) in errors.items()}
    # the negation catches NaN
    return [
        f"{name}: error {ours:.1e} is above {limits[name]:.1e} (eager {eager:.1e})"
        for name, (ours, eager) in errors.items()
        if not ours <= limits[name]
    ]


def _differences(problem: Problem) -> list[str]:
    """Whether three runs, and one whose gradient is expanded from one number, agree bit by bit."""
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
