"""Checkpoints: complete or absent, and verified before use.

A checkpoint is a directory of torch.distributed.checkpoint (DCP) plus `manifest.json`, which has the size and sha256 of
every file, and the sha256 of its own content. It is written under a temporary name, synced, and renamed: a crash at
any instant leaves the other checkpoints intact. DCP has no checksums, and its own async_save neither publishes by a
rename nor prunes.

The manifest carries a format number, the version of tessel and the whole recipe. A reader knows every older format.
Format 2 (0.2): the manifest holds the recipe, so that two recipes are compared key by key.
Format 1 (0.1): no format number; the manifest holds a hash of the recipe with the defaults of its time, which later
versions cannot compute. The recipe is that of the run directory.
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
from pickle import UnpicklingError
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.nn.modules.batchnorm import _BatchNorm

from ... import __version__
from ..distributed.parallel import SYNC_BATCH_NORM_DEVICES
from ..distributed.world import World
from ..errors import NewerFormatError, UserError, one_line
from ..files import check_format, write_atomically
from ..recipe.load import differences, load_recipe, make_recipe
from ..recipe.schema import Parallel, Recipe
from ..system import sync_directory
from .plain_reader import PlainPlanner, PlainReader

FORMAT = 2
MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints `step-XXXXXXXX` of a run."""

    def __init__(self, path: Path, world: World, say: Callable[[str], None], *, background: bool = False):
        """background: write from a copy while the training continues, at most one checkpoint at a time."""
        self.path, self.world, self.say = path, world, say
        # a process of a killed start may survive for a while; its temporary files need other names than ours
        self.start = world.broadcast_object(uuid.uuid4().hex[:8])
        self.thread = ThreadPoolExecutor(1) if background else None
        # collectives of the thread must not mix with those of the training
        self.group: Any = (
            dist.new_group(backend="gloo", timeout=world.timeout) if background and world.size > 1 else None
        )
        self.pending: Future[UserError | None] | None = None

    def at(self, step: int) -> Path:
        """The directory of a step's checkpoint."""
        return self.path / f"step-{step:08d}"

    def save(self, state: dict[str, Any], facts: dict[str, Any], *, best: int, last: int) -> None:
        """Write `state` (tensors, by DCP) and `facts` (JSON) as the checkpoint of step `facts["step"]`.

        Then delete all checkpoints but those of the step `best` and of the `last` newest steps. Raises UserError if
        this one cannot be written, or in the background the one before; the existing ones stay as they are.
        """
        self.wait()
        if self.thread:
            # a new one each time: that of torch 2.11 serves once
            copied = DefaultStager(StagingOptions(False, False, False, False)).stage(state)
            self.pending = self.thread.submit(self._write, copied, facts, best, last)  # type: ignore[arg-type]
        else:
            self.world.any_rank(error=self._write(state, facts, best, last))

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete. Raises its UserError on all processes if it failed."""
        if self.pending:
            pending, self.pending = self.pending, None
            self.world.any_rank(error=pending.result())

    def close(self) -> None:
        """Stop the writing thread."""
        if self.thread:
            self.thread.shutdown()

    def newest(self, recipe: Recipe) -> Path | None:
        """The newest checkpoint that is undamaged and of this recipe; the others are reported and skipped.

        Raises UserError if there are checkpoints but none can be used: only the user may decide to start over.
        """
        found = sorted(self.path.glob("step-*"), reverse=True)
        for path in found:
            if problem := find_damage(path):
                self.say(f"checkpoint {path} is damaged ({problem}); using the one before")
            elif other := other_recipe(path, recipe):
                self.say(f"checkpoint {path} is of another recipe ({', '.join(other)}); using the one before")
            else:
                return path
        if found:
            raise UserError(f"none of the checkpoints in {self.path} can be used; run.fresh=true starts from scratch")
        return None

    def temporary(self, step: int) -> Path:
        """The directory in which a step's checkpoint is written before it is renamed; its name differs per start."""
        return self.path / f".tmp-{self.at(step).name}-{self.start}"

    def _write(self, state: dict[str, Any], facts: dict[str, Any], best: int, last: int) -> UserError | None:
        step = facts["step"]
        try:
            with _no_dist_warning():
                dcp.save(
                    state,
                    checkpoint_id=self.temporary(step),
                    process_group=self.group,
                    no_dist=self.world.size == 1,
                )
            # on rank 0, DCP returns after all processes have written their files
            if self.world.main:
                self._publish(self.temporary(step), facts)
                self._prune(step, {best}, last)
        except (CheckpointException, OSError, RuntimeError) as error:
            if self.world.main:
                shutil.rmtree(self.temporary(step), ignore_errors=True)
            return UserError(
                f"checkpoint of step {step} cannot be written to {self.path}: {one_line(_cause(error))}; earlier ones "
                "are untouched. Free space there, then start the same command again"
            )
        return None

    def _publish(self, part: Path, facts: dict[str, Any]) -> None:
        files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(part.iterdir())}
        content = {"format": FORMAT, "tessel": __version__, **facts, "files": files}
        write_atomically(part / MANIFEST, json.dumps(content | {"sha256": _digest(content)}, indent=1))
        sync_directory(part)
        _remove(path := self.at(facts["step"]))  # it is damaged, or resume would have used it
        os.replace(part, path)
        sync_directory(self.path)

    def _prune(self, step: int, keep: set[int], last: int) -> None:
        done = sorted(path for path in self.path.glob("step-*") if path.name <= self.at(step).name)
        kept = {self.at(number) for number in keep} | set(done[-last:])
        # checkpoints of later steps are damaged, or resume would have used one: they must not count among the last
        for path in set(self.path.glob("step-*")) - kept:
            with suppress(OSError):
                os.replace(path, self.path / f".tmp-{path.name}-{self.start}")  # complete or absent, at any instant
        # also remove what crashes left behind
        for path in self.path.glob(".tmp-*"):
            with suppress(OSError):
                _remove(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`.

    Raises UserError if it cannot be read or was altered, NewerFormatError if a later version of tessel wrote it.
    """
    try:
        content = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a checkpoint: its {MANIFEST} cannot be read ({error})") from error
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise UserError(f"{MANIFEST} does not match the sha256 it has of itself")
    check_format(content, FORMAT, f"checkpoint {path}")
    return content


def find_damage(path: Path) -> str | None:
    """Why the checkpoint at `path` cannot be used, or None. Raises NewerFormatError; see `read_manifest`."""
    try:
        facts = read_manifest(path)
        for name, file in facts["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != file["size"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {file['size']}"
            if _sha256(path / name) != file["sha256"]:
                return f"{name} does not match its sha256"
    except NewerFormatError:
        raise
    except (UserError, OSError) as error:
        return str(error)
    if path.name.startswith("step-") and path.name != f"step-{facts['step']:08d}":
        return f"it is the checkpoint of step {facts['step']}, see its {MANIFEST}"
    return None


def other_recipe(path: Path, recipe: Recipe) -> list[str]:
    """The keys by which the recipe of the checkpoint at `path` differs from `recipe`; empty if it can continue.

    The recipe of a format 1 checkpoint is that of its run directory.
    """
    facts = read_manifest(path)
    try:
        if "recipe" in facts:
            own = make_recipe(facts["recipe"], source=f"{path / MANIFEST}")
        else:
            own = load_recipe(path.absolute().parent.parent / "recipe.yaml")
    except UserError as error:
        return [str(error)]
    return differences(own, recipe)


def exactness(
    then: dict[str, Any], now: dict[str, Any], model: nn.Module, parallel: Parallel, other_data: list[str]
) -> str:
    """How a run saved with the arithmetic `then` repeats the uninterrupted one with the arithmetic `now`.

    other_data: what changed in the data.
    """
    changed = [*other_data]
    changed += [f"{key} was {then.get(key)}, now {now[key]}" for key in now if now[key] != then.get(key)]
    if not changed:
        return "exact"
    text = f"not bitwise: {', '.join(changed)}"

    def batch_norm_images(facts: dict[str, Any]) -> int:
        synced = parallel.sync_batch_norm and facts["device"] in SYNC_BATCH_NORM_DEVICES
        return facts["micro_batch"] * (facts["processes"] if synced else 1)

    norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    if norms and (before := batch_norm_images(now | then)) != batch_norm_images(now):
        text += (
            f"; its batch norms see {batch_norm_images(now)} images at once instead of {before}, which changes results"
        )
    return text


def suggest_sibling(path: Path) -> str:
    """A good checkpoint near `path`, in words. `path`: a damaged checkpoint, a run, or its folder of checkpoints."""
    places = (path, path / "checkpoints", path.parent)
    others = (other for place in places for other in sorted(place.glob("step-*"), reverse=True) if other != path)
    good = next((other for other in others if not find_damage(other)), None)
    return f"{good} is good" if good else f"no other checkpoint in {path.parent} is good"


def load(path: Path, state: dict[str, Any], world: World) -> None:
    """Fill the tensors of `state` from the checkpoint at `path`, running no code of it.

    Raises UserError if one is missing, or if the checkpoint is not readable without running code.
    """
    try:
        with _no_dist_warning():
            dcp.load(state, storage_reader=PlainReader(path), planner=PlainPlanner(), no_dist=world.size == 1)
    except (CheckpointException, UnpicklingError, RuntimeError, ValueError, LookupError, OSError) as error:
        cause = _cause(error)
        problem = "is refused" if isinstance(cause, UnpicklingError) else "does not fit this recipe"
        raise UserError(f"checkpoint {path} {problem}: {one_line(cause)}") from error


@contextmanager
def _no_dist_warning() -> Iterator[None]:
    # DCP warns that it runs in one process even if it was asked to
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: BaseException) -> BaseException:
    """The innermost of DCP's nested errors."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error


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
