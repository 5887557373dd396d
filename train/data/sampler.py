"""The order of training samples, as a function of seed and position alone, and seeds for their augmentation.

A run is one stream of samples: one permutation of the data set after the other. The position in the stream is all that
a resume needs. Which worker, process or restart loads a sample changes neither the image nor its augmentation. The
samplers of torch and torchdata store the state of a generator instead, which ties a resume to the number of processes.
"""

import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from torch.utils.data import Sampler

from ..distributed.device import seed_accelerator

Key = tuple[int, int]  # epoch, index


class GlobalBatchSampler(Sampler[list[Key]]):
    """The micro-batches of one process: its part of every global batch from the position `start` on.

    A global batch has `world_size * accumulate` chunks of `micro_batch` samples; rank r takes the chunks
    r * accumulate to r * accumulate + accumulate - 1.
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
        """length: of the data set; start, stop: first position and end in the stream, in samples."""
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
        positions = (divmod(position, self.length) for position in range(start, stop))
        return [(epoch, int(permutation(self.seed, epoch, self.length)[number])) for epoch, number in positions]

    def following(self, key: Key) -> Iterator[int]:
        """The other indices of the key's epoch, in its order from the key on, then from its beginning."""
        order = permutation(self.seed, self.epoch(key), self.length)
        number = int(np.flatnonzero(order == key[1])[0])
        yield from map(int, chain(order[number + 1 :], order[:number]))

    def epoch(self, key: Key) -> int:
        """The epoch whose permutation contains a key."""
        return key[0]


class RepeatedAugSampler(GlobalBatchSampler):
    """Repeated augmentation (Hoffer et al., arXiv 1901.09335): `repeats` copies of an image in a batch.

    An epoch has as many samples as without, hence 1 / repeats of the images. All first copies of a batch come first,
    then all second ones, so that processes share the copies of an image. The key of a copy has an epoch number of its
    own, so that each copy is augmented differently.
    """

    def __init__(self, *, repeats: int, **options: int):
        super().__init__(**options)
        self.repeats = repeats

    def keys(self, start: int, stop: int) -> list[Key]:
        positions = (divmod(position, self.length) for position in range(start, stop))
        copies = sorted((number % self.repeats, epoch, number // self.repeats) for epoch, number in positions)
        return [
            (epoch * self.repeats + copy, int(permutation(self.seed, epoch, self.length)[image]))
            for copy, epoch, image in copies
        ]

    def epoch(self, key: Key) -> int:
        return key[0] // self.repeats


def eval_batches(length: int, batch: int, rank: int, world_size: int) -> list[list[Key]]:
    """The batches of one process over a data set of `length`, so that each sample is in one batch of one process."""
    keys = [(0, index) for index in range(rank, length, world_size)]
    return [keys[start : start + batch] for start in range(0, len(keys), batch)]


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(length)


def seed_all(*key: int, devices: bool = False) -> None:
    """Seed random, numpy and torch (with `devices` also its accelerator) with a function of `key`."""
    words = np.random.SeedSequence(key).generate_state(4, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(words[1:3].view(np.uint32))
    torch.default_generator.manual_seed(int(words[3]))
    if devices:
        seed_accelerator(int(words[3]))
