"""Runs of the trainer on several processes, forked from one that has loaded torch: a start costs tenths of a second.

python tests/ranks.py SIZE '[["recipe.yaml", "key=value"], ...]'      one run after another; prints their exit codes
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

from tessel.train import __main__, engine, loggers, tasks  # noqa: F401  everything a start imports

# what the installed torch warns of is the default suite's to judge
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
    """The `prepare` after which the process "RANK:STEP" is killed there."""
    doomed, last = map(int, place.split(":"))
    step = engine.Engine.step

    def hooked(self: engine.Engine) -> bool:
        if self.progress.step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    def prepare(rank: int) -> None:
        if rank == doomed:
            engine.Engine.step = hooked

    return prepare


def wait(children: list[int], timeout: float = 120) -> list[int]:
    """Their exit codes; those still there after `timeout` seconds are killed."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[child] for child in children]


def main() -> None:
    torch.set_num_threads(1)
    size, runs = int(sys.argv[1]), json.loads(sys.argv[2])
    prepare = mortal(sys.argv[3]) if len(sys.argv) > 3 else lambda rank: None
    print(json.dumps([wait(fork(size, arguments, prepare)) for arguments in runs]), flush=True)


if __name__ == "__main__":
    main()
