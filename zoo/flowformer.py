"""Flowformer: Linearizing Transformers with Conservation Flows, the vision model.

Wu, Wu, Xu, Wang, Long, ICML 2022, arXiv 2202.06258: sec. 3 (flow attention) and the image experiments. Released code:
github.com/thuml/Flowformer, folder Flowformer_CV (MIT); its checkpoints load. The paper has no models for dense
prediction.

Deviations from the released code, which takes square images of one size: the position embedding is resized bilinearly,
and images and maps that the strides do not divide are zero-padded before the convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from timm.layers import ClassifierHead, LayerNorm2d, LayerScale2d, trunc_normal_
from torch import nn

from ..blocks import Flow, Mlp, PositionEmbedding, Residual, block, drop_path_rates
from ..blocks.padding import PadToMultiple
from ._backbone import Backbone, BackboneParts, Stage
from ._family import Family
from ._keymap import KeyRule
from ._registry import register

__all__ = ["Flowformer", "FlowformerConfig"]


@dataclass(frozen=True)
class FlowformerConfig:
    """Settings of the released script, one entry per stage in tuples.

    layer_scale: initial scale of the MLP branches. pretrain_size: side of the images of the position embedding.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...] = (12, 12, 12, 12)
    mlp_ratio: float = 4.0
    layer_scale: float = 1e-5
    pretrain_size: int = 224

    def __post_init__(self):
        if self.pretrain_size < 4:
            raise ValueError(f"Flowformer: pretrain_size={self.pretrain_size} must be at least 4, the side of a patch")


class Flowformer(Backbone):
    """Flow attention in every stage; the position enters once, by an embedding in the stem."""


VARIANTS = {
    "flowformer_atto": FlowformerConfig((16, 32, 64, 96), (1, 1, 2, 1), num_heads=(4, 4, 4, 4), pretrain_size=64),
    "flowformer_cv": FlowformerConfig((96, 192, 384, 768), (3, 3, 10, 3)),
}

norm = partial(LayerNorm2d, eps=1e-6)


def build(
    cfg: FlowformerConfig, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> BackboneParts:
    rates = drop_path_rates(drop_path_rate, cfg.depths)
    stages = []
    for i, dim in enumerate(cfg.dims):
        blocks = [
            block(
                mixer=Residual(Flow(dim, num_heads=cfg.num_heads[i]), norm=norm(dim), drop_path=rate),
                mlp=Residual(
                    Mlp(dim, ratio=cfg.mlp_ratio),
                    norm=norm(dim),
                    scale=LayerScale2d(dim, cfg.layer_scale),
                    drop_path=rate,
                ),
            )
            for rate in rates[i]
        ]
        down = block(pad=PadToMultiple(2), conv=nn.Conv2d(cfg.dims[i - 1], dim, 2, 2)) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down))
    width = cfg.dims[0]
    return BackboneParts(
        stem=block(
            pad=PadToMultiple(4),
            conv=nn.Conv2d(in_chans, width, 4, 4),
            position=PositionEmbedding(width, trained_size=cfg.pretrain_size // 4),
        ),
        stages=stages,
        norm=norm(cfg.dims[-1]),
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        no_weight_decay=frozenset({"table"}),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def key_mapping(cfg: FlowformerConfig) -> Sequence[KeyRule]:
    published, ours = "blocks.{s}.{b}.", "stages.{s}.blocks.{b}."
    # the released file also holds what a counter of operations left in every module
    modules = ["", "patch_embed.{s}.", "patch_embed.{s}.{p}.", "blocks.{s}.", published, published + "{p}."]
    modules += [published + f"{branch}.{{p}}." for branch in ("attn", "mlp")] + ["{p}."]
    return [
        *(KeyRule(module + counter, None) for module in modules for counter in ("total_ops", "total_params")),
        KeyRule("pos_embed", "stem.position.table"),
        KeyRule("patch_embed.0.proj.{p}", "stem.conv.{p}"),
        KeyRule("patch_embed.{s}.proj.{p}", "stages.{s}.down.conv.{p}"),
        KeyRule(published + "gamma", ours + "mlp.scale.gamma"),
        KeyRule(published + "norm1.{p}", ours + "mixer.norm.{p}"),
        KeyRule(published + "attn.qkv.{p}", ours + "mixer.fn.qkv.{p}"),
        KeyRule(published + "attn.proj.{p}", ours + "mixer.fn.proj.{p}"),
        KeyRule(published + "norm2.{p}", ours + "mlp.norm.{p}"),
        KeyRule(published + "mlp.fc{n}.{p}", ours + "mlp.fn.fc{n}.{p}"),
        KeyRule("norm.{p}", "norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]


register(
    Family(
        Flowformer,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv", "paper_ids": "arXiv:2202.06258"},
    ),
    __name__,
)
