"""Heads of transformers on a dense backbone: mask classification and query detectors.

Every head is built from the parts of the library and reads the maps of a `DenseBackbone`. The package transformers is
imported when a head is built, not before.
"""
