"""Draws the micro-batches of each optimizer step, and counts unreadable samples over all processes.

An unreadable sample is reported and counted once over all processes and starts of a run, and replaced by another (see
`loader.SeededDataset`), up to `guard.corrupt_limit` samples. It counts at the step that would have used it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..distributed.world import World
from ..errors import UserError
from ..files import write_atomically, writing
from .loader import Loader

MAX_LISTED = 20  # samples in one message


class BatchStream:
    """The micro-batches of one optimizer step after the other."""

    def __init__(self, loader: Loader, world: World, corrupt: dict[str, str], max_corrupt: int, file: Path):
        """corrupt: index -> reason of the counted samples; updated in place and written to `file` as JSON lines."""
        self.loader, self.world, self.corrupt, self.max_corrupt, self.file = loader, world, corrupt, max_corrupt, file
        self.batches: list[Any] = []
        self.error: UserError | None = None
        self._write()

    def next_batches(self, count: int) -> None:
        """Wait for the next `count` micro-batches. An error is raised by `sync_errors`, on all processes."""
        try:
            self.batches = [next(self.loader) for _ in range(count)]
        except UserError as error:
            self.error = error

    def sync_errors(self, stop: bool, say: Callable[[str], None]) -> bool:
        """Whether `stop` is true on any process.

        Raises UserError on every process if loading failed on any, or if over `max_corrupt` samples are unreadable.
        """
        failures, self.loader.failures = self.loader.failures, {}
        new = {str(index): reason for index, reason in failures.items() if str(index) not in self.corrupt}
        # one collective per step, unless something is wrong
        code = self.world.max(2 if new or self.error else int(stop))
        if code < 2:
            return code == 1
        self._count(new, say)
        return self.world.any_rank(stop, self.error)

    def _count(self, new: dict[str, str], say: Callable[[str], None]) -> None:
        for found in self.world.gather(new):
            for index in found.keys() - self.corrupt.keys():
                say(f"sample {index} is unreadable and replaced by another: {found[index]}")
            self.corrupt |= found
        self._write()
        if len(self.corrupt) <= self.max_corrupt:
            return
        reasons = list(self.corrupt.values())
        recipe = self.file.with_name("recipe.yaml")
        remedy = (
            f"tessel check {recipe} lists all broken files, and guard.max_corrupt=N replaces up to N "
            "of them by other samples"
        )
        if len(reasons) == 1:
            raise UserError(f"{reasons[0]}; {remedy}")
        more = f"; and {len(reasons) - MAX_LISTED} more" if len(reasons) > MAX_LISTED else ""
        raise UserError(
            f"{len(reasons)} samples are unreadable, more than guard.max_corrupt={self.max_corrupt}; {self.file} lists "
            f"them ({remedy}): {'; '.join(reasons[:MAX_LISTED])}{more}"
        )

    def describe_corrupt(self) -> list[str]:
        """Lines for the end of a run: how many samples were unreadable, and which."""
        if not self.corrupt:
            return []
        reasons = [f"  sample {index}: {reason}" for index, reason in self.corrupt.items()]
        more = [f"  and {len(reasons) - MAX_LISTED} more"] if len(reasons) > MAX_LISTED else []
        head = f"unreadable training samples, replaced by others: {len(reasons)} ({self.file} lists them)"
        return [head, *reasons[:MAX_LISTED], *more]

    def _write(self) -> None:
        with self.world.raise_on_all_ranks():
            if self.world.main and (self.corrupt or self.file.exists()):
                lines = [json.dumps({"index": int(index), "reason": text}) for index, text in self.corrupt.items()]
                with writing(self.file):
                    write_atomically(self.file, "".join(f"{line}\n" for line in lines))
