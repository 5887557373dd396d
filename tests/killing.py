"""Train on two processes, kill -9 them, look at what is left, begin again; at last let the training end.

    python tests/killing.py KILLS RECIPE [key=value ...]

Prints a JSON object a kill. Those of PLACES are within the writing of a checkpoint, where a process stops until it is
killed; the others come from outside, at any instant of a start, which gets no further than one update.
"""

import faulthandler
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ranks
import torch
from torch.distributed.checkpoint import FileSystemWriter

from tessel.train import engine
from tessel.train.recipe.load import load_recipe
from tessel.train.run import checkpoint

PLACES = ("tensors", "manifest", "rename", "prune", "pruning")
INSTANTS = (*PLACES, "appeared", "stepping", "anywhere")
PATIENCE = 100  # seconds for a start; a small part of it on an idle machine


def main() -> None:
    torch.set_num_threads(1)
    kills, arguments = int(sys.argv[1]), sys.argv[2:]
    recipe = load_recipe(arguments[0], arguments[1:])
    checkpoints = Path(recipe.run.out) / recipe.run.name / "checkpoints"
    rng = random.Random(0)
    importlib.import_module(f"tessel.train.tasks.{recipe.task.kind}")  # once, not at every start
    for number in range(kills):
        # every instant in both ways of saving
        background = (number + number // len(INSTANTS)) % 2 == 1
        facts = kill(INSTANTS[number % len(INSTANTS)], background, checkpoints, arguments, rng)
        print(json.dumps(facts | left(checkpoints)), flush=True)
    codes = ranks.wait(ranks.fork(2, arguments), 3 * PATIENCE)
    print(json.dumps({"codes": codes} | left(checkpoints)), flush=True)


def kill(instant: str, background: bool, checkpoints: Path, arguments: list[str], rng: random.Random) -> dict[str, Any]:
    """One start and its end; what was done."""
    newest, present = last(checkpoints), parts(checkpoints)
    stopped = checkpoints.parent.with_name("stopped")
    stopped.unlink(missing_ok=True)
    place, pause = rng.randrange(2) if instant == "tensors" else 0, rng.random()

    def prepare(rank: int) -> None:
        faulthandler.register(signal.SIGUSR2)
        if instant not in PLACES:
            wait_at(newest + 1)
        elif rank == place:
            stop_in(instant, stopped)

    def is_due() -> bool:
        if instant in PLACES:
            return stopped.exists()
        if instant == "anywhere":
            return time.monotonic() - start > 2 * pause
        return last(checkpoints) > newest or (instant == "appeared" and parts(checkpoints) > present)

    options = [*arguments, f"ckpt.background={str(background).lower()}"]
    start, children = time.monotonic(), ranks.fork(2, options, prepare)
    while not is_due():
        if time.monotonic() - start > PATIENCE or ended(children):
            report(children, f"{instant}, background={background}")
        time.sleep(0.001)
    if instant in ("appeared", "stepping"):
        time.sleep(pause * (0.03 if instant == "appeared" else 0.2))
    victims = [children[place], children[1 - place]][: 2 if instant == "anywhere" else rng.randint(1, 2)]
    for child in victims:
        os.kill(child, signal.SIGKILL)
    codes = ranks.wait(children, PATIENCE)
    facts = {"instant": instant, "background": background, "seconds": round(time.monotonic() - start, 1)}
    facts |= {"killed": [children.index(child) for child in victims], "codes": codes, "before": newest}
    return facts | {"partial": parts(checkpoints) > present}


def stop_in(place: str, stopped: Path) -> None:
    """Make this process stop at a place of the next checkpoint's writing, and make `stopped` then."""

    def stop() -> None:
        stopped.touch()
        while True:
            time.sleep(1)

    write, sync, text = FileSystemWriter.write_data, checkpoint.sync_directory, checkpoint.write_atomically

    def half_a_file(self: Any, plan: Any, planner: Any) -> None:
        write(self, plan, planner).wait()
        file = next(Path(self.path).glob(f"__{os.environ['RANK']}_*"))
        os.truncate(file, file.stat().st_size // 2)
        stop()

    def half_a_manifest(path: Path, content: str) -> None:
        if path.name == checkpoint.MANIFEST:
            path.with_name(f".{path.name}.part").write_text(content[: len(content) // 2])
            stop()
        text(path, content)

    def around_the_rename(path: Path) -> None:
        sync(path)
        if path.name.startswith(".tmp-") == (place == "rename"):
            stop()

    def half_a_removal(path: Path, **_: Any) -> None:
        if path.is_dir():
            next(path.iterdir()).unlink()
            stop()

    if place == "tensors":
        FileSystemWriter.write_data = half_a_file  # type: ignore[assignment]
    elif place == "manifest":
        checkpoint.write_atomically = half_a_manifest
    elif place == "pruning":
        checkpoint.shutil = SimpleNamespace(**vars(shutil) | {"rmtree": half_a_removal})  # type: ignore[assignment]
    else:
        checkpoint.sync_directory = around_the_rename


def wait_at(step: int) -> None:
    """Let the training get to `step` and no further; a lost process is noticed there."""
    go = engine.Engine.step

    def hooked(self: engine.Engine) -> bool:
        while self.progress.step >= step:
            self.world.any_rank()
            time.sleep(0.01)
        return go(self)

    engine.Engine.step = hooked


def report(children: list[int], what: str) -> None:
    """End, with the stacks of processes that did not get where they should have."""
    alive = [child for child in children if not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
    for number in (signal.SIGUSR2, signal.SIGKILL):
        for child in alive:
            os.kill(child, number)
        time.sleep(2)
    sys.exit(f"{what}: not there after {PATIENCE} s, or ended before: {ranks.wait(children)}")


def ended(children: list[int]) -> bool:
    """Whether all have ended; they stay to be waited for."""
    return all(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children)


def parts(checkpoints: Path) -> set[Path]:
    return set(checkpoints.glob(".tmp-*"))


def last(checkpoints: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)


def left(checkpoints: Path) -> dict[str, Any]:
    """What there is to go on with."""
    broken = [path.name for path in checkpoints.glob("step-*") if checkpoint.find_damage(path)]
    return {"step": last(checkpoints), "broken": broken}


if __name__ == "__main__":
    main()
