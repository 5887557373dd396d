"""PLACEHOLDER train/run/signals.py"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")  # torchrun's and the requeued job's


class Signals:
    """`raised` turns True at SIGTERM, SIGINT or SIGUSR1; a second SIGINT interrupts at once.

    torchrun passes SIGTERM on and kills after 30 s: `--shutdown-timeout` gives a large model the time to be saved, and
    `--signals-to-handle SIGTERM,SIGINT,SIGUSR1` lets it pass SIGUSR1 on. It exits 1 all the same: look for DONE.
    """

    CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.raised = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True

    @contextmanager
    def caught(self) -> Iterator["Signals"]:
        before = {number: signal.signal(number, self._note) for number in self.CAUGHT}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def is_elastic_restart() -> bool:
    """Whether torchrun or SLURM has started this process anew, with the arguments of the start it goes on with."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in RESTARTS)
