"""The lab: models of one plain structure with any token mixer in any stage.

The structure is Swin's (Liu et al., arXiv 2103.14030, sec. 3.1 and 3.3): a patch embedding, four stages of blocks of a
mixer and an MLP, merging of 2x2 positions between stages. `mixers` names the mixers, in the language of
`zoo._specification`: `timm.create_model("tessel_lab_tiny", mixers="window | window | halo, channel | full_attention")`.

Deviations from Swin: windows are not shifted and have no position bias, and merging is a convolution.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.layers import ClassifierHead, LayerNorm2d, LayerScale2d, trunc_normal_
from torch import nn

from ..blocks import (
    ConvGlu,
    DepthwiseMlp,
    Mlp,
    NormMerge,
    Place,
    Residual,
    block,
    conv_norm,
    depthwise,
    drop_path_rates,
)
from ..blocks.padding import PadToMultiple
from ._backbone import Backbone, BackboneParts, Stage
from ._family import Family, make_model
from ._keymap import KeyRule, nearest
from ._registry import register
from ._specification import MixerSpec, parse_mixers, specification
from ._swap import specified_mixers

__all__ = ["Lab", "LabConfig", "describe"]


@dataclass(frozen=True)
class LabConfig:
    """What a model of the lab is made of.

    width: channels of stage 1; each later stage has twice as many. depth: blocks of each stage.
    heads: of each stage, for mixers whose heads `mixers` does not set; None: as the mixer's paper has at this width.
    stem: "patch", a 4x4 convolution of stride 4, or "convolutional", two 3x3 convolutions of stride 2.
    channel_mixer: "mlp", "depthwise" (a 3x3 depthwise convolution within it) or "convolutional_glu".
    position: "none", or "depthwise", a residual 3x3 depthwise convolution before each mixer.
    norm: "layer" or "batch". layer_scale: start value of the scale of each branch; None: no scale.
    """

    width: int
    depth: tuple[int, ...]
    mixers: str = "window(window=7)"
    heads: tuple[int, ...] | None = None
    stem: str = "patch"
    channel_mixer: str = "mlp"
    mlp_ratio: float = 4.0
    position: str = "none"
    norm: str = "layer"
    layer_scale: float | None = None

    def __post_init__(self):
        if self.width < 1 or len(self.depth) != 4 or min(self.depth) < 1:
            raise ValueError(f"Lab: width={self.width} and the four numbers depth={self.depth} must be at least 1")
        if self.heads is not None and len(self.heads) != 4:
            raise ValueError(f"Lab: heads={self.heads} must be four numbers, one for each stage, or None")

    @property
    def dims(self) -> list[int]:
        """Channels of each stage."""
        return [self.width * 2**stage for stage in range(4)]


class Lab(Backbone):
    """Any token mixers within the structure of Swin."""


VARIANTS = {
    "tessel_lab_atto": LabConfig(12, (2, 2, 2, 2)),
    "tessel_lab_tiny": LabConfig(96, (2, 2, 6, 2)),
    "tessel_lab_small": LabConfig(96, (2, 2, 18, 2)),
    "tessel_lab_base": LabConfig(128, (2, 2, 18, 2)),
}

NORMS = {"layer": partial(LayerNorm2d, eps=1e-5), "batch": nn.BatchNorm2d}
CHANNEL_MIXERS = {"mlp": Mlp, "depthwise": DepthwiseMlp, "convolutional_glu": ConvGlu}
POSITIONS = {
    "none": lambda dim: {},
    "depthwise": lambda dim: {"position": Residual(depthwise(dim, kernel=3))},
}


def patch_stem(in_chans: int, dim: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return block(pad=PadToMultiple(4), conv=nn.Conv2d(in_chans, dim, 4, 4), norm=norm(dim))


def convolutional_stem(in_chans: int, dim: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    half = max(dim // 2, 1)
    first = nn.Conv2d(in_chans, half, 3, 2, 1)
    return block(conv=first, norm=norm(half), act=nn.GELU(), down=conv_norm(half, dim, kernel=3, stride=2, norm=norm))


STEMS = {"patch": patch_stem, "convolutional": convolutional_stem}


def choose(argument: str, name: str, choices: Mapping[str, Any]) -> Any:
    """The choice of this name. Raises ValueError for an unknown one."""
    if name not in choices:
        raise ValueError(
            f"Lab: {argument}={name!r} is unknown{nearest(name, choices)}; use one of {', '.join(choices)}"
        )
    return choices[name]


def stage_mixers(cfg: LabConfig, stage: int, specs: Sequence[MixerSpec]) -> list[nn.Module]:
    """The mixers of the blocks of a stage."""
    depth = cfg.depth[stage]
    if len(specs) > depth:
        raise ValueError(
            f"Lab: stages.{stage} has {depth} blocks for {len(specs)} mixers; raise depth={cfg.depth} or name fewer"
        )
    place = Place(cfg.dims[stage], 4 * 2**stage, cfg.heads[stage] if cfg.heads else None)
    try:
        return [specs[number % len(specs)].make(place) for number in range(depth)]
    except ValueError as error:
        raise ValueError(f"Lab: stages.{stage}: {error}") from error


def build(
    cfg: LabConfig, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> BackboneParts:
    norm, stem = choose("norm", cfg.norm, NORMS), choose("stem", cfg.stem, STEMS)
    channel_mixer = choose("channel_mixer", cfg.channel_mixer, CHANNEL_MIXERS)
    position = choose("position", cfg.position, POSITIONS)
    specs, rates = parse_mixers(cfg.mixers, 4), drop_path_rates(drop_path_rate, cfg.depth)

    def branch(fn: nn.Module, dim: int, rate: float) -> Residual:
        scale = None if cfg.layer_scale is None else LayerScale2d(dim, cfg.layer_scale)
        return Residual(fn, norm=norm(dim), scale=scale, drop_path=rate)

    stages = []
    for i, dim in enumerate(cfg.dims):
        blocks = [
            block(
                **position(dim),
                mixer=branch(mixer, dim, rate),
                mlp=branch(channel_mixer(dim, ratio=cfg.mlp_ratio), dim, rate),
            )
            for mixer, rate in zip(stage_mixers(cfg, i, specs[i]), rates[i], strict=True)
        ]
        down = NormMerge(cfg.dims[i - 1], dim, norm=norm) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down))
    return BackboneParts(
        stem=stem(in_chans, cfg.width, norm),
        stages=stages,
        norm=norm(cfg.dims[-1]),
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        no_weight_decay=frozenset[str]().union(*(spec.mixer.no_weight_decay for stage in specs for spec in stage)),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def key_mapping(cfg: LabConfig) -> Sequence[KeyRule]:
    """The keys are ours: nothing was published."""
    return [KeyRule(key, key) for key in make_model(FAMILY, cfg, device="meta").state_dict()]


def describe(model: nn.Module) -> str:
    """The specification of the mixers of a model of the lab; `mixers=describe(model)` makes the same again.

    Raises ValueError for other models.
    """
    if not isinstance(model, Lab):
        raise ValueError(f"describe: {type(model).__name__} is not a model of the lab")
    stages = (specified_mixers(stage).values() for stage in model.stages)
    return " | ".join(specification(list(mixers)) for mixers in stages)


FAMILY = Family(
    Lab,
    VARIANTS,
    build,
    key_mapping,
    pretrained_cfg={"first_conv": "stem.conv", "paper_ids": "arXiv:2103.14030", "crop_pct": 0.9},
)
register(FAMILY, __name__)
