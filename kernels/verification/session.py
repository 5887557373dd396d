"""A session checks and times cases of the operators, in processes of their own, because a CUDA error ends a process.

First the correctness checks and the compilation of everything that will be timed run in parallel. Then one process
times alone. A case that fails its check in any dtype is not timed. `python -m tessel.kernels.verification.session` is
the child process.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pkgutil import resolve_name

import torch

from .. import verdicts
from .correctness import check_correctness
from .isolated_runner import Job, emit, run_isolated
from .problems import MANY_PROGRAMS, PROBLEMS, cases
from .timing import DIRECTIONS, implementations, time_case

MANY = "many-programs"  # name of the case that is checked but not timed
CHECK_SHARE = 0.45  # of the budget, at most
GPU_CLOCK = "tessel.kernels.verification.timing:gpu_clock"


@dataclass(frozen=True)
class Settings:
    """budget: seconds for the session; seconds: longest time per row; interpreted: small cases in Triton's interpreter;
    dtypes: those that are timed; baselines: time more than eager and compiled PyTorch; clock: import path of a
    `timing.Clock`, or empty to time nothing."""

    budget: float
    seconds: float = 0.1
    interpreted: bool = False
    dtypes: Sequence[str] = ("bfloat16",)
    baselines: bool = True
    clock: str = GPU_CLOCK

    @property
    def device(self) -> str:
        return "cpu" if self.interpreted else "cuda"

    @property
    def checked_dtypes(self) -> tuple[torch.dtype, ...]:
        if self.interpreted:
            return torch.float64, torch.float32, torch.bfloat16
        return torch.bfloat16, torch.float16


def run_session(jobs: Sequence[Job], settings: Settings, on_record: Callable[[dict], None]) -> None:
    """Run the jobs, (operator, case); `on_record` gets each record as it comes, from any thread.

    Records are {"check": ...}, the result of a correctness check, {"row": ...}, a time or a reason why there is none,
    and {"done": job}, once for the check and once for the timing of a job.
    """
    start, failed, checked = time.time(), set(), set()

    def watch(record: dict) -> None:
        if "check" in record:
            job = record["check"]["operator"], record["check"]["case"]
            (checked if record["check"]["passed"] else failed).add(job)
        on_record(record)

    workers = 1 if settings.interpreted else max(1, min(12, (os.cpu_count() or 2) - 2, len(jobs)))
    check = partial(_run_children, "check", settings, until=start + CHECK_SHARE * settings.budget, on_record=watch)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(check, (list(jobs[n::workers]) for n in range(workers))))
    passed = [job for job in jobs if job in checked - failed and job[1] != MANY]
    _run_children("time", settings, passed, until=start + settings.budget, on_record=on_record)


def _run_children(mode: str, settings: Settings, jobs: list[Job], *, until: float, on_record: Callable) -> None:
    command = [sys.executable, "-m", __name__, mode, str(until), json.dumps(asdict(settings))]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(settings.interpreted))}
    if mode == "check":  # several processes at a time
        environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # the timing process divides its time by itself; let it finish its case
    grace = 0 if mode == "check" else 30
    lost = run_isolated(command, jobs, environment=environment, until=until, grace=grace, on_record=on_record)
    for (operator, case), reason in lost.items():
        where = {"operator": operator, "case": case, "dtype": settings.dtypes[0]}
        if mode == "check":
            on_record({"check": {**where, "errors": {}, "passed": False, "reasons": [reason]}})
        else:
            row = {"direction": "forward+backward", "implementation": "the missing ones", "reason": reason}
            on_record({"row": where | row})
        on_record({"done": (operator, case)})


def _check_child(jobs: list[Job], settings: Settings) -> None:
    for job in jobs:
        emit(start=job)
        for dtype in settings.checked_dtypes:
            torch.manual_seed(0)
            record = check_correctness(PROBLEMS[job[0]], case_of(job, settings), dtype, settings.device)
            emit(check={"operator": job[0], "case": job[1], **record})
        emit(done=job)
    for job in [] if settings.interpreted else jobs:
        if job[1] != MANY:
            _warm(job, settings)


def _warm(job: Job, settings: Settings) -> None:
    """Compile what will be timed, into the caches on disk. Errors are ignored here; the timing reports them."""
    for dtype in settings.dtypes:
        problem = PROBLEMS[job[0]](case_of(job, settings), getattr(torch, dtype), settings.device)
        for make in implementations(problem, baselines=settings.baselines).values():
            for prepare in DIRECTIONS.values():
                with contextlib.suppress(Exception):
                    prepare(make(), problem)()
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def _time_child(jobs: list[Job], settings: Settings, until: float) -> None:
    clock = resolve_name(settings.clock) if settings.clock else None
    turns = [(job, dtype) for job in jobs for dtype in settings.dtypes]
    for n, (job, dtype) in enumerate(turns):
        emit(start=job)
        share = (until - time.time()) / (len(turns) - n)
        # each implementation takes about six times the time of a row: warm-up, flushes, counting
        seconds = min(settings.seconds, max(0.02, share / 60))
        rows = time_case(
            PROBLEMS[job[0]],
            case_of(job, settings),
            dtype=getattr(torch, dtype),
            device=settings.device,
            clock=clock,
            seconds=seconds,
            until=time.time() + share,
            baselines=settings.baselines,
        )
        for row in rows:
            emit(row={"operator": job[0], "case": job[1], **row})
        if dtype == settings.dtypes[-1]:
            emit(done=job)
        torch._dynamo.reset()
        if settings.device == "cuda":
            torch.cuda.empty_cache()


def case_of(job: Job, settings: Settings) -> tuple:
    """The shapes of a job."""
    return MANY_PROGRAMS[job[0]] if job[1] == MANY else cases(job[0], interpreted=settings.interpreted)[job[1]]


def main() -> None:
    """Run jobs, given as operator/case, in this process and print their records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("check", "time"))
    parser.add_argument("until", type=float)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("jobs", nargs="*")
    args = parser.parse_args()
    jobs: list[Job] = [tuple(job.split("/")) for job in args.jobs]  # type: ignore[misc]
    settings = Settings(**args.settings)
    verdicts.enabled = False
    if args.mode == "check":
        _check_child(jobs, settings)
    else:
        _time_child(jobs, settings, args.until)


if __name__ == "__main__":
    main()
