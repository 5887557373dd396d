"""Check and time every Triton kernel and its baselines on a GPU.

    python benchmarks/kernels.py                            all cases, within nine minutes
    python benchmarks/kernels.py --operator halo --case 50ts-stage2-256 --seconds 0.5
    python benchmarks/kernels.py --dry-run                  small cases in the interpreter, without a GPU or times

`python -m tessel.kernels verify` does the same with fewer baselines, for the user's own machine. A case that fails its
check is reported and not timed. The baselines are those of kernels/verification/problems.py; one that cannot run is a
row with its reason. Results go to benchmarks/results/kernels_DEVICE.{json,md} and are saved after every case.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import triton
from kernels_report import report
from measurement import facts
from tqdm import tqdm

from tessel.kernels.verification.isolated_runner import Job
from tessel.kernels.verification.problems import PROBLEMS, cases
from tessel.kernels.verification.session import GPU_CLOCK, MANY, Settings, run_session

RESULTS = Path(__file__).resolve().parent / "results"


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


def chosen_jobs(args: argparse.Namespace) -> list[Job]:
    operators = [args.operator] if args.operator else list(PROBLEMS)
    jobs = [(operator, name) for operator in operators for name in cases(operator, interpreted=args.dry_run)]
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
    args = parser.parse_args()
    jobs = chosen_jobs(args)
    if not jobs:
        parser.error(f"--case {args.case} is not a case of {args.operator or 'any operator'}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("this torch sees no GPU; --dry-run needs none")
    return args, jobs


def main() -> None:
    start = time.time()
    args, jobs = parse()
    out = args.out or (Path(tempfile.mkdtemp(prefix="tessel-kernels-")) if args.dry_run else RESULTS)
    many = [] if args.dry_run or args.case else [(operator, MANY) for operator in dict.fromkeys(job[0] for job in jobs)]
    settings = Settings(
        budget=args.budget, seconds=args.seconds, interpreted=args.dry_run, clock="" if args.dry_run else GPU_CLOCK
    )
    with tqdm(total=2 * len(jobs) + len(many), disable=None) as bar:
        device = facts("cpu" if args.dry_run else "cuda")
        results = Results(out, {**device, "triton": triton.__version__}, dry=args.dry_run, bar=bar)
        run_session(jobs + many, settings, results.add)
    results.save()
    print(results.path.with_suffix(".md").read_text())
    print(f"written: {results.path}.json, .md, after {time.time() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
