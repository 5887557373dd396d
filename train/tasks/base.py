"""The protocol between the engine and a task, and the base class of tasks that read a data set.

A task owns its model, its data, its loss and its metrics; the engine knows nothing else of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import default_collate

from ..data.fingerprint import fingerprint
from ..data.loader import Loader, SeededDataset, Transform
from ..data.sampler import GlobalBatchSampler, Key, RepeatedAugSampler, eval_batches
from ..distributed.device import pins_memory
from ..distributed.world import World
from ..errors import UserError
from ..recipe.plan import Plan
from ..recipe.registry import open_dataset, task_spec
from ..recipe.schema import DataT, Recipe, TaskT


class MetricAccumulator(Protocol):
    """Metrics over the validation split, accumulated batch by batch, exact over all processes."""

    def update(self, model: nn.Module, batch: Any) -> None: ...

    def compute(self) -> dict[str, float]:
        """The metrics, with `count`, the number of samples. Collective; the same on every process."""
        ...

    def predictions(self) -> dict[str, np.ndarray]:
        """The predictions that were kept, in the order of the data set. Collective; the same on every process."""
        ...

    def details(self) -> dict[str, Any]:
        """Further content of evaluation.json, for example metrics per class. Collective."""
        ...


class Task(ABC, Generic[TaskT, DataT]):
    """What the engine needs of a task. A task without an evaluation leaves the defaults of the last five methods."""

    micro_batch_multiple: int = 1
    """micro-batches must have a multiple of this many samples"""
    classes: list[str] | None = None
    """names of the model's outputs in their order; None if they are not classes"""

    def __init__(self, recipe: Recipe[TaskT, DataT], world: World):
        self.recipe, self.world = recipe, world

    @property
    @abstractmethod
    def samples(self) -> int:
        """Number of samples in the training split."""

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """What a run records of the data it learns from, by split; see `data.fingerprint`. Empty: nothing."""
        return {}

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model, on the CPU, with its initial weights. Called once, before any batches are requested."""

    @abstractmethod
    def train_batches(self, plan: Plan, step: int) -> Loader:
        """The micro-batches of this process, from update `step` on."""

    @abstractmethod
    def sample_keys(self, plan: Plan, step: int) -> list[Key]:
        """The (epoch, index) of every sample of update `step`, over all processes."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """Scalars to log. The sum of those whose name contains "loss" is minimized, and logged as `loss`."""

    @abstractmethod
    def example(self) -> tuple[Any, ...]:
        """Arguments of the model for one sample, for counting its operations."""

    @abstractmethod
    def export(self, model: nn.Module, path: Path, state: Mapping[str, Any]) -> None:
        """Write the trained model to the folder `path`, completely or not at all; `state` has its weights."""

    def eval_batches(self) -> Loader:
        """This process's part of the validation split; every sample is in one batch of one process."""
        raise NotImplementedError

    def metrics(self, *, keep: bool = False) -> MetricAccumulator:
        """An empty accumulator; with `keep` it holds every prediction, for `MetricAccumulator.predictions`."""
        raise NotImplementedError

    def note_evaluation(self, metrics: MetricAccumulator) -> None:
        """Called on every process with the metrics of an evaluation, so that an export can say something of them."""

    def pictures(self, predictions: Mapping[str, np.ndarray], count: int) -> Iterator[tuple[int, Image.Image]]:
        """(index, picture of truth and prediction) of the first `count` kept predictions; empty if it draws none."""
        return iter(())

    def legend(self, predictions: Mapping[str, np.ndarray], count: int) -> dict[str, list[int]]:
        """Class name -> color of what `pictures` draws; empty if the pictures name their classes themselves."""
        return {}

    def keep_pictures(self, count: int) -> None:
        """Make the next accumulators keep at least what `pictures` needs for `count` samples."""


class DatasetTask(Task[TaskT, DataT]):
    """A task on the two splits of the recipe's data source, loaded in the order of the trainer's sampler.

    The training split is opened on first use, so that an evaluation works without it. A subclass sets
    `train_transform` and, if it has an evaluation, `eval_transform` in `build_model`.
    """

    collate: Callable[[list[Any]], Any] = staticmethod(default_collate)
    train_transform: Transform
    eval_transform: Transform

    def __init__(self, recipe: Recipe[TaskT, DataT], world: World):
        super().__init__(recipe, world)
        if task_spec(recipe).metric is not None:
            self.classes = getattr(self.val, "classes", None)

    @cached_property
    def val(self) -> Any:
        """The validation split."""
        return open_dataset(self.recipe, "val")

    @cached_property
    def train(self) -> Any:
        """The training split. Raises UserError if its classes differ from those of the validation split."""
        train = self.open_train()
        if self.classes is not None and train.classes != self.classes:
            different = sorted(set(train.classes) ^ set(self.classes)) or ["the same classes in another order"]
            raise UserError(
                f"the training and validation splits of {self.recipe.data.location} have different classes: "
                f"{', '.join(different[:5])}; both need the same"
            )
        return train

    def open_train(self) -> Any:
        """The training split as the data source opens it."""
        return open_dataset(self.recipe, "train")

    @property
    def samples(self) -> int:
        return len(self.train)

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        splits = {"train": self.train} | ({} if task_spec(self.recipe).metric is None else {"val": self.val})
        return {split: fingerprint(dataset) for split, dataset in splits.items()}

    def train_batches(self, plan: Plan, step: int) -> Loader:
        order, retries = self._sampler(plan, step), self.recipe.guard.corrupt_limit(self.samples)
        dataset = SeededDataset(
            self.train, self.train_transform, self.recipe.run.seed, order=order, max_retries=retries
        )
        workers = max(self.recipe.data.workers, 1)
        # together, the workers prefetch at least the micro-batches of the next update
        return self._loader(dataset, order, max(2, -(-plan.accumulate // workers) + 1))

    def sample_keys(self, plan: Plan, step: int) -> list[Key]:
        batch = self.recipe.data.batch
        return self._sampler(plan, step).keys(step * batch, (step + 1) * batch)

    def eval_batches(self) -> Loader:
        batches = eval_batches(len(self.val), self.recipe.data.eval_batch, self.world.rank, self.world.size)
        return self._loader(SeededDataset(self.val, self.eval_transform, self.recipe.run.seed), batches, 2)

    def _sampler(self, plan: Plan, step: int) -> GlobalBatchSampler:
        return RepeatedAugSampler(
            repeats=self.recipe.data.aug.repeated_aug,
            length=self.samples,
            seed=self.recipe.run.seed,
            micro_batch=plan.micro_batch,
            accumulate=plan.accumulate,
            rank=self.world.rank,
            world_size=self.world.size,
            start=step * self.recipe.data.batch,
            stop=plan.steps * self.recipe.data.batch,
        )

    def _loader(self, dataset: SeededDataset, batches: Any, prefetch: int) -> Loader:
        return Loader(
            dataset,
            batches,
            collate=self.collate,
            workers=self.recipe.data.workers,
            prefetch=prefetch,
            pin=pins_memory(self.world.device),
            timeout=self.recipe.guard.timeout,
        )
