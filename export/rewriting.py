"""Layers that no exporter leaves open in size, replaced by others that compute the same."""

from typing import Any

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


def open_sizes(model: nn.Module) -> nn.Module:
    """Replace such layers in `model`, which is changed, and return it."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.AdaptiveAvgPool2d and name and module.output_size not in (1, (1, 1)):
            parent, _, child = name.rpartition(".")
            size: Any = module.output_size
            setattr(model.get_submodule(parent), child, AdaptivePool(size))
    return model
