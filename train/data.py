"""Data: images of a split, in an order and with random numbers that depend on nothing but (seed, epoch, index).

A run is one stream of samples: epoch after epoch, each a permutation of the data set. The position in that stream is
all there is to resume; which worker, process or restart loads a sample changes neither the image nor its augmentation.
"""

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .errors import UserError
from .schema import Data

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
LAYOUT = "data.root needs train/CLASS/*.jpg and val/CLASS/*.jpg"
WORKER_DIED = (
    "a loader process died, as it does where memory is short; data.workers takes fewer of them. "
    "The same command goes on from the last checkpoint"
)
WORKER_HANGS = (
    "no batch came within {timeout:g} s: a loader process hangs, or the images come too slowly; look whether data.root "
    "can be read. The same command goes on from the last checkpoint, and guard.timeout makes it wait longer"
)
Key = tuple[int, int]  # epoch, index
Transform = Callable[[Any, Any], tuple[Any, Any]]  # image and target to what the model takes


def build_dataset(data: Data, split: str) -> Any:
    """The "train" or "val" split as pairs (PIL.Image RGB, class), untransformed, with `classes: list[str]`.

    Raises UserError naming a folder that is missing, unreadable or without images.
    """
    if data.source == "digits":
        from .demo_data import digits

        try:
            return digits(split)
        except ImportError as error:
            raise UserError(str(error)) from error
    usual = "validation" if split == "val" and data.source in ("hfds", "tfds") else split
    name = (data.train_split if split == "train" else data.val_split) or usual
    if data.source == "folder":
        return Folder(Path(str(data.root)) / name)
    from .readers import open_reader

    return open_reader(data, name)


def decoded(opener: Callable[[], Any], name: str) -> Image.Image:
    """The RGB image in the binary file that `opener()` opens. Raises UserError naming it, whatever is wrong with it."""
    with decoding(f"image {name}"), opener() as file, Image.open(file) as image:
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB; 16 bits are scaled, which PIL's own conversion would clip at 255."""
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers, whose white is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert("RGB")


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file within into the UserError that names it."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:  # what decoders raise at damaged files has no end
        raise UserError(f"{name} cannot be decoded ({error}); repair or remove the file") from error


class Folder(Dataset[tuple[Image.Image, int]]):
    """Images below `root/CLASS/`, classes in alphabetic order; paths in one array, so that workers share the memory."""

    def __init__(self, root: Path):
        try:
            folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
            files = [sorted(f for f in folder.rglob("*") if f.suffix.lower() in EXTENSIONS) for folder in folders]
        except OSError as error:
            raise UserError(f"image folder {root} cannot be read ({error.strerror}); {LAYOUT}") from error
        if empty := [folder.name for folder, found in zip(folders, files, strict=True) if not found]:
            raise UserError(
                f"class {empty[0]} in {root} holds no images ({', '.join(sorted(EXTENSIONS))}); add some or remove it"
            )
        if not folders:
            raise UserError(f"{root} holds no class folders, hence no images; {LAYOUT}")
        self.classes = [folder.name for folder in folders]
        self.paths = np.array([str(file).encode() for found in files for file in found])
        self.targets = np.repeat(np.arange(len(folders)), [len(found) for found in files])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self.paths[index].decode()
        return decoded(partial(open, path, "rb"), path), int(self.targets[index])


@dataclass
class Replaced:
    """A sample in the place of others, or None where none is left; why each of those others (by index) is lost."""

    sample: tuple[Any, Any, int] | None
    lost: dict[int, str]


class Seeded(Dataset[Any]):
    """`[(epoch, index)]` -> (image, target, index), transformed by generators seeded with (seed, epoch, index).

    A sample that the data set refuses with a UserError is replaced by the first good one of up to `spare` that follow
    it in the `order` of its epoch, transformed as the lost one would have been. So batches keep their size, no other
    sample or augmentation changes, and who loads it does not matter.
    """

    def __init__(
        self, dataset: Any, transform: Transform, seed: int, *, order: "GlobalOrder | None" = None, spare: int = 0
    ):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.order, self.spare = order, spare

    def __getitem__(self, key: Key) -> tuple[Any, Any, int] | Replaced:
        lost: dict[int, str] = {}
        following = self.order.following(key) if self.order else ()
        for index in chain((key[1],), islice(following, self.spare)):
            seed_all(self.seed, *key)
            try:
                image, target = self.dataset[index]
            except UserError as error:
                lost[index] = str(error)
                continue
            sample = (*self.transform(image, target), index)
            return Replaced(sample, lost) if lost else sample
        return Replaced(None, lost)


class GlobalOrder(Sampler[list[Key]]):
    """Micro-batches of keys for one process: its share of every global batch from position `start` on.

    A global batch is cut into `world_size * accumulate` chunks of `micro_batch`; process r takes the chunks
    r * accumulate, ..., r * accumulate + accumulate - 1.
    """

    def __init__(
        self,
        *,
        length: int,
        seed: int,
        micro_batch: int,
        accumulate: int,
        rank: int,
        world_size: int,
        start: int,
        stop: int,
    ):
        """length: of the data set; start, stop: first position and end of the stream, in samples."""
        self.length, self.seed = length, seed
        self.micro_batch, self.accumulate, self.rank = micro_batch, accumulate, rank
        self.batch = micro_batch * accumulate * world_size
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[list[Key]]:
        for position in range(self.start, self.stop, self.batch):
            keys = self.keys(position, position + self.batch)
            for chunk in range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate):
                yield keys[chunk * self.micro_batch : (chunk + 1) * self.micro_batch]

    def keys(self, start: int, stop: int) -> list[Key]:
        """The (epoch, index) at positions start, ..., stop - 1 of the stream."""
        places = (divmod(position, self.length) for position in range(start, stop))
        return [(epoch, int(permutation(self.seed, epoch, self.length)[place])) for epoch, place in places]

    def following(self, key: Key) -> Iterator[int]:
        """The other indices of the key's epoch in its order, from the key on and round its end."""
        order = permutation(self.seed, self.epoch(key), self.length)
        place = int(np.flatnonzero(order == key[1])[0])
        yield from map(int, chain(order[place + 1 :], order[:place]))

    def epoch(self, key: Key) -> int:
        """The epoch whose permutation a key is from."""
        return key[0]


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(length)


def seed_all(*key: int, devices: bool = False) -> None:
    """Seed random, numpy and torch (with `devices` also its GPUs) with a function of `key`."""
    words = np.random.SeedSequence(key).generate_state(4, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(words[1:3].view(np.uint32))
    torch.default_generator.manual_seed(int(words[3]))
    if devices and torch.cuda.is_available():
        # alone: torch.manual_seed would keep a stack trace for each kind of device that it does not find
        torch.cuda.manual_seed_all(int(words[3]))


class Loader:
    """Batches of a data set, from `workers` processes or from this one, read once; `close` ends the workers.

    `lost` collects the samples that could not be read, by index, and why. Where there is none to take the place of one,
    the batch is not to be had: UserError.
    """

    def __init__(
        self,
        dataset: Seeded,
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
            worker_init_fn=_deaf,
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
        if isinstance(sample, Replaced):
            lost |= sample.lost
            samples[place] = sample.sample
    return None if None in samples else collate(samples), lost


def _deaf(worker: int) -> None:
    # a signal to the whole process group is the trainer's to answer: it still needs its workers to finish the step
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
