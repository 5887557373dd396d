"""Image classification as a task of the trainer."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import nn

from ...data.loader import Loader
from ...data.native_decoder import read_pixels, require_decoder
from ...distributed.parallel import memory_format
from ...distributed.world import World
from ...errors import UserError
from ...recipe.plan import Plan
from ...recipe.schema import Recipe
from ..base import DatasetTask
from ..export import export_classifier
from ..models import batch_norm_errors, check_name, create_model, load_initial_weights
from .augment import Normalizer, collate, erasing, eval_transform, image_only, input_config, mixing, train_transform
from .channels import missing_statistics
from .distillation import Teacher
from .metrics import ClassificationMetrics
from .options import Classifier, Classify, ClassifyData
from .probe import freeze_for_probe

RESERVED_KWARGS = {  # keys that model.kwargs does not take
    "num_classes": "it follows from the data, and task.num_classes checks it",
    "pretrained": "use model.pretrained",
    "features_only": "a classifier needs its logits",
    "in_chans": "use model.in_chans",
    "swap": "use model.swap",
}
ClassifierT = TypeVar("ClassifierT", bound=Classifier)


class ClassifierTask(DatasetTask[ClassifierT, ClassifyData]):
    """A timm model with one output per class. A subclass has the loss, the metrics and `mixing`."""

    classes: list[str]
    criterion: nn.Module
    mixing: Mixup | None
    collate = staticmethod(collate)

    def __init__(self, recipe: Recipe[ClassifierT, ClassifyData], world: World):
        check_name(recipe.model.name)
        check_name(recipe.model.init_from, "model.init_from")
        super().__init__(recipe, world)
        wanted = recipe.task.num_classes
        if wanted not in (None, len(self.classes)):
            raise UserError(
                f"task.num_classes={wanted}, but data.source={recipe.data.source} has {len(self.classes)} classes; "
                f"use {len(self.classes)} or remove the key"
            )
        self.channels = recipe.model.in_chans or 3
        self.erasing = erasing(recipe.data.aug, world.device)
        self.mixing = self.build_mixing()
        self.micro_batch_multiple = 2 if self.mixing else 1  # mixup and cutmix pair the images of a micro-batch

    def build_mixing(self) -> Mixup | None:
        """Mixup and cutmix of a batch; None if both are off."""
        return mixing(self.recipe.data.aug, self.recipe.task.smoothing, len(self.classes))

    def build_model(self) -> nn.Module:
        model, data = build_classifier(self.recipe, len(self.classes)), self.recipe.data
        published: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        size, mean = published["input_size"], published["mean"]
        if self.channels not in (1, 3, len(mean)) and data.mean is None:
            raise missing_statistics(self.train, self.channels)
        self.pretrained_cfg = {**published, "input_size": (self.channels, *size[1:])}
        self.train_transform = partial(image_only, train_transform(data, self.pretrained_cfg))
        self.eval_transform = partial(image_only, eval_transform(data, self.pretrained_cfg))
        self.normalize = Normalizer(input_config(data, self.pretrained_cfg), self.world.device)
        return model

    def open_train(self) -> Any:
        train, data = super().open_train(), self.recipe.data
        if data.decoder == "torchcodec":
            if not hasattr(train, "decode"):
                raise UserError(
                    f"data.decoder=torchcodec: data.source={data.source} decodes no image files; use data.decoder=pil"
                )
            require_decoder()
            train.decode = read_pixels
        return train

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.forward(model, batch)[2]}

    def forward(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The images as the model saw them, its logits, and their loss, which is the mean over several classifiers."""
        images, targets = self.to_device(batch)
        late = self.recipe.data.aug.erase_after_mixing
        if self.erasing and not late:
            images = self.erasing(images)
        if self.mixing:
            images, targets = self.mixing(images, targets)
        if self.erasing and late:
            images = self.erasing(images)
        if self.recipe.task.probe == "linear":
            model.eval()  # the frozen part must not update batch statistics or drop paths
        with batch_norm_errors(len(images), "raise data.micro_batch (data.batch) or data.size"):
            outputs = model(images)
        # a model may have several classifiers in training; the first is the one that is evaluated
        logits = [one.float() for one in (outputs if isinstance(outputs, tuple) else (outputs,))]
        return images, logits[0], torch.stack([self.criterion(one, targets) for one in logits]).mean()

    def example(self) -> tuple[Any, ...]:
        size = self.recipe.data.size
        return (torch.zeros(1, self.channels, size, size, device=self.world.device),)

    def export(self, model: nn.Module, path: Path, state: Mapping[str, Any]) -> None:
        config = input_config(self.recipe.data, self.pretrained_cfg)
        facts = {"background": self.recipe.data.background, **self.export_facts()}
        export_classifier(model, path, classes=self.classes, data_config=config, state=state, facts=facts)

    def export_facts(self) -> dict[str, Any]:
        """What the config of the export says beyond the model, its classes and its input, as JSON data."""
        return {}

    def to_device(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalized images and the targets of a batch, on the device."""
        images = self.normalize(batch[0].to(self.world.device, non_blocking=True))
        images = images.contiguous(memory_format=memory_format(self.recipe.parallel))
        return images, batch[1].to(self.world.device, non_blocking=True)


class ClassifyTask(ClassifierTask[Classify]):
    """One class per image."""

    def __init__(self, recipe: Recipe[Classify, ClassifyData], world: World):
        check_name(recipe.task.distill.teacher, "task.distill.teacher")
        super().__init__(recipe, world)
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixing else recipe.task.smoothing)
        if recipe.task.loss == "bce":
            self.criterion = BinaryCrossEntropy(smoothing=recipe.task.smoothing)
        self.teacher: Teacher | None = None

    def train_batches(self, plan: Plan, step: int) -> Loader:
        data, distill = self.recipe.data, self.recipe.task.distill
        if distill.teacher:
            config = input_config(data, self.pretrained_cfg)
            device = self.world.device
            with self.world.raise_on_all_ranks():
                self.teacher = Teacher(distill, classes=self.classes, size=data.size, config=config, device=device)
        return super().train_batches(plan, step)

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        images, logits, loss = self.forward(model, batch)
        if self.teacher is None:
            return {"loss": loss}
        weight = self.recipe.task.distill.weight
        return {"label_loss": (1 - weight) * loss, "distill_loss": weight * self.teacher.loss(images, logits)}

    def metrics(self, *, keep: bool = False) -> ClassificationMetrics:
        return ClassificationMetrics(self.world, self.to_device, classes=len(self.classes), keep=keep)


def build_classifier(recipe: Recipe[Any, Any], num_classes: int) -> nn.Module:
    """The recipe's model with a new classifier. Raises UserError if timm cannot create it."""
    options, size = recipe.model, recipe.data.size
    if reserved := next(iter(options.kwargs.keys() & RESERVED_KWARGS.keys()), None):
        raise UserError(f"model.kwargs does not take {reserved}: {RESERVED_KWARGS[reserved]}; remove it")
    kwargs: dict[str, Any] = {"drop_path_rate": options.drop_path_rate, **options.arguments}
    if options.in_chans:
        kwargs["in_chans"] = options.in_chans
    model = create_model(
        options.name, size, key="model.name", pretrained=bool(options.pretrained), num_classes=num_classes, **kwargs
    )
    if options.init_from:
        load_initial_weights(model, options, size)
    task = recipe.task
    return freeze_for_probe(model, task.probe, task.probing, size) if task.probe else model


def load(path: Path) -> nn.Module:
    """The classifier in the folder `RUN/export`, in evaluation mode on the CPU."""
    return create_model(f"local-dir:{path}", 0, key="the export", pretrained=True, num_classes=None).eval()
