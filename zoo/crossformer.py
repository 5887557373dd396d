"""CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention, and CrossFormer++.

Wang et al., ICLR 2022, arXiv 2108.00154: sec. 3 (cross-scale embedding, long short distance attention, dynamic
position bias), table 1. CrossFormer++: Wang et al., TPAMI 2023, arXiv 2303.06908 (progressive group sizes, activation
cooling layers). Released code: github.com/cheerss/CrossFormer (MIT); its checkpoints load.

Deviations: the released models need sides that are multiples of 32; here the image is zero-padded to multiples of 4 and
an odd map before merging by one row or column. Maps are grouped as in the released dense-prediction models of 2023
(main branch), which have no extra norms. Those of 2021 let a long-distance group span the whole map; at 224 both give
the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from timm.layers import ClassifierHead, LayerNorm2d, trunc_normal_
from torch import nn

from ..blocks import CrossScale, LongShortDistance, Mlp, Residual, block, depthwise, drop_path_rates
from ..blocks.padding import PadToMultiple
from ._backbone import Backbone, BackboneParts, Stage
from ._family import Family
from ._keymap import KeyRule
from ._registry import register

__all__ = ["CrossFormer", "CrossFormerConfig"]


@dataclass(frozen=True)
class CrossFormerConfig:
    """Columns of table 1 of the paper.

    groups, intervals: of each stage; they may be changed without changing weights.
    cooling: whether every third block ends with an activation cooling layer, unless it is the last of its stage.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    groups: tuple[int, ...] = (7, 7, 7, 7)
    intervals: tuple[int, ...] = (8, 4, 2, 1)
    cooling: bool = False
    mlp_ratio: float = 4.0


class CrossFormer(Backbone):
    """Alternating blocks of short and long distance attention."""


plus = partial(CrossFormerConfig, groups=(4, 4, 14, 7), intervals=(4, 2, 1, 1), cooling=True)

VARIANTS = {
    "crossformer_atto": CrossFormerConfig(
        (64, 64, 64, 96), (2, 1, 4, 1), (4, 4, 4, 6), groups=(4, 4, 2, 2), intervals=(4, 2, 2, 1), cooling=True
    ),
    "crossformer_tiny": CrossFormerConfig((64, 128, 256, 512), (1, 1, 8, 6), (2, 4, 8, 16)),
    "crossformer_small": CrossFormerConfig((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24)),
    "crossformer_base": CrossFormerConfig((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24)),
    "crossformer_large": CrossFormerConfig((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32)),
    "crossformer_pp_small": plus((64, 128, 256, 512), (2, 2, 18, 2), (2, 4, 8, 16)),
    "crossformer_pp_base": plus((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24)),
    "crossformer_pp_large": plus((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32)),
    "crossformer_pp_huge": plus((128, 256, 512, 1024), (6, 6, 18, 2), (4, 8, 16, 32)),
}

norm = partial(LayerNorm2d, eps=1e-5)


def cross_block(cfg: CrossFormerConfig, stage: int, number: int, drop_path: float) -> nn.Sequential:
    """Block `number` of a stage, from 0: even ones have short distance attention, odd ones long distance attention."""
    dim = cfg.dims[stage]
    mixer = LongShortDistance(
        dim,
        num_heads=cfg.num_heads[stage],
        group=cfg.groups[stage],
        interval=cfg.intervals[stage] if number % 2 else 1,
    )
    branches: dict[str, nn.Module] = {
        "mixer": Residual(mixer, norm=norm(dim), drop_path=drop_path),
        "mlp": Residual(Mlp(dim, ratio=cfg.mlp_ratio), norm=norm(dim), drop_path=drop_path),
    }
    if cfg.cooling and number % 3 == 2 and number != cfg.depths[stage] - 1:
        # without a shortcut, so that the activations of the blocks before it do not add up
        branches["cooling"] = block(conv=depthwise(dim, kernel=3), norm=norm(dim))
    return block(**branches)


def build(
    cfg: CrossFormerConfig,
    *,
    in_chans: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    drop_path_rate: float,
) -> BackboneParts:
    rates = drop_path_rates(drop_path_rate, cfg.depths)
    stages = []
    for i, dim in enumerate(cfg.dims):
        blocks = [cross_block(cfg, i, number, rate) for number, rate in enumerate(rates[i])]
        down = None
        if i:
            previous = cfg.dims[i - 1]
            merge = CrossScale(previous, dim, kernels=(2, 4), stride=2)
            down = block(norm=norm(previous), pad=PadToMultiple(2), conv=merge)
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down))
    embed = CrossScale(in_chans, cfg.dims[0], kernels=(4, 8, 16, 32), stride=4)
    return BackboneParts(
        stem=block(pad=PadToMultiple(4), conv=embed, norm=norm(cfg.dims[0])),
        stages=stages,
        norm=norm(cfg.dims[-1]),
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def key_mapping(cfg: CrossFormerConfig) -> Sequence[KeyRule]:
    published, ours = "layers.{s}.blocks.{b}.", "stages.{s}.blocks.{b}."
    bias = ours + "mixer.fn.position."
    return [
        KeyRule("patch_embed.projs.{i}.{p}", "stem.conv.convs.{i}.{p}"),
        KeyRule("patch_embed.norm.{p}", "stem.norm.{p}"),
        KeyRule("layers.{s}.downsample.norm.{p}", "stages.{s+1}.down.norm.{p}"),
        KeyRule("layers.{s}.downsample.reductions.{i}.{p}", "stages.{s+1}.down.conv.convs.{i}.{p}"),
        KeyRule(published + "norm1.{p}", ours + "mixer.norm.{p}"),
        KeyRule(published + "attn.qkv.{p}", ours + "mixer.fn.qkv.{p}"),
        KeyRule(published + "attn.proj.{p}", ours + "mixer.fn.proj.{p}"),
        KeyRule(published + "attn.pos.pos_proj.{p}", bias + "embed.{p}"),
        KeyRule(published + "attn.pos.pos{n+1}.0.{p}", bias + "layers.{n}.norm.{p}"),
        KeyRule(published + "attn.pos.pos{n+1}.2.{p}", bias + "layers.{n}.fc.{p}"),
        # offsets of the position bias and their indices, which the code of 2021 stores
        KeyRule(published + "attn.biases", None),
        KeyRule(published + "attn.relative_position_index", None),
        KeyRule(published + "norm2.{p}", ours + "mlp.norm.{p}"),
        KeyRule(published + "mlp.fc{n}.{p}", ours + "mlp.fn.fc{n}.{p}"),
        KeyRule(published + "ex_conv.{p}", ours + "cooling.conv.{p}"),
        KeyRule(published + "ex_ln.{p}", ours + "cooling.norm.{p}"),
        KeyRule("norm.{p}", "norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]


register(
    Family(
        CrossFormer,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={
            "first_conv": tuple(f"stem.conv.convs.{i}" for i in range(4)),
            "paper_ids": "arXiv:2108.00154",
        },
    ),
    __name__,
)
