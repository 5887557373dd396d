"""S2AFormer: Strip Self-Attention for Efficient Vision Transformer.

Xu, Huang, Jia, Li, Gao, Qi, IEEE TIP 2025, arXiv 2505.22195. No code or weights were released. The paper gives the
order of a block (convolution, strip attention, local interaction, MLP, each with a shortcut), a stem of three
convolutions, and parameters, multiply-adds and accuracy of five models.

Not in the paper, chosen here: dims, depths, heads, the width of the strips, the local interaction module (XCiT's) and
the head. The same rules for all five models give parameters and multiply-adds within 1.5 % of the published ones. The
accuracies are those of the paper's models, not of these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from timm.layers import LayerNorm2d, trunc_normal_
from torch import nn

from ..blocks import Mlp, Residual, Strip, block, conv_norm, depthwise, depthwise_pair, drop_path_rates
from ._backbone import Backbone, BackboneParts, Stage
from ._convolution import AS_LINEAR, initialize_grouped_conv, pooled_norm_head
from ._family import DenseNorm, Family
from ._keymap import KeyRule
from ._registry import register

__all__ = ["S2AFormer", "S2AFormerConfig"]


@dataclass(frozen=True)
class S2AFormerConfig:
    """One entry per stage in tuples. qk_dim: width of a query and key head; head_width: of the head's hidden layer."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    qk_dim: int = 1
    mlp_ratio: float = 4.0
    head_width: int = 1280


class S2AFormer(Backbone):
    """Strip self-attention, depthwise convolutions and MLPs."""


VARIANTS = {
    "s2aformer_atto": S2AFormerConfig((16, 32, 48, 64), (1, 1, 2, 1), (1, 2, 3, 4), head_width=128),
    "s2aformer_mini": S2AFormerConfig((32, 64, 160, 320), (1, 2, 2, 2), (1, 2, 5, 10)),
    "s2aformer_tiny": S2AFormerConfig((32, 64, 160, 320), (3, 3, 5, 2), (1, 2, 5, 10)),
    "s2aformer_xsmall": S2AFormerConfig((32, 64, 160, 320), (3, 4, 7, 2), (1, 2, 5, 10)),
    "s2aformer_small": S2AFormerConfig((32, 64, 192, 384), (3, 3, 13, 2), (1, 2, 6, 12)),
    "s2aformer_medium": S2AFormerConfig((64, 128, 256, 512), (4, 4, 19, 3), (2, 4, 8, 16)),
}

norm = partial(LayerNorm2d, eps=1e-6)


def stem(in_chans: int, width: int) -> nn.Sequential:
    """`[B, in_chans, H, W] -> [B, width, ~H/2, ~W/2]`: three 3x3 convolutions, the first of stride 2."""
    layers = [
        block(
            conv=nn.Conv2d(width if i else in_chans, width, 3, 1 if i else 2, 1, bias=False),
            norm=nn.BatchNorm2d(width),
            act=nn.GELU(),
        )
        for i in range(3)
    ]
    return nn.Sequential(*layers)


def build(
    cfg: S2AFormerConfig, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> BackboneParts:
    rates = drop_path_rates(drop_path_rate, cfg.depths)
    stages, previous = [], cfg.dims[0] // 2
    for i, dim in enumerate(cfg.dims):
        heads, reduction = cfg.num_heads[i], cfg.reductions[i]
        blocks = [
            block(
                conv=Residual(depthwise(dim, kernel=3)),
                mixer=Residual(
                    Strip(dim, num_heads=heads, reduction=reduction, qk_dim=cfg.qk_dim), norm=norm(dim), drop_path=rate
                ),
                local=Residual(depthwise_pair(dim, kernel=3), norm=norm(dim), drop_path=rate),
                mlp=Residual(Mlp(dim, ratio=cfg.mlp_ratio), norm=norm(dim), drop_path=rate),
            )
            for rate in rates[i]
        ]
        down = conv_norm(previous, dim, kernel=3, stride=2, norm=norm)
        stages.append(Stage(blocks, dim=dim, stride=2, down=down))
        previous = dim
    head = pooled_norm_head(cfg.dims[-1], num_classes, cfg.head_width, pool_type=global_pool, drop_rate=drop_rate)
    return BackboneParts(
        stem=stem(in_chans, cfg.dims[0] // 2), stem_stride=2, stages=stages, head=head, init=initialize
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        initialize_grouped_conv(module)
    elif isinstance(module, Strip):
        # with few channels per head, small weights would give logits near zero and uniform attention
        for weight in (module.get_parameter("q.weight"), module.get_parameter("k.weight")):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)


def key_mapping(cfg: S2AFormerConfig) -> Sequence[KeyRule]:
    """No keys are published: these are the usual ones of an implementation with 1x1 convolutions."""
    published, ours = "stages.{s}.blocks.{b}.", "stages.{s}.blocks.{b}."
    linear = {f"attn.{name}": f"mixer.fn.{name}" for name in ("q", "k", "v", "proj")}
    linear |= {f"mlp.{name}": f"mlp.fn.{name}" for name in ("fc1", "fc2")}
    plain = {"dwconv": "conv.fn", "norm1": "mixer.norm", "norm2": "local.norm", "norm3": "mlp.norm"}
    plain |= {"attn.reduce.conv": "mixer.fn.reduce.conv", "attn.reduce.bn": "mixer.fn.reduce.norm"}
    plain |= {"lim.conv1": "local.fn.conv1", "lim.bn": "local.fn.norm", "lim.conv2": "local.fn.conv2"}
    return [
        KeyRule("stem.{i}.conv.{p}", "stem.{i}.conv.{p}"),
        KeyRule("stem.{i}.bn.{p}", "stem.{i}.norm.{p}"),
        KeyRule("stages.{s}.downsample.conv.{p}", "stages.{s}.down.conv.{p}"),
        KeyRule("stages.{s}.downsample.norm.{p}", "stages.{s}.down.norm.{p}"),
        *(KeyRule(f"{published}{a}.{{p}}", f"{ours}{b}.{{p}}", AS_LINEAR) for a, b in linear.items()),
        *(KeyRule(f"{published}{a}.{{p}}", f"{ours}{b}.{{p}}") for a, b in plain.items()),
        KeyRule("head.norm.{p}", "head.norm.{p}"),
        KeyRule("head.pre_logits.fc.{p}", "head.pre_logits.fc.{p}"),
        KeyRule("head.fc.{p}", "head.fc.{p}"),
    ]


# image side and ImageNet-1K top-1 as reported in the paper
REPORTED = {
    "s2aformer_mini": (224, 75.1),
    "s2aformer_tiny": (224, 77.7),
    "s2aformer_xsmall": (224, 78.9),
    "s2aformer_small": (224, 80.8),
    "s2aformer_medium": (224, 82.3),
}

register(
    Family(
        S2AFormer,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.0.conv", "crop_pct": 0.9, "paper_ids": "arXiv:2505.22195"},
        reported=REPORTED,
        dense_norm=DenseNorm(norm, "norms.{s}.{p}"),
    ),
    __name__,
)
