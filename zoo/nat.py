"""Neighborhood Attention Transformer.

Hassani, Walton, Li, Li, Shi, CVPR 2023, arXiv 2204.07143: sec. 3, table 2. Released code: github.com/SHI-Labs/
Neighborhood-Attention-Transformer (MIT); its checkpoints load. Layer scales are those of the code, which the weights
belong to.

Maps that are smaller than the window are padded, as in the release of the operator that the weights were trained with
(NATTEN 0.14); later releases refuse them. The norms of the dense-prediction models are in `zoo.dense.DenseBackbone`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.layers import ClassifierHead, LayerNorm2d, LayerScale2d, trunc_normal_
from torch import nn

from ..blocks import Mlp, NeighborhoodAttention, Residual, block, drop_path_rates
from ._backbone import Backbone, BackboneParts, Stage
from ._family import DenseNorm, Family
from ._keymap import KeyRule
from ._registry import register

__all__ = ["NAT", "NATConfig"]


@dataclass(frozen=True)
class NATConfig:
    """Columns of table 2 of the paper; `layer_scale` is the initial value, None for no layer scale."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: float = 2.0
    layer_scale: float | None = None
    kernel_size: int = 7


class NAT(Backbone):
    """Neighborhood attention in all blocks."""


VARIANTS = {
    "nat_atto": NATConfig((16, 32, 64, 96), (1, 1, 2, 1), (2, 4, 8, 6), layer_scale=0.5, kernel_size=5),
    "nat_mini": NATConfig((64, 128, 256, 512), (3, 4, 6, 5), (2, 4, 8, 16), mlp_ratio=3.0),
    "nat_tiny": NATConfig((64, 128, 256, 512), (3, 4, 18, 5), (2, 4, 8, 16), mlp_ratio=3.0),
    "nat_small": NATConfig((96, 192, 384, 768), (3, 4, 18, 5), (3, 6, 12, 24), layer_scale=1e-5),
    "nat_base": NATConfig((128, 256, 512, 1024), (3, 4, 18, 5), (4, 8, 16, 32), layer_scale=1e-5),
}

norm = partial(LayerNorm2d, eps=1e-5)


def build(cfg: NATConfig, **arguments: Any) -> BackboneParts:
    return make_parts(cfg, dilations=[(1,)] * len(cfg.depths), stem=stem, down=down, **arguments)


def make_parts(
    cfg: NATConfig,
    *,
    dilations: Sequence[Sequence[int]],
    stem: Callable[[int, int], nn.Module],
    down: Callable[[int, int], nn.Module],
    in_chans: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    drop_path_rate: float,
) -> BackboneParts:
    """What NAT and DiNAT share. `dilations`: for each stage those that its blocks have in turn.

    `stem` and `down` make the layers before the stages and between them, from the numbers of channels.
    """
    if len(dilations) != len(cfg.depths) or not all(dilations):
        raise ValueError(f"dilations={dilations} must have a list of at least one number for each stage")
    rates = drop_path_rates(drop_path_rate, cfg.depths)
    stages = []
    for i, dim in enumerate(cfg.dims):
        blocks = []
        for b, rate in enumerate(rates[i]):
            attention = NeighborhoodAttention(
                dim,
                num_heads=cfg.num_heads[i],
                kernel_size=cfg.kernel_size,
                dilation=dilations[i][b % len(dilations[i])],
            )
            mlp = Mlp(dim, ratio=cfg.mlp_ratio)
            blocks.append(block(mixer=residual(attention, dim, cfg, rate), mlp=residual(mlp, dim, cfg, rate)))
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down(cfg.dims[i - 1], dim) if i else None))
    return BackboneParts(
        stem=stem(in_chans, cfg.dims[0]),
        stages=stages,
        norm=norm(cfg.dims[-1]),
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        init=initialize,
    )


def residual(fn: nn.Module, dim: int, cfg: NATConfig, drop_path: float) -> Residual:
    scale = None if cfg.layer_scale is None else LayerScale2d(dim, cfg.layer_scale)
    return Residual(fn, norm=norm(dim), scale=scale, drop_path=drop_path)


def stem(in_chans: int, dim: int) -> nn.Module:
    return block(
        conv1=nn.Conv2d(in_chans, dim // 2, 3, 2, 1),
        conv2=nn.Conv2d(dim // 2, dim, 3, 2, 1),
        norm=norm(dim),
    )


def down(in_chs: int, out_chs: int) -> nn.Module:
    return block(conv=nn.Conv2d(in_chs, out_chs, 3, 2, 1, bias=False), norm=norm(out_chs))


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def key_mapping(cfg: NATConfig) -> Sequence[KeyRule]:
    return [
        KeyRule("patch_embed.proj.{n}.{p}", "stem.conv{n+1}.{p}"),
        KeyRule("levels.{s}.downsample.reduction.{p}", "stages.{s+1}.down.conv.{p}"),
        KeyRule("levels.{s}.downsample.norm.{p}", "stages.{s+1}.down.norm.{p}"),
        *shared_keys("levels"),
    ]


def shared_keys(stages: str) -> list[KeyRule]:
    """Rules for what NAT and DiNAT share; `stages` is their published name."""
    published, ours = stages + ".{s}.blocks.{b}.", "stages.{s}.blocks.{b}."
    return [
        KeyRule("patch_embed.norm.{p}", "stem.norm.{p}"),
        KeyRule(published + "norm1.{p}", ours + "mixer.norm.{p}"),
        KeyRule(published + "attn.rpb", ours + "mixer.fn.rpb"),
        KeyRule(published + "attn.qkv.{p}", ours + "mixer.fn.qkv.{p}"),
        KeyRule(published + "attn.proj.{p}", ours + "mixer.fn.proj.{p}"),
        KeyRule(published + "gamma1", ours + "mixer.scale.gamma"),
        KeyRule(published + "norm2.{p}", ours + "mlp.norm.{p}"),
        KeyRule(published + "mlp.fc{n}.{p}", ours + "mlp.fn.fc{n}.{p}"),
        KeyRule(published + "gamma2", ours + "mlp.scale.gamma"),
        KeyRule("norm.{p}", "norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]


dense_norm = DenseNorm(norm, "norm{s}.{p}")

register(
    Family(
        NAT,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv1", "paper_ids": "arXiv:2204.07143"},
        dense_norm=dense_norm,
    ),
    __name__,
)
