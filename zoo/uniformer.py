"""UniFormer: Unifying Convolution and Self-attention for Visual Recognition.

Li, Wang, Zhang, Gao, Song, Liu, Li, Qiao, TPAMI 2023, arXiv 2201.09450: local and global relation aggregators, dynamic
position embedding, window and hybrid blocks for dense prediction. Released code: github.com/Sense-X/UniFormer
(Apache-2.0); its checkpoints load. The light models are in `uniformer_light.py`.

Models whose names end in `_tl`, and the large one, were trained with token labelling: a second classifier is applied to
every pixel, and half of its maximum over the pixels is added to the logits, in training too.

Deviations: the released classifiers accept images of one size; here other sizes work as in the released models for
dense prediction, and a side that is smaller than a patch is padded. Layer scales of convolutional blocks are
one-dimensional, so they take no weight decay. The norms of dense prediction are in `zoo.dense.DenseBackbone`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from timm.layers import ClassifierHead, ConvMlp, LayerNorm2d, LayerScale2d, trunc_normal_
from torch import Tensor, nn

from ..blocks import (
    FullAttention,
    LocalMhra,
    Mlp,
    Residual,
    Window,
    block,
    conv_norm,
    depthwise,
    drop_path_rates,
)
from ..blocks.padding import PadToSize
from ._backbone import Backbone, BackboneParts, Stage
from ._family import DenseNorm, Family
from ._keymap import Edit, KeyRule
from ._registry import register

__all__ = ["UniFormer", "UniFormerConfig"]


@dataclass(frozen=True)
class UniFormerConfig:
    """Columns of the table of models in the released code.

    head_dim: width of an attention head; it cannot be told from the weights.
    conv_stem, conv_down: overlapping convolutions with batch norm instead of patches in the stem, between stages.
    layer_scale: the stages, from 1, whose branches have a layer scale.
    token_labels: the second classifier of models that were trained with token labelling.
    stage3: "global", "window" (attention within windows in stage 3) or "hybrid" (every fourth block is global); the
        last two are for dense prediction, with the same weights. window: side of these windows, never clipped to the
        map; the authors advise at least 14.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    head_dim: int = 64
    mlp_ratio: float = 4.0
    conv_stem: bool = False
    conv_down: bool = False
    layer_scale: tuple[int, ...] = ()
    token_labels: bool = False
    stage3: str = "global"
    window: int = 14

    def __post_init__(self):
        if self.stage3 not in ("global", "window", "hybrid"):
            raise ValueError(f"UniFormer: stage3={self.stage3!r} must be 'global', 'window' or 'hybrid'")
        if not set(self.layer_scale) <= {1, 2, 3, 4}:
            raise ValueError(f"UniFormer: layer_scale={self.layer_scale} must be stages among 1, 2, 3, 4")


class UniFormer(Backbone):
    """Depthwise convolutions as token mixers in stages 1 and 2, attention in stages 3 and 4."""


SMALL = UniFormerConfig((64, 128, 320, 512), (3, 4, 8, 3))
SMALL_PLUS = UniFormerConfig((64, 128, 320, 512), (3, 5, 9, 3), conv_stem=True, conv_down=True)
BASE = UniFormerConfig((64, 128, 320, 512), (5, 8, 20, 7))

VARIANTS = {
    "uniformer_atto": UniFormerConfig(
        (16, 32, 48, 64),
        (1, 1, 4, 1),
        head_dim=16,
        conv_stem=True,
        layer_scale=(1, 4),
        token_labels=True,
        stage3="hybrid",
        window=4,
    ),
    "uniformer_small": SMALL,
    "uniformer_small_plus": replace(SMALL_PLUS, head_dim=32),
    "uniformer_small_plus_dim64": SMALL_PLUS,
    "uniformer_base": BASE,
    "uniformer_base_ls": replace(BASE, layer_scale=(3, 4)),
    "uniformer_large_ls": UniFormerConfig(
        (128, 192, 448, 640), (5, 10, 24, 7), layer_scale=(1, 2, 3, 4), token_labels=True
    ),
    "uniformer_small_tl": replace(SMALL, head_dim=32, token_labels=True),
    "uniformer_small_dim64_tl": replace(SMALL, token_labels=True),
    "uniformer_small_plus_tl": replace(SMALL_PLUS, head_dim=32, token_labels=True),
    "uniformer_small_plus_dim64_tl": replace(SMALL_PLUS, token_labels=True),
    "uniformer_base_tl": replace(BASE, head_dim=32, token_labels=True),
    "uniformer_base_dim64_tl": replace(BASE, token_labels=True),
}

norm = partial(LayerNorm2d, eps=1e-6)
patch_norm = partial(LayerNorm2d, eps=1e-5)


class TokenLabelHead(ClassifierHead):
    """timm's head; half of the maximum over all pixels of a second classifier is added to the logits."""

    def __init__(self, dim: int, num_classes: int, *, pool_type: str, drop_rate: float):
        super().__init__(dim, num_classes, pool_type=pool_type, drop_rate=drop_rate)
        self.aux = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

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
        if num_classes:
            self.aux = nn.Linear(self.in_features, num_classes, device=device, dtype=dtype)
            initialize(self.aux)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        logits = super().forward(x, pre_logits=pre_logits)
        if pre_logits or isinstance(self.aux, nn.Identity):
            return logits
        return logits + 0.5 * self.aux(x.permute(0, 2, 3, 1)).amax((1, 2))


def patch_embed(in_chs: int, out_chs: int, *, patch: int) -> nn.Sequential:
    """A convolution of non-overlapping patches and a norm; a side of n >= patch pixels becomes floor(n / patch)."""
    conv = nn.Conv2d(in_chs, out_chs, patch, patch)
    return block(pad=PadToSize(patch), conv=conv, norm=patch_norm(out_chs))


def conv_stem(in_chans: int, dim: int) -> nn.Sequential:
    """Two 3x3 convolutions of stride 2 with batch norm; a side of n pixels becomes ceil(n / 4)."""
    half = dim // 2
    conv = nn.Conv2d(in_chans, half, 3, 2, 1)
    return block(conv=conv, norm=nn.BatchNorm2d(half), act=nn.GELU(), down=conv_norm(half, dim, kernel=3, stride=2))


def conv_block(dim: int, *, mlp_ratio: float, drop_path: float, scaled: bool = False) -> nn.Sequential:
    scale = partial(LayerScale2d, dim, 1e-6) if scaled else nn.Identity
    mlp = ConvMlp(dim, int(dim * mlp_ratio), act_layer=nn.GELU)
    return block(
        cpe=Residual(depthwise(dim, kernel=3)),
        mixer=Residual(LocalMhra(dim), norm=nn.BatchNorm2d(dim), scale=scale(), drop_path=drop_path),
        mlp=Residual(mlp, norm=nn.BatchNorm2d(dim), scale=scale(), drop_path=drop_path),
    )


def attention_block(cfg: UniFormerConfig, stage: int, index: int, *, drop_path: float) -> nn.Sequential:
    dim = cfg.dims[stage]
    heads = dim // cfg.head_dim
    scale = partial(LayerScale2d, dim, 1e-6) if stage + 1 in cfg.layer_scale else nn.Identity
    windowed = stage == 2 and (cfg.stage3 == "window" or (cfg.stage3 == "hybrid" and index % 4 != 3))
    mixer = Window(dim, num_heads=heads, window=cfg.window) if windowed else FullAttention(dim, num_heads=heads)
    return block(
        cpe=Residual(depthwise(dim, kernel=3)),
        mixer=Residual(mixer, norm=norm(dim), scale=scale(), drop_path=drop_path),
        mlp=Residual(Mlp(dim, ratio=cfg.mlp_ratio), norm=norm(dim), scale=scale(), drop_path=drop_path),
    )


def build(
    cfg: UniFormerConfig, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> BackboneParts:
    rates = drop_path_rates(drop_path_rate, cfg.depths)
    stages, previous = [], in_chans
    for i, dim in enumerate(cfg.dims):
        if i < 2:
            scaled = i + 1 in cfg.layer_scale
            blocks = [conv_block(dim, mlp_ratio=cfg.mlp_ratio, drop_path=rate, scaled=scaled) for rate in rates[i]]
        else:
            blocks = [attention_block(cfg, i, j, drop_path=rate) for j, rate in enumerate(rates[i])]
        overlapping = conv_norm(previous, dim, kernel=3, stride=2) if cfg.conv_down else None
        down = (overlapping or patch_embed(previous, dim, patch=2)) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down))
        previous = dim
    head = TokenLabelHead if cfg.token_labels else ClassifierHead
    return BackboneParts(
        stem=conv_stem(in_chans, cfg.dims[0]) if cfg.conv_stem else patch_embed(in_chans, cfg.dims[0], patch=4),
        stages=stages,
        norm=nn.BatchNorm2d(cfg.dims[-1]),
        head=head(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def renamed(published: str, ours: str, layers: dict[str, str]) -> list[KeyRule]:
    """Rules for layers within a module."""
    return [KeyRule(f"{published}{theirs}.{{p}}", f"{ours}{name}.{{p}}") for theirs, name in layers.items()]


def embedding_keys(*, conv_stem: bool, conv_down: bool) -> list[KeyRule]:
    """Rules for the stem and for the downsampling between stages."""
    patches, layers = {"proj": "conv", "norm": "norm"}, {"proj.0": "conv", "proj.1": "norm"}
    stem = {**layers, "proj.3": "down.conv", "proj.4": "down.norm"} if conv_stem else patches
    return [
        *renamed("patch_embed1.", "stem.", stem),
        *renamed("patch_embed{s+1}.", "stages.{s}.down.", layers if conv_down else patches),
    ]


def block_keys(stage: int, layers: dict[str, str]) -> list[KeyRule]:
    """Rules for the blocks of a stage, counted from 0."""
    return renamed(f"blocks{stage + 1}.{{b}}.", f"stages.{stage}.blocks.{{b}}.", layers)


POSITION_AND_NORMS = {"pos_embed": "cpe.fn", "norm1": "mixer.norm", "norm2": "mlp.norm"}
MLP = {"mlp.fc1": "mlp.fn.fc1", "mlp.fc2": "mlp.fn.fc2"}
CONV_BLOCK = POSITION_AND_NORMS | MLP
CONV_BLOCK |= {"conv1": "mixer.fn.value", "attn": "mixer.fn.affinity", "conv2": "mixer.fn.proj"}
ATTENTION_BLOCK = POSITION_AND_NORMS | MLP | {"attn.qkv": "mixer.fn.qkv", "attn.proj": "mixer.fn.proj"}
# published layer scales of convolutional blocks have the shape [1, C, 1, 1]
AS_VECTOR = Edit(lambda t: (t.flatten(),), lambda t: (t[None, :, None, None],))


def key_mapping(cfg: UniFormerConfig) -> Sequence[KeyRule]:
    rules = embedding_keys(conv_stem=cfg.conv_stem, conv_down=cfg.conv_down)
    for stage in range(4):
        published, ours = f"blocks{stage + 1}.{{b}}.gamma_", f"stages.{stage}.blocks.{{b}}."
        rules += [
            KeyRule(f"{published}{number}", f"{ours}{branch}.scale.gamma", AS_VECTOR if stage < 2 else None)
            for number, branch in ((1, "mixer"), (2, "mlp"))
        ]
        rules += block_keys(stage, CONV_BLOCK if stage < 2 else ATTENTION_BLOCK)
    return [*rules, *renamed("", "", {"norm": "norm", "head": "head.fc", "aux_head": "head.aux"})]


register(
    Family(
        UniFormer,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv", "paper_ids": "arXiv:2201.09450"},
        classifier=lambda cfg: ("head.fc", "head.aux") if cfg.token_labels else "head.fc",
        dense_norm=DenseNorm(norm, "norm{s+1}.{p}"),
    ),
    __name__,
)
