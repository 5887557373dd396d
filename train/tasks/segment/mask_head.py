"""Mask classification as a decode head: each class that is in an image is one object, whose mask is learned."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...data.segmentation import IGNORE_INDEX
from ...errors import UserError
from ...heads.mask_classifier import MaskClassifier, MaskOutputs
from ...heads.mask_inference import semantic_scores
from ...heads.mask_kinds import mask2former, pem
from ...heads.mask_loss import MaskLoss, MaskTarget
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
        return losses(self.criterion, self(features), samples)


@torch.compiler.disable(reason="it would be compiled again for each new number of classes in an image")
def losses(criterion: MaskLoss, outputs: MaskOutputs, samples: Sequence[Any]) -> dict[str, Tensor]:
    """The losses of `outputs` for the masks of the samples, as `MaskHead.loss` returns them."""
    return criterion(outputs, [semantic_target(sample.gt_sem_seg.data[0]) for sample in samples])


def semantic_target(mask: Tensor) -> MaskTarget:
    """The classes in a mask [H, W], each with its pixels. Pixels with IGNORE_INDEX are in none."""
    labels = mask.unique()
    labels = labels[labels != IGNORE_INDEX]
    return MaskTarget(labels.long(), mask == labels[:, None, None])


def build_mask_head(kind: str, key: str, kwargs: Mapping[str, Any], features: FeatureSpecs, classes: int) -> MaskHead:
    """kind: of MASK_HEADS; kwargs: config without its type. Raises UserError naming `key` if it cannot be built."""
    if "in_index" in kwargs:
        raise UserError(f"{key} has no option in_index: {kind} reads all four maps; remove it")
    specs = four_maps(f"{key}.type={kind}", features)
    channels, strides = zip(*((spec.channels, spec.stride) for spec in specs), strict=True)
    pixel_decoder, decoder, width, criterion = MASK_HEADS[kind](
        kwargs, key, channels=channels, strides=strides, classes=classes
    )
    return MaskHead(pixel_decoder, decoder, width=width, classes=classes, criterion=criterion)


def four_maps(key: str, features: FeatureSpecs) -> list[FeatureSpec]:
    """The specs of the maps. Raises UserError if there are not four."""
    specs = [spec for spec in features if spec is not None]
    if len(specs) != 4:
        raise UserError(f"{key} reads four maps, but there are {len(specs)}")
    return specs


# decode heads that are not of mmsegmentation
MASK_HEADS = {"Mask2Former": mask2former, "PEM": pem}
