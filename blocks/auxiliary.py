"""Losses that parts of a model add to the loss of the task while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class AuxiliaryLoss(nn.Module):
    """Base class of a module with a loss of its own: its `forward` calls `add_loss` in training mode."""

    def __init__(self):
        super().__init__()
        self._collected: list[Tensor] | None = None

    def add_loss(self, loss: Tensor) -> None:
        """Add a scalar, with its weight, to the list of `collect_losses`; without it the scalar is dropped."""
        if self._collected is not None:
            self._collected.append(loss)


@contextmanager
def collect_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """The list of the losses that parts of `model` add within the block; a trainer adds their mean to its own loss.

    The forward pass belongs into the block, the backward pass behind it: blocks that gradient checkpointing runs again
    then add nothing.
    """
    losses: list[Tensor] = []
    modules = [module for module in model.modules() if isinstance(module, AuxiliaryLoss)]
    for module in modules:
        module._collected = losses
    try:
        yield losses
    finally:
        for module in modules:
            module._collected = None
