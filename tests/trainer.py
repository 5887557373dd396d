"""Helpers of the trainer's tests: a few dozen images, recipes for tiny models, short runs, readers of their files."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tessel.train import engine
from tessel.train.__main__ import main
from tessel.train.data.batch_stream import BatchStream
from tessel.train.distributed.world import World
from tessel.train.optim.optimizer import build_optimizer
from tessel.train.optim.schedule import build_schedule
from tessel.train.recipe.load import make_recipe
from tessel.train.recipe.plan import Plan
from tessel.train.recipe.registry import open_dataset
from tessel.train.recipe.schema import Optim, Recipe
from tessel.train.run import checkpoint
from tessel.train.run.signals import Signals
from tessel.train.trainer import build

SIZE = 32
SCENES: dict[str, dict[str, Any]] = {  # sections for `write_recipe`: the tasks that train on digit scenes
    "segment": {
        "model": {"name": "test_convnext"},
        "task": {
            "kind": "segment",
            "segment": {"decode_head": {"type": "FPNHead", "channels": 8, "norm_cfg": {"type": "GN", "num_groups": 2}}},
        },
        "data": {"source": "digit_scenes", "scenes": 24, "eval_batch": 1, "aug": {"hflip": 0.5}},
    },
    "detect": {
        "model": {"name": "litv2_atto"},
        "task": {
            "kind": "detect",
            "dense": {"batch_norm": "frozen"},
            "detect": {"detector": "faster_rcnn", "channels": 16},
        },
        "data": {"source": "digit_scenes", "size": 64, "scenes": 24, "eval_batch": 1, "aug": {"hflip": 0.5}},
    },
}


def open_source(source: str, split: str, **options: Any) -> Any:
    """Open a split of a data source with class labels through a recipe."""
    return open_dataset(recipe_of(source=source, **options), split)


def recipe_of(**data: Any) -> Recipe:
    """A minimal recipe whose section `data` has these keys."""
    sections = {"model": {"name": "test_resnet"}, "data": data, "sched": {"steps": 1}}
    return make_recipe(json.loads(json.dumps(sections)), source="test")


def draw_folder(root: Path, *, train: int = 12, val: int = 5, classes: int = 3) -> Path:
    """Write `root/{train,val}/CLASS/*.png`: noisy stripes whose spacing and color depend on the class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 80, (SIZE, SIZE, 3), dtype=np.uint8)
                pixels[:: label + 2, :, label % 3] += 150
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def send_sigterm() -> None:
    """Send SIGTERM to this process, as a cluster's scheduler does."""
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def before_step(number: int, action: Callable[[], None] = send_sigterm) -> Iterator[None]:
    """Within this context, call `action()` whenever an engine is about to begin update `number` (counted from 0)."""
    step = engine.Engine.step

    def step_with_action(self: engine.Engine) -> bool:
        if self.progress.step == number:
            action()
        return step(self)

    engine.Engine.step = step_with_action
    try:
        yield
    finally:
        engine.Engine.step = step


def write_recipe(path: Path, **sections: dict[str, Any]) -> Path:
    """Write a recipe of 9 steps of 8 images with augmentation, drop path, mixing and EMA; `sections` replace keys."""
    recipe: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "out": str(path.parent / "runs"), "device": "cpu"},
        "model": {"name": "test_efficientnet", "drop_path_rate": 0.1},
        "data": {
            "source": "folder",
            "size": SIZE,
            "batch": 8,
            "micro_batch": 4,
            "aug": {
                "hflip": 0.5,
                "rotate": 10,
                "erasing": 0.3,
                "auto_augment": "rand-m5-n1",
                "mixup": 0.2,
                "cutmix": 0.5,
            },
        },
        "optim": {"lr": 2e-3, "clip": 1.0, "layer_decay": 0.9},
        "sched": {"steps": 9, "warmup": 2},
        "ema": {"decay": 0.9},
        "log": {"every": 2},
        "ckpt": {"every": 3},
        "eval": {"every": 3},
    }
    for name, section in sections.items():
        recipe.setdefault(name, {}).update(section)
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(recipe: Path, *overrides: str) -> int:
    """Run the trainer's command line in this process. Returns its exit code."""
    return main([str(recipe), *overrides])


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stable_metrics(run: Path) -> list[dict[str, Any]]:
    """The logged metrics without times, speeds and memory: two equal runs log the same values."""
    clock = {"time", "images_per_second", "data_wait", "step_seconds", "tflops", "memory_gb"}
    return [{key: value for key, value in record.items() if key not in clock} for record in metrics(run)]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name."""
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(path, state, World())
    return state


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Assert that all tensors are bitwise equal: weights, optimizer state, moving average."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys() and left
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def rewrite_manifest(path: Path, **facts: object) -> None:
    """Write the checkpoint's manifest again with other facts and a valid sha256."""
    content = checkpoint.read_manifest(path) | facts
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(content | {"sha256": digest}))


def run_processes(size: int, *runs: list[Any]) -> subprocess.CompletedProcess[str]:
    """Train the runs one after another, each on `size` processes; the last line of stdout has their exit codes.

    A run is a list of command-line arguments. It may begin with "@RANK:STEP[:SIGNAL[:evaluation|finish]]": that rank
    then gets the signal at that step; see ranks.py.
    """
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(size)]
    arguments = json.dumps([[str(word) for word in run] for run in runs])
    return subprocess.run([*command, arguments], capture_output=True, text=True, timeout=280)


def exit_codes(done: subprocess.CompletedProcess[str]) -> list[list[int]]:
    return json.loads(done.stdout.splitlines()[-1])


def learning_rate(recipe: Recipe, planned: Plan) -> Callable[[int], float]:
    """A function that returns the learning rate of a step."""
    optimizer = build_optimizer(torch.nn.Linear(1, 1), Optim(name="sgd"), planned.lr)
    schedule = build_schedule(optimizer, recipe, planned)

    def lr(step: int) -> float:
        schedule.step_update(step)
        return optimizer.param_groups[0]["lr"]

    return lr


def run_updates(recipe: Recipe, steps: int) -> tuple[engine.Engine, set[str]]:
    """Train `steps` updates and assert that all are finite. Returns the engine and the names of the changed weights."""
    task, planned, built = build(recipe, World())
    before = {key: tensor.detach().clone() for key, tensor in built.model.named_parameters()}
    prepare_engine(built, task, planned, Path(recipe.run.out))
    assert all(built.step() for _ in range(steps)) and built.progress.step == steps
    built.finalize_step()
    after = dict(built.model.named_parameters())
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert math.isfinite(built.losses.totals()["loss"])
    return built, {key for key in after if not torch.equal(before[key], after[key])}


def prepare_engine(engine: Any, task: Any, schedule: Any, folder: Path) -> None:
    """Make `engine.step()` work without a run directory: set its first batches, and loggers that only print."""
    batches = task.train_batches(schedule, 0)
    engine.signals, engine.loggers = Signals(), SimpleNamespace(say=print)
    engine.stream = BatchStream(batches, World(), {}, 0, folder / "corrupt.jsonl")
