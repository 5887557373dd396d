"""What is learned. A task owns its model, its data, its loss and its figures; the engine knows only this protocol."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate

from ..data.loader import Loader, SeededDataset, Transform
from ..data.sampler import GlobalOrder, Key, RepeatedOrder
from ..distributed.world import World
from ..errors import UserError
from ..recipe.plan import Plan
from ..recipe.schema import Recipe


class MetricAccumulator(Protocol):
    """Figures over a data set, summed batch by batch, exact over the processes."""

    def update(self, model: nn.Module, batch: Any) -> None: ...

    def compute(self) -> dict[str, float]:
        """The figures, the same on every process; every process calls it."""
        ...

    def predictions(self) -> dict[str, np.ndarray]:
        """What was kept, in data-set order, the same on every process; every process calls it."""
        ...

    def details(self) -> dict[str, Any]:
        """Further facts for evaluation.json, for example figures per class; every process calls it."""
        ...


class Task(Protocol):
    classes: list[str]  # in the order of the model's outputs
    metric: str  # the figure by which the best checkpoint is chosen, higher is better

    @property
    def samples(self) -> int:
        """Images of the training split."""
        ...

    def build_model(self) -> nn.Module: ...

    def train_batches(self, plan: Plan, step: int) -> Loader:
        """This process's micro-batches from update `step` on."""
        ...

    def sample_keys(self, plan: Plan, step: int) -> list[Key]:
        """The (epoch, index) of every image of update `step`."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """Scalars, all of them logged; the sum of those whose name contains "loss", itself logged as `loss`, is
        minimised."""
        ...

    def eval_batches(self) -> Loader:
        """This process's share of the validation split, each image in it once over all processes."""
        ...

    def scores(self, *, keep: bool = False) -> MetricAccumulator:
        """New sums; `keep` holds on to every prediction, for `MetricAccumulator.predictions`."""
        ...

    def example(self) -> tuple[Any, ...]:
        """What the model takes for one image, for counting its operations."""
        ...

    def export(self, model: nn.Module, path: Path, state: Mapping[str, Any]) -> None:
        """Write the trained model into the folder `path`, complete or not at all; `state` holds its weights."""
        ...


class SupervisedTask:
    """The data of a task: two splits of one data set, in the trainer's order, through the transforms of its model.

    `build(split)` opens one. The training split is opened when it is asked for: an evaluation does without. A task that
    builds on this sets `train_transform` and `eval_transform` when it builds its model.
    """

    collate: Callable[[list[Any]], Any] = staticmethod(default_collate)
    train_transform: Transform
    eval_transform: Transform

    def __init__(self, recipe: Recipe, world: World, build: Callable[[str], Any]):
        self.recipe, self.world, self.build = recipe, world, build
        self.val = build("val")
        self.classes: list[str] = self.val.classes

    @cached_property
    def train(self) -> Any:
        """The training split. Raises UserError where it has other classes than the one to judge by."""
        train = self.build("train")
        if train.classes != self.classes:
            odd = sorted(set(train.classes) ^ set(self.classes)) or ["the same in another order"]
            where = self.recipe.data.root or self.recipe.data.name
            raise UserError(f"train and val of {where} hold different classes: {', '.join(odd[:5])}; make them agree")
        return train

    @property
    def samples(self) -> int:
        return len(self.train)

    def train_batches(self, plan: Plan, step: int) -> Loader:
        order, max_retries = self._order(plan, step), self.recipe.guard.max_corrupt
        dataset = SeededDataset(
            self.train, self.train_transform, self.recipe.run.seed, order=order, max_retries=max_retries
        )
        workers = max(self.recipe.data.workers, 1)
        ahead = max(2, -(-plan.accumulate // workers) + 1)  # an update's micro-batches and then some
        return self._loader(dataset, order, ahead)

    def sample_keys(self, plan: Plan, step: int) -> list[Key]:
        batch = self.recipe.data.batch
        return self._order(plan, step).keys(step * batch, (step + 1) * batch)

    def eval_batches(self) -> Loader:
        size = self.recipe.data.eval_batch
        mine = [(0, index) for index in range(self.world.rank, len(self.val), self.world.size)]
        batches = [mine[at : at + size] for at in range(0, len(mine), size)]
        return self._loader(SeededDataset(self.val, self.eval_transform, self.recipe.run.seed), batches, 2)

    def _order(self, plan: Plan, step: int) -> GlobalOrder:
        return RepeatedOrder(
            repeats=self.recipe.data.aug.repeats,
            length=self.samples,
            seed=self.recipe.run.seed,
            micro_batch=plan.micro_batch,
            accumulate=plan.accumulate,
            rank=self.world.rank,
            world_size=self.world.size,
            start=step * self.recipe.data.batch,
            stop=plan.steps * self.recipe.data.batch,
        )

    def _loader(self, dataset: SeededDataset, batches: Any, ahead: int) -> Loader:
        workers, pin = self.recipe.data.workers, self.world.device.type == "cuda"
        timeout = self.recipe.guard.timeout
        return Loader(dataset, batches, collate=self.collate, workers=workers, ahead=ahead, pin=pin, timeout=timeout)
