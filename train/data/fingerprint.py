"""What a split of a data set was when a run learned from it, so that a later start can tell whether it still is."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

MAX_SIZES = 100_000  # files whose size is asked for, evenly spaced: each costs a request to the file system


def fingerprint(dataset: Any) -> dict[str, Any]:
    """The number of samples, and digests of their names (`image_path`) and of their sizes in bytes and `contents`."""
    names = [dataset.image_path(index) for index in range(len(dataset))] if hasattr(dataset, "image_path") else []
    contents = dataset.contents() if hasattr(dataset, "contents") else [getattr(dataset, "targets", ())]
    return {
        "samples": len(dataset),
        "names": _digest(name.encode("utf-8", "surrogateescape") + b"\0" for name in names),
        "contents": _digest(np.ascontiguousarray(array).tobytes() for array in (file_sizes(names), *contents)),
    }


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A text for each split whose fingerprint `now` differs from that of `then`, as it stands in a checkpoint."""
    found = []
    for split, (before, after) in {split: (then[split], now[split]) for split in now if split in then}.items():
        if before["samples"] != after["samples"]:
            found.append(f"{split} had {before['samples']} samples, now {after['samples']}")
        elif before["names"] != after["names"]:
            found.append(f"the {after['samples']} samples of {split} have other names")
        elif before["contents"] != after["contents"]:
            found.append(f"the {after['samples']} samples of {split} have other sizes or labels")
    return found


def file_sizes(names: Iterable[str]) -> np.ndarray:
    """The sizes in bytes of at most `MAX_SIZES` of the files, evenly spaced; -1 for a missing file."""
    names = list(names)
    return np.array([_size(name) for name in names[:: 1 + len(names) // MAX_SIZES]], np.int64)


def _size(name: str) -> int:
    try:
        return os.stat(name).st_size
    except (OSError, ValueError):  # a member of an archive, or a missing file
        return -1


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
