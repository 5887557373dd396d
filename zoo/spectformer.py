"""SpectFormer: Frequency and Attention is what you need in a Vision Transformer.

Patro, Namboodiri, Agneeswaran, WACV 2025, arXiv 2304.06446: spectral gating in the first blocks, attention in the
others, in a pyramid of four stages and in a vanilla ViT. Released code: github.com/badripatro/SpectFormers, without a
license and without weights. There is no code for dense prediction; the norms after the stages are part of the models.

The models of the pyramid were trained with token labelling: half of the maximum over the pixels of a second classifier
is added to the logits; here in training too, where the released code returns both separately.

Deviations from the released code, whose pyramid takes images of 224 pixels only: for other sizes gates are resized by
the rule of its vanilla models, and images that a patch of these does not divide are cropped or, if too small, padded.
The released vanilla models have 6 heads, which does not divide their widths 256 and 512; here heads have 64 channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from timm.layers import ClassifierHead, LayerNorm2d, register_notrace_module, trunc_normal_
from timm.layers import Mlp as TokenMlp
from timm.models.cait import ClassAttn
from torch import Tensor, nn

from ..blocks import (
    DepthwiseMlp,
    FullAttention,
    Mlp,
    PositionEmbedding,
    Residual,
    SpectralGating,
    block,
    conv_norm,
    drop_path_rates,
)
from ..blocks.padding import PadToSize
from ._backbone import Backbone, BackboneParts, Stage, class_token_first, feature_map, joined
from ._convolution import ConvNormAct, initialize_grouped_conv
from ._deit import TokenHead
from ._family import Family
from ._keymap import PACK_QKV, Edit, KeyRule, transformer_keys
from ._registry import register

__all__ = ["SpectFormer", "SpectFormerConfig", "VanillaSpectFormer", "VanillaSpectFormerConfig"]

PATCH = 16
norm = partial(LayerNorm2d, eps=1e-6)
embed_norm = partial(LayerNorm2d, eps=1e-5)


@dataclass(frozen=True)
class SpectFormerConfig:
    """Columns of the paper's table, one entry per stage in tuples.

    stem: width of its first three convolutions. head_dim: width of an attention head. token_labels: the second
    classifier. img_size: of the images that the gates fit without resizing.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    stem: int = 64
    head_dim: int = 32
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    token_labels: bool = True
    img_size: int = 224


@dataclass(frozen=True)
class VanillaSpectFormerConfig:
    """Columns of the paper's table.

    depths: of stages of one width and stride; the blocks of the first have spectral gates, those of the others
    attention. img_size: of the images that gates and position embedding fit without resizing.
    """

    dim: int
    num_heads: int
    depths: tuple[int, ...]
    mlp_ratio: float = 4.0
    img_size: int = 224


class SpectFormer(Backbone):
    """A pyramid with spectral gates in stages 1 and 2, attention in stages 3 and 4, and a class token after them."""


class VanillaSpectFormer(Backbone):
    """A ViT without a class token, whose first blocks have spectral gates."""


VARIANTS = {
    "spectformer_atto": SpectFormerConfig((16, 32, 48, 64), (1, 1, 2, 1), 8, 16, (4, 4, 4, 4), img_size=64),
    "spectformer_s": SpectFormerConfig((64, 128, 320, 448), (3, 4, 6, 3), 32),
    "spectformer_b": SpectFormerConfig((64, 128, 320, 512), (3, 4, 12, 3)),
    "spectformer_l": SpectFormerConfig((96, 192, 384, 512), (3, 6, 18, 3)),
}

VANILLA_VARIANTS = {
    "spectformer_vanilla_atto": VanillaSpectFormerConfig(64, 2, (2, 1, 1, 1), img_size=64),
    "spectformer_vanilla_ti": VanillaSpectFormerConfig(256, 4, (4, 3, 3, 2)),
    "spectformer_vanilla_xs": VanillaSpectFormerConfig(384, 6, (4, 3, 3, 2)),
    "spectformer_vanilla_s": VanillaSpectFormerConfig(384, 6, (4, 5, 5, 5)),
    "spectformer_vanilla_b": VanillaSpectFormerConfig(512, 8, (4, 5, 5, 5)),
}


class LastStage(NamedTuple):
    """What the last stage of the pyramid returns: its map after and before the norm, and the mean of the latter."""

    normed: Tensor  # [B, C, H, W]
    plain: Tensor  # [B, C, H, W]
    token: Tensor  # [B, 1, C]


@register_notrace_module
class LastNorm(nn.Module):
    """The norm of the last stage, `[B, C, H, W]` to a `LastStage`."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = norm(dim)

    def forward(self, x: Tensor) -> LastStage:
        return LastStage(self.norm(x), x, x.mean((2, 3)).unsqueeze(1))


@register_notrace_module
class ClassToken(nn.Module):
    """A class token that attends to the map before the norm: a `LastStage` to the normalized map and `[B, 1, C]`.

    `norm` is that of the last stage, which the token takes too.
    """

    def __init__(self, dim: int, *, num_heads: int, norm: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttn(dim, num_heads, qkv_bias=True)
        self.mlp = TokenMlp(dim, 4 * dim)
        # in a tuple, as its parameters belong to the stage
        self.shared = (norm,)

    def forward(self, x: LastStage) -> tuple[Tensor, Tensor]:
        token = x.token + self.attn(self.norm1(class_token_first(x.plain, x.token)))
        token = token + self.mlp(self.norm2(token))
        as_map = token.transpose(1, 2).unsqueeze(3)
        return x.normed, self.shared[0](as_map).squeeze(3).transpose(1, 2)


class TokenLabelHead(TokenHead):
    """`TokenHead`; with `token_labels`, half of the maximum over the pixels of a second classifier is added.

    Of a map without a class token, as pruned models have, the mean takes the token's place.
    """

    def __init__(self, dim: int, num_classes: int, *, pool_type: str, drop_rate: float, token_labels: bool):
        self.token_labels = token_labels
        super().__init__(dim, num_classes, pool_type=pool_type, drop_rate=drop_rate)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As `zoo._backbone.Head.reset` says; both classifiers are replaced."""
        super().reset(num_classes, pool_type, reset_other, in_features, device, dtype)
        self.aux = nn.Identity()
        if num_classes and self.token_labels:
            self.aux = nn.Linear(self.dim, num_classes, device=device, dtype=dtype)
            initialize(self.aux)

    def forward(self, x: Tensor | LastStage, pre_logits: bool = False) -> Tensor:
        x = feature_map(joined(x))
        if self.pool_type and x.dim() == 4:
            x = class_token_first(x, x.mean((2, 3)).unsqueeze(1))
        logits = super().forward(x, pre_logits=pre_logits)
        if pre_logits or isinstance(self.aux, nn.Identity):
            return logits
        return logits + 0.5 * self.aux(x[:, 1:]).amax(1)


register_notrace_module(TokenLabelHead)


def stem(in_chans: int, width: int, dim: int) -> nn.Sequential:
    """`[B, in_chans, H, W] -> [B, dim, ~H/4, ~W/4]`: four convolutions, the first and the last of stride 2."""
    return block(
        conv1=ConvNormAct(in_chans, width, kernel=7, stride=2, act="relu"),
        conv2=ConvNormAct(width, width, kernel=3, act="relu"),
        conv3=ConvNormAct(width, width, kernel=3, act="relu"),
        down=conv_norm(width, dim, kernel=3, stride=2, norm=embed_norm),
    )


def build(
    cfg: SpectFormerConfig,
    *,
    in_chans: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    drop_path_rate: float,
) -> BackboneParts:
    last, width = LastNorm(cfg.dims[-1]), cfg.dims[-1]
    stages = []
    for i, rates in enumerate(drop_path_rates(drop_path_rate, cfg.depths)):
        dim = cfg.dims[i]
        blocks = [
            block(
                mixer=Residual(
                    SpectralGating(dim, trained_size=cfg.img_size // (4 << i))
                    if i < 2
                    else FullAttention(dim, num_heads=dim // cfg.head_dim),
                    norm=norm(dim),
                    drop_path=rate,
                ),
                mlp=Residual(DepthwiseMlp(dim, ratio=cfg.mlp_ratios[i]), norm=norm(dim), drop_path=rate),
            )
            for rate in rates
        ]
        down = conv_norm(cfg.dims[i - 1], dim, kernel=3, stride=2, norm=embed_norm) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down, norm=norm(dim) if i < 3 else last))
    return BackboneParts(
        stem=stem(in_chans, cfg.stem, cfg.dims[0]),
        stages=stages,
        norm=ClassToken(width, num_heads=width // cfg.head_dim, norm=last.norm),
        head=TokenLabelHead(
            width, num_classes, pool_type=global_pool, drop_rate=drop_rate, token_labels=cfg.token_labels
        ),
        init=initialize,
    )


def vanilla_block(cfg: VanillaSpectFormerConfig, *, spectral: bool, drop_path: float) -> nn.Module:
    """One residual branch around gate and MLP, or one around each of attention and MLP."""
    dim = cfg.dim
    mlp = Mlp(dim, ratio=cfg.mlp_ratio)
    if spectral:
        gate = SpectralGating(dim, trained_size=cfg.img_size // PATCH)
        return Residual(block(norm1=norm(dim), mixer=gate, norm2=norm(dim), mlp=mlp), drop_path=drop_path)
    return block(
        mixer=Residual(FullAttention(dim, num_heads=cfg.num_heads), norm=norm(dim), drop_path=drop_path),
        mlp=Residual(mlp, norm=norm(dim), drop_path=drop_path),
    )


def build_vanilla(
    cfg: VanillaSpectFormerConfig,
    *,
    in_chans: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    drop_path_rate: float,
) -> BackboneParts:
    stages = [
        Stage([vanilla_block(cfg, spectral=i == 0, drop_path=rate) for rate in rates], dim=cfg.dim, stride=1)
        for i, rates in enumerate(drop_path_rates(drop_path_rate, cfg.depths))
    ]
    return BackboneParts(
        stem=block(
            pad=PadToSize(PATCH),
            conv=nn.Conv2d(in_chans, cfg.dim, PATCH, PATCH),
            position=PositionEmbedding(cfg.dim, trained_size=cfg.img_size // PATCH, mode="bicubic"),
        ),
        stages=stages,
        norm=norm(cfg.dim),
        head=ClassifierHead(cfg.dim, num_classes, pool_type=global_pool, drop_rate=drop_rate),
        stem_stride=PATCH,
        no_weight_decay=frozenset({"table"}),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        initialize_grouped_conv(module)


# a published gate [S, S//2 + 1, C, 2] <-> ours
GATE = Edit(lambda gate: (gate.permute(3, 2, 0, 1),), lambda gate: (gate.permute(2, 3, 1, 0),))
# a published layer of keys and values <-> our two layers
SPLIT_KV = Edit(lambda kv: kv.chunk(2), lambda k, v: (torch.cat([k, v]),))


def key_mapping(cfg: SpectFormerConfig) -> Sequence[KeyRule]:
    published, ours = "block{s+1}.{b}.", "stages.{s}.blocks.{b}."
    attention, our_mixer = published + "attn.", ours + "mixer.fn."
    token = "post_network.0."
    return [
        *(
            KeyRule(f"patch_embed1.conv.{3 * i + j}.{{p}}", f"stem.conv{i + 1}.{layer}.{{p}}")
            for i in range(3)
            for j, layer in enumerate(("conv", "norm"))
        ),
        KeyRule("patch_embed1.proj.{p}", "stem.down.conv.{p}"),
        KeyRule("patch_embed1.norm.{p}", "stem.down.norm.{p}"),
        KeyRule("patch_embed{s+1}.proj.{p}", "stages.{s}.down.conv.{p}"),
        KeyRule("patch_embed{s+1}.norm.{p}", "stages.{s}.down.norm.{p}"),
        KeyRule(attention + "complex_weight", our_mixer + "weight", GATE),
        KeyRule([attention + "q.{p}", attention + "kv.{p}"], our_mixer + "qkv.{p}", PACK_QKV),
        KeyRule(attention + "proj.{p}", our_mixer + "proj.{p}"),
        KeyRule(published + "mlp.dwconv.dwconv.{p}", ours + "mlp.fn.dwconv.{p}"),
        *transformer_keys(published, ours),
        KeyRule("norm4.{p}", "stages.3.norm.norm.{p}"),
        KeyRule("norm{s+1}.{p}", "stages.{s}.norm.{p}"),
        KeyRule(token + "attn.kv.{p}", ["norm.attn.k.{p}", "norm.attn.v.{p}"], SPLIT_KV),
        *(KeyRule(f"{token}attn.{name}.{{p}}", f"norm.attn.{name}.{{p}}") for name in ("q", "proj")),
        KeyRule(token + "mlp.fc{n}.{p}", "norm.mlp.fc{n}.{p}"),
        KeyRule(token + "norm{n}.{p}", "norm.norm{n}.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
        KeyRule("aux_head.{p}", "head.aux.{p}"),
    ]


def vanilla_key_mapping(cfg: VanillaSpectFormerConfig) -> Sequence[KeyRule]:
    rules = [
        KeyRule("pos_embed", "stem.position.table"),
        KeyRule("patch_embed.proj.{p}", "stem.conv.{p}"),
        KeyRule("norm.{p}", "norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]
    places = [(stage, index) for stage, depth in enumerate(cfg.depths) for index in range(depth)]
    for number, (stage, index) in enumerate(places):
        published, ours = f"blocks.{number}.", f"stages.{stage}.blocks.{index}."
        if stage:
            rules += [
                KeyRule(f"{published}attn.{name}.{{p}}", f"{ours}mixer.fn.{name}.{{p}}") for name in ("qkv", "proj")
            ]
            rules += transformer_keys(published, ours)
        else:
            rules.append(KeyRule(published + "filter.complex_weight", ours + "fn.mixer.weight", GATE))
            rules += [KeyRule(f"{published}norm{n}.{{p}}", f"{ours}fn.norm{n}.{{p}}") for n in (1, 2)]
            rules.append(KeyRule(published + "mlp.fc{n}.{p}", ours + "fn.mlp.fc{n}.{p}"))
    return rules


# image side and ImageNet-1K top-1 in the paper; those of the pyramid are with token labelling
REPORTED = {"spectformer_s": (224, 84.3), "spectformer_b": (224, 85.0), "spectformer_l": (224, 85.7)}
VANILLA_REPORTED = {
    "spectformer_vanilla_ti": (224, 76.9),
    "spectformer_vanilla_xs": (224, 80.2),
    "spectformer_vanilla_s": (224, 81.7),
    "spectformer_vanilla_b": (224, 82.1),
}

register(
    Family(
        SpectFormer,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv1.conv", "crop_pct": 0.96, "paper_ids": "arXiv:2304.06446"},
        reported=REPORTED,
        global_pool="token",
        classifier=lambda cfg: ("head.fc", "head.aux") if cfg.token_labels else "head.fc",
    ),
    __name__,
)
register(
    Family(
        VanillaSpectFormer,
        VANILLA_VARIANTS,
        build_vanilla,
        vanilla_key_mapping,
        pretrained_cfg={"first_conv": "stem.conv", "paper_ids": "arXiv:2304.06446"},
        reported=VANILLA_REPORTED,
        stride=PATCH,
    ),
    __name__,
)
