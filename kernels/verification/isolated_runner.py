"""Run jobs in a child process, so that a crash loses one job; a new child continues with the rest.

The child prints records: lines of JSON after a marker. `{"start": job}` and `{"done": job}` frame the results of a job.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

Job = tuple[str, str]  # operator, case

_MARKER = "@"


def emit(**record) -> None:
    """Print a record, in the child."""
    print(_MARKER + json.dumps(record), flush=True)


def run_isolated(
    command: list[str], jobs: list[Job], *, environment: dict[str, str], until: float, grace: float, on_record: Callable
) -> dict[Job, str]:
    """Run `command job job ...`, call `on_record` for each record, return the jobs that were not done and why.

    A job that crashes the child is skipped, and a new child runs the others. No job starts after `until` (a value of
    time.time()), and a running child is killed `grace` seconds later. Exits with the child's last error output if it
    cannot start.
    """
    left, lost = list(jobs), {}
    while left and time.time() < until:
        current, output = _follow([*command, *map("/".join, left)], left, environment, until + grace, on_record)
        if current is None and output and time.time() < until:
            sys.exit(f"{' '.join(command)} did not start: {output}")
        if current not in left:
            break  # the child had finished its jobs, even if it failed afterwards
        lost[current] = f"its process died: {output}" if time.time() < until else "no time was left"
        left.remove(current)
    return lost | dict.fromkeys(left, "no time was left")


def _follow(
    command: list[str], left: list[Job], environment: dict[str, str], until: float, on_record: Callable
) -> tuple[Job | None, str]:
    """Run one child and remove the jobs it finishes from `left`.

    Returns the last job it started and, if it failed, the end of its error output.
    """
    current = None
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child:
            timer = threading.Timer(until - time.time(), child.kill)
            timer.start()
            try:
                for line in child.stdout or ():
                    if line.startswith(_MARKER):
                        record = json.loads(line.removeprefix(_MARKER))
                        if "start" in record:
                            current = tuple(record["start"])
                        elif "done" in record:
                            left.remove(tuple(record["done"]))
                        on_record(record)
                failed = child.wait() != 0
            finally:
                timer.cancel()
                child.kill()
        errors.seek(0)
        output = " / ".join(errors.read().strip().splitlines()[-3:])[-600:]
    return current, (output or "no error output") if failed else ""
