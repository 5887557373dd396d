"""Agent Attention: On the Integration of Softmax and Linear Attention.

Han, Ye, Han, Xia, Pan, Wan, Song, Huang, ECCV 2024, arXiv 2312.08874, in the layouts of DeiT, PVT, Swin and CSWin.
Released code: github.com/LeapLabTHU/Agent-Attention, without a license; its checkpoints load. Widths, depths and the
stages with agent attention are those of the released configurations.

Deviations from the released code:
- Its classifiers take images of one size. Here position biases and embeddings are resized to every map, by the rules
  of its dense-prediction models, also in the DeiT and CSWin layouts, for which there are none.
- A Swin block is not shifted if a side of its map is at most the window, as in the classifiers. The released
  dense-prediction code shifts such maps too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..blocks import Agent, Residual
from . import _deit, _pvt, _swin
from . import cswin as _cswin
from ._backbone import Backbone, BackboneParts
from ._deit import DeiTConfig, attention_branch, deit, deit_keys
from ._family import Family
from ._keymap import Edit, KeyRule
from ._pvt import PVTConfig, pvt, pvt_keys
from ._registry import register
from ._swin import SwinConfig, swin, swin_keys, window_branch
from .cswin import CSWinConfig, cswin, cswin_keys, stripe_branch

__all__ = [
    "AgentCSWin",
    "AgentCSWinConfig",
    "AgentDeiT",
    "AgentDeiTConfig",
    "AgentPVT",
    "AgentPVTConfig",
    "AgentSwin",
    "AgentSwinConfig",
]


@dataclass(frozen=True)
class AgentDeiTConfig(DeiTConfig):
    """agents: number of agent tokens. agent_blocks: the first blocks, which have agent attention; None: all."""

    agents: int = 49
    agent_blocks: int | None = None


@dataclass(frozen=True)
class AgentPVTConfig(PVTConfig):
    """agents: number of agent tokens in each stage. pool_sides: of other grids of agents, to which biases are resized,
    as in the published dense-prediction models."""

    agents: tuple[int, ...] = (9, 16, 49, 49)
    pool_sides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class AgentSwinConfig(SwinConfig):
    """agents, pool_sides: as in `AgentPVTConfig`. agent_blocks: the first blocks of each stage, which have agent
    attention. img_size: that of the position biases."""

    agent_blocks: tuple[int, ...] = (2, 2, 0, 0)
    agents: tuple[int, ...] = (9, 16, 49, 49)
    pool_sides: tuple[int, ...] | None = None
    img_size: int = 224


@dataclass(frozen=True)
class AgentCSWinConfig(CSWinConfig):
    """agents, pool_sides, img_size: as in `AgentSwinConfig`. agent_stages: the first stages, with agent attention."""

    agent_stages: int = 2
    agents: tuple[int, ...] = (9, 16, 49, 49)
    pool_sides: tuple[int, ...] | None = None
    img_size: int = 224


class AgentDeiT(Backbone):
    """DeiT with agent attention in all or the first blocks."""


class AgentPVT(Backbone):
    """A pyramid of four stages with agent attention in all blocks."""


class AgentSwin(Backbone):
    """Swin with agent attention in the first stages, shifted windows in the others."""


class AgentCSWin(Backbone):
    """CSWin with agent attention in the first stages, cross-shaped windows in the others."""


DEIT_VARIANTS = {
    "agent_deit_atto": AgentDeiTConfig(64, 2, depth=4, agents=16, agent_blocks=3),
    "agent_deit_tiny": AgentDeiTConfig(192, 3),
    "agent_deit_small": AgentDeiTConfig(384, 6),
    "agent_deit_small_448": AgentDeiTConfig(384, 6, img_size=448),
    "agent_deit_base": AgentDeiTConfig(768, 12, agents=81, agent_blocks=4),
}

PVT_DIMS, PVT_HEADS = (64, 128, 320, 512), (1, 2, 5, 8)
PVT_VARIANTS = {
    "agent_pvt_atto": AgentPVTConfig((16, 32, 48, 64), (1, 1, 1, 1), (1, 2, 3, 4), (4, 4, 4, 4)),
    "agent_pvt_tiny": AgentPVTConfig(PVT_DIMS, (2, 2, 2, 2), PVT_HEADS),
    "agent_pvt_small": AgentPVTConfig(PVT_DIMS, (3, 4, 6, 3), PVT_HEADS),
    "agent_pvt_medium": AgentPVTConfig(PVT_DIMS, (3, 4, 18, 3), PVT_HEADS),
    "agent_pvt_medium_256": AgentPVTConfig(PVT_DIMS, (3, 4, 18, 3), PVT_HEADS, img_size=256),
    "agent_pvt_large": AgentPVTConfig(PVT_DIMS, (3, 8, 27, 3), PVT_HEADS),
}

SWIN_DIMS, SWIN_HEADS = (96, 192, 384, 768), (3, 6, 12, 24)
WIDE_DIMS, WIDE_HEADS = (128, 256, 512, 1024), (4, 8, 16, 32)
SWIN_VARIANTS = {
    "agent_swin_atto": AgentSwinConfig((16, 32, 48, 96), (1, 1, 3, 1), (1, 2, 3, 6), agent_blocks=(1, 1, 1, 0)),
    "agent_swin_tiny": AgentSwinConfig(SWIN_DIMS, (2, 2, 6, 2), SWIN_HEADS, agent_blocks=(2, 2, 6, 0)),
    "agent_swin_small": AgentSwinConfig(SWIN_DIMS, (2, 2, 18, 2), SWIN_HEADS),
    "agent_swin_small_288": AgentSwinConfig(SWIN_DIMS, (2, 2, 18, 2), SWIN_HEADS, window=9, img_size=288),
    "agent_swin_base": AgentSwinConfig(WIDE_DIMS, (2, 2, 18, 2), WIDE_HEADS, agent_blocks=(2, 2, 2, 0)),
    "agent_swin_base_384": AgentSwinConfig(
        WIDE_DIMS, (2, 2, 18, 2), WIDE_HEADS, window=12, agent_blocks=(2, 2, 2, 0), img_size=384
    ),
}

CSWIN_VARIANTS = {
    "agent_cswin_atto": AgentCSWinConfig((16, 32, 48, 64), (1, 1, 1, 1), (1, 2, 4, 4)),
    "agent_cswin_tiny": AgentCSWinConfig((64, 128, 256, 512), (2, 4, 18, 1), (2, 4, 8, 16)),
    "agent_cswin_small": AgentCSWinConfig((64, 128, 256, 512), (3, 6, 29, 2), (2, 4, 8, 16)),
    "agent_cswin_base": AgentCSWinConfig((96, 192, 384, 768), (3, 6, 29, 2), (4, 8, 16, 32)),
    "agent_cswin_base_384": AgentCSWinConfig(
        (96, 192, 384, 768), (3, 6, 29, 2), (4, 8, 16, 32), stripe_widths=(1, 2, 12), img_size=384
    ),
}


def agent_mixer(cfg: AgentPVTConfig | AgentSwinConfig | AgentCSWinConfig, stage: int) -> Agent:
    return Agent(
        cfg.dims[stage],
        num_heads=cfg.num_heads[stage],
        trained_size=cfg.img_size // (4 << stage),
        agents=cfg.agents[stage],
        pool_side=cfg.pool_sides[stage] if cfg.pool_sides else None,
    )


def build_deit(cfg: AgentDeiTConfig, **arguments: Any) -> BackboneParts:
    count = cfg.depth if cfg.agent_blocks is None else cfg.agent_blocks

    def branch(stage: int, index: int, drop_path: float) -> nn.Module:
        if stage * (cfg.depth // _deit.STAGES) + index >= count:
            return attention_branch(cfg, drop_path)
        side = cfg.img_size // _deit.PATCH
        mixer = Agent(cfg.dim, num_heads=cfg.num_heads, trained_size=side, agents=cfg.agents, class_token=True)
        return Residual(mixer, norm=_deit.norm(cfg.dim), drop_path=drop_path)

    return deit(cfg, branch, **arguments)


def build_pvt(cfg: AgentPVTConfig, **arguments: Any) -> BackboneParts:
    def branch(stage: int, index: int, drop_path: float) -> nn.Module:
        return Residual(agent_mixer(cfg, stage), norm=_pvt.norm(cfg.dims[stage]), drop_path=drop_path)

    return pvt(cfg, branch, **arguments)


def build_swin(cfg: AgentSwinConfig, **arguments: Any) -> BackboneParts:
    def branch(stage: int, index: int, drop_path: float) -> nn.Module:
        if index >= cfg.agent_blocks[stage]:
            return window_branch(cfg, stage, index, drop_path)
        return Residual(agent_mixer(cfg, stage), norm=_swin.norm(cfg.dims[stage]), drop_path=drop_path)

    return swin(cfg, branch, **arguments)


def build_cswin(cfg: AgentCSWinConfig, **arguments: Any) -> BackboneParts:
    def branch(stage: int, index: int, drop_path: float) -> nn.Module:
        if stage >= cfg.agent_stages:
            return stripe_branch(cfg, stage, drop_path)
        return Residual(agent_mixer(cfg, stage), norm=_cswin.norm(cfg.dims[stage]), drop_path=drop_path)

    return cswin(cfg, branch, **arguments)


# published parameters of the biases -> ours; the published ones of positions and reading have the agents last
BIASES = (
    ("an_bias", "gather_bias.table", None),
    ("na_bias", "read_bias.table", None),
    ("ah_bias", "gather_bias.rows", Edit(lambda p: (p[0, ..., 0],), lambda b: (b[None, ..., None],))),
    ("aw_bias", "gather_bias.columns", Edit(lambda p: (p[0, :, :, 0],), lambda b: (b[None, :, :, None],))),
    ("ac_bias", "gather_bias.token", Edit(lambda p: (p[0],), lambda b: (b[None],))),
    (
        "ha_bias",
        "read_bias.rows",
        Edit(lambda p: (p[0, :, :, 0].transpose(1, 2),), lambda b: (b.transpose(1, 2)[None, :, :, None],)),
    ),
    (
        "wa_bias",
        "read_bias.columns",
        Edit(lambda p: (p[0, :, 0].transpose(1, 2),), lambda b: (b.transpose(1, 2)[None, :, None],)),
    ),
    (
        "ca_bias",
        "read_bias.token",
        Edit(lambda p: (p[0].transpose(1, 2),), lambda b: (b.transpose(1, 2)[None],)),
    ),
)


def bias_keys(published: str, ours: str) -> list[KeyRule]:
    return [KeyRule(published + theirs, ours + name, edit) for theirs, name, edit in BIASES]


def agent_keys(published: str, ours: str) -> list[KeyRule]:
    """Rules of a mixer, whether it is agent attention or full attention."""
    return [
        *bias_keys(published, ours),
        KeyRule(published + "qkv.{p}", ours + "qkv.{p}"),
        KeyRule(published + "dwc.{p}", ours + "local.{p}"),
        KeyRule(published + "proj.{p}", ours + "proj.{p}"),
    ]


def deit_key_mapping(cfg: AgentDeiTConfig) -> Sequence[KeyRule]:
    return deit_keys(cfg, agent_keys)


def pvt_key_mapping(cfg: AgentPVTConfig) -> Sequence[KeyRule]:
    return pvt_keys(agent_keys)


def swin_key_mapping(cfg: AgentSwinConfig) -> Sequence[KeyRule]:
    return swin_keys(agent_keys)


def cswin_key_mapping(cfg: AgentCSWinConfig) -> Sequence[KeyRule]:
    rules = []
    for stage in range(cfg.agent_stages):
        published, ours = f"stage{stage + 1}.{{b}}.attns.0.", f"stages.{stage}.blocks.{{b}}.mixer.fn."
        rules += [*bias_keys(published, ours), KeyRule(published + "get_v.{p}", ours + "local.{p}")]
    return cswin_keys(rules)


SHARED = {"first_conv": "stem.conv", "paper_ids": "arXiv:2312.08874"}

register(
    Family(
        AgentDeiT,
        DEIT_VARIANTS,
        build_deit,
        deit_key_mapping,
        pretrained_cfg=SHARED,
        global_pool="token",
        stride=_deit.PATCH,
    ),
    __name__,
)
register(
    Family(
        AgentPVT,
        PVT_VARIANTS,
        build_pvt,
        pvt_key_mapping,
        pretrained_cfg=SHARED,
        dense_options={"pool_sides": (12, 16, 28, 28)},
    ),
    __name__,
)
register(
    Family(
        AgentSwin,
        SWIN_VARIANTS,
        build_swin,
        swin_key_mapping,
        pretrained_cfg=SHARED,
        dense_norm=_swin.DENSE_NORM,
        dense_options={"pool_sides": (9, 12, 14, 7)},
    ),
    __name__,
)
register(
    Family(
        AgentCSWin,
        CSWIN_VARIANTS,
        build_cswin,
        cswin_key_mapping,
        pretrained_cfg=SHARED,
        dense_norm=_cswin.DENSE_NORM,
    ),
    __name__,
)
