"""VAN: Visual Attention Network.

Guo, Lu, Liu, Cheng, Hu, Computational Visual Media 2023, arXiv 2202.09741: sec. 3.1 (large-kernel attention), 3.2 and
table 2 (architectures). Released code: github.com/Visual-Attention-Network/VAN-Classification (Apache-2.0); its
checkpoints load, and so do those that OpenMMLab converted.

The released classifiers have `norm_eps` 1e-6, the released segmenters and OpenMMLab's models 1e-5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from timm.layers import ClassifierHead, LayerNorm2d, LayerScale2d, trunc_normal_
from torch import nn

from ..blocks import DepthwiseMlp, LargeKernel, Residual, block, conv_norm, drop_path_rates
from ._backbone import Backbone, BackboneParts, Stage
from ._convolution import AS_LINEAR, initialize_grouped_conv
from ._family import Family
from ._keymap import KeyRule
from ._registry import register

__all__ = ["VAN", "VANConfig"]


@dataclass(frozen=True)
class VANConfig:
    """Columns of table 2 of the paper. norm_eps: of the norm at the end of each stage."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    norm_eps: float = 1e-6


class VAN(Backbone):
    """Large-kernel attention and convolutional MLPs."""


VARIANTS = {
    "van_atto": VANConfig((16, 32, 48, 64), (1, 1, 2, 1)),
    "van_b0": VANConfig((32, 64, 160, 256), (3, 3, 5, 2)),
    "van_b1": VANConfig((64, 128, 320, 512), (2, 2, 4, 2)),
    "van_b2": VANConfig((64, 128, 320, 512), (3, 3, 12, 3)),
    "van_b3": VANConfig((64, 128, 320, 512), (3, 5, 27, 3)),
    "van_b4": VANConfig((64, 128, 320, 512), (3, 6, 40, 3)),
    "van_b5": VANConfig((96, 192, 480, 768), (3, 3, 24, 3)),
    "van_b6": VANConfig((96, 192, 384, 768), (6, 6, 90, 6)),
}


def branch(fn: nn.Module, dim: int, drop_path: float) -> Residual:
    """`x + drop_path(scale * fn(batch_norm(x)))` with a scale per channel."""
    return Residual(block(fn=fn, scale=LayerScale2d(dim, 0.01)), norm=nn.BatchNorm2d(dim), drop_path=drop_path)


def build(
    cfg: VANConfig, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> BackboneParts:
    norm = partial(LayerNorm2d, eps=cfg.norm_eps)
    rates = drop_path_rates(drop_path_rate, cfg.depths)
    stages = []
    for i, dim in enumerate(cfg.dims):
        blocks = [
            block(
                mixer=branch(LargeKernel(dim), dim, rate),
                mlp=branch(DepthwiseMlp(dim, ratio=cfg.mlp_ratios[i]), dim, rate),
            )
            for rate in rates[i]
        ]
        down = conv_norm(cfg.dims[i - 1], dim, kernel=3, stride=2) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down, norm=norm(dim)))
    return BackboneParts(
        stem=conv_norm(in_chans, cfg.dims[0], kernel=7, stride=4),
        stages=stages,
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        initialize_grouped_conv(module)
    elif isinstance(module, LargeKernel | DepthwiseMlp):
        # linear layers that are 1x1 convolutions in the published code
        for layer in module.children():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.out_features))


def key_mapping(cfg: VANConfig) -> Sequence[KeyRule]:
    return layout()


def openmmlab_key_mapping(cfg: VANConfig) -> Sequence[KeyRule]:
    """Rules for the checkpoints that OpenMMLab converted."""
    return layout(
        prefix="backbone.",
        embed="projection",
        blocks="blocks",
        local="DW_conv",
        dilated="DW_D_conv",
        dwconv="dwconv",
        head="head.fc",
    )


def layout(
    *,
    prefix: str = "",
    embed: str = "proj",
    blocks: str = "block",
    local: str = "conv0",
    dilated: str = "conv_spatial",
    dwconv: str = "dwconv.dwconv",
    head: str = "head",
) -> list[KeyRule]:
    """The rules, for a layout with these names."""
    published, ours = f"{prefix}{blocks}{{s+1}}.{{b}}.", "stages.{s}.blocks.{b}."
    gate = "attn.spatial_gating_unit."
    linear = {"attn.proj_1": "mixer.fn.fn.proj_in", "attn.proj_2": "mixer.fn.fn.proj_out"}
    linear |= {gate + "conv1": "mixer.fn.fn.pointwise", "mlp.fc1": "mlp.fn.fn.fc1", "mlp.fc2": "mlp.fn.fn.fc2"}
    plain = {gate + local: "mixer.fn.fn.local", gate + dilated: "mixer.fn.fn.dilated"}
    plain |= {f"mlp.{dwconv}": "mlp.fn.fn.dwconv", "norm1": "mixer.norm", "norm2": "mlp.norm"}
    return [
        KeyRule(f"{prefix}patch_embed1.{embed}.{{p}}", "stem.conv.{p}"),
        KeyRule(f"{prefix}patch_embed1.norm.{{p}}", "stem.norm.{p}"),
        KeyRule(f"{prefix}patch_embed{{s+1}}.{embed}.{{p}}", "stages.{s}.down.conv.{p}"),
        KeyRule(f"{prefix}patch_embed{{s+1}}.norm.{{p}}", "stages.{s}.down.norm.{p}"),
        KeyRule(f"{published}layer_scale_1", f"{ours}mixer.fn.scale.gamma"),
        KeyRule(f"{published}layer_scale_2", f"{ours}mlp.fn.scale.gamma"),
        *(KeyRule(f"{published}{a}.{{p}}", f"{ours}{b}.{{p}}", AS_LINEAR) for a, b in linear.items()),
        *(KeyRule(f"{published}{a}.{{p}}", f"{ours}{b}.{{p}}") for a, b in plain.items()),
        KeyRule(f"{prefix}norm{{s+1}}.{{p}}", "stages.{s}.norm.{p}"),
        KeyRule(f"{head}.{{p}}", "head.fc.{p}"),
    ]


register(
    Family(
        VAN,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={
            "first_conv": "stem.conv",
            "paper_ids": "arXiv:2202.09741",
            "crop_pct": 0.9,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        other_key_mappings=(openmmlab_key_mapping,),
    ),
    __name__,
)
