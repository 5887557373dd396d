"""Bridging the Divide: Reconsidering Softmax and Linear Attention.

Han, Pu, Xia, Han, Pan, Li, Lu, Song, Huang, NeurIPS 2024, arXiv 2412.06590: InLine attention in the layouts of DeiT,
PVT, Swin and CSWin. Released code: github.com/LeapLabTHU/InLine, without a license; its checkpoints load. Widths,
heads, depths and the stages with InLine attention are those of the released configurations.

Deviations from the released code:
- Its models take images of one size. Here position embeddings are resized bilinearly, and maps are padded where a
  window does not divide them.
- No dense-prediction code was released; the norms are those of the hosts' dense-prediction models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..blocks import InLine, Residual
from . import _deit, _pvt, _swin
from . import cswin as _cswin
from ._backbone import Backbone, BackboneParts
from ._deit import DeiTConfig, deit, deit_keys
from ._family import Family
from ._keymap import Edit, KeyRule
from ._pvt import PVTConfig, pvt, pvt_keys
from ._registry import register
from ._swin import SwinConfig, swin, swin_keys, window_branch
from .cswin import CSWinConfig, cswin, cswin_keys, stripe_branch

__all__ = ["InLineCSWin", "InLineCSWinConfig", "InLineDeiT", "InLinePVT", "InLineSwin", "InLineSwinConfig"]


@dataclass(frozen=True)
class InLineSwinConfig(SwinConfig):
    """inline_blocks: the first blocks of each stage, which have InLine attention."""

    inline_blocks: tuple[int, ...] = (2, 2, 0, 0)


@dataclass(frozen=True)
class InLineCSWinConfig(CSWinConfig):
    """inline_stages: the first stages, which have InLine attention."""

    inline_stages: int = 2


class InLineDeiT(Backbone):
    """DeiT with InLine attention in all blocks."""


class InLinePVT(Backbone):
    """A pyramid of four stages with InLine attention in all blocks."""


class InLineSwin(Backbone):
    """Swin with InLine attention in the first stages, shifted windows in the others."""


class InLineCSWin(Backbone):
    """CSWin with InLine attention in the first stages, cross-shaped windows in the others."""


DEIT_VARIANTS = {
    "inline_deit_atto": DeiTConfig(64, 4, depth=4),
    "inline_deit_tiny": DeiTConfig(192, 6),
    "inline_deit_small": DeiTConfig(320, 10, img_size=288),
    "inline_deit_base": DeiTConfig(384, 12, img_size=448),
}

PVT_DIMS, PVT_HEADS = (64, 128, 320, 512), (2, 4, 10, 16)
PVT_VARIANTS = {
    "inline_pvt_atto": PVTConfig((16, 32, 48, 64), (1, 1, 1, 1), (1, 2, 3, 4), (4, 4, 4, 4)),
    "inline_pvt_tiny": PVTConfig(PVT_DIMS, (2, 2, 2, 2), PVT_HEADS),
    "inline_pvt_small": PVTConfig(PVT_DIMS, (3, 4, 6, 3), PVT_HEADS),
    "inline_pvt_medium": PVTConfig(PVT_DIMS, (3, 4, 18, 3), PVT_HEADS),
    "inline_pvt_large": PVTConfig(PVT_DIMS, (3, 8, 27, 3), PVT_HEADS),
}

SWIN_DIMS, SWIN_HEADS = (96, 192, 384, 768), (3, 6, 12, 24)
WIDE_DIMS, WIDE_HEADS = (128, 256, 512, 1024), (4, 8, 16, 32)
SWIN_VARIANTS = {
    "inline_swin_atto": InLineSwinConfig((16, 32, 48, 64), (1, 1, 3, 1), (1, 2, 3, 4), inline_blocks=(1, 1, 1, 0)),
    "inline_swin_tiny": InLineSwinConfig(SWIN_DIMS, (2, 2, 6, 2), SWIN_HEADS, inline_blocks=(2, 2, 6, 0)),
    "inline_swin_small": InLineSwinConfig(SWIN_DIMS, (2, 2, 18, 2), SWIN_HEADS),
    "inline_swin_base": InLineSwinConfig(WIDE_DIMS, (2, 2, 18, 2), WIDE_HEADS, inline_blocks=(2, 2, 2, 0)),
    "inline_swin_base_384": InLineSwinConfig(
        WIDE_DIMS, (2, 2, 18, 2), WIDE_HEADS, window=12, inline_blocks=(2, 2, 2, 0)
    ),
}

CSWIN_VARIANTS = {
    "inline_cswin_atto": InLineCSWinConfig((16, 32, 48, 64), (1, 1, 1, 1), (1, 2, 4, 4)),
    "inline_cswin_tiny": InLineCSWinConfig((64, 128, 256, 512), (2, 4, 18, 1), (2, 4, 8, 16)),
    "inline_cswin_small": InLineCSWinConfig((64, 128, 256, 512), (3, 6, 29, 2), (2, 4, 8, 16)),
    "inline_cswin_base": InLineCSWinConfig((96, 192, 384, 768), (3, 6, 29, 2), (4, 8, 16, 32)),
    "inline_cswin_base_384": InLineCSWinConfig(
        (96, 192, 384, 768), (3, 6, 29, 2), (4, 8, 16, 32), stripe_widths=(1, 2, 12)
    ),
}


class FilterFromInput(Residual):
    """A residual branch with an `InLine` mixer whose filter is generated from the branch's input before the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fn(self.norm(x), source=x))


def build_deit(cfg: DeiTConfig, **arguments: Any) -> BackboneParts:
    def branch(stage: int, index: int, drop_path: float) -> nn.Module:
        return Residual(InLine(cfg.dim, num_heads=cfg.num_heads), norm=_deit.norm(cfg.dim), drop_path=drop_path)

    return deit(cfg, branch, **arguments)


def build_pvt(cfg: PVTConfig, **arguments: Any) -> BackboneParts:
    def branch(stage: int, index: int, drop_path: float) -> nn.Module:
        dim = cfg.dims[stage]
        return Residual(InLine(dim, num_heads=cfg.num_heads[stage]), norm=_pvt.norm(dim), drop_path=drop_path)

    return pvt(cfg, branch, **arguments)


def build_swin(cfg: InLineSwinConfig, **arguments: Any) -> BackboneParts:
    def branch(stage: int, index: int, drop_path: float) -> nn.Module:
        if index >= cfg.inline_blocks[stage]:
            return window_branch(cfg, stage, index, drop_path)
        dim = cfg.dims[stage]
        return Residual(InLine(dim, num_heads=cfg.num_heads[stage]), norm=_swin.norm(dim), drop_path=drop_path)

    return swin(cfg, branch, **arguments)


def build_cswin(cfg: InLineCSWinConfig, **arguments: Any) -> BackboneParts:
    def branch(stage: int, index: int, drop_path: float) -> nn.Module:
        if stage >= cfg.inline_stages:
            return stripe_branch(cfg, stage, drop_path)
        dim = cfg.dims[stage]
        mixer = InLine(dim, num_heads=cfg.num_heads[stage], local=nn.Conv2d(dim, dim, 3, padding=1, groups=dim))
        return FilterFromInput(mixer, norm=_cswin.norm(dim), drop_path=drop_path)

    return cswin(cfg, branch, **arguments)


# weights of the published one-dimensional 1x1 convolutions <-> ours, which have two dimensions
TWO_DIMENSIONS = Edit(lambda w: (w.unsqueeze(-1),), lambda w: (w.squeeze(-1),))


def filter_keys(published: str, ours: str) -> list[KeyRule]:
    return [
        KeyRule(published + "residual.{n}.weight", ours + "filter.{n}.weight", TWO_DIMENSIONS),
        KeyRule(published + "residual.{n}.bias", ours + "filter.{n}.bias"),
    ]


def inline_keys(published: str, ours: str) -> list[KeyRule]:
    """Rules of a mixer, whether it is InLine attention or full attention."""
    return [
        *filter_keys(published, ours),
        KeyRule(published + "qkv.{p}", ours + "qkv.{p}"),
        KeyRule(published + "proj.{p}", ours + "proj.{p}"),
    ]


def deit_key_mapping(cfg: DeiTConfig) -> Sequence[KeyRule]:
    return deit_keys(cfg, inline_keys)


def pvt_key_mapping(cfg: PVTConfig) -> Sequence[KeyRule]:
    return pvt_keys(inline_keys)


def swin_key_mapping(cfg: InLineSwinConfig) -> Sequence[KeyRule]:
    return swin_keys(inline_keys)


def cswin_key_mapping(cfg: InLineCSWinConfig) -> Sequence[KeyRule]:
    rules = []
    for stage in range(cfg.inline_stages):
        published, ours = f"stage{stage + 1}.{{b}}.attns.0.", f"stages.{stage}.blocks.{{b}}.mixer.fn."
        rules += [*filter_keys(published, ours), KeyRule(published + "get_v.{p}", ours + "local.{p}")]
    return cswin_keys(rules)


# published with images that are warped to a square
SHARED = {"first_conv": "stem.conv", "paper_ids": "arXiv:2412.06590", "crop_mode": "squash"}

register(
    Family(
        InLineDeiT,
        DEIT_VARIANTS,
        build_deit,
        deit_key_mapping,
        pretrained_cfg=SHARED,
        global_pool="token",
        stride=_deit.PATCH,
    ),
    __name__,
)
register(Family(InLinePVT, PVT_VARIANTS, build_pvt, pvt_key_mapping, pretrained_cfg=SHARED), __name__)
register(
    Family(
        InLineSwin,
        SWIN_VARIANTS,
        build_swin,
        swin_key_mapping,
        pretrained_cfg=SHARED,
        # published with neither weights nor a result
        reported={"inline_swin_base_384": (384, None)},
        dense_norm=_swin.DENSE_NORM,
    ),
    __name__,
)
register(
    Family(
        InLineCSWin,
        CSWIN_VARIANTS,
        build_cswin,
        cswin_key_mapping,
        pretrained_cfg=SHARED,
        reported={"inline_cswin_base_384": (384, 85.7)},
        dense_norm=_cswin.DENSE_NORM,
    ),
    __name__,
)
