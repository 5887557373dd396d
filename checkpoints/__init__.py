"""Published weights: what exists (`manifest.toml`), and how a file is fetched, verified, read and written.

This room knows no model: it deals in urls, hashes and dicts of tensors.
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
