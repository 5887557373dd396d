"""The layout of DeiT (Touvron et al., arXiv 2012.12877, without distillation), a host for any token mixer.

One patch embedding of stride 16, a class token, and blocks of one width; each fourth of the blocks is a stage. For
images of other sizes the position embedding is resized bilinearly.
"""

from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import LayerNorm2d, SelectAdaptivePool2d, trunc_normal_
from torch import Tensor, nn

from ..blocks import FullAttention, Mlp, PositionEmbedding, Residual, drop_path_rates
from ..blocks.padding import PadToSize
from ..kernels.tables import Grid
from ._backbone import BackboneParts, Branch, Stage, class_token_first
from ._keymap import Edit, KeyRule, MixerKeys, transformer_keys

PATCH = 16
STAGES = 4
norm = partial(LayerNorm2d, eps=1e-6)


@dataclass(frozen=True)
class DeiTConfig:
    """Columns of the paper's table; `depth` is a multiple of 4, `img_size` that of the position embedding."""

    dim: int
    num_heads: int
    depth: int = 12
    img_size: int = 224
    mlp_ratio: float = 4.0


class TokenEmbed(nn.Module):
    """Image `[B, in_chans, H, W]` to the map of patches `[B, dim, H/16, W/16]` and the class token `[B, 1, dim]`."""

    def __init__(self, in_chans: int, dim: int, *, trained_size: int):
        super().__init__()
        self.pad = PadToSize(PATCH)
        self.conv = nn.Conv2d(in_chans, dim, PATCH, PATCH)
        self.position = PositionEmbedding(dim, trained_size=trained_size)
        self.token, self.token_position = (nn.Parameter(torch.empty(1, 1, dim)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.token, std=0.02)
        trunc_normal_(self.token_position, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.position(self.conv(self.pad(x)))
        return x, (self.token + self.token_position).expand(x.shape[0], -1, -1)


class TokenBlock(nn.Module):
    """A block on a map `[B, C, H, W]` and a class token `[B, 1, C]`: branches of the token mixer and of the MLP.

    Both branches see all tokens as a map of one row, `[B, C, 1, 1 + H*W]`; the mixer is given the size (H, W) too.
    """

    def __init__(self, *, mixer: nn.Module, mlp: nn.Module):
        super().__init__()
        self.mixer, self.mlp = mixer, mlp

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        size = x[0].shape[2:]
        row = class_token_first(x[0], x[1]).unsqueeze(1).permute(0, 3, 1, 2)
        tokens = self.mlp(self.mixer(row, size)).permute(0, 2, 3, 1).squeeze(1)
        return tokens[:, 1:].unflatten(1, size).permute(0, 3, 1, 2), tokens[:, :1]


class TokenNorm(nn.LayerNorm):
    """LayerNorm of a map and a class token."""

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return super().forward(x[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), super().forward(x[1])


class TokenHead(nn.Module):
    """`fc(drop(pool(x)))` of tokens `[B, 1 + N, C]`: pooling "token" takes the first, timm's others pool the rest."""

    def __init__(self, dim: int, num_classes: int, *, pool_type: str, drop_rate: float):
        super().__init__()
        self.dim, self.pool_type = dim, pool_type
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
        if pool_type is not None:
            self.pool_type = pool_type
            pools = pool_type not in ("token", "")
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=True) if pools else nn.Identity()
        self.dim = in_features or self.dim
        self.num_features = self.dim
        if isinstance(self.global_pool, SelectAdaptivePool2d):
            self.num_features *= self.global_pool.feat_mult()
        self.fc = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.num_features, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool_type == "token":
            x = x[:, 0]
        elif self.pool_type:
            x = self.global_pool(x[:, 1:].transpose(1, 2).unsqueeze(2))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class TokenAttention(FullAttention):
    """Full attention over all tokens, which needs no size of the map."""

    def forward(self, x: Tensor, size: Grid) -> Tensor:
        return super().forward(x)


def attention_branch(cfg: DeiTConfig, drop_path: float) -> nn.Module:
    """DeiT's own mixer."""
    return Residual(TokenAttention(cfg.dim, num_heads=cfg.num_heads), norm=norm(cfg.dim), drop_path=drop_path)


def deit(
    cfg: DeiTConfig,
    branch: Branch,
    *,
    in_chans: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    drop_path_rate: float,
) -> BackboneParts:
    """A DeiT whose token mixers are the modules of `branch`."""
    per_stage = cfg.depth // STAGES
    stages = []
    for i, rates in enumerate(drop_path_rates(drop_path_rate, [per_stage] * STAGES)):
        blocks = [
            TokenBlock(
                mixer=branch(i, j, rate),
                mlp=Residual(Mlp(cfg.dim, ratio=cfg.mlp_ratio), norm=norm(cfg.dim), drop_path=rate),
            )
            for j, rate in enumerate(rates)
        ]
        stages.append(Stage(blocks, dim=cfg.dim, stride=1))
    return BackboneParts(
        stem=TokenEmbed(in_chans, cfg.dim, trained_size=cfg.img_size // PATCH),
        stages=stages,
        norm=TokenNorm(cfg.dim, eps=1e-6),
        head=TokenHead(cfg.dim, num_classes, pool_type=global_pool, drop_rate=drop_rate),
        stem_stride=PATCH,
        no_weight_decay=frozenset({"token", "token_position", "table"}),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# published table of all positions <-> that of the class token and those of the patches
SPLIT = Edit(lambda table: table.split([1, table.shape[1] - 1], 1), lambda token, rest: (torch.cat([token, rest], 1),))


def deit_keys(cfg: DeiTConfig, mixer_keys: MixerKeys) -> list[KeyRule]:
    """The rules of the layout, and for each block those of its mixer."""
    rules = [
        KeyRule("cls_token", "stem.token"),
        KeyRule("pos_embed", ["stem.token_position", "stem.position.table"], SPLIT),
        KeyRule("patch_embed.proj.{p}", "stem.conv.{p}"),
        KeyRule("norm.{p}", "norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]
    for index in range(cfg.depth):
        stage, block = divmod(index, cfg.depth // STAGES)
        published, ours = f"blocks.{index}.", f"stages.{stage}.blocks.{block}."
        rules += [*mixer_keys(published + "attn.", ours + "mixer.fn."), *transformer_keys(published, ours)]
    return rules
