"""What an update learns from: this process's micro-batches, and the account of samples that could not be read.

Such a sample is named, counted once over all processes and starts of a run, and replaced (see `data.SeededDataset`), up to
`guard.max_corrupt` of them. It counts with the update that would have learned from it, however early it was loaded.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..distributed.world import World
from ..errors import UserError
from ..files import write_atomically, writing
from .loader import Loader

NAMED = 20  # most samples that a message names


class _News(UserError):
    """Some process has met samples that are not on the account yet."""


class BatchStream:
    """The micro-batches of one update after another."""

    def __init__(self, loader: Loader, world: World, corrupt: dict[str, str], budget: int, file: Path):
        """corrupt: the account so far, index -> reason, which is added to and written to `file`, a JSON line each."""
        self.loader, self.world, self.corrupt, self.budget, self.file = loader, world, corrupt, budget, file
        self.batches: list[Any] = []
        self.problem: UserError | None = None
        self._write()

    def draw(self, count: int) -> None:
        """Wait for the next `count` micro-batches."""
        try:
            self.batches = [next(self.loader) for _ in range(count)]
        except UserError as error:
            self.problem = error

    def agree(self, stop: bool, say: Callable[[str], None]) -> bool:
        """True everywhere if `stop` is True anywhere.

        Raises UserError everywhere, if drawing failed anywhere or if more samples are corrupt than may be.
        """
        lost, self.loader.lost = self.loader.lost, {}
        news = {str(index): reason for index, reason in lost.items() if str(index) not in self.corrupt}
        try:
            return self.world.any_rank(stop, _News() if news else self.problem)
        except _News:
            self._count(news, say)
        return self.world.any_rank(stop, self.problem)

    def _count(self, news: dict[str, str], say: Callable[[str], None]) -> None:
        for found in self.world.gather(news):
            for index in found.keys() - self.corrupt.keys():
                say(f"sample {index} is replaced by another: {found[index]}")
            self.corrupt |= found
        self._write()
        if len(self.corrupt) <= self.budget:
            return
        reasons = list(self.corrupt.values())
        if len(reasons) == 1:
            raise UserError(reasons[0])
        more = f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
        raise UserError(
            f"{len(reasons)} samples cannot be read, and guard.max_corrupt={self.budget}; {self.file} lists them: "
            f"{'; '.join(reasons[:NAMED])}{more}"
        )

    def _write(self) -> None:
        with self.world.raise_on_all_ranks():
            if self.world.main and (self.corrupt or self.file.exists()):
                lines = [json.dumps({"index": int(index), "reason": text}) for index, text in self.corrupt.items()]
                with writing(self.file):
                    write_atomically(self.file, "".join(f"{line}\n" for line in lines))
