"""Loggers of metrics: metrics.jsonl and the console always, TensorBoard and Weights & Biases if the recipe asks."""

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..distributed.world import World
from ..files import write_atomically, writing
from ..recipe.load import flatten
from ..recipe.schema import Log, Recipe


class Logger(Protocol):
    """A destination of metrics. A new one is registered in `Loggers.__init__`."""

    def log(self, record: dict[str, Any]) -> None:
        """Write one record: "kind" ("train" or "eval"), "step", "time" and metrics by name."""
        ...

    def close(self) -> None: ...


class LogRecord:
    """What a checkpoint knows of metrics.jsonl: the number of its lines, and a digest of them."""

    def __init__(self, lines: Iterable[str] = ()):
        self.lines, self.digest = 0, hashlib.blake2b(digest_size=16)
        for line in lines:
            self.add(line)

    def add(self, line: str) -> None:
        self.lines += 1
        self.digest.update(f"{line}\n".encode())

    def facts(self) -> dict[str, Any]:
        return {"lines": self.lines, "digest": self.digest.hexdigest()}


class JsonlLogger:
    """One JSON object per line, unbuffered. NaN and infinity become null, which JSON can hold."""

    def __init__(self, path: Path):
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        self.record = LogRecord(path.read_text(encoding="utf-8").splitlines())

    def log(self, record: dict[str, Any]) -> None:
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with writing(self.file.name):
            self.file.write((line := json.dumps(finite, allow_nan=False)).encode() + b"\n")
        self.record.add(line)

    def close(self) -> None:
        self.file.close()


class ProgressBar(Progress):
    """A progress bar with the latest metrics below it, wrapped to the width of the terminal."""

    metrics = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.metrics, no_wrap=False, overflow="fold")  # the console itself does not wrap (soft_wrap)


class ConsoleLogger:
    """A progress bar on a terminal, one line per record elsewhere; `log.progress` overrides the choice."""

    def __init__(self, log: Log, total: int, step: int):
        self.console = Console(highlight=False, soft_wrap=True)
        self.total = total
        self.bar: ProgressBar | None = None
        if log.progress == "bar" or (log.progress == "auto" and self.console.is_terminal):
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
            self.bar = ProgressBar(*columns, console=self.console)
            self.task = self.bar.add_task("", total=total, completed=step)
            self.latest: dict[str, str] = {}  # by the kind of the record
            self.bar.start()

    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def log(self, record: dict[str, Any]) -> None:
        if record["kind"] == "eval":
            line = f"evaluation: {_format_metrics(record, 3)}"
        else:
            line = (
                f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['images_per_second']:.0f} images/s  "
                f"{record['step_seconds']:.3g} s a step  data wait {record['data_wait']:.0%}"
            )
            line += f"  memory {record['memory_gb']:.1f} GB" if "memory_gb" in record else ""
            line += f"  mfu {record['mfu']:.0%}" if "mfu" in record else ""
        # an evaluation stays in the scrollback above a progress bar
        if not self.bar or record["kind"] == "eval":
            self.console.print(f"step {record['step']}/{self.total}  {line}", markup=False)
        if not self.bar:
            return
        self.latest[record["kind"]] = line if record["kind"] == "train" else _format_metrics(record, 1)
        self.bar.metrics = "  ".join(self.latest.values())

    def say(self, text: str) -> None:
        """Print a line; a progress bar stays below it."""
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


class TensorBoardLogger:
    def __init__(self, path: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(path))

    def log(self, record: dict[str, Any]) -> None:
        for key, value in _numbers(record):
            self.writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """Weights & Biases. The run id is stored in the run directory, so that a resumed run continues its wandb run."""

    def __init__(self, recipe: Recipe, path: Path):
        import wandb

        mode = recipe.log.wandb
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") or wandb.api.api_key else "offline"
        identity = path / "wandb-id"
        if not identity.exists():
            write_atomically(identity, uuid.uuid4().hex[:8])
        self.run = wandb.init(
            project=recipe.log.wandb_project,
            name=recipe.run.name,
            id=identity.read_text(),
            resume="allow" if mode == "online" else None,
            mode=mode,  # type: ignore[arg-type]
            dir=str(path),
            config=flatten(recipe),
            settings=wandb.Settings(silent=True, init_timeout=20),
        )

    def log(self, record: dict[str, Any]) -> None:
        self.run.log({f"{record['kind']}/{key}": value for key, value in _numbers(record)}, step=record["step"])

    def close(self) -> None:
        self.run.finish()


class Loggers:
    """All loggers of a run. Rank 0 logs; on other ranks every method does nothing."""

    def __init__(self, recipe: Recipe, path: Path, world: World, *, total: int, step: int):
        """path: the run directory; total: steps of the run; step: the one it starts from."""
        self.active: list[Logger] = []
        self.console: ConsoleLogger | None = None
        self.file: JsonlLogger | None = None
        if not world.main:
            return
        self.console = ConsoleLogger(recipe.log, total, step)
        self.file = JsonlLogger(path / "metrics.jsonl")
        self.active += [self.console, self.file]
        optional = {
            "tensorboard": (recipe.log.tensorboard, lambda: TensorBoardLogger(path / "tensorboard")),
            "wandb": (recipe.log.wandb != "off", lambda: WandbLogger(recipe, path)),
        }
        for name, (enabled, build) in optional.items():
            if not enabled:
                continue
            try:
                self.active.append(build())
            except Exception as error:  # an optional logger that fails must not stop the training
                self.say(f"warning: log.{name} is left out, it did not start: {str(error).strip().splitlines()[0]}")

    def log(self, record: dict[str, Any]) -> None:
        """Add the time to the record and hand it to every logger; see `Logger.log`."""
        record |= {"time": round(time.time(), 3)}
        for logger in self.active:
            logger.log(record)

    def record(self) -> dict[str, Any]:
        """What a checkpoint knows of metrics.jsonl; empty on other ranks."""
        return self.file.record.facts() if self.file else {}

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.console:
            self.console.advance(step)

    def say(self, text: str) -> None:
        """Print a line to the console, from rank 0."""
        if self.console:
            self.console.say(text)

    def close(self) -> None:
        for logger in self.active:
            logger.close()


def _numbers(record: dict[str, Any]) -> list[tuple[str, float]]:
    return [(key, value) for key, value in record.items() if key not in ("kind", "step", "time")]


def _format_metrics(record: dict[str, Any], count: int) -> str:
    """The first `count` metrics of an evaluation as text; tasks list the most important ones first."""
    names = [key for key in record if key not in ("kind", "step", "epoch", "time", "count")]
    return "  ".join(f"{key} {record[key]:.4g}" for key in names[:count])
