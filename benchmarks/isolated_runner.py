"""Work that may take its process along: a child does it job by job, and its parent goes on where it died.

The child prints records, lines of JSON after a mark: `{"start": job}`, `{"done": job}`, and between them what it found.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

Job = tuple[str, str]  # operator, case

_MARK = "@"


def emit(**record) -> None:
    print(_MARK + json.dumps(record), flush=True)


def supervise(
    command: list[str], jobs: list[Job], *, environment: dict[str, str], until: float, grace: float, take: Callable
) -> dict[Job, str]:
    """Run `command job job ...` and `take` its records; the jobs that were not done, and why.

    A job that takes the child down is left out and the others go on in a new one. No job starts after `until`, a moment
    of time.time(), and a child is killed `grace` seconds later. Exits with the child's last words if it cannot start.
    """
    left, lost = list(jobs), {}
    while left and time.time() < until:
        current, words = _follow([*command, *map("/".join, left)], left, environment, until + grace, take)
        if current is None and words and time.time() < until:
            sys.exit(f"{' '.join(command)} did not start: {words}")
        if current not in left:
            break  # it was through with its jobs, whatever it died of later
        lost[current] = f"its process died: {words}" if time.time() < until else "no time was left"
        left.remove(current)
    return lost | dict.fromkeys(left, "no time was left")


def _follow(
    command: list[str], left: list[Job], environment: dict[str, str], until: float, take: Callable
) -> tuple[Job | None, str]:
    """Run one child, striking off what it has done; the job it came to last, and what it wrote if it failed."""
    current = None
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child:
            timer = threading.Timer(until - time.time(), child.kill)
            timer.start()
            try:
                for line in child.stdout or ():
                    if line.startswith(_MARK):
                        record = json.loads(line.removeprefix(_MARK))
                        if "start" in record:
                            current = tuple(record["start"])
                        elif "done" in record:
                            left.remove(tuple(record["done"]))
                        take(record)
                failed = child.wait() != 0
            finally:
                timer.cancel()
                child.kill()
        errors.seek(0)
        words = " / ".join(errors.read().strip().splitlines()[-3:])[-600:]
    return current, (words or "no word of why") if failed else ""
