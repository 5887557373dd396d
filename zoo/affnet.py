"""AFFNet: Adaptive Frequency Filters As Efficient Global Token Mixers.

Huang, Zhang, Lan, Zha, Lu, Guo, ICCV 2023, arXiv 2307.14008: sec. 3.2 and 3.3 (the filter), 3.4 (architecture).
Released code: github.com/microsoft/TokenMixers (MIT, derived from Apple's CVNets); its checkpoints load. Activations,
norms and the order of layers in a block follow that code with the configuration of AFFNet-ET; the paper's figures show
neither the shortcuts inside a block nor its last norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import ClassifierHead, GroupNorm1, trunc_normal_
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn

from ..blocks import AdaptiveFrequencyFilter, Residual, block, drop_path_rates
from ._backbone import Backbone, BackboneParts, Stage
from ._convolution import ConvNormAct, FinalConvHead, initialize_conv
from ._family import Family
from ._keymap import KeyRule
from ._registry import register

__all__ = ["AFFNet", "AFFNetConfig"]


@dataclass(frozen=True)
class AFFNetConfig:
    """Columns of the table of models in the released code.

    stem: widths of the first convolution and of the inverted residual after it; dims: widths of the four stages.
    depths: number of inverted residuals in stage 1, of inner blocks in the other stages.
    expansion: of the inverted residuals; mlp_ratio: of the channel mixers.
    head_ratio: width of the head over that of the last stage; max_head_width: its upper bound.
    output_stride: 16 or 8 instead of 32 removes the stride of the last one or two stages, for dense prediction.
    """

    stem: tuple[int, int]
    dims: tuple[int, ...]
    expansion: float = 4.0
    depths: tuple[int, ...] = (3, 2, 4, 3)
    mlp_ratio: float = 2.0
    num_groups: int = 8
    head_ratio: int = 4
    max_head_width: int = 960
    output_stride: int = 32

    def __post_init__(self):
        if self.output_stride not in (8, 16, 32):
            raise ValueError(f"AFFNet: output_stride={self.output_stride} must be 8, 16 or 32")
        if not len(self.dims) == len(self.depths) == 4 or min(self.depths) < 1:
            raise ValueError(f"AFFNet: dims={self.dims} and depths={self.depths} must have four positive entries each")


class AFFNet(Backbone):
    """Inverted residuals, and adaptive frequency filters in stages 2-4."""


VARIANTS = {
    "affnet_atto": AFFNetConfig((8, 16), (24, 32, 48, 64), expansion=2.0, depths=(2, 1, 2, 1)),
    "affnet_extra_tiny": AFFNetConfig((16, 32), (48, 64, 104, 144), expansion=2.0),
    "affnet_tiny": AFFNetConfig((16, 32), (48, 96, 160, 192)),
    "affnet_base": AFFNetConfig((16, 32), (64, 128, 256, 320)),
}


def inverted_residual(in_chs: int, out_chs: int, *, expansion: float, **options) -> InvertedResidual:
    """MobileNetV2's inverted residual; it has a shortcut if input and output have one shape."""
    return InvertedResidual(in_chs, out_chs, exp_ratio=expansion, act_layer=nn.SiLU, **options)


class Fusion(nn.Module):
    """`fusion(concat(x, proj(norm(blocks(x)))))`: `[B, C, H, W] -> [B, C, H, W]`; both convolutions are 1x1."""

    def __init__(self, dim: int, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.norm = GroupNorm1(dim)
        self.proj = ConvNormAct(dim, dim)
        self.fusion = ConvNormAct(2 * dim, dim, act="silu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fusion(torch.cat([x, self.proj(self.norm(self.blocks(x)))], 1))


def inner_block(cfg: AFFNetConfig, dim: int, *, drop_path: float) -> Residual:
    """`x + token_mixer(norm2(mlp(norm1(x))))`; each of both mixers also has a shortcut from its normalized input."""
    branch = block(
        norm1=GroupNorm1(dim),
        mlp=inverted_residual(dim, dim, expansion=cfg.mlp_ratio),
        norm2=GroupNorm1(dim),
        mixer=Residual(AdaptiveFrequencyFilter(dim, num_groups=cfg.num_groups)),
    )
    return Residual(branch, drop_path=drop_path)


def build(
    cfg: AFFNetConfig, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> BackboneParts:
    # the first inverted residual of stage 1 is its downsampling
    rates = drop_path_rates(drop_path_rate, (cfg.depths[0] - 1, *cfg.depths[1:]))
    stages, in_chs, stride, dilation = [], cfg.stem[1], 2, 1
    for i, dim in enumerate(cfg.dims):
        step = 2 if stride < cfg.output_stride else 1
        down = inverted_residual(in_chs, dim, expansion=cfg.expansion, stride=step, dilation=dilation)
        if i == 0:
            blocks = [inverted_residual(dim, dim, expansion=cfg.expansion, drop_path_rate=rate) for rate in rates[i]]
        else:
            blocks = [Fusion(dim, [inner_block(cfg, dim, drop_path=rate) for rate in rates[i]])]
        stages.append(Stage(blocks, dim=dim, stride=step, down=down))
        # for each omitted stride the later downsampling convolutions are dilated
        in_chs, stride, dilation = dim, stride * step, dilation * 2 // step
    width = min(cfg.head_ratio * in_chs, cfg.max_head_width)
    if num_classes or global_pool:
        head = FinalConvHead(in_chs, width, num_classes, act="silu", pool_type=global_pool, drop_rate=drop_rate)
    else:
        head = ClassifierHead(in_chs, num_classes, pool_type=global_pool, drop_rate=drop_rate)
    return BackboneParts(
        stem=block(
            conv=ConvNormAct(in_chans, cfg.stem[0], kernel=3, stride=2, act="silu"),
            block=inverted_residual(cfg.stem[0], cfg.stem[1], expansion=cfg.expansion),
        ),
        stages=stages,
        head=head,
        stem_stride=2,
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        initialize_conv(module)
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def conv_norm_rules(published: str, ours: str) -> list[KeyRule]:
    return [
        KeyRule(published + "block.conv.{p}", ours + "conv.{p}"),
        KeyRule(published + "block.norm.{p}", ours + "norm.{p}"),
    ]


def inverted_residual_rules(published: str, ours: str) -> list[KeyRule]:
    rules = []
    for layer, conv, norm in (
        ("exp_1x1", "conv_pw", "bn1"),
        ("conv_3x3", "conv_dw", "bn2"),
        ("red_1x1", "conv_pwl", "bn3"),
    ):
        rules += [
            KeyRule(f"{published}block.{layer}.block.conv.{{p}}", f"{ours}{conv}.{{p}}"),
            KeyRule(f"{published}block.{layer}.block.norm.{{p}}", f"{ours}{norm}.{{p}}"),
        ]
    return rules


def key_mapping(cfg: AFFNetConfig) -> Sequence[KeyRule]:
    published, ours = "layer_{s+2}.1.", "stages.{s}.blocks.0."
    inner, our_inner = published + "global_rep.{b}.", ours + "blocks.{b}.fn."
    return [
        *conv_norm_rules("conv_1.", "stem.conv."),
        *inverted_residual_rules("layer_1.0.", "stem.block."),
        *inverted_residual_rules("layer_{s+2}.0.", "stages.{s}.down."),
        *inverted_residual_rules("layer_2.{b+1}.", "stages.0.blocks.{b}."),
        *inverted_residual_rules(inner + "mlp.", our_inner + "mlp."),
        KeyRule(inner + "norm1.{p}", our_inner + "norm1.{p}"),
        KeyRule(inner + "norm2.{p}", our_inner + "norm2.{p}"),
        KeyRule(inner + "filter.{p}", our_inner + "mixer.fn.{p}"),
        # the norm of a stage is numbered after its inner blocks
        *(
            KeyRule(f"layer_{s + 2}.1.global_rep.{cfg.depths[s]}.{{p}}", f"stages.{s}.blocks.0.norm.{{p}}")
            for s in range(1, len(cfg.dims))
        ),
        *conv_norm_rules(published + "conv_proj.", ours + "proj."),
        *conv_norm_rules(published + "fusion.", ours + "fusion."),
        *conv_norm_rules("conv_1x1_exp.", "head.final_conv."),
        KeyRule("classifier.fc.{p}", "head.fc.{p}"),
    ]


register(
    Family(
        AFFNet,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={
            "first_conv": "stem.conv.conv",
            "crop_pct": 0.8888,
            "interpolation": "bilinear",
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "paper_ids": "arXiv:2307.14008",
        },
    ),
    __name__,
)
