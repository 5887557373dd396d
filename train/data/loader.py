"""Loading batches: per-sample seeds, substitutes for unreadable samples, and worker processes."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import wait
from threading import Timer
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..errors import WORKER_DIED, UserError
from ..system import STOP_SIGNALS
from .sampler import GlobalBatchSampler, Key, seed_all
from .transform_errors import transform_errors

WORKER_HANGS = (
    "no batch arrived within {timeout:g} s: a data loader worker hangs, or reading the images is too slow. Check that "
    "data.root can be read. The same command continues from the last checkpoint; guard.timeout changes the time limit"
)
SIGCHLD = getattr(signal, "SIGCHLD", None)  # Windows has none
Transform = Callable[[Any, Any], tuple[Any, Any]]  # image and target -> input and target of the model


@dataclass
class FallbackSample:
    """A substitute for unreadable samples (None if none was found), and {index: reason} of those."""

    sample: tuple[Any, Any, int] | None
    failures: dict[int, str]


class SeededDataset(Dataset[Any]):
    """`dataset[epoch, index]` -> (image, target, index), transformed with generators seeded by (seed, epoch, index).

    A sample that cannot be read or transformed (UserError) is replaced by the first good one of up to `max_retries`
    that follow it in its epoch, transformed with the seed of the replaced one. So batches keep their size, and no
    other sample or augmentation changes.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Transform,
        seed: int,
        *,
        order: GlobalBatchSampler | None = None,
        max_retries: int = 0,
    ):
        """order: gives the samples that follow; without it none is replaced."""
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.order, self.max_retries = order, max_retries

    def __getitem__(self, key: Key) -> tuple[Any, Any, int] | FallbackSample:
        failures: dict[int, str] = {}
        following = self.order.following(key) if self.order else ()
        for index in chain((key[1],), islice(following, self.max_retries)):
            seed_all(self.seed, *key)
            try:
                image, target = self.dataset[index]
                with transform_errors(self.dataset, index):
                    sample = (*self.transform(image, target), index)
            except UserError as error:
                failures[index] = str(error)
                continue
            return FallbackSample(sample, failures) if failures else sample
        return FallbackSample(None, failures)


class Loader:
    """An iterator over batches, loaded by worker processes or in this one.

    `failures` collects the samples that could not be read, index -> reason. `next` raises UserError if a sample has no
    substitute, or if a worker died or hangs.
    """

    def __init__(
        self,
        dataset: SeededDataset,
        batches: Sampler[list[Key]] | Sequence[list[Key]],
        *,
        collate: Callable[[list[Any]], Any] = default_collate,
        workers: int,
        prefetch: int,
        pin: bool,
        timeout: float = 0.0,
    ):
        """prefetch: batches per worker; timeout: seconds after which a worker counts as hung; 0: never."""
        self.timeout, self.timed_out = timeout, False
        # torch's handler raises the death of a worker wherever this process is, for example while it writes a file
        handler = signal.getsignal(SIGCHLD) if SIGCHLD else None
        self.loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            collate_fn=partial(_collate, collate),
            worker_init_fn=_ignore_signals,
            pin_memory=pin,
        )
        self.batches = iter(self.loader)
        with suppress(ValueError):  # another thread than the main one sets no handlers, neither torch's nor this one
            if SIGCHLD:
                signal.signal(SIGCHLD, handler)
        self.failures: dict[int, str] = {}

    @property
    def workers(self) -> list[Any]:
        """The worker processes."""
        return list(getattr(self.batches, "_workers", ()))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        # the DataLoader's own timeout does not cover the transfer of a tensor, in which a frozen worker must answer
        watch = Timer(self.timeout, self._kill_workers) if self.workers and self.timeout else None
        try:
            if watch:
                watch.daemon = True
                watch.start()
            batch, failures = next(self.batches)
        except (RuntimeError, EOFError, OSError) as error:
            if self.timed_out:
                raise UserError(WORKER_HANGS.format(timeout=self.timeout)) from error
            # the connections of a killed process break a moment before it counts as dead
            if not wait([worker.sentinel for worker in self.workers], timeout=2):
                raise
            raise UserError(WORKER_DIED) from error
        finally:
            if watch:
                watch.cancel()
        self.failures |= failures
        if batch is None:
            raise UserError(next(reversed(failures.values())))
        return batch

    def close(self) -> None:
        """Stop the workers now."""
        workers, batches = self.workers, self.batches
        self.batches = iter(())
        for worker in workers if self.timed_out else ():
            worker.join()
        # the iterator may outlive this call in a traceback; until it is shut down it reports the death of its workers
        with suppress(AttributeError, RuntimeError):
            batches._shutdown_workers()  # type: ignore[union-attr]

    def _kill_workers(self) -> None:
        self.timed_out = True
        for worker in self.workers:
            worker.kill()  # SIGKILL, since workers ignore SIGTERM, and a stopped one can do nothing else


def _collate(collate: Callable[[list[Any]], Any], samples: list[Any]) -> tuple[Any, dict[int, str]]:
    failures: dict[int, str] = {}
    for position, sample in enumerate(samples):
        if isinstance(sample, FallbackSample):
            failures |= sample.failures
            samples[position] = sample.sample
    return None if None in samples else collate(samples), failures


def _ignore_signals(worker: int) -> None:
    # the trainer handles signals to the process group, and needs its workers to finish the step
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
