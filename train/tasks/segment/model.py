"""The segmenter: a backbone with a neck and heads, built from the sections of a recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ....checkpoints import read_state
from ....zoo.dense import DenseBackbone, prefix_patterns
from ...errors import UserError
from ...heads.mask_classifier import MaskClassifier
from ...recipe.schema import Dense, Model, Recipe
from ..dense_backbone import build_backbone, check_backbone, load_initial_backbone
from ..models import check_name
from .head_checks import FeatureSpec, memory_format_of
from .heads import NUM_STAGES, HeadConfig, build_head, build_neck, required_levels
from .options import SegmentOptions

HEAD_PREFIXES = ("neck.", "decode_head.", "auxiliary_head.")


class Segmenter(nn.Module):
    """Images [B, 3, H, W] to logits [B, classes, H, W]; with masks [B, H, W], to a dict of losses.

    A mask-classification head gives scores in the place of logits: probabilities that do not sum to 1.

    Parameters are named as in mmsegmentation: backbone, neck, decode_head, auxiliary_head.
    """

    def __init__(
        self,
        backbone: DenseBackbone,
        decode_head: nn.Module,
        *,
        neck: nn.Module | None = None,
        auxiliary_head: nn.Module | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        if neck is not None:
            self.neck = neck
        self.decode_head = decode_head
        if auxiliary_head is not None:
            self.auxiliary_head = auxiliary_head
        self.pretrained_cfg = backbone.pretrained_cfg
        self.classes: list[str] = []
        self.palette: list[list[int]] = []

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Any:
        features = self.forward_features(images)
        if masks is None:
            head: Any = self.decode_head
            return head.predict(features, [{"img_shape": images.shape[-2:]}], None)
        samples = [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=mask[None])) for mask in masks]
        losses = {}
        for name in ("decode", "auxiliary"):
            if (head := getattr(self, f"{name}_head", None)) is not None:
                found = head.loss(features, samples, None)
                losses |= {f"{name}.{key}": value.squeeze() for key, value in found.items()}
        return losses

    def forward_features(self, images: Tensor) -> list[Tensor | None]:
        """The feature maps that the heads read, [B, C, H / stride, W / stride] each.

        Without a neck there are four, one for each stage; None for a stage that no head reads.
        """
        features: list[Tensor | None] = [None] * NUM_STAGES
        for level, feature in zip(self.backbone.out_indices, self.backbone(images), strict=True):
            features[level] = feature
        return list(self.neck(features)) if hasattr(self, "neck") else features

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the backbone only: mmsegmentation's heads cause graph breaks."""
        self.backbone.compile(*args, **kwargs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups of the backbone, with the prefix `backbone.`; the heads belong to the last group."""
        groups = self.backbone.group_matcher(coarse=coarse)
        return {key: prefix_patterns(spec, "backbone.") for key, spec in groups.items()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides biases and one-dimensional ones."""
        names = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        if isinstance(self.decode_head, MaskClassifier):
            names |= {f"decode_head.{name}" for name in self.decode_head.no_weight_decay()}
        return names

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights of a published segmenter, with mmsegmentation's names for heads and the paper's for the
        backbone.

        Raises ValueError naming weights that are missing, unknown or of another shape.
        """
        heads = {key.removeprefix("module."): tensor for key, tensor in self.backbone.load_published(state).items()}
        own = {key: tensor for key, tensor in self.state_dict().items() if key.startswith(HEAD_PREFIXES)}
        if unknown := sorted(heads.keys() - own.keys()):
            raise ValueError(f"it has {len(unknown)} weights that the model does not have: {', '.join(unknown[:5])}")
        if missing := sorted(own.keys() - heads.keys()):
            raise ValueError(f"it lacks {len(missing)} weights of the model: {', '.join(missing[:5])}")
        for key, tensor in heads.items():
            if tensor.shape != own[key].shape:
                raise ValueError(f"{key} has the shape {list(tensor.shape)}, in the model {list(own[key].shape)}")
        self.load_state_dict(self.state_dict() | heads)


def build_segmenter(
    model: Model,
    segment: SegmentOptions,
    *,
    dense: Dense,
    classes: Sequence[str],
    size: int | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> Segmenter:
    """The segmenter of a recipe's sections. Raises UserError for what cannot be built or, on `size` pixels, trained.

    layout: the memory format of images in training. A head that cannot read the maps that follow is refused too.

    Stages that no head reads are not built, because DDP stops at parameters without a gradient.
    """
    if unknown := sorted(segment.class_weight.keys() - set(classes)):
        raise UserError(
            f"task.segment.class_weight names {', '.join(unknown)}, but the classes of the data are "
            f"{', '.join(classes[:12])}{', ...' * (len(classes) > 12)}"
        )
    class_weight = [segment.class_weight.get(name, 1.0) for name in classes] if segment.class_weight else None
    configs = {"decode_head": segment.decode_head, "auxiliary_head": segment.auxiliary_head}
    heads = {name: HeadConfig(name, config) for name, config in configs.items() if config}
    levels = required_levels(heads.values(), segment.neck)
    check_name(model.name)
    backbone = build_backbone(model, dense, levels)
    features: Sequence[FeatureSpec | None] = feature_specs(backbone, model, size, layout)
    neck = None
    if segment.neck:
        neck, features = build_neck(segment.neck, features, heads.values())
    average = segment.avg_non_ignore
    modules = {
        name: build_head(head, features, len(classes), class_weight, size, average) for name, head in heads.items()
    }
    return Segmenter(backbone, modules.pop("decode_head"), neck=neck, **modules)


def feature_specs(
    backbone: DenseBackbone, model: Model, size: int | None, layout: torch.memory_format
) -> list[FeatureSpec | None]:
    """The specs of the feature maps of the four stages; None for a stage that the backbone does not return.

    With `size`, the backbone is run on an image of this side. Raises UserError if it does not accept it.
    """
    specs: list[FeatureSpec | None] = [None] * NUM_STAGES
    for level, channels, stride in zip(backbone.out_indices, backbone.channels, backbone.strides, strict=True):
        specs[level] = FeatureSpec(channels, stride)
    if size is not None:
        remedy = (
            "for a model with a fixed input size, set model.kwargs.strict_img_size=false or model.kwargs.img_size="
            f"{size}, or data.size to its size; else use another model"
        )
        maps = check_backbone(backbone, model, (size, size), remedy)
        for level, stride, found in zip(backbone.out_indices, backbone.strides, maps, strict=True):
            specs[level] = FeatureSpec(
                found.shape[1], stride, memory_format_of(found) if layout == torch.contiguous_format else layout
            )
    return specs


def load_initial_weights(segmenter: Segmenter, recipe: Recipe) -> None:
    """Load the weights that the recipe names: of a classifier, an exported model, or a published segmenter."""
    model, published = recipe.model, recipe.task.segment.load_from
    check_name(model.init_from, "model.init_from")
    load_initial_backbone(segmenter.backbone, model, recipe.data.size)
    if published:
        try:
            segmenter.load_published(read_state(Path(published)))
        except (ValueError, OSError) as error:
            raise UserError(
                f"task.segment.load_from={published} does not fit model.name={model.name} and its heads: {error}"
            ) from error
