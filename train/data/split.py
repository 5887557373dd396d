"""A validation split of data that have none: chosen by a hash of each sample's name, so that it does not depend on the
order or number of the other samples."""

import hashlib
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from ..recipe.schema import STRICT, Source

# names by which users call the parts of a data set
PART_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
Fraction = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SplitOptions(Source):
    """Keys of a source whose data may come without a validation part."""

    split: Fraction = 0.2
    """fraction of the images held out for validation by a hash of their names, if the data have no validation part"""


def held_out(names: Sequence[str], fraction: float, labels: Sequence[int] | None = None) -> np.ndarray:
    """Which samples belong to the validation split: bool [len(names)].

    A sample is held out if the hash of its name, scaled to [0, 1), lies below `fraction`, so a new sample moves no
    other one. With `labels`, a class of at least two samples of which this holds out none gives its sample of lowest
    hash, and one of which it holds out all keeps the sample of highest hash for training. Without them the same holds
    for all samples together.
    """
    hashes = np.array([_unit_hash(name) for name in names], dtype=np.float64)
    chosen = hashes < fraction
    groups = np.zeros(len(names), dtype=np.int64) if labels is None else np.asarray(labels)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        if len(members) < 2:
            chosen[members] = False
        elif not chosen[members].any():
            chosen[members[hashes[members].argmin()]] = True
        elif chosen[members].all():
            chosen[members[hashes[members].argmax()]] = False
    return chosen


def _unit_hash(name: str) -> float:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
