"""The run directory: the recipe, the metrics, the checkpoints, the lock, and the marker of how the last start ended."""

import dataclasses
import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from ..files import write_atomically, writing
from ..recipe.load import differences, dump, load_recipe
from ..recipe.schema import Recipe
from ..recipe.sizing import recorded
from ..system import lock_file

LOCK, FRESH = ".lock", ".fresh"  # FRESH names the job that began the run with run.fresh=true
# what a start leaves behind that was killed before it wrote its recipe
FILES_OF_A_NEW_RUN = {LOCK, FRESH, f".{FRESH}.part", ".recipe.yaml.part"}
NO_LOCK_ERRORS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # file systems and systems without locks


class RunDirectory:
    """The directory `out/name` of a run."""

    def __init__(self, recipe: Recipe, *, restart: bool = False, job: str = ""):
        """restart: this start was made by torchrun or SLURM, with the arguments of the first start of `job`."""
        self.recipe, self.restart, self.job = recipe, restart, job
        self.path = Path(recipe.run.out) / recipe.run.name
        # the first start may have died before it renamed the older run
        self.fresh = recipe.run.fresh and not (restart and self._begun_by() == job)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self._locks: list[int] = []
        self._locked = False

    @contextmanager
    def held(self) -> Iterator["RunDirectory"]:
        """Context at whose end the lock is released. It is also released when the process ends."""
        try:
            yield self
        finally:
            for descriptor in self._locks:
                os.close(descriptor)
            self._locks, self._locked = [], False

    def lock(self) -> None:
        """Lock the directory, if it exists, against other trainers. Raises UserError naming who holds the lock."""
        if self._locked or not self.path.is_dir():
            return
        with writing(self.path / LOCK):
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock_file(descriptor)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            if error.errno in NO_LOCK_ERRORS:
                return
            raise UserError(f"{self.path} is being trained by {holder}; stop it, or set another run.name") from error
        self._locks.append(descriptor)
        self._locked = True
        with writing(self.path / LOCK):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _begun_by(self) -> str | None:
        """The job that began the run with `run.fresh`, if one did."""
        with suppress(OSError, UnicodeDecodeError):
            return (self.path / FRESH).read_text(encoding="utf-8")
        return None

    def check(self) -> bool:
        """Whether an earlier start of this run can be continued. Raises UserError if it had another recipe.

        A run without a checkpoint has nothing to continue, so its recipe may change. Keys with the value `auto` take
        the numbers that they had at the start of the run.
        """
        self.check_place()
        entries = {entry.name for entry in self.path.iterdir()} - FILES_OF_A_NEW_RUN if self.path.is_dir() else ()
        if self.fresh or not entries:
            return False
        remedy = f"run.fresh=true renames {self.path} and starts from scratch; another run.name leaves it untouched"
        if not (self.path / "recipe.yaml").is_file():
            raise UserError(f"{self.path} exists but has no recipe.yaml, so it is not a run directory; {remedy}")
        if self.checkpoints.is_dir() and not any(self.checkpoints.glob("step-*")) and not self.finished():
            return True
        try:
            begun = load_recipe(self.path / "recipe.yaml")
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
        self.recipe = recorded(self.recipe, begun)
        if changed := differences(begun, self.recipe):
            raise UserError(
                f"{self.path} was started with another recipe: {', '.join(changed)}. Give these keys their former "
                f"values to continue; {remedy}"
            )
        return True

    def check_place(self) -> None:
        """Raises UserError if the directory cannot be created or written."""
        try:
            place = next(path for path in (self.path, *self.path.parents) if path.exists())
        except (OSError, ValueError) as error:  # a name that is too long, or has a character that no name may have
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UserError(f"run.out and run.name give no valid directory: {reason}; change one of them") from error
        problem = None
        if not place.is_dir():
            problem = f"{place} is a file"
        elif not os.access(place, os.W_OK | os.X_OK):
            problem = f"{place} is not writable for this user"
        if problem:
            raise UserError(
                f"the run directory {self.path} cannot be written: {problem}; set run.out to another folder"
            )

    def open(self) -> Path | None:
        """Create the directory, or open the one that `check` accepted. Returns where an older run was moved, if any."""
        aside = None
        self.lock()
        with writing(self.path):
            if self.fresh and self.path.exists():
                names = (self.path.with_name(f"{self.path.name}.old-{number}") for number in count(1))
                aside = next(name for name in names if not name.exists())
                self.path.rename(aside)
                self._locked = False  # the locked file was renamed too
            self.path.mkdir(parents=True, exist_ok=True)
            if self.fresh:
                write_atomically(self.path / FRESH, self.job)
        self.lock()
        # another process may have started the run before this one had the lock
        self.check()
        own = dataclasses.replace(self.recipe, run=dataclasses.replace(self.recipe.run, fresh=False))
        with writing(self.path):
            write_atomically(self.path / "recipe.yaml", dump(own))
            self.checkpoints.mkdir(exist_ok=True)
            (self.path / "PREEMPTED").unlink(missing_ok=True)
        return aside

    def finished(self) -> dict[str, Any] | None:
        """The content of DONE, if the run is complete."""
        with suppress(OSError, ValueError):
            done = json.loads((self.path / "DONE").read_text())
            return done if isinstance(done, dict) else None
        return None

    def mark(self, marker: str, content: dict[str, Any]) -> None:
        """Write the file DONE or PREEMPTED."""
        with writing(self.path / marker):
            write_atomically(self.path / marker, json.dumps(content) + "\n")

    def rewind(self, step: int, evaluated: int) -> list[str]:
        """Remove lines of metrics.jsonl after `step`, of evaluations after `evaluated`, and incomplete lines.

        Returns the lines that remain.
        """
        with writing(self.metrics):
            text = self.metrics.read_text("utf-8", errors="replace") if self.metrics.exists() else ""
            lines = [line for line in text.splitlines() if _keep_line(line, step, evaluated)]
            write_atomically(self.metrics, "".join(f"{line}\n" for line in lines))
        return lines


def _keep_line(line: str, step: int, evaluated: int) -> bool:
    try:
        record = json.loads(line)
        return record["step"] <= (evaluated if record["kind"] == "eval" else step)
    except (ValueError, KeyError, TypeError):
        return False
