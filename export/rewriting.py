"""Layers that no exporter leaves open in size, replaced by others that compute the same."""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks.pooling import adaptive_pool


class AdaptivePool(nn.Module):
    """`nn.AdaptiveAvgPool2d` as matrix products: exporters fix the size of its bins."""

    def __init__(self, output_size: int | tuple[int | None, int | None]):
        super().__init__()
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else output_size

    def forward(self, x: Tensor) -> Tensor:
        height, width = (x.shape[2 + i] if side is None else side for i, side in enumerate(self.output_size))
        return adaptive_pool(x, (height, width))


class Enlarge(nn.Module):
    """Interpolation to a multiple of the size, as mmsegmentation's `Upsample`, which rounds a product of floats."""

    def __init__(self, factor: int, mode: str, align_corners: bool | None):
        super().__init__()
        self.factor, self.mode, self.align_corners = factor, mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [side * self.factor for side in x.shape[-2:]]
        return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


def open_sizes(model: nn.Module) -> nn.Module:
    """Replace such layers in `model`, which is changed, and return it."""
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if name and (layer := _open_layer(module)):
            setattr(model.get_submodule(parent), child, layer)
    return model


def _open_layer(module: Any) -> nn.Module | None:
    """The layer that replaces `module`; None to leave it."""
    if type(module) is nn.AdaptiveAvgPool2d and module.output_size not in (1, (1, 1)):
        return AdaptivePool(cast(Any, module.output_size))
    if type(module).__name__ == "Upsample" and type(module).__module__.startswith("mmseg."):
        upsample: Any = module
        if isinstance(upsample.scale_factor, float) and upsample.scale_factor.is_integer():
            return Enlarge(int(upsample.scale_factor), upsample.mode, upsample.align_corners)
    return None
