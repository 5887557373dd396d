"""Runs of the trainer on several processes, forked from one that has loaded torch: a start costs tenths of a second.

python tests/ranks.py SIZE '[["recipe.yaml", "key=value"], ...]'      one run after another; prints their exit codes

A run that begins with "@RANK:STEP[:SIGNAL[:evaluation|finish]]" has that process get a signal there, SIGKILL if none.
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
from tessel.train.tasks import base as tasks  # noqa: F401  everything a start imports

# warnings of the installed torch are checked by the default suite
warnings.simplefilter("ignore")


def fork(size: int, arguments: list[str], prepare: Callable[[int], Any] = lambda rank: None) -> list[int]:
    """Begin one run on `size` processes, each of which calls `prepare(rank)` first; their process ids."""
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


def mortal(place: str) -> Callable[[int], None]:
    """The `prepare` after which a process gets a signal at a place "RANK:STEP[:SIGNAL[:evaluation|finish]]"."""
    rank_and_step, _, name = place.partition(":SIG")
    doomed, last = map(int, rank_and_step.split(":"))
    name, _, within = name.partition(":")
    number = signal.Signals[f"SIG{name or 'KILL'}"]
    step, scores, run_evaluation = engine.Engine.step, engine.Engine.accumulate_metrics, engine.run_evaluation
    due: list[int] = []  # batches until the signal

    def hooked(self: engine.Engine) -> bool:
        if self.progress.step == last:
            os.kill(os.getpid(), number)
        return step(self)

    def noted(self: engine.Engine, *, keep: bool = False) -> Any:
        due[:] = [2] if self.progress.step == last and keep == (within == "finish") else []
        return scores(self, keep=keep)

    def interrupted(*arguments: Any, stop: Callable[[], bool], **options: Any) -> Any:
        def asked() -> bool:
            due[:] = [batches - 1 for batches in due]
            if due == [0]:
                os.kill(os.getpid(), number)
            return stop()

        return run_evaluation(*arguments, stop=asked, **options)

    def prepare(rank: int) -> None:
        if rank != doomed:
            return
        if within:
            engine.Engine.accumulate_metrics, engine.run_evaluation = noted, interrupted
        else:
            engine.Engine.step = hooked

    return prepare


def wait(children: list[int], timeout: float = 120) -> list[int]:
    """Their exit codes; killed are those still there after `timeout` seconds, or stopped when all others have ended."""
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
        places = [mortal(word[1:]) for word in arguments if word.startswith("@")]
        codes.append(wait(fork(size, arguments[len(places) :], *places)))
    print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
