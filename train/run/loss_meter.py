"""The training loss and its parts, summed from one line of the log to the next."""

import torch
from torch import Tensor

from ..distributed.world import World


class LossMeter:
    """Sums over the updates since the last line, kept on the device: no update waits for them."""

    def __init__(self, world: World):
        self.world = world
        self.sums: dict[str, Tensor] = {}
        self.updates = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        """Those of one update, scalars in float64."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.updates += 1

    def totals(self) -> dict[str, float]:
        """The sums, averaged over the processes."""
        names = sorted(self.sums)
        totals = self.world.sum(torch.stack([self.sums[name] for name in names])) if names else torch.zeros(0)
        return dict(zip(names, (totals / self.world.size).tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """The same of one update, and the sums begin anew."""
        means = {name: total / self.updates for name, total in self.totals().items()}
        self.sums, self.updates = {}, 0
        return means

    def restore(self, totals: dict[str, float], updates: int) -> None:
        """Go on from the `totals` of so many updates."""
        device = self.world.device
        self.sums = {name: torch.tensor(total, dtype=torch.float64, device=device) for name, total in totals.items()}
        self.updates = updates
