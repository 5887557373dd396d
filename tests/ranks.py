"""Train on several processes, forked from one that has already imported torch: a start takes tenths of a second.

    python tests/ranks.py SIZE '[["recipe.yaml", "key=value"], ...]'

trains one run after another on SIZE processes and prints the exit codes. If the arguments of a run begin with
"@RANK:STEP[:SIGNAL[:evaluation|finish]]", process RANK gets the signal (by default SIGKILL) after STEP updates: before
the next update or, if the argument says so, during the evaluation or the final evaluation at that step.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import sklearn.datasets
import sklearn.model_selection  # noqa: F401
import torch

from tessel.train import __main__, engine
from tessel.train.tasks import base as tasks  # noqa: F401  (imported once, not by every process)

# the tests that run in pytest's own process check for warnings of torch
warnings.simplefilter("ignore")


def fork(size: int, arguments: list[str], prepare: Callable[[int], Any] = lambda rank: None) -> list[int]:
    """Start one run on `size` processes, each of which calls `prepare(rank)` first. Returns the process ids."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(size):
        if not (child := os.fork()):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ |= {key: str(value) for key, value in environment.items()}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            code = 1
            try:
                prepare(rank)
                code = __main__.main(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        started.append(child)
    return started


def send_signal_at(place: str) -> Callable[[int], None]:
    """A function `prepare` for `fork`; `place` is "RANK:STEP[:SIGNAL[:evaluation|finish]]", see above."""
    rank_and_step, _, name = place.partition(":SIG")
    target_rank, target_step = map(int, rank_and_step.split(":"))
    name, _, within = name.partition(":")
    number = signal.Signals[f"SIG{name or 'KILL'}"]
    step, accumulate, run_evaluation = engine.Engine.step, engine.Engine.accumulate_metrics, engine.run_evaluation
    countdown: list[int] = []  # number of batches until the signal; empty if none is due

    def step_with_signal(self: engine.Engine) -> bool:
        if self.progress.step == target_step:
            os.kill(os.getpid(), number)
        return step(self)

    def start_countdown(self: engine.Engine, *, keep: bool = False) -> Any:
        countdown[:] = [2] if self.progress.step == target_step and keep == (within == "finish") else []
        return accumulate(self, keep=keep)

    def evaluate_with_signal(*arguments: Any, stop: Callable[[], bool], **options: Any) -> Any:
        def count_down() -> bool:
            countdown[:] = [batches - 1 for batches in countdown]
            if countdown == [0]:
                os.kill(os.getpid(), number)
            return stop()

        return run_evaluation(*arguments, stop=count_down, **options)

    def prepare(rank: int) -> None:
        if rank != target_rank:
            return
        if within:
            engine.Engine.accumulate_metrics, engine.run_evaluation = start_countdown, evaluate_with_signal
        else:
            engine.Engine.step = step_with_signal

    return prepare


def wait(children: list[int], timeout: float = 120) -> list[int]:
    """Wait for the processes to end. Returns their exit codes.

    Kills those that still run after `timeout` seconds, and those that are stopped when all others have ended.
    """
    codes: dict[int, int] = {}
    stopped: set[int] = set()
    end = time.monotonic() + timeout
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            if time.monotonic() > end or stopped == set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                stopped.add(child)
            elif done:
                stopped.discard(child)
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[child] for child in children]


def main() -> None:
    torch.set_num_threads(1)
    size, runs = int(sys.argv[1]), json.loads(sys.argv[2])
    codes = []
    for arguments in runs:
        places = [send_signal_at(word[1:]) for word in arguments if word.startswith("@")]
        codes.append(wait(fork(size, arguments[len(places) :], *places)))
    print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
