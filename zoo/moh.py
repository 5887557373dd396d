"""MoH: Multi-Head Attention as Mixture-of-Head Attention.

Jin, Zhu, Yuan, Yan, arXiv 2410.11842: TransNeXt whose heads are weighted for each position, some of them by zero.
Released code: github.com/SkyworkAI/MoH, folder MoH-ViT (Apache-2.0); its checkpoints load.

All heads are computed: the share of active heads in a model's name is a count, not a saving of time.

Deviations from the released code:
- Its models take square images of one size. Here they take any, as the models of TransNeXt.
- Its loss of balance is kept for all models of the process together; here each model has its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..blocks import MixtureOfHeads
from ._backbone import Backbone, BackboneParts
from ._family import Family
from ._keymap import KeyRule
from ._registry import register
from .transnext import TransNeXtConfig, mixer, transnext, transnext_keys

__all__ = ["MoHViT", "MoHViTConfig"]


@dataclass(frozen=True)
class MoHViTConfig(TransNeXtConfig):
    """shared: heads of each stage that always count. routed: how many of the others count for a position."""

    shared: tuple[int, ...] = (3, 6, 3, 4)
    routed: tuple[int, ...] = (0, 0, 6, 12)


class MoHViT(Backbone):
    """TransNeXt with a mixture of heads in every block."""


SMALL = (72, 144, 288, 576), (5, 5, 22, 5), (3, 6, 12, 24)
BASE = (96, 192, 384, 768), (5, 5, 23, 5), (4, 8, 16, 32)
SMALL_75 = MoHViTConfig(*SMALL, shared=(3, 6, 3, 4), routed=(0, 0, 6, 12))

VARIANTS = {
    "moh_vit_atto": MoHViTConfig(
        (24, 24, 48, 96), (1, 1, 2, 1), (1, 2, 4, 6), shared=(1, 2, 1, 2), routed=(0, 0, 2, 2)
    ),
    "moh_vit_s": SMALL_75,
    "moh_vit_s_75": SMALL_75,
    "moh_vit_s_80": MoHViTConfig(*SMALL, shared=(3, 6, 3, 8), routed=(0, 0, 6, 12)),
    "moh_vit_b_75": MoHViTConfig(*BASE, shared=(4, 8, 4, 5), routed=(0, 0, 8, 16)),
    "moh_vit_b_50": MoHViTConfig(*BASE, shared=(2, 2, 2, 4), routed=(2, 4, 6, 8)),
}


def build(cfg: MoHViTConfig, **arguments: Any) -> BackboneParts:
    def mixture(stage: int) -> nn.Module:
        shared, routed = cfg.shared[stage], cfg.routed[stage]
        return MixtureOfHeads(cfg.dims[stage], attention=mixer(cfg, stage), shared=shared, routed=routed)

    return transnext(cfg, mixture, **arguments)


def key_mapping(cfg: MoHViTConfig) -> Sequence[KeyRule]:
    published, ours = "block{s+1}.{b}.attn.", "stages.{s}.blocks.{b}.mixer.fn."
    layers = {"wg": "gates.routed_router", "wg_0": "gates.group_router", "wg_1": "gates.shared_router", "proj": "proj"}
    return [
        *(KeyRule(f"{published}{theirs}.{{p}}", f"{ours}{name}.{{p}}") for theirs, name in layers.items()),
        *transnext_keys(cfg, "mixer.fn.attention."),
    ]


register(
    Family(
        MoHViT,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv", "paper_ids": "arXiv:2410.11842"},
    ),
    __name__,
)
