"""Registration of tasks and data sources: toy ones from outside the package train, resume and are evaluated."""

import json
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch
import trainer
import yaml
from PIL import Image
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save_file
from torch import nn

from tessel.train import Metric, SourceSpec, TaskSpec, evaluate, register_source, register_task
from tessel.train.__main__ import main
from tessel.train.check import main as check
from tessel.train.errors import UserError
from tessel.train.recipe import registry
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.schema import STRICT, Data, Source, Task
from tessel.train.report.__main__ import main as report
from tessel.train.tasks.base import DatasetTask

NAME = __name__


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Gradients(Source):
    count: PositiveInt = 32
    """number of training images"""


class GradientImages:
    """Pairs (image, depth): a gradient and its depth map. The data set has no classes."""

    def __init__(self, count: int, side: int):
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        angle = 2 * np.pi * index / self.count
        y, x = np.mgrid[: self.side, : self.side] / self.side
        depth = (np.cos(angle) * x + np.sin(angle) * y).astype(np.float32)
        image = Image.fromarray(np.uint8(127 + 90 * depth)).convert("RGB")
        return image, depth


def open_gradients(data: Any, split: str) -> GradientImages:
    return GradientImages(data.count if split == "train" else 8, data.size)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Depth(Task):
    kind: str = "toy_depth"
    width: PositiveInt = 8
    """channels of the network"""


class MeanError:
    """The mean absolute error, lower is better."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, model: nn.Module, batch: Any) -> None:
        self.sum += float((model(batch[0]) - batch[1]).abs().mean((1, 2)).sum())
        self.count += len(batch[0])

    def compute(self) -> dict[str, float]:
        return {"error": self.sum / self.count, "count": self.count}

    def predictions(self) -> dict[str, np.ndarray]:
        return {}

    def details(self) -> dict[str, Any]:
        return {}


def to_tensors(image: Image.Image, depth: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 255, torch.from_numpy(depth)


class ToyDepth(DatasetTask[Depth, Data]):
    """A network of one layer."""

    def build_model(self) -> nn.Module:
        self.train_transform = self.eval_transform = to_tensors
        width = self.recipe.task.width
        return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 1, 1), nn.Flatten(1, 2))

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"depth_loss": (model(batch[0]) - batch[1]).abs().mean()}

    def metrics(self, *, keep: bool = False) -> MeanError:
        return MeanError()

    def example(self) -> tuple[Any, ...]:
        return (torch.zeros(1, 3, self.recipe.data.size, self.recipe.data.size),)

    def export(self, model: nn.Module, path: Path, state: Mapping[str, Any]) -> None:
        path.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"classes": None}))


class ToyReconstruction(ToyDepth):
    """Self-supervision: no labels, no classes, no evaluation. The target is the brightness of the image itself."""

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": (model(batch[0]) - batch[0].mean(1)).square().mean()}


def load(path: Path) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1), nn.Flatten(1, 2))
    model.load_state_dict(load_file(path / "model.safetensors"))
    return model.eval()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Reconstruction(Depth):
    kind: str = "toy_reconstruction"


@pytest.fixture(autouse=True)
def toys():
    """Register the toy source and the two toy tasks; remove them after the test."""
    register_source(
        SourceSpec(name="toy_gradients", summary="ramps", options=Gradients, datasets={"depth": open_gradients})
    )
    common = {"sample": "depth", "load": f"{NAME}:load", "load_hint": "load('{path}')"}
    register_task(
        TaskSpec(
            kind="toy_depth",
            summary="depth of a ramp",
            options=Depth,
            task=f"{NAME}:ToyDepth",
            metric=Metric("error", "error", higher_is_better=False),
            **common,
        )
    )
    register_task(
        TaskSpec(
            kind="toy_reconstruction",
            summary="self-supervision",
            options=Reconstruction,
            task=f"{NAME}:ToyReconstruction",
            **common,
        )
    )
    yield
    for registered in (registry.TASKS, registry.SOURCES):
        for key in [key for key in registered if key.startswith("toy_")]:
            del registered[key]


@pytest.fixture
def recipe(tmp_path):
    sections = {
        "run": {"out": str(tmp_path / "runs"), "device": "cpu"},
        "model": {"name": "test_resnet"},
        "task": {"kind": "toy_depth"},
        "data": {"source": "toy_gradients", "size": 16, "batch": 8, "count": 40},
        "optim": {"lr": 0.02},
        "sched": {"steps": 12},
        "eval": {"every": 4},
        "ckpt": {"every": 4},
        "log": {"every": 4},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path / "toy.yaml"


def test_registered_task_trains_resumes_and_is_evaluated(recipe, tmp_path, capsys):
    with trainer.before_step(6):
        assert main([str(recipe)]) == 0
    assert main([str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "at step 6 (exact)" in out and f"load('{tmp_path}/runs/toy/export')" in out
    assert main([str(recipe), "run.name=straight"]) == 0
    paths = (tmp_path / f"runs/{name}/checkpoints/step-00000012" for name in ("toy", "straight"))
    trainer.assert_same_checkpoint(*paths)
    errors = [line["error"] for line in trainer.metrics(tmp_path / "runs/toy") if line["kind"] == "eval"]
    assert len(errors) == 3 and errors[-1] < errors[0]
    assert evaluate.main([str(tmp_path / "runs/toy")]) == 0
    assert json.loads((tmp_path / "runs/toy/evaluation/evaluation.json").read_text())["error"] == errors[-1]
    assert report([str(tmp_path / "runs/toy")]) == 0
    assert "Training" in (tmp_path / "runs/toy/report/index.html").read_text()


def test_best_checkpoint_has_the_lowest_metric_if_lower_is_better(recipe, tmp_path, monkeypatch):
    found = iter([3.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(MeanError, "compute", lambda self: {"error": next(found), "count": 8})
    assert main([str(recipe), "ckpt.keep_last=1"]) == 0
    kept = sorted(path.name for path in (tmp_path / "runs/toy/checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000012"]


def test_self_supervision_needs_no_classes_and_no_validation(recipe, tmp_path, monkeypatch, capsys):
    def open_train_only(data, split):
        assert split == "train", "there is no other"
        return open_gradients(data, split)

    monkeypatch.setitem(registry.SOURCES["toy_gradients"].datasets, "depth", open_train_only)
    assert main([str(recipe), "task.kind=toy_reconstruction"]) == 0
    run = tmp_path / "runs/toy"
    records = trainer.metrics(run)
    assert {line["kind"] for line in records} == {"train"} and records[-1]["loss"] < records[0]["loss"]
    assert json.loads((run / "DONE").read_text())["step"] == 12 and (run / "export/model.safetensors").is_file()
    assert report([str(run)]) == 0
    assert evaluate.main([str(run)]) == 1
    assert "toy_reconstruction has no evaluation" in capsys.readouterr().err


def test_keys_of_a_registered_task_are_typed_listed_and_checked(recipe, capsys):
    assert load_recipe(recipe, ["task.width=3"]).task.width == 3
    for text, fragment in [
        ("task.width=wide", "task.width='wide'"),
        ("task.smoothing=0.1", "task.smoothing has no effect here: it is a key of task.kind=classify"),
        ("data.root=x", "data.root has no effect here"),
        ("task.kind=classify", "toy_gradients has no labels"),
        ("data.source=digits", "digits has no depth"),
    ]:
        overrides = [text, *(["data.count=null"] if text == "data.source=digits" else [])]
        overrides += ["task.width=null"] if text == "task.kind=classify" else []
        with pytest.raises(UserError) as caught:
            load_recipe(recipe, overrides)
        assert fragment in str(caught.value), str(caught.value)
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "toy_gradients ramps" in " ".join(out.split()) and "task.width: 8" in out and "data.count: 32" in out


def test_registering_a_name_twice_is_an_error():
    spec = registry.SOURCES["digits"]
    assert register_source(spec) is spec
    with pytest.raises(ValueError, match="'digits' is already registered"):
        register_source(SourceSpec(name="digits", summary="other", datasets={}))


def test_registered_source_works_with_classification(recipe, tmp_path, capsys):
    """A new source with labels needs no change in the classification task."""

    class Halves(GradientImages):
        classes = ["dark", "bright"]

        def __getitem__(self, index):
            image, _ = super().__getitem__(index)
            return image.point(lambda value: value // 2 + 127 * (index % 2)), index % 2

    datasets = {"labels": lambda data, split: Halves(data.count, data.size)}
    register_source(SourceSpec(name="toy_halves", summary="halves", options=Gradients, datasets=datasets))
    overrides = ["task.kind=classify", "data.source=toy_halves", "sched.steps=4"]
    assert main([str(recipe), *overrides]) == 0
    assert trainer.metrics(tmp_path / "runs/toy")[-1]["count"] == 40
    assert check([str(recipe), *overrides]) == 1
    out = capsys.readouterr().out
    assert "train: checked 40 of 40 samples, found no errors" in out
    assert "val: error: sample 3 has the same pixels as sample 3 of the training split" in out


def test_names_in_built_in_specs_can_be_imported():
    """Every dotted name of a registration can be imported."""
    for spec in registry.TASKS.values():
        names = [spec.task, spec.load] + ([spec.report] if spec.report else [])
        assert all(resolve_name(name) for name in names)
