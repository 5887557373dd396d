"""FreqFusion as a neck: `{type: FreqFusion}` below any decode head, and as the feature pyramid of detectors."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ...blocks import FrequencyFusionConcat, FrequencyFusionPyramid
from ..errors import UserError
from ..recipe.schema import STRICT
from .library import parse_options


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FreqFusionOptions:
    """FreqFusion (Chen et al., TPAMI 2024, arXiv 2408.12879); defaults of the published FPN."""

    type: Literal["FreqFusion"] = "FreqFusion"
    """the neck"""
    fuse: Literal["add", "concat"] = "add"
    """add: a pyramid, one map for each map that is read; concat: one map with the channels of all, as in SegNeXt"""
    out_channels: PositiveInt = 256
    """channels of the pyramid"""
    compressed: PositiveInt | None = None
    """maps are reduced to this many channels to predict the kernels; null: 64, or with fuse=concat a quarter of the
    channels of both maps together"""
    resample: bool = True
    """also predict where the coarse map is read"""
    groups: PositiveInt = 4
    """groups of channels that are read at the same places"""
    norm: bool = True
    """normalize what the places are predicted from"""
    window: bool | None = None
    """multiply kernels by Hamming's window; null: with fuse=add"""
    direction: Literal["sim_concat", "sim"] | None = None
    """predict places from the maps and their similarities, or from similarities; null: sim with fuse=concat"""


class FreqFusionNeck(nn.Module):
    """A neck of a segmenter: of the maps `start` to `end` of the backbone."""

    def __init__(self, body: nn.Module, start: int, end: int):
        super().__init__()
        self.body, self.start, self.end = body, start, end

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """maps: [B, C_i, H_i, W_i] from fine to coarse -> maps of the pyramid, or one map"""
        found = self.body(maps[self.start : self.end])
        return list(found) if isinstance(found, list) else [found]


def build_freqfusion(key: str, given: Mapping[str, Any], channels: Sequence[int], *, extra: bool = False) -> nn.Module:
    """The pyramid or concatenation of maps of these channels, from fine to coarse. Raises UserError naming `key`.

    extra: the pyramid has one more, coarser level.
    """
    options = parse_options(FreqFusionOptions, given, key)
    concat = options.fuse == "concat"
    common: dict[str, Any] = {"resample": options.resample, "groups": options.groups, "norm": options.norm}
    common["window"] = not concat if options.window is None else options.window
    common["direction"] = options.direction or ("sim" if concat else "sim_concat")
    if len(channels) < 2:
        raise UserError(f"{key}.type=FreqFusion fuses at least two maps; let it read more")
    try:
        if concat:
            compressed = [options.compressed] * (len(channels) - 1) if options.compressed else None
            return FrequencyFusionConcat(channels, compressed=compressed, **common)
        common["compressed"] = options.compressed or 64
        return FrequencyFusionPyramid(channels, options.out_channels, extra=extra, **common)
    except ValueError as error:
        raise UserError(f"{key}.type=FreqFusion: {error}") from error
