"""Mean of the training losses between two lines of the log."""

import torch
from torch import Tensor

from ..distributed.device import sum_dtype
from ..distributed.world import World


class LossMeter:
    """Sums the losses of the updates since the last log line, on the device: adding causes no GPU sync."""

    def __init__(self, world: World):
        self.world = world
        self.sums: dict[str, Tensor] = {}
        self.updates = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of one update, by name: scalars of `sum_dtype`."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.updates += 1

    def totals(self) -> dict[str, float]:
        """The sums, averaged over the processes. A collective: every process must call it."""
        names = sorted(self.sums)
        totals = self.world.sum(torch.stack([self.sums[name] for name in names])) if names else torch.zeros(0)
        return dict(zip(names, (totals / self.world.size).tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """The mean losses per update, averaged over the processes; resets the sums."""
        means = {name: total / self.updates for name, total in self.totals().items()}
        self.sums, self.updates = {}, 0
        return means

    def restore(self, totals: dict[str, float], updates: int) -> None:
        """Continue from `totals`, the sums over `updates` updates that a checkpoint holds."""
        device, dtype = self.world.device, sum_dtype(self.world.device)
        self.sums = {name: torch.tensor(total, dtype=dtype, device=device) for name, total in totals.items()}
        self.updates = updates
