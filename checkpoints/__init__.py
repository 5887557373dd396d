"""Published weights: the lists of them (`manifest.toml` of classifiers, `dense.toml` of segmenters and
detectors), and how their files are downloaded, checked, read and written.

This package knows no models: it handles urls, hashes and dicts of tensors.
"""

from .manifest import (
    DenseWeight,
    Weight,
    WeightFile,
    find_dense_weight,
    find_weight,
    load_dense_manifest,
    load_manifest,
)
from .store import (
    cached_path,
    fetch,
    fetch_weight,
    find_local,
    imported_path,
    is_available,
    keep_imported,
    read_state,
    remove_cached,
    sha256_of,
    unknown_of,
    verify,
    write_state,
)

__all__ = [
    "DenseWeight",
    "Weight",
    "WeightFile",
    "cached_path",
    "fetch",
    "fetch_weight",
    "find_dense_weight",
    "find_local",
    "find_weight",
    "imported_path",
    "is_available",
    "keep_imported",
    "load_dense_manifest",
    "load_manifest",
    "read_state",
    "remove_cached",
    "sha256_of",
    "unknown_of",
    "verify",
    "write_state",
]
