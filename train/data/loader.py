"""Data: images of a split, in an order and with random numbers that depend on nothing but (seed, epoch, index).

A run is one stream of samples: epoch after epoch, each a permutation of the data set. The position in that stream is
all there is to resume; which worker, process or restart loads a sample changes neither the image nor its augmentation.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..errors import WORKER_DIED, UserError
from .sampler import GlobalOrder, Key, seed_all

WORKER_HANGS = (
    "no batch came within {timeout:g} s: a loader process hangs, or the images come too slowly; look whether data.root "
    "can be read. The same command goes on from the last checkpoint, and guard.timeout makes it wait longer"
)


Transform = Callable[[Any, Any], tuple[Any, Any]]  # image and target to what the model takes


@dataclass
class FallbackSample:
    """A sample in the place of others, or None where none is left; why each of those others (by index) is lost."""

    sample: tuple[Any, Any, int] | None
    lost: dict[int, str]


class SeededDataset(Dataset[Any]):
    """`[(epoch, index)]` -> (image, target, index), transformed by generators seeded with (seed, epoch, index).

    A sample that the data set refuses with a UserError is replaced by the first good one of up to `max_retries` that follow
    it in the `order` of its epoch, transformed as the lost one would have been. So batches keep their size, no other
    sample or augmentation changes, and who loads it does not matter.
    """

    def __init__(
        self, dataset: Any, transform: Transform, seed: int, *, order: "GlobalOrder | None" = None, max_retries: int = 0
    ):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.order, self.max_retries = order, max_retries

    def __getitem__(self, key: Key) -> tuple[Any, Any, int] | FallbackSample:
        lost: dict[int, str] = {}
        following = self.order.following(key) if self.order else ()
        for index in chain((key[1],), islice(following, self.max_retries)):
            seed_all(self.seed, *key)
            try:
                image, target = self.dataset[index]
            except UserError as error:
                lost[index] = str(error)
                continue
            sample = (*self.transform(image, target), index)
            return FallbackSample(sample, lost) if lost else sample
        return FallbackSample(None, lost)


class Loader:
    """Batches of a data set, from `workers` processes or from this one, read once; `close` ends the workers.

    `lost` collects the samples that could not be read, by index, and why. Where there is none to take the place of one,
    the batch is not to be had: UserError.
    """

    def __init__(
        self,
        dataset: SeededDataset,
        batches: Sampler[list[Key]] | Sequence[list[Key]],
        *,
        collate: Callable[[list[Any]], Any] = default_collate,
        workers: int,
        ahead: int,
        pin: bool,
        timeout: float = 0.0,
    ):
        """ahead: batches each worker prepares; timeout: seconds after which a worker counts as hung; 0: none does."""
        self.timeout, self.hung = timeout, False
        self.loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            collate_fn=partial(_collate, collate),
            worker_init_fn=_ignore_signals,
            pin_memory=pin,
            timeout=timeout if workers else 0,
        )
        self.batches = iter(self.loader)
        self.lost: dict[int, str] = {}

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            batch, lost = next(self.batches)
        except (RuntimeError, EOFError, ConnectionError) as error:
            if "timed out" in str(error):
                self.hung = True
                raise UserError(WORKER_HANGS.format(timeout=self.timeout)) from error
            # a killed process loses its connections a moment before it counts as dead
            if not wait([worker.sentinel for worker in getattr(self.batches, "_workers", ())], timeout=2):
                raise
            raise UserError(WORKER_DIED) from error
        self.lost |= lost
        if batch is None:
            raise UserError(next(reversed(lost.values())))
        return batch

    def close(self) -> None:
        """End the workers now rather than when the interpreter does."""
        batches, self.batches = self.batches, iter(())
        for worker in getattr(batches, "_workers", ()) if self.hung else ():
            # deaf to SIGTERM; torch raises the death of a worker wherever this process is
            with suppress(RuntimeError):
                worker.kill()
                worker.join()
        # a traceback may keep the iterator, and torch raises the death of a worker anew until it is shut down
        with suppress(AttributeError, RuntimeError):
            batches._shutdown_workers()  # type: ignore[union-attr]


def _collate(collate: Callable[[list[Any]], Any], samples: list[Any]) -> tuple[Any, dict[int, str]]:
    lost: dict[int, str] = {}
    for place, sample in enumerate(samples):
        if isinstance(sample, FallbackSample):
            lost |= sample.lost
            samples[place] = sample.sample
    return None if None in samples else collate(samples), lost


def _ignore_signals(worker: int) -> None:
    # a signal to the whole process group is the trainer's to answer: it still needs its workers to finish the step
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
