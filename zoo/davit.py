"""DaViT: Dual Attention Vision Transformers.

Ding, Xiao, Codella, Luo, Wang, Yuan, ECCV 2022, arXiv 2204.03645: sec. 3.2 (spatial window attention), 3.3 (channel
group attention), 3.4 and table 1 (architectures). Released code: github.com/dingmyu/davit (MIT); its checkpoints load,
and those of timm's `davit_*` too.

Deviation: a head without pooling and classifier has no norm, so that feature extractors have no unused parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import LayerNorm2d, SelectAdaptivePool2d, trunc_normal_
from torch import Tensor, nn

from ..blocks import Channel, Mlp, NormMerge, Residual, Window, block, conv_norm, depthwise, drop_path_rates
from ._backbone import Backbone, BackboneParts, Stage
from ._family import DenseNorm, Family
from ._keymap import KeyRule
from ._registry import register

__all__ = ["DaViT", "DaViTConfig"]


@dataclass(frozen=True)
class DaViTConfig:
    """Columns of table 1 of the paper; `depths` are numbers of pairs of a spatial and a channel block."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window: int = 7
    mlp_ratio: float = 4.0


class DaViT(Backbone):
    """Alternating blocks of window attention and channel attention."""


VARIANTS = {
    "tessel_davit_atto": DaViTConfig((16, 32, 48, 64), (1, 1, 2, 1), (1, 2, 3, 4), window=4),
    "tessel_davit_tiny": DaViTConfig((96, 192, 384, 768), (1, 1, 3, 1), (3, 6, 12, 24)),
    "tessel_davit_small": DaViTConfig((96, 192, 384, 768), (1, 1, 9, 1), (3, 6, 12, 24)),
    "tessel_davit_base": DaViTConfig((128, 256, 512, 1024), (1, 1, 9, 1), (4, 8, 16, 32)),
    "tessel_davit_large": DaViTConfig((192, 384, 768, 1536), (1, 1, 9, 1), (6, 12, 24, 48), window=12),
}

norm = partial(LayerNorm2d, eps=1e-5)


class Head(nn.Module):
    """`fc(drop(norm(pool(x))))`: `[B, C, H, W]` to `[B, num_classes]`, without pooling to `[B, num_classes, H, W]`.

    If the pooling concatenates two vectors (catavgmax), each is normalized separately. Without pooling and classifier
    the head has no norm; a new norm is made when it has one of them again, or another width.
    """

    def __init__(self, dim: int, num_classes: int, *, pool_type: str, drop_rate: float):
        super().__init__()
        self.dim, self.norm = dim, nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As `zoo._backbone.Head.reset` says."""
        dim = self.dim if in_features is None else in_features
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        if not num_classes and self.global_pool.is_identity():
            self.norm = nn.Identity()
        elif reset_other or isinstance(self.norm, nn.Identity) or dim != self.dim:
            self.norm = nn.LayerNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.dim, self.num_features = dim, dim * self.global_pool.feat_mult()
        self.fc = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.num_features, num_classes, device=device, dtype=dtype)
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x).movedim(1, -1)
        x = self.drop(self.norm(x.unflatten(-1, (-1, self.dim))).flatten(-2))
        return (x if pre_logits else self.fc(x)).movedim(-1, 1)


def pair(cfg: DaViTConfig, stage: int, rates: Sequence[float]) -> nn.Sequential:
    """A spatial block, then a channel block; both have depthwise convolutions before the attention and the MLP."""
    dim, num_heads = cfg.dims[stage], cfg.num_heads[stage]
    mixers = {
        "spatial": Window(dim, num_heads=num_heads, window=cfg.window),
        "channel": Channel(dim, num_heads=num_heads),
    }
    return block(
        **{
            name: block(
                cpe1=Residual(depthwise(dim, kernel=3)),
                mixer=Residual(mixer, norm=norm(dim), drop_path=rate),
                cpe2=Residual(depthwise(dim, kernel=3)),
                mlp=Residual(Mlp(dim, ratio=cfg.mlp_ratio), norm=norm(dim), drop_path=rate),
            )
            for (name, mixer), rate in zip(mixers.items(), rates, strict=True)
        }
    )


def build(
    cfg: DaViTConfig, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> BackboneParts:
    rates = drop_path_rates(drop_path_rate, [2 * depth for depth in cfg.depths])
    stages = []
    for i, dim in enumerate(cfg.dims):
        pairs = [pair(cfg, i, rates[i][2 * p : 2 * p + 2]) for p in range(cfg.depths[i])]
        down = NormMerge(cfg.dims[i - 1], dim, norm=norm) if i else None
        stages.append(Stage(pairs, dim=dim, stride=2 if i else 1, down=down))
    return BackboneParts(
        # the released code pads sides to multiples of 4; the padding of the convolution has the same effect
        stem=conv_norm(in_chans, cfg.dims[0], kernel=7, stride=4, norm=norm),
        stages=stages,
        head=Head(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def block_keys(published: str, cpe1: str, cpe2: str) -> list[KeyRule]:
    """Rules of the blocks of the pair `published`; its spatial block has the number 0, its channel block 1."""
    return [
        KeyRule(f"{published}.{number}.{their_part}.{{p}}", f"stages.{{s}}.blocks.{{b}}.{name}.{our_part}.{{p}}")
        for number, name in enumerate(("spatial", "channel"))
        for their_part, our_part in (
            (cpe1, "cpe1.fn"),
            ("norm1", "mixer.norm"),
            ("attn.qkv", "mixer.fn.qkv"),
            ("attn.proj", "mixer.fn.proj"),
            (cpe2, "cpe2.fn"),
            ("norm2", "mlp.norm"),
            ("mlp.fc1", "mlp.fn.fc1"),
            ("mlp.fc2", "mlp.fn.fc2"),
        )
    ]


def key_mapping(cfg: DaViTConfig) -> Sequence[KeyRule]:
    return [
        KeyRule("patch_embeds.0.proj.{p}", "stem.conv.{p}"),
        KeyRule("patch_embeds.0.norm.{p}", "stem.norm.{p}"),
        KeyRule("patch_embeds.{s}.norm.{p}", "stages.{s}.down.norm.{p}"),
        KeyRule("patch_embeds.{s}.proj.{p}", "stages.{s}.down.conv.{p}"),
        *block_keys("main_blocks.{s}.{b}", "cpe.0.proj", "cpe.1.proj"),
        KeyRule("norms.{p}", "head.norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]


def timm_key_mapping(cfg: DaViTConfig) -> Sequence[KeyRule]:
    """Rules for the state dicts of timm's `davit_*`."""
    return [
        KeyRule("stem.conv.{p}", "stem.conv.{p}"),
        KeyRule("stem.norm.{p}", "stem.norm.{p}"),
        KeyRule("stages.{s}.downsample.norm.{p}", "stages.{s}.down.norm.{p}"),
        KeyRule("stages.{s}.downsample.conv.{p}", "stages.{s}.down.conv.{p}"),
        *block_keys("stages.{s}.blocks.{b}", "cpe1.proj", "cpe2.proj"),
        KeyRule("head.norm.{p}", "head.norm.{p}"),
        KeyRule("head.fc.{p}", "head.fc.{p}"),
    ]


register(
    Family(
        DaViT,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv", "paper_ids": "arXiv:2204.03645", "crop_pct": 0.9},
        # the image size of the released configuration, for which no result is reported
        reported={"tessel_davit_large": (384, None)},
        other_key_mappings=(timm_key_mapping,),
        dense_norm=DenseNorm(norm, "norm{s}.{p}"),
    ),
    __name__,
)
