"""Dilated Neighborhood Attention Transformer.

Hassani, Shi, 2022, arXiv 2209.15001: sec. 3, table 2. Released code: github.com/SHI-Labs/
Neighborhood-Attention-Transformer (MIT); its checkpoints load. It is `zoo.nat` with dilated windows in every second
block, and its deviations apply here too. The small model has no layer scale, unlike NAT's.

Weights do not depend on the dilations: those of the classifiers cover a map of the image size they are trained with,
the dense-prediction models have others, which are in the recipes.
"""

from dataclasses import dataclass
from typing import Any

from ._backbone import Backbone, BackboneParts
from ._family import Family
from ._registry import register
from .nat import NATConfig, dense_norm, down, key_mapping, make_parts, stem

__all__ = ["DiNAT", "DiNATConfig"]

# the dilations of images of 224 pixels
D_224 = ((1, 8), (1, 4), (1, 2), (1,))


@dataclass(frozen=True)
class DiNATConfig(NATConfig):
    """Columns of table 2 of the paper; `dilations` are, for each stage, those that its blocks have in turn."""

    dilations: tuple[tuple[int, ...], ...] = D_224


class DiNAT(Backbone):
    """Neighborhood attention without and with dilation in turn."""


VARIANTS = {
    "dinat_atto": DiNATConfig(
        (16, 32, 64, 96), (1, 2, 2, 1), (2, 4, 8, 6), kernel_size=3, dilations=((1,), (1, 2), (1, 2), (1,))
    ),
    "dinat_mini": DiNATConfig((64, 128, 256, 512), (3, 4, 6, 5), (2, 4, 8, 16), mlp_ratio=3.0),
    "dinat_tiny": DiNATConfig((64, 128, 256, 512), (3, 4, 18, 5), (2, 4, 8, 16), mlp_ratio=3.0),
    "dinat_small": DiNATConfig((96, 192, 384, 768), (3, 4, 18, 5), (3, 6, 12, 24)),
    "dinat_base": DiNATConfig((128, 256, 512, 1024), (3, 4, 18, 5), (4, 8, 16, 32), layer_scale=1e-5),
    "dinat_large": DiNATConfig((192, 384, 768, 1536), (3, 4, 18, 5), (6, 12, 24, 48)),
    "dinat_large_384": DiNATConfig(
        (192, 384, 768, 1536), (3, 4, 18, 5), (6, 12, 24, 48), dilations=((1, 13), (1, 6), (1, 3), (1,))
    ),
}


def build(cfg: DiNATConfig, **arguments: Any) -> BackboneParts:
    return make_parts(cfg, dilations=cfg.dilations, stem=stem, down=down, **arguments)


register(
    Family(
        DiNAT,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv1", "paper_ids": "arXiv:2209.15001"},
        dense_norm=dense_norm,
    ),
    __name__,
)
