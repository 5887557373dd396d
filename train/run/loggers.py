"""Where figures go: metrics.jsonl always, the console, tensorboard and wandb on request."""

import json
import math
import os
import time
import uuid
from collections.abc import Iterator
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
    def log(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Jsonl:
    """One JSON object a line, unbuffered; what is not finite is null."""

    def __init__(self, path: Path):
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115

    def log(self, record: dict[str, Any]) -> None:
        known = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with writing(self.file.name):
            self.file.write(json.dumps(known, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        self.file.close()


class Bar(Progress):
    """A progress bar, and below it the latest figures on as many lines as this terminal needs for them."""

    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.figures, no_wrap=False, overflow="fold")  # the console itself wraps nothing


class Screen:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, log: Log, total: int, step: int):
        self.console = Console(highlight=False, soft_wrap=True)
        self.total = total
        self.bar: Bar | None = None
        if log.progress == "bar" or (log.progress == "auto" and self.console.is_terminal):
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task("", total=total, completed=step)
            self.figures: dict[str, str] = {}
            self.bar.start()

    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def log(self, record: dict[str, Any]) -> None:
        if record["kind"] == "eval":
            line = f"evaluation: {_figures(record, 3)}"
        else:
            line = (
                f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['images_per_second']:.0f} images/s  "
                f"{record['step_seconds']:.3g} s a step  data wait {record['data_wait']:.0%}  "
                f"memory {record['memory_gb']:.1f} GB"
            )
            line += f"  mfu {record['mfu']:.0%}" if "mfu" in record else ""
        if not self.bar:
            self.console.print(f"step {record['step']}/{self.total}  {line}", markup=False)
            return
        self.figures[record["kind"]] = line if record["kind"] == "train" else _figures(record, 1)
        self.bar.figures = "  ".join(self.figures.values())

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


class TensorBoard:
    def __init__(self, path: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(path))

    def log(self, record: dict[str, Any]) -> None:
        for key, value in _numbers(record):
            self.writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """One wandb run for one run directory, through all its starts."""

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
    """All sinks of a run behind one `log`; rank 0 writes, the others are silent."""

    def __init__(self, recipe: Recipe, path: Path, world: World, *, total: int, step: int):
        self.sinks: list[Logger] = []
        self.screen: Screen | None = None
        if not world.main:
            return
        self.screen = Screen(recipe.log, total, step)
        self.sinks += [self.screen, Jsonl(path / "metrics.jsonl")]
        wanted = {"tensorboard": recipe.log.tensorboard, "wandb": recipe.log.wandb != "off"}
        openers = {"tensorboard": lambda: TensorBoard(path / "tensorboard"), "wandb": lambda: Wandb(recipe, path)}
        for name in (name for name, on in wanted.items() if on):
            try:
                self.sinks.append(openers[name]())
            except Exception as error:  # a logger on request must not cost the training
                self.say(f"warning: log.{name} is left out, it did not start: {str(error).strip().splitlines()[0]}")

    def log(self, record: dict[str, Any]) -> None:
        """record: "kind", "step" and figures."""
        record |= {"time": round(time.time(), 3)}
        for sink in self.sinks:
            sink.log(record)

    def advance(self, step: int) -> None:
        if self.screen:
            self.screen.advance(step)

    def say(self, text: str) -> None:
        if self.screen:
            self.screen.say(text)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def _numbers(record: dict[str, Any]) -> list[tuple[str, float]]:
    return [(key, value) for key, value in record.items() if key not in ("kind", "step", "time")]


def _figures(record: dict[str, Any], count: int) -> str:
    """The first of an evaluation's figures, which a task names by their weight."""
    named = [key for key in record if key not in ("kind", "step", "epoch", "time", "count")]
    return "  ".join(f"{key} {record[key]:.4g}" for key in named[:count])
