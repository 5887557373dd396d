"""From the classes and masks of queries to a prediction at the size of an image."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .mask_classifier import MaskOutputs


def upsampled(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Mask logits [..., Q, h, w] in float32, resized to [..., Q, *size]."""
    single = masks.dim() == 3
    found = F.interpolate(masks[None] if single else masks, tuple(size), mode="bilinear", align_corners=False)
    return found[0].float() if single else found.float()


def semantic_scores(outputs: MaskOutputs, size: Sequence[int]) -> Tensor:
    """Scores [B, classes, *size] of each pixel: the sum over queries of class probability times mask probability.

    Mask2Former, section 3.1 of MaskFormer (arXiv 2107.06278): "no object" is left out, so scores do not sum to 1.
    """
    classes = outputs.classes[-1].float().softmax(-1)[..., :-1]
    # one image after the other, since all masks of a batch at full size would fill the memory
    return torch.stack(
        [
            torch.einsum("qc,qhw->chw", one, upsampled(masks, size).sigmoid())
            for one, masks in zip(classes, outputs.masks[-1], strict=True)
        ]
    )
