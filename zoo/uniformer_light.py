"""UniFormer, light models: half of the pixels attend in stages 3 and 4, chosen by a class token.

Li, Wang, Zhang, Gao, Song, Liu, Li, Qiao, TPAMI 2023, arXiv 2201.09450. Released code: github.com/Sense-X/UniFormer
(Apache-2.0), uniformer_light; its checkpoints load. Stages 1 and 2 are those of `uniformer.py`.

In training the released models return the logits of two classifiers, of the pooled map and of the class token, and the
loss is the mean of both cross entropies. Here that needs `separate_logits=True`; without it the model returns one
tensor in training too, the mean of both logits. In evaluation only the first classifier counts, here and there.

Deviation: sides that are too small for a patch are padded. With `features_only=True` and `feature_cls="list"` or "fx"
the third feature is a tuple whose first entry is the map; the default, "getter", returns maps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import ClassifierHead, register_notrace_module
from torch import Tensor, nn

from ..blocks import MergeSelection, ScoreTokens, Selection, SelectTokens, drop_path_rates
from ._backbone import Backbone, BackboneParts, Stage, feature_map
from ._family import DenseNorm, Family
from ._keymap import KeyRule
from ._registry import register
from .uniformer import (
    CONV_BLOCK,
    block_keys,
    conv_block,
    conv_stem,
    embedding_keys,
    initialize,
    norm,
    patch_embed,
    renamed,
)

__all__ = ["UniFormerLight", "UniFormerLightConfig"]


@dataclass(frozen=True)
class UniFormerLightConfig:
    """Columns of the table of models in the released code; separate_logits: return two tensors in training."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    head_dim: int
    mlp_ratio: float = 3.0
    separate_logits: bool = False


class UniFormerLight(Backbone):
    """Depthwise convolutions in stages 1 and 2, attention of selected pixels in stages 3 and 4."""


VARIANTS = {
    "uniformer_light_atto": UniFormerLightConfig((16, 32, 48, 64), (1, 1, 3, 2), 16),
    "uniformer_xxsmall": UniFormerLightConfig((56, 112, 224, 448), (2, 5, 8, 2), 28),
    "uniformer_xsmall": UniFormerLightConfig((64, 128, 256, 512), (3, 5, 9, 3), 32),
}


@register_notrace_module
class LastMap(nn.Module):
    """What the last stage passes on: the whole selection in training, where the head needs the class token."""

    def forward(self, selection: Selection) -> Selection | Tensor:
        return selection if self.training else selection.map


@register_notrace_module
class MapNorm(nn.Module):
    """Batch norm of the map of a selection, or of a map."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Selection | Tensor) -> Selection | Tensor:
        return self.norm(x) if isinstance(x, Tensor) else x._replace(map=self.norm(x.map))


class TokenHead(ClassifierHead):
    """timm's head, and in training a classifier of the class token.

    In training it returns the mean of both logits for a selection, with `separate` both as a tuple.
    """

    def __init__(self, dim: int, num_classes: int, *, pool_type: str, drop_rate: float, separate: bool):
        super().__init__(dim, num_classes, pool_type=pool_type, drop_rate=drop_rate)
        self.separate = separate
        self.token_norm = nn.LayerNorm(dim) if num_classes else nn.Identity()
        self.token_fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

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
        if not num_classes:
            self.token_norm, self.token_fc = nn.Identity(), nn.Identity()
            return
        if reset_other or isinstance(self.token_norm, nn.Identity):
            self.token_norm = nn.LayerNorm(self.in_features, device=device, dtype=dtype)
        self.token_fc = nn.Linear(self.in_features, num_classes, device=device, dtype=dtype)
        initialize(self.token_fc)

    def forward(self, x: Selection | Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        logits = super().forward(feature_map(x), pre_logits=pre_logits)
        if pre_logits or isinstance(x, Tensor) or isinstance(self.token_fc, nn.Identity):
            return logits
        of_token = self.token_fc(self.token_norm(x.token))
        return (logits, of_token) if self.separate else (logits + of_token) / 2


register_notrace_module(TokenHead)


def build(
    cfg: UniFormerLightConfig,
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
        down = patch_embed(cfg.dims[i - 1], dim, patch=2) if i else None
        if i < 2:
            blocks = [conv_block(dim, mlp_ratio=cfg.mlp_ratio, drop_path=rate) for rate in rates[i]]
        else:
            kinds = [ScoreTokens if i == 2 and j == 0 else SelectTokens for j in range(cfg.depths[i])]
            heads = dim // cfg.head_dim
            blocks = [
                kind(dim, num_heads=heads, mlp_ratio=cfg.mlp_ratio, drop_path=rate)
                for kind, rate in zip(kinds, rates[i], strict=True)
            ]
        if i == 3:
            down = MergeSelection(cfg.dims[2], dim, down=down)
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down, norm=LastMap() if i == 3 else None))
    return BackboneParts(
        stem=conv_stem(in_chans, cfg.dims[0]),
        stages=stages,
        norm=MapNorm(cfg.dims[-1]),
        head=TokenHead(
            cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, separate=cfg.separate_logits
        ),
        no_weight_decay=frozenset({"token"}),
        init=initialize,
    )


def key_mapping(cfg: UniFormerLightConfig) -> Sequence[KeyRule]:
    layers = {
        "pos_embed": "cpe.fn",
        "norm1": "sequence.norm1",
        "attn.qkv": "sequence.mixer.qkv",
        "attn.proj": "sequence.mixer.proj",
        "norm2": "sequence.norm2",
        "mlp.fc1": "sequence.mlp.fc1",
        "mlp.fc2": "sequence.mlp.fc2",
    }
    top = {"cls_upsample": "stages.3.down.token", "norm": "norm.norm"}
    top |= {"head": "head.fc", "norm_cls": "head.token_norm", "head_cls": "head.token_fc"}
    return [
        KeyRule("cls_token", "stages.2.blocks.0.token"),
        *renamed("patch_embed4.", "stages.3.down.down.", {"proj": "conv", "norm": "norm"}),
        *embedding_keys(conv_stem=True, conv_down=False),
        *(rule for stage in range(4) for rule in block_keys(stage, CONV_BLOCK if stage < 2 else layers)),
        *renamed("", "", top),
    ]


register(
    Family(
        UniFormerLight,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv", "paper_ids": "arXiv:2201.09450"},
        classifier=lambda cfg: ("head.fc", "head.token_fc"),
        dense_norm=DenseNorm(norm, "norm{s+1}.{p}"),
    ),
    __name__,
)
