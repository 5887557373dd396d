"""CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows.

Dong, Bao, Chen, Zhang, Yu, Yuan, Chen, Guo, CVPR 2022, arXiv 2107.00652: sec. 3 (3.2: cross-shaped windows, LePE).
Released code: github.com/microsoft/CSWin-Transformer (MIT); its checkpoints load. Numbers of heads are those of the
code and the released weights, which differ from the paper's for the base model.

Deviations from the released code:
- Its classifiers fail if the stripes do not divide the feature map; here maps are padded, as in its dense-prediction
  models.
- Stages 1-3 have stripes in two directions for every image size. The released classifiers have only one, with other
  parameters, if a stripe covers the whole map; no released weights fit these.
- The large models double their width at each stage, as the released classifiers do but not the dense-prediction code.
- The norms of the dense-prediction models are in `zoo.dense.DenseBackbone`.
- Images with a side of less than 3 pixels are padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.layers import ClassifierHead, LayerNorm2d, trunc_normal_
from torch import nn

from ..blocks import CrossShapedWindow, Mlp, Residual, block, conv_norm, drop_path_rates
from ..blocks.padding import PadToSize
from ._backbone import Backbone, BackboneParts, Branch, Stage
from ._family import DenseNorm, Family
from ._keymap import KeyRule, transformer_keys
from ._registry import register

__all__ = ["CSWin", "CSWinConfig"]


@dataclass(frozen=True)
class CSWinConfig:
    """Columns of the paper's architecture table; `stripe_widths` are of stages 1-3, stage 4 has full attention."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    stripe_widths: tuple[int, ...] = (1, 2, 7)
    mlp_ratio: float = 4.0


class CSWin(Backbone):
    """Cross-shaped window attention in stages 1-3 and full attention in stage 4."""


VARIANTS = {
    "cswin_atto": CSWinConfig((16, 32, 64, 96), (1, 1, 2, 1), (2, 4, 8, 6), stripe_widths=(1, 2, 4), mlp_ratio=3.0),
    "cswin_tiny": CSWinConfig((64, 128, 256, 512), (1, 2, 21, 1), (2, 4, 8, 16)),
    "cswin_small": CSWinConfig((64, 128, 256, 512), (2, 4, 32, 2), (2, 4, 8, 16)),
    "cswin_base": CSWinConfig((96, 192, 384, 768), (2, 4, 32, 2), (4, 8, 16, 32)),
    "cswin_base_384": CSWinConfig((96, 192, 384, 768), (2, 4, 32, 2), (4, 8, 16, 32), stripe_widths=(1, 2, 12)),
    "cswin_large": CSWinConfig((144, 288, 576, 1152), (2, 4, 32, 2), (6, 12, 24, 24)),
    "cswin_large_384": CSWinConfig((144, 288, 576, 1152), (2, 4, 32, 2), (6, 12, 24, 24), stripe_widths=(1, 2, 12)),
}

norm = partial(LayerNorm2d, eps=1e-5)
DENSE_NORM = DenseNorm(norm, "norm{s+1}.{p}")


def stripe_branch(cfg: CSWinConfig, stage: int, drop_path: float) -> nn.Module:
    """CSWin's own mixer."""
    dim, width = cfg.dims[stage], (*cfg.stripe_widths, None)[stage]
    mixer = CrossShapedWindow(dim, num_heads=cfg.num_heads[stage], stripe_width=width)
    return Residual(mixer, norm=norm(dim), drop_path=drop_path)


def cswin(
    cfg: CSWinConfig,
    branch: Branch,
    *,
    in_chans: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    drop_path_rate: float,
) -> BackboneParts:
    """The layout of CSWin, with token mixers that are the modules of `branch`."""
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
        down = conv_norm(cfg.dims[i - 1], dim, kernel=3, stride=2, norm=norm) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down))
    # a side of n >= 3 pixels becomes (n - 3) // 4 + 1
    conv = nn.Conv2d(in_chans, cfg.dims[0], 7, stride=4, padding=2)
    return BackboneParts(
        stem=block(pad=PadToSize(3), conv=conv, norm=norm(cfg.dims[0])),
        stages=stages,
        norm=norm(cfg.dims[-1]),
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        init=initialize,
    )


def build(cfg: CSWinConfig, **arguments: Any) -> BackboneParts:
    return cswin(cfg, lambda stage, _, drop_path: stripe_branch(cfg, stage, drop_path), **arguments)


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def cswin_keys(mixer_keys: Sequence[KeyRule] = ()) -> list[KeyRule]:
    """The rules of the layout and of CSWin's own mixers, after those of other mixers."""
    published, ours = "stage{s+1}.{b}.", "stages.{s}.blocks.{b}."
    return [
        *mixer_keys,
        KeyRule("stage1_conv_embed.0.{p}", "stem.conv.{p}"),
        KeyRule("stage1_conv_embed.2.{p}", "stem.norm.{p}"),
        KeyRule("merge{s}.conv.{p}", "stages.{s}.down.conv.{p}"),
        KeyRule("merge{s}.norm.{p}", "stages.{s}.down.norm.{p}"),
        KeyRule(published + "qkv.{p}", ours + "mixer.fn.qkv.{p}"),
        KeyRule(published + "attns.{h}.get_v.{p}", ours + "mixer.fn.lepe.{h}.{p}"),
        KeyRule(published + "proj.{p}", ours + "mixer.fn.proj.{p}"),
        *transformer_keys(published, ours),
        KeyRule("norm.{p}", "norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]


def key_mapping(cfg: CSWinConfig) -> Sequence[KeyRule]:
    return cswin_keys()


register(
    Family(
        CSWin,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv", "paper_ids": "arXiv:2107.00652", "crop_pct": 0.9},
        dense_norm=DENSE_NORM,
    ),
    __name__,
)
