"""BiFormer: Vision Transformer with Bi-Level Routing Attention.

Zhu, Wang, Ke, Zhang, Lau, CVPR 2023, arXiv 2303.08810: sec. 3.2 (routing), 3.3 (architecture), table 1 and the released
code github.com/rayleizhu/BiFormer (MIT), whose keys and weights these models share.

Deviation: the released classifiers refuse maps that `n_win` does not divide; here they are padded by the rule of the
released dense-prediction models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from timm.layers import ClassifierHead, LayerNorm2d, trunc_normal_
from torch import nn

from ..blocks import BiLevelRouting, FullAttention, Mlp, Residual, block, conv_norm, drop_path_rates
from ._backbone import Parts, Stage
from ._keymap import Rule
from ._registry import DenseNorm, Family, register


@dataclass(frozen=True)
class BiFormer:
    """Columns of the paper's architecture table; `num_heads` and `topk` of stages 1-3, stage 4 attends to all."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    topk: tuple[int, ...] = (1, 4, 16)
    n_win: int = 7
    mlp_ratio: float = 3.0
    full_heads: int = 8


VARIANTS = {
    "biformer_atto": BiFormer((16, 32, 64, 128), (1, 1, 2, 1), (1, 2, 4), topk=(1, 4, 8), n_win=4),
    "biformer_tiny": BiFormer((64, 128, 256, 512), (2, 2, 8, 2), (2, 4, 8)),
    "biformer_small": BiFormer((64, 128, 256, 512), (4, 4, 18, 4), (2, 4, 8)),
    "biformer_base": BiFormer((96, 192, 384, 768), (4, 4, 18, 4), (3, 6, 12)),
}

norm = partial(LayerNorm2d, eps=1e-6)


def depthwise(dim: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)


def mixer(row: BiFormer, stage: int) -> nn.Module:
    dim = row.dims[stage]
    if stage < 3:
        return BiLevelRouting(dim, num_heads=row.num_heads[stage], n_win=row.n_win, topk=row.topk[stage])
    return FullAttention(dim, num_heads=row.full_heads, qkv_bias=False, local=depthwise(dim, 5))


def build(
    row: BiFormer, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> Parts:
    rates = drop_path_rates(drop_path_rate, row.depths)
    stages = []
    for i, dim in enumerate(row.dims):
        blocks = [
            block(
                pos=Residual(depthwise(dim, 3)),
                mixer=Residual(mixer(row, i), norm=norm(dim), drop_path=rate),
                mlp=Residual(Mlp(dim, ratio=row.mlp_ratio), norm=norm(dim), drop_path=rate),
            )
            for rate in rates[i]
        ]
        down = conv_norm(row.dims[i - 1], dim, kernel=3, stride=2) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down))
    return Parts(
        stem=nn.Sequential(
            conv_norm(in_chans, row.dims[0] // 2, kernel=3, stride=2),
            nn.GELU(),
            conv_norm(row.dims[0] // 2, row.dims[0], kernel=3, stride=2),
        ),
        stages=stages,
        norm=nn.BatchNorm2d(row.dims[-1]),
        head=ClassifierHead(row.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        init=initialise,
    )


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def keys(row: BiFormer) -> Sequence[Rule]:
    theirs, ours = "stages.{s}.{b}.", "stages.{s}.blocks.{b}."
    return [
        # full attention in stage 4, whose parts have other names
        Rule("stages.3.{b}.attn.qkv.weight", "stages.3.blocks.{b}.mixer.fn.qkv.weight"),
        Rule("stages.3.{b}.attn.proj.{p}", "stages.3.blocks.{b}.mixer.fn.proj.{p}"),
        Rule("stages.3.{b}.attn.lepe.{p}", "stages.3.blocks.{b}.mixer.fn.local.{p}"),
        Rule("downsample_layers.0.0.{p}", "stem.0.conv.{p}"),
        Rule("downsample_layers.0.1.{p}", "stem.0.norm.{p}"),
        Rule("downsample_layers.0.3.{p}", "stem.2.conv.{p}"),
        Rule("downsample_layers.0.4.{p}", "stem.2.norm.{p}"),
        Rule("downsample_layers.{s}.0.{p}", "stages.{s}.down.conv.{p}"),
        Rule("downsample_layers.{s}.1.{p}", "stages.{s}.down.norm.{p}"),
        Rule(theirs + "pos_embed.{p}", ours + "pos.fn.{p}"),
        Rule(theirs + "norm1.{p}", ours + "mixer.norm.{p}"),
        Rule(theirs + "attn.qkv.qkv.{p}", ours + "mixer.fn.qkv.{p}"),
        Rule(theirs + "attn.wo.{p}", ours + "mixer.fn.proj.{p}"),
        Rule(theirs + "attn.lepe.{p}", ours + "mixer.fn.lepe.{p}"),
        Rule(theirs + "norm2.{p}", ours + "mlp.norm.{p}"),
        Rule(theirs + "mlp.0.{p}", ours + "mlp.fn.fc1.{p}"),
        Rule(theirs + "mlp.3.{p}", ours + "mlp.fn.fc2.{p}"),
        Rule("norm.{p}", "norm.{p}"),
        Rule("head.{p}", "head.fc.{p}"),
    ]


register(
    Family(
        VARIANTS,
        build,
        keys,
        cfg={"first_conv": "stem.0.conv", "paper_ids": "arXiv:2303.08810"},
        dense=DenseNorm(norm, "extra_norms.{s}.{p}"),
    ),
    __name__,
)
