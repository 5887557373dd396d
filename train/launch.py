"""Where a run takes place: the processes it spans, the signals that end it, the directory it lives in."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .config import decisive, dump, load_recipe, recipe_hash
from .data import WORKER_DIED
from .errors import Lost, UserError
from .files import write_atomically, writing
from .rendezvous import meet
from .schema import Guard, Recipe, Run

LOCK = ".lock"
BEGINNING = {LOCK, ".recipe.yaml.part"}  # what a start that was killed at once leaves
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")  # torchrun's and the requeued job's
UNLOCKABLE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # file systems without locks


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run. Its collectives use gloo on the CPU, so that none of them waits for a GPU."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    local_size: int = 1  # processes on this node
    timeout: timedelta = timedelta(minutes=30)  # how long one process waits for another

    @property
    def main(self) -> bool:
        return self.rank == 0

    def agree(self, flag: bool = False, error: UserError | None = None) -> bool:
        """True everywhere if `flag` is True anywhere; an `error` anywhere is raised everywhere."""
        if self.size == 1:
            if error:
                raise error
            return flag
        code = torch.tensor(2 if error else int(flag))
        dist.all_reduce(code, dist.ReduceOp.MAX)
        if code == 2:
            raise next(found for found in self.gather(error) if found)
        return bool(code)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A section without collectives: a UserError in it on one process becomes everyone's."""
        problem = None
        try:
            yield
        except UserError as error:
            problem = error
        self.agree(error=problem)

    def gather(self, value: Any) -> list[Any]:
        """Each process's `value`, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's `value`."""
        return self.gather(value)[0]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, on the CPU."""
        total = values.detach().cpu().clone()  # reduced in place
        if self.size > 1:
            dist.all_reduce(total)
        return total


@contextmanager
def join(run: Run, guard: Guard = Guard()) -> Iterator[World]:  # noqa: B008  frozen
    """The world that torchrun's environment describes, or this process alone."""
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device=cuda, but torch sees no GPU; use run.device=cpu or auto")
    cuda = run.device != "cpu" and torch.cuda.is_available()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(run.deterministic)
    # a process that waits for its batch is still waited for, and tells what is the matter
    timeout = timedelta(seconds=2 * guard.timeout)
    try:
        if size > 1:
            store, rank, size = meet(timeout)
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        yield World(rank, size, device, int(os.environ.get("LOCAL_WORLD_SIZE", size)), timeout)
    except RuntimeError as error:
        if known := explained(error, timeout):
            raise known from error
        raise
    finally:
        torch.use_deterministic_algorithms(deterministic)
        if dist.is_initialized():
            dist.destroy_process_group()


def explained(error: RuntimeError, timeout: timedelta) -> UserError | None:
    """What a RuntimeError out of torch's depths means to the user, where that is known."""
    text = next(iter(str(error).strip().splitlines()), "")
    if "DataLoader worker" in text:
        return Lost(WORKER_DIED)
    remote = isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text
    if remote and ("timed out" in text.lower() or "timeout" in text):
        return Lost(
            f"another process of this run has not answered for {timeout.total_seconds():g} s: it hangs. End what is "
            "left of the run (kill -9), then the same command goes on from the last checkpoint; guard.timeout makes it "
            "wait longer"
        )
    if remote:
        return Lost(f"another process of this run is gone ({text[:160]}); the same command goes on where it can")
    if isinstance(error, torch.OutOfMemoryError):
        return Lost(f"the GPU's memory is short ({text}): lower data.micro_batch or try parallel.grad_checkpointing")
    return None


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


def restarted() -> bool:
    """Whether torchrun or SLURM has started this process anew, with the arguments of the start it goes on with."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in RESTARTS)


class RunDir:
    """`out/name`: the recipe, the metrics, the checkpoints and the marker that says how the last start ended."""

    def __init__(self, recipe: Recipe, *, restart: bool = False):
        """restart: of a start that has already moved an older run aside."""
        self.recipe, self.restart = recipe, restart
        self.fresh = recipe.run.fresh and not restart
        self.path = Path(recipe.run.out) / recipe.run.name
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self._locks: list[int] = []
        self._locked = False

    @contextmanager
    def held(self) -> Iterator["RunDir"]:
        """Within, `lock` holds; it ends here or with the process, however that ends."""
        try:
            yield self
        finally:
            for descriptor in self._locks:
                os.close(descriptor)
            self._locks, self._locked = [], False

    def lock(self) -> None:
        """Keep every other trainer out of the directory, where there is one. Raises UserError naming the one inside.

        The lock is POSIX's: of this process, not of the loader workers it forks, so none of them keeps it alive.
        """
        if self._locked or not self.path.is_dir():
            return
        with writing(self.path / LOCK):
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            if error.errno in UNLOCKABLE:
                return
            raise UserError(
                f"{self.path} is being trained by {holder}; stop that one, or give this run another run.name"
            ) from error
        self._locks.append(descriptor)
        self._locked = True
        with writing(self.path / LOCK):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def check(self) -> bool:
        """Whether this run was begun before. Raises UserError rather than go on with another recipe by accident.

        Where there is no checkpoint yet, there is nothing to go on with, and any recipe will do.
        """
        there = {entry.name for entry in self.path.iterdir()} - BEGINNING if self.path.is_dir() else ()
        if self.fresh or not there:
            return False
        remedy = f"run.fresh=true moves {self.path} aside and starts clean, another run.name leaves it alone"
        if not (self.path / "recipe.yaml").is_file():
            raise UserError(f"{self.path} exists but holds no recipe.yaml, so it is no run of this trainer; {remedy}")
        if self.checkpoints.is_dir() and not any(self.checkpoints.glob("step-*")) and not self.finished():
            return True  # a start that failed before it had learned anything: its recipe may be mended
        try:
            begun = load_recipe(self.path / "recipe.yaml")
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
        if recipe_hash(begun) != recipe_hash(self.recipe):
            old, new = decisive(begun), decisive(self.recipe)
            changed = ", ".join(f"{key} (there {old[key]!r}, now {new[key]!r})" for key in new if old[key] != new[key])
            raise UserError(f"{self.path} was started with another recipe: {changed}; {remedy}")
        return True

    def open(self) -> Path | None:
        """Make the directory, or take up the one `check` accepted; where an older run was moved to, if one was."""
        aside = None
        self.lock()
        with writing(self.path):
            if self.fresh and self.path.exists():
                names = (self.path.with_name(f"{self.path.name}.old-{number}") for number in count(1))
                aside = next(name for name in names if not name.exists())
                self.path.rename(aside)
                self._locked = False  # the lock went aside too, and stays
            self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        # someone else may have begun it while this process had no lock yet
        self.check()
        # the run's own recipe goes on with it
        own = dataclasses.replace(self.recipe, run=dataclasses.replace(self.recipe.run, fresh=False))
        with writing(self.path):
            write_atomically(self.path / "recipe.yaml", dump(own))
            self.checkpoints.mkdir(exist_ok=True)
            (self.path / "PREEMPTED").unlink(missing_ok=True)
        return aside

    def finished(self) -> dict[str, Any] | None:
        """What DONE says, if the run is complete."""
        with suppress(OSError, ValueError):
            done = json.loads((self.path / "DONE").read_text())
            return done if isinstance(done, dict) else None
        return None

    def mark(self, marker: str, content: dict[str, Any]) -> None:
        with writing(self.path / marker):
            write_atomically(self.path / marker, json.dumps(content) + "\n")

    def rewind(self, step: int, evaluated: int) -> None:
        """Drop metrics of later steps than `step`, evaluations after `evaluated`, and what a crash made of a line."""
        with writing(self.metrics):
            text = self.metrics.read_text("utf-8", errors="replace") if self.metrics.exists() else ""
            lines = (line for line in text.splitlines() if _stands(line, step, evaluated))
            write_atomically(self.metrics, "".join(f"{line}\n" for line in lines))


def _stands(line: str, step: int, evaluated: int) -> bool:
    try:
        record = json.loads(line)
        return record["step"] <= (evaluated if record["kind"] == "eval" else step)
    except (ValueError, KeyError, TypeError):
        return False
