"""What is learned. A task owns its model, its data, its loss and its figures; the engine knows only this protocol."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import timm
import torch
from timm.loss import BinaryCrossEntropy
from torch import nn
from torch.nn import functional as F

from .. import zoo as zoo  # registers the models with timm
from .augment import eval_transform, input_config, mixing, train_transform
from .config import Plan, Recipe, UserError
from .data import GlobalOrder, Key, Loader, Seeded, build_dataset
from .launch import World
from .parallel import memory_format


class Scores(Protocol):
    """Figures over a data set, summed batch by batch and exactly over the processes."""

    def update(self, model: nn.Module, batch: Any) -> None: ...

    def compute(self) -> dict[str, float]:
        """The figures; the same on every process, which all must call it."""
        ...

    def save(self, path: Path, facts: dict[str, Any]) -> None: ...


class Task(Protocol):
    samples: int  # in the training split
    metric: str  # the figure by which the best checkpoint is chosen, higher is better

    def build_model(self) -> nn.Module: ...

    def train_batches(self, plan: Plan, step: int) -> Loader:
        """This process's micro-batches from update `step` on."""
        ...

    def sample_keys(self, plan: Plan, step: int) -> list[Key]:
        """The (epoch, index) of every image of update `step`."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """Scalars; the sum of those whose name contains "loss" is minimised."""
        ...

    def eval_batches(self) -> Loader:
        """This process's share of the validation split, each image in it once over all processes."""
        ...

    def scores(self) -> Scores: ...

    def export_facts(self) -> dict[str, Any]:
        """Arguments of `checkpoint.export` beside model and path."""
        ...


def build_task(recipe: Recipe, world: World) -> Task:
    return {"classify": Classify}[recipe.task.kind](recipe, world)


class Classify:
    """One class an image."""

    metric = "top1"

    def __init__(self, recipe: Recipe, world: World):
        self.recipe, self.world = recipe, world
        check_name(recipe.model.name)
        self.train, self.val = (build_dataset(recipe.data, split) for split in ("train", "val"))
        self.samples, self.classes = len(self.train), self.train.classes
        if self.val.classes != self.classes:
            odd = sorted(set(self.val.classes) ^ set(self.classes))
            raise UserError(f"train and val of {recipe.data.root} hold different classes: {', '.join(odd[:5])}; make them agree")
        wanted = recipe.task.num_classes
        if wanted not in (None, len(self.classes)):
            raise UserError(
                f"task.num_classes={wanted}, but data.source={recipe.data.source} has {len(self.classes)} classes; "
                f"use {len(self.classes)} or leave it out"
            )
        self.mixing = mixing(recipe.data.aug, recipe.task, len(self.classes))
        smoothing = recipe.task.smoothing
        self.bce = BinaryCrossEntropy(smoothing=0.0 if self.mixing else smoothing) if recipe.task.loss == "bce" else None
        self.pretrained_cfg: Any = {}

    def build_model(self) -> nn.Module:
        model = create_model(self.recipe, len(self.classes))
        self.pretrained_cfg = model.pretrained_cfg
        return model

    def train_batches(self, plan: Plan, step: int) -> Loader:
        data = self.recipe.data
        dataset = Seeded(self.train, train_transform(data, self.pretrained_cfg), self.recipe.run.seed)
        ahead = max(2, -(-plan.accumulate // max(data.workers, 1)) + 1)  # an update's micro-batches and then some
        return self._loader(dataset, self._order(plan, step), ahead)

    def sample_keys(self, plan: Plan, step: int) -> list[Key]:
        batch = self.recipe.data.batch
        return self._order(plan, step).keys(step * batch, (step + 1) * batch)

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        images, targets = self._placed(batch)
        if self.mixing:
            images, targets = self.mixing(images, targets)
        logits = model(images).float()
        if self.bce:
            return {"loss": self.bce(logits, targets)}
        return {"loss": F.cross_entropy(logits, targets, label_smoothing=0.0 if self.mixing else self.recipe.task.smoothing)}

    def eval_batches(self) -> Loader:
        size = self.recipe.data.eval_batch
        mine = [(0, index) for index in range(self.world.rank, len(self.val), self.world.size)]
        batches = [mine[at : at + size] for at in range(0, len(mine), size)]
        dataset = Seeded(self.val, eval_transform(self.recipe.data, self.pretrained_cfg), self.recipe.run.seed)
        return self._loader(dataset, batches, 2)

    def scores(self) -> "ClassScores":
        return ClassScores(self)

    def export_facts(self) -> dict[str, Any]:
        config = input_config(self.recipe.data, self.pretrained_cfg)
        return {"classes": self.classes, "model_args": model_args(self.recipe), "data_config": config}

    def _order(self, plan: Plan, step: int) -> GlobalOrder:
        return GlobalOrder(
            length=self.samples,
            seed=self.recipe.run.seed,
            micro_batch=plan.micro_batch,
            accumulate=plan.accumulate,
            rank=self.world.rank,
            world_size=self.world.size,
            start=step * self.recipe.data.batch,
            stop=plan.steps * self.recipe.data.batch,
        )

    def _loader(self, dataset: Seeded, batches: Any, ahead: int) -> Loader:
        return Loader(dataset, batches, workers=self.recipe.data.workers, ahead=ahead, pin=self.world.device.type == "cuda")

    def _placed(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images = batch[0].to(self.world.device, non_blocking=True, memory_format=memory_format(self.recipe.parallel))
        return images, batch[1].to(self.world.device, non_blocking=True)


class ClassScores:
    """Top-1, top-5 (percent), cross entropy and the prediction for every image."""

    def __init__(self, task: Classify):
        self.task = task
        self.rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def update(self, model: nn.Module, batch: Any) -> None:
        images, targets = self.task._placed(batch)
        self.rows.append((batch[2], targets, model(images).float()))

    def compute(self) -> dict[str, float]:
        local = [torch.cat(column).cpu() for column in zip(*self.rows, strict=True)] if self.rows else None
        parts = [part for part in self.task.world.gather(local) if part]
        index, self.targets, self.logits = (torch.cat(column) for column in zip(*parts, strict=True))
        order = index.argsort()
        self.targets, self.logits = self.targets[order], self.logits[order]
        hits = self.logits.topk(min(5, self.logits.shape[1])).indices == self.targets[:, None]
        return {
            "top1": 100 * hits[:, 0].double().mean().item(),
            "top5": 100 * hits.any(1).double().mean().item(),
            "loss": F.cross_entropy(self.logits.double(), self.targets).item(),
            "count": len(index),
        }
