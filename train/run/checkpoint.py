"""Checkpoints: complete or absent, verified before use.

A checkpoint is a directory of torch.distributed.checkpoint plus `manifest.json`, which names every file with its size
and sha256, and itself with the sha256 of the rest of it. It is written under a temporary name, synced, and renamed: a
crash at any instant leaves the others intact.
"""

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed.world import World
from ..errors import UserError, one_line
from ..files import write_atomically
from ..recipe.schema import Parallel

MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints `step-XXXXXXXX` of a run."""

    def __init__(self, path: Path, world: World, say: Callable[[str], None], *, background: bool = False):
        """background: write from a copy while the training goes on, at most one checkpoint at a time."""
        self.path, self.world, self.say = path, world, say
        # a process of a killed start may live on for a while: it must not write among the files of this one
        self.start = world.broadcast_object(uuid.uuid4().hex[:8])
        self.thread = ThreadPoolExecutor(1) if background else None
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        # a thread's collectives must not get between those of the training
        self.group: Any = (
            dist.new_group(backend="gloo", timeout=world.timeout) if background and world.size > 1 else None
        )
        self.pending: Future[UserError | None] | None = None

    def at(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def save(self, state: dict[str, Any], facts: dict[str, Any], *, best: int, last: int) -> None:
        """Write `state` (tensors, by DCP) and `facts` (JSON) as the checkpoint of step `facts["step"]`.

        Then delete all but those of `best` and of the `last` newest steps. Raises UserError where this one cannot be
        written, or in the background the one before it; what was there before stays as it was.
        """
        self.wait()
        if self.thread:
            copied = self.stager.stage(state)
            self.pending = self.thread.submit(self._write, copied, facts, best, last)  # type: ignore[arg-type]
        else:
            self.world.any_rank(error=self._write(state, facts, best, last))

    def wait(self) -> None:
        """Until the checkpoint being written is complete. Raises the UserError if it failed on any process."""
        if self.pending:
            pending, self.pending = self.pending, None
            self.world.any_rank(error=pending.result())

    def close(self) -> None:
        """End the writing, come what may."""
        if self.thread:
            self.thread.shutdown()

    def _part(self, step: int) -> Path:
        return self.path / f".tmp-{self.at(step).name}-{self.start}"

    def _write(self, state: dict[str, Any], facts: dict[str, Any], best: int, last: int) -> UserError | None:
        step = facts["step"]
        try:
            with _alone():
                dcp.save(
                    state,
                    checkpoint_id=self._part(step),
                    process_group=self.group,
                    no_dist=self.world.size == 1,
                )
            # rank 0 comes back from DCP when all have written their files
            if self.world.main:
                self._publish(self._part(step), facts)
                self._prune(step, {best}, last)
        except (CheckpointException, OSError, RuntimeError) as error:
            if self.world.main:
                shutil.rmtree(self._part(step), ignore_errors=True)
            return UserError(
                f"checkpoint of step {step} cannot be written to {self.path}: {_cause(error)}; earlier ones are "
                "untouched. Free space there, then start the same command again"
            )
        return None

    def _publish(self, part: Path, facts: dict[str, Any]) -> None:
        files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(part.iterdir())}
        content = facts | {"files": files}
        write_atomically(part / MANIFEST, json.dumps(content | {"sha256": _digest(content)}, indent=1))
        _sync(part)
        _remove(path := self.at(facts["step"]))  # a broken one, or resume would have taken it
        os.replace(part, path)
        _sync(self.path)

    def _prune(self, step: int, keep: set[int], last: int) -> None:
        done = sorted(path for path in self.path.glob("step-*") if path.name <= self.at(step).name)
        kept = {self.at(number) for number in keep} | set(done[-last:])
        # those of later steps are broken, or resume would have taken one: they must not count among the last
        for path in set(self.path.glob("step-*")) - kept:
            with suppress(OSError):
                os.replace(path, self.path / f".tmp-{path.name}-{self.start}")  # complete or absent, at any instant
        # with what crashes left behind
        for path in self.path.glob(".tmp-*"):
            with suppress(OSError):
                _remove(path)

    def newest(self, recipe_hash: str) -> Path | None:
        """The newest checkpoint that verifies and is of this recipe; others are named and passed over.

        Raises UserError if there are some and none is good: to start over is for the user to say.
        """
        found = sorted(self.path.glob("step-*"), reverse=True)
        for path in found:
            if not (problem := broken(path, recipe_hash)):
                return path
            self.say(f"checkpoint {path} is broken ({problem}); falling back to the one before")
        if found:
            raise UserError(f"none of the checkpoints in {self.path} is good; run.fresh=true starts over")
        return None


def manifest(path: Path) -> dict[str, Any]:
    """What the checkpoint at `path` says of itself. Raises UserError where that cannot be read or was altered."""
    try:
        content = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no checkpoint: its {MANIFEST} cannot be read ({error})") from error
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise UserError(f"{MANIFEST} does not match the sha256 it gives of itself")
    return content


def broken(path: Path, recipe_hash: str | None = None) -> str | None:
    """Why the checkpoint at `path` must not be used (with `recipe_hash`, by that recipe), or None."""
    try:
        facts = manifest(path)
        for name, file in facts["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != file["size"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {file['size']}"
            if _sha256(path / name) != file["sha256"]:
                return f"{name} does not match its sha256"
    except (UserError, OSError) as error:
        return str(error)
    if path.name.startswith("step-") and path.name != f"step-{facts['step']:08d}":
        return f"it is the checkpoint of step {facts['step']}, see its {MANIFEST}"
    if recipe_hash not in (None, facts.get("recipe_hash")):
        return f"it is of another recipe, see its {MANIFEST}"
    return None


def exactness(then: dict[str, Any], now: dict[str, Any], model: nn.Module, parallel: Parallel) -> str:
    """How a run that was saved with the arithmetic `then` repeats the uninterrupted one with the arithmetic `now`."""
    changed = [f"{key} {then.get(key)} then, {now[key]} now" for key in now if now[key] != then.get(key)]
    if not changed:
        return "exact"
    text = f"not bitwise: {', '.join(changed)}"

    def seen(facts: dict[str, Any]) -> int:
        synced = parallel.sync_batch_norm and facts["device"] == "cuda"
        return facts["micro_batch"] * (facts["processes"] if synced else 1)

    norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    if norms and (before := seen(now | then)) != seen(now):
        text += f"; its batch norms see {seen(now)} images at once, {before} then, which changes what it learns"
    return text


def sound_sibling(path: Path) -> str:
    """What to use in place of `path`, a broken checkpoint, or a run or the folder of its checkpoints; in words."""
    places = (path, path / "checkpoints", path.parent)
    others = (other for place in places for other in sorted(place.glob("step-*"), reverse=True) if other != path)
    good = next((other for other in others if not broken(other)), None)
    return f"{good} is good" if good else f"no other in {path.parent} is good"


def load(path: Path, state: dict[str, Any], world: World) -> None:
    """Fill the tensors of `state` from the checkpoint at `path`. Raises UserError where one is missing."""
    try:
        with _alone():
            dcp.load(state, checkpoint_id=path, no_dist=world.size == 1)
    except (CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
        raise UserError(f"checkpoint {path} does not fit this recipe: {_cause(error)}") from error


@contextmanager
def _alone() -> Iterator[None]:
    # DCP warns that it runs in one process even when told so
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: BaseException) -> str:
    """What lies at the bottom of DCP's nested errors."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return one_line(error)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
