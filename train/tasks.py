"""What is learned. A task owns its model, its data, its loss and its figures; the engine knows only this protocol."""

import difflib
from typing import Any, Protocol

import numpy as np
import timm
import torch
from timm.loss import BinaryCrossEntropy
from torch import nn
from torch.nn import functional as F

from .. import zoo as zoo  # registers the models with timm
from .augment import eval_transform, input_config, mixing, train_transform
from .config import Plan
from .data import GlobalOrder, Key, Loader, Seeded, build_dataset, permutation
from .launch import World
from .parallel import memory_format
from .schema import Recipe, UserError
from .transfer import Teacher, begin_with, create, probe


class Scores(Protocol):
    """Figures over a data set, summed batch by batch, exact over the processes."""

    def update(self, model: nn.Module, batch: Any) -> None: ...

    def compute(self) -> dict[str, float]:
        """The figures, the same on every process; every process calls it."""
        ...

    def predictions(self) -> dict[str, np.ndarray]:
        """What was kept, in data-set order, the same on every process; every process calls it."""
        ...


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

    def scores(self, *, keep: bool = False) -> Scores:
        """New sums; `keep` holds on to every prediction, for `Scores.predictions`."""
        ...

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
        check_name(recipe.model.init_from, "model.init_from")
        check_name(recipe.task.distill.teacher, "task.distill.teacher")
        self.train, self.val = (build_dataset(recipe.data, split) for split in ("train", "val"))
        self.samples, self.classes = len(self.train), self.train.classes
        if self.val.classes != self.classes:
            odd = sorted(set(self.val.classes) ^ set(self.classes))
            raise UserError(
                f"train and val of {recipe.data.root} hold different classes: {', '.join(odd[:5])}; make them agree"
            )
        wanted = recipe.task.num_classes
        if wanted not in (None, len(self.classes)):
            raise UserError(
                f"task.num_classes={wanted}, but data.source={recipe.data.source} has {len(self.classes)} classes; "
                f"use {len(self.classes)} or leave it out"
            )
        self.mixing = mixing(recipe.data.aug, recipe.task, len(self.classes))
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixing else recipe.task.smoothing)
        if recipe.task.loss == "bce":
            self.criterion = BinaryCrossEntropy(smoothing=recipe.task.smoothing)
        self.teacher: Teacher | None = None

    def build_model(self) -> nn.Module:
        model = create_model(self.recipe, len(self.classes))
        self.pretrained_cfg, data = model.pretrained_cfg, self.recipe.data
        self.train_transform = train_transform(data, self.pretrained_cfg)
        self.eval_transform = eval_transform(data, self.pretrained_cfg)
        return model

    def train_batches(self, plan: Plan, step: int) -> Loader:
        data, distill = self.recipe.data, self.recipe.task.distill
        if distill.teacher:
            config = input_config(data, self.pretrained_cfg)
            device = self.world.device
            with self.world.together():
                self.teacher = Teacher(distill, classes=self.classes, size=data.size, config=config, device=device)
        dataset = Seeded(self.train, self.train_transform, self.recipe.run.seed)
        ahead = max(2, -(-plan.accumulate // max(data.workers, 1)) + 1)  # an update's micro-batches and then some
        return self._loader(dataset, self._order(plan, step), ahead)

    def sample_keys(self, plan: Plan, step: int) -> list[Key]:
        batch = self.recipe.data.batch
        return self._order(plan, step).keys(step * batch, (step + 1) * batch)

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        images, targets = self.placed(batch)
        if self.mixing:
            images, targets = self.mixing(images, targets)
        if self.recipe.task.probe:
            model.eval()  # what is frozen holds still: batch statistics, drop path
        logits = model(images).float()
        loss = self.criterion(logits, targets)
        if self.teacher is None:
            return {"loss": loss}
        share = self.recipe.task.distill.weight
        return {"loss": (1 - share) * loss, "distill_loss": share * self.teacher.loss(images, logits)}

    def eval_batches(self) -> Loader:
        size = self.recipe.data.eval_batch
        mine = [(0, index) for index in range(self.world.rank, len(self.val), self.world.size)]
        batches = [mine[at : at + size] for at in range(0, len(mine), size)]
        dataset = Seeded(self.val, self.eval_transform, self.recipe.run.seed)
        return self._loader(dataset, batches, 2)

    def scores(self, *, keep: bool = False) -> "ClassScores":
        return ClassScores(self, keep)

    def export_facts(self) -> dict[str, Any]:
        config = input_config(self.recipe.data, self.pretrained_cfg)
        return {"classes": self.classes, "data_config": config}

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

    def _loader(self, dataset: Seeded, batches: Any, ahead: int) -> Loader:
        workers, pin = self.recipe.data.workers, self.world.device.type == "cuda"
        timeout = self.recipe.guard.timeout
        return Loader(dataset, batches, workers=workers, ahead=ahead, pin=pin, timeout=timeout)

    def placed(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images = batch[0].to(self.world.device, non_blocking=True, memory_format=memory_format(self.recipe.parallel))
        return images, batch[1].to(self.world.device, non_blocking=True)


class RepeatedOrder(GlobalOrder):
    """The order of repeated augmentation (Hoffer et al., arXiv 1901.09335): `repeats` copies of an image in a row.

    An epoch has as many samples as ever, hence a share of 1 / repeats of the images. In a batch all first copies come
    first, then all second ones: on several processes they fall to different ones. A copy's key counts as an epoch of
    its own, so that each is augmented anew.
    """

    def __init__(self, *, repeats: int, **order: int):
        super().__init__(**order)
        self.repeats = repeats

    def keys(self, start: int, stop: int) -> list[Key]:
        places = (divmod(position, self.length) for position in range(start, stop))
        copies = sorted((place % self.repeats, epoch, place // self.repeats) for epoch, place in places)
        return [
            (epoch * self.repeats + copy, int(permutation(self.seed, epoch, self.length)[image]))
            for copy, epoch, image in copies
        ]


class ClassScores:
    """Top-1, top-5 (percent) and cross entropy over a data set; with `keep`, every prediction too."""

    def __init__(self, task: Classify, keep: bool):
        self.task, self.keep = task, keep
        self.sums = torch.zeros(4, dtype=torch.float64, device=task.world.device)
        self.rows: list[list[np.ndarray]] = []

    def update(self, model: nn.Module, batch: Any) -> None:
        images, targets = self.task.placed(batch)
        logits = model(images).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="none").double()
        count = torch.tensor(len(targets), device=loss.device)
        self.sums += torch.stack([hits[:, 0].sum(), hits.any(1).sum(), loss.sum(), count])
        if self.keep:
            columns = batch[2], targets, logits.argmax(1), logits.softmax(1)
            self.rows.append([column.cpu().numpy() for column in columns])

    def compute(self) -> dict[str, float]:
        top1, top5, loss, count = self.task.world.sum(self.sums).tolist()
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count, "count": int(count)}

    def predictions(self) -> dict[str, np.ndarray]:
        rows = [row for part in self.task.world.gather(self.rows) for row in part]
        index, target, prediction, probability = (np.concatenate(column) for column in zip(*rows, strict=True))
        order = index.argsort()
        return {"target": target[order], "prediction": prediction[order], "probability": probability[order]}


def create_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's model with a new classifier. Raises UserError where timm cannot build it."""
    wanted, size = recipe.model, recipe.data.size
    options: dict[str, Any] = {"drop_path_rate": wanted.drop_path, **wanted.kwargs}
    model = create(
        wanted.name, size, key="model.name", pretrained=wanted.pretrained, num_classes=num_classes, **options
    )
    if wanted.init_from:
        begin_with(model, wanted, size)
    return probe(model, recipe.task.probe) if recipe.task.probe else model


def check_name(name: str | None, key: str = "model.name") -> None:
    """Raises UserError with the nearest names for a model that neither timm nor tessel has."""
    if name is None or ":" in name or timm.is_model(name):
        return
    near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "is it spelled as there?"
    raise UserError(f"{key}={name!r} is unknown; `import tessel.zoo, timm; timm.list_models()` lists the names; {hint}")
