"""Mask classification as a decode head: each class that is in an image is one object, whose mask is learned."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...data.segmentation import IGNORE_INDEX
from ...errors import UserError
from ...heads.library import parse_options
from ...heads.mask_classifier import MaskClassifier, mask2former_parts
from ...heads.mask_inference import semantic_scores
from ...heads.mask_loss import MaskLoss, MaskTarget
from ...heads.mask_options import Mask2FormerOptions, MaskOptions, PemOptions
from ...heads.pem import pem_parts
from .head_checks import FeatureSpec, FeatureSpecs


class MaskHead(MaskClassifier):
    """A mask classifier with the methods of mmsegmentation's heads, which the segmenter calls."""

    def __init__(self, pixel_decoder: nn.Module, decoder: nn.Module, *, width: int, classes: int, criterion: MaskLoss):
        super().__init__(pixel_decoder, decoder, width=width, classes=classes)
        self.criterion = criterion

    def predict(self, features: Sequence[Tensor], metas: Sequence[Mapping[str, Any]], test_cfg: Any) -> Tensor:
        """The scores [B, classes, H, W] of each pixel, see `semantic_scores`."""
        return semantic_scores(self(features), metas[0]["img_shape"])

    def loss(self, features: Sequence[Tensor], samples: Sequence[Any], train_cfg: Any) -> dict[str, Tensor]:
        """The losses for the masks `gt_sem_seg.data` [1, H, W] of the samples."""
        targets = [semantic_target(sample.gt_sem_seg.data[0]) for sample in samples]
        return self.criterion(self(features), targets)


def semantic_target(mask: Tensor) -> MaskTarget:
    """The classes in a mask [H, W], each with its pixels. Pixels with IGNORE_INDEX are in none."""
    labels = mask.unique()
    labels = labels[labels != IGNORE_INDEX]
    return MaskTarget(labels.long(), mask == labels[:, None, None])


def build_mask2former_head(key: str, kwargs: Mapping[str, Any], features: FeatureSpecs, classes: int) -> MaskHead:
    options, specs = parse_options(Mask2FormerOptions, kwargs, key), four_maps(f"{key}.type=Mask2Former", features)
    channels, strides = zip(*((spec.channels, spec.stride) for spec in specs), strict=True)
    parts = mask2former_parts(options, classes, channels, strides)
    return MaskHead(*parts, width=options.hidden_dim, classes=classes, criterion=MaskLoss(options, classes))


def build_pem_head(key: str, kwargs: Mapping[str, Any], features: FeatureSpecs, classes: int) -> MaskHead:
    options, specs = parse_options(PemOptions, kwargs, key), four_maps(f"{key}.type=PEM", features)
    if options.hidden_dim % options.num_attention_heads:
        raise UserError(
            f"{key}: num_attention_heads={options.num_attention_heads} do not divide hidden_dim={options.hidden_dim}"
        )
    parts = pem_parts(options, [spec.channels for spec in specs])
    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(MaskOptions)}
    criterion = MaskLoss(Mask2FormerOptions(**shared), classes)
    return MaskHead(*parts, width=options.hidden_dim, classes=classes, criterion=criterion)


def four_maps(key: str, features: FeatureSpecs) -> list[FeatureSpec]:
    """The specs of the maps. Raises UserError if there are not four."""
    specs = [spec for spec in features if spec is not None]
    if len(specs) != 4:
        raise UserError(f"{key} reads four maps, but there are {len(specs)}")
    return specs


# decode heads that are not of mmsegmentation -> functions (key, config without type, specs of the maps, classes)
MASK_HEADS: dict[str, Callable[[str, Mapping[str, Any], FeatureSpecs, int], MaskHead]] = {
    "Mask2Former": build_mask2former_head,
    "PEM": build_pem_head,
}
