"""Check and time every Triton kernel and its baselines on a GPU.

    python benchmarks/kernels.py                            all cases, within nine minutes
    python benchmarks/kernels.py --operator halo --case 50ts-stage2-256 --seconds 0.5
    python benchmarks/kernels.py --dry-run                  small cases in the interpreter, without a GPU or times

First the correctness checks (correctness.py) and the compilation of everything that will be timed run in parallel, each
in a process of its own, because a CUDA error ends its process. Then one process times alone. A case that fails its
check is reported and not timed. The baselines are those of problems.py; one that cannot run is a row with its reason.

A time is the median of triton.testing.do_bench, which flushes the L2 cache. `forward` runs without gradients. The floor
is the largest of three lower bounds: bytes, FLOPs and exponentials (problems.py counts them), each over the rate below.
Results go to benchmarks/results/kernels_DEVICE.{json,md} and are saved after every case.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from correctness import check_correctness, one_line
from isolated_runner import Job, emit, run_isolated
from problems import MANY_PROGRAMS, PROBLEMS, Cost, Problem, Run, cases, compiled
from report import BOTH, COMPILED, EAGER, FORWARD, OURS, REPLAY, report
from torch import Tensor
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results"

# copy bandwidth in bytes per second, by a part of the device's name
BANDWIDTH = {"H200": 4.0e12, "H100": 3.0e12}
FLOP_RATE = 790e12  # bfloat16 products, dense
EXPONENTIAL_RATE = 3.7e12

MANY = "many-programs"  # name of the case that is checked but not timed
CHECK_SHARE = 0.45  # of the budget, at most
QUANTILES = [0.5, 0.2, 0.8]
MAX_DIFFERENCE = 5e-2  # relative, between the output of a baseline and ours


def floor_us(costs: list[Cost]) -> float:
    """Return a lower bound of the time of consecutive passes, in microseconds."""
    name = torch.cuda.get_device_name()
    bandwidth = next((rate for part, rate in BANDWIDTH.items() if part in name), BANDWIDTH["H100"])
    bounds = [(c.bytes / bandwidth, c.flop / FLOP_RATE, c.exponentials / EXPONENTIAL_RATE) for c in costs]
    return 1e6 * sum(map(max, bounds))


def forward(run: Run, problem: Problem) -> Callable[[], Tensor]:
    tensors = [x.detach() for x in problem.tensors]

    def call() -> Tensor:
        with torch.no_grad():
            return run(*tensors)

    return call


def both(run: Run, problem: Problem) -> Callable[[], Tensor]:
    grad = torch.randn_like(run(*problem.tensors).detach())

    def call() -> Tensor:
        y = run(*problem.tensors)
        torch.autograd.grad(y, problem.tensors, grad)
        return y.detach()

    return call


DIRECTIONS: dict[str, Callable] = {FORWARD: forward, BOTH: both}


def implementations(problem: Problem) -> dict[str, Callable[[], Run]]:
    """Name -> function that builds the implementation: our kernels, eager and compiled PyTorch, the baselines."""
    return {
        OURS: lambda: problem.triton,
        EAGER: lambda: problem.eager,
        COMPILED: lambda: compiled(problem.eager, problem.device),
        **problem.baselines(),
    }


def host_us(call: Callable) -> float:
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


def peak_mib(call: Callable) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def in_microseconds(milliseconds: Any) -> dict[str, float]:
    """Name the quantiles that Triton's timers return."""
    return dict(zip(("median_us", "p20_us", "p80_us"), (1e3 * t for t in milliseconds), strict=True))


def measured(call: Callable, costs: list[Cost], seconds: float) -> dict[str, float]:
    """Measure a call that has run once: time, host time, peak memory, share of the floor."""
    peak, host = peak_mib(call), host_us(call)
    times = triton.testing.do_bench(
        call, warmup=max(1, int(250 * seconds)), rep=int(1000 * seconds), quantiles=QUANTILES
    )
    floor, found = floor_us(costs), in_microseconds(times)
    return {
        **found,
        "host_us": host,
        "peak_mib": peak,
        "floor_us": floor,
        "floor_percent": 100 * floor / found["median_us"],
    }


def replayed(call: Callable, seconds: float) -> dict[str, float | str]:
    """Time a call in a CUDA graph, that is, without the host. The L2 cache is not flushed."""
    try:
        times = triton.testing.do_bench_cudagraph(call, rep=int(max(5, 100 * seconds)), quantiles=QUANTILES)
    except Exception as error:
        return {"reason": one_line(error)}
    return {**in_microseconds(times)}


def time_case(job: Job, case: tuple, *, until: float, seconds: float, dry: bool) -> Iterator[dict]:
    """Yield a row for each implementation and direction; after `until` only for ours and the eager reference."""
    torch.manual_seed(0)
    problem: Problem = PROBLEMS[job[0]](case, torch.bfloat16, "cpu" if dry else "cuda")
    want = forward(problem.triton, problem)().float()  # our kernels have passed the check

    def metrics(make: Callable, prepare: Callable, passes: list[Cost]) -> dict:
        try:
            call = prepare(make(), problem)
            difference = _difference(call(), want)
            return {"difference": difference, **({} if dry else measured(call, passes, seconds))}
        except Exception as error:  # whatever the error: report it in the row and measure the others
            return {"reason": one_line(error)}

    for name, make in implementations(problem).items():
        once = cache(make)
        for direction, prepare in DIRECTIONS.items():
            passes = list(problem.costs())[: 1 + (direction == BOTH)]
            row = {"operator": job[0], "case": job[1], "shape": case, "dtype": "bfloat16", "direction": direction}
            row |= {"least_bytes": sum(c.bytes for c in passes), "flop": sum(c.flop for c in passes)}
            in_time = time.time() < until or name in (OURS, EAGER)
            found = metrics(once, prepare, passes) if in_time else {"reason": "no time was left"}
            yield row | {"implementation": name} | found
            if name == OURS and "median_us" in found:
                yield row | {"implementation": REPLAY} | replayed(prepare(problem.triton, problem), seconds)
            if not dry:
                torch.cuda.synchronize()  # raises pending CUDA errors here


def _difference(got: Tensor, want: Tensor) -> float:
    difference = ((got.float() - want).norm() / want.norm()).item()
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(f"its output differs from ours by {difference:.1e}")
    return difference


def shapes(job: Job, dry: bool) -> tuple:
    return MANY_PROGRAMS[job[0]] if job[1] == MANY else cases(job[0], dry=dry)[job[1]]


def check_child(jobs: list[Job], *, dry: bool) -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16) if dry else (torch.bfloat16, torch.float16)
    for job in jobs:
        emit(start=job)
        for dtype in dtypes:
            torch.manual_seed(0)
            record = check_correctness(PROBLEMS[job[0]], shapes(job, dry), dtype, "cpu" if dry else "cuda")
            emit(check={"operator": job[0], "case": job[1], **record})
        emit(done=job)
    for job in [] if dry else jobs:
        if job[1] != MANY:
            warm(PROBLEMS[job[0]](shapes(job, dry), torch.bfloat16, "cuda"))


def warm(problem: Problem) -> None:
    """Compile what will be timed, into the caches on disk. Errors are ignored here; the timing reports them."""
    for make in implementations(problem).values():
        for prepare in DIRECTIONS.values():
            with contextlib.suppress(Exception):
                prepare(make(), problem)()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def time_child(jobs: list[Job], *, dry: bool, until: float, seconds: float) -> None:
    for n, job in enumerate(jobs):
        emit(start=job)
        share = (until - time.time()) / (len(jobs) - n)
        # each implementation takes about six times the time of a row: warm-up, flushes, counting
        spent = min(seconds, max(0.02, share / 60))
        for row in time_case(job, shapes(job, dry), until=time.time() + share, seconds=spent, dry=dry):
            emit(row=row)
        emit(done=job)
        torch._dynamo.reset()
        if not dry:
            torch.cuda.empty_cache()


class Results:
    """The results so far, saved to disk after every case."""

    def __init__(self, out: Path, facts: dict, *, dry: bool, bar: tqdm):
        self.found: dict = {"facts": facts, "dry_run": dry, "checks": [], "rows": []}
        name = re.sub(r"[^a-z0-9]+", "_", str(facts["device"]).lower()).strip("_")
        self.path = out / f"kernels_{'dry_run' if dry else name}"
        self.bar, self.lock = bar, threading.Lock()

    def add(self, record: dict) -> None:
        with self.lock:
            if "check" in record:
                self.found["checks"].append(record["check"])
            elif "row" in record:
                self.found["rows"].append(record["row"])
            elif "done" in record:
                self.bar.update()
                self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", json.dumps(self.found, indent=1)), (".md", report(self.found))):
            new = self.path.with_suffix(suffix + ".part")
            new.write_text(text)
            os.replace(new, self.path.with_suffix(suffix))

    def passed(self, job: Job) -> bool:
        """Whether the case passed its check in every dtype."""
        found = [c["passed"] for c in self.found["checks"] if (c["operator"], c["case"]) == job]
        return bool(found) and all(found)


def run_children(mode: str, jobs: list[Job], *, until: float, args: argparse.Namespace, results: "Results") -> None:
    command = [sys.executable, __file__, "--child", mode, "--until", str(until), "--seconds", str(args.seconds)]
    command += ["--dry-run"] * args.dry_run + ["--jobs"]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(args.dry_run))}
    if mode == "check":  # several processes at a time
        environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # the timing process divides its time by itself; let it finish its case
    grace = 0 if mode == "check" else 30
    lost = run_isolated(command, jobs, environment=environment, until=until, grace=grace, on_record=results.add)
    for (operator, case), reason in lost.items():
        where = {"operator": operator, "case": case, "dtype": "bfloat16"}
        if mode == "check":
            results.add({"check": {**where, "errors": {}, "passed": False, "reasons": [reason]}})
        else:
            results.add({"row": {**where, "direction": BOTH, "implementation": "the missing ones", "reason": reason}})


def chosen_jobs(args: argparse.Namespace) -> list[Job]:
    operators = [args.operator] if args.operator else list(PROBLEMS)
    jobs = [(operator, name) for operator in operators for name in cases(operator, dry=args.dry_run)]
    # the goals are set at 224 and 256 pixels, so those cases go first
    jobs.sort(key=lambda job: "-224" not in job[1] and "-256" not in job[1])
    return [job for job in jobs if args.case in (None, job[1])]


def parse() -> tuple[argparse.Namespace, list[Job]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", choices=PROBLEMS, help="only this operator")
    parser.add_argument("--case", metavar="NAME", help="only cases of this name")
    parser.add_argument("--seconds", type=float, default=0.1, help="longest time per row (default 0.1)")
    parser.add_argument("--budget", type=float, default=500, help="seconds for the whole run (default 500)")
    parser.add_argument("--dry-run", action="store_true", help="small cases in the interpreter; needs no GPU")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--child", choices=("check", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--jobs", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    jobs = [tuple(job.split("/")) for job in args.jobs] if args.child else chosen_jobs(args)
    if not jobs:
        parser.error(f"--case {args.case} is not a case of {args.operator or 'any operator'}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("this torch sees no GPU; --dry-run needs none")
    return args, jobs


def main() -> None:
    start = time.time()
    args, jobs = parse()
    if args.child == "check":
        return check_child(jobs, dry=args.dry_run)
    if args.child == "time":
        return time_child(jobs, dry=args.dry_run, until=args.until, seconds=args.seconds)
    from measurement import facts

    device = "cpu" if args.dry_run else "cuda"
    out = args.out or (Path(tempfile.mkdtemp(prefix="tessel-kernels-")) if args.dry_run else RESULTS)
    checked = jobs if args.dry_run or args.case else jobs + [(o, MANY) for o in dict.fromkeys(job[0] for job in jobs)]
    with tqdm(total=len(checked) + len(jobs), disable=None) as bar:
        results = Results(out, {**facts(device), "triton": triton.__version__}, dry=args.dry_run, bar=bar)
        workers = 1 if args.dry_run else max(1, min(12, (os.cpu_count() or 2) - 2, len(checked)))
        until = start + CHECK_SHARE * args.budget
        check = partial(run_children, "check", until=until, args=args, results=results)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(check, (checked[n::workers] for n in range(workers))))
        passed = [job for job in jobs if results.passed(job)]
        run_children("time", passed, until=start + args.budget, args=args, results=results)
    results.save()
    print(results.path.with_suffix(".md").read_text())
    print(f"written: {results.path}.json, .md, after {time.time() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
