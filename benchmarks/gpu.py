"""Everything that wants a GPU, in order of worth, within 25 minutes: `make gpu`.

    python benchmarks/gpu.py                     what is not yet done on this device with this commit
    python benchmarks/gpu.py --steps verify      one step; --fresh also does again what is done
    python benchmarks/gpu.py --dry-run           miniature cases on the CPU, to see that every step runs

Steps: quick correctness, `tessel.kernels verify`, kernels.py, models.py (a step for each of our models and of timm's:
eager and compiled, with and without kernels, inference and training), overhead of the trainer, tests of NCCL and fp16.

Each step is a program of its own with a time limit. Its record is written when it ends, its own results as they come,
all to benchmarks/results/gpu_DEVICE/, with a summary.md. After an interruption, start it again: it does what is left.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from measurement import facts

from tessel.kernels import verdicts

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
RESULTS = HERE / "results"
LIMIT = 1500  # seconds for all steps
GRACE = 10  # seconds between the interrupt and the end of a step that takes too long
TIMM = ("swin_tiny_patch4_window7_224", "convnext_tiny", "davit_tiny")
OURS = ("biformer_small", "cswin_tiny", "transnext_tiny", "tessel_halonet50ts", "tessel_davit_tiny", "nat_mini")


@dataclass(frozen=True)
class Step:
    """A program to run. seconds: its limit; environment: variables that differ from ours."""

    name: str
    seconds: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def steps(out: Path) -> list[Step]:
    """What to run on a GPU, the most worthy first."""
    tests = (sys.executable, "-m", "pytest", "-q", str(TESTS / "gpu.py"))
    models = [_models(name, out, "cuda", seconds, "--batch", "128") for name, seconds in _seconds_of_models().items()]
    return [
        Step("correctness", 120, (*tests, "-k", "model or kernel")),
        Step("verify", 630, (sys.executable, "-m", "tessel.kernels", "verify")),
        Step("kernels", 240, (*_script("kernels.py"), "--budget", "210", "--out", str(out))),
        *models,
        Step("trainer", 60, (*_script("trainer.py"), "--device", "cuda", *TRAINER, "--out", str(out / "trainer.json"))),
        Step("processes", 60, (*tests, "-k", "not model and not kernel")),
    ]


TRAINER = (
    *("--model", "biformer_tiny", "--size", "224", "--batch", "128", "--workers", "8"),
    *("--parts", "overhead", "--seconds", "15"),
)


def miniature_steps(out: Path) -> list[Step]:
    """The same steps on the CPU, with small cases."""
    environment = {"TESSEL_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    tests = (sys.executable, "-m", "pytest", "-q", str(TESTS / "gpu.py"))
    verify = "import sys; from tessel.kernels.__main__ import verify; sys.exit(verify('quick', 'routed', clock='{}'))"
    # an interpreter, whose times are made up, in a folder of verdicts that nobody reads
    interpreted = {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    trainer = (*_script("trainer.py"), "--dry-run", "--parts", "overhead", "--out", str(out / "trainer.json"))
    dry = ("--operator", "routed", "--dry-run", "--out", str(out))
    return [
        Step("correctness", 200, (*tests, "-k", "biformer or kernel"), environment),
        Step(
            "verify",
            200,
            (sys.executable, "-c", verify.format("fake_clock:clock")),
            environment | interpreted | {"TESSEL_HOME": str(out / "home")},
        ),
        Step("kernels", 200, (*_script("kernels.py"), *dry), environment),
        _models("biformer_atto", out, "cpu", 200, "--batch", "2", "--size", "64", "--variants", "eager", "bf16"),
        Step("trainer", 200, trainer, environment),
        Step("processes", 200, (*tests, "-k", "not model and not kernel"), environment),
    ]


def _seconds_of_models() -> dict[str, float]:
    return dict.fromkeys(TIMM, 30.0) | dict.fromkeys(OURS, 50.0)


def _script(name: str) -> tuple[str, str]:
    return sys.executable, str(HERE / name)


def _models(name: str, out: Path, device: str, seconds: float, *options: str) -> Step:
    """Inference and training of a model alone; the summary compares the models."""
    alone = ("--models", name, "--peers", "--device", device, "--train", "--seconds", "1", *options)
    return Step(f"models {name}", seconds, (*_script("models.py"), *alone, "--out", str(out / f"models_{name}")))


def run(todo: Sequence[Step], out: Path, where: Mapping[str, str | int], *, limit: float, fresh: bool) -> bool:
    """Run the steps that are not done, write their records, return whether all are done.

    limit: seconds for all; fresh: run also those that are done. A step that KeyboardInterrupt ends has no record.
    """
    out.mkdir(parents=True, exist_ok=True)
    start, good = time.time(), True
    for step in todo:
        if not fresh and is_done(out, step, where):
            print(f"{step.name}: done before")
            continue
        left = min(step.seconds, limit - (time.time() - start))
        if left < GRACE:
            print(f"{step.name}: no time is left")
            good = False
            continue
        print(f"{step.name}: at most {left:.0f} s", flush=True)
        record = {"step": step.name, **follow(step, left, out / f"{file_name(step)}.log"), **where}
        good &= record["status"] == "done"
        save(out / f"{file_name(step)}.json", json.dumps(record, indent=1) + "\n")
        save(out / "summary.md", summary(out, where))
        print(f"{step.name}: {record['status']}, {record['seconds']:.0f} s", flush=True)
    return good


def follow(step: Step, seconds: float, log: Path) -> dict:
    """Run a step, its output in `log`; its status `done`, `failed` or `out of time`, and the seconds it took."""
    start, environment = time.time(), {**os.environ, **step.environment}
    with log.open("w") as output:
        # a session of its own, so that the step's own processes end with it
        child = subprocess.Popen(
            step.command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
    status = "done" if code == 0 else "out of time" if code is None else "failed"
    return {"status": status, "exit_code": code, "seconds": round(time.time() - start, 1)}


def _end(child: subprocess.Popen) -> None:
    """Interrupt a step that still runs, so that it can write what it has, then kill it and its processes."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def file_name(step: Step) -> str:
    return "step_" + re.sub(r"\W+", "_", step.name)


def is_done(out: Path, step: Step, where: Mapping[str, str | int]) -> bool:
    """Whether the record says that the step succeeded on this device and with this commit."""
    record = read(out / f"{file_name(step)}.json")
    return record.get("status") == "done" and all(record.get(key) == where[key] for key in ("device", "commit"))


def read(path: Path) -> dict:
    """The object in a file of JSON; an empty one if there is none, or if it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def save(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, "utf-8")
    os.replace(part, path)


def summary(out: Path, where: Mapping[str, str | int]) -> str:
    """What was done, and images per second of all models beside the first of timm's."""
    lines = [
        ", ".join(f"{key} {value}" for key, value in where.items()),
        "",
        "| step | status | seconds |",
        "|---|---|---|",
    ]
    for record in map(read, sorted(out.glob("step_*.json"))):
        lines.append(f"| {record.get('step')} | {record.get('status')} | {record.get('seconds')} |")
    rows = [
        row
        for path in sorted(out.glob("models_*.json"))
        for group in read(path).get("groups", {}).values()
        for row in group
    ]
    peers = {row["setting"]: row["images_per_second"] for row in rows if row["model"] == TIMM[0]}
    lines += ["", f"| model | setting | images/s | to {TIMM[0]} | to eager | peak MiB |", "|" + "---|" * 6]
    for row in rows:
        # with kernels, beside timm's model without them
        peer = peers.get(re.sub(", kernels$", ", no kernels", row["setting"]))
        ratio = f"{row['images_per_second'] / peer:.2f}" if peer else ""
        values = row["model"], row["setting"], row["images_per_second"], ratio, row["to_eager"], row["peak_mib"]
        lines.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines) + "\n"


def copy_verdict(out: Path) -> None:
    """Keep the verdict of the step `verify`, which lies in the user's folder, with the other results."""
    if found := verdicts.find("cuda"):
        shutil.copy(found[0], out / "verdict.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these, by the beginning of their names")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for all steps (default {LIMIT})")
    parser.add_argument("--fresh", action="store_true", help="also what is done")
    parser.add_argument("--dry-run", action="store_true", help="miniature cases on the CPU")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/gpu_DEVICE)")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("this torch sees no GPU; --dry-run needs none")
    return args


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the step that runs must end with this process
    where = facts("cpu" if args.dry_run else "cuda")
    name = re.sub(r"[^a-z0-9]+", "_", str(where["device"]).lower()).strip("_")
    default = Path(tempfile.mkdtemp(prefix="tessel-gpu-")) if args.dry_run else RESULTS / f"gpu_{name}"
    out = (args.out or default).resolve()
    found = miniature_steps(out) if args.dry_run else steps(out)
    todo = [step for step in found if args.steps is None or step.name.startswith(tuple(args.steps))]
    try:
        good = run(todo, out, where, limit=args.limit, fresh=args.fresh)
    except KeyboardInterrupt:
        print(f"interrupted; what was done so far is kept in {out}", file=sys.stderr)
        return 130
    if not args.dry_run:
        copy_verdict(out)
    print((out / "summary.md").read_text("utf-8"))
    print(f"written: {out}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
