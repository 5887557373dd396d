"""BiFormer: Vision Transformer with Bi-Level Routing Attention.

Zhu, Wang, Ke, Zhang, Lau, CVPR 2023, arXiv 2303.08810: sec. 3.2 (routing), 3.3 (architecture), table 1. Released code:
github.com/rayleizhu/BiFormer (MIT); its checkpoints load.

Deviation: the released classifiers fail if `n_win` does not divide the sides of a feature map; here maps are padded, as
in the released dense-prediction models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from timm.layers import ClassifierHead, LayerNorm2d, trunc_normal_
from torch import nn

from ..blocks import BiLevelRouting, FullAttention, Mlp, Residual, block, conv_norm, drop_path_rates
from ._backbone import Backbone, BackboneParts, Stage
from ._family import DenseNorm, Family
from ._keymap import KeyRule
from ._registry import register

__all__ = ["BiFormer", "BiFormerConfig"]


@dataclass(frozen=True)
class BiFormerConfig:
    """Columns of table 1 of the paper.

    num_heads, topk: of stages 1-3; stage 4 has full attention with `full_heads` heads.
    n_win: regions per side of the feature map.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    topk: tuple[int, ...] = (1, 4, 16)
    n_win: int = 7
    mlp_ratio: float = 3.0
    full_heads: int = 8


class BiFormer(Backbone):
    """Bi-level routing attention in stages 1-3 and full attention in stage 4."""


VARIANTS = {
    "biformer_atto": BiFormerConfig((16, 32, 64, 128), (1, 1, 2, 1), (1, 2, 4), topk=(1, 4, 8), n_win=4),
    "biformer_tiny": BiFormerConfig((64, 128, 256, 512), (2, 2, 8, 2), (2, 4, 8)),
    "biformer_small": BiFormerConfig((64, 128, 256, 512), (4, 4, 18, 4), (2, 4, 8)),
    "biformer_base": BiFormerConfig((96, 192, 384, 768), (4, 4, 18, 4), (3, 6, 12)),
}

norm = partial(LayerNorm2d, eps=1e-6)


def depthwise(dim: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)


def mixer(cfg: BiFormerConfig, stage: int) -> nn.Module:
    dim = cfg.dims[stage]
    if stage < 3:
        return BiLevelRouting(dim, num_heads=cfg.num_heads[stage], n_win=cfg.n_win, topk=cfg.topk[stage])
    return FullAttention(dim, num_heads=cfg.full_heads, qkv_bias=False, local=depthwise(dim, 5))


def build(
    cfg: BiFormerConfig, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> BackboneParts:
    rates = drop_path_rates(drop_path_rate, cfg.depths)
    stages = []
    for i, dim in enumerate(cfg.dims):
        blocks = [
            block(
                pos=Residual(depthwise(dim, 3)),
                mixer=Residual(mixer(cfg, i), norm=norm(dim), drop_path=rate),
                mlp=Residual(Mlp(dim, ratio=cfg.mlp_ratio), norm=norm(dim), drop_path=rate),
            )
            for rate in rates[i]
        ]
        down = conv_norm(cfg.dims[i - 1], dim, kernel=3, stride=2) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down))
    return BackboneParts(
        stem=nn.Sequential(
            conv_norm(in_chans, cfg.dims[0] // 2, kernel=3, stride=2),
            nn.GELU(),
            conv_norm(cfg.dims[0] // 2, cfg.dims[0], kernel=3, stride=2),
        ),
        stages=stages,
        norm=nn.BatchNorm2d(cfg.dims[-1]),
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def key_mapping(cfg: BiFormerConfig) -> Sequence[KeyRule]:
    published, ours = "stages.{s}.{b}.", "stages.{s}.blocks.{b}."
    return [
        # stage 4 has full attention, with other names
        KeyRule("stages.3.{b}.attn.qkv.weight", "stages.3.blocks.{b}.mixer.fn.qkv.weight"),
        KeyRule("stages.3.{b}.attn.proj.{p}", "stages.3.blocks.{b}.mixer.fn.proj.{p}"),
        KeyRule("stages.3.{b}.attn.lepe.{p}", "stages.3.blocks.{b}.mixer.fn.local.{p}"),
        KeyRule("downsample_layers.0.0.{p}", "stem.0.conv.{p}"),
        KeyRule("downsample_layers.0.1.{p}", "stem.0.norm.{p}"),
        KeyRule("downsample_layers.0.3.{p}", "stem.2.conv.{p}"),
        KeyRule("downsample_layers.0.4.{p}", "stem.2.norm.{p}"),
        KeyRule("downsample_layers.{s}.0.{p}", "stages.{s}.down.conv.{p}"),
        KeyRule("downsample_layers.{s}.1.{p}", "stages.{s}.down.norm.{p}"),
        KeyRule(published + "pos_embed.{p}", ours + "pos.fn.{p}"),
        KeyRule(published + "norm1.{p}", ours + "mixer.norm.{p}"),
        KeyRule(published + "attn.qkv.qkv.{p}", ours + "mixer.fn.qkv.{p}"),
        KeyRule(published + "attn.wo.{p}", ours + "mixer.fn.proj.{p}"),
        KeyRule(published + "attn.lepe.{p}", ours + "mixer.fn.lepe.{p}"),
        KeyRule(published + "norm2.{p}", ours + "mlp.norm.{p}"),
        KeyRule(published + "mlp.0.{p}", ours + "mlp.fn.fc1.{p}"),
        KeyRule(published + "mlp.3.{p}", ours + "mlp.fn.fc2.{p}"),
        KeyRule("norm.{p}", "norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]


register(
    Family(
        BiFormer,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.0.conv", "paper_ids": "arXiv:2303.08810"},
        dense_norm=DenseNorm(norm, "extra_norms.{s}.{p}"),
    ),
    __name__,
)
