"""DiNAT_s: dilated neighborhood attention in the layout of Swin.

Hassani, Shi, 2022, arXiv 2209.15001: sec. 3.3, table 3. Released code: github.com/SHI-Labs/
Neighborhood-Attention-Transformer (MIT); its checkpoints load. It has the blocks of `zoo.dinat`, but a stem of patches
of 4 x 4 pixels and patch merging between the stages.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..blocks import block
from ..blocks.linear import apply_linear
from ..blocks.padding import PadToMultiple, pad_to_multiple
from ._backbone import Backbone, BackboneParts
from ._family import Family
from ._keymap import KeyRule
from ._registry import register
from .dinat import DiNATConfig
from .nat import dense_norm, make_parts, norm, shared_keys

__all__ = ["DiNATs"]


class DiNATs(Backbone):
    """The blocks of DiNAT between Swin's patch embedding and patch merging."""


VARIANTS = {
    "dinat_s_atto": DiNATConfig(
        (24, 48, 72, 96), (2, 1, 1, 1), (3, 6, 9, 6), kernel_size=3, dilations=((1, 2), (1,), (1,), (1,))
    ),
    "dinat_s_tiny": DiNATConfig((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24), mlp_ratio=4.0),
    "dinat_s_small": DiNATConfig((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24), mlp_ratio=4.0),
    "dinat_s_base": DiNATConfig((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32), mlp_ratio=4.0),
    "dinat_s_large": DiNATConfig((192, 384, 768, 1536), (2, 2, 18, 2), (6, 12, 24, 48), mlp_ratio=4.0),
    "dinat_s_large_384": DiNATConfig(
        (192, 384, 768, 1536), (2, 2, 18, 2), (6, 12, 24, 48), mlp_ratio=4.0, dilations=((1, 13), (1, 6), (1, 3), (1,))
    ),
}


@register_notrace_module
class PatchMerging(nn.Module):
    """LayerNorm and linear layer of 2x2 patches: `[B, in_chs, H, W] -> [B, out_chs, ceil(H / 2), ceil(W / 2)]`.

    Odd sides are padded with a row or column of zeros first.
    """

    def __init__(self, in_chs: int, out_chs: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_chs, eps=1e-5)
        self.reduction = nn.Linear(4 * in_chs, out_chs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x.permute(0, 2, 3, 1), 2, 2)
        patches = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return apply_linear(self.reduction, self.norm(patches)).permute(0, 3, 1, 2)


def stem(in_chans: int, dim: int) -> nn.Module:
    return block(pad=PadToMultiple(4), conv=nn.Conv2d(in_chans, dim, 4, 4), norm=norm(dim))


def build(cfg: DiNATConfig, **arguments: Any) -> BackboneParts:
    return make_parts(cfg, dilations=cfg.dilations, stem=stem, down=PatchMerging, **arguments)


def key_mapping(cfg: DiNATConfig) -> Sequence[KeyRule]:
    return [
        KeyRule("patch_embed.proj.{p}", "stem.conv.{p}"),
        KeyRule("layers.{s}.downsample.norm.{p}", "stages.{s+1}.down.norm.{p}"),
        KeyRule("layers.{s}.downsample.reduction.{p}", "stages.{s+1}.down.reduction.{p}"),
        *shared_keys("layers"),
    ]


register(
    Family(
        DiNATs,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv", "paper_ids": "arXiv:2209.15001"},
        dense_norm=dense_norm,
    ),
    __name__,
)
