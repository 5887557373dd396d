"""What a model takes from another: weights to begin with, frozen features to probe, a teacher to imitate."""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import timm
import torch
from safetensors import SafetensorError
from timm.layers import AttentionPoolLatent
from timm.models import build_model_with_cfg, register_model
from timm.task import DistillationTeacher
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError, one_line
from .schema import Distill, Model

# what timm raises for names and arguments it can't use, and with these what it raises for files that hold no weights
MISFITS = (AssertionError, LookupError, RuntimeError, TypeError, ValueError)
GARBAGE = (AttributeError, BadZipFile, EOFError, OSError, SafetensorError, UnpicklingError, struct.error)
REFUSALS = (*MISFITS, *GARBAGE)


def create(name: str, size: int, *, key: str, pretrained: bool, num_classes: int | None, **options: Any) -> Any:
    """timm.create_model, told the input size where the model needs it. Raises UserError with why not, in a line.

    key: of the recipe, that names the model; num_classes: None keeps the classifier of the pretrained weights.
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        known = timm.models.get_pretrained_cfg(name) if ":" not in name else None
        if known is not None and known.fixed_input_size:
            options.setdefault("img_size", size)
        return timm.create_model(name, pretrained=pretrained, **options)
    except REFUSALS as error:
        hint = "; local-dir: takes the export/ of a classifier" if name.startswith("local-dir:") else ""
        reason = one_line(error) + hint
        raise UserError(f"{key}={name} with {options} and pretrained={pretrained}: {reason}") from error


@contextmanager
def first_forward(culprit: str, image: Tensor) -> Iterator[None]:
    """Turn what a model raises within, given an `image: [3, H, W]` that it does not take, into one UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except MISFITS as error:
        size = " x ".join(map(str, image.shape))
        raise UserError(
            f"{culprit} does not take {size} images ({one_line(error)}); change data.size, the model or its kwargs"
        ) from error


def begin_with(model: Any, wanted: Model, size: int) -> None:
    """Give `model` the weights of `wanted.init_from`; its classifier too, where that has as many classes."""
    source = create(str(wanted.init_from), size, key="model.init_from", pretrained=True, num_classes=model.num_classes)
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"model.init_from={wanted.init_from} does not fit model.name={wanted.name}: {reason}; "
            "take a model with the same parameters"
        ) from error


def probe(model: Any, kind: str) -> nn.Module:
    """`model` frozen, all but its classifier, or behind it a new one with attention pooling (kind "attentive")."""
    if kind == "attentive":
        classes, body = model.num_classes, model
        body.reset_classifier(0)
        options = getattr(body, "_model_args", {})
        known = {key: value for key, value in options.items() if key not in ("num_classes", "in_chans")}
        architecture = body.pretrained_cfg["architecture"]
        model = timm.create_model(
            "attentive_probe", backbone=architecture, backbone_args=known, num_classes=classes, cfg=body.pretrained_cfg
        )
        model._model_args.pop("cfg")  # only for the first construction: an export has a configuration of its own
        model.backbone.load_state_dict(body.state_dict())
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)  # of classes and of distillation, in some
    trained = {parameter for head in heads for parameter in head.parameters()}
    trained |= set(model.pool.parameters()) if kind == "attentive" else set()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
    return model


class AttentiveProbe(nn.Module):
    """Logits of a learned query's cross-attention over the last feature map of `backbone`.

    The pooling is timm's `AttentionPoolLatent`: attention of one latent token, a projection and an MLP.
    """

    def __init__(self, *, backbone: str, backbone_args: dict[str, Any], num_classes: int, in_chans: int = 3):
        super().__init__()
        self.backbone: Any = timm.create_model(backbone, num_classes=0, in_chans=in_chans, **backbone_args)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.backbone.num_features
        heads = math.gcd(self.num_features, 8)
        self.pool = AttentionPoolLatent(self.num_features, num_heads=heads, norm_layer=nn.LayerNorm)
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> [B, num_classes]"""
        x = self.backbone.forward_features(x)
        if x.ndim == 4:  # to tokens: [B, tokens, channels]
            last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            x = x.flatten(1, 2) if last else x.flatten(2).transpose(1, 2)
        return self.fc(self.pool(x))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing to do: a frozen backbone keeps no activations."""


@register_model
def attentive_probe(pretrained: bool = False, cfg: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """An `AttentiveProbe`; `cfg` is the configuration of its backbone's input, where no export brings one."""
    if cfg is not None:
        own = {"classifier": "fc", "architecture": "attentive_probe", "url": ""}
        # a fixed size is for the backbone, whose arguments have it
        kwargs["pretrained_cfg"] = {**cfg, **own, "fixed_input_size": False}
    return build_model_with_cfg(AttentiveProbe, "attentive_probe", pretrained, **kwargs)


class Teacher:
    """A model that is imitated: `loss` of the student's logits, held against its own for the same images."""

    def __init__(self, distill: Distill, *, classes: list[str], size: int, config: dict[str, Any], device: Any):
        """classes, config: the student's class names and its input's mean and std."""
        self.distill, name = distill, str(distill.teacher)
        model = create(name, size, key="task.distill.teacher", pretrained=True, num_classes=None)
        named = model.pretrained_cfg.get("label_names")
        if model.num_classes != len(classes) or (named and list(named) != classes):
            raise UserError(
                f"task.distill.teacher={name} tells {model.num_classes} classes apart, the data has {len(classes)}; "
                "a teacher needs the same classes in the same order"
            )
        self.model = DistillationTeacher(model.requires_grad_(False)).to(device).eval()
        image = torch.zeros(3, size, size, device=device)
        with first_forward(f"task.distill.teacher={name}", image), torch.no_grad():
            self.model(image[None])
        self.mean, self.std = (torch.tensor(config[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))

    def loss(self, images: Tensor, logits: Tensor) -> Tensor:
        """images: [B, 3, H, W] as the student saw them; logits: [B, classes].

        soft: T^2 KL(teacher || student) at temperature T (Hinton et al., arXiv 1503.02531); hard: cross entropy with
        the teacher's class (DeiT, arXiv 2012.12877, section 4).
        """
        with torch.no_grad():
            target = self.model(self.model.normalize_input(images, self.mean, self.std)).float()
        if self.distill.kind == "hard":
            return F.cross_entropy(logits, target.argmax(1))
        t = self.distill.temperature
        log_student, log_teacher = (F.log_softmax(x / t, dim=1) for x in (logits, target))
        return t**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
