"""PLACEHOLDER train/data/sampler.py"""

import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from torch.utils.data import Sampler

Key = tuple[int, int]  # epoch, index


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


class RepeatedOrder(GlobalOrder):
    """The order of repeated augmentation (Hoffer et al., arXiv 1901.09335): `repeats` copies of an image in a row.

    An epoch has as many samples as ever, hence a share of 1 / repeats of the images. In a batch all first copies come
    first, then all second ones: on several processes they fall to different ones. A copy's key counts as an epoch of
    its own, so that each is augmented anew.
    """

    def __init__(self, *, repeats: int, **order: int):
        super().__init__(**order)
        self.repeats = repeats

    def keys(self, start: int, stop: int) -> list[Key]:
        places = (divmod(position, self.length) for position in range(start, stop))
        copies = sorted((place % self.repeats, epoch, place // self.repeats) for epoch, place in places)
        return [
            (epoch * self.repeats + copy, int(permutation(self.seed, epoch, self.length)[image]))
            for copy, epoch, image in copies
        ]

    def epoch(self, key: Key) -> int:
        return key[0] // self.repeats
