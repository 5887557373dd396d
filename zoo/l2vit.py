"""L2ViT: The Linear Attention Resurrection in Vision Transformer.

Zheng, 2025, arXiv 2501.16182: linear global attention and the local concentration module. Released code:
github.com/ChuanyangZheng/L2ViT (MIT); its checkpoints load.

The released dense-prediction models have windows of 7 pixels, the default here too. Their norms are in
`zoo.dense.DenseBackbone`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from timm.layers import ClassifierHead, LayerNorm2d, trunc_normal_
from torch import nn

from ..blocks import (
    LinearGlobal,
    Mlp,
    NormMerge,
    Residual,
    Window,
    block,
    conv_norm,
    depthwise,
    depthwise_pair,
    drop_path_rates,
)
from ..blocks.padding import PadToMultiple
from ._backbone import Backbone, BackboneParts, Stage
from ._family import DenseNorm, Family
from ._keymap import KeyRule
from ._registry import register

__all__ = ["L2ViT", "L2ViTConfig"]


@dataclass(frozen=True)
class L2ViTConfig:
    """Columns of the paper's architecture table; in a stage, local and global blocks alternate, a local one first."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window: int = 7
    mlp_ratio: float = 4.0


class L2ViT(Backbone):
    """Alternating blocks of window attention and linear global attention."""


BASE = L2ViTConfig((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32))

VARIANTS = {
    "l2vit_atto": L2ViTConfig((16, 32, 48, 64), (2, 2, 2, 2), (1, 2, 3, 4), window=4),
    "l2vit_tiny": L2ViTConfig((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24)),
    "l2vit_small": L2ViTConfig((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24)),
    "l2vit_base": BASE,
    "l2vit_base_384": replace(BASE, window=12),
}

norm = partial(LayerNorm2d, eps=1e-5)


def position(dim: int) -> Residual:
    """A depthwise convolution with a shortcut. It tells the attention after it where a pixel lies."""
    return Residual(depthwise(dim, kernel=3))


def local_block(cfg: L2ViTConfig, stage: int, *, drop_path: float) -> nn.Sequential:
    dim = cfg.dims[stage]
    mixer = Window(dim, num_heads=cfg.num_heads[stage], window=cfg.window)
    return block(
        cpe1=position(dim),
        mixer=Residual(mixer, norm=norm(dim), drop_path=drop_path),
        cpe2=position(dim),
        mlp=Residual(Mlp(dim, ratio=cfg.mlp_ratio), norm=norm(dim), drop_path=drop_path),
    )


def global_block(cfg: L2ViTConfig, stage: int, *, drop_path: float) -> nn.Sequential:
    """Linear attention, the local concentration module (`local`), and the MLP."""
    dim = cfg.dims[stage]
    mixer = LinearGlobal(dim, num_heads=cfg.num_heads[stage])
    return block(
        cpe1=position(dim),
        mixer=Residual(mixer, norm=norm(dim), drop_path=drop_path),
        local=Residual(depthwise_pair(dim, kernel=7), norm=norm(dim), drop_path=drop_path),
        mlp=Residual(Mlp(dim, ratio=cfg.mlp_ratio), norm=norm(dim), drop_path=drop_path),
    )


def build(
    cfg: L2ViTConfig, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> BackboneParts:
    stages = []
    for i, (dim, rates) in enumerate(zip(cfg.dims, drop_path_rates(drop_path_rate, cfg.depths), strict=True)):
        blocks = [(global_block if j % 2 else local_block)(cfg, i, drop_path=rate) for j, rate in enumerate(rates)]
        down = NormMerge(cfg.dims[i - 1], dim, norm=norm) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down))
    width = cfg.dims[0]
    stem = block(
        pad=PadToMultiple(4),
        conv1=conv_norm(in_chans, width // 2, kernel=3, stride=2),
        act=nn.ReLU(),
        conv2=conv_norm(width // 2, width, kernel=3, stride=2),
        norm=norm(width),
    )
    return BackboneParts(
        stem=stem,
        stages=stages,
        norm=norm(cfg.dims[-1]),
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def key_mapping(cfg: L2ViTConfig) -> Sequence[KeyRule]:
    stem, published, ours = "downsample_layers.0.", "stages.{s}.{b}.", "stages.{s}.blocks.{b}."
    layers = {
        "cpe.0.proj": "cpe1.fn",
        "norm1": "mixer.norm",
        "attn.qkv": "mixer.fn.qkv",
        "attn.proj": "mixer.fn.proj",
        "cpe.1.proj": "cpe2.fn",
        "norm3": "local.norm",
        "local_mp.conv1": "local.fn.conv1",
        "local_mp.bn": "local.fn.norm",
        "local_mp.conv2": "local.fn.conv2",
        "norm2": "mlp.norm",
        "mlp.fc1": "mlp.fn.fc1",
        "mlp.fc2": "mlp.fn.fc2",
    }
    return [
        KeyRule(stem + "proj.proj.0.{p}", "stem.conv1.conv.{p}"),
        KeyRule(stem + "proj.proj.1.{p}", "stem.conv1.norm.{p}"),
        KeyRule(stem + "proj.proj.3.{p}", "stem.conv2.conv.{p}"),
        KeyRule(stem + "proj.proj.4.{p}", "stem.conv2.norm.{p}"),
        KeyRule(stem + "norm.{p}", "stem.norm.{p}"),
        KeyRule("downsample_layers.{s}.norm.{p}", "stages.{s}.down.norm.{p}"),
        KeyRule("downsample_layers.{s}.proj.{p}", "stages.{s}.down.conv.{p}"),
        KeyRule(published + "attn.temperature", ours + "mixer.fn.temperature"),
        *(KeyRule(f"{published}{theirs}.{{p}}", f"{ours}{name}.{{p}}") for theirs, name in layers.items()),
        KeyRule("norm.{p}", "norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]


register(
    Family(
        L2ViT,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv1.conv", "paper_ids": "arXiv:2501.16182"},
        dense_norm=DenseNorm(norm, "norm{s}.{p}"),
    ),
    __name__,
)
