"""Mask classification as a decode head: each class that is in an image is one object, whose mask is learned."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...data.segmentation import IGNORE_INDEX
from ...errors import UserError
from ...heads.library import parse_options
from ...heads.mask_classifier import MaskClassifier, mask2former_config, mask2former_parts
from ...heads.mask_inference import semantic_scores
from ...heads.mask_loss import MaskLoss, MaskTarget
from ...heads.mask_options import Mask2FormerOptions
from .head_checks import FeatureSpecs


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
    options = parse_options(Mask2FormerOptions, kwargs, key)
    specs = [spec for spec in features if spec is not None]
    if len(specs) != 4:
        raise UserError(f"{key}.type=Mask2Former reads four maps, but there are {len(specs)}")
    config = mask2former_config(options, classes, [spec.stride for spec in specs])
    parts = mask2former_parts(config, [spec.channels for spec in specs])
    return MaskHead(*parts, width=options.hidden_dim, classes=classes, criterion=MaskLoss(options, classes))


# decode heads that are not of mmsegmentation -> functions (key, config without type, specs of the maps, classes)
MASK_HEADS: dict[str, Callable[[str, Mapping[str, Any], FeatureSpecs, int], MaskHead]] = {
    "Mask2Former": build_mask2former_head
}
