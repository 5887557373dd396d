"""Train on two processes and kill them with SIGKILL, many times; then let the training finish.

    python tests/killing.py KILLS RECIPE [key=value ...]

Every start resumes the run, gets at most a few steps further, and is killed at one of INSTANTS. At the instants in
PLACES, a process stops itself while it saves or removes a checkpoint, and is killed there; at the others it is killed
while it runs. Prints one JSON object for each kill: what was done, and which checkpoints remain.
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
TIMEOUT = 100  # seconds for a start, which takes far less on an idle machine


def main() -> None:
    torch.set_num_threads(1)
    kills, arguments = int(sys.argv[1]), sys.argv[2:]
    recipe = load_recipe(arguments[0], arguments[1:])
    checkpoints = Path(recipe.run.out) / recipe.run.name / "checkpoints"
    rng = random.Random(int(os.environ.get("KILLING_SEED", 0)))
    importlib.import_module(f"tessel.train.tasks.{recipe.task.kind}")  # import it once, not at every start
    for number in range(kills):
        # every instant occurs with background and with foreground saving
        background = (number + number // len(INSTANTS)) % 2 == 1
        record = kill(INSTANTS[number % len(INSTANTS)], background, checkpoints, arguments, rng)
        print(json.dumps(record | remaining(checkpoints)), flush=True)
    codes = ranks.wait(ranks.fork(2, arguments), 3 * TIMEOUT)
    print(json.dumps({"codes": codes} | remaining(checkpoints)), flush=True)


def kill(instant: str, background: bool, checkpoints: Path, arguments: list[str], rng: random.Random) -> dict[str, Any]:
    """Start the run once and kill it at `instant`. Returns a record of it."""
    newest, present = newest_step(checkpoints), partial_saves(checkpoints)
    stopped = checkpoints.parent.with_name("stopped")
    stopped.unlink(missing_ok=True)
    place, pause = rng.randrange(2) if instant == "tensors" else 0, rng.random()

    def prepare(rank: int) -> None:
        faulthandler.register(signal.SIGUSR2)
        if instant not in PLACES:
            hold_at_step(newest + 1)
        elif rank == place:
            stop_in(instant, stopped)

    def is_due() -> bool:
        if instant in PLACES:
            return stopped.exists()
        if instant == "anywhere":
            return time.monotonic() - start > 2 * pause
        return newest_step(checkpoints) > newest or (instant == "appeared" and partial_saves(checkpoints) > present)

    options = [*arguments, f"ckpt.background={str(background).lower()}"]
    start, children = time.monotonic(), ranks.fork(2, options, prepare)
    while not is_due():
        if time.monotonic() - start > TIMEOUT or all_ended(children):
            fail(children, f"{instant}, background={background}")
        time.sleep(0.001)
    if instant in ("appeared", "stepping"):
        time.sleep(pause * (0.03 if instant == "appeared" else 0.2))
    killed = [children[place], children[1 - place]][: 2 if instant == "anywhere" else rng.randint(1, 2)]
    for child in killed:
        os.kill(child, signal.SIGKILL)
    codes = ranks.wait(children, TIMEOUT)
    record = {"instant": instant, "background": background, "seconds": round(time.monotonic() - start, 1)}
    record |= {"killed": [children.index(child) for child in killed], "codes": codes, "before": newest}
    return record | {"partial": partial_saves(checkpoints) > present}


def stop_in(place: str, stopped: Path) -> None:
    """Make this process wait forever at a place in the next save, after it has created the file `stopped`."""

    def stop() -> None:
        stopped.touch()
        while True:
            time.sleep(1)

    write, sync, text = FileSystemWriter.write_data, checkpoint.sync_directory, checkpoint.write_atomically

    def write_half_a_file(self: Any, plan: Any, planner: Any) -> None:
        write(self, plan, planner).wait()
        file = next(Path(self.path).glob(f"__{os.environ['RANK']}_*"))
        os.truncate(file, file.stat().st_size // 2)
        stop()

    def write_half_a_manifest(path: Path, content: str) -> None:
        if path.name == checkpoint.MANIFEST:
            path.with_name(f".{path.name}.part").write_text(content[: len(content) // 2])
            stop()
        text(path, content)

    def sync_and_stop(path: Path) -> None:
        sync(path)
        if path.name.startswith(".tmp-") == (place == "rename"):
            stop()

    def remove_one_file(path: Path, **_: Any) -> None:
        if path.is_dir():
            next(path.iterdir()).unlink()
            stop()

    if place == "tensors":
        FileSystemWriter.write_data = write_half_a_file  # type: ignore[assignment]
    elif place == "manifest":
        checkpoint.write_atomically = write_half_a_manifest
    elif place == "pruning":
        checkpoint.shutil = SimpleNamespace(**vars(shutil) | {"rmtree": remove_one_file})  # type: ignore[assignment]
    else:
        checkpoint.sync_directory = sync_and_stop


def hold_at_step(step: int) -> None:
    """Let the training reach `step` but not go beyond it; a process that waits there notices when another is killed."""
    original_step = engine.Engine.step

    def step_or_wait(self: engine.Engine) -> bool:
        while self.progress.step >= step:
            self.world.any_rank()
            time.sleep(0.01)
        return original_step(self)

    engine.Engine.step = step_or_wait


def fail(children: list[int], what: str) -> None:
    """Exit with an error. First let the processes that still run print their stacks, and kill them."""
    alive = [child for child in children if not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
    for number in (signal.SIGUSR2, signal.SIGKILL):
        for child in alive:
            os.kill(child, number)
        time.sleep(2)
    sys.exit(f"{what}: not there after {TIMEOUT} s, or ended before: {ranks.wait(children)}")


def all_ended(children: list[int]) -> bool:
    """Whether all processes have ended. Leaves their exit codes for `ranks.wait`."""
    return all(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children)


def partial_saves(checkpoints: Path) -> set[Path]:
    return set(checkpoints.glob(".tmp-*"))


def newest_step(checkpoints: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)


def remaining(checkpoints: Path) -> dict[str, Any]:
    """The newest step among the checkpoints, and the names of the damaged ones."""
    broken = [path.name for path in checkpoints.glob("step-*") if checkpoint.find_damage(path)]
    return {"step": newest_step(checkpoints), "broken": broken}


if __name__ == "__main__":
    main()
