"""Published weights: the list of them (`manifest.toml`), and how their files are downloaded, checked, read and written.

This package knows no models: it handles urls, hashes and dicts of tensors.
"""

from .manifest import Weight, find_weight, load_manifest
from .store import cached_path, fetch, fetch_weight, read_state, sha256_of, verify, write_state

__all__ = [
    "Weight",
    "cached_path",
    "fetch",
    "fetch_weight",
    "find_weight",
    "load_manifest",
    "read_state",
    "sha256_of",
    "verify",
    "write_state",
]
