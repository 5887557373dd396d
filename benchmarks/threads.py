"""Training speed on the CPU with several settings of OpenMP's threads, on an idle and on a busy machine.

    python benchmarks/threads.py                     about 6 minutes; --dry-run takes seconds, to see it run

Trains the model of the recipe demo/digits in new processes, one for each setting: alone, and beside as many processes
that compute without pause as the machine has cores. The settings take turns in an order that is shuffled.

trainer      what `tessel train` sets, see train/threads.py
default      none: threads spin at a barrier for some milliseconds
one thread   OMP_NUM_THREADS=1
passive      OMP_WAIT_POLICY=passive: threads never spin

Results: results/threads_cpu.json.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results"
SETTINGS = {
    "trainer": {},
    "default": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}


def child(args: argparse.Namespace) -> None:
    """Train for some seconds and print images per second."""
    if args.child == "trainer":
        from tessel.train.threads import limit_spinning

        limit_spinning()
    from trainer import TrainerLoop, make_digits_recipe

    from tessel.train.distributed.world import init_distributed

    options = argparse.Namespace(device="cpu", model=args.model, size=args.size, batch=args.batch, workers=0)
    with tempfile.TemporaryDirectory() as out:
        recipe = make_digits_recipe(options, out)
        stdout, sys.stdout = sys.stdout, sys.stderr
        with init_distributed(recipe.run) as world:
            loop = TrainerLoop(recipe, world)
            loop.steps(2)
            start, steps = time.perf_counter(), 0
            while steps < 2 or time.perf_counter() - start < args.seconds:
                loop.steps(1)
                steps += 1
            rate = steps * args.batch / (time.perf_counter() - start)
            loop.close()
        sys.stdout = stdout
    print(json.dumps(rate))


def compute_forever() -> None:
    while True:
        sum(range(10000))


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` other processes that compute without pause."""
    others = [multiprocessing.Process(target=compute_forever, daemon=True) for _ in range(count)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def images_per_second(name: str, args: argparse.Namespace) -> float:
    """Training speed in a new process with the setting `name`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "MKL_"))}
    options = [f"--{key}={getattr(args, key)}" for key in ("model", "size", "batch", "seconds")]
    command = [sys.executable, __file__, "--child", name, *options]
    run = subprocess.run(command, capture_output=True, text=True, env=clean | args.settings[name])
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    return round(float(run.stdout.splitlines()[-1]), 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="biformer_atto")
    parser.add_argument("--size", type=int, default=64, help="pixels (default 64)")
    parser.add_argument("--batch", type=int, default=64, help="images (default 64)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of training in each process (default 6)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="also measure these values of GOMP_SPINCOUNT")
    parser.add_argument("--dry-run", action="store_true", help="two steps of each setting, to see that it runs")
    parser.add_argument("--out", type=Path, help="the JSON (default benchmarks/results/threads_cpu.json)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry_run and not args.out:
        parser.error("--dry-run writes meaningless numbers: give a file for them with --out")
    if args.dry_run:
        args.seconds, args.rounds = 0.0, 1
    args.settings = SETTINGS | {f"{spins} spins": {"GOMP_SPINCOUNT": str(spins)} for spins in args.spins}
    return args


def usable_cores() -> int:
    """The cores that this process may use; macOS has no such limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    args = parse()
    if args.child:
        return child(args)
    from measurement import facts

    cores, load = usable_cores(), round(os.getloadavg()[0], 2)
    cases = {"idle": 0, "busy": cores}
    rates = {case: {name: [] for name in args.settings} for case in cases}
    runs = [(case, name, number) for number in range(args.rounds) for case in cases for name in args.settings]
    random.Random(0).shuffle(runs)
    runs.sort(key=lambda run: run[2])  # round by round
    for case, name, _ in tqdm(runs, "runs", disable=None):
        with busy(cases[case]):
            rates[case][name].append(images_per_second(name, args))
    medians = {case: {name: statistics.median(found) for name, found in row.items()} for case, row in rates.items()}
    where = {key: value for key, value in facts().items() if key != "threads"}
    settings = {name: getattr(args, name) for name in ("model", "size", "batch", "seconds", "rounds")}
    report = {"dry_run": args.dry_run, **where, "cores": cores, "load_average_before": load, **settings}
    report |= {"other_processes": cases, "images_per_second": medians, "each_run": rates}
    out = args.out or RESULTS / "threads_cpu.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    for name in args.settings:
        print(f"{name:14}" + "".join(f"{case} {medians[case][name]:8.1f} images/s   " for case in cases))
    print(f"load average {load} on {cores} cores; written to {out}")


if __name__ == "__main__":
    main()
