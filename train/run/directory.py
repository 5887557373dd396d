"""PLACEHOLDER train/run/directory.py"""

import dataclasses
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_atomically, writing
from ..recipe.load import dump, load_recipe, recipe_hash, semantic_keys
from ..recipe.schema import Recipe

LOCK = ".lock"


FILES_OF_A_NEW_RUN = {LOCK, ".recipe.yaml.part"}  # what a start that was killed at once leaves


UNLOCKABLE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # file systems without locks


class RunDirectory:
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
    def held(self) -> Iterator["RunDirectory"]:
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
        there = {entry.name for entry in self.path.iterdir()} - FILES_OF_A_NEW_RUN if self.path.is_dir() else ()
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
            old, new = semantic_keys(begun), semantic_keys(self.recipe)
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
