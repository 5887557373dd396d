"""Every Triton kernel against its baselines on a GPU: first whether it is right, then how fast it is.

    python benchmarks/kernels.py                            everything, within nine minutes
    python benchmarks/kernels.py --operator halo --case 50ts-stage2-256 --seconds 0.5
    python benchmarks/kernels.py --dry-run                  the same program on stand-ins without a GPU; times nothing

Cases that fail the gate (gate.py) are recorded and not timed. Contenders are those of contenders.py; what cannot run is
a row with its reason. Gates, and everything that is to be compiled, go first and side by side, in processes of their
own, since a kernel that fails takes its process along; then one process times alone. A time is the median of
triton.testing.do_bench, which flushes the L2 cache; `forward` keeps nothing for a backward. The floor is the largest of
bytes, products and exponentials (contenders.py counts them) over the rates below. Results go to
benchmarks/results/kernels_DEVICE.{json,md}, written after every case.
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
from contenders import MANY_PROGRAMS, PROBLEMS, Cost, Problem, Run, cases, compiled
from gate import gate, in_one_line
from supervised import Job, emit, supervise
from torch import Tensor
from tqdm import tqdm
from verdicts import BOTH, COMPILED, EAGER, FORWARD, OURS, REPLAY, report

RESULTS = Path(__file__).resolve().parent / "results"

# bytes a second of a copy, by a part of the device's name
BANDWIDTH = {"H200": 4.0e12, "H100": 3.0e12}
FLOP_RATE = 790e12  # bfloat16 products, dense
EXPONENTIAL_RATE = 3.7e12

MANY = "many-programs"  # the case of the gate alone
GATE_SHARE = 0.45  # of the budget, at most
QUANTILES = [0.5, 0.2, 0.8]
LARGEST_DIFFERENCE = 5e-2  # of a contender's result from ours


def floor_us(costs: list[Cost]) -> float:
    """The least time of passes one after the other."""
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


def contenders(problem: Problem) -> dict[str, Callable[[], Run]]:
    return {
        OURS: lambda: problem.triton,
        EAGER: lambda: problem.eager,
        COMPILED: lambda: compiled(problem.eager, problem.device),
        **problem.baselines(),
    }


def host_us(call: Callable) -> float:
    """Microseconds until a call returns, while the GPU has room for more work."""
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
    """The quantiles that Triton's timers return."""
    return dict(zip(("median_us", "p20_us", "p80_us"), (1e3 * t for t in milliseconds), strict=True))


def measured(call: Callable, costs: list[Cost], seconds: float) -> dict[str, float]:
    """The figures of a row; the call has run once."""
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
    """Time of a call in a CUDA graph, without the host; the L2 cache is not flushed."""
    try:
        times = triton.testing.do_bench_cudagraph(call, rep=int(max(5, 100 * seconds)), quantiles=QUANTILES)
    except Exception as error:
        return {"reason": in_one_line(error)}
    return {**in_microseconds(times)}


def time_case(job: Job, case: tuple, *, until: float, seconds: float, dry: bool) -> Iterator[dict]:
    """A row for each contender and direction; after `until` only ours and the eager reference are still measured."""
    torch.manual_seed(0)
    problem: Problem = PROBLEMS[job[0]](case, torch.bfloat16, "cpu" if dry else "cuda")
    want = forward(problem.triton, problem)().float()  # which has passed the gate

    def figures(make: Callable, prepare: Callable, passes: list[Cost]) -> dict:
        try:
            call = prepare(make(), problem)
            difference = _difference(call(), want)
            return {"difference": difference, **({} if dry else measured(call, passes, seconds))}
        except Exception as error:  # of whatever kind: a row says so, and the others are measured
            return {"reason": in_one_line(error)}

    for name, make in contenders(problem).items():
        once = cache(make)
        for direction, prepare in DIRECTIONS.items():
            passes = list(problem.costs())[: 1 + (direction == BOTH)]
            row = {"operator": job[0], "case": job[1], "shape": case, "dtype": "bfloat16", "direction": direction}
            row |= {"least_bytes": sum(c.bytes for c in passes), "flop": sum(c.flop for c in passes)}
            in_time = time.time() < until or name in (OURS, EAGER)
            found = figures(once, prepare, passes) if in_time else {"reason": "no time was left"}
            yield row | {"contender": name} | found
            if name == OURS and "median_us" in found:
                yield row | {"contender": REPLAY} | replayed(prepare(problem.triton, problem), seconds)
            if not dry:
                torch.cuda.synchronize()  # an error that stays ends the process here


def _difference(got: Tensor, want: Tensor) -> float:
    difference = ((got.float() - want).norm() / want.norm()).item()
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(f"its result is {difference:.1e} away from ours")
    return difference


def shapes(job: Job, dry: bool) -> tuple:
    return MANY_PROGRAMS[job[0]] if job[1] == MANY else cases(job[0], dry=dry)[job[1]]


def gate_child(jobs: list[Job], *, dry: bool) -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16) if dry else (torch.bfloat16, torch.float16)
    for job in jobs:
        emit(start=job)
        for dtype in dtypes:
            torch.manual_seed(0)
            record = gate(PROBLEMS[job[0]], shapes(job, dry), dtype, "cpu" if dry else "cuda")
            emit(gate={"operator": job[0], "case": job[1], **record})
        emit(done=job)
    for job in [] if dry else jobs:
        if job[1] != MANY:
            warm(PROBLEMS[job[0]](shapes(job, dry), torch.bfloat16, "cuda"))


def warm(problem: Problem) -> None:
    """Compile what is to be timed; the caches on disk keep it. What fails will say so when it is timed."""
    for make in contenders(problem).values():
        for prepare in DIRECTIONS.values():
            with contextlib.suppress(Exception):
                prepare(make(), problem)()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def time_child(jobs: list[Job], *, dry: bool, until: float, seconds: float) -> None:
    for n, job in enumerate(jobs):
        emit(start=job)
        share = (until - time.time()) / (len(jobs) - n)
        # contenders take about six rows' time each in warming, flushing and counting
        spent = min(seconds, max(0.02, share / 60))
        for row in time_case(job, shapes(job, dry), until=time.time() + share, seconds=spent, dry=dry):
            emit(row=row)
        emit(done=job)
        torch._dynamo.reset()
        if not dry:
            torch.cuda.empty_cache()


class Results:
    """What was found so far, on disk after every case."""

    def __init__(self, out: Path, facts: dict, *, dry: bool, bar: tqdm):
        self.found: dict = {"facts": facts, "dry_run": dry, "gates": [], "rows": []}
        name = re.sub(r"[^a-z0-9]+", "_", str(facts["device"]).lower()).strip("_")
        self.path = out / f"kernels_{'dry_run' if dry else name}"
        self.bar, self.lock = bar, threading.Lock()

    def take(self, record: dict) -> None:
        with self.lock:
            if "gate" in record:
                self.found["gates"].append(record["gate"])
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
        """Whether the case passed in each type that was tried."""
        found = [g["passed"] for g in self.found["gates"] if (g["operator"], g["case"]) == job]
        return bool(found) and all(found)


def run_children(mode: str, jobs: list[Job], *, until: float, args: argparse.Namespace, results: "Results") -> None:
    command = [sys.executable, __file__, "--child", mode, "--until", str(until), "--seconds", str(args.seconds)]
    command += ["--dry-run"] * args.dry_run + ["--jobs"]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(args.dry_run))}
    if mode == "gate":  # many at a time
        environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # what is being timed shares out its time by itself and may finish its case
    grace = 0 if mode == "gate" else 30
    lost = supervise(command, jobs, environment=environment, until=until, grace=grace, take=results.take)
    for (operator, case), reason in lost.items():
        where = {"operator": operator, "case": case, "dtype": "bfloat16"}
        if mode == "gate":
            results.take({"gate": {**where, "errors": {}, "passed": False, "reasons": [reason]}})
        else:
            results.take({"row": {**where, "direction": BOTH, "contender": "whatever is missing", "reason": reason}})


def chosen_jobs(args: argparse.Namespace) -> list[Job]:
    operators = [args.operator] if args.operator else list(PROBLEMS)
    jobs = [(operator, name) for operator in operators for name in cases(operator, dry=args.dry_run)]
    # the goals are set at 224 and 256 pixels: whatever the operator, those go first
    jobs.sort(key=lambda job: "-224" not in job[1] and "-256" not in job[1])
    return [job for job in jobs if args.case in (None, job[1])]


def parse() -> tuple[argparse.Namespace, list[Job]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", choices=PROBLEMS, help="only this operator")
    parser.add_argument("--case", metavar="NAME", help="only cases of this name")
    parser.add_argument("--seconds", type=float, default=0.1, help="time for each row, at most (default 0.1)")
    parser.add_argument("--budget", type=float, default=500, help="seconds for the whole run (default 500)")
    parser.add_argument("--dry-run", action="store_true", help="stand-ins in the interpreter; needs no GPU")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--child", choices=("gate", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--jobs", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    jobs = [tuple(job.split("/")) for job in args.jobs] if args.child else chosen_jobs(args)
    if not jobs:
        parser.error(f"--case {args.case} is no case of {args.operator or 'any operator'}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("this torch sees no GPU; --dry-run needs none")
    return args, jobs


def main() -> None:
    start = time.time()
    args, jobs = parse()
    if args.child == "gate":
        return gate_child(jobs, dry=args.dry_run)
    if args.child == "time":
        return time_child(jobs, dry=args.dry_run, until=args.until, seconds=args.seconds)
    from measuring import facts

    device = "cpu" if args.dry_run else "cuda"
    out = args.out or (Path(tempfile.mkdtemp(prefix="tessel-kernels-")) if args.dry_run else RESULTS)
    gated = jobs if args.dry_run or args.case else jobs + [(o, MANY) for o in dict.fromkeys(job[0] for job in jobs)]
    with tqdm(total=len(gated) + len(jobs), disable=None) as bar:
        results = Results(out, {**facts(device), "triton": triton.__version__}, dry=args.dry_run, bar=bar)
        workers = 1 if args.dry_run else max(1, min(12, (os.cpu_count() or 2) - 2, len(gated)))
        until = start + GATE_SHARE * args.budget
        gates = partial(run_children, "gate", until=until, args=args, results=results)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(gates, (gated[n::workers] for n in range(workers))))
        right = [job for job in jobs if results.passed(job)]
        run_children("time", right, until=start + args.budget, args=args, results=results)
    results.save()
    print(results.path.with_suffix(".md").read_text())
    print(f"written: {results.path}.json, .md, after {time.time() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
