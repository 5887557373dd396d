"""Residual branches, and the block made of them."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class Residual(nn.Module):
    """`x + drop_path(gamma * fn(norm(x)))` on a feature map `[B, C, H, W]`.

    `layer_scale` is the initial value of `gamma` [C]; None leaves the branch unscaled.
    """

    def __init__(
        self,
        fn: nn.Module,
        *,
        norm: nn.Module | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        dim: int | None = None,
    ):
        super().__init__()
        if layer_scale is not None and dim is None:
            raise ValueError(f"Residual: layer_scale={layer_scale} needs dim, the number of channels it scales")
        self.norm = nn.Identity() if norm is None else norm
        self.fn = fn
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.layer_scale = layer_scale
        self.gamma = None if layer_scale is None else nn.Parameter(torch.empty(dim or 0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gamma is not None and self.layer_scale is not None:
            nn.init.constant_(self.gamma, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fn(self.norm(x))
        if self.gamma is not None:
            y = y * self.gamma.view(-1, 1, 1)
        return x + self.drop_path(y)


def block(**branches: nn.Module) -> nn.Sequential:
    """A block: named branches applied in order, so that keys read `blocks.3.mixer.fn.qkv.weight`."""
    return nn.Sequential(OrderedDict(branches))


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop path rates by stage and block: linear from 0 at the first block to `rate` at the last (stochastic depth)."""
    flat = [float(r) for r in torch.linspace(0, rate, sum(depths), device="cpu")]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [flat[start : start + depth] for start, depth in zip(starts, depths, strict=True)]
