"""timm's augmentation policies under a current Pillow."""

from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp


def allow_zero_bits(transform: Any) -> None:
    """Let the posterize operations in a pipeline of timm keep 0 bits per channel, which makes the image black.

    RandAugment's strongest posterize keeps 0 bits (Cubuk et al., arXiv 1909.13719, in the implementation that published
    recipes use). Pillow 13 raises ValueError for it, and timm passes the number on; see docs/upstream.md. Changes the
    operations of this pipeline only.
    """
    for operation in operations(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize


def operations(transform: Any) -> Iterator[AugmentOp]:
    """The operations of RandAugment, AutoAugment, AugMix and 3-Augment, anywhere in a pipeline."""
    if isinstance(transform, AugmentOp):
        yield transform
    elif isinstance(transform, list | tuple):
        for part in transform:
            yield from operations(part)
    else:
        for parts in ("transforms", "ops", "policy"):
            yield from operations(getattr(transform, parts, ()))


def posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """`image` with the highest `bits` of 8 bits per channel; black for 0. kwargs: what timm passes to any operation."""
    if bits <= 0:
        return image.point([0] * 256 * len(image.getbands()))
    return image if bits >= 8 else ImageOps.posterize(image, bits)
