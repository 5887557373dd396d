"""FreqFusion: fusing a fine and a coarse feature map by predicted low-pass and high-pass kernels (arXiv 2408.12879).

The published code has no license; this was written from the paper.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.recording import is_open


def reassemble(x: Tensor, weights: Tensor, scale: int = 1, border: str = "zeros") -> Tensor:
    """Each pixel as the weighted sum of the k x k cells around it, on a map `scale` times as large.

    y[c, i, j] = sum_{p, q} weights[p k + q, i, j] x[c, i // scale + p - k // 2, j // scale + q - k // 2]: the operator
    of CARAFE (arXiv 1905.02188). x: [B, C, h, w]; weights: [B, k * k, scale * h, scale * w]. border: cells outside the
    map are zero ("zeros"), or its mirror image ("reflect"), which needs maps larger than k // 2.
    """
    (height, width), kernel = x.shape[2:], math.isqrt(weights.shape[1])
    reach = kernel // 2
    padded = F.pad(x, (reach, reach, reach, reach), mode="reflect" if border == "reflect" else "constant")
    if torch.compiler.is_compiling():  # a graph of a few operators, which is compiled in seconds
        cells = F.unfold(padded, kernel).unflatten(-1, (height, width))
        cells = F.interpolate(cells, scale_factor=float(scale), mode="nearest") if scale > 1 else cells
        return (cells.unflatten(1, (-1, kernel**2)) * weights.unsqueeze(1)).sum(2)
    weights = weights.unflatten(3, (width, scale)).unflatten(2, (height, scale))  # [B, k * k, h, scale, w, scale]
    y = None
    # a loop over the cells keeps views of x and weights for the gradient, instead of k * k copies of x
    for number, (row, column) in enumerate(itertools.product(range(kernel), repeat=2)):
        cells = padded[:, :, row : row + height, column : column + width].unsqueeze(-1).unsqueeze(3)
        part = cells * weights[:, number].unsqueeze(1)
        y = part if y is None else y + part
    assert y is not None
    return y.flatten(4).flatten(2, 3)


class FrequencyFusion(nn.Module):
    """FreqFusion (sections 3.2 to 3.4): a coarse map on the grid of a fine one, and the fine map sharpened.

    Of compressed maps a and b, convolutions that both share predict at each fine pixel a 5 x 5 kernel, whose positive
    weights sum to one, that re-assembles the coarse map, and a 3 x 3 kernel, what remains of which is added to the fine
    map. With `resample`, predicted offsets then move where the coarse map is read.

    fine, coarse: channels. compressed: channels of a and b. semi: the kernels come from both maps, each at its own
    size, else from their sum on the fine grid, and the coarse map is first enlarged by its nearest cells. refine: the
    fine part is sharpened first, and the coarse part enlarged by the first kernel, else by its nearest cells.
    high_pass: sharpen the fine map; residual: add it to what is sharpened. window: multiply kernels by the window of
    Hamming. groups, norm: of `resample`. direction: what the offsets are predicted of, the maps with their similarity
    to neighbours ("sim_concat", the published module) or the similarity alone ("sim", the copy in the published
    SegNeXt). border: see `reassemble`; "zeros" is the operator of all published figures. Raises ValueError for numbers
    that do not fit.
    """

    def __init__(
        self,
        fine: int,
        coarse: int,
        *,
        compressed: int = 64,
        semi: bool = True,
        refine: bool = True,
        high_pass: bool = True,
        residual: bool = True,
        window: bool = True,
        resample: bool = False,
        groups: int = 4,
        norm: bool = True,
        direction: Literal["sim_concat", "sim"] = "sim_concat",
        border: Literal["zeros", "reflect"] = "zeros",
    ):
        if refine and semi and not high_pass:
            raise ValueError("high_pass=False needs refine=False: without it the fine part is not sharpened")
        for name, value, values in (
            ("direction", direction, ("sim_concat", "sim")),
            ("border", border, ("zeros", "reflect")),
        ):
            if value not in values:
                raise ValueError(f"{name}={value!r} must be {' or '.join(values)}")
        super().__init__()
        self.semi, self.refine, self.residual, self.border = semi, refine, residual, border
        self.compress_fine, self.compress_coarse = nn.Conv2d(fine, compressed, 1), nn.Conv2d(coarse, compressed, 1)
        self.low = nn.Conv2d(compressed, 25, 3, padding=1)
        self.high = nn.Conv2d(compressed, 9, 3, padding=1) if high_pass else None
        self.low_window: Tensor
        self.high_window: Tensor
        for name, size in (("low_window", 5), ("high_window", 3)):
            shape = torch.hamming_window(size, periodic=False, dtype=torch.float64) if window else torch.ones(size)
            self.register_buffer(name, torch.outer(shape, shape).float().reshape(1, -1, 1, 1), persistent=False)
        self.resample = (
            Resample(coarse, compressed, groups=groups, norm=norm, direction=direction) if resample else None
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for predicted in filter(None, (self.low, self.high)):
            nn.init.normal_(predicted.weight, std=0.001)

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """fine: [B, C, H, W]; coarse: [B, C', h, w] -> the fine map [B, C, H, W] and the coarse one [B, C', H, W].

        The published module takes maps whose sides are exactly twice those of the coarse map. Here a coarse map of
        another size is first resized to ceil(H / 2) x ceil(W / 2), and a fine map of odd sides repeats its last row
        and column, which are cut off at the end.
        """
        height, width = fine.shape[2:]
        rows, columns = (height + 1) // 2, (width + 1) // 2
        recorded = is_open(height) or is_open(width)  # then nothing may depend on the sizes
        if recorded or (rows, columns) != coarse.shape[2:]:
            coarse = F.interpolate(coarse, (rows, columns), mode="bilinear", align_corners=False)
        even = not recorded and (2 * rows, 2 * columns) == (height, width)
        fine, coarse, _ = self.fuse(fine if even else _take(fine, 2 * rows, 2 * columns), coarse)
        return (fine, coarse) if even else (_take(fine, height, width), _take(coarse, height, width))

    def fuse(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps [B, C, 2 h, 2 w] and [B, C', h, w] -> both at the size of the first, and the 5 x 5 kernels."""
        a, b, high = self.compress_fine(fine), self.compress_coarse(coarse), None
        if not self.semi:
            both = _nearest(b) + a
            low, high = self.low(both), self.high(both) if self.high else None
            coarse, scale = _nearest(coarse), 1
        elif not self.refine:
            low, scale = self.low(a) + _nearest(self.low(b)), 2
            high = self.high(a) + _nearest(self.high(b)) if self.high else None
        else:
            assert self.high is not None
            sharp = self.high(a)
            a = 2 * a - reassemble(a, _kernel(sharp, self.high_window), border=self.border)
            low, coarse_low, scale = self.low(a), self.low(b), 2
            low = low + reassemble(coarse_low, _kernel(low, self.low_window), 2, self.border)
            high = sharp + reassemble(self.high(b), _kernel(low, self.low_window), 2, self.border)
        kernel = _kernel(low, self.low_window)
        coarse = reassemble(coarse, kernel, scale, self.border)
        if high is not None:
            rest = fine - reassemble(fine, _kernel(high, self.high_window), border=self.border)
            fine = fine + rest if self.residual else rest
        return fine, self.resample(a, b, coarse) if self.resample else coarse, kernel


def _kernel(logits: Tensor, window: Tensor) -> Tensor:
    """Positive weights [B, k * k, H, W] that sum to one at each pixel."""
    weights = logits.softmax(1) * window.to(logits)
    return weights / weights.sum(1, keepdim=True)


def _take(x: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns of [B, C, H, W]; beyond the map the last ones again."""
    for axis, size in ((2, height), (3, width)):
        x = x.index_select(axis, torch.arange(size, device=x.device).clamp_max(x.shape[axis] - 1))
    return x


def _nearest(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class Resample(nn.Module):
    """The offset generator of FreqFusion (section 3.4): reads an enlarged map at predicted places.

    At each cell of the coarse map, for each of its four fine pixels and each group of channels, an offset in units of
    coarse cells is predicted from both compressed maps, times a gate.
    """

    def __init__(self, dim: int, compressed: int, *, groups: int, norm: bool, direction: str):
        if dim % groups:
            raise ValueError(f"groups={groups} do not divide the {dim} channels of the coarse map")
        super().__init__()
        self.groups, self.concat = groups, direction == "sim_concat"
        most = max(1, compressed // 8)
        count = next(number for number in range(most, 0, -1) if compressed % number == 0)
        self.norm_fine, self.norm_coarse = (
            nn.GroupNorm(count, compressed) if norm else nn.Identity() for _ in range(2)
        )
        wide = compressed + 8
        offset, scale = (wide, wide) if self.concat else (8, compressed)
        self.offset, self.scale = (nn.Conv2d(width, 8 * groups, 3, padding=1) for width in (offset, scale))
        self.fine_offset, self.fine_scale = (nn.Conv2d(width, 2 * groups, 3, padding=1) for width in (offset, scale))

    def forward(self, fine: Tensor, coarse: Tensor, x: Tensor) -> Tensor:
        """fine: [B, M, 2 h, 2 w]; coarse: [B, M, h, w], both compressed; x: [B, C, 2 h, 2 w] -> [B, C, 2 h, 2 w]"""
        fine, coarse = self.norm_fine(fine), self.norm_coarse(coarse)
        (height, width), groups = coarse.shape[2:], self.groups
        fine_alike, alike = similarity(fine), similarity(coarse)
        if self.concat:
            fine_alike, alike = (torch.cat(pair, dim=1) for pair in ((fine, fine_alike), (coarse, alike)))
            fine, coarse = fine_alike, alike
        offset = self.offset(alike) + F.pixel_unshuffle(self.fine_offset(fine_alike), 2)
        gate = self.scale(coarse) + F.pixel_unshuffle(self.fine_scale(fine), 2)
        offset = F.pixel_shuffle(offset * gate.sigmoid(), 2).unflatten(1, (2, groups))  # [B, (x, y), groups, 2 h, 2 w]
        # a fine pixel lies a quarter of a coarse cell beside the cell's center, which is at 0.5, 1.5, ...
        precise = torch.promote_types(x.dtype, torch.float32)
        columns, rows = ((torch.arange(2 * size, device=x.device, dtype=precise) + 0.5) / 2 for size in (width, height))
        across, down = offset[:, 0] + columns, offset[:, 1] + rows[:, None]
        grid = torch.stack((2 * across / width - 1, 2 * down / height - 1), dim=-1).flatten(0, 1)
        parts = x.unflatten(1, (groups, -1)).flatten(0, 1)
        read = F.grid_sample(parts.to(precise), grid, mode="bilinear", padding_mode="border", align_corners=False)
        return read.to(x.dtype).unflatten(0, (-1, groups)).flatten(1, 2)


class FrequencyFusionPyramid(nn.Module):
    """A feature pyramid whose maps are fused by FreqFusion, from coarse to fine (section 4; the published FPN).

    Lateral 1 x 1 convolutions, l_i <- fine(l_i) + coarse(l_{i + 1}), and a 3 x 3 convolution of each map. extra: one
    more level, a 3 x 3 convolution of stride 2 of the coarsest input, takes part. fusion: arguments of
    `FrequencyFusion`. The released FPN has `resample=True`.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, extra: bool = False, **fusion: Any):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, out_channels, 1) for width in in_channels)
        if extra:
            self.lateral.append(nn.Conv2d(in_channels[-1], out_channels, 3, stride=2, padding=1))
        levels = len(self.lateral)
        self.output = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in range(levels))
        for convolution in (*self.lateral, *self.output):
            nn.init.xavier_uniform_(convolution.weight)  # type: ignore[arg-type]
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        options = {"resample": True, **fusion}
        self.fusions = nn.ModuleList(FrequencyFusion(out_channels, out_channels, **options) for _ in range(levels - 1))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """maps: [B, C_i, H_i, W_i] from fine to coarse -> maps [B, out_channels, H_i, W_i], and the extra one."""
        maps = [*maps, *[maps[-1]] * (len(self.lateral) - len(maps))]
        fused = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for level in reversed(range(len(fused) - 1)):
            fine, coarse = self.fusions[level](fused[level], fused[level + 1])
            fused[level] = fine + coarse
        return [output(x) for output, x in zip(self.output, fused, strict=True)]


class FrequencyFusionConcat(nn.Module):
    """All maps on the grid of the finest, fused from coarse to fine and concatenated (section 4, SegNeXt).

    x <- [fine(l_i), coarse(x)], interleaved over the groups of `resample`. compressed: one number for each fusion, from
    coarse to fine; None for a quarter of the channels of both maps, as published. Attributes: `out_channels`.
    """

    def __init__(self, in_channels: Sequence[int], *, compressed: Sequence[int] | None = None, **fusion: Any):
        super().__init__()
        options: dict[str, Any] = {"resample": True, "window": False, "direction": "sim", "groups": 4, **fusion}
        self.groups = options["groups"] if options["resample"] else 1
        self.fusions, coarse = nn.ModuleList(), in_channels[-1]
        for number, fine in enumerate(reversed(in_channels[:-1])):
            if fine % self.groups:
                raise ValueError(f"groups={self.groups} do not divide the {fine} channels of a map")
            width = compressed[number] if compressed else max(4, (fine + coarse) // 16 * 4)
            self.fusions.append(FrequencyFusion(fine, coarse, compressed=width, **options))
            coarse += fine
        self.out_channels = coarse

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: [B, C_i, H_i, W_i] from fine to coarse -> [B, sum of C_i, H_0, W_0]"""
        x = maps[-1]
        for fusion, fine in zip(self.fusions, reversed(maps[:-1]), strict=True):
            parts = [part.unflatten(1, (self.groups, -1)) for part in fusion(fine, x)]
            x = torch.cat(parts, dim=2).flatten(1, 2)
        return x


def similarity(x: Tensor) -> Tensor:
    """The cosine similarity of each pixel of [B, C, H, W] to its 8 neighbours at distance 2: [B, 8, H, W].

    Neighbours are in the order of rows; outside the map the similarity is 0.
    """
    height, width = x.shape[2:]
    unit = x / x.norm(dim=1, keepdim=True).clamp_min(1e-8)
    padded = F.pad(unit, (2, 2, 2, 2))
    places = [place for place in itertools.product((0, 2, 4), repeat=2) if place != (2, 2)]
    return torch.stack(
        [(unit * padded[:, :, row : row + height, column : column + width]).sum(1) for row, column in places], dim=1
    )
