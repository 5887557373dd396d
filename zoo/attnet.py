"""AttNet: Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency.

Yu et al., arXiv 2510.20092. Released code: github.com/price112/Attentive-Convolution (MIT); its checkpoints load. Layer
scale and the norm in the MLP differ between the variants as in that code. The paper has no models for dense prediction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import LayerNorm2d, LayerScale2d, RmsNorm2d, trunc_normal_
from torch import nn

from ..blocks import AttentiveConvolution, ConvGlu, Residual, block, drop_path_rates
from ._backbone import Backbone, BackboneParts, Stage
from ._convolution import AS_LINEAR, ConvNormAct, pooled_norm_head
from ._family import Family
from ._keymap import Edit, KeyRule
from ._registry import register

__all__ = ["AttNet", "AttNetConfig"]


@dataclass(frozen=True)
class AttNetConfig:
    """Columns of the table of models in the released code.

    layer_scale: initial value of the scale of each branch, None for none. mlp_norm: whether the MLPs have a norm.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    layer_scale: float | None = 1e-6
    mlp_norm: bool = True
    kernel: int = 3


class AttNet(Backbone):
    """Convolutions with kernels computed from the whole map, and convolutional GLUs."""


VARIANTS = {
    "attnet_atto": AttNetConfig((16, 24, 48, 96), (1, 1, 2, 1), mlp_ratios=(4, 4, 4, 4)),
    "attnet_xxs": AttNetConfig((32, 64, 128, 240), (2, 2, 4, 2), layer_scale=None, mlp_norm=False),
    "attnet_xs": AttNetConfig((40, 80, 160, 320), (2, 2, 7, 2), mlp_norm=False),
    "attnet_s": AttNetConfig((40, 80, 160, 320), (2, 3, 10, 3), layer_scale=None, mlp_norm=False),
    "attnet_t1": AttNetConfig((48, 96, 224, 384), (2, 3, 12, 3)),
    "attnet_t2": AttNetConfig((64, 128, 288, 512), (3, 3, 16, 3)),
    "attnet_t3": AttNetConfig((72, 144, 320, 576), (4, 4, 26, 4)),
    "attnet_t4": AttNetConfig((96, 192, 384, 768), (5, 5, 28, 5)),
}

norm = partial(LayerNorm2d, eps=1e-6)
head_norm = partial(LayerNorm2d, eps=1e-5)
mlp_norm = partial(RmsNorm2d, eps=1e-6)


def build(
    cfg: AttNetConfig, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> BackboneParts:
    rates = drop_path_rates(drop_path_rate, cfg.depths)
    stages = []
    for i, dim in enumerate(cfg.dims):

        def branch(fn: nn.Module, rate: float, dim: int = dim) -> Residual:
            scale = None if cfg.layer_scale is None else LayerScale2d(dim, cfg.layer_scale)
            return Residual(fn, norm=norm(dim), scale=scale, drop_path=rate)

        blocks = [
            block(
                mixer=branch(AttentiveConvolution(dim, kernel=cfg.kernel), rate),
                mlp=branch(ConvGlu(dim, ratio=cfg.mlp_ratios[i], norm=mlp_norm if cfg.mlp_norm else None), rate),
            )
            for rate in rates[i]
        ]
        down = ConvNormAct(cfg.dims[i - 1], dim, kernel=3, stride=2) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down))
    width = cfg.dims[0]
    return BackboneParts(
        stem=block(
            conv1=ConvNormAct(in_chans, width // 2, kernel=3, stride=2, act="gelu"),
            conv2=ConvNormAct(width // 2, width, kernel=3, stride=2),
        ),
        stages=stages,
        head=pooled_norm_head(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm=head_norm),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# one published 1x1 convolution <-> our two linear layers
HALVES = Edit(
    lambda both: tuple(t.flatten(1) if t.dim() == 4 else t for t in both.chunk(2)),
    lambda gate, value: (torch.cat([t[:, :, None, None] if t.dim() == 2 else t for t in (gate, value)]),),
)


def key_mapping(cfg: AttNetConfig) -> Sequence[KeyRule]:
    published, ours = "stages.{s}.{b}.", "stages.{s}.blocks.{b}."
    token, channel = published + "token_mixer.", published + "channel_mixer."
    return [
        KeyRule("downsample_layers.0.0.0.{p}", "stem.conv1.conv.{p}"),
        KeyRule("downsample_layers.0.0.1.{p}", "stem.conv1.norm.{p}"),
        KeyRule("downsample_layers.0.2.0.{p}", "stem.conv2.conv.{p}"),
        KeyRule("downsample_layers.0.2.1.{p}", "stem.conv2.norm.{p}"),
        KeyRule("downsample_layers.{s}.0.{p}", "stages.{s}.down.conv.{p}"),
        KeyRule("downsample_layers.{s}.1.{p}", "stages.{s}.down.norm.{p}"),
        KeyRule(token + "difference_control", ours + "mixer.fn.difference_control"),
        KeyRule(token + "kernel_gen.{p}", ours + "mixer.fn.kernel_gen.{p}"),
        *(
            KeyRule(f"{token}{layer}.{{p}}", f"{ours}mixer.fn.{layer}.{{p}}", AS_LINEAR)
            for layer in ("kernel_proj", "x_proj", "proj")
        ),
        KeyRule(channel + "fc1.{p}", [ours + "mlp.fn.gate.{p}", ours + "mlp.fn.value.{p}"], HALVES),
        KeyRule(channel + "dwconv.{p}", ours + "mlp.fn.dwconv.{p}"),
        KeyRule(channel + "norm_layer.{p}", ours + "mlp.fn.norm.{p}"),
        KeyRule(channel + "fc2.{p}", ours + "mlp.fn.fc2.{p}", AS_LINEAR),
        KeyRule(published + "layer_scale_1.{p}", ours + "mixer.scale.{p}"),
        KeyRule(published + "layer_scale_2.{p}", ours + "mlp.scale.{p}"),
        KeyRule(published + "norm_1.{p}", ours + "mixer.norm.{p}"),
        KeyRule(published + "norm_2.{p}", ours + "mlp.norm.{p}"),
        KeyRule("norm.{p}", "head.norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]


register(
    Family(
        AttNet,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv1.conv", "paper_ids": "arXiv:2510.20092"},
    ),
    __name__,
)
