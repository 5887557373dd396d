"""Probing: training a classifier on the features of a frozen model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import AttentionPoolLatent
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from ....blocks import POOLINGS
from ...errors import UserError, one_line
from .options import Probing


def freeze_for_probe(model: Any, kind: str, probing: Probing | None = None, size: int = 224) -> nn.Module:
    """`model` frozen except for its classifier ("linear"), or for a new one with attention pooling (other kinds).

    size: side of the images. Raises UserError for what the probe cannot be built of.
    """
    if kind != "linear":
        model = _with_pooling(model, kind, probing or Probing(), size)
    classifier = model.get_classifier()
    # some models have a second classifier for distillation
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    trained = {parameter for head in heads for parameter in head.parameters()}
    trained |= set(model.pool.parameters()) if kind != "linear" else set()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
    return model


def _with_pooling(body: Any, kind: str, probing: Probing, size: int) -> Any:
    """A probe of `body` with its number of classes, in the place of its classifier."""
    classes = body.num_classes
    body.reset_classifier(0)
    options = getattr(body, "_model_args", {})
    known = {key: value for key, value in options.items() if key not in ("num_classes", "in_chans")}
    given: dict[str, Any] = {"in_chans": options["in_chans"]} if "in_chans" in options else {}
    name = "attentive_probe"
    if kind != "attentive":
        name = "attentive_probe_pooling"
        given |= {"pooling": kind, "pooling_args": dict(probing.kwargs), "size": size}
        given |= {"maps": probing.maps and list(probing.maps), "class_tokens": probing.class_tokens}
    try:
        model: Any = timm.create_model(
            name,
            backbone=body.pretrained_cfg["architecture"],
            backbone_args=known,
            num_classes=classes,
            cfg=body.pretrained_cfg,
            **given,
        )
    except (TypeError, ValueError, AttributeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"task.probe={kind} cannot be built with task.probing.maps={given.get('maps')} and "
            f"task.probing.kwargs={dict(probing.kwargs)}: {one_line(error)}"
        ) from error
    model._model_args.pop("cfg")  # an export brings its own configuration
    model.backbone.load_state_dict(body.state_dict())
    return model


class Probe(nn.Module):
    """Base of the probes: a frozen `backbone`, which stays in evaluation mode, and the classifier `fc`."""

    fc: nn.Module

    def __init__(self, backbone: str, backbone_args: dict[str, Any], num_classes: int, in_chans: int):
        super().__init__()
        self.backbone: Any = timm.create_model(backbone, num_classes=0, in_chans=in_chans, **backbone_args).eval()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.backbone.num_features

    def train(self, mode: bool = True) -> "Probe":
        super().train(mode)
        self.backbone.eval()  # it must not update batch statistics or drop paths
        return self

    def get_classifier(self) -> nn.Module:
        return self.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing to do: a frozen backbone keeps no activations."""


class AttentiveProbe(Probe):
    """Logits of a learned query's cross-attention over the last feature map of `backbone`.

    The pooling is timm's `AttentionPoolLatent`: attention of one latent token, a projection and an MLP.
    """

    def __init__(self, *, backbone: str, backbone_args: dict[str, Any], num_classes: int, in_chans: int = 3):
        super().__init__(backbone, backbone_args, num_classes, in_chans)
        heads = math.gcd(self.num_features, 8)
        self.pool = AttentionPoolLatent(self.num_features, num_heads=heads, norm_layer=nn.LayerNorm)
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> [B, num_classes]"""
        x = self.backbone.forward_features(x)
        if x.ndim == 4:  # to tokens: [B, tokens, channels]
            x = _channels_first(self.backbone, x).flatten(2).transpose(1, 2)
        return self.fc(self.pool(x))


class PoolingProbe(Probe):
    """Logits of attentive poolings of feature maps: pooling, batch norm without weights, and a linear layer.

    The head of Psomas et al. (arXiv 2506.10178); the pooled vectors of several maps are concatenated. pooling: a name
    in `blocks.POOLINGS`, with its arguments `pooling_args`. maps: what `forward_intermediates` of the backbone takes as
    `indices`; None: the output of `forward_features`. class_tokens: the mean of the class tokens is a token too. size:
    side of the images in training; others may be of another size. Raises ValueError for a backbone without class
    tokens.
    """

    def __init__(
        self,
        *,
        backbone: str,
        backbone_args: dict[str, Any],
        num_classes: int,
        pooling: str,
        size: int,
        pooling_args: Mapping[str, Any] | None = None,
        maps: Sequence[int] | None = None,
        class_tokens: bool = False,
        in_chans: int = 3,
    ):
        super().__init__(backbone, backbone_args, num_classes, in_chans)
        self.maps, self.class_tokens = maps and list(maps), class_tokens
        with torch.no_grad():
            features = self.features(torch.zeros(1, in_chans, size, size))
        self.pool = nn.ModuleList()
        for x, prefix in features:
            if class_tokens and prefix is None:
                raise ValueError(f"{backbone} has no class token; set task.probing.class_tokens=false")
            options = {"grid": tuple(x.shape[2:]), "prefix": int(class_tokens)} if pooling == "clip" else {}
            self.pool.append(POOLINGS[pooling](x.shape[1], **options, **(pooling_args or {})))
        self.num_features = self.head_hidden_size = sum(pool.width for pool in self.pool)  # type: ignore[misc]
        self.norm = nn.BatchNorm1d(self.num_features, eps=1e-6, affine=False)
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> [B, num_classes]"""
        pooled = [pool(*feature) for pool, feature in zip(self.pool, self.features(x), strict=True)]
        return self.fc(self.norm(torch.cat(pooled, dim=1)))

    def attention(self, x: Tensor) -> list[Tensor]:
        """How much each query takes from each position: [B, queries, h, w] for each map that is read."""
        return [pool.weights(*feature) for pool, feature in zip(self.pool, self.features(x), strict=True)]  # type: ignore[operator]

    def features(self, x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """The maps [B, C, h, w] that are read, each with the class token [B, 1, C], or None if it is not read."""
        if self.maps is None:
            maps = [_as_map(self.backbone, self.backbone.forward_features(x))]
        else:
            options = {"return_prefix_tokens": True} if self.class_tokens else {}
            found = self.backbone.forward_intermediates(x, indices=self.maps, intermediates_only=True, **options)
            maps = [one if isinstance(one, tuple) else (one, None) for one in found]
        return [
            (one, prefix.mean(1, keepdim=True) if self.class_tokens and prefix is not None else None)
            for one, prefix in maps
        ]


def _channels_first(backbone: nn.Module, x: Tensor) -> Tensor:
    """The map [B, C, h, w] of a map in the layout of the backbone's own."""
    return x.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else x


def _as_map(backbone: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The map [B, C, h, w] and the class tokens [B, P, C] of the output of `forward_features`."""
    if x.ndim == 4:
        return _channels_first(backbone, x), None
    tokens = x.shape[1]
    # models that do not tell the number of their class tokens have those that are left of a square map
    first = getattr(backbone, "num_prefix_tokens", tokens - math.isqrt(tokens) ** 2)
    rows = math.isqrt(tokens - first)
    if rows**2 != tokens - first:
        rows = 1
    return x[:, first:].transpose(1, 2).unflatten(2, (rows, -1)), x[:, :first] if first else None


@register_model
def attentive_probe(pretrained: bool = False, cfg: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """An `AttentiveProbe`; `cfg` is the configuration of its backbone's input, where no export brings one."""
    return _build(AttentiveProbe, "attentive_probe", pretrained, cfg, kwargs)


@register_model
def attentive_probe_pooling(pretrained: bool = False, cfg: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """A `PoolingProbe`; `cfg` is the configuration of its backbone's input, where no export brings one."""
    return _build(PoolingProbe, "attentive_probe_pooling", pretrained, cfg, kwargs)


def _build(kind: type, name: str, pretrained: bool, cfg: dict[str, Any] | None, kwargs: dict[str, Any]) -> nn.Module:
    if cfg is not None:
        own = {"classifier": "fc", "architecture": name, "url": ""}
        # a fixed size is for the backbone, whose arguments have it
        kwargs["pretrained_cfg"] = {**cfg, **own, "fixed_input_size": False}
    return build_model_with_cfg(kind, name, pretrained, **kwargs)
