"""How the CPU threads of a training wait for each other. Imports no torch: it must act before torch is loaded."""

import os
import sys

SPINS = 1000  # rounds of a waiting loop, some ten microseconds; GNU OpenMP's default of 300,000 is some milliseconds
SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # what the user may have set


def limit_spinning() -> None:
    """Let the threads of GNU OpenMP, which torch uses on Linux, sleep soon when they wait for each other.

    A thread that spins holds a core. If other processes want the cores too, the threads that are waited for get none,
    and each waits for milliseconds at every operation. It changes no results. Does nothing if the user has set one of
    `SPINNING`, or if torch is loaded already.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in SPINNING):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def describe_waiting() -> str:
    """The setting in words, for the log."""
    found = [f"{name}={os.environ[name]}" for name in SPINNING if name in os.environ]
    return f"waiting by {', '.join(found)}" if found else "waiting as OpenMP does by default"
