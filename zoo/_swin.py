"""The layout of the Swin Transformer (Liu et al., arXiv 2103.14030), a host for any token mixer."""

from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import ClassifierHead, LayerNorm2d, register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..blocks import Mlp, Residual, ShiftedWindow, block, drop_path_rates
from ..blocks.linear import apply_linear
from ..blocks.padding import PadToMultiple, pad_to_multiple
from ._backbone import BackboneParts, Branch, Stage
from ._family import DenseNorm
from ._keymap import KeyRule, MixerKeys, transformer_keys

PATCH = 4
norm = partial(LayerNorm2d, eps=1e-5)
DENSE_NORM = DenseNorm(norm, "norm{s}.{p}")


@dataclass(frozen=True)
class SwinConfig:
    """Columns of the paper's table; `window` is the side of the windows of Swin's own blocks."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window: int = 7
    mlp_ratio: float = 4.0


@register_notrace_module
class Merge(nn.Module):
    """The four pixels of each 2 x 2 patch, normalized and projected: `[B, in_chs, H, W] -> [B, out_chs, ~H/2, ~W/2]`.

    Odd sides are padded with a row or column of zeros.
    """

    def __init__(self, in_chs: int, out_chs: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_chs, eps=1e-5)
        self.reduction = nn.Linear(4 * in_chs, out_chs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x.permute(0, 2, 3, 1), 2, 2)
        # column by column: (0, 0), (1, 0), (0, 1), (1, 1)
        patches = torch.cat([x[:, row::2, column::2] for column in range(2) for row in range(2)], -1)
        return apply_linear(self.reduction, self.norm(patches)).permute(0, 3, 1, 2)


def window_branch(cfg: SwinConfig, stage: int, index: int, drop_path: float) -> nn.Module:
    """Swin's own mixer: window attention, shifted in every second block."""
    dim, shift = cfg.dims[stage], cfg.window // 2 if index % 2 else 0
    mixer = ShiftedWindow(dim, num_heads=cfg.num_heads[stage], window=cfg.window, shift=shift)
    return Residual(mixer, norm=norm(dim), drop_path=drop_path)


def swin(
    cfg: SwinConfig,
    branch: Branch,
    *,
    in_chans: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    drop_path_rate: float,
) -> BackboneParts:
    """A Swin Transformer whose token mixers are the modules of `branch`."""
    stages = []
    for i, rates in enumerate(drop_path_rates(drop_path_rate, cfg.depths)):
        dim = cfg.dims[i]
        blocks = [
            block(
                mixer=branch(i, j, rate),
                mlp=Residual(Mlp(dim, ratio=cfg.mlp_ratio), norm=norm(dim), drop_path=rate),
            )
            for j, rate in enumerate(rates)
        ]
        down = Merge(cfg.dims[i - 1], dim) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down))
    conv = nn.Conv2d(in_chans, cfg.dims[0], PATCH, PATCH)
    return BackboneParts(
        stem=block(pad=PadToMultiple(PATCH), conv=conv, norm=norm(cfg.dims[0])),
        stages=stages,
        norm=norm(cfg.dims[-1]),
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        no_weight_decay=frozenset({"bias_table"}),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def swin_keys(mixer_keys: MixerKeys) -> list[KeyRule]:
    """The rules of the layout, of Swin's own mixers and of other mixers."""
    published, ours = "layers.{s}.blocks.{b}.", "stages.{s}.blocks.{b}."
    return [
        KeyRule("patch_embed.proj.{p}", "stem.conv.{p}"),
        KeyRule("patch_embed.norm.{p}", "stem.norm.{p}"),
        # the published merging layers end a stage, ours begin the next one
        KeyRule("layers.{s}.downsample.norm.{p}", "stages.{s+1}.down.norm.{p}"),
        KeyRule("layers.{s}.downsample.reduction.{p}", "stages.{s+1}.down.reduction.{p}"),
        KeyRule(published + "attn.relative_position_bias_table", ours + "mixer.fn.bias_table"),
        KeyRule(published + "attn.relative_position_index", None),
        KeyRule(published + "attn_mask", None),
        *mixer_keys(published + "attn.", ours + "mixer.fn."),
        *transformer_keys(published, ours),
        KeyRule("norm.{p}", "norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]
