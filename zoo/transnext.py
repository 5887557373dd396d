"""TransNeXt: Robust Foveal Visual Perception for Vision Transformers.

Shi, CVPR 2024, arXiv 2311.17132: sec. 3 (aggregated attention, length-scaled cosine attention, convolutional GLU).
Released code: github.com/DaiShiResearch/TransNeXt (Apache-2.0); its checkpoints load.

The released code has separate models for classification and dense prediction. The models here work for both: position
biases, length scales and pooled grids are computed for the size of the feature map.

Deviation: in the released code a pooled grid may be empty (sides under 29 pixels). Here it has at least one pixel, and
with `fixed_pool_size` at most as many as the map.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, LayerNorm2d, trunc_normal_
from torch import nn

from ..blocks import Aggregated, ConvGlu, LengthScaledCosine, Residual, block, conv_norm, drop_path_rates
from ._backbone import Backbone, BackboneParts, Stage
from ._convolution import initialize_grouped_conv
from ._family import Family
from ._keymap import PACK_QKV, Edit, KeyRule
from ._registry import register

__all__ = ["TransNeXt", "TransNeXtConfig"]


@dataclass(frozen=True)
class TransNeXtConfig:
    """Columns of the paper's architecture table.

    reductions: of the pooled map in each stage; None for full attention.
    window: side of the sliding window.
    pretrain_size: image size by which distances in the position bias are scaled; it belongs to the weights and is 224
        also for those fine-tuned at 384.
    img_size: None for the released extrapolation mode, which computes the position bias for every map size. A number
        selects the interpolation mode: the bias is computed for images of this size and resized.
    fixed_pool_size: side of the pooled map, for the released linear inference mode (7 for weights trained at 224).
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    reductions: tuple[int | None, ...] = (8, 4, 2, None)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    window: int = 3
    pretrain_size: int = 224
    img_size: int | None = None
    fixed_pool_size: int | None = None


class TransNeXt(Backbone):
    """Aggregated attention in stages 1-3, length-scaled cosine attention in stage 4, and convolutional GLUs."""


MICRO = TransNeXtConfig((48, 96, 192, 384), (2, 2, 15, 2), (2, 4, 8, 16))
SMALL = TransNeXtConfig((72, 144, 288, 576), (5, 5, 22, 5), (3, 6, 12, 24))
BASE = TransNeXtConfig((96, 192, 384, 768), (5, 5, 23, 5), (4, 8, 16, 32))

VARIANTS = {
    "transnext_atto": TransNeXtConfig((24, 24, 48, 96), (1, 1, 2, 1), (1, 1, 2, 4)),
    "transnext_micro": MICRO,
    "transnext_tiny": TransNeXtConfig((72, 144, 288, 576), (2, 2, 15, 2), (3, 6, 12, 24)),
    "transnext_small": SMALL,
    "transnext_base": BASE,
    "transnext_small_384": SMALL,
    "transnext_base_384": BASE,
    "transnext_micro_aaaa_256": replace(MICRO, reductions=(16, 8, 4, 2), pretrain_size=256),
}

norm = partial(LayerNorm2d, eps=1e-6)
embed_norm = partial(LayerNorm2d, eps=1e-5)


def mixer(cfg: TransNeXtConfig, stage: int) -> nn.Module:
    stride = 4 * 2**stage
    if cfg.pretrain_size < 64:
        raise ValueError(
            f"TransNeXt: pretrain_size={cfg.pretrain_size} must be at least 64, so that stage 4 has two pixels"
        )
    if cfg.img_size is not None and cfg.img_size < 1:
        raise ValueError(f"TransNeXt: img_size={cfg.img_size} must be at least 1, or None")
    nominal = None if cfg.img_size is None else max(1, cfg.img_size // stride)
    dim, heads, trained = cfg.dims[stage], cfg.num_heads[stage], cfg.pretrain_size // stride
    reduction = cfg.reductions[stage]
    if reduction is None:
        return LengthScaledCosine(dim, num_heads=heads, trained_size=trained, nominal_size=nominal)
    return Aggregated(
        dim,
        num_heads=heads,
        reduction=reduction,
        trained_size=trained,
        window=cfg.window,
        pool_size=cfg.fixed_pool_size,
        nominal_size=nominal,
    )


def transnext(
    cfg: TransNeXtConfig,
    attention: Callable[[int], nn.Module],
    *,
    in_chans: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    drop_path_rate: float,
) -> BackboneParts:
    """The model with any mixers: `attention(stage)` makes one."""
    rates = drop_path_rates(drop_path_rate, cfg.depths)
    stages = []
    for i, dim in enumerate(cfg.dims):
        blocks = [
            block(
                mixer=Residual(attention(i), norm=norm(dim), drop_path=rate),
                mlp=Residual(ConvGlu(dim, ratio=cfg.mlp_ratios[i]), norm=norm(dim), drop_path=rate),
            )
            for rate in rates[i]
        ]
        down = conv_norm(cfg.dims[i - 1], dim, kernel=3, stride=2, norm=embed_norm) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down, norm=norm(dim)))
    return BackboneParts(
        stem=conv_norm(in_chans, cfg.dims[0], kernel=7, stride=4, norm=embed_norm),
        stages=stages,
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        # fc1_weight and fc2_weight are those of the position bias
        no_weight_decay=frozenset(
            {"temperature", "query_embedding", "relative_pos_bias_local", "fc1_weight", "fc2_weight"}
        ),
        init=initialize,
    )


def build(cfg: TransNeXtConfig, **arguments: Any) -> BackboneParts:
    return transnext(cfg, partial(mixer, cfg), **arguments)


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        initialize_grouped_conv(module)


HALVES = Edit(lambda both: both.chunk(2), lambda gate, value: (torch.cat([gate, value]),))


def transnext_keys(cfg: TransNeXtConfig, attention: str = "mixer.fn.") -> list[KeyRule]:
    """Rules of a model whose blocks have the modules of the attention at `attention`."""
    published, ours = "block{s+1}.{b}.", "stages.{s}.blocks.{b}."
    attn = ours + attention
    plain = [i for i, reduction in enumerate(cfg.reductions) if reduction is None]
    return [
        # the published stages of full attention have one qkv layer, the others two layers
        *(
            KeyRule(f"block{i + 1}.{{b}}.attn.qkv.{{p}}", f"stages.{i}.blocks.{{b}}.{attention}qkv.{{p}}")
            for i in plain
        ),
        KeyRule([published + "attn.q.{p}", published + "attn.kv.{p}"], attn + "qkv.{p}", PACK_QKV),
        KeyRule("patch_embed1.proj.{p}", "stem.conv.{p}"),
        KeyRule("patch_embed1.norm.{p}", "stem.norm.{p}"),
        KeyRule("patch_embed{s+1}.proj.{p}", "stages.{s}.down.conv.{p}"),
        KeyRule("patch_embed{s+1}.norm.{p}", "stages.{s}.down.norm.{p}"),
        KeyRule("norm{s+1}.{p}", "stages.{s}.norm.{p}"),
        KeyRule(published + "norm1.{p}", ours + "mixer.norm.{p}"),
        KeyRule(published + "attn.cpb_fc1.{p}", attn + "position.fc1_{p}"),
        KeyRule(published + "attn.cpb_fc2.{p}", attn + "position.fc2_{p}"),
        *(KeyRule(f"{published}attn.{part}.{{p}}", f"{attn}{part}.{{p}}") for part in ("sr", "norm", "proj")),
        # parameters of the mixer itself: temperature, query_embedding and the tables of the window
        KeyRule(published + "attn.{p}", attn + "{p}"),
        KeyRule(published + "norm2.{p}", ours + "mlp.norm.{p}"),
        KeyRule(published + "mlp.fc1.{p}", [ours + "mlp.fn.gate.{p}", ours + "mlp.fn.value.{p}"], HALVES),
        KeyRule(published + "mlp.dwconv.dwconv.{p}", ours + "mlp.fn.dwconv.{p}"),
        KeyRule(published + "mlp.fc2.{p}", ours + "mlp.fn.fc2.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]


def key_mapping(cfg: TransNeXtConfig) -> Sequence[KeyRule]:
    return transnext_keys(cfg)


register(
    Family(
        TransNeXt,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv", "paper_ids": "arXiv:2311.17132"},
    ),
    __name__,
)
