"""Find out whether the Triton kernels are right and fast on this machine: `python -m tessel.kernels verify`.

Each attention operator is checked against float64 and timed against PyTorch, eager and compiled, in the shapes of the
published models. The verdict is kept on this machine, and from then on `auto` takes the fastest implementation that is
correct. Another GPU, driver, torch, triton or tessel needs a verdict of its own. Ctrl-C keeps what was judged so far.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence

import torch

from . import verdicts
from .dispatch import interpreting
from .verdicts import Judgment

OPERATORS = ("routed", "window", "halo", "aggregated", "neighborhood")
COLUMNS = ("operator", "class", "dtype", "direction", "correct", "times eager", "times compiled", "auto takes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tessel.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verify_command = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser(
        "verify", help="check and time the kernels, keep the verdict", description=(__doc__ or "").partition("\n\n")[2]
    )
    what = verify_command.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="classification at training batches, bfloat16: two minutes")
    what.add_argument("--all", action="store_true", help="every image size too, those of detection: 20 minutes")
    what.add_argument("--show", action="store_true", help="print the verdict and measure nothing")
    what.add_argument("--forget", action="store_true", help="delete the verdict on this device and these versions")
    verify_command.add_argument("--operator", choices=OPERATORS, help="only this operator")
    args = parser.parse_args(argv)
    device = "cpu" if interpreting() else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("error: this torch sees no GPU, so there is nothing to judge: attention runs in PyTorch", file=sys.stderr)
        return 1
    if args.forget:
        return forget(device)
    if args.show:
        return show(device)
    if importlib.util.find_spec("triton") is None:
        print("error: triton is not installed; pip install triton", file=sys.stderr)
        return 1
    return verify("quick" if args.quick else "all" if args.all else "default", args.operator)


def verify(extent: str, operator: str | None = None, *, clock: str | None = None) -> int:
    """Judge the operators on this machine, with a progress bar, and print the verdict.

    extent: `quick`, `default` or `all`; operator: only this one; clock: import path of another clock than the GPU's.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .verification.session import GPU_CLOCK, MANY, Settings
    from .verification.verify import BUDGETS, Verification, jobs_of

    settings = Settings(
        budget=BUDGETS[extent],
        interpreted=interpreting(),
        dtypes=("bfloat16",) if extent == "quick" else ("bfloat16", "float16"),
        baselines=False,
        clock=clock or GPU_CLOCK,
    )
    jobs, start = [job for job in jobs_of(extent, settings) if operator in (None, job[0])], time.time()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("checks", total=sum(1 if case == MANY else 2 for _, case in jobs))
        verification = Verification(settings, lambda text: progress.update(bar, advance=1, description=text))
        try:
            verification.run(jobs)
        except KeyboardInterrupt:
            print("interrupted; what was judged so far is kept", file=sys.stderr)
            return 130
    print(f"took {time.time() - start:.0f} s")
    return show(settings.device)


def show(device: str) -> int:
    """Print the verdict on this device; 1 if there is none."""
    found = verdicts.find(device)
    if found is None:
        print(f"no verdict on {verdicts.environment(device)['device']}; `{verdicts.VERIFY}` makes one")
        return 1
    path, judgments = found
    print_table(judgments)
    print(f"from {path}")
    return 0


def forget(device: str) -> int:
    """Delete the user's verdict on this device and these versions."""
    path = verdicts.folder() / verdicts.file_name(verdicts.environment(device))
    existed = path.exists()
    path.unlink(missing_ok=True)
    print(f"deleted {path}" if existed else f"there is no verdict in {path}")
    return 0


def print_table(judgments: Sequence[Judgment]) -> None:
    """Print a row for each judgment, and below the table why `auto` does not take the kernels."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from .verification.verify import summary

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column.startswith("times") else "left", no_wrap=True)
    rows = summary(judgments)
    for row in rows:
        table.add_row(*(row[column] for column in COLUMNS))
    console.print(table)
    for row in rows:
        if row["reason"]:
            print(f"{row['operator']} {row['class']} {row['dtype']} {row['direction']}: {row['reason']}")


if __name__ == "__main__":
    sys.exit(main())
