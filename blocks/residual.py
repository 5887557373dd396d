"""Residual branches, and the block composed of them."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn


class Residual(nn.Module):
    """`x + drop_path(scale(fn(norm(x))))` on a feature map `[B, C, H, W]`; `scale` is an optional layer scale.

    Further arguments are passed on to `fn`.
    """

    def __init__(
        self, fn: nn.Module, *, norm: nn.Module | None = None, scale: nn.Module | None = None, drop_path: float = 0.0
    ):
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm
        self.fn = fn
        self.scale = nn.Identity() if scale is None else scale
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return x + self.drop_path(self.scale(self.fn(self.norm(x), *args)))


def block(**branches: nn.Module) -> nn.Sequential:
    """A block: its branches in order, by name, so that parameters are named `blocks.3.mixer.fn.qkv.weight`."""
    return nn.Sequential(OrderedDict(branches))


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop path rates by stage and block, rising linearly from 0 at the first block to `rate` at the last.

    Raises ValueError for a rate outside 0..1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"drop_path_rate={rate} must lie in 0..1")
    return cast(list[list[float]], calculate_drop_path_rates(rate, list(depths), stagewise=True))
