"""Handling of the signals that end a run, and detection of automatic restarts."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..system import STOP_SIGNALS

# set to the number of restarts by torchrun, and by SLURM for a requeued job
RESTART_COUNT_VARIABLES = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


class Signals:
    """Sets `raised` at SIGTERM, SIGINT or SIGUSR1, for the training loop to read. A second SIGINT interrupts at once.

    torchrun forwards SIGTERM and kills its processes 30 s later; `--shutdown-timeout` gives a large model more time to
    save, `--signals-to-handle SIGTERM,SIGINT,SIGUSR1` makes it forward SIGUSR1 too. torchrun exits with code 1 even if
    every process ended cleanly, so look for the file DONE in the run directory instead.
    """

    def __init__(self) -> None:
        self.raised = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True

    @contextmanager
    def caught(self) -> Iterator["Signals"]:
        """Install the handlers for the block, and restore the previous ones after it."""
        before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def job_identity() -> str:
    """A name of the job that is the same in all its automatic restarts: SLURM's, else the process of torchrun."""
    slurm = os.environ.get("SLURM_JOB_ID")
    return f"slurm {slurm}" if slurm else f"process {os.getppid()} on {socket.gethostname()}"


def is_elastic_restart() -> bool:
    """Whether torchrun or SLURM has restarted this process with the arguments of its first start."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in RESTART_COUNT_VARIABLES)
